#!/bin/bash
# Every test, as `make test` runs it. A line says how a test ended, its counts and its seconds; of one that fails the end of
# its log follows. At the end come the counts of all tests, and what this machine lacks so that it was not run.
#   dev/test/run.sh              all tests, as many at a time as there are cores
#   dev/test/run.sh NAME ...     those whose names match a NAME, such as deit_fp32 or 'nccl*'
# First it builds what they need.
# Logs stay in build/test.
set -u
cd "$(dirname "$0")/../.." || exit 1
make=${MAKE:-make}
names=("$@")
logs=build/test
mkdir -p $logs
rm -f $logs/*.result $logs/not_run
cores=$(nproc)
cpu="$make --no-print-directory -s DEVICE=cpu"
fp32=build/cpu-fp32
bf16=build/cpu-bf16
asan=build/cpu-fp32-asan
tsan=build/cpu-fp32-tsan
dumps=dev/reference/dumps
tests=() # command lines, in the order of the run

not_run() { [ ${#names[@]} -gt 0 ] || echo "not run: $1" >>$logs/not_run; }

wanted() { # wanted NAME: is it one of the names that were asked for?
    local pattern
    [ ${#names[@]} -gt 0 ] || return 0
    for pattern in "${names[@]}"; do
        # shellcheck disable=SC2053 # a pattern
        [[ $1 != $pattern ]] || return 0
    done
    return 1
}

# the programs of ours among the words of commands
needs() {
    local word
    for word in "$@"; do
        case $word in
            ./train_* | ./test_*) echo "$fp32/${word#./}" "${word#./}" ;;
            build/*) echo "$word" ;;
        esac
    done
}

# build TARGET...: of every directory, whose name says with which flags, at once: one make shares the cores among them
build() {
    local directory targets variant precision
    # first, alone, what all of them use
    printf '%s\n' "all: build/cu2cpp" ".PHONY: all build/cu2cpp" "build/cu2cpp:; +@$cpu \$@" >$logs/builds.mk
    for directory in $fp32 $bf16 $asan $tsan $bf16-asan $bf16-tsan; do
        targets=$(printf '%s\n' "$@" | grep -E "^$directory/" | sort -u | tr '\n' ' ')
        [ "$directory" != $fp32 ] || targets+=$(printf '%s\n' "$@" | grep -E '^(train|test)_[a-z]+$' | sort -u | tr '\n' ' ')
        [ -n "$targets" ] || continue
        variant=$(echo "$directory" | grep -o '[at]san$')
        precision=$(echo "$directory" | grep -o 'bf16\|fp32' | tr a-z A-Z)
        printf '%s\n' "all: $directory" ".PHONY: $directory" \
            "$directory: build/cu2cpp; +@$cpu PRECISION=$precision ${variant:+VARIANT=$variant} $targets" >>$logs/builds.mk
    done
    run build 1500 $make --no-print-directory -s -k -j "$cores" -f $logs/builds.mk all
}

# run NAME SECONDS COMMAND...: the last line of a test is "N passed, N failed"; a command without one counts as one
run() {
    local name=$1 limit=$2 log="$logs/$1.log" start=$SECONDS code counts p f
    shift 2
    timeout "$limit" "$@" >"$log" 2>&1 </dev/null
    code=$?
    counts=$(tail -n 1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed$')
    p=${counts%% *}
    f=$(echo "$counts" | cut -d ' ' -f 3)
    [ -n "$counts" ] || { p=$((code == 0)) f=$((code != 0)); }
    [ $code -eq 0 ] || [ "$f" -gt 0 ] || f=1
    {
        printf '%-6s %-34s %5d passed %3d failed  %4d s\n' "$([ "$f" -eq 0 ] && echo ok || echo 'NOT OK')" "$name" "$p" "$f" \
            $((SECONDS - start))
        if [ "$f" -gt 0 ]; then
            echo "       exit code $code of: $*"
            { grep -E 'NOT OK|^FAIL|error|WARNING|ERROR' "$log" | head -n 15; tail -n 5 "$log"; } | sed 's/^/       /'
        fi
    } >"$logs/$name.line"
    cat "$logs/$name.line"
    echo "$p $f" >"$logs/$name.result"
    grep '^not run: ' "$log" >>$logs/not_run
}

# t NAME SECONDS COMMAND...: a test beside others, each of which has one core
t() { ! wanted "$1" || tests+=("OMP_NUM_THREADS=${THREADS:-1} run $(printf '%q ' "$@")"); }

python=
for candidate in python3 /usr/bin/python3; do
    if [ -z "$python" ] && "$candidate" -c 'import numpy, PIL' 2>/dev/null; then python=$candidate; fi
done
several_ranks=$(command -v mpirun >/dev/null && mpicxx -show 2>/dev/null)

# ---- for a GPU, without a warning, where nvcc is: the longest, so first
if command -v "${NVCC:-nvcc}" >/dev/null; then
    for build in sm_80_FP32 sm_90_BF16; do
        programs="train_deit train_resnet"
        [ $build = sm_80_FP32 ] || programs+=" dev/test/test_cpu_libs dev/test/workbench"
        # shellcheck disable=SC2046
        t nvcc_$build 900 $make --no-print-directory -s DEVICE=cuda ARCH=${build%_*} PRECISION=${build##*_} WERROR=1 NO_MPI=1 \
            BUILD=build/nvcc-$build $(for p in $programs; do echo build/nvcc-$build/"$p"; done)
    done
    if command -v python3 >/dev/null && command -v "${NVDISASM:-nvdisasm}" >/dev/null; then
        t gpu_resources 300 python3 dev/cuda/resources.py --check
    else
        not_run "spills and access widths of the GPU's kernels (no python3 or no nvdisasm here; NVDISASM names one)"
    fi
else
    not_run "the build for a GPU (no nvcc here)"
fi

# ---- the trainer's programs, the longest first, and the trainer against PyTorch, timm and Pillow
t checkpoints 600 dev/test/checkpoint.sh ./train_deit
if [ -n "$several_ranks" ]; then
    t several_ranks 600 dev/test/ranks.sh ./train_deit
    for ranks in 2 3; do
        t nccl_$ranks 300 env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
            mpirun --oversubscribe -np $ranks $fp32/dev/test/test_cpu_libs
    done
else
    not_run "several processes (no MPI here)"
fi
t command_line 600 dev/test/cli.sh ./train_deit
t deit_fp32 600 ./test_deit
t deit_bf16 600 $bf16/test_deit
t resnet_fp32 600 ./test_resnet
# the other dumps, with the ImageNet stem, move too much in bf16 to say anything
t resnet_bf16 600 $bf16/test_resnet $dumps/resnet_{aligned_g00,aligned_g90,cifar_g00,cifar_g50,cifarneck_g70,stem_g70}.safetensors
if [ -n "$python" ]; then
    t data_scripts 300 "$python" dev/test/test_data.py ./train_deit
    t weights_predict_sheet 300 "$python" dev/test/test_weights.py ./train_deit
    t tensorboard 300 "$python" dev/test/test_events.py ./train_deit
else
    not_run "the scripts of data/, -w, -predict and -sheet (no python3 with numpy and Pillow here)"
fi
t second_model 300 dev/test/second_model.sh $fp32/dev/test/second_model
t finetune 300 dev/test/finetune.sh ./train_deit
t recipes 300 $fp32/dev/test/test_recipes
t shared_sections 60 dev/test/check_shared.sh
t shared_sections_planted 60 dev/test/check_shared.sh --self-test

# ---- no report from the sanitizers, and every planted bug found
for s in tsan asan; do
    t deit_$s 600 build/cpu-fp32-$s/test_deit -steps $dumps/deit_{odd_g70,aligned_g90,path_g00,path_g70}.safetensors
    t resnet_$s 600 build/cpu-fp32-$s/test_resnet -steps $dumps/resnet_{basic_g70,bottleneck_g90,stages_g70}.safetensors
    t dropit_$s 900 build/cpu-fp32-$s/dev/test/test_dropit -quick
    t resize_$s 600 build/cpu-fp32-$s/dev/test/test_resize -quick
    t kernels_$s 600 build/cpu-fp32-$s/dev/test/test_kernels
    t augment_$s 600 build/cpu-fp32-$s/dev/test/test_augment
    t cpu_device_$s 600 build/cpu-fp32-$s/dev/test/test_cpu_device
    t workbench_$s 600 dev/test/workbench.sh $bf16-$s/dev/test/workbench
done
t files_asan 600 $asan/dev/test/test_files
t bench_asan 300 $asan/dev/bench steps 1 -b 4 -g 0.7
t planted_bugs 900 dev/test/planted.sh {$fp32,$asan,$tsan}/dev/test/planted

# ---- the CPU device itself, with several workers
THREADS=2 t cpu_libs 300 $fp32/dev/test/test_cpu_libs
THREADS=2 t cpu_device_schedules 600 dev/test/schedules.sh 'all results' $fp32/dev/test/test_cpu_device
t cu2cpp 120 dev/test/cu2cpp.sh
t launches 120 dev/test/launches.sh

# ---- kernels and files; once with device memory that the host may not touch
t protected_cpu_libs 300 env CPU_PROTECT=1 $fp32/dev/test/test_cpu_libs
for test in dropit kernels augment; do
    t ${test}_fp32 300 $fp32/dev/test/test_$test
    t ${test}_bf16 300 $bf16/dev/test/test_$test
done
t files 300 $fp32/dev/test/test_files
t resize 300 $fp32/dev/test/test_resize
t workbench_fp32 300 dev/test/workbench.sh $fp32/dev/test/workbench
for test in kernels augment resize files recipes cpu_device; do
    t protected_$test 300 env CPU_PROTECT=1 $fp32/dev/test/test_$test
done
t protected_dropit 300 env CPU_PROTECT=1 $fp32/dev/test/test_dropit -quick
t protected_deit 600 env CPU_PROTECT=1 ./test_deit -steps $dumps/deit_{odd_g70,path_g70}.safetensors
t protected_resnet 600 env CPU_PROTECT=1 ./test_resnet -steps $dumps/resnet_{basic_g70,bottleneck_g90}.safetensors
t protected_training 300 env CPU_PROTECT=1 ./train_deit -x 5 -e 1 -g 0.7 -crop 1 -size 32 -aa rand-m9-inc1 -reprob 0.5 -mixup 1
t protected_workbench 300 env CPU_PROTECT=1 dev/test/workbench.sh $fp32/dev/test/workbench

# ---- the same bits under every schedule of blocks and threads
t workbench_bf16 600 dev/test/workbench.sh $bf16/dev/test/workbench natural reversed last-in random:1 random:2 random:3
t resnet_schedules_basic 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_resnet -losses $dumps/resnet_basic_g70.safetensors
t resnet_schedules_bf16 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' $bf16/test_resnet -losses $dumps/resnet_aligned_g90.safetensors
t dropit_schedules 600 dev/test/schedules.sh ' failed$' $fp32/dev/test/test_dropit -quick
t resize_schedules 600 dev/test/schedules.sh ' failed$|^resize' $fp32/dev/test/test_resize -quick
t kernels_schedules 600 dev/test/schedules.sh ' failed$' $fp32/dev/test/test_kernels
t augment_schedules 600 dev/test/schedules.sh '^op|^mix| failed$' $fp32/dev/test/test_augment
t deit_schedules_odd 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_deit -losses $dumps/deit_odd_g70.safetensors
t deit_schedules_tokens 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_deit -losses $dumps/deit_tokens_g90.safetensors
t deit_schedules_bf16 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' $bf16/test_deit -losses $dumps/deit_aligned_g90.safetensors
t deit_schedules_path 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_deit -losses $dumps/deit_path_g70.safetensors

# ---- build what they need, and run them, as many at a time as there are cores
[ ${#tests[@]} -gt 0 ] || { echo "no test has such a name" >&2; exit 1; }
# shellcheck disable=SC2046
build $(for test in "${tests[@]}"; do eval "needs $test"; done)
for test in "${tests[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n; done
    eval "$test" &
done
wait

echo
sort -u $logs/not_run 2>/dev/null
cat $logs/*.result 2>/dev/null | awk '{ p += $1; f += $2 } END { printf "%d passed, %d failed\n", p, f; exit !(p > 0 && f == 0) }'
