#!/usr/bin/env python3
"""Trains trainer and reference side by side, from the same weights on the same batches.

    python3 dev/reference/compare.py [--trainer ./train_deit] [--steps 40] [--gamma 0,0.7]

Prints both losses of every step and the largest relative difference, and draws both curves to a
PNG. Needs PyTorch (1.13 is enough). Exit code 1 when a difference is above its limit.

With DropIT rounding decides which of two nearly equal elements is kept, and each such swap makes
the next ones likelier: after 60 steps at gamma 0.7 two versions of PyTorch are 0.9 % apart with one
seed and 1.6 % with another. So there the limit holds for the first steps, and a wide one later.
"""
import argparse
import os
import struct
import subprocess
import sys
import tempfile
import zlib

import numpy as np

LIMIT = 1e-3             # relative difference of a loss; all steps without DropIT
DROPIT_STEPS = 20        # as many of the first steps with DropIT,
DROPIT_LATER = 5e-2      # and this limit afterwards

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
REFERENCE = [sys.executable, os.path.join(HERE, "deit.py")]


def run(command):
    print("+ " + " ".join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"compare.py: {command[0]} {command[1]} ended with {done.returncode}")


def losses(directory):
    """{step: loss} of a main.log."""
    found = {}
    with open(os.path.join(directory, "main.log")) as file:
        for line in file:
            fields = dict(field.split(":", 1) for field in line.split())
            if "trl" in fields:
                found[int(fields["s"])] = float(fields["trl"])
    if not all(np.isfinite(loss) for loss in found.values()):
        sys.exit(f"compare.py: {directory}/main.log has a loss that is not finite")
    return found


# ----------------------------------------------------------------------------
# the picture: matplotlib where it is installed, else a plain drawing

COLORS = {"reference": (31, 119, 180), "trainer": (214, 39, 40)}


def write_png(path, pixels):
    """uint8 (H, W, 3) as a PNG file."""
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + pixels[y].tobytes() for y in range(height))
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n"
                   + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                   + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def draw_plain(path, panels):
    """One panel beside the other, no text: reference as a wide band, trainer as a line upon it."""
    width, height, margin = 480, 320, 12
    pixels = np.full((height, width * len(panels), 3), 255, np.uint8)
    for i, (_, curves) in enumerate(panels):
        left, right = i * width + margin, (i + 1) * width - margin
        pixels[margin:height - margin, [left, right - 1]] = 160
        pixels[[margin, height - margin - 1], left:right] = 160
        low = min(min(y) for _, y in curves.values())
        high = max(max(y) for _, y in curves.values())
        for name, thickness in (("reference", 3), ("trainer", 1)):
            x, y = curves[name]
            columns = np.arange(left + 1, right - 1)
            values = np.interp(np.linspace(x[0], x[-1], len(columns)), x, y)
            scale = (height - 2 * margin - 12) / (high - low or 1)
            rows = height - margin - 6 - (values - low) * scale
            # a column is filled from its own row to the next one's, so that steep parts stay joined
            for column, row, following in zip(columns, rows, np.append(rows[1:], rows[-1])):
                top, bottom = sorted((int(row), int(following)))
                pixels[top - thickness:bottom + thickness, column] = COLORS[name]
    write_png(path, pixels)


def draw(path, panels):
    try:
        import matplotlib
    except ImportError:
        draw_plain(path, panels)
        print(f"drew {path} (plain, without text: matplotlib is not installed); "
              "blue: reference, red: trainer")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.5), squeeze=False)
    for axis, (title, curves) in zip(axes[0], panels):
        for name, width in (("reference", 4), ("trainer", 1.2)):
            color = tuple(c / 255 for c in COLORS[name])
            axis.plot(*curves[name], color=color, linewidth=width, label=name,
                      alpha=0.5 if name == "reference" else 1)
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"drew {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainer", default="./train_deit", help="its program")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--gamma", default="0,0.7", help="values, with commas between them")
    parser.add_argument("--png", default="compare.png", help="where the picture goes")
    parser.add_argument("flags", nargs="*", help="after --: more flags for both programs")
    options = parser.parse_args()
    png = os.path.abspath(options.png)
    panels, failed = [], []
    with tempfile.TemporaryDirectory() as work:
        weights = os.path.join(work, "init.safetensors")
        run(REFERENCE + ["init", weights, "-m", "deit_nano"])
        for gamma in options.gamma.split(","):
            # named even where they are the defaults of both
            flags = ["-m", "deit_nano", "-w", weights, "-b", "64", "-e", "6", "-l", "2e-3",
                     "-wd", "0.05", "-warmup", "50", "-seed", "0", "-v", "0", "-g", gamma,
                     "-x", str(options.steps), *options.flags]
            found = {}
            # one thread: PyTorch's threads spin, and crawl when other programs want the cores too
            for name, program in (("reference", REFERENCE + ["train", "-threads", "1"]),
                                  ("trainer", [options.trainer])):
                directory = os.path.join(work, f"{name}-{gamma}")
                run(program + flags + ["-o", directory])
                found[name] = losses(directory)
            if not found["reference"] or found["reference"].keys() != found["trainer"].keys():
                sys.exit(f"compare.py: gamma {gamma}: the reference logged "
                         f"{len(found['reference'])} steps, the trainer {len(found['trainer'])}")
            print(f"gamma {gamma}\n  step  reference    trainer      relative difference")
            largest, beyond = (0.0, 0), []
            for step, expected in found["reference"].items():
                loss = found["trainer"][step]
                difference = abs(loss - expected) / abs(expected)
                print(f"  {step:4d}  {expected:.8f}   {loss:.8f}   {difference:.1e}")
                largest = max(largest, (difference, step))
                early = float(gamma) == 0 or step <= DROPIT_STEPS
                if not difference <= (LIMIT if early else DROPIT_LATER):
                    beyond.append(step)
            print(f"gamma {gamma}: largest relative difference {largest[0]:.1e}, "
                  f"at step {largest[1]}\n")
            if beyond:
                failed.append(f"gamma {gamma} at step {beyond[0]} and {len(beyond) - 1} more")
            panels.append((f"gamma {gamma}", {name: (list(curve), list(curve.values()))
                                              for name, curve in found.items()}))
    draw(png, panels)
    if failed:
        sys.exit(f"compare.py: losses differ too much: {', '.join(failed)}")


if __name__ == "__main__":
    main()
