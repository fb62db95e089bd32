#!/usr/bin/env python3
"""Writes fixtures/recipes.safetensors: what timm and torch make of the published recipes.

    /path/to/python dev/reference/recipes.py     (needs torch and timm)

dev/test/test_recipes.cu holds the trainer's recipes against it, without timm. Where a random number is
drawn, it is the trainer's (rng.py). The settings come from the published command lines and the
defaults of the program that they start (chenjoya/dropit, benchmarks/deit/main.py), written down
here and not taken from the trainer.
"""
import argparse
import os
import sys

import numpy as np
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler
from timm.utils import ModelEma

import rng

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "data"))
import safetensors_file  # noqa: E402  (data/ is no package)

# defaults of the published program
DEFAULTS = dict(
    model="deit_tiny", batch_size=512, epochs=300, opt="adamw", lr=5e-4, momentum=0.9,
    weight_decay=0.05, unscale_lr=False, sched="cosine", warmup_lr=1e-6, min_lr=1e-5,
    warmup_epochs=5, cooldown_epochs=10, decay_epochs=30, decay_rate=0.1, patience_epochs=10,
    drop_path=0.1, model_ema_decay=0.99996, smoothing=0.1, mixup=0.8, cutmix=1.0, reprob=0.25,
    aa="rand-m9-mstd0.5-inc1", repeats=3, crop_pct=0.875, classes=1000)
CIFAR = dict(batch_size=384, opt="sgd", lr=0.01, unscale_lr=True, weight_decay=1e-4, epochs=1000,
             classes=100)
RECIPES = {
    "deit_ti_imagenet": dict(model="deit_tiny"),
    "deit_s_cifar100": dict(model="deit_small", **CIFAR),
    "deit_b_cifar100": dict(model="deit_base", **CIFAR),
    "vit_b_imagenet": dict(model="vit_base"),  # no published command: DeiT's
    "vit_b_cifar100": dict(model="vit_base", **CIFAR),
}
# the trainer's flags for them
FLAGS = {"-m": "model", "-b": "batch_size", "-e": "epochs", "-opt": "opt", "-momentum": "momentum",
         "-wd": "weight_decay", "-drop_path": "drop_path", "-ema": "model_ema_decay",
         "-smoothing": "smoothing", "-mixup": "mixup", "-cutmix": "cutmix", "-reprob": "reprob",
         "-aa": "aa", "-repeats": "repeats", "-crop_pct": "crop_pct", "-classes": "classes"}
WORLD = 2  # GPUs of the published commands
N, STEPS = 64, 6  # weights and steps of the optimizers' and the average's sequences


def learning_rates(args):
    """Of every epoch, by the program's own loop."""
    lr = args.lr if args.unscale_lr else args.lr * args.batch_size * WORLD / 512.0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, _ = create_scheduler(args, optimizer)  # its number of epochs goes unused there
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(epoch)
    return np.array(rates)


def weights_and_gradients():
    values = rng.normal(9, rng.INIT, 1, N * (1 + STEPS)).astype(np.float32).reshape(1 + STEPS, N)
    return values[0], values[1:]


def optimized(args):
    """Weights after each of some steps of the optimizer that timm makes."""
    start, gradients = weights_and_gradients()
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = create_optimizer_v2([weight], opt=args.opt, lr=0.01, momentum=args.momentum,
                                    weight_decay=args.weight_decay, filter_bias_and_bn=False)
    after = []
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        after.append(weight.detach().numpy().copy())
    return np.stack(after)


def averaged(decay):
    """timm's ModelEma over the sequence of weights."""
    start, weights = weights_and_gradients()
    model = torch.nn.Linear(N, 1, bias=False)
    model.weight.data.copy_(torch.from_numpy(start))
    ema = ModelEma(model, decay=decay)
    after = []
    for weight in weights:
        model.weight.data.copy_(torch.from_numpy(weight))
        ema.update(model)
        after.append(ema.ema.weight.detach().numpy().reshape(-1).copy())
    return np.stack(after)


def decayed():
    """{name: 1 where timm decays it}"""
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=192, depth=2, num_heads=3,
                              num_classes=10)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decays = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups
              for p in group["params"]}
    return {f"decay.{name}": np.array([decays[id(p)]], np.uint8)
            for name, p in model.named_parameters()}


def path_scales(rate, depth, images, seed, step, first_image):
    """What timm's DropPath modules make of ones: (depth, 2, images)."""
    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=12, depth=depth, num_heads=3,
                              num_classes=10, drop_path_rate=rate)
    scales = torch.ones(depth, 2, images)
    draws = None

    def bernoulli(tensor, probability):
        return tensor.copy_(torch.from_numpy(draws < probability).view(tensor.shape))

    original, torch.Tensor.bernoulli_ = torch.Tensor.bernoulli_, bernoulli
    for i, block in enumerate(model.blocks):
        for branch, module in enumerate((block.drop_path1, block.drop_path2)):
            if isinstance(module, DropPath):
                places = (2 * i + branch << 32) + first_image + np.arange(images)
                words = rng.philox(seed, rng.DROP_PATH, step, places)[0]
                draws = (words.astype(np.float64) + 0.5) / 2.0**32
                scales[i, branch] = module.train()(torch.ones(images, 1))[:, 0]
    torch.Tensor.bernoulli_ = original
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    return scales.numpy(), np.array(rates)


def main():
    torch.manual_seed(0)
    tensors, metadata = decayed(), {"flags": " ".join(FLAGS)}
    for name, settings in RECIPES.items():
        args = argparse.Namespace(**{**DEFAULTS, **settings})
        tensors[f"lr.{name}"] = learning_rates(args)
        metadata[name] = " ".join(str(getattr(args, key)) for key in FLAGS.values())
        tensors[f"optimizer.{name}"] = optimized(args)
    for decay in (0.99996, 0.9):
        tensors[f"ema.{decay}"] = averaged(decay)
    tensors["start"], tensors["gradients"] = weights_and_gradients()
    for i, (rate, depth, images, seed, step, first) in enumerate(
            [(0.1, 12, 16, 0, 0, 0), (0.5, 5, 7, 3 << 32 | 1, 77, 14), (0.3, 1, 4, 1, 1, 0),
             (0.9, 12, 40, 5, 123456, 80)]):
        scales, rates = path_scales(rate, depth, images, seed, step, first)
        tensors[f"path_scales.{i}"], tensors[f"path_rates.{i}"] = scales, rates
        tensors[f"path.{i}"] = np.array([rate, depth, images, seed, step, first], np.float64)
    path = os.path.join(HERE, "fixtures", "recipes.safetensors")
    safetensors_file.save(path, tensors, metadata)
    print(f"wrote {path}: {len(tensors)} tensors, {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    main()
