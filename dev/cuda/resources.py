#!/usr/bin/env python3
"""
What the compiler makes of a trainer's kernels, without a GPU: registers, spills, stack, shared
memory, warps on a multiprocessor, and the widths of global loads and stores in the machine code.

    dev/cuda/resources.py                      tables for sm_80 and sm_90, bf16
    dev/cuda/resources.py train_deit.cu --arch sm_90 --precision fp32
    dev/cuda/resources.py --check              exit code 1 and a sentence for each rule that a kernel breaks

The rules: no kernel spills; no kernel uses stack memory; every kernel, in its version for vectors,
has a load or store of 16 bytes. STACK and NARROW below name the exceptions, each with its reason.
Everything else comes from the compiled program, and the threads of a block from the launches in the
preprocessed source. Needs nvcc and nvdisasm (in PATH, beside nvcc, or named by NVDISASM; `pip
install nvidia-cuda-nvdisasm` brings one); exit code 3: one is missing.
"""
import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")

# kernels, or single versions, that need not move 16 bytes at a time, with the reason; sizes of DeiT-S, batch 256
NARROW = {
    "dropit_sample_kernel": "reads 16,384 elements that are far apart",
    "dropit_pack_kernel<true>": "-s random: in fp32 it reads only elements that their hash keeps",
    "dropit_start_kernel": "a few words a selection",
    "dropit_search_kernel": "2,048 counters a selection",
    "bias_add_kernel": "runs only for sizes that do not divide into vectors",
    "column_sum_finish_kernel": "3 % of the bytes that the first step of the sum reads",
    "cross_entropy_kernel": "2 MiB of a step", "loss_sum_kernel": "one number an image",
    "norm_kernel": "256 numbers",
    "resize_columns_kernel": "bytes, of which each thread needs a different window",
    "resize_turn_kernel": "transposes 8 x 8 bytes, in rows of 8",
    "augment_table_kernel": "a histogram of bytes", "augment_kernel": "gathers bytes at rotated places",
    "embed_backward_kernel": "80 MiB of a step",
    "drop_path_scales_kernel": "two numbers a block and image",
    "attention_pointers_kernel": "pointers, 8 bytes each", "dot_kernel": "runs under -stats only",
}

