#!/usr/bin/env python3
"""Images a second of the data path alone: Pillow with timm's training transform, beside the trainer's loader and augmentation.

    bench_data.py [--bench build/cpu-fp32/dev/bench] [--cores 1,2] [--batches 12] [--rounds 5]

Both read the same shard of uint8 pictures, shorter side 256 (so no JPEG is decoded on either side), and end with
normalised, mixed float32 batches of 224 pixels: random resized crop (bicubic), flip, rand-m9-mstd0.5-inc1, erasing
(pixel, 0.25), mixup 0.8 and cutmix 1.0. The peer is timm's transform in torch's DataLoader, mixup in the main process,
as DeiT's own program has it. Both sides run on the same cores, in turn, in one run: ratios of one run compare, numbers
of two do not. The peer's best number of workers counts. Needs timm (pip install torch timm).
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker; the trainer gets one a core

import numpy as np  # noqa: E402
import PIL  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from timm.data import Mixup, create_transform  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "data"))
from shard import Shard, write_shard  # noqa: E402  (data/ is no package)

MEAN, STD, CLASSES = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1000
AUGMENTATION = "-crop 1 -scale 0.08 -flip 1 -aa rand-m9-mstd0.5-inc1 -reprob 0.25 -mixup 0.8 -cutmix 1"


def pictures(count):
    """Synthetic photographs, shorter side 256: low-resolution colours enlarged, and grain. Sides as in ImageNet, most 4:3."""
    random = np.random.default_rng(1)
    for i in range(count):
        longer = int(random.choice([256, 341, 341, 341, 384, 455]))
        width, height = (longer, 256) if random.random() < 0.7 else (256, longer)
        small = random.integers(0, 256, (height // 32, width // 32, 3), np.uint8)
        large = np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC)).astype(np.int16)
        grain = random.integers(-12, 13, large.shape, np.int16)
        yield np.clip(large + grain, 0, 255).astype(np.uint8), i % CLASSES


class Pictures(torch.utils.data.Dataset):
    """The shard's pictures as timm sees a decoded file. No checksum is taken, as the trainer takes none while it trains."""

    def __init__(self, path, transform, length):
        self.shard, self.transform, self.length = Shard(path), transform, length
        self.pixels = np.memmap(path, np.uint8, "r")

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        entry = self.shard.index[i % self.shard.count]
        start, height, width = int(entry["offset"]), int(entry["height"]), int(entry["width"])
        image = Image.fromarray(np.asarray(self.pixels[start:start + height * width * 3]).reshape(height, width, 3))
        return self.transform(image), int(entry["label"])


def posterize(image, bits):
    """As Pillow has it before it refuses 0 bits, which timm asks for at magnitude 10: a black image."""
    return image.point([x & ~(2 ** (8 - bits) - 1) for x in range(256)] * len(image.getbands()))


ImageOps.posterize = posterize


def peer_rate(path, workers, options):
    transform = create_transform(224, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1",
                                 interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1, mean=MEAN, std=STD)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch", label_smoothing=0.1,
                  num_classes=CLASSES)
    warm = 2 * workers + 1  # what the workers had prepared when the clock starts
    images = Pictures(path, transform, (warm + options.batches) * options.batch_size)
    loader = torch.utils.data.DataLoader(images, options.batch_size, shuffle=True, num_workers=workers, drop_last=True)
    for i, (image, label) in enumerate(loader):
        mixup(image, label)
        if i + 1 == warm:
            began = time.perf_counter()
    return options.batches * options.batch_size / (time.perf_counter() - began)


def trainer_rate(path, cores, options):
    """None where dev/bench fails."""
    command = [options.bench, "data", str(options.batches), "-m", "deit_nano", "-size", "224", "-patch", "16",
               "-chans", "3", "-classes", str(CLASSES), "-i", path, "-j", path, "-b", str(options.batch_size),
               *AUGMENTATION.split(), "-threads", str(options.threads or cores), "-smoothing", "0.1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(cores)}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True)
    found = re.search(r"^data .*images_per_s=([0-9.]+)", done.stdout, re.M)
    if done.returncode or not found:
        print(f"the trainer was not measured: {done.stderr.strip() or done.stdout.strip()[-200:]}", flush=True)
        return None
    return float(found[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", default=os.path.join(ROOT, "build/cpu-fp32/dev/bench"))
    parser.add_argument("--cores", default="1,2")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="the trainer's reader threads; 0: one a core")
    options = parser.parse_args()
    if not os.access(options.bench, os.X_OK):
        sys.exit(f"bench_data.py: no program {options.bench}; build it with make DEVICE=cpu "
                 "build/cpu-fp32/dev/bench, or name it with --bench")
    torch.set_num_threads(1)
    here = sorted(os.sched_getaffinity(0))
    print(f"timm {timm.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}; batch {options.batch_size}")
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "pictures.bin")
        write_shard(path, pictures(options.images), options.images, CLASSES, MEAN, STD)
        for cores in (int(n) for n in options.cores.split(",")):
            if cores > len(here):
                print(f"{cores} cores: only {len(here)} here")
                continue
            os.sched_setaffinity(0, here[:cores])
            rates = {f"Pillow + timm, {n} worker{'s' if n > 1 else ''}": [] for n in range(1, cores + 1)}
            rates["trainer"] = []
            for _ in range(options.rounds):
                for n, name in enumerate(list(rates)[:-1], 1):
                    rates[name].append(peer_rate(path, n, options))
                rate = trainer_rate(path, cores, options)
                if rate is not None:
                    rates["trainer"].append(rate)
                elif not rates["trainer"]:
                    break  # it will not work in the next round either
            medians = {name: statistics.median(values) for name, values in rates.items() if values}
            for name in medians:
                print(f"{cores} core{'s' if cores > 1 else ' '} | {name:26} | images/s median {medians[name]:7.1f}, min {min(rates[name]):7.1f}, "
                      f"max {max(rates[name]):7.1f}", flush=True)
            if "trainer" in medians:
                best = max(medians, key=lambda name: medians[name] if name != "trainer" else 0)
                ratios = [a / b for a, b in zip(rates["trainer"], rates[best])]
                print(f"{cores} core{'s' if cores > 1 else ' '} | trainer over {best}: {medians['trainer'] / medians[best]:.2f} (rounds "
                      f"{min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
