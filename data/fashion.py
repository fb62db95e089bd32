#!/usr/bin/env python3
"""Makes data shards of Fashion-MNIST.

    python3 data/fashion.py                           # all 60,000 and 10,000 images
    python3 data/fashion.py --train 10000 --val 2000 \\
        --train-out data/fashion_train.bin --val-out data/fashion_val.bin   # the bundled subset

The images come from the Debian package dataset-fashion-mnist where it is installed, else from the
data set's home. Either way the unpacked bytes must have the SHA-256 below.
"""
import argparse
import gzip
import hashlib
import os
import sys
import urllib.request
import zlib

import numpy as np

from shard import ShardError, write_labelled

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGED = "/usr/share/datasets/fashion-mnist"
HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# Of the unpacked files: the package compresses the same bytes another way than the data set's home
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = 10
# of the 60,000 training images, pixels / 255
MEAN, STD = 0.2860, 0.3530


def fail(message):
    sys.exit(f"data/fashion.py: {message}")


def unpacked(name, source):
    """The unpacked content of one of the four files."""
    try:
        if source:
            origin = os.path.join(source, name + ".gz")
            with open(origin, "rb") as file:
                packed = file.read()
        else:
            origin = f"{HOME}/{name}.gz"
            print(f"downloading {origin}")
            with urllib.request.urlopen(origin, timeout=60) as reply:  # raises on 4xx and 5xx
                packed = reply.read()
        content = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:  # URLError is an OSError
        fail(f"cannot read {origin} ({error}); install the Debian package dataset-fashion-mnist, "
             "or name a folder that has the four .gz files with --source")
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        fail(f"{origin} has SHA-256 {found} unpacked, expected {SHA256[name]}; "
             "delete the damaged copy and get it again")
    return content


def load(part, source):
    """Images uint8 (N, 28, 28, 1) and labels of a part; the checksum vouches for the sizes."""
    pixels = np.frombuffer(unpacked(f"{part}-images-idx3-ubyte", source), np.uint8, offset=16)
    labels = np.frombuffer(unpacked(f"{part}-labels-idx1-ubyte", source), np.uint8, offset=8)
    return pixels.reshape(len(labels), 28, 28, 1), labels


def main():
    parser = argparse.ArgumentParser(description="Makes data shards of Fashion-MNIST.")
    parser.add_argument("--source", default="auto", metavar="DIR",
                        help=f"folder with the four .gz files, or 'download'; "
                             f"auto: {PACKAGED} if it is there, else download")
    parser.add_argument("--train", type=int, default=60000, metavar="N",
                        help="first N training images")
    parser.add_argument("--val", type=int, default=10000, metavar="N", help="first N test images")
    parser.add_argument("--train-out", default=os.path.join(HERE, "fashion_full_train.bin"))
    parser.add_argument("--val-out", default=os.path.join(HERE, "fashion_full_val.bin"))
    options = parser.parse_args()
    source = options.source
    if source == "auto":
        source = PACKAGED if os.path.isdir(PACKAGED) else "download"
    source = None if source == "download" else source
    for flag, count, most in (("--train", options.train, 60000), ("--val", options.val, 10000)):
        if not 1 <= count <= most:
            fail(f"{flag} {count} is not in 1 to {most}")
    # everything is read and checked before the first file is written
    train, val = load("train", source), load("t10k", source)
    for path, count, (images, labels) in ((options.train_out, options.train, train), (options.val_out, options.val, val)):
        try:
            write_labelled(path, images[:count], labels[:count], CLASSES, [MEAN], [STD])
        except ShardError as error:
            fail(error)


if __name__ == "__main__":
    main()
