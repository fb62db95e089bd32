#!/usr/bin/env python3
"""Tests resnet.py: check_resnet.py, which needs PyTorch and torchvision alone.

- The models have the names and shapes of torchvision's. With nothing dropped, though through DropIT's
  functions, logits, gradients and running statistics are those of torchvision's own model to the bit.
  With gamma 0.7 so are logits, running statistics and all gradients but those of the dropped inputs.
- The elements that are kept are those of a plain sort in the order (B, H, W, C), their number is
  int(n * (1 - gamma)), and plain loops over them give the weight gradients.
"""
import sys

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import ResNet

import deit
import resnet

failures = 0


def verdict(passed, what):
    global failures
    failures += not passed
    print(f"{'ok    ' if passed else 'FAILED'} {what}", flush=True)


def options(*flags):
    return resnet.parse(["dump", "no file", *" ".join(flags).split()])


def batch(config):
    blank = resnet.blank_rows(config, config.batch_size, config.seed)
    image, label = deit.dump_batch(config, config.batch_size, config.seed, blank)
    return torch.from_numpy(image), torch.from_numpy(label).long()


def step(model, image, label):
    """One forward and backward pass: {name: tensor} of logits, gradients and running statistics."""
    logits = model(image)
    F.cross_entropy(logits, label).backward()
    found = {"logits": logits.detach(), **dict(model.named_buffers())}
    found.update({f"grad.{name}": p.grad for name, p in model.named_parameters()})
    return found


def check_presets():
    for name in resnet.MODELS:
        if name == "resnet8":
            continue  # torchvision has none
        theirs = getattr(torchvision.models, name)().state_dict()
        config = resnet.configure(resnet.parse(["init", "no file", "-m", name]))
        ours = resnet.Resnet(config).state_dict()
        same = list(ours) == list(theirs) and all(ours[n].shape == t.shape for n, t in theirs.items())
        verdict(same, f"{name}: {len(ours)} names and shapes")


def check_torchvision(block):
    config = options(f"--block {block} --layers 1,1,1,1 --width 64 --stem imagenet --image_size 35",
                     "--in_chans 3 --batch_size 3 --seed 3")
    image, label = batch(config)
    values = deit.dump_parameters(resnet.Resnet(config), config.seed)
    theirs = ResNet(resnet.BLOCKS[block], [1, 1, 1, 1], num_classes=config.num_classes)
    deit.set_parameters(theirs, values, "check")
    expected = step(theirs, image, label)
    for gamma, every_layer in ((0.0, True), (0.7, False)):
        ours = resnet.Resnet(config)
        deit.set_parameters(ours, values, "check")
        ours.use_dropit(deit.Dropit(gamma), every_layer)
        found = step(ours, image, label)
        different = {name for name in expected if not torch.equal(found[name], expected[name])}
        dropped = {f"grad.{name}" for name, p in ours.named_parameters()
                   if gamma > 0 and name != "conv1.weight" and (p.ndim == 4 or name == "fc.weight")}
        verdict(different == dropped, f"{block}, gamma {gamma}: of {len(expected)} tensors, "
                f"{len(expected) - len(different)} equal torchvision's to the bit, "
                f"{len(dropped)} should differ")


def plain_weight_gradient(kept, dout, shape, stride, padding):
    """dw[o, c, ky, kx] = sum of dout[b, o, oy, ox] * kept[b, c, oy*stride - padding + ky, ...]."""
    dw = np.zeros(shape)
    B, _, H, W = kept.shape
    for b, oy, ox in np.ndindex(B, *dout.shape[2:]):
        for ky, kx in np.ndindex(*shape[2:]):
            y, x = oy * stride - padding + ky, ox * stride - padding + kx
            if 0 <= y < H and 0 <= x < W:
                dw[:, :, ky, kx] += np.outer(dout[b, :, oy, ox], kept[b, :, y, x])
    return dw


def plain_mask(x, gamma):
    """What a sort by (-|x|, index) keeps, index in the order (B, H, W, C); as bool (B, C, H, W)."""
    key = np.abs(x.transpose(0, 2, 3, 1)).reshape(-1).tolist()
    mask = np.zeros(len(key), bool)
    mask[sorted(range(len(key)), key=lambda i: (-key[i], i))[:int(len(key) * (1 - gamma))]] = True
    B, C, H, W = x.shape
    return mask.reshape(B, H, W, C).transpose(0, 3, 1, 2)


