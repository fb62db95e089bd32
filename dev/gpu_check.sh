#!/bin/bash
# Everything that only a GPU can say about this project. Two calls, each of which ends within nine minutes:
#
#   dev/gpu_check.sh bench kernels     the speed, then
#   dev/gpu_check.sh tests sanitize    whether it is right. Without an argument: all four, within eighteen minutes
#
#   bench      training steps (dev/bench), memory planned and used, PyTorch's rows where it has CUDA, and the goals
#   kernels    the workbench's times (tables in the log)
#   tests      every test of the trainer, its kernels and the workbench, fp32 and bf16; the same bits in two
#              runs and at every -r; the first losses beside the CPU build's; the quick start to 80 % top-1
#   sanitize   compute-sanitizer's four tools
#
# A row is a line: ok, NOT OK or not run; name; value; seconds. It is printed as soon as it is known and
# appended to OUT/gpu_check.jsonl, together with the workbench's and PyTorch's own lines;
# OUT/gpu_check.log has what the commands printed. So nothing is lost when a time limit ends the script,
# and there are only two files to fetch. At the end the rows that are NOT OK are named again, the last
# line counts, and the exit code is 1 if there are any. No network is needed.
#
#   OUT               where the two files go (build/gpu_check)
#   ARCH              what nvcc builds for (sm_NN of the GPU found)
#   PEER_PYTHON       a Python with PyTorch (python3)
#   GPU_CHECK_DEVICE  cpu: the same rows with small sizes on the CPU device, to test this script without a GPU
set -u
export LC_ALL=C PATH=$PATH:/usr/local/cuda/bin
out=$(realpath -m "${OUT:-"$(dirname "$0")/../build/gpu_check"}")
cd "$(dirname "$0")/.." || exit 1
make=${MAKE:-make}
python=${PEER_PYTHON:-python3}
dump=dev/reference/dumps/deit_odd_g70.safetensors
parts=${*:-bench kernels tests sanitize}
for part in $parts; do
    case $part in
        bench | kernels | tests | sanitize) ;;
        *) echo "unknown part $part; there are bench, kernels, tests and sanitize" >&2; exit 1 ;;
    esac
done
cores=$(nproc)
call_seconds=540 # of this call; what would begin later is not run
[ "$(echo $parts | wc -w)" -le 2 ] || call_seconds=1080

# ---- sizes, and seconds that a part may take
case ${GPU_CHECK_DEVICE:-cuda} in
    cuda)
        device=cuda parallel=2 steps=5 dumps='' quick_start='-g 0.7' top1=80 time=-time
        models='deit_small deit_base deit_tiny' bench_steps=15 bench_seconds=270
        peer='' peer_seconds=150 sanitize_each=60
        declare -A batch=([deit_tiny]=256 [deit_small]=256 [deit_base]=128) ;; # as in bench_deit.py
    cpu)
        device=cpu parallel=1 steps=2 dumps=$dump quick_start='-g 0.7 -e 1' top1=45 time=
        models=deit_nano bench_steps=2 bench_seconds=90 peer='--device cpu --quick' peer_seconds=40 sanitize_each=60
        call_seconds=3600
        declare -A batch=([deit_nano]=16) ;;
    *) echo "GPU_CHECK_DEVICE is '$GPU_CHECK_DEVICE'; it can be cpu or cuda" >&2; exit 1 ;;
esac
declare -A gmacs=([deit_tiny]=1.26 [deit_small]=4.61 [deit_base]=17.5) # multiply-adds of a forward pass, 1e9

