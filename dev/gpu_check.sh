#!/bin/bash
# Everything that only a GPU can say about this project, in one command of about ten minutes:
#
#   dev/gpu_check.sh [tests] [sanitize] [kernels] [bench]     no argument: all four, in this order
#
#   tests      every test of the trainer, its kernels and the workbench, fp32 and bf16; the same bits in two runs and at every -r;
#              the first losses beside the CPU build's; the quick start to 80 % top-1
#   sanitize   compute-sanitizer's four tools
#   kernels    the workbench's times (tables in the log)
#   bench      training steps, memory planned and measured, PyTorch's rows where it has CUDA, and the goals
#
# A row is a line: ok, NOT OK or not run; name; value; seconds. It is printed when it is had and appended to OUT/gpu_check.jsonl, together
# with the workbench's and PyTorch's own lines; what the commands printed is in OUT/gpu_check.log. So a time limit loses nothing, and
# there are only two files to fetch. The last line counts, the exit code is 1 when a row is NOT OK. It needs no network.
#
#   OUT               where the two files go (build/gpu_check)
#   ARCH              what nvcc builds for (sm_NN of the GPU found)
#   PEER_PYTHON       a Python with PyTorch (python3)
#   GPU_CHECK_DEVICE  cpu: the same rows with small sizes on the CPU device, in two or three minutes: tests this script, not a GPU
set -u
export LC_ALL=C PATH=$PATH:/usr/local/cuda/bin
out=$(realpath -m "${OUT:-"$(dirname "$0")/../build/gpu_check"}")
cd "$(dirname "$0")/.." || exit 1
make=${MAKE:-make}
python=${PEER_PYTHON:-python3}
dump=dev/reference/dumps/deit_odd_g70.safetensors
parts=${*:-tests sanitize kernels bench}
for part in $parts; do
    case $part in tests | sanitize | kernels | bench) ;; *) echo "unknown part $part; there are tests, sanitize, kernels and bench" >&2; exit 1 ;; esac
done
cores=$(nproc)

# ---- sizes, and seconds that a part may take
case ${GPU_CHECK_DEVICE:-cuda} in
    cuda)
        device=cuda parallel=4 steps=5 dumps='' quick_start='-g 0.7' top1=80 time=-time
        models='deit_small deit_base deit_tiny' bench_steps=15 peer='' peer_seconds=80 sanitize_seconds=120 sanitize_each=60 bench_seconds=240
        declare -A batch=([deit_tiny]=256 [deit_small]=256 [deit_base]=128) ;; # as in bench_deit.py
    cpu)
        device=cpu parallel=1 steps=2 dumps=$dump quick_start='-g 0.7 -e 1' top1=45 time=
        models=deit_nano bench_steps=2 peer='--device cpu --quick' peer_seconds=40 sanitize_seconds=120 sanitize_each=60 bench_seconds=90
        declare -A batch=([deit_nano]=16) ;;
    *) echo "GPU_CHECK_DEVICE is '$GPU_CHECK_DEVICE'; it can be cpu or cuda" >&2; exit 1 ;;
esac
declare -A gmacs=([deit_tiny]=1.26 [deit_small]=4.61 [deit_base]=17.5) # multiply-adds of a forward pass, 1e9

# ---- the machine
if [ $device = cuda ]; then
    nvidia-smi -L 2>/dev/null | grep '^GPU' ||
        { echo "no GPU: nvidia-smi -L lists none; GPU_CHECK_DEVICE=cpu tries this script on the CPU" >&2; exit 1; }
    command -v nvcc >/dev/null || { echo "nvcc is not in PATH; install the CUDA toolkit" >&2; exit 1; }
    IFS=, read -r gpu memory driver capability < <(nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader)
    arch=${ARCH:-sm_$(echo "$capability" | tr -d ' .')}
    toolkit=$(nvcc --version | grep -o 'release.*')
    fp32=build/gpu-fp32 bf16=build/gpu-bf16
    flags="DEVICE=cuda ARCH=$arch NO_MPI=1"
else
    gpu="CPU, $cores cores" memory='' driver='' arch=native toolkit="g++ $(g++ -dumpfullversion)"
    fp32=build/cpu-fp32 bf16=build/cpu-bf16
    flags=DEVICE=cpu
