#!/usr/bin/env python3
"""What Pillow, torchvision and timm make of images, crops and epochs: the fixture of dev/test/test_resize.cu.

    python3 dev/reference/resize.py [dev/reference/fixtures/resize.safetensors]

Needs Pillow, torch, torchvision and timm; the test needs none of them. Tensors:
  image.K      uint8 (H, W, C)
  view.I       int32 (11): K, box (top, left, height, width), full size, window (top, left), S, mirror
  out.I        uint8 (S, S, C): the box cropped, resized (bicubic) to the full size, its window, mirrored
  crops        int32 (n, 10): height, width, scale * 1000, seed, epoch, place; top, left, height, width that timm chooses
  centers      int32 (n, 8): height, width, S, crop_pct * 1000; full size and window of torchvision's Resize and CenterCrop
  sampler.N.R.RANKS.RANK.SEED.EPOCH   int32: the images of timm's RepeatAugSampler on our permutation
"""
import math
import os
import sys

import numpy as np
import timm.data.transforms as timm_transforms
import torch
import torchvision.transforms.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler

here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [here, os.path.join(here, "..", "..", "data")]
import rng  # noqa: E402
import safetensors_file  # noqa: E402

CROP = 5  # a purpose of the random numbers
random = np.random.default_rng(5)
tensors = {}
resize = Image.Image.resize


def columns_first(image, size, resample=None, **others):
    """Pillow's resize as it was before Pillow 13, which begins with the rows where they shrink much more than the columns (its pull request 9549)."""
    return resize(resize(image, (size[0], image.height), resample, **others), size, resample, **others)


Image.Image.resize = columns_first


def picture(height, width, channels):
    """Smooth shapes, sharp edges up to black and white, noise."""
    y, x = np.mgrid[:height, :width]
    planes = []
    for _ in range(channels):
        a, b, c = random.uniform(0.02, 0.5, 3)
        plane = 128 + 90 * np.sin(a * x + b * y) * np.cos(c * y) + random.normal(0, 12, (height, width))
        plane[(x * 3 + y * 2) % 37 < 6] = random.integers(0, 2) * 255
        planes.append(plane)
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def pil(array):
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def add(image, box, full, window, size, mirror, out=None):
    """out: what another program has made of it; None: Pillow's crop and resize, with numpy's window."""
    source = tensors[f"image.{image}"]
    if out is None:
        top, left, height, width = box
        resized = pil(source).crop((left, top, left + width, top + height)).resize((full[1], full[0]), Image.BICUBIC)
        out = np.asarray(resized).reshape(full[0], full[1], -1)[window[0]:window[0] + size, window[1]:window[1] + size]
        out = out[:, ::-1] if mirror else out
    i = sum(name.startswith("view.") for name in tensors)
    tensors[f"view.{i}"] = np.array([image, *box, *full, *window, size, mirror], np.int32)
    tensors[f"out.{i}"] = np.ascontiguousarray(out).reshape(size, size, source.shape[2])
    assert tensors[f"out.{i}"].shape == (size, size, source.shape[2])


