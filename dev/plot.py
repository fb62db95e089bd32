#!/usr/bin/env python3
"""Draws training loss, test loss, top-1 accuracy and learning rate of one or more runs to a PNG.

    dev/plot.py RUN ... [-o plot.png]                   RUN: a directory with main.log, or such a file
    dev/plot.py dense=log0 gamma_0.9=log9 -o both.png   names for the legend, before a =

Left: the loss of every step (pale), its running mean, and the test loss as points. Right: top-1 accuracy,
and the learning rate, dashed, by the scale on the right. Evaluations of the weights' moving average (-ema) are
pale points. Needs numpy and Pillow. Lines that are damaged are skipped and counted.
"""
import argparse
import math
import os
import re
import sys

try:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    sys.exit(f"dev/plot.py: the Python package {error.name} is missing; install python3-numpy and python3-pil")

NUMBER = r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"
REST = rf"(?: \w+:{NUMBER})*\n"  # a line without its end was cut off
TRAIN = re.compile(rf"s:(\d{{1,15}}) trl:{NUMBER} lr:{NUMBER}{REST}")
TEST = re.compile(rf"s:(\d{{1,15}}) tel:{NUMBER} top1:{NUMBER}{REST}")
AVERAGE = re.compile(rf"s:(\d{{1,15}}) etel:{NUMBER} etop1:{NUMBER}{REST}")

WIDTH, HEIGHT = 1500, 620
COLUMNS = 3  # of the legend
FINE = 3  # lines are drawn this much larger and reduced, which smooths them
COLORS = [(31, 92, 168), (211, 84, 0), (30, 132, 73), (142, 68, 173), (192, 57, 43), (20, 143, 157), (125, 102, 8), (90, 90, 90)]
INK, GREY, GRID = (40, 40, 40), (110, 110, 110), (226, 226, 226)


def fail(message):
    sys.exit(f"dev/plot.py: {message}")


class Run:
    """train: steps, losses, rates; test, and average for the moving average: steps, losses, accuracies. A step that comes again, after a
    resumed run, counts as it came last."""

    def __init__(self, argument):
        name, equals, path = argument.rpartition("=")
        if os.path.exists(argument):
            name, equals, path = "", "", argument
        self.name = name if equals else os.path.basename(os.path.abspath(path[:-len("/main.log")] if path.endswith("/main.log") else path))
        file_name = os.path.join(path, "main.log") if os.path.isdir(path) else path
        train, test, average, self.damaged = {}, {}, {}, 0
        try:
            with open(file_name, encoding="utf-8", errors="replace") as file:
                for line in file:
                    if match := TRAIN.fullmatch(line):
                        train[int(match[1])] = float(match[2]), float(match[3])
                    elif match := TEST.fullmatch(line):
                        test[int(match[1])] = float(match[2]), float(match[3])
                    elif match := AVERAGE.fullmatch(line):
                        average[int(match[1])] = float(match[2]), float(match[3])
                    else:
                        self.damaged += 1
        except OSError as error:
            fail(f"cannot read {file_name}: {error.strerror}")
        if not train and not test:
            fail(f"{file_name} has no line of a step or an evaluation; give a directory that a trainer wrote with -o")
        self.train = np.array([(step, *train[step]) for step in sorted(train)]).reshape(-1, 3).T
        self.test = np.array([(step, *test[step]) for step in sorted(test)]).reshape(-1, 3).T
        self.average = np.array([(step, *average[step]) for step in sorted(average)]).reshape(-1, 3).T


