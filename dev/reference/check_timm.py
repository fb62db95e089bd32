#!/usr/bin/env python3
"""Checks every dump against timm's own model, read with the published safetensors package.

    python3 dev/reference/check_timm.py [FILE ...]

Needs timm and safetensors (pip install torch timm). For maintainers: it shows that deit.py is the
model that it claims to be. Weight gradients of dropped layers are rebuilt from timm's activations
by a plain sort, with none of deit.py's code.
"""
import glob
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

import rng

LIMIT = 1e-5  # of a tensor's largest element; float32 rounding reaches 2e-6
HERE = os.path.dirname(os.path.abspath(__file__))


def kept(x, gamma):
    """Mask of the int(n * (1 - gamma)) largest |x|, ties by lowest index."""
    flat = x.reshape(-1).abs()
    order = torch.sort(flat, descending=True, stable=True)[1]
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    mask[order[:int(flat.numel() * (1 - gamma))]] = True
    return mask


def check(path):
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    gamma = float(meta["gamma"])
    model = VisionTransformer(
        img_size=int(meta["image_size"]), patch_size=int(meta["patch_size"]),
        in_chans=int(meta["in_chans"]), num_classes=int(meta["num_classes"]),
        embed_dim=int(meta["embed_dim"]), depth=int(meta["depth"]),
        num_heads=int(meta["num_heads"]), mlp_ratio=4, qkv_bias=True,
        drop_path_rate=float(meta.get("drop_path", 0)))
    model.load_state_dict({name[len("param."):]: tensor for name, tensor in tensors.items()
                           if name.startswith("param.")})
    for i, block in enumerate(model.blocks):
        for branch, layer in enumerate((block.drop_path1, block.drop_path2)):
            if isinstance(layer, torch.nn.Identity):
                continue  # rate 0
            places = (2 * i + branch << 32) + np.arange(int(meta["batch_size"]))
            words = rng.philox(int(meta["drop_path_seed"]), rng.DROP_PATH, 0, places)[0]
            keep = 1 - layer.drop_prob  # timm's own rate
            scales = torch.from_numpy((words + 0.5) / 2.0**32 < keep).float().div_(keep)
            layer.register_forward_hook(lambda _, args, out, s=scales: args[0] * s[:, None, None])
    inputs, douts = {}, {}
    for name, module in model.named_modules():
        if gamma > 0 and f"mask.{name}" in tensors:
            module.register_forward_hook(
                lambda _, args, out, name=name: inputs.__setitem__(name, args[0].detach()))
            module.register_full_backward_hook(
                lambda _, dinp, dout, name=name: douts.__setitem__(name, dout[0]))
    logits = model(tensors["image"])
    loss = F.cross_entropy(logits, tensors["label"].long())
    loss.backward()

    def error(found, expected):
        largest = expected.abs().max().item()
        return (found - expected).abs().max().item() / (largest or 1.0)

    errors = {"logits": error(logits.detach(), tensors["logits"]),
              "loss": error(loss.detach().reshape(-1), tensors["loss"].reshape(-1)),
              "losses": error(loss.detach(), tensors["losses"][0])}
    for name, parameter in model.named_parameters():
        gradient, layer = parameter.grad, name.rsplit(".", 1)[0]
        if name.endswith(".weight") and layer in inputs:
            x, dout = inputs[layer], douts[layer]
            mask = kept(x, gamma)
            bits = np.unpackbits(tensors[f"mask.{layer}"].numpy(), bitorder="little")
            errors[f"mask.{layer}"] = float((bits[:mask.numel()] != mask.numpy()).sum()
                                            + bits[mask.numel():].sum())
            x = (x.reshape(-1) * mask).view(-1, x.shape[-1])
            gradient = dout.reshape(-1, dout.shape[-1]).t() @ x
        errors[name] = error(gradient, tensors[f"grad.{name}"])
    worst = max(errors, key=lambda name: errors[name])
    passed = all(value <= LIMIT for value in errors.values())
    print(f"{os.path.basename(path)}: {len(errors)} tensors, worst {worst} {errors[worst]:.1e}: "
          f"{'equal' if passed else 'DIFFERENT'}")
    return passed


def main():
    torch.set_num_threads(1)
    paths = sys.argv[1:] or sorted(glob.glob(os.path.join(HERE, "dumps", "deit_*.safetensors")))
    if not paths:
        sys.exit("check_timm.py: no dumps in dumps/; run make_dumps.sh")
    if not all([check(path) for path in paths]):
        sys.exit(1)


if __name__ == "__main__":
    main()
