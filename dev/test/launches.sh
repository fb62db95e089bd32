#!/bin/bash
# CPU_LAUNCHES=FILE of the CPU device counts what a program launches: two kernels, one of them a template,
# whose launches, blocks and threads are known. A launch that the device refuses, and a call that only sets an
# attribute of a kernel, count for nothing.
#   dev/test/launches.sh
set -u
cd "$(dirname "$0")/../.." || exit 1
. dev/test/verdict.sh
cat >"$work/count.cu" <<'CUDA'
#include <cuda_runtime.h>
__global__ void second_kernel(int* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = i; }
}
template <int V> __global__ void first_kernel(int* out) {
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) { out[blockIdx.x] = V; }
}
int main(int argc, char**) {
    int* out;
    if (cudaMalloc((void**)&out, 4096) != cudaSuccess) { return 1; }
    if (argc > 1) { return 0; }
    for (int i = 0; i < 5; i++) { second_kernel<<<7, 64>>>(out, 100); }
    first_kernel<1><<<dim3(3, 2, 4), dim3(8, 5)>>>(out);
    first_kernel<8><<<2, 32>>>(out);
    cudaFuncSetAttribute(first_kernel<8>, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
    second_kernel<<<1, 2048>>>(out, 100); // more threads than a block may have
    return cudaGetLastError() == cudaErrorInvalidConfiguration ? 0 : 1;
}
CUDA
${MAKE:-make} --no-print-directory -s DEVICE=cpu build/cu2cpp && build/cu2cpp "$work/count.cu" >"$work/count.cpp" &&
    ${CXX:-g++} -std=c++17 -O1 -w -pthread -I dev/cpu "$work/count.cpp" -o "$work/count"
verdict $? "the program that launches is built"

CPU_LAUNCHES=$work/counted OMP_NUM_THREADS=2 "$work/count"
verdict $? "it ends with code 0, and reports the launch that is refused"
printf '%s\n' "first_kernel 2 26 1024" "second_kernel 5 35 2240" | diff - "$work/counted"
verdict $? "launches, blocks and threads of each kernel"
CPU_LAUNCHES=$work/nothing "$work/count" idle && [ -e "$work/nothing" ] && [ ! -s "$work/nothing" ]
verdict $? "a program without launches leaves an empty file"
CPU_LAUNCHES=$work/no/such/folder "$work/count" 2>"$work/stderr"
[ $? -ne 0 ] && grep -q '^cpu device: CPU_LAUNCHES is .* cannot be written: No such file' "$work/stderr"
verdict $? "a file that cannot be written ends the program with a sentence: $(cat "$work/stderr")"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
