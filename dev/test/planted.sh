#!/bin/bash
# Runs every case of planted.cu in the builds that must find it. A bug must be reported with the expected words, and the
# correct twin must pass without a word. Prints one line a case, and the counts. Run it from the root of the repository.
#   dev/test/planted.sh PLAIN ASAN TSAN     the program with and without sanitizers, such as build/cpu-fp32/dev/test/planted
set -u
plain=$1
asan=$2
tsan=$3
passed=0
failed=0

verdict() { # ok|FAIL text
    echo "$1 $2"
    if [ "$1" = FAIL ]; then failed=$((failed + 1)); else passed=$((passed + 1)); fi
}

# planted BUILD CASE WORDS: the words are an extended regular expression
planted() {
    local program=${!1} output code
    output=$(timeout 60 $program $2 bug 2>&1)
    code=$?
    if [ $code -ne 0 ] && [ $code -ne 124 ] && echo "$output" | grep -q -E "$3"; then verdict "ok  " "$1: $2 is found"
    else verdict FAIL "$1: $2 is not found (exit code $code, expected: $3): $(echo "$output" | head -n 2)"; fi
    output=$(timeout 60 $program $2 correct 2>&1)
    code=$?
    if [ $code -eq 0 ] && [ -z "$output" ]; then verdict "ok  " "$1: $2, the correct twin, passes"
    else verdict FAIL "$1: $2, the correct twin, is reported (exit code $code): $(echo "$output" | head -n 2)"; fi
}

for race in missing_syncthreads missing_syncwarp shuffle_as_barrier reuse race_in_block race_between_blocks \
            race_between_far_blocks last_block; do
    planted tsan $race 'WARNING: ThreadSanitizer: data race'
done
planted asan global_overrun 'heap-buffer-overflow'
planted asan static_shared_overrun 'use-after-poison|index 256 out of bounds'
planted asan dynamic_shared_overrun 'use-after-poison'
planted asan local_overrun 'stack-buffer-overflow|index 8 out of bounds'
planted asan misaligned_vector 'misaligned address'
planted asan misaligned_shared 'misaligned address'
planted asan int_overflow 'signed integer overflow'
planted plain wild_pointer 'kernel wild_pointer_kernel accessed address'
planted plain stack_overflow 'kernel stack_overflow_kernel accessed address .*local variables of more than 64 KiB'
for build in plain asan; do
    planted $build use_after_free 'is host \(or freed\) memory'
    planted $build wrong_copy_direction 'planted.cu:[0-9]+: cudaMemcpy: its destination .* is host'
    planted $build copy_overrun 'source is 1028 bytes at offset 0 of an allocation of 1024'
    planted $build fill_of_host 'cudaMemset: its destination'
    planted $build host_pointer 'kernel copy_kernel: its argument a = .* is not in device memory'
    planted $build freed_pointer 'kernel copy_kernel: its argument a = .* is not in device memory|heap-use-after-free'
    for launch in too_many_threads block_z no_threads empty_grid grid_y grid_z; do
        planted $build $launch 'cudaGetLastError\(\): invalid configuration argument'
    done
    planted $build too_much_shared 'cudaGetLastError\(\): invalid argument'
    planted $build more_shared_than_there_is 'cudaFuncSetAttribute.*: invalid argument'
    planted $build static_shared '57344 bytes of static'
    planted $build deadlock 'kernel deadlock_kernel, block \(0,0,0\): deadlock: of 32 threads 0 returned, 16 wait at __syncthreads, 16 in warp'
    planted $build different_operations 'meet in different warp operations'
    planted $build double_free 'cudaFree\(p\): invalid argument'
    planted $build free_of_host 'cudaFree\(p\): invalid argument'
    planted $build uninitialised_memory 'the sum is -?nan'
    planted $build uninitialised_shared 'a value is -?nan'
    planted $build out_of_memory 'out of memory'
done
# the host may not touch device memory when the device is asked to protect it
touched='the host touched device memory: address 0x[0-9a-f]+, byte'
for build in plain asan tsan; do
    CPU_PROTECT=1 planted $build host_read "$touched 15360 of the allocation of 16384 bytes"
    CPU_PROTECT=1 planted $build host_write "$touched 4 of the allocation of 1024 bytes"
    CPU_PROTECT=1 planted $build host_after_free 'the host touched device memory: .*, which is in no allocation'
    CPU_PROTECT=1 planted $build host_threads "$touched 1020 of the allocation of 1024 bytes"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
