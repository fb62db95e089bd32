"""-w, -predict and -sheet of a ViT trainer: what weights are refused and how it is said, and that data/convert.py makes
of foreign types, heads and grids what is read; predictions against a ViT in numpy; the batch of -sheet against the
pixels of the shard, and the picture that data/sheet.py draws of it. Needs numpy and Pillow.

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
sys.path.insert(0, str(ROOT / "data"))
from safetensors_file import BFLOAT16, load, save  # noqa: E402  (found by the line above)
from shard import Shard, write_shard  # noqa: E402

CONVERT = "data/convert.py makes weights for another image size"  # where the trainer's error points
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


def script(name, *arguments):
    done = subprocess.run([sys.executable, str(ROOT / "data" / name), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def converted(tensors, *options):
    """The path of what data/convert.py makes of these weights."""
    save(str(WORK / "in.safetensors"), tensors)
    code, _, err = script("convert.py", WORK / "in.safetensors", WORK / "converted.safetensors", *options)
    check(code == 0 and err == "", f"convert.py {options}: {err}")
    return WORK / "converted.safetensors"


BF16 = "bf16" in run("-w", "nowhere.safetensors")[1].split("\n")[0]
RANDOM = np.random.RandomState(5)


def weights(size, patch, channels, classes, scale=0.15):
    """A deit_nano (width 64, 4 blocks, 4 heads) that is not near its initial values, so that its predictions differ."""
    C, shapes = 64, {}
    for block in range(4):
        of_block = {"norm1.weight": (C,), "norm1.bias": (C,), "attn.qkv.weight": (3 * C, C), "attn.qkv.bias": (3 * C,),
                    "attn.proj.weight": (C, C), "attn.proj.bias": (C,), "norm2.weight": (C,), "norm2.bias": (C,),
                    "mlp.fc1.weight": (4 * C, C), "mlp.fc1.bias": (4 * C,),
                    "mlp.fc2.weight": (C, 4 * C), "mlp.fc2.bias": (C,)}
        shapes.update({f"blocks.{block}.{name}": shape for name, shape in of_block.items()})
    shapes.update({"cls_token": (1, 1, C), "pos_embed": (1, (size // patch) ** 2 + 1, C),
                   "patch_embed.proj.weight": (C, channels, patch, patch), "patch_embed.proj.bias": (C,),
                   "norm.weight": (C,), "norm.bias": (C,), "head.weight": (classes, C), "head.bias": (classes,)})

    def value(name, shape):
        return (1 if "norm" in name and name.endswith("weight") else 0) + scale * RANDOM.standard_normal(shape)
    return {name: value(name, shape).astype(np.float32) for name, shape in shapes.items()}


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
    tokens = np.broadcast_to(w["cls_token"], (B, 1, 64)), linear(x, "patch_embed.proj")
    x = np.concatenate(tokens, 1) + w["pos_embed"]
    for block in range(4):
        name = f"blocks.{block}."
        q, k, v = linear(norm(x, name + "norm1"), name + "attn.qkv").reshape(B, -1, 3, 4, 16).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.transpose(0, 1, 3, 2) / 4)
        x = x + linear((scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(x.shape),
                       name + "attn.proj")
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
        for part in ("head.weight", "head.bias"):
            w[part][1] = w[part][0]  # two classes that are always equal
        expected, outputs = vit(w, normalised), []
        flags = ("-m", "deit_nano", "-size", size, "-patch", patch, "-chans", channels, "-classes", classes,
                 "-predict", WORK / "predict.bin")
        for batch in (1, 3, 64):
            save(str(WORK / "w.safetensors"), w)
            code, out, err = run("-w", WORK / "w.safetensors", "-b", batch, *flags)
            check(code == 0 and err == "", f"-predict of {images} images at -b {batch}: {err}")
            outputs.append(predictions(out))
        found, worst = outputs[0], 0.0
        check(len(found) == images and all(len(row) == min(5, classes) for row in found),
              "a line an image, at most five classes")
        check(BF16 or outputs[0] == outputs[1] == outputs[2], "the same predictions at any batch size")
        for row, p in zip(found, expected):
            best = np.argsort(-p, kind="stable")[:5]
            worst = max([worst] + [abs(probability - p[c]) for c, probability in row])
            check(all(a[1] > b[1] or (a[1] == b[1]) for a, b in zip(row, row[1:])), f"sorted: {row}")
            check(BF16 or all(c == d or abs(p[c] - p[d]) < 1e-6 for (c, _), d in zip(row, best)),
                  f"the best are {best}, found {row}")
            classes_found = [c for c, _ in row]
            check(0 not in classes_found or 1 not in classes_found
                  or classes_found.index(1) == classes_found.index(0) + 1,
                  f"of two equal classes the lower comes first: {row}")
            check(1 not in classes_found or 0 in classes_found, f"of two equal classes the lower is kept: {row}")
        check(worst <= (0.02 if BF16 else 1e-5), f"probabilities differ from numpy's by {worst}")
        print(f"-predict at {size} pixels, {channels} channels, {classes} classes: within {worst:.1e} of numpy's")
        half = {name: value.astype(np.float16) for name, value in w.items()}
        brain = {name: (value.view("<u4") >> 16).astype("<u2").view(BFLOAT16) for name, value in w.items()}
        floats = ({name: value.astype(np.float32) for name, value in half.items()},
                  {name: (value["bits"].astype("<u4") << np.uint32(16)).view("<f4") for name, value in brain.items()})
        for kind, foreign, values in (("F16", half, floats[0]), ("BF16", brain, floats[1])):
            refused(f"{kind} weights", {**w, "norm.bias": foreign["norm.bias"]},
                    [f"norm.bias: found {kind} (64), expected F32 (64)"],
                    *flags, sentence=CONVERT)
            code, out, err = run("-w", converted(foreign), *flags)
            expected = vit(values, normalised)
            errors = [abs(found - p[c]) for row, p in zip(predictions(out), expected) for c, found in row]
            check(code == 0 and errors and max(errors) <= (0.02 if BF16 else 1e-5),
                  f"{kind} weights: {code}: {err}: probabilities differ by {max(errors, default=None)}")
    w["head.bias"][2] = np.nan
    save(str(WORK / "w.safetensors"), w)
    code, out, err = run("-w", WORK / "w.safetensors", *flags)
    check(code == 1 and err.count("\n") == 1 and "logit of class 2 is not finite" in err,
          f"weights with a NaN: {err}")


def refused(what, tensors, listed, *flags, sentence="do not fit"):
    """Exit code 1; each of `listed` on a line of its own, then one sentence, nothing else."""
    save(str(WORK / "bad.safetensors"), tensors)
    code, _, err = run("-w", WORK / "bad.safetensors", "-x", 1, *flags)
    lines = err.splitlines()
    check(code == 1 and len(lines) == len(listed) + 1 and lines[-1].startswith("error: ") and sentence in lines[-1],
          f"{what}: {code}: {err}")
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
                                         "blocks.3.mlp.fc1.bias: found F64 (256), expected F32 (256)",
                                         "norm.bias: missing, expected F32 (64)",
                                         "blocks.4.norm1.weight: found F32 (64), expected no such tensor",
                                         "fc_norm.weight: found F32 (64), expected no such tensor"],
            sentence="do not fit or are not of this model: 5;")
    distilled = {**good, "dist_token": w["cls_token"], "head_dist.weight": w["head.weight"],
                 "head_dist.bias": w["head.bias"],
                 "pos_embed": np.zeros((1, 51, 64), np.float32)}
    refused("a distilled DeiT", distilled, [], sentence="a distilled DeiT")
    foreign = dict(good, **{"head.weight": np.zeros((1000, 64), np.float32), "head.bias": np.zeros(1000, np.float32)},
                   pos_embed=RANDOM.standard_normal((1, 197, 64)).astype(np.float32))
    listed = ["pos_embed: found F32 (1, 197, 64), expected F32 (1, 50, 64)",
              "head.weight: found F32 (1000, 64), expected F32 (10, 64)",
              "head.bias: found F32 (1000), expected F32 (10)"]
    for flags in ((), ("-eval", 1), ("-predict", val)):
        refused(f"another head and grid, {flags}", foreign, listed, *flags, sentence=CONVERT)

    # converted; at learning rate 0 the checkpoint holds what was loaded
    path = converted(foreign, "--size", 28, "--classes", 10, "--seed", 3)
    code, _, err = run("-w", path, "-b", 8, "-j", val, "-x", 1, "-l", 0, "-v", 0, "-n", 1, "-o", WORK / "out")
    check(code == 0 and err == "", f"converted weights: {err}")
    model = WORK / "out" / "model_00000001.safetensors"
    expected, loaded = load(str(path))[0], load(str(model))[0] if code == 0 else {}
    check(expected["pos_embed"].shape == (1, 50, 64) and expected["head.weight"].shape == (10, 64),
          "convert.py makes the model's shapes")
    check(loaded.keys() == expected.keys() and all(np.array_equal(loaded[name], expected[name]) for name in expected),
          "what is loaded is the file's")
    code, _, err = run("-w", model, "-j", val, "-eval", 1)
    check(code == 0 and err == "", f"a checkpoint's weights fit: {err}")
    code, out, _ = run("-w", model, "-predict", val, "-b", 33)
    check(code == 0 and len(predictions(out)) == 37, "a checkpoint predicts")
    for bad in (("-predict", val), ("-predict", val, "-eval", "1", "-w", model),
                ("-predict", "nowhere", "-w", model)):
        code, out, err = run(*bad)
        check(code == 1 and err.count("\n") == 1 and err.startswith("error: "), f"{bad}: {err}")


def drawn(batch, levels, labels):
    """Compares the picture that data/sheet.py draws with the levels (n, H, W) or (n, H, W, 3). Each label must look the
    same every time, and unlike the others."""
    code, out, err = script("sheet.py", batch, "-o", WORK / "sheet.png")
    check(code == 0 and err == "", f"sheet.py: {err}")
    sheet, (n, H, W), seen = np.asarray(Image.open(WORK / "sheet.png")), levels.shape[:3], {}
    check(sheet.ndim == levels.ndim - 1, f"a sheet of the shape {sheet.shape} for images of {levels.shape}")
    scale, columns = math.ceil(56 / W), math.ceil(math.sqrt(n * H / W))
    for b in range(n):
        left, top = 4 + b % columns * (W * scale + 4), 4 + b // columns * (H * scale + 18)
        tile = sheet[top:top + H * scale, left:left + W * scale]
        large = levels[b].repeat(scale, 0).repeat(scale, 1)
        check(np.array_equal(tile, large), f"image {b} of {n}: its place in the sheet shows something else")
        text = sheet[top + H * scale:top + H * scale + 14, left:left + W * scale]
        check(np.array_equal(seen.setdefault(float(labels[b]), text), text), f"label {labels[b]} of image {b}")
    check(len({text.tobytes() for text in seen.values()}) == len(seen),
          f"of the labels {sorted(seen)} some look alike")
    return out


def test_sheet_script():
    """data/sheet.py alone, on batches made here, also with numbers that leave the range of levels."""
    for channels, H, W, n in ((1, 28, 28, 64), (3, 20, 30, 7), (2, 9, 3, 5), (4, 60, 44, 1)):
        mean, std = (RANDOM.uniform(0.2, 0.6, channels).astype(np.float32) for _ in range(2))
        levels = RANDOM.randint(-40, 300, (n, H, W, channels))
        image = ((levels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        labels = RANDOM.choice([0, 1, 7, 17, 71, 999], n).astype(np.float32)
        batch = {"image": image, "label": labels, "mean": mean, "std": std}
        save(str(WORK / "batch.safetensors"), batch)
        shown = np.clip(levels, 0, 255).astype(np.uint8)
        out = drawn(WORK / "batch.safetensors", shown[..., :3] if channels > 2 else shown[..., 0], labels)
        check(("of 2 channels" in out) == (channels == 2) and ("of 4 channels" in out) == (channels == 4),
              f"{channels} channels: {out}")
    bad = [({k: v for k, v in batch.items() if k != name}, "is no batch of images") for name in batch]
    bad += [({**batch, "label": labels[:0]}, "is no batch"), ({**batch, "image": image[0]}, "is no batch"),
            ({**batch, "std": std[:2]}, "is no batch")]
    for tensors, sentence in bad:
        save(str(WORK / "bad.safetensors"), tensors)
        code, _, err = script("sheet.py", WORK / "bad.safetensors", "-o", WORK / "no.png")
        check(code == 1 and err.startswith("data/sheet.py: ") and sentence in err and err.count("\n") == 1,
              f"a bad batch: {code}: {err}")
    (WORK / "bad.safetensors").write_bytes(b"no safetensors")
    for batch, out, sentence in (("bad", "no.png", "cannot hold a header"), ("nowhere", "no.png", "cannot read"),
                                 ("batch", "no/no.png", "cannot write"),
                                 ("batch", "no.text", "cannot write")):
        code, _, err = script("sheet.py", WORK / f"{batch}.safetensors", "-o", WORK / out)
        check(code == 1 and err.startswith("data/sheet.py: ") and sentence in err and err.count("\n") == 1,
              f"{batch}, {out}: {code}: {err}")
    check(not (WORK / "no.png").exists(), "a picture of a bad batch")


def test_sheet():
    """The batch that the trainer writes holds the shard's images, each once."""
    for size, patch, channels, images, batch in ((28, 4, 1, 70, 70), (20, 5, 3, 11, 11), (9, 3, 2, 4, 4),
                                                 (16, 8, 4, 6, 5), (160, 32, 3, 2, 2)):
        mean, std = [0.3, 0.5, 0.4, 0.2][:channels], [0.25, 0.2, 0.3, 0.1][:channels]
        pixels = RANDOM.randint(0, 256, (images, size, size, channels)).astype(np.uint8)
        write_shard(str(WORK / "s.bin"), ((p, i % 10) for i, p in enumerate(pixels)), images, 10, mean, std)
        flags = ("-size", size, "-patch", patch, "-chans", channels, "-i", WORK / "s.bin", "-j", WORK / "s.bin",
                 "-b", batch, "-o", WORK / "no")
        code, _, err = run(*flags, "-sheet", WORK / "s.safetensors")
        check(code == 0 and err == "" and not (WORK / "no").exists(), f"-sheet: {err}")
        written = load(str(WORK / "s.safetensors"))[0]
        n = min(batch, 64)
        shapes = {"image": (n, channels, size, size), "label": (n,), "mean": (channels,), "std": (channels,)}
        check({name: array.shape for name, array in written.items()} == shapes
              and all(array.dtype == "<f4" for array in written.values()),
              f"-sheet writes {[(name, array.shape) for name, array in written.items()]}")
        check(np.array_equal(written["mean"], np.float32(mean)) and np.array_equal(written["std"], np.float32(std)),
              "mean and std are the shard's")
        levels = 255 * (written["image"].transpose(0, 2, 3, 1) * np.float32(std) + np.float32(mean))
        places = []
        for b in range(n):
            distance = np.abs(levels[b] - pixels).reshape(images, -1).max(1)
            places.append(int(np.argmin(distance)))
            check(min(distance) <= (2 if BF16 else 1e-3),
                  f"image {b} of the batch is none of the shard's: {min(distance)} levels")
            check(written["label"][b] == places[b] % 10, f"the label of image {b}")
        check(len(set(places)) == n, "every image once")
        if not BF16:
            shown = pixels[places]
            drawn(WORK / "s.safetensors", shown[..., :3] if channels > 2 else shown[..., 0], written["label"])
    code, _, err = run(*flags, "-sheet", WORK / "nowhere" / "s.safetensors")
    check(code == 1 and err.startswith("error: cannot ") and err.count("\n") == 1,
          f"a batch that cannot be written: {err}")
    check(not list(WORK.glob("*.tmp")), "no temporary file is left")
    code, _, _ = run("-flip", 1, "-sheet", WORK / "f.safetensors", "-b", 16)
    train = Shard(str(ROOT / "data" / "fashion_train.bin"))
    images = {train.image(i).tobytes() for i in range(train.count)}
    batch = load(str(WORK / "f.safetensors"))[0]
    tiles = (255 * (batch["image"][:, 0] * batch["std"] + batch["mean"]) + 0.5).astype(np.uint8)
    plain, mirrored = sum(t.tobytes() in images for t in tiles), sum(t[:, ::-1].tobytes() in images for t in tiles)
    check(BF16 or (plain + mirrored == 16 and 0 < mirrored < 16),
          f"-flip: {plain} images as they are, {mirrored} mirrored")


try:
    for test in (test_sheet_script, test_predict, test_loading, test_sheet):
        test()
finally:
    subprocess.run(["rm", "-r", str(WORK)], check=False)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0 or passed == 0)