def check_layers(gamma, *flags):
    """Every layer's kept elements and weight gradient in one step of a small model."""
    config = options(*flags)
    image, label = batch(config)
    model, dropit = resnet.Resnet(config), deit.Dropit(gamma)
    deit.set_parameters(model, deit.dump_parameters(model, config.seed), "check")
    model.use_dropit(dropit, every_layer=True)
    dropit.masks, inputs, douts = {}, {}, {}

    def remember(name):
        def hook(_, arguments, output):
            inputs[name] = arguments[0].detach().double().numpy().copy()
            output.register_hook(lambda dout: douts.update({name: dout.double().numpy().copy()}))
        return hook
    layers = {name: layer for name, layer in model.named_modules()
              if isinstance(layer, (resnet.Conv2d, deit.Linear))}
    for name, layer in layers.items():
        layer.register_forward_hook(remember(name))
    step(model, image, label)
    worst, nearest, sets = 0.0, np.inf, 0
    for name, layer in layers.items():
        # the head is a convolution of 1x1 images
        x, dout = (a.reshape(*a.shape, *[1] * (4 - a.ndim)) for a in (inputs[name], douts[name]))
        mask = dropit.masks[name.replace("downsample.0", "conv1")].numpy().reshape(x.shape)
        sets += mask.sum() == int(x.size * (1 - gamma)) and np.array_equal(mask, plain_mask(x, gamma))
        shape = layer.weight.shape + (1,) * (4 - layer.weight.ndim)
        geometry = (1, 0) if name == "fc" else (layer.stride[0], layer.padding[0])
        found = layer.weight.grad.double().numpy().reshape(shape)
        largest = np.abs(found).max()
        errors = [np.abs(plain_weight_gradient(kept, dout, shape, *geometry) - found).max() / largest
                  for kept in (x * mask, x)]
        worst = max(worst, errors[0])
        if (x[~mask] != 0).any():  # at gamma 0.5 only zeros may be dropped
            nearest = min(nearest, errors[1])
    where = f"{config.block}, {config.stem} stem, gamma {gamma}"
    verdict(sets == len(layers), f"{where}: {sets} of {len(layers)} layers keep what a plain sort keeps")
    verdict(worst < 1e-5 < nearest, f"{where}: weight gradients within {worst:.1e} of plain loops over "
            f"what is kept; over everything {nearest:.1e} or more")


def check_ties():
    """Whole numbers tie across channels too, where the orders (B, H, W, C) and (B, C, H, W) differ."""
    random = np.random.default_rng(1)
    x = random.integers(-3, 4, (3, 5, 4, 6)).astype(np.float32)
    weight = torch.ones(2, 5, 1, 1, requires_grad=True)
    for gamma in (0.0, 0.3, 0.5, 0.7, 0.9, 0.9999):
        dropit = deit.Dropit(gamma)
        dropit.masks = {}
        resnet.DropitConvFunction.apply(torch.from_numpy(x), weight, (1, 1), (0, 0), dropit, "layer", 0)
        found, expected = dropit.masks["layer"].numpy().reshape(x.shape), plain_mask(x, gamma)
        verdict(np.array_equal(found, expected) and found.sum() == int(x.size * (1 - gamma)),
                f"ties, gamma {gamma}: {found.sum()} of {x.size} are kept, those of a plain sort")


def check_statistics():
    """Other ranks leave the running statistics alone; rank 0 moves them with the unbiased variance."""
    config = options("--layers 1 --image_size 6 --batch_size 3")
    run = resnet.make_run(config, config, deit.dump_parameters(resnet.Resnet(config), 1), "check")
    image, norm = batch(config)[0], run.model.bn1
    before = norm.running_var.clone()
    run.start(0, 1)
    run.model(image)
    verdict(torch.equal(norm.running_var, before), "rank 1 leaves the running statistics as they are")
    run.start(0, 0)
    run.model(image)
    y = F.conv2d(image, run.model.conv1.weight, padding=1).transpose(0, 1).flatten(1)
    expected = 0.9 * before + 0.1 * y.var(dim=1, unbiased=True)
    verdict(torch.allclose(norm.running_var, expected, rtol=1e-5), "rank 0 moves them by a tenth")


def main():
    torch.set_num_threads(1)
    check_presets()
    check_torchvision("basic")
    check_torchvision("bottleneck")
    for gamma in (0.5, 0.7, 0.9):
        small = "--layers 1,1 --width 6 --in_chans 2 --batch_size 3"
        check_layers(gamma, small, "--block basic --stem imagenet --image_size 19")
        check_layers(gamma, small, "--block bottleneck --stem cifar --image_size 7")
    check_ties()
    check_statistics()
    sys.exit(f"check_resnet.py: {failures} checks FAILED" if failures else 0)


if __name__ == "__main__":
    main()
