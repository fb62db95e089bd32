#!/usr/bin/env python3
"""
What is known of the trainer's kernels without a GPU: registers, spills, stack, shared memory, warps on a multiprocessor, and the
widths of global loads and stores in the machine code.

    dev/cuda/resources.py                      tables for sm_80 and sm_90, bf16
    dev/cuda/resources.py --arch sm_90 --precision fp32
    dev/cuda/resources.py --check              no tables: exit code 1 and a sentence for each rule that a kernel breaks

The rules: no kernel spills; none uses stack memory but those in STACK; no kernel of MEMORY_BOUND lacks an access of 16 bytes in
the version for vectors. Needs nvcc and nvdisasm (in PATH, beside nvcc, or named by NVDISASM; Triton's Python package brings one as
triton/backends/nvidia/bin/nvdisasm); exit code 3 says that one of them is missing.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")

# threads of a block. Verified against the launches in the source
THREADS = {
    "dropit_sample_kernel": 64, "dropit_range_kernel": 128, "dropit_candidates_kernel": 64, "dropit_start_kernel": 256, "dropit_histogram_kernel": 64,
    "dropit_search_kernel": 256, "dropit_count_kernel": 64, "dropit_offsets_kernel": 256, "dropit_tile_kernel": 64,
    "dropit_pack_kernel": 128, "dropit_unpack_kernel": 256, "dropit_mask_kernel": 256,
    "bias_add_kernel": 256, "column_sum_kernel": 64, "column_sum_finish_kernel": 64,
    "cross_entropy_kernel": 64, "loss_sum_kernel": 64, "sum_squares_kernel": 128, "norm_kernel": 1, "adamw_kernel": 256, "sgd_kernel": 256,
    "ema_kernel": 256, "round_kernel": 256, "drop_path_scales_kernel": 64, "drop_path_kernel": 256,
    "resize_columns_kernel": 128, "resize_turn_kernel": 128, "resize_rows_kernel": 128, "augment_table_kernel": 256, "augment_kernel": 256,
    "patchify_kernel": 256, "embed_kernel": 256, "embed_backward_tokens_kernel": 256, "embed_backward_positions_kernel": 64,
    "layernorm_forward_kernel": 128, "layernorm_backward_kernel": 128, "layernorm_weight_kernel": 64,
    "gelu_forward_kernel": 256, "gelu_backward_kernel": 256,
    "attention_pointers_kernel": 64, "softmax_forward_kernel": 128, "softmax_backward_kernel": 128, "dot_kernel": 128,
}

# kernels that memory bounds and a step cannot neglect: in the version for vectors they must move 16 bytes at a time. Not here, for by
# `predict.py --kernels` each moves under 1 % of a step's bytes: the searches and counts of DropIT, the second step of sums over columns,
# loss, pointers of heads, gradients of positions. Nor bias_add_kernel (odd sizes alone) and dot_kernel (-stats alone)
MEMORY_BOUND = [
    "dropit_candidates_kernel", "dropit_pack_kernel", "dropit_unpack_kernel", "dropit_mask_kernel", "column_sum_kernel",
    "sum_squares_kernel", "adamw_kernel", "sgd_kernel", "ema_kernel", "drop_path_kernel", "patchify_kernel", "embed_kernel", "embed_backward_tokens_kernel",
    "layernorm_forward_kernel", "layernorm_backward_kernel", "layernorm_weight_kernel", "gelu_forward_kernel", "gelu_backward_kernel",
    "softmax_forward_kernel", "softmax_backward_kernel",
]

# versions that may use stack memory, with the reason
STACK = {
    "dropit_tile_kernel<true>": "-s random: a loop over 32 hashes of ten rounds is not unrolled, and so it indexes an array",
    "dropit_pack_kernel<true>": "the same",
    "augment_kernel<4, 4>": "16 bytes of four pixels of four channels, whose loops are not unrolled; no published model has four channels",
    "patchify_kernel<1, true>": "sine and cosine of random erasing, for angles that do not occur",
    "patchify_kernel<8, true>": "the same, and eight pixels that a branch of random erasing indexes in a loop: unrolling would write Philox out eight times",
}

# shared memory of a multiprocessor in KiB; 65,536 registers, 64 warps and 32 blocks in both
SHARED_KIB = {"sm_80": 164, "sm_90": 228}


def missing(sentence):
    """says which tool is missing, and ends with code 3"""
    print("error: " + sentence, file=sys.stderr)
    sys.exit(3)


def output_of(command):
    """what a command prints on stdout and stderr; ends with its words where it fails"""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit("error: %s failed:\n%s" % (" ".join(command), done.stdout))
    return done.stdout


def find_tools():
    """(nvcc, nvdisasm)"""
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        missing("nvcc is not found: install the CUDA toolkit and put nvcc into PATH")
    nvdisasm = os.environ.get("NVDISASM") or shutil.which("nvdisasm") or shutil.which("nvdisasm", path=os.path.dirname(os.path.realpath(nvcc)))
    if nvdisasm is None or shutil.which(nvdisasm) is None:
        missing("nvdisasm is not found in PATH nor beside nvcc; install it (pip install nvidia-cuda-nvdisasm) or say NVDISASM=FILE")
    return nvcc, nvdisasm


def kernels_of(source):
    """names of the kernels in the source, in order; fails unless THREADS has each of them, with the threads of its launches"""
    names = re.findall(r"__global__ void(?: __launch_bounds__\(.*?\))? (\w+)\(", source)
    problems = ["%s is missing from THREADS" % n for n in names if n not in THREADS]
    problems += ["THREADS names %s, which is gone" % n for n in THREADS if n not in names]
    problems += ["MEMORY_BOUND names %s, which is gone" % n for n in MEMORY_BOUND if n not in names]
    problems += ["STACK names %s, which is gone" % v for v in STACK if v.split("<")[0] not in names]
    defined = dict(re.findall(r"#define (\w+) (\d+)\b", source))
    rows = re.search(r"#define LAUNCH_ROWS.*?<<<[^;]*?, (\w+), 0, main_stream>>>", source, re.S).group(1)
    launches = [(n, rows) for n in re.findall(r"LAUNCH_ROWS\((\w+_kernel),", source)]
    launches += re.findall(r"(\w+_kernel)(?:<[^<>]*>)?<<<[^;]*?, (\w+), 0, (?:main_)?stream>>>", source)
    problems += ["no launch of %s without dynamic shared memory is found" % n for n in names if n not in dict(launches)]
    problems += ["%s is launched with %s threads a block, THREADS says %d" % (n, t, THREADS[n])
                 for n, t in launches if n in THREADS and int(defined.get(t, t)) != THREADS[n]]
    if problems:
        sys.exit("error: dev/cuda/resources.py and train_deit.cu disagree: " + "; ".join(problems))
    return names


def warps_resident(arch, threads, registers, shared):
    """warps of a kernel that fit on a multiprocessor at once, of 64"""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256                                # registers are given out in units of 256 a warp,
    by_registers = 65536 // 4 // per_warp * 4 // warps                        # from one of four register files
    by_shared = SHARED_KIB[arch] * 1024 // (-(-(shared + 1024) // 128) * 128) # 1 KiB of a block is the system's
    return warps * min(64 // warps, 32, by_registers, by_shared)


def widths_of(code):
    """(loads, stores) from and to global memory in one kernel's machine code: {bits: instructions}"""
    found = {"LD": {}, "ST": {}}
    for kind, modifiers in re.findall(r"\b(LD|ST)G?((?:\.\w+)*)\s", code):
        named = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", modifiers)
        bits = int(named.group(1)) if named else 32
        found[kind][bits] = found[kind].get(bits, 0) + 1
    return found["LD"], found["ST"]


