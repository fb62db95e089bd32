#!/usr/bin/env python3
"""Draws training loss, test loss, top-1 accuracy and learning rate of one or more runs.

    dev/plot.py RUN ... [-o plot.png]                   RUN: a directory with main.log, or such a file
    dev/plot.py dense=log0 gamma_0.9=log9 -o both.png   names for the legend, before a =

Left: the loss of every step (pale), its running mean, and the loss of the test set (points). Right: top-1 accuracy
of the test set (points) and the running mean of the training batches' (pale; older logs lack it), and the learning
rate. Dotted lines are evaluations of the weights' moving average (-ema). Damaged lines are skipped and counted.
Needs numpy and matplotlib.
"""
import argparse
import os
import re
import sys

try:
    import numpy as np
    import matplotlib
    matplotlib.use("Agg")  # into files, without a screen
    import matplotlib.pyplot as plt
except ImportError as error:
    sys.exit(f"dev/plot.py: the Python package {error.name} is missing; python3 -m pip install matplotlib")

NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
LINE = re.compile(rf"s:\d{{1,15}}(?: \w+:{NUMBER})+\n")
COLORS = ["#1f5ca8", "#d35400", "#1e8449", "#8e44ad", "#c0392b", "#148f9d", "#7d6608", "#5a5a5a"]


def fail(message):
    sys.exit(f"dev/plot.py: {message}")


class Run:
    """The name of a run and the numbers of its main.log: {key: {step: number}}."""

    def __init__(self, argument):
        name, _, path = argument.rpartition("=") if not os.path.exists(argument) else ("", "", argument)
        path = os.path.join(path, "main.log") if os.path.isdir(path) else path
        self.name = name or os.path.basename(os.path.dirname(os.path.abspath(path)))
        self.numbers, self.damaged = {}, 0
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if not LINE.fullmatch(line):
                        self.damaged += 1
                        continue
                    (_, step), *pairs = (pair.split(":") for pair in line.split())
                    for key, number in pairs:
                        self.numbers.setdefault(key, {})[int(step)] = float(number)
        except OSError as error:
            fail(f"cannot read {path}: {error.strerror}")
        if not self.numbers.keys() & {"trl", "tel"}:
            fail(f"{path} has no line of a step or an evaluation; give a directory that a trainer wrote with -o")

    def __getitem__(self, key):
        """(steps, numbers), in order; empty where the log has no such key"""
        rows = sorted(self.numbers.get(key, {}).items())
        return np.array(rows, float).reshape(-1, 2).T


def running_mean(y):
    """Mean over a 50th of the run, over fewer steps at its ends; numbers that are not finite count for nothing."""
    if len(y) == 0:
        return y
    finite, window = np.isfinite(y), np.ones(len(y) // 50 + 1)
    count = np.convolve(finite, window, "same")
    return np.convolve(np.where(finite, y, 0), window, "same") / np.where(count > 0, count, np.nan)


def draw(runs):
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#808080",
                         "axes.grid": True, "grid.color": "#e4e4e4", "axes.titlelocation": "left", "font.size": 11,
                         "figure.constrained_layout.w_pad": 0.12})
    figure = plt.figure(figsize=(15, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "accuracy"], ["loss", "rate"]], height_ratios=[3, 1])
    spread = []  # numbers that set the scale of the loss: a single step may lie far off
    for run, color in zip(runs, COLORS):
        best = run["top1"][1]
        label = run.name + (f"  (best {np.nanmax(best):.2f} %)" if np.isfinite(best).any() else "")
        axes["loss"].plot([], [], color=color, label=label)
        steps, losses = run["trl"]
        axes["loss"].plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
        axes["loss"].plot(steps, running_mean(losses), color=color, linewidth=1.8)
        steps, accuracies = run["trtop1"]
        axes["accuracy"].plot(steps, running_mean(accuracies), color=color, alpha=0.4, linewidth=1.8)
        for prefix, style in ("", "o-"), ("e", "o:"):
            axes["loss"].plot(*run[prefix + "tel"], style, color=color, linewidth=1.2, markeredgecolor="white")
            axes["accuracy"].plot(*run[prefix + "top1"], style, color=color, linewidth=1.8, markeredgecolor="white")
        axes["rate"].plot(*run["lr"], color=color)
        finite = losses[np.isfinite(losses)]
        spread += [*run["tel"][1], *run["etel"][1], *(np.percentile(finite, (0.5, 99.5)) if len(finite) else ())]
    spread = np.array(spread)[np.isfinite(spread)]
    if len(spread):
        margin = 0.05 * np.ptp(spread) or 0.5
        axes["loss"].set_ylim(spread.min() - margin, spread.max() + margin)
    axes["loss"].set_title("loss: training (line), test (points; dotted: of the moving average)")
    axes["accuracy"].set_title("top-1 accuracy, %: test (points), training (pale)")
    axes["accuracy"].sharex(axes["rate"])
    axes["accuracy"].tick_params(labelbottom=False)
    axes["rate"].set_title("learning rate")
    axes["rate"].ticklabel_format(axis="y", scilimits=(-2, 3))
    for name in "loss", "rate":
        axes[name].set_xlabel("step")
    figure.legend(*axes["loss"].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description="Draws loss, accuracy and learning rate of runs to a PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a directory with main.log, or such a file; NAME=RUN sets the name in the legend")
    parser.add_argument("-o", "--out", default="plot.png", metavar="FILE", help="default plot.png")
    options = parser.parse_args()
    if len(options.runs) > len(COLORS):
        fail(f"{len(options.runs)} runs, at most {len(COLORS)} can be told apart; draw several pictures")
    runs = [Run(argument) for argument in options.runs]
    figure = draw(runs)
    try:
        figure.savefig(options.out)
    except (OSError, ValueError) as error:  # ValueError: a type of picture that matplotlib cannot write
        fail(f"cannot write {options.out}: {getattr(error, 'strerror', None) or error}")
    for run in runs:
        steps, evaluations = len(run["trl"][0]), len(run["tel"][0])
        print(f"{run.name}: {steps} steps, {evaluations} evaluations, {run.damaged} damaged lines skipped")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
