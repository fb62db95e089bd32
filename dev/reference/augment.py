"""Makes dev/reference/fixtures/augment.safetensors, with which dev/test/test_augment.cu compares the trainer's augmentation:

    python3 dev/reference/augment.py        (Pillow 13, timm 1.0, PyTorch, numpy)

op.I.image, op.I.cases (N, 3: operation, level, negated), op.I.fill, op.I.expected (N, S, S, CH): timm's operations, computed by Pillow
mix.*: timm's Mixup on normalised batches, its targets, SoftTargetCrossEntropy's loss and gradient    boxes: its cutmix boxes
erase: what timm's RandomErasing chose, over many images
"""
import os
import random
import sys

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, mixup, random_erasing
from timm.loss import SoftTargetCrossEntropy

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(here, "..", "..", "data"))
import safetensors_file  # noqa: E402
from shard import Shard  # noqa: E402  (data/ is no package)

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
ENHANCE = ["ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"]
SIGNED = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"] + ENHANCE
LEVELS = [2.7, 8.9, 10.0]


def picture(rng, S, low, high):
    """Gradients, an ellipse with a sharp edge, stripes and noise, each channel in a range of its own."""
    y, x = np.mgrid[0:S, 0:S] / S
    out = np.empty((S, S, 3))
    for c in range(3):
        p = 0.5 * x * (c + 1) / 3 + 0.4 * y ** 2 + 0.15 * np.sin(20 * x + 7 * c * y)
        p[((x - 0.4) / 0.3) ** 2 + ((y - 0.6) / 0.2) ** 2 < 1] += 0.5 - 0.3 * c
        p += rng.normal(0, 0.03, p.shape)
        p = (p - p.min()) / (p.max() - p.min())
        out[..., c] = low[c] + (high[c] - low[c]) * p
    return np.rint(out).astype(np.uint8)


def fashion(i):
    return Shard(os.path.join(here, "..", "..", "data", "fashion_val.bin")).image(i)


def operations(tensors, index, image, fill):
    pil = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    kwargs = dict(fillcolor=fill[0] if image.shape[2] == 1 else tuple(fill), resample=Image.Resampling.BICUBIC)
    cases, expected = [], []
    for number, name in enumerate(auto_augment._RAND_INCREASING_TRANSFORMS):
        level_fn = auto_augment.LEVEL_TO_ARG[name]
        for level in LEVELS if level_fn else LEVELS[:1]:
            for negate in (False, True) if name in SIGNED else (False,):
                auto_augment._randomly_negate = lambda v: -v if negate else v
                args = level_fn(float(np.float32(level)), {}) if level_fn else ()
                if name == "PosterizeIncreasing" and args[0] == 0:  # Pillow 10 and later refuses what it made black before
                    result = np.zeros_like(image)
                else:
                    result = np.asarray(auto_augment.NAME_TO_OP[name](pil, *args, **kwargs))
                cases.append([number + 1, level, negate])
                expected.append(result.reshape(image.shape))
    tensors[f"op.{index}.image"] = image
    tensors[f"op.{index}.fill"] = np.int32(fill)
    tensors[f"op.{index}.cases"] = np.float32(cases)
    tensors[f"op.{index}.expected"] = np.stack(expected)