class Draws:
    """Stands for Python's random in timm: the numbers of Philox(seed, CROP, epoch, 16 * place + attempt)."""

    def __init__(self, seed, epoch, place):
        self.key, self.attempt, self.words = (seed, epoch, place), -1, []

    def uniform(self, low, high):
        if len(self.words) != 3:  # the area: an attempt begins
            self.attempt += 1
            seed, epoch, place = self.key
            self.words = [int(w) for w in rng.philox(seed, CROP, epoch, 16 * place + self.attempt)]
        return low + (high - low) * ((self.words.pop(0) + 0.5) / 2 ** 32)

    def randint(self, low, high):
        return low + (self.words.pop(0) * (high - low + 1) >> 32)


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures", "resize.safetensors")
    shapes = [(97, 131, 3), (131, 97, 1), (32, 32, 3), (28, 28, 1), (1, 1, 3), (3, 150, 3), (64, 48, 2), (50, 41, 4), (200, 9, 1)]
    for k, shape in enumerate(shapes):
        tensors[f"image.{k}"] = picture(*shape)
    for k in (0, 1, 2, 3, 4, 5, 8):  # channels 2 and 4 are no images of Pillow without alpha; they are made of L below
        height, width, _ = shapes[k]
        boxes = [(0, 0, height, width)]
        for _ in range(5):
            h, w = int(random.integers(1, height + 1)), int(random.integers(1, width + 1))
            top, left = random.choice([0, (height - h) // 2, height - h]), random.choice([0, (width - w) // 2, width - w])
            boxes.append((int(top), int(left), h, w))
        for n, box in enumerate(boxes):
            for size in (7, 24, 33) if n else (1, 16, 50, 64):
                add(k, box, (size, size), (0, 0), size, int(random.integers(0, 2)))
    for k in (6, 7):  # plane by plane
        source, size = tensors[f"image.{k}"], 29
        box = (3, 2, 40, 37)
        planes = [np.asarray(Image.fromarray(source[3:43, 2:39, c]).resize((size, size), Image.BICUBIC)) for c in range(source.shape[2])]
        add(k, box, (size, size), (0, 0), size, 0, np.stack(planes, -1))
    # evaluation: timm's transform, without its last steps (to a tensor, normalisation)
    centers = []
    for k in (0, 1, 2, 3):
        for size, crop_pct in ((32, 1.0), (28, 0.875), (56, 0.875), (33, 0.9), (24, 0.5)):
            steps = create_transform((shapes[k][2], size, size), interpolation="bicubic", crop_pct=crop_pct).transforms[:2]
            height, width, _ = shapes[k]
            full = F._compute_resized_output_size((height, width), [math.floor(size / crop_pct)])
            window = [int(round((n - size) / 2.0)) for n in full]
            image = pil(tensors[f"image.{k}"])
            add(k, (0, 0, height, width), full, window, size, 0, np.asarray(steps[1](steps[0](image))))
    for _ in range(400):
        height, width = (int(2 ** random.uniform(0, 11)) for _ in range(2))
        size, crop_pct = ((224, 875), (224, 1000), (32, 875), (28, 1000), (384, 900), (288, 950))[random.integers(6)]
        full = F._compute_resized_output_size((height, width), [math.floor(size / (crop_pct / 1000))])
        centers.append([height, width, size, crop_pct, *full, *(int(round((n - size) / 2.0)) for n in full)])
    crops = []
    for _ in range(1000):
        height, width = (int(2 ** random.uniform(0, 10)) for _ in range(2))
        scale, seed, epoch, place = int(random.choice([80, 250, 900, 1000])), *(int(random.integers(1 << 30)) for _ in range(3))
        timm_transforms.random = Draws(seed, epoch, place)
        image = Image.new("L", (width, height))
        top, left, h, w = timm_transforms.RandomResizedCropAndInterpolation.get_params(image, (scale / 1000, 1.0), (3 / 4, 4 / 3))
        if h > 0 and w > 0:  # of 0 pixels: Pillow would fail
            crops.append([height, width, scale, seed, epoch, place, top, left, h, w])
    tensors["centers"], tensors["crops"] = np.array(centers, np.int32), np.array(crops, np.int32)
    real = torch.randperm
    for n, repeats, ranks in ((1000, 3, 1), (1000, 3, 2), (515, 3, 4), (100, 3, 3), (300, 2, 8), (257, 5, 3)):
        for epoch in (0, 3):
            torch.randperm = lambda count, generator: torch.from_numpy(rng.epoch_permutation(7, epoch, count))
            for rank in range(ranks):
                sampler = RepeatAugSampler(range(n), ranks, rank, num_repeats=repeats)
                sampler.set_epoch(epoch)
                tensors[f"sampler.{n}.{repeats}.{ranks}.{rank}.7.{epoch}"] = np.array(list(sampler), np.int32)
    torch.randperm = real
    safetensors_file.save(path, tensors, {"pillow": Image.__version__, "timm": __import__("timm").__version__})
    print(f"{path}: {os.path.getsize(path)} bytes, {sum(name.startswith('view.') for name in tensors)} views, {len(crops)} crops")


if __name__ == "__main__":
    main()
