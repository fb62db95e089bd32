#!/usr/bin/env python3
"""Draws a batch of a trainer: every image as the model gets it, augmented, with its label below.

    ./train_deit -sheet batch.safetensors ...                  # writes the first batch of training and ends
    python3 data/sheet.py batch.safetensors -o sheet.png

The file holds the tensors image (n, CH, H, W), label (n), and mean (CH) and std (CH), with which the trainer
normalised the pixels; the levels drawn are 255 * (image * std + mean), rounded, from 0 to 255. One channel is grey
and three are RGB; of two channels the first is drawn, of four the first three. Needs numpy and Pillow.
"""
import argparse
import math
import sys

try:
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
except ImportError as error:
    sys.exit(f"data/sheet.py: the Python package {error.name} is missing; install python3-numpy and python3-pil")

import safetensors_file

GAP, LINE = 4, 14  # pixels between images, height of a label
LEAST = 56  # smaller images are enlarged, pixel by pixel, to at least this width: their labels need it
PAPER, INK = 24, 235


def fail(message):
    sys.exit(f"data/sheet.py: {message}")


def read(path):
    """Levels of the images (n, H, W, CH), uint8, and the labels (n)."""
    try:
        tensors = safetensors_file.load(path)[0]
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except ValueError as error:
        fail(error)
    image, label, mean, std = (tensors.get(name, np.zeros(())) for name in ("image", "label", "mean", "std"))
    n, channels = image.shape[:1], image.shape[1:2]
    if image.ndim != 4 or image.size == 0 or label.shape != n or mean.shape != channels or std.shape != channels:
        found = ", ".join(f"{name} {tensor.shape}" for name, tensor in tensors.items())
        fail(f"{path} is no batch of images: it has {found or 'no tensor'}, expected image (n, CH, H, W), label (n), "
             "mean (CH) and std (CH)")
    pixels = image.transpose(0, 2, 3, 1) * std + mean
    return np.clip(255 * pixels + 0.5, 0, 255).astype(np.uint8), label


def draw(levels, labels):
    n, H, W, channels = levels.shape
    levels = levels[..., :3] if channels >= 3 else levels[..., 0]
    scale = math.ceil(LEAST / W)
    columns = math.ceil(math.sqrt(n * H / W))
    wide, high = W * scale + GAP, H * scale + LINE + GAP
    mode = "RGB" if channels >= 3 else "L"
    sheet = Image.new(mode, (columns * wide + GAP, math.ceil(n / columns) * high + GAP), (PAPER,) * len(mode))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for b in range(n):
        left, top = GAP + b % columns * wide, GAP + b // columns * high
        picture = Image.fromarray(levels[b]).resize((W * scale, H * scale), Image.NEAREST)
        sheet.paste(picture, (left, top))
        pen.text((left, top + H * scale + 1), f"{labels[b]:g}", (INK,) * len(mode), font)
    return sheet


def main():
    parser = argparse.ArgumentParser(description="Draws the batch that a trainer writes with -sheet.")
    parser.add_argument("batch", help="safetensors with image, label, mean and std")
    parser.add_argument("-o", "--out", default="sheet.png", metavar="FILE", help="default sheet.png")
    options = parser.parse_args()
    levels, labels = read(options.batch)
    sheet = draw(levels, labels)
    try:
        sheet.save(options.out)
    except (OSError, ValueError) as error:  # ValueError: a type of picture that Pillow does not know
        fail(f"cannot write {options.out}: {getattr(error, 'strerror', None) or error}")
    channels = levels.shape[3]
    part = {2: ", the first of 2 channels", 4: ", the first 3 of 4 channels"}.get(channels, "")
    print(f"wrote {options.out}: {len(levels)} images of {levels.shape[2]} x {levels.shape[1]} pixels{part}")


if __name__ == "__main__":
    main()
