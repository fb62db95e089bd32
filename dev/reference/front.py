#!/usr/bin/env python3
"""Draws README's picture: the bytes kept for the backward pass, against extra matrix work.

    front.py [-o dev/reference/front.png]

The model is DeiT-Ti at 224 px, batch 64, fp32. The script needs matplotlib (pip install matplotlib) and
reads no file: its numbers stand in the tables below, each with its source.

Bytes. Ours are the number `cached` in the last line of `./train_deit -m deit_tiny -b 64 -r R -g GAMMA
-plan 1`. PyTorch's (2.15, timm 1.0.31) were counted with saved-tensor hooks. What lives within one pass
only is in neither: our scratch (121 to 262 MiB), the one block that checkpointing holds while it
computes it again (148 MiB), the buffers of torch.compile's backward pass.

Extra work is counted in multiply-adds of matrix products, relative to a step that computes nothing
twice. PyTorch's was counted while it ran. Ours follows from the shapes (extra_work): the same formula
gives the 22.9 and 32.0 % counted for PyTorch's checkpointing, and a trainer that counted its products
on a CPU (batch 4) gave the same 0, 0, 15.96 and 22.92 % for -r 0 to 3. DropIT needs no matrix product,
but it takes time to choose what it keeps: the left panel has that time, from the table of times in
README.
"""
import argparse
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))

# (level -r, gamma): MiB kept. Source: -plan 1
OURS = {(0, 0.0): 1823.3, (1, 0.0): 1158.4, (2, 0.0): 382.8, (3, 0.0): 157.1,
        (0, 0.7): 1307.6, (1, 0.7): 1084.8, (2, 0.7): 309.1, (3, 0.7): 157.1,
        (0, 0.9): 1152.5, (1, 0.9): 1062.6, (2, 0.9): 286.9, (3, 0.9): 157.1}
# MiB kept. Source: saved-tensor hooks, fused attention
PYTORCH = 1833
# gamma: MiB kept. Source: saved-tensor hooks, published code (values and int32 indices), fused attention
PUBLISHED = {0.7: 1633, 0.9: 1323}
# torch._functorch.config.activation_memory_budget, MiB kept, extra %. Source: counted, the model as one
# graph. With blocks compiled one by one two points lie on the same curve: 277 MiB, 20.6 %; 166 MiB, 22.9 %
COMPILED = [(1, 1831, 0.0), (0.9, 1158, 0.0), (0.5, 979, 6.0), (0.3, 600, 13.8), (0.2, 415, 17.6),
            (0.1, 221, 21.6), (0.05, 129, 25.2), (0, 37, 32.8)]
# MiB kept, extra %. Source: counted, torch.utils.checkpoint of each block (use_reentrant=True: 32.0 %)
CHECKPOINTING = (166, 22.9)
# column of the left panel: % that gamma 0.7 adds to a step. Source: README's times of DeiT-Ti on a CPU
ADDED_TIME = {1: 123, 3: 17, 4: 9}

INK, PALE, GREY, ORANGE = "#1f2933", "#d5dbe1", "#7b8794", "#d9730d"
BLUE = {0.0: "#5ba4dd", 0.7: "#2f80c8", 0.9: "#0b4a8f"}


def extra_work(level, C=192, T=197, depth=12, patch=3 * 16 * 16, classes=1000):
    """Multiply-adds of matrix products that -r level adds, in % of those of a step.

    A token and block takes 3CC, CC, 4CC and 4CC of them for the linear layers qkv, proj, fc1 and fc2, and
    2TC for attention's two products. A linear layer's backward pass costs twice its forward pass (dX
    and dW). Attention's has five products, because every fused attention builds the probabilities
    again. The patch embedding needs dW alone. Level 1 recomputes norms and GELU, which are no matrix
    products.
    """
    qkv, proj, fc1, fc2, attention = 3 * C * C, C * C, 4 * C * C, 4 * C * C, 2 * T * C
    block = 3 * (qkv + proj + fc1 + fc2) + (1 + 2.5) * attention
    step = depth * T * block + 2 * (T - 1) * patch * C + 3 * C * classes
    again = {0: 0, 1: 0, 2: qkv + fc1, 3: qkv + attention + proj + fc1}[level]
    return 100 * depth * T * again / step


def place(ax, x, y, color, text, dx=7, dy=0, marker="o", ms=5.5, mfc=None, **words):
    """A point at (x, y) whose label stands dx, dy points away from it."""
    ax.plot([x], [y], marker, ms=ms, color=color, mfc=mfc or color, zorder=3)
    words = {"ha": "left" if dx > 0 else "right", "va": "center", "color": color, **words}
    ax.annotate(text, (x, y), (dx, dy), textcoords="offset points", **words)


