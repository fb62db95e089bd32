#!/usr/bin/env python3
"""Times PyTorch's training steps on a GPU, to be compared with those that dev/bench times.

    bench_deit.py                       every row, deit_small first: a Markdown table
    bench_deit.py --json --seconds 90   a line of JSON a row, as soon as it is had; ends in time
    bench_deit.py --device cpu --quick  the same rows, so small that they test this program

What people do: fp32 weights, autocast to bf16, fused attention, AdamW in one kernel (fused=True).
The rows: eager, torch.compile, eager with block checkpointing, and published DropIT (torch.topk
over the whole tensor, values in bf16 and int32 indices), in this order for the first model. A step
is forward, backward and AdamW on one batch of random images that stays on the device; it ends when
its loss is on the host, as the trainer's does. `peak` is torch.cuda.max_memory_allocated of a row;
`reserved` is what PyTorch's allocator took from the device for it. PyTorch 2.4 or newer.
"""
import argparse
import gc
import json
import os
import sys
import threading
import time

BEGAN = time.monotonic()  # the import of torch belongs to the time that may be used

try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    sys.exit(f"not run: PyTorch does not import in {sys.executable} ({error})")

import deit  # noqa: E402
from bench_deit_cpu import MIB, Peer, batch  # noqa: E402

BATCH_SIZES = {"deit_small": 256, "deit_base": 128, "deit_tiny": 256}  # in order of importance
KINDS = {"eager": {}, "torch.compile": {"compiled": True},
         "block checkpointing": {"checkpointing": True}, "published DropIT 0.7": {"gamma": 0.7},
         "published DropIT 0.9": {"gamma": 0.9}}


def dropit_under_autocast(device):
    """The reference's DropIT with its inputs cast to bf16, as autocast does for a linear layer."""
    published = deit.DropitLinearFunction

    class DropitLinearFunction(published):
        forward = staticmethod(torch.amp.custom_fwd(
            published.forward, device_type=device, cast_inputs=torch.bfloat16))
        backward = staticmethod(torch.amp.custom_bwd(published.backward, device_type=device))

    return DropitLinearFunction


class GpuPeer(Peer):
    """bench_deit_cpu's training loop under autocast; PyTorch's own initial values, made fast."""

    def __init__(self, model, size, device, gamma=0.0, checkpointing=False, compiled=False):
        self.device = device
        with torch.device(device):
            self.network = deit.Deit(deit.model_config(model))
        for block in self.network.blocks:
            block.attn.fused = True
        self.network.checkpointing = checkpointing
        if gamma > 0:
            self.network.use_dropit(deit.Dropit(gamma, "topk"))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-6, weight_decay=0.05,
                                           fused=True)
        if compiled:
            self.network = torch.compile(self.network)
        self.image, self.label = (t.to(device) for t in batch(model, size))

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.network(self.image), self.label)
        loss.backward()
        self.optimizer.step()
        loss.item()  # waits for the forward pass only
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(model, kind, options):
    """One row: a dictionary, or a sentence that says why there is none."""
    cuda, size = options.device == "cuda", options.batch_sizes[model]
    if cuda:
        torch.cuda.empty_cache()
    peer = None
    try:
        peer = GpuPeer(model, size, options.device, **KINDS[kind])
        peer.turn(1)
        if cuda:
            torch.cuda.reset_peak_memory_stats()  # without what choosing of algorithms took
        steps = min(options.steps, max(3, int(4000 / peer.turn(1)[0])))
        ms_min, ms_median = peer.turn(steps)
        row = {"what": "peer", "model": model, "batch": size, "kind": kind,
               "ms_min": round(ms_min, 3), "ms_median": round(ms_median, 3),
               "images_per_s": round(1000 * size / ms_median, 2), "torch": torch.__version__,
               "device": torch.cuda.get_device_name() if cuda else "CPU"}
        if cuda:
            row.update(peak=torch.cuda.max_memory_allocated(),
                       reserved=torch.cuda.max_memory_reserved())
        return row
    except torch.cuda.OutOfMemoryError:
        return "out of device memory"
    finally:
        del peer
        torch._dynamo.reset()  # compiled code holds the network, parameters and all
        gc.collect()


