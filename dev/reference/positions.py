#!/usr/bin/env python3
"""Writes fixtures/positions.safetensors: position embeddings of one grid, interpolated to others by torch.

    python3 dev/reference/positions.py

Needs torch and timm. in.OLD is (1, 1 + OLD^2, 5); out.OLD.NEW is what timm's resample_abs_pos_embed makes of it for a
grid of NEW x NEW, but in float64, then rounded: timm itself interpolates in float32, and its distance is printed.
dev/test/test_data.py compares those of data/convert.py with them.
"""
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "data"))
from safetensors_file import save  # noqa: E402  (data/ is no package)

SIDES = {1: (1, 4), 2: (3, 1), 7: (4, 5, 12, 14), 14: (7, 9, 24, 1), 16: (15, 17)}


def interpolate(positions, old, new):
    grid = positions[:, 1:].double().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).float()], dim=1)


def main():
    random, tensors, worst = np.random.RandomState(1), {}, 0.0
    for old, sides in SIDES.items():
        positions = torch.from_numpy(random.standard_normal((1, 1 + old * old, 5)).astype(np.float32))
        tensors[f"in.{old}"] = positions.numpy()
        for new in sides:
            out, timm = interpolate(positions, old, new), resample_abs_pos_embed(positions, [new, new])
            worst = max(worst, ((timm - out).abs().max() / out.abs().max()).item())
            tensors[f"out.{old}.{new}"] = out.numpy()
    assert worst < 2e-6, worst
    path = os.path.join(HERE, "fixtures", "positions.safetensors")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save(path, tensors)
    print(f"wrote {path}: {len(tensors)} tensors; timm's float32 differs by {worst:.1e} of the largest at most")


if __name__ == "__main__":
    main()