def draw_left(ax):
    """What needs no extra matrix product: a column for each method."""
    ax.set_title("no extra matrix products", fontsize=9.5, loc="left")
    ax.set_xlim(-0.4, 4.8)
    ax.set_xticks(range(5), ["PyTorch\n", "published\nDropIT", "torch.\ncompile", "ours\n-r 0", "ours\n-r 1"])
    place(ax, 0, PYTORCH, INK, str(PYTORCH))
    place(ax, 2, COMPILED[1][1], GREY, f"{COMPILED[1][1]}\n({COMPILED[1][0]})", marker="s")
    for gamma, mib in PUBLISHED.items():
        place(ax, 1, mib, ORANGE, f"{mib}\n$\\gamma$ {gamma}")
    for gamma, dy in (0.0, 4), (0.7, 4), (0.9, -5):
        place(ax, 3, OURS[0, gamma], BLUE[gamma], f"{OURS[0, gamma]:.0f}\n$\\gamma$ {gamma:g}")
        place(ax, 4, OURS[1, gamma], BLUE[gamma], f"{OURS[1, gamma]:.0f}", dy=dy)
    ax.text(-0.4, 300, "time that DropIT adds to a step on a CPU, $\\gamma$ 0.7:", fontsize=8, va="center")
    for column, percent in ADDED_TIME.items():
        color = ORANGE if column == 1 else BLUE[0.7]
        ax.text(column, 200, f"+ {percent} %", fontsize=8, va="center", ha="center", color=color)


def draw_right(ax):
    """What computes some matrix products twice."""
    ax.set_title("extra matrix products, % of a step", fontsize=9.5, loc="left")
    ax.set_xlim(-1, 38.5)
    ax.set_xticks(range(5, 36, 5), [f"{x} %" for x in range(5, 36, 5)])
    budgets = COMPILED[2:]
    ax.plot([c[2] for c in budgets], [c[1] for c in budgets], "-", color=GREY, lw=1.2, zorder=2)
    for budget, mib, extra in budgets:
        place(ax, extra, mib, GREY, f"{mib} ({budget})", dy=10 if budget == 0.5 else 4, marker="s")
    ax.text(11, 850, "torch.compile\n(memory budget)", color=GREY, va="center")
    for gamma, dy in (0.0, 4), (0.7, 4), (0.9, -5):
        text = f"ours -r 2, $\\gamma$ {gamma:g}:  {OURS[2, gamma]:.0f}"
        place(ax, extra_work(2), OURS[2, gamma], BLUE[gamma], text, dx=-7, dy=dy)
    place(ax, *CHECKPOINTING[::-1], INK, f"block checkpointing:  {CHECKPOINTING[0]}", dx=-7, dy=-13, ms=9,
          mfc="none")
    place(ax, extra_work(3), OURS[3, 0.0], BLUE[0.9], f"ours -r 3:  {OURS[3, 0.0]:.0f}", dx=-7, dy=-1)
    key = [("$\\gamma$", "part of each linear layer's input"), ("", "that DropIT drops"),
           ("-r", "what the backward pass computes again:"), ("", "1   norms and GELU"),
           ("", "2   also the outputs of qkv and fc1"), ("", "3   the whole block")]
    for line, (name, text) in enumerate(key):
        ax.text(9, 1930 - 75 * line, name, va="center", fontsize=8)
        ax.text(11.5, 1930 - 75 * line, text, va="center", fontsize=8)


def draw(path):
    plt.rcParams.update({"font.size": 9, "text.color": INK, "axes.edgecolor": GREY, "axes.labelcolor": INK,
                         "xtick.color": INK, "ytick.color": GREY})
    fig, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8, 5.2), dpi=200, width_ratios=[1.08, 1])
    fig.subplots_adjust(0.085, 0.09, 0.995, 0.94, 0.06)
    for ax in left, right:
        ax.grid(axis="y", color=PALE, lw=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(length=0)
    left.set_ylim(0, 2000)
    left.set_yticks(range(0, 2001, 500))
    left.set_ylabel("MiB kept for the backward pass")
    draw_left(left)
    draw_right(right)
    fig.canvas.draw()
    image = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(path, optimize=True)  # 64 colours are enough, and half the bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", default=os.path.join(HERE, "front.png"), metavar="FILE")
    draw(parser.parse_args().o)