# ---- the machine: what it lacks is said before anything is built
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
lacks=
links() { # does a program that calls cuBLAS compile and link?
    printf '%s\n' '#include <cublasLt.h>' '#include <cublas_v2.h>' \
        'int main() { cublasHandle_t h; return cublasCreate(&h) + !cublasLtGetVersion(); }' >"$work/links.cu"
    nvcc "$work/links.cu" -o "$work/links" -lcublas -lcublasLt >"$work/links.log" 2>&1
}
# Where the toolkit has no cuBLAS: that of Python's nvidia wheels. They have no libcublas.so, only libcublas.so.N
use_wheels() {
    local packages folder include='' library=''
    packages=$("$python" -c 'import nvidia; print(*nvidia.__path__, sep="\n")' 2>/dev/null)
    while IFS= read -r folder; do
        [ -n "$include" ] || include=$(find "$folder" -name cublas_v2.h -printf '%h\n' 2>/dev/null | head -n 1)
        [ -n "$library" ] || library=$(find "$folder" -name 'libcublasLt.so.*' -printf '%h\n' 2>/dev/null | head -n 1)
    done <<<"$packages"
    [ -n "$include" ] && [ -n "$library" ] || return 1
    mkdir -p build/gpu_check_lib
    for name in cublas cublasLt; do
        ln -sf "$(find "$library" -name "lib$name.so.*" | head -n 1)" build/gpu_check_lib/lib$name.so
    done
    # nvcc reads this variable, so every build below uses them
    export NVCC_APPEND_FLAGS="-I$include -L$PWD/build/gpu_check_lib -Xlinker -rpath=$library"
    links || return 1
    lacks+="cuBLAS is not in the CUDA toolkit; the build uses the one in $library. "
}
if [ $device = cuda ]; then
    nvidia-smi -L 2>/dev/null | grep '^GPU' ||
        { echo "no GPU: nvidia-smi -L lists none; GPU_CHECK_DEVICE=cpu tries this script on the CPU" >&2; exit 1; }
    command -v nvcc >/dev/null || { echo "nvcc is not in PATH; install the CUDA toolkit" >&2; exit 1; }
    command -v g++ >/dev/null || { echo "g++ is not installed, and nvcc needs it (apt install g++)" >&2; exit 1; }
    links || use_wheels || {
        cat "$work/links.log" >&2
        echo "cuBLAS (cublas_v2.h, cublasLt.h, libcublas.so, libcublasLt.so) is neither in the CUDA toolkit nor in" \
            "nvidia wheels of $python; install libcublas-dev of the toolkit, or pip install nvidia-cublas" >&2
        exit 1
    }
    command -v "$make" >/dev/null ||
        lacks+="make is not installed (apt install make); nvcc builds each program, and no CPU build is compared with. "
    fields=name,memory.total,driver_version,compute_cap
    IFS=, read -r gpu memory driver capability < <(nvidia-smi --query-gpu=$fields --format=csv,noheader)
    arch=${ARCH:-sm_$(echo "$capability" | tr -d ' .')}
    toolkit=$(nvcc --version | grep -o 'release.*')
    fp32=build/gpu-fp32 bf16=build/gpu-bf16
    flags="DEVICE=cuda ARCH=$arch NO_MPI=1"
else
    gpu="CPU, $cores cores" memory='' driver='' arch=native toolkit="g++ $(g++ -dumpfullversion)"
    fp32=build/cpu-fp32 bf16=build/cpu-bf16
    flags=DEVICE=cpu
    command -v "$make" >/dev/null || { echo "make is not installed (apt install make)" >&2; exit 1; }
fi
command -v "$python" >/dev/null || lacks+="$python is not installed; PyTorch is not compared with. "
[ $device = cpu ] || command -v compute-sanitizer >/dev/null || lacks+="compute-sanitizer is not installed. "
mkdir -p "$out" || exit 1
rows=$out/gpu_check.jsonl
touch "$rows"
rows_before=$(wc -l <"$rows")
echo "$gpu |$memory | driver$driver | $toolkit | built for $arch"
[ -z "$lacks" ] || echo "this machine lacks something: $lacks"
printf '{"what": "machine", "gpu": "%s", "memory": "%s", "driver": "%s", "toolkit": "%s", ' \
    "$gpu" "${memory# }" "${driver# }" "$toolkit" >>"$rows"
printf '"arch": "%s", "lacks": "%s", "commit": "%s", "date": "%s"}\n' \
    "$arch" "$lacks" "$(git rev-parse --short HEAD 2>/dev/null)" "$(date -u +%FT%TZ)" >>"$rows"

finish() {
    local counts ok bad missing
    counts=$(tail -n +$((rows_before + 1)) "$rows")
    ok=$(grep -c '"verdict": "ok"' <<<"$counts")
    bad=$(grep -c '"verdict": "NOT OK"' <<<"$counts")
    missing=$(grep -c '"verdict": "not run"' <<<"$counts")
    rm -rf "$work"
    if [ "$bad" -gt 0 ]; then
        echo "NOT OK:"
        sed -nE 's/.*"NOT OK", "part": "([^"]*)", "name": "([^"]*)", "value": "(.*)", "seconds".*/    \1 \2: \3/p' \
            <<<"$counts" | cut -c 1-160
    fi
    echo "${stopped:+stopped; }$ok passed, $bad failed, $missing not run, $SECONDS s"
    [ -z "${stopped:-}" ] && [ "$bad" -eq 0 ] && [ "$ok" -gt 0 ]
    exit $?
}
trap finish EXIT
trap 'trap "" INT TERM; kill $(jobs -p) 2>/dev/null; stopped=1; exit 1' INT TERM # timeout sends it twice

