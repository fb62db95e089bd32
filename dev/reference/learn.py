#!/usr/bin/env python3
"""Trains deit.py's model with the augmentation of the recipes: what train_deit's accuracy is compared with.

    learn.py -i fashion_full_train.bin -j fashion_full_val.bin -crop 1 -scale 0.5 -flip 1 -reprob 0.25 -mixup 0.2 ...

The flags are the trainer's. The random numbers are not: the augmentation is drawn by NumPy's
generator, so that two accuracies are compared, not two losses. The images of a shard must all have
the model's size: then a crop's bicubic resize, Pillow's own to the grey level, is two products with
matrices out of a table, and an epoch of small images costs seconds. `learn.py --test` compares that
with Pillow, and mixup, cutmix and erasing with timm's code where it is installed.
"""
import argparse
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import deit
import rng

# ----------------------------------------------------------------------------
# augmentation of a batch, uint8 (B, H, W, C) to float32 (B, C, H, W)


def bicubic_weights(size, out):
    """Pillow's weights (out, size) of a bicubic, antialiased resize of a line, in its fixed point."""
    scale = size / out
    width = max(scale, 1.0)
    weights = np.zeros((out, size))
    for i in range(out):
        center = (i + 0.5) * scale
        first = max(int(center - 2 * width + 0.5), 0)
        last = min(int(center + 2 * width + 0.5), size)
        x = np.abs((np.arange(first, last) + 0.5 - center) / width)
        cubic = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1,
                         np.where(x < 2, -0.5 * (((x - 5) * x + 8) * x - 4), 0.0))
        weights[i, first:last] = cubic / cubic.sum()
    return np.floor(weights * 2**22 + 0.5) / 2**22


class RandomResizedCrop:
    """torchvision's RandomResizedCrop(size, (scale, 1), (3/4, 4/3), BICUBIC) of Pillow images."""

    def __init__(self, size, scale):
        self.size, self.scale = size, scale
        # table[start, length]: the matrix (size, size) that resizes the part start .. start+length-1
        table = np.zeros((size, size + 1, size, size))
        for length in range(1, size + 1):
            weights = bicubic_weights(length, size)
            for start in range(size - length + 1):
                table[start, length, :, start:start + length] = weights
        self.table = torch.from_numpy(table)

    def draw(self, random, n):
        """Boxes of n images: top, left, height, width."""
        area = self.size * self.size * random.uniform(self.scale, 1, (n, 10))
        aspect = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), (n, 10)))
        width = np.rint(np.sqrt(area * aspect)).astype(int)
        height = np.rint(np.sqrt(area / aspect)).astype(int)
        fits = (0 < width) & (width <= self.size) & (0 < height) & (height <= self.size)
        first, rows = fits.argmax(axis=1), np.arange(n)
        # ten attempts in vain: the whole image, whose ratio of 1 is allowed
        some = fits.any(axis=1)
        width = np.where(some, width[rows, first], self.size)
        height = np.where(some, height[rows, first], self.size)
        return (random.integers(0, self.size - height + 1), random.integers(0, self.size - width + 1),
                height, width)

    def apply(self, image, box):
        """image (B, C, H, W), whole numbers. Rounded after each direction, as Pillow does; float64
        holds its fixed-point sums exactly."""
        top, left, height, width = (torch.from_numpy(np.asarray(x)) for x in box)
        rows, columns = self.table[top, height][:, None], self.table[left, width][:, None]
        image = (image.double() @ columns.transpose(-2, -1) + 0.5).floor_().clamp_(0, 255)
        return (rows @ image + 0.5).floor_().clamp_(0, 255).float()


def erase(random, image, probability):
    """timm's RandomErasing in pixel mode, of normalised images (B, C, H, W), in place."""
    C, H, W = image.shape[1:]
    for i in np.flatnonzero(random.random(len(image)) <= probability):
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * H * W
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < H and w < W:
                y, x = random.integers(0, H - h + 1), random.integers(0, W - w + 1)
                noise = random.standard_normal((C, h, w), np.float32)
                image[i, :, y:y + h, x:x + w] = torch.from_numpy(noise)
                break


