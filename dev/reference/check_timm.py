#!/usr/bin/env python3
"""Checks every dump, and weights that go from the trainer to timm and back, against timm's own models.

    make PRECISION=FP32 train_deit && python3 dev/reference/check_timm.py [--trainer ./train_deit] [FILE ...]

Needs timm and safetensors (pip install torch timm). For maintainers: it shows that deit.py is the
model that it claims to be, and that weights keep their meaning, through data/convert.py, too. Weight gradients of dropped layers are
rebuilt from timm's activations by a plain sort, with none of deit.py's code. Without a trainer only the dumps
are checked. Probabilities are those that -predict prints, of all five classes.
"""
import argparse
import glob
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import rng

LIMIT = 1e-5  # of a tensor's largest element; float32 rounding reaches 2e-6
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "data"))
from shard import write_shard  # noqa: E402  (found by the line above)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


class Trips:
    """Weights between a trainer and timm, in a directory of its own."""

    def __init__(self, trainer, directory):
        self.trainer, self.directory, self.failed = os.path.abspath(trainer), directory, False
        self.random = np.random.RandomState(3)
        torch.manual_seed(3)

    def path(self, name):
        return os.path.join(self.directory, name)

    def run(self, *arguments):
        return subprocess.run([self.trainer, *map(str, arguments)], capture_output=True, text=True)

    def converted(self, name, *options):
        """The path of what data/convert.py makes of a file here."""
        path, script = self.path("converted_" + name), os.path.join(HERE, "..", "..", "data", "convert.py")
        subprocess.run([sys.executable, script, self.path(name), path, *map(str, options)], check=True, stdout=subprocess.DEVNULL)
        return path

    def shard(self, size, classes, images=16):
        pixels = self.random.randint(0, 256, (images, size, size, 3)).astype(np.uint8)
        write_shard(self.path("shard.bin"), ((image, i % classes) for i, image in enumerate(pixels)), images, classes, MEAN, STD)
        return (torch.from_numpy(pixels) / 255.0 - torch.tensor(MEAN)).div(torch.tensor(STD)).permute(0, 3, 1, 2)

    def verdict(self, what, error, limit):
        passed = error <= limit
        self.failed |= not passed
        print(f"{what}: {error:.1e}, at most {limit:.0e}: {'equal' if passed else 'DIFFERENT'}", flush=True)

    def probabilities(self, what, model, images, *arguments):
        """-predict of the trainer against softmax of timm's logits."""
        done = self.run("-predict", self.path("shard.bin"), *arguments)
        rows = re.findall("^image .*: (.*)", done.stdout, re.M)
        if done.returncode or len(rows) != len(images):
            sys.exit(f"{what}: {self.trainer} failed: {done.stderr}")
        model.eval()
        with torch.no_grad():
            expected = model(images).double().softmax(1)
        errors = [abs(float(p) - expected[i, int(c)].item()) for i, row in enumerate(rows) for c, p in re.findall(r"(\d+) (\S+?)(?:,|$)", row)]
        self.verdict(f"{what}, {len(errors)} probabilities of {expected.min():.0e} to {expected.max():.2f}", max(errors), 1e-5)

    def body(self, what, ours, model):
        """Every tensor but the head's: the same bits, but for interpolated positions."""
        theirs = {name: tensor for name, tensor in model.state_dict().items()}
        if {name: tuple(t.shape) for name, t in ours.items()} != {name: tuple(t.shape) for name, t in theirs.items()}:
            sys.exit(f"{what}: names or shapes differ")
        names = [name for name in theirs if not name.startswith("head.") and name != "pos_embed"]
        self.verdict(f"{what}: {len(names)} tensors of the body", max((ours[n] - theirs[n]).abs().max().item() for n in names), 0)
        largest = theirs["pos_embed"].abs().max().item()
        self.verdict(f"{what}: position embeddings", (ours["pos_embed"] - theirs["pos_embed"]).abs().max().item() / largest, 2e-6)

    def tiny(self, size, classes, source=None, source_classes=None):
        """timm's deit_tiny; its weights from a file, with what timm does to a head or grid that differs."""
        if source is None:
            model = timm.create_model("deit_tiny_patch16_224", img_size=size, num_classes=classes)
            with torch.no_grad():  # away from the initial values, at which all classes are equally likely
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            return model
        return timm.create_model("deit_tiny_patch16_224", img_size=size, num_classes=classes, pretrained=True,
                                 pretrained_cfg_overlay={"file": source, "num_classes": source_classes})

    def all(self):
        nano = ("-m", "deit_nano", "-size", 32, "-chans", 3, "-classes", 5)
        images = self.shard(32, 5)
        done = self.run(*nano, "-i", self.path("shard.bin"), "-j", self.path("shard.bin"), "-b", 8, "-l", 0.01, "-warmup", 0, "-e", 10, "-v", 0,
                        "-n", 20, "-o", self.path("nano"))
        if done.returncode or "fp32" not in done.stdout:
            sys.exit(f"check_timm.py: {self.trainer} does not train, or not in fp32: {done.stderr or done.stdout.splitlines()[0]}")
        model = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=5)
        checkpoint = self.path("nano/model_00000020.safetensors")
        model.load_state_dict(load_file(checkpoint))
        self.probabilities("trainer to timm, deit_nano of 20 steps", model, images, *nano, "-w", checkpoint)

        model = self.tiny(64, 5)
        save_file(model.state_dict(), self.path("five.safetensors"))
        for size, what in ((64, "the same grid"), (96, "positions 4 x 4 to 6 x 6"), (32, "positions 4 x 4 to 2 x 2")):
            images = self.shard(size, 5)
            self.probabilities(f"timm to trainer, deit_tiny, {what}", self.tiny(size, 5, self.path("five.safetensors"), 5), images,
                               "-m", "deit_tiny", "-size", size, "-classes", 5, "-w", self.converted("five.safetensors", "--size", size))

        save_file(self.tiny(64, 1000).state_dict(), self.path("thousand.safetensors"))
        images = self.shard(96, 5)
        flags = ("-m", "deit_tiny", "-size", 96, "-classes", 5, "-i", self.path("shard.bin"), "-j", self.path("shard.bin"), "-b", 8)
        weights = self.converted("thousand.safetensors", "--size", 96, "--classes", 5)
        done = self.run(*flags, "-w", weights, "-l", 0, "-x", 1, "-v", 0, "-n", 1, "-o", self.path("tiny"))
        if done.returncode:
            sys.exit(f"check_timm.py: a head of 1,000 classes: {done.stderr}")
        checkpoint = self.path("tiny/model_00000001.safetensors")
        self.body("1,000 classes to 5 and positions, here and in timm", load_file(checkpoint), self.tiny(96, 5, self.path("thousand.safetensors"), 1000))
        model = self.tiny(96, 5)
        model.load_state_dict(load_file(checkpoint))
        self.probabilities("trainer to timm, deit_tiny with its new head", model, images, *flags, "-w", checkpoint)
        ours = load_file(checkpoint)
        model = self.tiny(96, 7, checkpoint, 5)
        ours.update({name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")})
        self.body("trainer to timm, 5 classes to 7", ours, model)

        distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=96, num_classes=5)
        save_file(distilled.state_dict(), self.path("distilled.safetensors"))
        done = self.run("-m", "deit_tiny", "-size", 96, "-classes", 5, "-w", self.path("distilled.safetensors"), "-predict", self.path("shard.bin"))
        print(f"a distilled DeiT: {done.stderr.strip()}")
        self.failed |= done.returncode != 1 or "a distilled DeiT" not in done.stderr


def main():
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Checks dumps and weights against timm.")
    parser.add_argument("dumps", nargs="*", metavar="FILE", help="dumps (default: all in dumps/)")
    parser.add_argument("--trainer", default="./train_deit", help="a trainer in fp32 (default ./train_deit, if it is there)")
    options = parser.parse_args()
    paths = options.dumps or sorted(glob.glob(os.path.join(HERE, "dumps", "deit_*.safetensors")))
    if not paths:
        sys.exit("check_timm.py: no dumps in dumps/; run make_dumps.sh")
    passed = all([check(path) for path in paths])
    if os.path.exists(options.trainer):
        with tempfile.TemporaryDirectory() as directory:
            trips = Trips(options.trainer, directory)
            trips.all()
            passed &= not trips.failed
    else:
        print(f"there is no {options.trainer}: weights that go to timm and back were not checked")
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
