#!/usr/bin/env python3
"""Fine-tunes a model that timm saved, in timm and in the trainer, and compares the losses.

    finetune_timm.py [--trainer ./train_deit]     weights by timm, 10 steps here and there
    finetune_timm.py --fixture                    also writes fixtures/timm_*, for dev/test/finetune.sh

Model, initial values, weight-decay groups and optimizers are timm's and torch's; the weights are
written by the published safetensors package; the batches come from rng.py's order. None of deit.py's
code is used. Needs timm and safetensors (pip install torch timm).
"""
import argparse
import gzip
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2

import rng

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.join(ROOT, "data"))
from shard import Shard, write_shard  # noqa: E402  (data/ is no package)

LIMIT = 1e-4  # relative difference of a loss
SIDE, PATCH, CLASSES, IMAGES, BATCH, EPOCHS, STEPS = 32, 8, 10, 24, 8, 4, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# name of the trainer: name and settings in timm, whose "sgd" is Nesterov's and whose "momentum" is plain. AdamW's weight decay is so
# large that the losses show which tensors it is applied to
OPTIMIZERS = {
    "sgd": dict(opt="momentum", lr=0.01, weight_decay=1e-4, momentum=0.9),
    "nesterov": dict(opt="sgd", lr=0.01, weight_decay=1e-4, momentum=0.9),
    "adamw": dict(opt="adamw", lr=1e-3, weight_decay=0.5),
}


def new_model():
    """As wide and deep as the trainer's deit_nano, for other images."""
    return VisionTransformer(img_size=SIDE, patch_size=PATCH, in_chans=3, num_classes=CLASSES, embed_dim=64,
                             depth=4, num_heads=4, mlp_ratio=4, qkv_bias=True)


def write_weights(path):
    """timm's initial values, each tensor moved by noise: no bias is zero. bf16's values, which pack well."""
    torch.manual_seed(7)
    model = new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16().float())
    save_file(model.state_dict(), path)


def write_images(path):
    """Coloured blobs that depend on the class a little, under noise."""
    random = np.random.default_rng(3)
    labels = random.integers(0, CLASSES, IMAGES)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE

    def items():
        for label in labels:
            waves = [np.sin(2 * math.pi * (random.uniform(0, 2) * x + random.uniform(0, 2) * y + label / CLASSES))
                     for _ in range(3)]
            image = 128 + 60 * np.stack(waves, axis=2) + 25 * random.standard_normal((SIDE, SIDE, 3))
            yield np.clip(image, 0, 255).astype(np.uint8), int(label)
    write_shard(path, items(), IMAGES, CLASSES, MEAN, STD)


def train_in_timm(weights, images, optimizer):
    from safetensors.torch import load_file
    model = new_model()
    model.load_state_dict(load_file(weights))
    shard = Shard(images)
    pixels = torch.from_numpy(np.stack([shard.image(i) for i in range(IMAGES)])).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels = torch.from_numpy(shard.index["label"].astype(np.int64))
    update = create_optimizer_v2(model, **OPTIMIZERS[optimizer])
    steps_per_epoch, losses = IMAGES // BATCH, []
    for step in range(STEPS):
        epoch, place = divmod(step, steps_per_epoch)
        chosen = rng.epoch_permutation(1, epoch, IMAGES)[place * BATCH:(place + 1) * BATCH]
        for group in update.param_groups:  # half a cosine over the epochs that were asked for
            group["lr"] = OPTIMIZERS[optimizer]["lr"] * 0.5 * (1 + math.cos(math.pi * step / (EPOCHS * steps_per_epoch)))
        loss = F.cross_entropy(model(pixels[chosen]), labels[chosen])
        update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses


def flags(optimizer):
    settings = OPTIMIZERS[optimizer]
    text = (f"-m deit_nano -size {SIDE} -patch {PATCH} -chans 3 -classes {CLASSES} -b {BATCH} -e {EPOCHS} -x {STEPS} -v 0 -warmup 0 "
            f"-l {settings['lr']} -wd {settings['weight_decay']}")
    momentum = f" -momentum {settings['momentum']}" if "momentum" in settings else ""
    return (text + momentum + {"sgd": " -opt sgd", "nesterov": " -opt sgd -nesterov 1", "adamw": " -opt adamw"}[optimizer]).split()


def train_in_trainer(program, weights, images, optimizer, directory):
    subprocess.run([program, *flags(optimizer), "-w", weights, "-i", images, "-j", images, "-o", directory], check=True,
                   stdout=subprocess.DEVNULL)
    with open(os.path.join(directory, "main.log")) as file:
        return [float(line.split("trl:")[1].split()[0]) for line in file if "trl:" in line]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trainer", default=os.path.join(ROOT, "train_deit"))
    parser.add_argument("--fixture", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    passed = True
    with tempfile.TemporaryDirectory() as work:
        weights, images = os.path.join(work, "timm.safetensors"), os.path.join(work, "images.bin")
        write_weights(weights)
        write_images(images)
        losses = {name: train_in_timm(weights, images, name) for name in OPTIMIZERS}
        known = subprocess.run([options.trainer, "-h"], stdout=subprocess.PIPE, text=True).stdout
        for name in OPTIMIZERS:
            if name not in known:
                print(f"{name}: {options.trainer} does not have it")
                continue
            found = train_in_trainer(options.trainer, weights, images, name, os.path.join(work, name))
            difference = np.abs(np.array(found) - losses[name]) / losses[name]
            passed &= len(found) == STEPS and bool((difference <= LIMIT).all())
            print(f"{name}: losses {losses[name][0]:.6f} -> {losses[name][-1]:.6f} in timm, {found[0]:.6f} -> {found[-1]:.6f} in the "
                  f"trainer, largest relative difference {difference.max():.1e}")
        if options.fixture:
            fixtures = os.path.join(HERE, "fixtures")
            with open(weights, "rb") as file, open(os.path.join(fixtures, "timm_nano.safetensors.gz"), "wb") as packed:
                packed.write(gzip.compress(file.read(), mtime=0))
            with open(images, "rb") as file, open(os.path.join(fixtures, "timm_images.bin"), "wb") as copy:
                copy.write(file.read())
            with open(os.path.join(fixtures, "timm_losses.txt"), "w") as file:
                file.write("# made by dev/reference/finetune_timm.py --fixture; optimizer, losses of ten steps : the trainer's flags\n")
                for name in OPTIMIZERS:
                    file.write(f"{name} {' '.join(f'{loss:.9g}' for loss in losses[name])} : {' '.join(flags(name))}\n")
            print("wrote", ", ".join(f"{name} ({os.path.getsize(os.path.join(fixtures, name))} bytes)"
                                     for name in sorted(os.listdir(fixtures)) if name.startswith("timm_")))
    sys.exit(0 if passed else "finetune_timm.py: DIFFERENT")


if __name__ == "__main__":
    main()