def mix(random, image, options):
    """timm's Mixup in batch mode, in place. The share of each image's own label."""
    mixup, cutmix = options.mixup, options.cutmix
    if mixup == cutmix == 0 or random.random() >= options.mixup_prob:
        return 1.0
    cuts = cutmix > 0 and (mixup == 0 or random.random() < options.mixup_switch)
    share = random.beta(cutmix, cutmix) if cuts else random.beta(mixup, mixup)
    if not cuts:
        image.copy_(image * share + image.flip(0) * (1 - share))
        return share
    H, W = image.shape[2:]
    h, w = int(H * math.sqrt(1 - share)), int(W * math.sqrt(1 - share))
    y, x = random.integers(H), random.integers(W)
    top, bottom = max(y - h // 2, 0), min(y + (h + 1) // 2, H)
    left, right = max(x - w // 2, 0), min(x + (w + 1) // 2, W)
    image[:, :, top:bottom, left:right] = image.flip(0)[:, :, top:bottom, left:right]
    return 1 - (bottom - top) * (right - left) / (H * W)


# ----------------------------------------------------------------------------
# DropIT, the same selection and gradients as deit.py's in a third of its time

class MaskedLinearFunction(torch.autograd.Function):
    """deit.DropitLinearFunction with zeros in the place of what is dropped: no index, no unpacking."""

    @staticmethod
    def forward(ctx, x, weight, bias, dropit, name, layer_id):
        mask = dropit.mask(x.detach().reshape(-1), layer_id)
        ctx.save_for_backward(x.detach() * mask.view(x.shape), weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dout):
        kept, weight = ctx.saved_tensors
        rows = dout.reshape(-1, dout.shape[-1])
        return dout @ weight, rows.t() @ kept.view(-1, kept.shape[-1]), rows.sum(0), None, None, None


# ----------------------------------------------------------------------------

def images_of(shard):
    """All images as uint8 (N, C, H, W), labels, mean and std."""
    pixels = np.stack([shard.image(i) for i in range(shard.count)]).transpose(0, 3, 1, 2)
    return (torch.from_numpy(np.ascontiguousarray(pixels)),
            torch.from_numpy(shard.index["label"].astype(np.int64)),
            torch.from_numpy(shard.mean).view(-1, 1, 1), torch.from_numpy(shard.std).view(-1, 1, 1))


def evaluate(model, images, labels, mean, std):
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model((part.float() / 255 - mean) / std) for part in images.split(500)])
    model.train()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train(options):
    config = deit.model_config("deit_nano")
    pixels, labels, mean, std = images_of(deit.open_shard(options.data, config))
    validation = images_of(deit.open_shard(options.validation, config))
    random = np.random.default_rng(1000 + options.seed)
    deit.Attention.fused = hasattr(F, "scaled_dot_product_attention")
    model = deit.Deit(config)
    deit.set_parameters(model, deit.initial_parameters(model, options.seed), "initial values")
    if options.gamma > 0:
        deit.DropitLinearFunction = MaskedLinearFunction
        model.use_dropit(deit.Dropit(options.gamma))
    options.beta1, options.beta2, options.eps = 0.9, 0.999, 1e-8
    optimizer = deit.make_optimizer(model, options)
    crop = RandomResizedCrop(config.image_size, options.scale) if options.crop else None
    B, count, classes = options.batch_size, len(pixels), config.num_classes
    steps_per_epoch = count // B
    steps, began = options.epochs * steps_per_epoch, time.perf_counter()
    on = 1 - options.smoothing + options.smoothing / classes
    total = 0.0
    for step in range(steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = torch.from_numpy(rng.epoch_permutation(options.seed, epoch, count))
        rate = deit.learning_rate(step, steps, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = order[place * B:(place + 1) * B]
        image, label = pixels[chosen].float(), labels[chosen]
        if crop:
            image = crop.apply(image, crop.draw(random, B))
        if options.flip:
            mirrored = torch.from_numpy(random.random(B) < 0.5)
            image[mirrored] = image[mirrored].flip(3)
        image = (image / 255 - mean) / std
        erase(random, image, options.reprob)
        share = mix(random, image, options)
        target = torch.full((B, classes), options.smoothing / classes).scatter_(1, label[:, None], on)
        target = target * share + target.flip(0) * (1 - share)
        optimizer.zero_grad()
        loss = -(target * F.log_softmax(model(image), dim=1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0 or place + 1 == steps_per_epoch:
            print(f"step {step + 1:5d}/{steps} | loss {loss.item():.6f} | mean since the start "
                  f"{total / (step + 1):.6f} | {(step + 1) * B / (time.perf_counter() - began):.0f} img/s",
                  flush=True)
        if place + 1 == steps_per_epoch:
            scores = evaluate(model, *validation)
            print(f"eval  epoch {epoch + 1} | loss {scores[0]:.6f} | top-1 {100 * scores[1]:6.2f}%", flush=True)
    print(f"final loss={scores[0]:.6f} top1={100 * scores[1]:.2f}")


# ----------------------------------------------------------------------------

def gradients(function):
    """Of a small batch at gamma 0.9, with the given linear function."""
    published, deit.DropitLinearFunction = deit.DropitLinearFunction, function
    model = deit.Deit(deit.model_config("deit_nano"))
    deit.set_parameters(model, deit.initial_parameters(model, 1), "initial values")
    model.use_dropit(deit.Dropit(0.9))
    image = torch.from_numpy(rng.normal(1, rng.INIT, 1000, 8 * 28 * 28).astype(np.float32)).view(8, 1, 28, 28)
    F.cross_entropy(model(image), torch.arange(8)).backward()
    deit.DropitLinearFunction = published
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test():
    from PIL import Image
    random = np.random.default_rng(1)
    ours, published = gradients(MaskedLinearFunction), gradients(deit.DropitLinearFunction)
    error = max(((ours[name] - g).abs().max() / g.abs().max()).item() for name, g in published.items())
    print(f"gradients at gamma 0.9: largest difference to those of the published function {error:.1e}")
    worst = moved = 0
    for size in (28, 32):
        crop = RandomResizedCrop(size, 0.08)
        noise = random.integers(0, 256, (500, size, size), np.uint8)
        noise[:250] = np.where(noise[:250] < 128, 0, 255)  # overshoots are cut at both ends
        box = crop.draw(random, len(noise))
        found = crop.apply(torch.from_numpy(noise).float()[:, None], box)[:, 0].numpy().astype(int)
        for i, (top, left, height, width) in enumerate(zip(*box)):
            part = Image.fromarray(noise[i, top:top + height, left:left + width])
            difference = np.abs(found[i] - np.asarray(part.resize((size, size), Image.BICUBIC)))
            worst, moved = max(worst, difference.max()), moved + (difference > 0).sum()
        print(f"crop to {size}: 500 images, largest difference to Pillow {worst} grey levels, {moved} pixels differ")
    passed = worst == 0 and error < 1e-5
    try:
        from timm.data.mixup import cutmix_bbox_and_lam
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms import RandomResizedCropAndInterpolation
    except ImportError:
        print("timm is not installed: the distributions of boxes are not compared")
        return passed
    # the distributions of a crop's area and place, of the erased share and of cutmix' share, by their means and deviations
    import random as python_random
    python_random.seed(1)
    np.random.seed(1)
    drawn = np.stack(RandomResizedCrop(28, 0.08).draw(random, 6000))
    picture = Image.new("L", (28, 28))
    theirs = np.array([RandomResizedCropAndInterpolation.get_params(picture, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(6000)]).T
    pairs = [(f"crop's {name}", a, b) for name, a, b in zip(("top", "left", "height", "width"), drawn, theirs)]
    ones = torch.full((6000, 1, 28, 28), 9.0)
    other = RandomErasing(probability=0.6, mode="pixel", device="cpu")
    ours, theirs = ones.clone(), other(ones.clone())
    erase(random, ours, 0.6)
    cuts = argparse.Namespace(mixup=0, cutmix=1.0, mixup_prob=1, mixup_switch=0.5)
    pair = lambda: torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 1, 28, 28)
    share, exact = [], True
    for _ in range(6000):
        image = pair()
        share.append(mix(random, image, cuts))
        exact &= abs(image[1].mean().item() - share[-1]) < 1e-6
    blends = argparse.Namespace(mixup=0.8, cutmix=0, mixup_prob=1, mixup_switch=0.5)
    for _ in range(100):
        image = pair() + 3
        own = mix(random, image, blends)
        exact &= abs(image[1].mean().item() - (3 + own)) < 1e-5 and abs(image[0].mean().item() - (4 - own)) < 1e-5
    expected = [cutmix_bbox_and_lam((2, 1, 28, 28), np.random.beta(1, 1))[1] for _ in range(6000)]
    pairs += [("erased share", (ours != 9).float().mean((1, 2, 3)).numpy(), (theirs != 9).float().mean((1, 2, 3)).numpy()),
              ("cutmix share", np.array(share), np.array(expected))]
    for name, a, b in pairs:
        error = max(a.std(), b.std()) / math.sqrt(len(a) / 2)
        print(f"{name}: mean {a.mean():.4f}, timm {b.mean():.4f}; deviation {a.std():.4f}, timm {b.std():.4f}; "
              f"standard error {error:.4f}")
        passed &= abs(a.mean() - b.mean()) < 4 * error and abs(a.std() - b.std()) < 4 * error
    noise = ours[ours != 9]
    print(f"erasing noise: mean {noise.mean():.4f}, deviation {noise.std():.4f}; the shares of cutmix and mixup are the pixels': {exact}")
    return passed and exact and abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def main():
    if sys.argv[1:] == ["--test"]:
        sys.exit(0 if test() else "learn.py: DIFFERENT")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("-i", dest="data", required=True)
    flag("-j", dest="validation", required=True)
    flag("-b", dest="batch_size", type=deit.positive, default=64)
    flag("-e", dest="epochs", type=deit.positive, default=6)
    flag("-l", dest="lr", type=float, default=2e-3)
    flag("-opt", dest="optimizer", choices=("adamw", "sgd"), default="adamw")
    flag("-wd", dest="weight_decay", type=float, default=0.05)
    flag("-momentum", type=float, default=0.9)
    flag("-warmup", type=int, default=50, help="steps")
    flag("-smoothing", type=float, default=0.0)
    flag("-crop", type=int, choices=(0, 1), default=0)
    flag("-scale", type=float, default=0.08)
    flag("-flip", type=int, choices=(0, 1), default=0)
    flag("-reprob", type=float, default=0.0)
    flag("-mixup", type=float, default=0.0)
    flag("-cutmix", type=float, default=0.0)
    flag("-mixup_prob", type=float, default=1.0)
    flag("-mixup_switch", type=float, default=0.5)
    flag("-g", dest="gamma", type=deit.gamma, default=0.0)
    flag("-seed", type=int, default=1)
    flag("-threads", type=deit.positive, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    main()