fi
mkdir -p "$out" || exit 1
work=$(mktemp -d)
rows=$out/gpu_check.jsonl
touch "$rows"
rows_before=$(wc -l <"$rows")
echo "$gpu |$memory | driver$driver | $toolkit | built for $arch"
echo "{\"what\": \"machine\", \"gpu\": \"$gpu\", \"memory\": \"${memory# }\", \"driver\": \"${driver# }\", \"toolkit\": \"$toolkit\", \"arch\": \"$arch\"," \
    "\"commit\": \"$(git rev-parse --short HEAD 2>/dev/null)\", \"date\": \"$(date -u +%FT%TZ)\"}" >>"$rows"

finish() {
    local counts ok bad missing
    counts=$(tail -n +$((rows_before + 1)) "$rows")
    ok=$(grep -c '"verdict": "ok"' <<<"$counts")
    bad=$(grep -c '"verdict": "NOT OK"' <<<"$counts")
    missing=$(grep -c '"verdict": "not run"' <<<"$counts")
    rm -rf "$work"
    echo "${stopped:+stopped; }$ok passed, $bad failed, $missing not run"
    [ -z "${stopped:-}" ] && [ "$bad" -eq 0 ] && [ "$ok" -gt 0 ]
    exit $?
}
trap finish EXIT
trap 'trap "" INT TERM; kill $(jobs -p) 2>/dev/null; stopped=1; exit 1' INT TERM # timeout sends it twice

# ---- rows
now() { echo "${EPOCHREALTIME/./}"; } # microseconds