def running_mean(y):
    """Centred mean over a 50th of the run, a quarter of that at the ends; values that are not finite count for nothing."""
    n, half = len(y), len(y) // 100
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    i = np.arange(n)
    reach = np.clip(np.minimum(i, n - 1 - i), half // 4, half)
    first, last = np.maximum(i - reach, 0), np.minimum(i + reach + 1, n)
    inside = count[last] - count[first]
    return np.where(inside > 0, (total[last] - total[first]) / np.maximum(inside, 1), np.nan)


def ticks(low, high, most=7):
    """Multiples of 1, 2 or 5 times a power of ten from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def label(value):
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.6g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.6g}k"
    if abs(value) < 1e-2:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def padded(low, high, part=0.05):
    if not high > low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    return low - part * (high - low), high + part * (high - low)


def font(size):
    for name in ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            pass
    try:
        return ImageFont.load_default(size)  # from Pillow 10.1 on it can be scaled
    except TypeError:
        return ImageFont.load_default()


class Panel:
    """A rectangle of the picture with axes; the unit of all coordinates is a pixel of the result."""

    def __init__(self, image, box, x_range, y_range):
        self.image, self.box, self.x_range, self.y_range = image, box, x_range, y_range
        self.layer = Image.new("RGB", [FINE * side for side in self.size()], "white")
        self.draw = ImageDraw.Draw(self.layer)

    def size(self):
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def points(self, x, y, y_range=None):
        """In the layer, cut into pieces where y is not finite; what lies outside is clipped by the layer."""
        (x0, x1), (y0, y1) = self.x_range, y_range or self.y_range
        width, height = self.size()
        finite = np.isfinite(y)
        px = (x - x0) / (x1 - x0) * width * FINE
        py = np.clip((y1 - np.where(finite, y, y0)) / (y1 - y0), -9, 9) * height * FINE
        cuts = np.flatnonzero(np.diff(finite.astype(int))) + 1
        return [np.stack(piece, 1) for piece, keep in
                zip(zip(np.split(px, cuts), np.split(py, cuts)), (part[0] for part in np.split(finite, cuts) if len(part))) if keep]

    def line(self, x, y, color, width, y_range=None, dashed=False):
        for points in self.points(x, y, y_range):
            points = thin(points)
            if dashed:
                for piece in dashes(points, 9 * FINE, 6 * FINE):
                    self.draw.line([tuple(p) for p in piece], color, round(width * FINE), "curve")
            elif len(points) > 1:
                self.draw.line([tuple(p) for p in points], color, round(width * FINE), "curve")
            else:
                self.dots(x, y, color, width, y_range)

    def dots(self, x, y, color, radius, y_range=None):
        for piece in self.points(x, y, y_range):
            for px, py in piece:
                self.draw.ellipse([px - radius * FINE, py - radius * FINE, px + radius * FINE, py + radius * FINE], color,
                                  (255, 255, 255), round(0.7 * FINE))

    def grid(self):
        width, height = self.size()
        for x in ticks(*self.x_range):
            px = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * width * FINE
            self.draw.line([px, 0, px, height * FINE], GRID, FINE)
        for y in ticks(*self.y_range):
            py = (self.y_range[1] - y) / (self.y_range[1] - self.y_range[0]) * height * FINE
            self.draw.line([0, py, width * FINE, py], GRID, FINE)

    def finish(self, title, right_range=None, right_title=None):
        """Puts the layer into the picture and writes the axes around it."""
        left, top, right, bottom = self.box
        self.image.paste(self.layer.reduce(FINE), (left, top))
        draw, small = ImageDraw.Draw(self.image), font(15)
        draw.rectangle([left, top, right, bottom], None, GREY)
        width, height = self.size()
        for x in ticks(*self.x_range):
            px = left + (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0]) * width
            draw.line([px, bottom, px, bottom + 5], GREY)
            text(draw, (px, bottom + 9), label(x), small, INK, 0.5, 0)
        text(draw, ((left + right) / 2, bottom + 34), "step", small, INK, 0.5, 0)
        for y in ticks(*self.y_range):
            py = top + (self.y_range[1] - y) / (self.y_range[1] - self.y_range[0]) * height
            draw.line([left - 5, py, left, py], GREY)
            text(draw, (left - 9, py), label(y), small, INK, 1, 0.5)
        text(draw, (left, top - 10), title, font(18), INK, 0, 1)
        if right_range is not None:
            for y in ticks(*right_range):
                py = top + (right_range[1] - y) / (right_range[1] - right_range[0]) * height
                draw.line([right, py, right + 5, py], GREY)
                text(draw, (right + 9, py), label(y), small, GREY, 0, 0.5)
            text(draw, (right, top - 10), right_title, small, GREY, 1, 1)


def thin(points):
    """Of many points that share a column of pixels, the first, the lowest, the highest and the last one."""
    column = points[:, 0].astype(int)
    if len(points) <= 4 * (np.ptp(column) + 1):
        return points
    kept = []
    for part in np.split(np.arange(len(points)), np.flatnonzero(np.diff(column)) + 1):
        y = points[part, 1]
        kept += sorted({part[0], part[np.argmin(y)], part[np.argmax(y)], part[-1]})
    return points[kept]


def dashes(points, on, off):
    """Pieces of a polyline, `on` long with gaps of `off`."""
    lengths = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    for start in np.arange(0, max(lengths[-1], 1e-9), on + off):
        end = min(start + on, lengths[-1])
        at = np.concatenate([[start], lengths[(lengths > start) & (lengths < end)], [end]])
        yield np.stack([np.interp(at, lengths, points[:, 0]), np.interp(at, lengths, points[:, 1])], 1)


def text(draw, place, string, face, color, across, down):
    """across, down: which part of the text lies left of and above the place."""
    left, top, right, bottom = draw.textbbox((0, 0), string, face)
    # digits and capitals: a line is placed the same whatever letters it has
    top, bottom = draw.textbbox((0, 0), "0", face)[1::2]
    draw.text((place[0] - left - across * (right - left), place[1] - top - down * (bottom - top)), string, color, face)
    return right - left


def shortened(draw, string, face, most):
    whole = string
    while len(string) > 5 and draw.textlength(string, face) > most:  # the middle goes: names of runs differ at their ends
        keep = len(string) - 4
        string = whole[:keep - keep // 2] + "..." + whole[len(whole) - keep // 2:]
    return string


def pale(color, part=0.72):
    return tuple(round(c + (255 - c) * part) for c in color)


def finite_range(parts, low_percent=0, high_percent=100):
    values = np.concatenate([np.asarray(part, float)[np.isfinite(part)] for part in parts])
    return (np.percentile(values, low_percent), np.percentile(values, high_percent)) if len(values) else None


def draw_runs(runs):
    legend_rows = math.ceil(len(runs) / COLUMNS)
    image = Image.new("RGB", (WIDTH, HEIGHT + 26 * legend_rows), "white")
    top, bottom = 56 + 26 * legend_rows, HEIGHT + 26 * legend_rows - 66
    last = max(max(run.train[0].max(initial=0), run.test[0].max(initial=0)) for run in runs)
    x_range = (0, max(last, 1) * 1.02)

    means = [running_mean(run.train[1]) for run in runs]
    # single steps may lie far off: they do not set the scale, the mean does
    tests = [part for run in runs for part in (run.test, run.average)]
    bounds = [b for b in [finite_range(means + [test[1] for test in tests]), finite_range([run.train[1] for run in runs], 0.5, 99.5)] if b]
    y_range = padded(min(b[0] for b in bounds), max(b[1] for b in bounds)) if bounds else (0, 1)
    loss = Panel(image, (76, top, 700, bottom), x_range, y_range)
    loss.grid()
    for run, color in zip(runs, COLORS):
        loss.line(run.train[0], run.train[1], pale(color), 1)
    for run, mean, color in zip(runs, means, COLORS):
        loss.line(run.train[0], mean, color, 2)
    for run, color in zip(runs, COLORS):
        for part, shade in (run.average, pale(color, 0.45)), (run.test, color):
            loss.line(part[0], part[1], shade, 1)
            loss.dots(part[0], part[1], shade, 4.5)
    loss.finish("loss: training (line), test (points)")

    accuracies = finite_range([test[2] for test in tests])
    y_range = padded(*accuracies) if accuracies else (0, 100)
    y_range = (max(y_range[0], 0), min(y_range[1], 100 + 0.02 * (100 - y_range[0])))
    rates = finite_range([run.train[2] for run in runs])
    rate_range = (0, padded(0, rates[1])[1]) if rates and rates[1] > 0 else None
    accuracy = Panel(image, (810, top, 1410, bottom), x_range, y_range)
    accuracy.grid()
    if rate_range:
        for run, color in zip(runs, COLORS):
            accuracy.line(run.train[0], run.train[2], pale(color, 0.5), 1.3, rate_range, dashed=True)
    for run, color in zip(runs, COLORS):
        for part, shade in (run.average, pale(color, 0.45)), (run.test, color):
            accuracy.line(part[0], part[2], shade, 2)
            accuracy.dots(part[0], part[2], shade, 4.5)
    accuracy.finish("top-1 accuracy of the test set, %", rate_range, "learning rate (dashed)")

    draw, face = ImageDraw.Draw(image), font(16)
    for i, (run, color) in enumerate(zip(runs, COLORS)):
        x, y = 76 + i % COLUMNS * 460, 24 + i // COLUMNS * 26
        draw.line([x, y, x + 26, y], color, 3)
        best = np.nanmax(run.test[2], initial=-1)
        text(draw, (x + 34, y), shortened(draw, run.name, face, 270) + (f"  (best {best:.2f} %)" if best >= 0 else ""), face, INK, 0, 0.5)
    return image


def main():
    parser = argparse.ArgumentParser(description="Draws loss, accuracy and learning rate of runs to a PNG.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a directory with main.log, or such a file; NAME=RUN sets the name in the legend")
    parser.add_argument("-o", "--out", default="plot.png", metavar="FILE", help="default plot.png")
    options = parser.parse_args()
    if len(options.runs) > len(COLORS):
        fail(f"{len(options.runs)} runs, at most {len(COLORS)} can be told apart; draw several pictures")
    runs = [Run(argument) for argument in options.runs]
    image = draw_runs(runs)
    try:
        image.save(options.out, "PNG")
    except OSError as error:
        fail(f"cannot write {options.out}: {error.strerror or error}")
    for run in runs:
        print(f"{run.name}: {run.train.shape[1]} steps, {run.test.shape[1]} evaluations, {run.damaged} damaged lines skipped")
    print(f"wrote {options.out}: {image.width} x {image.height} pixels")


if __name__ == "__main__":
    main()
