"""-w, -predict and -sheet of a ViT trainer: weights of foreign types, heads and grids, what is refused and how it is listed; predictions
against a ViT in numpy; the contact sheet against the shard's pixels, read with Pillow. Needs numpy and Pillow.

usage: test_weights.py ./train_deit
"""
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "dev" / "reference")]
from safetensors_file import DTYPES, NAMES, load, save  # noqa: E402  (found by the line above)
from shard import Shard, write_shard  # noqa: E402

DTYPES["F16"] = np.dtype("<f2")
NAMES[np.dtype("<f2")] = "F16"
PROGRAM, WORK = str(Path(sys.argv[1]).resolve()), Path(tempfile.mkdtemp())
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"NOT OK {what}")


def run(*arguments):
    done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.returncode, done.stdout, done.stderr


BF16 = "bf16" in run("-bench", 1, "-b", 1)[1].split("\n")[0]
RANDOM = np.random.RandomState(5)


def weights(size, patch, channels, classes, scale=0.15):
    """A deit_nano (width 64, 4 blocks, 4 heads) that is not near its initial values, so that its predictions differ."""
    C, shapes = 64, {}
    for block in range(4):
        name = f"blocks.{block}."
        shapes.update({name + "norm1.weight": (C,), name + "norm1.bias": (C,), name + "attn.qkv.weight": (3 * C, C), name + "attn.qkv.bias": (3 * C,),
                       name + "attn.proj.weight": (C, C), name + "attn.proj.bias": (C,), name + "norm2.weight": (C,), name + "norm2.bias": (C,),
                       name + "mlp.fc1.weight": (4 * C, C), name + "mlp.fc1.bias": (4 * C,), name + "mlp.fc2.weight": (C, 4 * C), name + "mlp.fc2.bias": (C,)})
    shapes.update({"cls_token": (1, 1, C), "pos_embed": (1, (size // patch) ** 2 + 1, C), "patch_embed.proj.weight": (C, channels, patch, patch),
                   "patch_embed.proj.bias": (C,), "norm.weight": (C,), "norm.bias": (C,), "head.weight": (classes, C), "head.bias": (classes,)})
    return {name: ((1 if "norm" in name and name.endswith("weight") else 0) + scale * RANDOM.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()}


def vit(w, images):
    """Probabilities of normalised images (B, H, W, CH), in float64, written from the definition."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    erf = np.vectorize(math.erf)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].reshape(len(w[name + ".weight"]), -1).T + w[name + ".bias"]

    B, S, P = len(images), images.shape[1], w["patch_embed.proj.weight"].shape[-1]
    x = images.reshape(B, S // P, P, S // P, P, -1).transpose(0, 1, 3, 5, 2, 4).reshape(B, (S // P) ** 2, -1)
    x = np.concatenate([np.broadcast_to(w["cls_token"], (B, 1, 64)), linear(x, "patch_embed.proj")], 1) + w["pos_embed"]
    for block in range(4):
        name = f"blocks.{block}."
        q, k, v = linear(norm(x, name + "norm1"), name + "attn.qkv").reshape(B, -1, 3, 4, 16).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / 4)
        x = x + linear((scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape), name + "attn.proj")
        h = linear(norm(x, name + "norm2"), name + "mlp.fc1")
        x = x + linear(h * 0.5 * (1 + erf(h / math.sqrt(2))), name + "mlp.fc2")
    logits = linear(norm(x, "norm")[:, 0], "head")
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def predictions(text):
    rows = [line for line in text.splitlines() if line.startswith("image")]
    found = []
    for i, line in enumerate(rows):
        match = re.fullmatch(rf"image {i}:((?: \d+ \d\.\d{{6}},?)+)", line)
        check(match is not None and not line.endswith(","), f"the line {line!r}")
        found.append([(int(pair.split()[0]), float(pair.split()[1])) for pair in match[1].split(",")])
    return found


def shard(name, size, channels, classes, images):
    mean, std = [0.3, 0.5, 0.4][:channels], [0.25, 0.2, 0.3][:channels]
    pixels = RANDOM.randint(0, 256, (images, size, size, channels)).astype(np.uint8)
    labels = RANDOM.randint(0, classes, images)
    write_shard(str(WORK / name), ((p, int(label)) for p, label in zip(pixels, labels)), images, classes, mean, std)
    return pixels, labels, (pixels / 255 - np.float32(mean)) / np.float32(std)


def test_predict():
    for size, patch, channels, classes, images in ((28, 4, 1, 10, 13), (12, 4, 3, 3, 7), (30, 5, 2, 17, 5)):
        # as many channels as the trainer takes; the shard of 4 classes says nothing, for its labels do not count
        pixels, _, normalised = shard("predict.bin", size, channels, 4, images)
        w = weights(size, patch, channels, classes)
        w["head.weight"][1], w["head.bias"][1] = w["head.weight"][0], w["head.bias"][0]  # two classes that are always equal
        expected, outputs = vit(w, normalised), []
        flags = ("-m", "deit_nano", "-size", size, "-patch", patch, "-chans", channels, "-classes", classes, "-predict", WORK / "predict.bin")
        for batch in (1, 3, 64):
            save(str(WORK / "w.safetensors"), w)
            code, out, err = run("-w", WORK / "w.safetensors", "-b", batch, *flags)
            check(code == 0 and err == "", f"-predict of {images} images at -b {batch}: {err}")
            outputs.append(predictions(out))
        found, worst = outputs[0], 0.0
        check(len(found) == images and all(len(row) == min(5, classes) for row in found), "a line an image, at most five classes")
        check(BF16 or outputs[0] == outputs[1] == outputs[2], "the same predictions at any batch size")
        for row, p in zip(found, expected):
            best = np.argsort(-p, kind="stable")[:5]
            worst = max([worst] + [abs(probability - p[c]) for c, probability in row])
            check(all(a[1] > b[1] or (a[1] == b[1]) for a, b in zip(row, row[1:])), f"sorted: {row}")
            check(BF16 or all(c == d or abs(p[c] - p[d]) < 1e-6 for (c, _), d in zip(row, best)), f"the best are {best}, found {row}")
            classes_found = [c for c, _ in row]
            check(0 not in classes_found or 1 not in classes_found or classes_found.index(1) == classes_found.index(0) + 1,
                  f"of two equal classes the lower comes first: {row}")
            check(1 not in classes_found or 0 in classes_found, f"of two equal classes the lower is kept: {row}")
        check(worst <= (0.02 if BF16 else 1e-5), f"probabilities differ from numpy's by {worst}")
        print(f"-predict at {size} pixels, {channels} channels, {classes} classes: probabilities within {worst:.1e} of numpy's")
        half = {name: value.astype(np.float16) for name, value in w.items()}
        save(str(WORK / "half.safetensors"), half)
        code, out, _ = run("-w", WORK / "half.safetensors", *flags)
        expected = vit({name: value.astype(np.float32) for name, value in half.items()}, normalised)
        worst = max(abs(probability - p[c]) for row, p in zip(predictions(out), expected) for c, probability in row)
        check(code == 0 and worst <= (0.02 if BF16 else 1e-5), f"F16 weights: probabilities differ by {worst}")
    w["head.bias"][2] = np.nan
    save(str(WORK / "w.safetensors"), w)
    code, out, err = run("-w", WORK / "w.safetensors", *flags)
    check(code == 1 and err.count("\n") == 1 and "logit of class 2 is not finite" in err, f"weights with a NaN: {err}")


def refused(what, tensors, listed, *flags, sentence="do not fit"):
    """Exit code 1; each of `listed` on a line of its own, then one sentence, nothing else."""
    save(str(WORK / "bad.safetensors"), tensors)
    code, _, err = run("-w", WORK / "bad.safetensors", "-x", 1, *flags)
    lines = err.splitlines()
    check(code == 1 and len(lines) == len(listed) + 1 and lines[-1].startswith("error: ") and sentence in lines[-1], f"{what}: {code}: {err}")
    for wanted, line in zip(listed, lines):
        check(line.endswith(wanted), f"{what}: {line!r} should end with {wanted!r}")


def test_loading():
    shard("val.bin", 28, 1, 10, 37)
    val, good = WORK / "val.bin", weights(28, 4, 1, 10)
    w = dict(good)
    del w["norm.bias"]
    w["blocks.2.attn.qkv.weight"] = w["blocks.2.attn.qkv.weight"].T.copy()
    w["blocks.3.mlp.fc1.bias"] = w["blocks.3.mlp.fc1.bias"].astype(np.float64)
    w["blocks.4.norm1.weight"], w["fc_norm.weight"] = w["norm.weight"], w["norm.weight"]
    refused("several wrong tensors", w, ["blocks.2.attn.qkv.weight: found F32 (64, 192), expected F32 (192, 64)",
                                         "blocks.3.mlp.fc1.bias: found F64 (256), expected F32 (256)", "norm.bias: missing, expected F32 (64)",
                                         "blocks.4.norm1.weight: found F32 (64), expected no such tensor",
                                         "fc_norm.weight: found F32 (64), expected no such tensor"], sentence="do not fit or are not of this model: 5;")
    distilled = {**good, "dist_token": w["cls_token"], "head_dist.weight": w["head.weight"], "head_dist.bias": w["head.bias"],
                 "pos_embed": np.zeros((1, 51, 64), np.float32)}
    refused("a distilled DeiT", distilled, [], sentence="is a distilled DeiT")
    two = dict(good, **{"head.weight": np.zeros((1000, 64), np.float32), "head.bias": np.zeros(1000, np.float32)})
    refused("another head at -eval 1", two, ["head.weight: found F32 (1000, 64), expected F32 (10, 64)", "head.bias: found F32 (1000), expected F32 (10)"],
            "-eval", 1)
    refused("a head that is none", dict(two, **{"head.bias": np.zeros(999, np.float32)}),
            ["head.weight: found F32 (1000, 64), expected F32 (10, 64)", "head.bias: found F32 (999), expected F32 (10)"])
    refused("positions that are no grid", dict(good, pos_embed=np.zeros((1, 51, 64), np.float32)), ["pos_embed: found F32 (1, 51, 64), expected F32 (1, 50, 64)"])
    refused("another head at -predict", two, ["head.weight: found F32 (1000, 64), expected F32 (10, 64)", "head.bias: found F32 (1000), expected F32 (10)"],
            "-predict", val)

    # a new head and other positions; at learning rate 0 the checkpoint holds what was loaded
    foreign = dict(two, pos_embed=RANDOM.standard_normal((1, 197, 64)).astype(np.float32))
    save(str(WORK / "foreign.safetensors"), foreign)
    loaded = {}
    for seed in (1, 2):
        code, out, err = run("-w", WORK / "foreign.safetensors", "-b", 8, "-j", val, "-x", 1, "-l", 0, "-v", 0, "-n", 1, "-seed", seed, "-o", WORK / f"out{seed}")
        check(code == 0 and err == "", f"foreign weights: {err}")
        check("weights: position embeddings of 14 x 14 patches interpolated to 7 x 7\n" in out, "what became of the positions is said")
        check("weights: the head of 1000 classes is replaced by a freshly initialised one of 10\n" in out, "what became of the head is said")
        loaded[seed] = load(str(WORK / f"out{seed}" / "model_00000001.safetensors"))[0]
    body = [name for name in good if not name.startswith(("head", "pos_embed"))]
    check(all(np.array_equal(loaded[1][name], foreign[name]) for name in body), "the body is loaded as it is")
    head = loaded[1]["head.weight"]
    check(head.shape == (10, 64) and 0.015 < head.std() < 0.025 and not loaded[1]["head.bias"].any(), "the new head is initialised as timm does it")
    check(not np.array_equal(head, loaded[2]["head.weight"]), "the new head depends on the seed")
    check(np.array_equal(loaded[1]["pos_embed"][:, 0], foreign["pos_embed"][:, 0]), "the class token's position is kept")
    model = WORK / "out1" / "model_00000001.safetensors"
    code, out, err = run("-w", model, "-j", val, "-eval", 1)
    check(code == 0 and "weights:" not in out, f"a checkpoint's weights fit: {err}")
    code, out, _ = run("-w", model, "-predict", val, "-b", 33)
    check(code == 0 and len(predictions(out)) == 37, "a checkpoint predicts")
    for bad in (("-predict", val), ("-predict", val, "-eval", "1", "-w", model), ("-predict", "nowhere", "-w", model)):
        code, out, err = run(*bad)
        check(code == 1 and err.count("\n") == 1 and err.startswith("error: "), f"{bad}: {err}")


def test_sheet():
    for size, patch, channels, images, batch in ((28, 4, 1, 70, 70), (20, 5, 3, 11, 11), (9, 3, 2, 4, 4), (16, 8, 4, 6, 5), (160, 32, 3, 2, 2)):
        mean, std = [0.3, 0.5, 0.4, 0.2][:channels], [0.25, 0.2, 0.3, 0.1][:channels]
        pixels = RANDOM.randint(0, 256, (images, size, size, channels)).astype(np.uint8)
        write_shard(str(WORK / "s.bin"), ((p, i % 10) for i, p in enumerate(pixels)), images, 10, mean, std)
        flags = ("-size", size, "-patch", patch, "-chans", channels, "-i", WORK / "s.bin", "-j", WORK / "s.bin", "-b", batch, "-o", WORK / "no")
        code, out, err = run(*flags, "-sheet", WORK / "s.png")
        check(code == 0 and err == "" and not (WORK / "no").exists(), f"-sheet: {err}")
        with Image.open(WORK / "s.png") as picture:
            picture.verify()  # every checksum of the chunks
        with Image.open(WORK / "s.png") as picture:
            sheet = np.asarray(picture)
            check(picture.mode == ("RGB" if channels > 2 else "L"), f"{channels} channels: {picture.mode}")
        check(("of 2 channels" in out) == (channels == 2) and ("of 4 channels" in out) == (channels == 4), f"{channels} channels: {out}")
        n = min(batch, 64)
        columns, scale = math.ceil(math.sqrt(n)), 1 + size // 128
        line = 5 * scale + 1
        wide, high = columns * (size + 2) + 2, math.ceil(n / columns) * (size + 2 + line) + 2
        check(sheet.shape[:2] == (high, wide), f"a sheet of {sheet.shape}, expected {high} x {wide}")
        shown, places = pixels[..., :3] if channels > 2 else pixels[..., 0], set()
        seen = {}  # the digit below the images of each class
        for b in range(n):
            left, top = 2 + b % columns * (size + 2), 2 + b // columns * (size + 2 + line)
            tile = sheet[top:top + size, left:left + size]
            distance = [np.abs(tile.astype(int) - p).max() for p in shown]
            check(min(distance) <= (2 if BF16 else 0), f"image {b} of the sheet is none of the shard's: {min(distance)} levels")
            best = int(np.argmin(distance))
            places.add(best)
            digit = sheet[top + size + 1:top + size + 1 + 5 * scale:scale, left:left + 3 * scale:scale]
            check(np.array_equal(seen.setdefault(best % 10, digit), digit), f"the label of image {b}")
        check(len({d.tobytes() for d in seen.values()}) == len(seen), "every label has its own digit")
        check(len(places) == n, "every image once")
    code, _, err = run(*flags, "-sheet", WORK / "nowhere" / "s.png")
    check(code == 1 and err.startswith("error: cannot write ") and err.count("\n") == 1, f"a sheet that cannot be written: {err}")
    check(not list(WORK.glob("*.tmp")), "no temporary file is left")
    code, _, _ = run("-flip", 1, "-sheet", WORK / "f.png", "-b", 16)
    train = Shard(str(ROOT / "data" / "fashion_train.bin"))
    images = {train.image(i).tobytes() for i in range(train.count)}
    sheet = np.asarray(Image.open(WORK / "f.png"))
    tiles = [sheet[t:t + 28, x:x + 28] for t in range(2, 130, 36) for x in range(2, 122, 30)]
    plain, mirrored = sum(t.tobytes() in images for t in tiles), sum(t[:, ::-1].tobytes() in images for t in tiles)
    check(BF16 or (plain + mirrored == 16 and 0 < mirrored < 16), f"-flip: {plain} images as they are, {mirrored} mirrored")


try:
    for test in (test_predict, test_loading, test_sheet):
        test()
finally:
    subprocess.run(["rm", "-r", str(WORK)], check=False)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0 or passed == 0)
