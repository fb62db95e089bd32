#!/usr/bin/env python3
"""Times the trainer against PyTorch on the CPU, and counts what both keep for the backward pass.

    bench_deit_cpu.py speed     steps of dev/bench and PyTorch in turn, in one run
    bench_deit_cpu.py memory    bytes saved for the backward pass, DeiT-Ti 224 px, batch 64, fp32
    bench_deit_cpu.py           both

A step is forward, backward and AdamW, fp32, on one batch of random images; PyTorch runs eager,
with fused attention where it has it. Published DropIT is torch.topk over the whole tensor, values
and int32 indices. Numbers of two runs or two machines do not compare: only ratios within a run do.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import time

# OpenBLAS recognises the processor by itself; a variable that pins another halves its speed. It and
# the number of threads are read when the libraries are loaded, hence before the import of torch
os.environ.pop("OPENBLAS_CORETYPE", None)
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import deit  # noqa: E402

HAS_FUSED_ATTENTION = hasattr(F, "scaled_dot_product_attention")
MIB = 1024.0 * 1024.0


def build(model, gamma=0.0, fused=HAS_FUSED_ATTENTION, checkpointing=False):
    config = deit.model_config(model)
    network = deit.Deit(config)
    deit.set_parameters(network, deit.initial_parameters(network, 0), "initial values")
    for block in network.blocks:
        block.attn.fused = fused
    network.checkpointing = checkpointing
    if gamma > 0:
        network.use_dropit(deit.Dropit(gamma, "topk"))
    return network


def batch(model, size):
    """Random images as dev/bench draws them: uniform pixels, mean 0.5, deviation 0.25."""
    config = deit.model_config(model)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(size, config.in_chans, config.image_size, config.image_size,
                       generator=generator)
    return (image - 0.5) / 0.25, torch.zeros(size, dtype=torch.long)


# ----------------------------------------------------------------------------
# speed

class Peer:
    """A PyTorch training loop that a turn runs for some steps."""

    def __init__(self, model, size, **kind):
        self.network = build(model, **kind)
        self.image, self.label = batch(model, size)
        parameters, rates = self.network.parameters(), {"lr": 1e-6, "weight_decay": 0.05}
        try:
            self.optimizer = torch.optim.AdamW(parameters, fused=True, **rates)
        except (TypeError, RuntimeError):  # before PyTorch 2.4 there is none for the CPU
            self.optimizer = torch.optim.AdamW(self.network.parameters(), **rates)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.network(self.image), self.label)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def turn(self, steps):
        """Milliseconds of each step; two more warm caches and allocator up, as in dev/bench."""
        times = []
        for i in range(steps + 2):
            began = time.perf_counter()
            self.step()
            times.append(1000 * (time.perf_counter() - began))
        return min(times[2:]), statistics.median(times[2:])


class Trainer:
    """Steps of the trainer, timed by dev/bench."""

    def __init__(self, program, model, size, gamma, recompute):
        self.program = program
        self.flags = ["-m", model, "-b", str(size), "-g", str(gamma), "-r", str(recompute)]

    def turn(self, steps):
        command = [self.program, "steps", str(steps)] + self.flags
        done = subprocess.run(command, cwd=deit.ROOT, stdout=subprocess.PIPE, text=True)
        last = done.stdout.strip().rsplit("\n", 1)[-1]
        found = re.match(r"bench ms_min=(\S+) ms_median=(\S+) images_per_s=", last)
        if done.returncode != 0 or not found:
            sys.exit(f"bench: {' '.join(command)} ended with {done.returncode} and the line "
                     f"{last!r}")
        return float(found[1]), float(found[2])


def own(gamma, recompute):
    return f"trainer gamma {gamma} -r {recompute}"


def contenders(options, model, size):
    """{row: something with turn()}, in the order of the turns."""
    everything = options.all
    rows = {"PyTorch": Peer(model, size)}
    for gamma in (0.7, 0.9) if everything else (0.7,):
        rows[f"PyTorch, published DropIT {gamma}"] = Peer(model, size, gamma=gamma)
    if everything:
        rows["PyTorch, block checkpointing"] = Peer(model, size, checkpointing=True)
    for gamma in (0, 0.7, 0.9) if everything else (0, 0.7):
        for recompute in range(4):
            if everything or recompute < 2 or (model == "deit_tiny" and gamma == 0):
                rows[own(gamma, recompute)] = Trainer(options.bench, model, size, gamma,
                                                      recompute)
    return rows


def speed(options):
    ratios = []
    for model, size, steps, plain_goal, dropit_goal in (("deit_nano", 256, 4, 0.5, 1.2),
                                                        ("deit_tiny", 8, 3, 0.7, 1.5)):
        if options.model not in ("both", model):
            continue
        rows = contenders(options, model, size)
        turns = {name: [] for name in rows}
        for done in range(options.rounds):
            for name, row in rows.items():
                turns[name].append(row.turn(steps))
            print(f"{model}: round {done + 1}/{options.rounds}", file=sys.stderr, flush=True)
        median = {name: statistics.median(m for _, m in results)
                  for name, results in turns.items()}
        print(f"\n{model} b{size}, {THREADS} threads, {options.rounds} rounds of {steps} steps\n"
              "| | ms min | ms median | images/s |\n|---|---|---|---|")
        for name, results in turns.items():
            fastest = min(m for m, _ in results)
            print(f"| {name} | {fastest:.1f} | {median[name]:.1f} | "
                  f"{1000 * size / median[name]:.1f} |")
        # (what, value, goal, larger is better)
        published = "PyTorch, published DropIT 0.7"
        for level in (0, 1):
            ratios += [
                (f"{model} gamma 0 -r {level}: images/s over PyTorch's",
                 median["PyTorch"] / median[own(0, level)], plain_goal, True),
                (f"{model} gamma 0.7 -r {level}: images/s over published DropIT's",
                 median[published] / median[own(0.7, level)], dropit_goal, True),
                (f"{model} -r {level}: step at gamma 0.7 over step at gamma 0",
                 median[own(0.7, level)] / median[own(0, level)], 1.2, False)]
        if model == "deit_tiny":
            ratios += [(f"{model} gamma 0: step at -r {level} over step at -r 0",
                        median[own(0, level)] / median[own(0, 0)], goal, False)
                       for level, goal in ((1, 1.08), (2, 1.25), (3, 1.4))]
    print("\n| ratio of medians | measured | goal | |\n|---|---|---|---|")
    for what, value, goal, larger in ratios:
        reached = value >= goal if larger else value <= goal
        print(f"| {what} | {value:.2f} | at {'least' if larger else 'most'} {goal} | "
              f"{'reached' if reached else 'MISSED'} |")


# ----------------------------------------------------------------------------
# memory

def storage(tensor):
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()


def saved_bytes(function, parameters):
    """Bytes of the distinct storages that a forward pass saves for backward, without parameters."""
    known = {storage(p).data_ptr() for p in parameters}
    saved = {}

    def pack(tensor):
        # views of one storage (q, k and v of qkv) count once, at the size that stays allocated
        memory = storage(tensor)
        if memory.data_ptr() not in known:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # holds the graph, so that no address is used twice
    del result
    return sum(saved.values())


def memory(options):
    model, size = "deit_tiny", options.batch_size
    image, label = batch(model, size)
    print(f"\n{model} b{size}, fp32, MiB kept for the backward pass\n| | MiB |\n|---|---|")

    def count(name, **kind):
        network = build(model, **kind)
        saved = saved_bytes(lambda: F.cross_entropy(network(image), label), network.parameters())
        print(f"| PyTorch, {name} | {saved / MIB:.0f} |", flush=True)
        return network

    for fused in (True, False) if HAS_FUSED_ATTENTION else (False,):
        attention = "fused attention" if fused else "explicit attention"
        count(attention, fused=fused)
        for gamma in (0.5, 0.7, 0.9):
            count(f"{attention}, published DropIT {gamma}", fused=fused, gamma=gamma)
    network = count("block checkpointing", checkpointing=True)
    x = torch.zeros(size, network.pos_embed.shape[1], network.pos_embed.shape[2],
                    requires_grad=True)
    live = saved_bytes(lambda: network.blocks[0](x), network.parameters())
    print(f"| and its one live block | {live / MIB:.0f} |")

    print("\n| trainer, -plan 1 | cached MiB | scratch MiB |\n|---|---|---|")
    for recompute in range(4):
        for gamma in (0, 0.5, 0.7, 0.9):
            command = [options.trainer, "-m", model, "-b", str(size), "-g", str(gamma),
                       "-r", str(recompute), "-plan", "1"]
            done = subprocess.run(command, cwd=deit.ROOT, stdout=subprocess.PIPE, text=True)
            last = done.stdout.strip().rsplit("\n", 1)[-1]
            plan = dict(re.findall(r"(\w+)=(\d+)", last))
            if done.returncode != 0 or not last.startswith("plan "):
                sys.exit(f"bench: {' '.join(command)} ended with {done.returncode} and the line "
                         f"{last!r}")
            print(f"| -r {recompute} -g {gamma} | {int(plan['cached']) / MIB:.0f} | "
                  f"{int(plan['scratch']) / MIB:.0f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mode", nargs="?", choices=("speed", "memory", "both"), default="both")
    parser.add_argument("--trainer", default="./train_deit", help="for its -plan, built in FP32")
    parser.add_argument("--bench", default="build/cpu-fp32/dev/bench", help="dev/bench, built in FP32")
    parser.add_argument("--model", choices=("both", "deit_nano", "deit_tiny"), default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=64, help="of the memory table")
    parser.add_argument("--all", action="store_true",
                        help="every gamma at every -r, and PyTorch with block checkpointing")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    attention = "fused" if HAS_FUSED_ATTENTION else "explicit (this PyTorch has no fused one)"
    print(f"PyTorch {torch.__version__}, {THREADS} threads, attention {attention}")
    if options.mode != "memory":
        if os.getloadavg()[0] > 0.5:
            print(f"note: the load is {os.getloadavg()[0]:.1f}. PyTorch's threads spin while they "
                  "wait: beside other programs its times grow several fold and mean nothing")
        speed(options)
    if options.mode != "speed":
        memory(options)


if __name__ == "__main__":
    main()