def mixes(tensors, rng):
    B, S, V = 6, 15, 7
    images = np.stack([picture(rng, S, (0, 20, 60), (255, 200, 130)) for _ in range(B)])
    labels = rng.integers(0, V, B)
    labels[-1] = labels[0]  # image 0 is mixed with one of its own class
    tensors["mix.images"], tensors["mix.labels"] = images, np.int32(labels)
    params, mixed, targets, logits, losses, grads = [], [], [], [], [], []
    for lam, cut, smoothing in ((0.37, False, 0.1), (0.81, False, 0.0), (0.55, True, 0.1), (0.2, True, 0.0), (0.99, True, 0.1), (1.0, False, 0.1)):
        box = [0, 0, 0, 0]

        def recorded(*args, original=mixup.cutmix_bbox_and_lam, **kwargs):
            result = original(*args, **kwargs)
            box[:] = result[0]
            return result

        mixer = mixup.Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=smoothing, num_classes=V)
        mixer._params_per_batch = lambda: (lam, cut)
        saved, mixup.cutmix_bbox_and_lam = mixup.cutmix_bbox_and_lam, recorded
        x = torch.from_numpy((images.astype(np.float32) / np.float32(255) - MEAN) / STD).permute(0, 3, 1, 2).contiguous()
        mixer.lam_seen = mixer._mix_batch(x)
        mixup.cutmix_bbox_and_lam = saved
        target = mixup.mixup_target(torch.from_numpy(labels), V, mixer.lam_seen, smoothing)
        logit = torch.from_numpy(rng.normal(0, 2, (B, V)).astype(np.float32)).requires_grad_()
        loss = SoftTargetCrossEntropy()(logit, target)
        loss.backward()
        params.append([mixer.lam_seen, cut, smoothing, *box])
        for values, value in ((mixed, x), (targets, target), (logits, logit.detach()), (losses, loss.detach()), (grads, logit.grad)):
            values.append(value.numpy())
    tensors["mix.params"] = np.float32(params)
    for name, values in (("mixed", mixed), ("targets", targets), ("logits", logits), ("losses", losses), ("grads", grads)):
        tensors["mix." + name] = np.ascontiguousarray(np.stack(values), dtype=np.float32)


def boxes(tensors):
    rows = []
    for lam in (0.003, 0.2, 0.5, 0.77, 0.9999, 1.0):
        for S, y, x in ((28, 0, 27), (37, 18, 3), (224, 223, 100), (224, 111, 112)):
            draws = iter((y, x))
            saved, np.random.randint = np.random.randint, lambda *_, **__: np.int64(next(draws))
            (top, bottom, left, right), corrected = mixup.cutmix_bbox_and_lam((3, S, S), lam)
            np.random.randint = saved
            rows.append([lam, S, y, x, top, bottom, left, right, corrected])
    tensors["boxes"] = np.float64(rows)


def erasing(tensors, n=40000):
    """For S 28 and 224: share of erased images, then mean and standard deviation of height, width, top and left of their boxes."""
    rows = []
    for S in (28, 224):
        eraser, found = random_erasing.RandomErasing(probability=0.25, mode="pixel", device="cpu"), []

        class Recorder:
            def __setitem__(self, key, _):
                found.append([key[1].stop - key[1].start, key[2].stop - key[2].start, key[1].start, key[2].start])

        saved, random_erasing._get_pixels = random_erasing._get_pixels, lambda *_, **__: None
        for _ in range(n):
            eraser._erase(Recorder(), 3, S, S, torch.float32)
        random_erasing._get_pixels = saved
        rows.append([S, n, len(found) / n, *np.mean(found, 0), *np.std(found, 0)])
    tensors["erase"] = np.float64(rows)


def main():
    rng, tensors = np.random.default_rng(7), {}
    random.seed(7)
    np.random.seed(7)
    operations(tensors, 0, picture(rng, 35, (10, 40, 0), (240, 180, 255)), [124, 116, 104])
    small = picture(rng, 20, (90, 0, 0), (160, 255, 255))
    small[..., 2] = 77  # a channel of one value: its contrast cannot be stretched
    operations(tensors, 1, small, [0, 255, 128])
    operations(tensors, 2, fashion(3), [73])
    mixes(tensors, rng)
    boxes(tensors)
    erasing(tensors)
    path = os.path.join(here, "fixtures", "augment.safetensors")
    safetensors_file.save(path, tensors)
    print(f"{path}: {os.path.getsize(path)} bytes; Pillow {Image.__version__}, {len(tensors)} tensors, python {sys.version.split()[0]}")


main()