# ---- rows
now() { echo "${EPOCHREALTIME/./}"; } # microseconds

# emit VERDICT NAME VALUE MICROSECONDS [FIELDS [MORE]]: prints a row and keeps it. FIELDS are more of the
# JSON, MORE are lines below the row
emit() {
    local seconds value=${3//\\/\\\\}
    seconds=$(($4 / 1000000)).$(($4 / 100000 % 10))
    value=${value//\"/\\\"}
    printf '%-7s %-8s %-32s %-64s %6s s\n%s' "$1" "$part" "$2" "$3" $seconds "${6:+$6
}"
    printf '{"what": "row", "verdict": "%s", "part": "%s", "name": "%s", "value": "%s", "seconds": %s%s}\n' \
        "$1" "$part" "$2" "${value//[[:cntrl:]]/ }" $seconds "${5:+, $5}" >>"$rows"
}

# run NAME SECONDS COMMAND...: its output goes to $log and to the log of all, its exit code to $code, its
# time to $us. Code 125: the time of this call was over before it began, or while it ran
call_over="the $call_seconds s of this call are over"
run() {
    local name=$1 limit=$2 left=$((call_seconds - SECONDS)) began
    shift 2
    log=$work/$name.log
    began=$(now)
    if [ $left -lt 3 ]; then
        echo "$call_over" >"$log"
        code=125
    else
        [ $left -ge "$limit" ] || limit=$left
        timeout -k 5 "$limit" $by_line "$@" >"$log" 2>&1 </dev/null &
        wait $!
        code=$?
        if [ $((call_seconds - SECONDS)) -le 0 ] && { [ $code -eq 124 ] || [ $code -eq 137 ]; }; then
            echo "$call_over" >>"$log"
            code=125
        fi
    fi
    us=$(($(now) - began))
    (
        flock 9
        echo "==== $part $name: exit code $code of: $*"
        head -c 200000 "$log"
    ) 9>>"$out/gpu_check.log" >&9
}
by_line=$(command -v stdbuf) && by_line+=' -oL' # a program that is killed has printed its whole lines

# why the last command failed, for a row; and more of its log below the row
complaint() {
    case $code in
        124 | 137) echo "exit code $code: killed, or no end in time" ;;
        *) echo "exit code $code: $(tail -n 1 "$log")" ;;
    esac
}
excerpt() {
    { grep -E 'NOT OK|^FAIL|rror|ERROR|azard' "$log" | head -n 8; tail -n 4 "$log"; } | cut -c 1-200 |
        awk '!seen[$0]++ { print "        " $0 }'
}

# reject NAME VALUE MICROSECONDS: a row that is NOT OK, with an excerpt of the last command's log; or that is
# not run, because the time of the call was over
reject() {
    if [ $code -eq 125 ]; then not_run "$1" "$call_over" "$3"; return; fi
    emit 'NOT OK' "$1" "$2" "$3" '' "$(excerpt)"
}

# not_run NAME REASON [MICROSECONDS]
not_run() { emit 'not run' "$1" "$2" "${3:-0}"; }

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

# alone FUNCTION ARGUMENTS...: beside nothing else, for what compares free memory or needs the whole device
alone() {
    wait
    "$@"
}

