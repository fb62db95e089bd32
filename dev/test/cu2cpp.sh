#!/bin/bash
# Checks the rewrite of dev/cpu/cu2cpp.cpp where a program that runs cannot: what it refuses, which kernels it takes for free,
# and that compiler errors point into the .cu file. Prints one line a check, and the counts. Run it from the root.
set -u
make=${MAKE:-make}
$make --no-print-directory -s DEVICE=cpu build/cu2cpp > /dev/null || exit 1
cu2cpp=$PWD/build/cu2cpp
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
passed=0
failed=0

verdict() { # condition text
    if [ "$1" -eq 0 ]; then echo "ok   $2"; passed=$((passed + 1)); else echo "FAIL $2"; failed=$((failed + 1)); fi
}

refuses() { # name, expected words; the source on stdin
    cat > "$directory/x.cu"
    local output
    output=$(cd "$directory" && timeout 10 "$cu2cpp" x.cu 2>&1 > /dev/null)
    [ $? -eq 1 ] && echo "$output" | grep -q -E "^x.cu:[0-9]+: error: .*$2"
    verdict $? "refuses $1: $(echo "$output" | head -n 1)"
}

lists() { # name, expected words; the source on stdin
    cat > "$directory/x.cu"
    local output
    output=$(cd "$directory" && timeout 10 "$cu2cpp" --list x.cu 2>&1)
    echo "$output" | grep -q -E "$2"
    verdict $? "$1: $(echo "$output" | tr -s ' ' | head -n 1)"
}

refuses 'a kernel in a macro' 'inside of a #define' <<< '#define K(name) __global__ void name(float* p) { *p = 1; }'
refuses 'shared memory at file scope' 'outside of a function' <<< 'extern __shared__ float s[];'
refuses 'a launch without end' '<<< without its >>>' <<< 'void f() { k<<<1, 2>(); }'
refuses 'a file that is not there' 'cannot read "nothing.cu"' <<< '#include "nothing.cu"'
refuses 'a function without end' 'this \{ has no \}' <<< '__global__ void k(float* p) { if (p) { *p = 1; }'
refuses 'an operator that synchronises' 'make it a function' <<< 'struct S { __device__ int operator()(int x) { __syncwarp(); return x; } };'

lists 'free' '^k +free$' <<< '__global__ void k(float* p) { p[threadIdx.x] = 1; }'
lists 'a guard around' 'free, with a guard' <<< '__global__ void k(float* p, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { p[i] = 1; } }'
lists 'a guard before' 'free, with a guard' <<< '__global__ void k(float* p, int n) { int i = threadIdx.x; if (i >= n) { return; } p[i] = 1; }'
lists 'no guard: it does not grow evenly' 'free$' <<< '__global__ void k(float* p, int n) { int i = threadIdx.x % 7; if (i < n) { p[i] = 1; } }'
lists 'no guard: a macro' 'free$' <<< $'#define I (threadIdx.x ^ 5)\n__global__ void k(float* p, int n) { int i = I; if (i < n) { p[i] = 1; } }'
lists 'no guard: work follows' 'free$' <<< '__global__ void k(float* p, int n) { int i = threadIdx.x; if (i < n) { p[i] = 1; } p[i] = 2; }'
lists 'a barrier' 'fibers: __syncthreads$' <<< '__global__ void k(float* p) { __syncthreads(); p[0] = 1; }'
lists 'a barrier in a comment or string' 'free$' <<< '__global__ void k(char* p) { /* __syncthreads(); */ *p = *"__syncthreads()"; }'
lists 'through two functions' 'fibers: __shfl_sync in f in g' <<< '__device__ int f(int x) { return __shfl_sync(~0u, x, 0); }
__device__ int g(int x) { return f(x); } __global__ void k(int* p) { *p = g(1); }'
lists 'through a macro' 'fibers: __ballot_sync' <<< $'#define VOTE(x) \\\n    __ballot_sync(~0u, x)\n__global__ void k(unsigned* p) { *p = VOTE(1); }'
lists 'an index in a function' 'fibers: threadIdx in f' <<< '__device__ int f() { return threadIdx.x; } __global__ void k(int* p) { *p = f(); }'

# an error in line 7 of the .cu file, after a rewritten launch over three lines and an included file
printf '__global__ void other(int* p) { *p = 1; }\n' > "$directory/other.cu"
printf '#include <cuda_runtime.h>\n#include "other.cu"\nvoid f(int* p) {\n    other<<<1,\n            1>>>(\n        p);\n    p = undeclared;\n}\n' > "$directory/x.cu"
(cd "$directory" && "$cu2cpp" x.cu) > "$directory/x.cpp"
${CXX:-g++} -std=c++17 -I dev/cpu -c "$directory/x.cpp" -o "$directory/x.o" 2>&1 | grep -q "^x.cu:7:.*error: .*undeclared"
verdict $? "a compiler error names the line of the .cu file"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
