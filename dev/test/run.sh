#!/bin/bash
# Every test, as `make test` runs it: one line a test with its counts and seconds, the end of the log of what fails, and the
# counts of all of them. What a machine lacks (MPI, nvcc) is named and not counted. Logs stay in build/test.
set -u
cd "$(dirname "$0")/../.."
make=${MAKE:-make}
mkdir -p build/test
passed=0
failed=0

# t NAME SECONDS COMMAND...: the last line of a test is "N passed, N failed"; a command without one counts as one
t() {
    local name=$1 limit=$2 log="build/test/$1.log" start=$SECONDS code counts p f
    shift 2
    timeout "$limit" "$@" >"$log" 2>&1 </dev/null
    code=$?
    counts=$(tail -n 1 "$log" | grep -E '^[0-9]+ passed, [0-9]+ failed$')
    if [ -n "$counts" ]; then
        p=$(echo "$counts" | cut -d ' ' -f 1)
        f=$(echo "$counts" | cut -d ' ' -f 3)
        [ $code -eq 0 ] || [ "$f" -gt 0 ] || f=1
    else
        p=$((code == 0))
        f=$((code != 0))
    fi
    passed=$((passed + p))
    failed=$((failed + f))
    printf '%-6s %-34s %5d passed %3d failed  %4d s\n' "$([ "$f" -eq 0 ] && echo ok || echo 'NOT OK')" "$name" "$p" "$f" $((SECONDS - start))
    if [ "$f" -gt 0 ]; then
        echo "       exit code $code of: $*"
        { grep -E 'NOT OK|^FAIL|error|WARNING|ERROR' "$log" | head -n 15; tail -n 5 "$log"; } | sed 's/^/       /'
    fi
}

build="$make --no-print-directory -s -j 2 DEVICE=cpu"