# ---- build: only what the parts need
tests='test_deit dev/test/test_kernels dev/test/test_dropit dev/test/test_augment dev/test/test_resize'
workbench=$(for f in dev/cuda/*.cu; do [ ! -e "$f" ] || echo "${f%.cu}"; done)
wanted_bf16='' wanted_fp32=''
for part in $parts; do
    case $part in
        tests)
            wanted_bf16+=" train_deit $tests dev/test/test_files $workbench"
            wanted_fp32+=" train_deit $tests dev/test/test_files $workbench"
            wanted_fp32+=" dev/test/test_recipes dev/test/test_cpu_libs" ;;
        sanitize) wanted_bf16+=" $tests" wanted_fp32+=" $tests" ;;
        kernels) wanted_bf16+=" $workbench" wanted_fp32+=" $workbench" ;;
        bench) wanted_bf16+=" dev/bench" ;;
    esac
done

# plain_make PRECISION DIRECTORY PROGRAM...: what the Makefile does for a GPU, where there is no make
plain_make() {
    local options="-O3 -std=c++17 -arch=$arch -lineinfo -Xcompiler -Wall,-Wextra -DENABLE_$1" directory=$2
    shift 2
    printf '%s\n' "$@" | xargs -P "$cores" -I{} sh -c "mkdir -p \"\$(dirname $directory/{})\" &&
        nvcc $options {}.cu -o $directory/{} -lcublas -lcublasLt"
}

# build NAME PRECISION DIRECTORY FLAGS PROGRAMS: a program that cannot be built leaves the others alone, and
# no older one in its place
build() {
    local directory=$3 targets lost='' programs
    programs=$(tr ' ' '\n' <<<"$5" | sort -u) # words, as $flags and others below: shellcheck -e SC2086
    [ -n "${programs//[[:space:]]/}" ] || return
    targets=$(printf "$directory/%s " $programs)
    if command -v "$make" >/dev/null; then
        run "$1" 400 $make --no-print-directory -s -k -j "$cores" $4 PRECISION=$2 BUILD="$directory" $targets
    else
        for target in $targets; do rm -f "$target"; done
        export arch cores
        export -f plain_make
        run "$1" 400 bash -c 'plain_make "$@"' - "$2" "$directory" $programs
    fi
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
spawn build build_bf16 BF16 $bf16 "$flags" "$wanted_bf16"
spawn build build_fp32 FP32 $fp32 "$flags" "$wanted_fp32"
if [ $device = cuda ] && [[ " $parts " == *" tests "* ]] && command -v "$make" >/dev/null; then
    spawn build build_cpu_reference FP32 build/cpu-fp32 DEVICE=cpu train_deit
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
            first=$(diff <(echo "$first") <(echo "$these") | sed -n 's/^[<>] //p' | head -n 2 | tr '\n' ' ')
            emit 'NOT OK' "$name" "-r $r: $first" $total
            return
        fi
        levels=$((levels + 1))
    done
    emit ok "$name" "$levels runs at -r 1, 1, 0, 2, 3: the same $(echo "$first" | wc -l) lines" $total
}

# close_losses NAME DIRECTORY DIRECTORY TOLERANCE: relative differences of the losses of two runs' logs
close_losses() {
    local value verdict=ok
    loss_words() { losses "$1" | grep -o '[a-z]*l:[^ ]*'; }
    # NaN is text to some awks, and compares false: only a number that is small enough passes
    value=$(paste <(loss_words "$2") <(loss_words "$3") | tr ':' '\t' | awk -v most="$4" '
        { n++; d = ($2 - $4) / $4; if (d < 0) { d = -d } if (d > worst) { worst = d } }
        $1 != $3 || $2 !~ /^[0-9]/ || $4 !~ /^[0-9]/ { bad = 1 }
        END {
            printf "%d losses, largest relative difference %.1e, allowed %g", n, worst, most
            exit !(n > 1 && !bad && worst <= most)
        }') || verdict='NOT OK'
    emit "$verdict" "$1" "$value" 0
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
        alone counted deit_$precision 120 $directory/test_deit $dumps
        alone counted dropit_$precision 120 $directory/dev/test/test_dropit
        for test in kernels augment resize files; do
            spawn counted ${test}_$precision 120 $directory/dev/test/test_$test
        done
        for program in $workbench; do spawn counted "$(basename "$program")_$precision" 120 "$directory/$program"; done
        for gamma in 0 0.7 0.9; do spawn same_losses $precision $gamma; done
        spawn quick $precision
    done
    spawn counted recipes 120 $fp32/dev/test/test_recipes
    # it checks the CPU's cuBLAS; on a GPU, what the trainer expects of one
    spawn counted cpu_libs 120 $fp32/dev/test/test_cpu_libs
    wait
    for gamma in 0 0.7; do
        close_losses bf16_by_fp32_g$gamma "$work/losses_bf16_g$gamma.0" "$work/losses_fp32_g$gamma.0" 2e-2
        [ -x build/cpu-fp32/train_deit ] || { not_run fp32_by_cpu_g$gamma "there is no CPU build"; continue; }
        run cpu_g$gamma 120 build/cpu-fp32/train_deit -b 50 -x $steps -g $gamma -o "$work/cpu_g$gamma"
        close_losses fp32_by_cpu_g$gamma "$work/losses_fp32_g$gamma.0" "$work/cpu_g$gamma" 1e-3
    done
}

# ---- sanitize
# cuBLAS's own kernels are left out of racecheck and initcheck: what they do with padding and shared memory
# is not for this project to judge. racecheck gets the names of the kernels that the source has, as they
# stand in mangled names: 18dropit_pack_kernel. initcheck must see every kernel, for before compute-sanitizer
# 2026.4 it would take what cuBLAS writes for memory that nobody wrote; its reports are sorted afterwards
own_kernels=$(sed -nE 's/.*__global__ void( __launch_bounds__\([^)]*\))? (\w+)\(.*/\2/p' train_deit.cu test_deit.cu \
    dev/test/*.cu | sort -u | tr '\n' ' ')
only_own=()
for kernel in $own_kernels; do only_own+=(--kernel-name "kernel_substring=${#kernel}$kernel"); done
[ ${#only_own[@]} -gt 20 ] || { echo "the kernels' names were not found in train_deit.cu" >&2; exit 1; }

most_reports=100000 # that initcheck prints
# foreign_reports: how many of initcheck's reports in $log are about kernels that the source does not have
foreign_reports() {
    awk -v own="$own_kernels" '
        BEGIN { n = split(own, names, " "); for (i = 1; i <= n; i++) { is_own[names[i]] = 1 } }
        /^=+ +Uninitialized / { waits = 1; next }
        waits && /^=+ +at / {
            waits = 0
            sub(/^=+ +at (0x[0-9a-f]+ in [^:]*:[0-9]+:)?(void )?/, "")
            sub(/[^A-Za-z0-9_:].*/, "") # a qualified name remains
            foreign += !($0 in is_own)
        }
        END { print foreign + 0 }' "$log"
}

# sanitized NAME TOOL PROGRAM...: what ends without the tool's verdict is not run, and passes nothing
sanitized() {
    local name=$1 tool=$2 summary total foreign=0 options=()
    shift 2
    [ "$tool" != racecheck ] || options=("${only_own[@]}")
    [ "$tool" != initcheck ] || options=(--print-limit "$most_reports" --show-backtrace no)
    run "$name" $sanitize_each "$sanitizer" --tool "$tool" --error-exitcode 99 "${options[@]}" "$@"
    summary=$(grep -o '[A-Z]* SUMMARY: .*' "$log" | tail -n 1)
    total=$(grep -oE 'SUMMARY: [0-9]+' <<<"$summary" | grep -oE '[0-9]+')
    [ "$tool" != initcheck ] || foreign=$(foreign_reports)
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        not_run "$name" "no verdict in $sanitize_each s" $us
    elif grep -q 'Device not supported' "$log"; then
        not_run "$name" "compute-sanitizer: Device not supported" $us
    elif [ $code -eq 0 ] && [[ $summary =~ SUMMARY:\ 0\ (errors|hazards) ]]; then
        emit ok "$name" "$summary" $us
    elif [ $code -eq 99 ] && [ "$foreign" -gt 0 ] && [ "$total" = "$foreign" ]; then
        emit ok "$name" "$summary, all $foreign of them in cuBLAS's kernels" $us
    elif [ $code -eq 99 ] && [ "$foreign" -ge $most_reports ]; then
        not_run "$name" "$summary; the first $foreign are all in cuBLAS's kernels" $us
    else
        reject "$name" "exit code $code: ${summary:-$(tail -n 1 "$log")}" $us
    fi
}

part_sanitize() {
    sanitizer=$(command -v compute-sanitizer)
    for precision in bf16 fp32; do
        directory=$fp32
        [ $precision = fp32 ] || directory=$bf16
        for tool in memcheck racecheck initcheck synccheck; do
            [ -n "$sanitizer" ] || { not_run ${tool}_$precision "there is no compute-sanitizer"; continue; }
            spawn sanitized ${tool}_dropit_$precision $tool $directory/dev/test/test_dropit -quick
            spawn sanitized ${tool}_kernels_$precision $tool $directory/dev/test/test_kernels
            spawn sanitized ${tool}_augment_$precision $tool $directory/dev/test/test_augment
            # images are bytes in both precisions
            [ $precision = bf16 ] || spawn sanitized ${tool}_resize $tool $directory/dev/test/test_resize -quick
            spawn sanitized ${tool}_deit_$precision $tool $directory/test_deit -steps $dump
        done
    done
    wait
}

# ---- kernels
part_kernels() {
    local timed
    [ -n "$workbench" ] || not_run workbench "dev/cuda has no program"
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
peak=$(awk -F'[{},"]+' -v gpu="$gpu" '
    /^static const Gpu gpus/ { on = 1 }
    on && /^};/ { exit }
    on && NF > 4 && index(gpu, $2) { print $4 + 0; exit }' dev/cuda/common.cuh)
declare -A rate median # of a row: images/s, ms
declare -A worst       # of a model: bytes used over bytes planned, of the row where this is furthest from 1
declare -A printed     # goals

number() { sed -n "s/.*$2=\([0-9.]*\).*/\1/p" <<<"$1"; }

# own MODEL GAMMA LEVEL: times the trainer in bf16
own() {
    local name=$1_g$2_r$3 planned used line mfu share value fields ms_min
    [ $SECONDS -lt $deadline ] || { not_run "$name" "the $bench_seconds s of this part are over"; return; }
    run "$name" 60 $bf16/dev/bench steps $bench_steps -m "$1" -b "${batch[$1]}" -g "$2" -r "$3"
    line=$(tail -n 1 "$log")
    if grep -q 'bytes of device memory are needed' "$log"; then not_run "$name" "$line" $us; return; fi
    if [ $code -ne 0 ] || [[ $line != "bench ms_min="* ]]; then reject "$name" "$(complaint)" $us; return; fi
    rate[$name]=$(number "$line" images_per_s)
    median[$name]=$(number "$line" ms_median)
    mfu=$(awk -v r="${rate[$name]}" -v g="${gmacs[$1]:-0}" -v p="${peak:-0}" \
        'BEGIN { if (g * p > 0) printf "%.1f", 100 * 6e9 * g * r / p }')
    planned=$(number "$line" bytes_planned)
    used=$(number "$line" bytes_used)
    share=$(awk -v u="${used:-0}" -v p="${planned:-0}" 'BEGIN { if (u * p > 0) printf "%.4f", u / p }')
    worst[$1]=$(awk -v a="${worst[$1]:-}" -v b="$share" \
        'BEGIN { print b == "" || (a != "" && (a - 1)^2 >= (b - 1)^2) ? a : b }')
    ms_min=$(number "$line" ms_min)
    value="b ${batch[$1]}: ms $ms_min median ${median[$name]}, ${rate[$name]} images/s, MFU ${mfu:--} %, "
    value+="MiB planned $((${planned:-0} / 1048576)), used $((${used:-0} / 1048576))"
    fields="\"model\": \"$1\", \"batch\": ${batch[$1]}, \"gamma\": $2, \"recompute\": $3, \"ms_min\": $ms_min, "
    fields+="\"ms_median\": ${median[$name]}, \"images_per_s\": ${rate[$name]}, \"mfu_percent\": ${mfu:-null}, "
    fields+="\"planned\": ${planned:-null}, \"used\": ${used:-null}"
    emit ok "$name" "$value" $us "$fields"
    goals "$1"
}

# PyTorch's rows: each line of JSON as it comes
peers() {
    local line name value memory='' began last='' limit=$((call_seconds - SECONDS - 20))
    [ $limit -ge 10 ] || { not_run PyTorch "$call_over"; return; }
    [ $limit -le $peer_seconds ] || limit=$peer_seconds
    began=$(now)
    while IFS= read -r line; do
        [[ $line == '{'* ]] || continue
        echo "$line" >>"$rows"
        name=$(sed -n 's/.*"model": "\([^"]*\)".*"kind": "\([^"]*\)".*/\1 \2/p' <<<"$line")
        last=$line
        if [[ $line == *'"not_run"'* ]]; then
            line=${line#*not_run\": \"}
            not_run "$name" "PyTorch: ${line%\"*}" $(($(now) - began))
        else
            line=${line//\"/}
            line=${line//: /=}
            rate[$name]=$(number "$line" images_per_s)
            memory=$(number "$line" peak)
            value="PyTorch $(number "$line" torch), b $(number "$line" batch): ms $(number "$line" ms_min) median "
            value+="$(number "$line" ms_median), ${rate[$name]} images/s, MiB peak ${memory:+$((memory / 1048576))}"
            emit ok "$name" "$value" $(($(now) - began))
            goals "${name%% *}"
        fi
        began=$(now)
    done < <(timeout -k 5 $((limit + 15)) "$python" dev/reference/bench_deit.py --json --seconds $limit $peer \
        2>"$work/peer.log" || echo "$? $(grep '^not run: ' "$work/peer.log")" >"$work/peer.code")
    {
        echo "==== bench PyTorch: $(cat "$work/peer.code" 2>/dev/null)"
        head -c 100000 "$work/peer.log"
    } >>"$out/gpu_check.log"
    if [ -z "$last" ] && grep -q '^not run: ' "$work/peer.log"; then
        not_run PyTorch "$(sed -n 's/^not run: //p' "$work/peer.log")" $(($(now) - began))
    elif [ -z "$last" ] || [ -e "$work/peer.code" ]; then
        value="bench_deit.py: $(cat "$work/peer.code" 2>/dev/null) $(tail -n 1 "$work/peer.log")"
        emit 'NOT OK' PyTorch "$value" $(($(now) - began))
    fi
}

# goal NAME A B [least|most LIMIT]: A over B, once, as soon as both are there; on the CPU device nothing is asked of it
goal() {
    local ratio goal='' verdict=ok
    [ -z "${printed[$1]:-}" ] || return
    if [ -z "$2" ] || [ -z "$3" ]; then
        [ -z "$last_chance" ] || not_run "$1" "one of the two numbers is not there"
        return
    fi
    printed[$1]=1
    ratio=$(awk -v a="$2" -v b="$3" 'BEGIN { printf "%.3f", a / b }')
    if [ $device = cuda ] && [ $# -eq 5 ]; then
        goal=", goal: at $4 $5"
        awk -v r="$ratio" -v l="$5" -v k="$4" 'BEGIN { exit !(k == "least" ? r >= l : r <= l) }' || verdict='NOT OK'
    fi
    emit "$verdict" "$1" "$ratio$goal" 0 "\"ratio\": $ratio"
}

# goals MODEL: those whose numbers are there. The speed beside torch.compile is asked of the first model alone
last_chance=
goals() {
    local level limit=()
    [ "$1" != "${models%% *}" ] || limit=(least 0.9)
    goal "$1_over_torch.compile" "${rate[$1_g0_r0]:-}" "${rate[$1 torch.compile]:-}" "${limit[@]}"
    goal "$1_over_eager" "${rate[$1_g0_r0]:-}" "${rate[$1 eager]:-}"
    for level in 0 1; do
        goal "$1_g0.7_over_g0_r$level" "${median[$1_g0.7_r$level]:-}" "${median[$1_g0_r$level]:-}" most 1.15
    done
}

# memory_goal MODEL: of all of its rows
memory_goal() {
    local verdict=ok
    [ -n "${worst[$1]:-}" ] || { not_run "$1_memory" "no row tells bytes_planned and bytes_used"; return; }
    awk -v w="${worst[$1]}" 'BEGIN { exit !(w >= 0.98 && w <= 1.02) }' || verdict='NOT OK'
    emit "$verdict" "$1_memory" "bytes used over planned: worst ${worst[$1]}, goal: within 2 %" 0 \
        "\"ratio\": ${worst[$1]}"
}

part_bench() {
    local first=${models%% *}
    deadline=$((SECONDS + bench_seconds))
    # what the goals need first, then PyTorch, then the rest
    for level in 0 1; do for gamma in 0 0.7; do own "$first" $gamma $level; done; done
    peers
    for level in 0 1; do own "$first" 0.9 $level; done
    for level in 2 3; do for gamma in 0 0.7 0.9; do own "$first" $gamma $level; done; done
    memory_goal "$first"
    for model in ${models#"$first"}; do
        for level in 0 1 2 3; do for gamma in 0 0.7 0.9; do own "$model" $gamma $level; done; done
        memory_goal "$model"
    done
    last_chance=1
    for model in $models; do
        [ "$model" = "$first" ] || [ -n "${median[${model}_g0_r0]:-}" ] || continue
        goals "$model"
    done
}

for part in $parts; do part_$part; done