class Printer:
    """Prints each row at once. When the time is over, the rows that are missing, and the end."""

    def __init__(self, options, rows):
        self.json, self.left, self.lock = options.json, list(rows), threading.Lock()
        if not self.json:
            print(f"PyTorch {torch.__version__}, bf16 autocast\n"
                  "| model | batch | | ms min | ms median | images/s | peak MiB | reserved MiB |\n"
                  "|---|---|---|---|---|---|---|---|", flush=True)
        if options.seconds:
            timer = threading.Timer(max(0.0, options.seconds - (time.monotonic() - BEGAN)),
                                    self.time_is_over, [options.seconds])
            timer.daemon = True
            timer.start()

    def row(self, model, kind, result):
        with self.lock:
            self.left.remove((model, kind))
            self.write(model, kind, result)

    def write(self, model, kind, result):
        if isinstance(result, str):
            line = (json.dumps({"what": "peer", "model": model, "kind": kind, "not_run": result})
                    if self.json else f"| {model} | | {kind} | not run: {result} |")
        elif self.json:
            line = json.dumps(result)
        else:
            memory = [f"{result[m] / MIB:.0f}" if m in result else "-" for m in ("peak", "reserved")]
            line = (f"| {model} | {result['batch']} | {kind} | {result['ms_min']:.1f} | "
                    f"{result['ms_median']:.1f} | {result['images_per_s']:.1f} | "
                    f"{memory[0]} | {memory[1]} |")
        print(line, flush=True)

    def time_is_over(self, seconds):
        with self.lock:
            for model, kind in self.left:
                self.write(model, kind, f"the {seconds:g} s were over")
            os._exit(0)  # torch.compile may be in the middle of something long


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=BATCH_SIZES, help="this one only")
    parser.add_argument("--batch_size", type=deit.positive, help="instead of "
                        + ", ".join(f"{b} for {m}" for m, b in BATCH_SIZES.items()))
    parser.add_argument("--steps", type=deit.positive, default=10, help="fewer, where they take over 4 s")
    parser.add_argument("--seconds", type=float, default=0, help="end after so long; 0: any time")
    parser.add_argument("--json", action="store_true", help="a line of JSON a row")
    parser.add_argument("--quick", action="store_true", help="two steps of deit_nano, batch 4")
    options = parser.parse_args()
    if not hasattr(torch.amp, "custom_fwd"):
        sys.exit(f"not run: PyTorch {torch.__version__} in {sys.executable} is older than 2.4")
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"not run: PyTorch {torch.__version__} in {sys.executable} finds no CUDA device")
    options.batch_sizes = {options.model: BATCH_SIZES[options.model]} if options.model \
        else dict(BATCH_SIZES)
    if options.quick:
        options.batch_sizes, options.steps = {"deit_nano": 4}, 2
    if options.batch_size:
        options.batch_sizes = dict.fromkeys(options.batch_sizes, options.batch_size)
    deit.DropitLinearFunction = dropit_under_autocast(options.device)
    torch.set_float32_matmul_precision("high")  # of what autocast leaves in fp32
    torch.backends.cudnn.benchmark = True
    first = next(iter(options.batch_sizes))
    rows = [(model, kind) for model in options.batch_sizes for kind in KINDS]
    # to compile takes the longest: last, but for the first model
    rows.sort(key=lambda row: row[0] != first and (1 + bool(KINDS[row[1]].get("compiled"))))
    printer = Printer(options, rows)
    for model, kind in rows:
        printer.row(model, kind, measure(model, kind, options))


if __name__ == "__main__":
    main()