fp32=build/cpu-fp32
bf16=build/cpu-bf16
asan=build/cpu-fp32-asan
tsan=build/cpu-fp32-tsan
dumps=dev/reference/dumps
workbench=$(basename -s .cu dev/cuda/*.cu | sed 's,^,dev/cuda/,')

t shared_sections 60 dev/test/check_shared.sh
t build_fp32 900 $build PRECISION=FP32 train_deit test_deit $fp32/dev/test/test_{kernels,dropit,augment,files,resize,recipes,cpu_device,cpu_libs} ${workbench//dev/$fp32/dev}
t build_bf16 900 $build PRECISION=BF16 $bf16/test_deit $bf16/dev/test/test_{kernels,dropit,augment,cpu_libs} ${workbench//dev/$bf16/dev}
t build_workbench_asan 900 $build PRECISION=BF16 VARIANT=asan ${workbench//dev/$bf16-asan/dev}
t build_workbench_tsan 900 $build PRECISION=BF16 VARIANT=tsan ${workbench//dev/$bf16-tsan/dev}
t build_asan 900 $build PRECISION=FP32 VARIANT=asan $asan/test_deit $asan/dev/test/test_{kernels,dropit,augment,files,resize,cpu_device}
t build_tsan 900 $build PRECISION=FP32 VARIANT=tsan $tsan/test_deit $tsan/dev/test/test_{kernels,dropit,augment,resize,cpu_device}

t cu2cpp 120 dev/test/cu2cpp.sh
t cpu_device_schedules 600 dev/test/schedules.sh 'all results' $fp32/dev/test/test_cpu_device
t cpu_libs_fp32 300 $fp32/dev/test/test_cpu_libs
t cpu_libs_bf16 300 $bf16/dev/test/test_cpu_libs
t kernels_fp32 300 $fp32/dev/test/test_kernels
t kernels_bf16 300 $bf16/dev/test/test_kernels
t dropit_fp32 300 $fp32/dev/test/test_dropit
t dropit_bf16 300 $bf16/dev/test/test_dropit
t augment_fp32 300 $fp32/dev/test/test_augment
t augment_bf16 300 $bf16/dev/test/test_augment
t recipes 300 $fp32/dev/test/test_recipes
t workbench_fp32 300 dev/test/workbench.sh $fp32
t workbench_bf16 600 dev/test/workbench.sh $bf16 natural reversed last-in random:1 random:2 random:3
t workbench_asan 600 dev/test/workbench.sh $bf16-asan
t workbench_tsan 600 dev/test/workbench.sh $bf16-tsan
t deit_fp32 600 ./test_deit
t deit_bf16 600 $bf16/test_deit
t files 300 $fp32/dev/test/test_files
t resize 300 $fp32/dev/test/test_resize
t command_line 600 dev/test/cli.sh ./train_deit
t checkpoints 600 dev/test/checkpoint.sh ./train_deit
t finetune 300 dev/test/finetune.sh ./train_deit
if command -v python3 >/dev/null; then
    t tensorboard 300 python3 dev/test/test_events.py ./train_deit
    t predicted_cost 60 python3 dev/cuda/predict.py --check
    t predicted_launches 900 python3 dev/test/test_launches.py $fp32
else
    echo "not run: TensorBoard's event files, DropIT's cost and launches as predicted (no python3 here)"
fi

python=
for candidate in python3 /usr/bin/python3; do
    if [ -z "$python" ] && "$candidate" -c 'import numpy, PIL' 2>/dev/null; then python=$candidate; fi
done
if [ -n "$python" ]; then
    t data_scripts 300 "$python" dev/test/test_data.py ./train_deit
    t weights_predict_sheet 300 "$python" dev/test/test_weights.py ./train_deit
else
    echo "not run: the scripts of data/, -w, -predict and -sheet (no python3 with numpy and Pillow here)"
fi

# the same bits under every schedule of blocks and threads
t deit_schedules_odd 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_deit -losses $dumps/deit_odd_g70.safetensors
t deit_schedules_tokens 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_deit -losses $dumps/deit_tokens_g90.safetensors
t deit_schedules_bf16 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' $bf16/test_deit -losses $dumps/deit_aligned_g90.safetensors
t deit_schedules_path 600 dev/test/schedules.sh '^0x|^-?0x|^-?nan' ./test_deit -losses $dumps/deit_path_g70.safetensors
t dropit_schedules 600 dev/test/schedules.sh ' failed$' $fp32/dev/test/test_dropit -quick
t resize_schedules 600 dev/test/schedules.sh ' failed$|^resize' $fp32/dev/test/test_resize -quick
t kernels_schedules 600 dev/test/schedules.sh ' failed$' $fp32/dev/test/test_kernels
t augment_schedules 600 dev/test/schedules.sh '^op|^mix| failed$' $fp32/dev/test/test_augment

# no report from the sanitizers, and every planted bug found
for s in asan tsan; do
    t deit_$s 600 build/cpu-fp32-$s/test_deit -steps $dumps/deit_{odd_g70,aligned_g90,path_g00,path_g70}.safetensors
    t dropit_$s 900 build/cpu-fp32-$s/dev/test/test_dropit -quick
    t resize_$s 600 build/cpu-fp32-$s/dev/test/test_resize -quick
    t kernels_$s 600 build/cpu-fp32-$s/dev/test/test_kernels
    t augment_$s 600 build/cpu-fp32-$s/dev/test/test_augment
    t cpu_device_$s 600 build/cpu-fp32-$s/dev/test/test_cpu_device
done
t files_asan 600 $asan/dev/test/test_files
t planted_bugs 900 dev/test/planted.sh

# several processes, where MPI is
if command -v mpirun >/dev/null && grep -q DMULTI_GPU $fp32/command; then
    for ranks in 2 3; do
        t nccl_$ranks 300 env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1 \
            mpirun --oversubscribe -np $ranks $fp32/dev/test/test_cpu_libs
    done
    t several_ranks 600 dev/test/ranks.sh ./train_deit
else
    echo "not run: several processes (no MPI here)"
fi

# for a GPU, without a warning, where nvcc is
if command -v "${NVCC:-nvcc}" >/dev/null; then
    for arch in sm_80 sm_90; do
        for precision in FP32 BF16; do
            t nvcc_${arch}_$precision 900 $make --no-print-directory -s DEVICE=cuda ARCH=$arch PRECISION=$precision WERROR=1 NO_MPI=1 \
                BUILD=build/nvcc-$arch-$precision build/nvcc-$arch-$precision/train_deit
        done
    done
    t nvcc_workbench 900 $make --no-print-directory -s -j 2 DEVICE=cuda ARCH=sm_90 PRECISION=BF16 WERROR=1 NO_MPI=1 BUILD=build/nvcc-sm_90-BF16 \
        ${workbench//dev/build/nvcc-sm_90-BF16/dev}
    if command -v python3 >/dev/null && command -v "${NVDISASM:-nvdisasm}" >/dev/null; then
        t gpu_resources 300 python3 dev/cuda/resources.py --check
    else
        echo "not run: spills and access widths of the GPU's kernels (no python3 or no nvdisasm here; NVDISASM names one)"
    fi
else
    echo "not run: the build for a GPU (no nvcc here)"
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