def compile_kernels(tools, names, source_path, arch, precision):
    """one dictionary for each version of a kernel, in the order of the source"""
    nvcc, nvdisasm = tools
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        verbose = output_of([nvcc, "-O3", "-std=c++17", "-arch=" + arch, "-DENABLE_" + precision.upper(), "-Xptxas", "-v", "-cubin",
                             source_path, "-o", cubin])
        sass = output_of([nvdisasm, "-c", cubin])
    code = dict(re.findall(r"\n\t\.section\t\.text\.(\w+),(.*?)(?=\n\t\.section\t|\Z)", sass, re.S))
    entries = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
                         r".*?Used (\d+) registers([^\n]*)", verbose, re.S)
    demangled = output_of(["c++filt"] + [e[0] for e in entries]).splitlines()
    kernels = []
    for (mangled, stack, stores, loads, registers, rest), full in zip(entries, demangled):
        version = re.sub(r"^void ", "", full).split("(")[0].replace("__nv_", "")
        name = version.split("<")[0]
        shared = re.search(r"(\d+) bytes smem", rest)
        k = {"version": version, "name": name, "registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads),
             "shared": int(shared.group(1)) if shared else 0}
        k["warps"] = warps_resident(arch, THREADS[name], k["registers"], k["shared"])
        k["loads"], k["stores"] = widths_of(code[mangled])
        kernels.append(k)
    if sorted(set(k["name"] for k in kernels)) != sorted(names):
        sys.exit("error: nvcc's output names other kernels than the source: %s" % sorted(set(names) ^ set(k["name"] for k in kernels)))
    return sorted(kernels, key=lambda k: (names.index(k["name"]), k["version"]))