# emit VERDICT NAME VALUE MICROSECONDS [FIELDS [MORE]]: prints a row and keeps it, FIELDS being more of the JSON, MORE lines below the row
emit() {
    local seconds value=${3//\\/\\\\}
    seconds=$(($4 / 1000000)).$(($4 / 100000 % 10))
    value=${value//\"/\\\"}
    printf '%-7s %-8s %-32s %-64s %6s s\n%s' "$1" "$part" "$2" "$3" $seconds "${6:+$6
}"
    printf '{"what": "row", "verdict": "%s", "part": "%s", "name": "%s", "value": "%s", "seconds": %s%s}\n' \
        "$1" "$part" "$2" "${value//[[:cntrl:]]/ }" $seconds "${5:+, $5}" >>"$rows"
}

# run NAME SECONDS COMMAND...: its output goes to $log and to the log of all, its exit code to $code, its time to $us
run() {
    local name=$1 limit=$2 began
    shift 2
    log=$work/$name.log
    began=$(now)
    timeout -k 5 "$limit" "$@" >"$log" 2>&1 </dev/null &
    wait $!
    code=$?
    us=$(($(now) - began))
    (
        flock 9
        echo "==== $part $name: exit code $code of: $*"
        head -c 200000 "$log"
    ) 9>>"$out/gpu_check.log" >&9
}

# why the last command failed, for a row; and more of its log below the row
complaint() {
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then echo "exit code $code: killed, or no end in time"; else echo "exit code $code: $(tail -n 1 "$log")"; fi
}
excerpt() { { grep -E 'NOT OK|^FAIL|rror|ERROR|azard' "$log" | head -n 8; tail -n 4 "$log"; } | cut -c 1-200 | awk '!seen[$0]++ { print "        " $0 }'; }

# reject NAME VALUE MICROSECONDS: a row that is NOT OK, with an excerpt of the last command's log
reject() { emit 'NOT OK' "$1" "$2" "$3" '' "$(excerpt)"; }

# counted NAME SECONDS PROGRAM...: a test whose last line is "N passed, M failed"
counted() {
    run "$@"
    if [ $code -eq 0 ] && tail -n 1 "$log" | grep -Eq '^[1-9][0-9]* passed, 0 failed$'; then
        emit ok "$1" "$(tail -n 1 "$log")" $us
    else
        reject "$1" "$(complaint)" $us
    fi
}

# spawn FUNCTION ARGUMENTS...: beside others
spawn() {
    while [ "$(jobs -rp | wc -l)" -ge $parallel ]; do wait -n; done
    (
        trap 'kill $(jobs -p) 2>/dev/null; exit 1' TERM
        "$@"
    ) &
}

# ---- build: only what the parts need
tests='test_deit dev/test/test_kernels dev/test/test_dropit dev/test/test_augment dev/test/test_resize'
workbench=$(for f in dev/cuda/*.cu; do [ ! -e "$f" ] || echo "${f%.cu}"; done)
wanted=
for part in $parts; do
    case $part in
        tests) wanted+=" train_deit $tests dev/test/test_files dev/test/test_recipes dev/test/test_cpu_libs $workbench" ;;
        sanitize) wanted+=" $tests" ;;
        kernels) wanted+=" $workbench" ;;
        bench) wanted+=" train_deit" ;;
    esac
done
wanted=$(echo "$wanted" | tr ' ' '\n' | sort -u) # words, as $flags and others below: shellcheck -e SC2086

# build NAME DIRECTORY FLAGS PROGRAMS: one that cannot be built leaves the others alone, and none of before behind
build() {
    local directory=$2 flags=$3 targets lost=
    targets=$(printf "$directory/%s " $4)
    run "$1" 400 $make --no-print-directory -s -k -j "$cores" $flags BUILD="$directory" $targets
    if [ $code -ne 0 ]; then
        for target in $targets; do
            for source in "${target#"$directory"/}.cu" train_deit.cu dev/cuda/*.cuh; do
                [ "$target" -nt "$source" ] || { rm -f "$target"; lost+=" $target"; break; }
            done
        done
        reject "$1" "exit code $code; without$lost" $us
    else
        emit ok "$1" "$(echo "$targets" | wc -w) programs, $(grep -c warning "$log") warnings" $us
    fi
}
part=build
builds=$parallel parallel=3 # make shares the cores
[ "$device" = cuda ] || parallel=1
spawn build build_bf16 $bf16 "$flags PRECISION=BF16" "$wanted"
spawn build build_fp32 $fp32 "$flags PRECISION=FP32" "$wanted"
if [ $device = cuda ] && [[ " $parts " == *" tests "* ]]; then
    spawn build build_cpu_reference build/cpu-fp32 "DEVICE=cpu PRECISION=FP32" train_deit
fi
wait
parallel=$builds

# ---- tests
# the log of a run without its times
losses() { sed 's/ ms:.*//' "$1/main.log" 2>/dev/null; }

# same_losses PRECISION GAMMA: two runs of one command, and every level of recomputation, give the same bits
same_losses() {
    local name=losses_$1_g$2 directory=$fp32 began first='' these levels=0 total
    [ "$1" = fp32 ] || directory=$bf16
    began=$(now)
    for r in 1 1 0 2 3; do
        run "$name.$levels" 60 $directory/train_deit -b 50 -x $steps -g "$2" -r $r -o "$work/$name.$levels"
        these=$(losses "$work/$name.$levels")
        [ -n "$first" ] || first=$these
        total=$(($(now) - began))
        if [ $code -ne 0 ] || [ -z "$these" ]; then reject "$name" "-r $r: $(complaint)" $total; return; fi
        if [ "$these" != "$first" ]; then
            emit 'NOT OK' "$name" "-r $r: $(diff <(echo "$first") <(echo "$these") | sed -n 's/^[<>] //p' | head -n 2 | tr '\n' ' ')" $total
            return
        fi
        levels=$((levels + 1))
    done
    emit ok "$name" "$levels runs at -r 1, 1, 0, 2, 3: the same $(echo "$first" | wc -l) lines" $total
}

# close_losses NAME DIRECTORY DIRECTORY TOLERANCE: relative differences of the losses of two runs' logs
close_losses() {
    local value
    # NaN is text to some awks, and compares false: only a number that is small enough passes
    if value=$(paste <(losses "$2" | grep -o '[a-z]*l:[^ ]*') <(losses "$3" | grep -o '[a-z]*l:[^ ]*') | tr ':' '\t' | awk -v most="$4" '
        { n++; if ($1 != $3 || $2 !~ /^[0-9]/ || $4 !~ /^[0-9]/) { bad = 1 } d = ($2 - $4) / $4; if (d < 0) d = -d; if (d > worst) worst = d }
        END { printf "%d losses, largest relative difference %.1e, allowed %g", n, worst, most; exit !(n > 1 && !bad && worst <= most) }'); then
        emit ok "$1" "$value" 0
    else
        emit 'NOT OK' "$1" "$value" 0
    fi
}

# quick PRECISION: the README's second command
quick() {
    local directory=$fp32 reached
    [ "$1" = fp32 ] || directory=$bf16
    run "quick_start_$1" 180 $directory/train_deit $quick_start
    reached=$(tail -n 1 "$log" | sed -n 's/^final loss=.* top1=\([0-9.]*\) top5=.*/\1/p')
    if [ $code -eq 0 ] && awk -v r="${reached:-0}" -v t=$top1 'BEGIN { exit !(r >= t) }'; then
        emit ok "quick_start_$1" "top-1 $reached %, at least $top1" $us "\"top1\": $reached"
    else
        emit 'NOT OK' "quick_start_$1" "top-1 ${reached:-?} %, wanted $top1; $(complaint)" $us
    fi
}

part_tests() {
    for precision in bf16 fp32; do
        directory=$fp32
        [ $precision = fp32 ] || directory=$bf16
        spawn counted deit_$precision 120 $directory/test_deit $dumps
        for test in kernels dropit augment resize files; do spawn counted ${test}_$precision 120 $directory/dev/test/test_$test; done
        for program in $workbench; do spawn counted "$(basename "$program")_$precision" 120 "$directory/$program"; done
        for gamma in 0 0.7 0.9; do spawn same_losses $precision $gamma; done
        spawn quick $precision
    done
    spawn counted recipes 120 $fp32/dev/test/test_recipes
    # it checks the CPU's cuBLAS; on a GPU, what it expects of one
    spawn counted cpu_libs 120 $fp32/dev/test/test_cpu_libs
    wait
    for gamma in 0 0.7; do
        close_losses bf16_by_fp32_g$gamma "$work/losses_bf16_g$gamma.0" "$work/losses_fp32_g$gamma.0" 2e-2
        run cpu_g$gamma 120 build/cpu-fp32/train_deit -b 50 -x $steps -g $gamma -o "$work/cpu_g$gamma"
        close_losses fp32_by_cpu_g$gamma "$work/losses_fp32_g$gamma.0" "$work/cpu_g$gamma" 1e-3
    done
}

# ---- sanitize
# sanitized NAME TOOL PROGRAM...: what ends without the tool's verdict is not run, and passes nothing
sanitized() {
    local name=$1 tool=$2 left=$((deadline - SECONDS)) summary
    shift 2
    if [ $left -lt 3 ]; then emit 'not run' "$name" "the $sanitize_seconds s of this part are over" 0; return; fi
    [ $left -lt $sanitize_each ] || left=$sanitize_each # so that one cannot take the time of all
    run "$name" $left "$sanitizer" --tool "$tool" --error-exitcode 99 "$@"
    summary=$(grep -o '[A-Z]* SUMMARY: .*' "$log" | tail -n 1)
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        emit 'not run' "$name" "no verdict in $left s" $us
    elif grep -q 'Device not supported' "$log"; then
        emit 'not run' "$name" "compute-sanitizer: Device not supported" $us
    elif [ $code -eq 0 ] && [[ $summary =~ SUMMARY:\ 0\ (errors|hazards) ]]; then
        emit ok "$name" "$summary" $us
    else
        reject "$name" "exit code $code: ${summary:-$(tail -n 1 "$log")}" $us
    fi
}

part_sanitize() {
    sanitizer=$(command -v compute-sanitizer)
    deadline=$((SECONDS + sanitize_seconds))
    for precision in bf16 fp32; do
        directory=$fp32
        [ $precision = fp32 ] || directory=$bf16
        for tool in memcheck racecheck initcheck synccheck; do
            if [ -z "$sanitizer" ]; then emit 'not run' ${tool}_$precision "compute-sanitizer is not installed" 0; continue; fi
            spawn sanitized ${tool}_dropit_$precision $tool $directory/dev/test/test_dropit -quick
            spawn sanitized ${tool}_kernels_$precision $tool $directory/dev/test/test_kernels
            spawn sanitized ${tool}_augment_$precision $tool $directory/dev/test/test_augment
            [ $precision = bf16 ] || spawn sanitized ${tool}_resize $tool $directory/dev/test/test_resize -quick # bytes in both
            spawn sanitized ${tool}_deit_$precision $tool $directory/test_deit -steps $dump
        done
    done
    wait
}

# ---- kernels
part_kernels() {
    local timed
    [ -n "$workbench" ] || emit 'not run' workbench "dev/cuda has no program" 0
    for precision in bf16 fp32; do
        directory=$fp32
        [ $precision = fp32 ] || directory=$bf16
        for program in $workbench; do
            name=$(basename "$program")_$precision
            timed=$(wc -l <"$rows")
            run "$name" 45 "$directory/$program" $time -json "$rows"
            timed=$(($(wc -l <"$rows") - timed))
            if [ $code -eq 0 ] && { [ $timed -gt 0 ] || [ -z "$time" ]; }; then
                emit ok "$name" "$(tail -n 1 "$log"); $timed times" $us
            else
                reject "$name" "$timed times; $(complaint)" $us
            fi
        done
    done
}

# ---- bench
# the GPU's bf16 operations/s, from the workbench's table; empty where it is not known
peak=$(awk -F'[{},"]+' -v gpu="$gpu" '/^static const Gpu gpus/ { on = 1 } on && /^};/ { exit } on && NF > 4 && index(gpu, $2) { print $4 + 0; exit }' dev/cuda/common.cuh)
declare -A rate median worst # by name: images/s, ms; by model: of measured over planned bytes, what is furthest from 1

number() { sed -n "s/.*$2=\([0-9.]*\).*/\1/p" <<<"$1"; }

# own MODEL GAMMA LEVEL: times the trainer in bf16
own() {
    local name=$1_g$2_r$3 planned measured line mfu share
    if [ $SECONDS -ge $deadline ]; then emit 'not run' "$name" "the $bench_seconds s of this part are over" 0; return; fi
    run "$name" 60 $bf16/train_deit -m "$1" -b "${batch[$1]}" -g "$2" -r "$3" -bench $bench_steps
    line=$(tail -n 1 "$log")
    if grep -q 'bytes of device memory are needed' "$log"; then emit 'not run' "$name" "$line" $us; return; fi
    if [ $code -ne 0 ] || [[ $line != "bench ms_min="* ]]; then reject "$name" "$(complaint)" $us; return; fi
    rate[$name]=$(number "$line" images_per_s)
    median[$name]=$(number "$line" ms_median)
    mfu=$(awk -v r="${rate[$name]}" -v g="${gmacs[$1]:-0}" -v p="${peak:-0}" 'BEGIN { if (g * p > 0) printf "%.1f", 100 * 6e9 * g * r / p }')
    planned=$(number "$line" bytes_planned)
    measured=$(number "$line" bytes_used)
    share=$(awk -v m="${measured:-0}" -v p="${planned:-0}" 'BEGIN { if (m * p > 0) printf "%.4f", m / p }')
    worst[$1]=$(awk -v a="${worst[$1]:-}" -v b="$share" 'BEGIN { print b == "" || (a != "" && (a - 1)^2 >= (b - 1)^2) ? a : b }')
    emit ok "$name" "b ${batch[$1]}: ms $(number "$line" ms_min) median ${median[$name]}, ${rate[$name]} images/s, MFU ${mfu:--} %, MiB planned $((${planned:-0} / 1048576)), measured $((${measured:-0} / 1048576))" $us \
        "\"model\": \"$1\", \"batch\": ${batch[$1]}, \"gamma\": $2, \"recompute\": $3, \"ms_min\": $(number "$line" ms_min), \"ms_median\": ${median[$name]}, \"images_per_s\": ${rate[$name]}, \"mfu_percent\": ${mfu:-null}, \"planned\": ${planned:-null}, \"measured\": ${measured:-null}"
}

# PyTorch's rows: each line of JSON as it comes
peers() {
    local line name memory='' began last=''
    began=$(now)
    while IFS= read -r line; do
        [[ $line == '{'* ]] || continue
        echo "$line" >>"$rows"
        name=$(sed -n 's/.*"model": "\([^"]*\)".*"kind": "\([^"]*\)".*/\1 \2/p' <<<"$line")
        last=$line
        if [[ $line == *'"not_run"'* ]]; then
            line=${line#*not_run\": \"}
            emit 'not run' "$name" "PyTorch: ${line%\"*}" $(($(now) - began))
        else
            line=${line//\"/}
            line=${line//: /=}
            rate[$name]=$(number "$line" images_per_s)
            memory=$(number "$line" peak)
            emit ok "$name" "PyTorch $(number "$line" torch), b $(number "$line" batch): ms $(number "$line" ms_min) median $(number "$line" ms_median), ${rate[$name]} images/s, MiB peak ${memory:+$((memory / 1048576))}" $(($(now) - began))
        fi
        began=$(now)
    done < <(timeout -k 5 $((peer_seconds + 15)) "$python" dev/reference/bench_deit.py --json --seconds $peer_seconds $peer 2>"$work/peer.log" || echo "$? $(grep '^not run: ' "$work/peer.log")" >"$work/peer.code")
    { echo "==== bench PyTorch: $(cat "$work/peer.code" 2>/dev/null)"; head -c 100000 "$work/peer.log"; } >>"$out/gpu_check.log"
    if [ -z "$last" ] && grep -q '^not run: ' "$work/peer.log"; then
        emit 'not run' PyTorch "$(sed -n 's/^not run: //p' "$work/peer.log")" $(($(now) - began))
    elif [ -z "$last" ] || [ -e "$work/peer.code" ]; then
        emit 'NOT OK' PyTorch "bench_deit.py: $(cat "$work/peer.code" 2>/dev/null) $(tail -n 1 "$work/peer.log")" $(($(now) - began))
    fi
}

# goal NAME A B [least|most LIMIT]: A over B; on the CPU device nothing is asked of it
goal() {
    local ratio goal='' verdict=ok
    if [ -z "$2" ] || [ -z "$3" ]; then emit 'not run' "$1" "one of the two numbers is not there" 0; return; fi
    ratio=$(awk -v a="$2" -v b="$3" 'BEGIN { printf "%.3f", a / b }')
    if [ $device = cuda ] && [ $# -eq 5 ]; then
        goal=", goal: at $4 $5"
        awk -v r="$ratio" -v l="$5" -v k="$4" 'BEGIN { exit !(k == "least" ? r >= l : r <= l) }' || verdict='NOT OK'
    fi
    emit "$verdict" "$1" "$ratio$goal" 0 "\"ratio\": $ratio"
}

part_bench() {
    local m=${models%% *}
    deadline=$((SECONDS + bench_seconds))
    # what the goals need first, then PyTorch, then the rest
    for level in 0 1; do for gamma in 0 0.7; do own "$m" $gamma $level; done; done
    peers
    for level in 0 1; do own "$m" 0.9 $level; done
    for level in 2 3; do for gamma in 0 0.7 0.9; do own "$m" $gamma $level; done; done
    for model in ${models#"$m"}; do
        for level in 0 1 2 3; do for gamma in 0 0.7 0.9; do own "$model" $gamma $level; done; done
    done
    for model in $models; do
        [ "$model" = "$m" ] || [ -n "${median[${model}_g0_r0]:-}" ] || continue
        limit=()
        [ "$model" != "$m" ] || limit=(least 0.9) # the goal is deit_small's
        goal "${model}_over_torch.compile" "${rate[${model}_g0_r0]:-}" "${rate[$model torch.compile]:-}" "${limit[@]}"
        goal "${model}_over_eager" "${rate[${model}_g0_r0]:-}" "${rate[$model eager]:-}"
        for level in 0 1; do
            goal "${model}_g0.7_over_g0_r$level" "${median[${model}_g0.7_r$level]:-}" "${median[${model}_g0_r$level]:-}" most 1.15
        done
        if [ -z "${worst[$model]:-}" ]; then
            emit 'not run' "${model}_memory" "no row of the trainer tells bytes_planned and bytes_used" 0
        elif awk -v w="${worst[$model]}" 'BEGIN { exit !(w >= 0.98 && w <= 1.02) }'; then
            emit ok "${model}_memory" "measured over planned: worst ${worst[$model]}, goal: within 2 %" 0 "\"ratio\": ${worst[$model]}"
        else
            emit 'NOT OK' "${model}_memory" "measured over planned: worst ${worst[$model]}, goal: within 2 %" 0 "\"ratio\": ${worst[$model]}"
        fi
    done
}

for part in $parts; do part_$part; done
