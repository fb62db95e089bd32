#!/usr/bin/env python3
"""Makes a data shard of any pictures, for train_deit -predict.

    python3 data/pictures.py cat.jpg dog.png --out pictures.bin
    python3 data/pictures.py *.jpg --out pictures.bin --size 224 --like data/cifar100_val.bin

Each is resized (bicubic, antialiased) until the shorter side has size / crop-pct pixels, and its centre
of --size x --size is cut out: what timm evaluates on. All labels are 0. --like takes the number of classes,
the channels, the mean and the standard deviation of the shard that a model was trained with.
"""
import argparse
import os
import sys
import warnings

try:
    import numpy as np
    from PIL import Image  # noqa: F401  (imagenet.py would name itself)
except ImportError as error:
    sys.exit(f"data/pictures.py: the Python package {error.name} is missing; install python3-numpy and python3-pil")

from imagenet import LONGEST, MEAN, STD, load_image, resize_shorter
from shard import Shard, ShardError, write_shard


def fail(message):
    sys.exit(f"data/pictures.py: {message}")


def evaluation_view(image, size, crop_pct):
    image = resize_shorter(image, int(size / crop_pct))
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def main():
    parser = argparse.ArgumentParser(description="Makes a data shard of any pictures, for -predict.")
    parser.add_argument("pictures", nargs="+", metavar="FILE")
    parser.add_argument("--out", required=True, metavar="FILE", help="the shard")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="pixels of a side, as the model takes them (default 224)")
    parser.add_argument("--crop-pct", type=float, default=0.875, metavar="X", help="part of the shorter side that is kept (default 0.875)")
    parser.add_argument("--like", metavar="SHARD", help="classes, channels, mean and standard deviation (default: those of ImageNet)")
    options = parser.parse_args()
    if not 1 <= options.size <= 4096:
        fail(f"--size {options.size} is not in 1 to 4096")
    if not 0.01 <= options.crop_pct <= 1 or options.size / options.crop_pct > LONGEST:
        fail(f"--crop-pct {options.crop_pct} is not in 0.01 to 1, or too small for --size {options.size}")
    classes, mean, std = 1000, MEAN, STD
    try:
        if options.like:
            like = Shard(options.like)
            classes, mean, std = like.classes, like.mean, like.std
    except (OSError, ShardError) as error:
        fail(error)
    if len(mean) not in (1, 3):
        fail(f"{options.like} has {len(mean)} channels; pictures have 1 or 3")
    warnings.simplefilter("ignore")
    images = []
    for path in options.pictures:
        try:
            view = evaluation_view(load_image(path, "L" if len(mean) == 1 else "RGB"), options.size, options.crop_pct)
        except Exception as error:  # a damaged image can raise anything
            fail(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
        images.append((np.asarray(view).reshape(options.size, options.size, len(mean)), 0))
    try:
        write_shard(options.out, images, len(images), classes, mean, std)
    except OSError as error:
        fail(f"cannot write {options.out}: {error.strerror or error}")
    for i, path in enumerate(options.pictures):
        print(f"{i} {path}")
    print(f"wrote {options.out}: {len(images)} images, {os.path.getsize(options.out)} bytes")


if __name__ == "__main__":
    main()