def scalar_version(version):
    """is this the version for sizes that do not divide into vectors (V is 1), or for hashes (-s random)?"""
    return re.search(r"<(1|true)\b|<false, 1>", version) is not None


def broken_rules(kernels):
    """a sentence for each"""
    sentences = []
    for k in kernels:
        if k["spills"] > 0:
            sentences.append("%s spills registers: %d bytes of stores and loads" % (k["version"], k["spills"]))
        if k["stack"] > 0 and k["version"] not in STACK:
            sentences.append("%s uses %d bytes of stack memory" % (k["version"], k["stack"]))
        if k["name"] in MEMORY_BOUND and not scalar_version(k["version"]) and 128 not in k["loads"] and 128 not in k["stores"]:
            sentences.append("%s is bound by memory, and no global load or store of it moves 16 bytes" % k["version"])
    return sentences


def widths_text(widths):
    """{128: 3, 32: 1} -> "128 x3, 32" """
    return ", ".join("%d%s" % (bits, " x%d" % n if n > 1 else "") for bits, n in sorted(widths.items(), reverse=True)) or "-"


def print_table(kernels, arch, precision):
    """markdown"""
    print("\n%s, %s. Bytes of spills, stack and shared memory; warps a multiprocessor holds at once; loads and stores: bits x instructions\n"
          % (arch, precision))
    print("| kernel | threads | registers | spills | stack | shared | warps | global loads | global stores |")
    print("|---|---|---|---|---|---|---|---|---|")
    for k in kernels:
        print("| `%s` | %d | %d | %d | %d | %d | %d/64 | %s | %s |" % (k["version"], THREADS[k["name"]], k["registers"], k["spills"], k["stack"],
              k["shared"], k["warps"], widths_text(k["loads"]), widths_text(k["stores"])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=sorted(SHARED_KIB), help="default: both")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--check", action="store_true", help="the rules, not the tables")
    options = parser.parse_args()
    source_path = os.path.join(ROOT, "train_deit.cu")
    with open(source_path) as f:
        names = kernels_of(f.read())
    tools, failed = find_tools(), 0
    for arch in [options.arch] if options.arch else sorted(SHARED_KIB):
        kernels = compile_kernels(tools, names, source_path, arch, options.precision)
        if not options.check:
            print_table(kernels, arch, options.precision)
            continue
        sentences = broken_rules(kernels)
        failed += len(sentences)
        for sentence in sentences:
            print("NOT OK %s, %s: %s" % (arch, options.precision, sentence))
        print("%s, %s: %d versions of %d kernels, %d broken rules" % (arch, options.precision, len(kernels), len(names), len(sentences)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