# versions that may use stack memory, with the reason
STACK = {
    "dropit_tile_kernel<true>": "-s random: a loop over 32 hashes is not unrolled and indexes an array",
    "dropit_pack_kernel<true>": "the same",
    "augment_kernel<4, 4>": "loops over four channels are not unrolled; no published model has four",
    "patchify_kernel<1, true>": "sine and cosine of random erasing, for angles that do not occur",
    "patchify_kernel<8, true>": "the same, and eight pixels that random erasing indexes in a loop: "
                                "unrolled, it would repeat the code of Philox eight times",
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
    beside = os.path.dirname(os.path.realpath(nvcc))
    nvdisasm = os.environ.get("NVDISASM") or shutil.which("nvdisasm") or shutil.which("nvdisasm", path=beside)
    if nvdisasm is None or shutil.which(nvdisasm) is None:
        missing("nvdisasm is not found in PATH nor beside nvcc; install it (pip install nvidia-cuda-nvdisasm) or say "
                "NVDISASM=FILE")
    return nvcc, nvdisasm


def split_arguments(text):
    """what stands between the commas of a call, but not those in parentheses"""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def threads_of(nvcc, source_path, precision):
    """threads of a block, {kernel: number}, from the launches in the preprocessed source, where macros are
    expanded; the largest where launches differ. A kernel whose launches name no number is left out"""
    expanded = output_of([nvcc, "-E", "-std=c++17", "-DENABLE_" + precision.upper(), source_path])
    threads = {}
    for name, launch in re.findall(r"\b(\w+)\s*(?:<[^<>;]*>)?\s*<<<([^;]*?)>>>", expanded):
        block = split_arguments(launch)[1]
        if block.isdigit():
            threads[name] = max(int(block), threads.get(name, 0))
    return threads


def kernels_of(source):
    """{kernel: names of its template parameters}, in the order of the source"""
    found = re.findall(r"(?:template <([^>]*)>\s*)?__global__ void(?: __launch_bounds__\(.*?\))? (\w+)\(", source)
    return {name: [p.split()[-1] for p in parameters.split(",") if p] for parameters, name in found}


def check_exceptions():
    """ends the program if an exception names a kernel that no trainer has"""
    sources = "".join(open(path).read() for path in glob.glob(os.path.join(ROOT, "train_*.cu")))
    names = list(NARROW) + list(STACK)
    gone = [name for name in names if not re.search(r"\b%s\(" % name.split("<")[0], sources)]
    if gone:
        sys.exit("error: NARROW or STACK name kernels that no trainer has: " + ", ".join(gone))


def warps_resident(arch, threads, registers, shared):
    """warps of a kernel that fit on a multiprocessor at once, of 64"""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256         # registers are given out in units of 256 a warp,
    by_registers = 65536 // 4 // per_warp * 4 // warps # from one of four register files
    by_block = -(-(shared + 1024) // 128) * 128        # 1 KiB of a block is the system's
    by_shared = SHARED_KIB[arch] * 1024 // by_block
    return warps * min(64 // warps, 32, by_registers, by_shared)


def widths_of(code):
    """(loads, stores) from and to global memory in one kernel's machine code: {bits: instructions}"""
    found = {"LD": {}, "ST": {}}
    for kind, modifiers in re.findall(r"\b(LD|ST)G?((?:\.\w+)*)\s", code):
        named = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", modifiers)
        bits = int(named.group(1)) if named else 32
        found[kind][bits] = found[kind].get(bits, 0) + 1
    return found["LD"], found["ST"]


def compile_kernels(tools, source_path, arch, precision):
    """one dictionary for each version of a kernel, in the order of the source"""
    nvcc, nvdisasm = tools
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        verbose = output_of([nvcc, "-O3", "-std=c++17", "-arch=" + arch, "-DENABLE_" + precision.upper(),
                             "-Xptxas", "-v", "-cubin", source_path, "-o", cubin])
        sass = output_of([nvdisasm, "-c", cubin])
    with open(source_path) as f:
        parameters = kernels_of(f.read())
    code = dict(re.findall(r"\n\t\.section\t\.text\.(\w+),(.*?)(?=\n\t\.section\t|\Z)", sass, re.S))
    entries = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                         r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)", verbose, re.S)
    demangled = output_of(["c++filt"] + [e[0] for e in entries]).splitlines()
    threads = threads_of(nvcc, source_path, precision)
    kernels = []
    for (mangled, stack, stores, loads, registers, rest), full in zip(entries, demangled):
        version = re.sub(r"^void ", "", full).split("(")[0].replace("__nv_", "")
        name = version.split("<")[0]
        shared = re.search(r"(\d+) bytes smem", rest)
        values = dict(zip(parameters[name], version[len(name) + 1:-1].split(", ")))
        k = {"version": version, "name": name, "registers": int(registers), "stack": int(stack),
             "spills": int(stores) + int(loads), "shared": int(shared.group(1)) if shared else 0,
             "scalar": values.get("V") == "1", "threads": threads.get(name)}
        if name in threads:
            k["warps"] = warps_resident(arch, k["threads"], k["registers"], k["shared"])
        k["loads"], k["stores"] = widths_of(code[mangled])
        kernels.append(k)
    if set(k["name"] for k in kernels) != set(parameters):
        different = set(parameters) ^ set(k["name"] for k in kernels)
        sys.exit("error: only one of nvcc's output and the source has these kernels: %s" % sorted(different))
    order = list(parameters)
    return sorted(kernels, key=lambda k: (order.index(k["name"]), k["version"]))


def broken_rules(kernels):
    """a sentence for each"""
    sentences = []
    for k in kernels:
        if k["spills"] > 0:
            sentences.append("%s spills registers: %d bytes of stores and loads" % (k["version"], k["spills"]))
        if k["stack"] > 0 and k["version"] not in STACK:
            sentences.append("%s uses %d bytes of stack memory" % (k["version"], k["stack"]))
        wide = 128 in k["loads"] or 128 in k["stores"]
        if not wide and not k["scalar"] and not {k["name"], k["version"]} & set(NARROW):
            sentences.append("no global load or store of %s moves 16 bytes" % k["version"])
    return sentences


def widths_text(widths):
    """{128: 3, 32: 1} -> "128 x3, 32" """
    parts = ["%d%s" % (bits, " x%d" % n if n > 1 else "") for bits, n in sorted(widths.items(), reverse=True)]
    return ", ".join(parts) or "-"


def print_table(kernels, arch, precision):
    """markdown"""
    print("\n%s, %s. Bytes of spills, stack and shared memory; warps a multiprocessor holds at once; "
          "loads and stores: bits x instructions\n" % (arch, precision))
    print("| kernel | threads | registers | spills | stack | shared | warps | global loads | global stores |")
    print("|---|---|---|---|---|---|---|---|---|")
    for k in kernels:
        print("| `%s` | %s | %d | %d | %d | %d | %s/64 | %s | %s |" % (
            k["version"], k["threads"] or "?", k["registers"], k["spills"], k["stack"], k["shared"],
            k.get("warps", "?"), widths_text(k["loads"]), widths_text(k["stores"])))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", nargs="?", default=os.path.join(ROOT, "train_deit.cu"), help="train_deit.cu")
    parser.add_argument("--arch", choices=sorted(SHARED_KIB), help="default: both")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--check", action="store_true", help="the rules, not the tables")
    options = parser.parse_args()
    check_exceptions()
    tools, failed = find_tools(), 0
    for arch in [options.arch] if options.arch else sorted(SHARED_KIB):
        kernels = compile_kernels(tools, options.trainer, arch, options.precision)
        if not options.check:
            print_table(kernels, arch, options.precision)
            continue
        sentences = broken_rules(kernels)
        failed += len(sentences)
        for sentence in sentences:
            print("NOT OK %s, %s: %s" % (arch, options.precision, sentence))
        print("%s, %s: %d versions of %d kernels, %d broken rules" % (arch, options.precision, len(kernels),
              len(set(k["name"] for k in kernels)), len(sentences)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
