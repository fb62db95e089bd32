#!/usr/bin/env python3
"""Tests of the scripts in data/ and of dev/plot.py, on small images, archives and weights made here.

    python3 dev/test/test_data.py [./train_deit]

Needs numpy and Pillow. With torch and torchvision more is compared; without a trainer less is. What is
missing is named and not counted.
"""
import gzip
import hashlib
import http.server
import importlib
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import zipfile

ROOT = os.path.abspath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
for folder in ("data", "dev"):
    sys.path.insert(0, os.path.join(ROOT, folder))
sys.dont_write_bytecode = True
try:
    import numpy as np
    from PIL import Image
except ImportError as error:
    print(f"not run: the Python package {error.name} is missing; install python3-numpy and python3-pil\n0 passed, 0 failed")
    sys.exit(0)

import convert  # noqa: E402
import safetensors_file  # noqa: E402
from shard import Shard  # noqa: E402

passed = failed = 0
work = tempfile.mkdtemp(prefix="test_data.")
started = set()
trainer = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else os.path.join(ROOT, "train_deit")
random = np.random.default_rng(1)


def check(good, text):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print(f"NOT OK {text}", flush=True)


def at(*names):
    return os.path.join(work, *names)


def script(name, *arguments):
    """Runs a script as its own process; from the second time on in a fork of this one, which has imported numpy already."""
    arguments = [os.path.join(ROOT, name), *map(str, arguments)]
    module = os.path.basename(name)[:-3]
    if module not in started:
        started.add(module)
        importlib.import_module(module)
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=work)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(120)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = arguments
                os.chdir(work)
                sys.modules[module].main()
                code = 0
            except SystemExit as exit:
                code = exit.code if isinstance(exit.code, int) else exit.code is not None
                if code and exit.code is not code:
                    print(exit.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return types.SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def works(name, *arguments):
    done = script(name, *arguments)
    check(done.returncode == 0 and "Traceback" not in done.stderr, f"{name} {arguments}: code {done.returncode}: {done.stderr[-500:]}")
    return done


def refused(pattern, name, *arguments):
    """Exit code 1 and one line on stderr that names the script and holds the pattern."""
    done = script(name, *arguments)
    lines = [line for line in done.stderr.splitlines() if ": note: " not in line]
    check(done.returncode == 1 and len(lines) == 1 and lines[0].startswith(f"{name}: ") and pattern in lines[0],
          f"{name} {arguments} is not refused with {pattern!r}: code {done.returncode}: {done.stderr[-500:]}")


def content(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    return path


def run_trainer(good, pattern, *arguments):
    if not os.access(trainer, os.X_OK):
        return None
    done = subprocess.run([trainer, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    check((done.returncode == 0) == good and pattern in done.stdout + done.stderr, f"{arguments}: code {done.returncode}: {done.stderr[-300:]}")
    return done


# ---- ImageNet folders -------------------------------------------------------------------------------------------------
def smooth(height, width, channels=3):
    """Noise that has large parts, too: a filter that is not antialiased shows."""
    coarse = Image.fromarray(random.integers(0, 256, (3, 4, channels), dtype=np.uint8).squeeze()).resize((width, height), Image.BICUBIC)
    noise = random.integers(-60, 60, (height, width, channels)).squeeze()
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))


def imagenet_folder():
    folder = at("images")
    for label, name in enumerate(("n03", "n01", "n02 with a blank")):
        for i in range(10):
            os.makedirs(os.path.join(folder, name), exist_ok=True)
            height, width = random.integers(30, 140, 2)
            smooth(height, width).save(os.path.join(folder, name, f"{name}_{i}.JPEG"), quality=90)
    smooth(50, 70, 1).save(os.path.join(folder, "n01", "grey.JPEG"))
    smooth(60, 45).convert("CMYK").save(os.path.join(folder, "n01", "cmyk.jpg"))
    smooth(60, 45).convert("P").save(os.path.join(folder, "n02 with a blank", "palette.png"))
    smooth(33, 64).convert("RGBA").save(os.path.join(folder, "n02 with a blank", "alpha.PNG"))
    smooth(40, 40, 1).convert("LA").save(os.path.join(folder, "n02 with a blank", "grey_alpha.png"))
    smooth(32, 32).save(os.path.join(folder, "n02 with a blank", "already.png"))
    smooth(20, 31).save(os.path.join(folder, "n02 with a blank", "smaller.bmp"))
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
    smooth(48, 80).save(os.path.join(folder, "n03", "turned.jpg"), exif=exif)
    smooth(40, 40).save(os.path.join(folder, "n03", "zzz_lies.JPEG"), "PNG")  # as one of ImageNet's
    write(os.path.join(folder, "n03", "sub", "deeper.jpg"), content(os.path.join(folder, "n03", "n03_0.JPEG")))
    write(os.path.join(folder, "n03", "notes.txt"), b"no image")
    bad = [os.path.join("n01", "cut.JPEG"), os.path.join("n02 with a blank", "empty.JPEG"), os.path.join("n03", "text.JPEG")]
    write(os.path.join(folder, bad[0]), content(os.path.join(folder, "n01", "n01_0.JPEG"))[:-400])
    write(os.path.join(folder, bad[1]), b"")
    write(os.path.join(folder, bad[2]), b"<html>404</html>")
    # far too long once the shorter side is resized
    bad.append(os.path.join("n03", "thread.png"))
    Image.new("RGB", (3000, 1)).save(os.path.join(folder, bad[3]))
    return folder, bad


def expected_images(folder, bad, size):
    """[(pixels, label)] by the shortest way that Pillow offers, in the order of torchvision's ImageFolder."""
    result = []
    for label, name in enumerate(sorted(os.listdir(folder))):
        for root, _, files in sorted(os.walk(os.path.join(folder, name))):
            for file in sorted(files):
                path = os.path.join(root, file)
                if os.path.relpath(path, folder) in bad or file.endswith(".txt"):
                    continue
                image = Image.open(path).convert("RGB")
                width, height = image.size
                # torchvision.transforms.functional._compute_resized_output_size
                shape = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
                result.append((np.asarray(image.resize(shape, resample=Image.BICUBIC)), label))
    return result


def same_shard(paths, expected, classes, text):
    shards = [Shard(path) for path in paths]
    images = [(shard.image(i), int(shard.index[i]["label"])) for shard in shards for i in range(shard.count)]
    check(len(images) == len(expected) and all(np.array_equal(a, b) and x == y for (a, x), (b, y) in zip(images, expected)),
          f"{text}: {len(images)} images, expected {len(expected)}, or other pixels or labels")
    check(all(shard.classes == classes and shard.channels == 3 for shard in shards), f"{text}: classes or channels")
    return shards


def test_imagenet():
    folder, bad = imagenet_folder()
    expected = expected_images(folder, bad, 32)
    done = works("data/imagenet.py", folder, "--out", at("one"), "--size", 32, "--jobs", 1)
    shard = same_shard([at("one.bin")], expected, 3, "imagenet.py, one shard")[0]
    check(np.allclose(shard.mean, [0.485, 0.456, 0.406]) and np.allclose(shard.std, [0.229, 0.224, 0.225]), "ImageNet's mean and std")
    for name in bad:
        check(done.stderr.count(os.path.join(folder, name) + ": ") == 1, f"{name} is not named once: {done.stderr}")
    check(len(done.stderr.splitlines()) == len(bad) and f"{len(bad)} skipped" in done.stdout, f"{done.stdout}{done.stderr}")
    check(min(min(image.shape[:2]) for image, _ in expected) == max(min(image.shape[:2]) for image, _ in expected) == 32, "shorter sides")

    works("data/imagenet.py", folder, "--out", at("three"), "--size", 32, "--jobs", 3)
    check(content(at("one.bin")) == content(at("three.bin")), "--jobs 1 and --jobs 3 give other bytes")
    works("data/imagenet.py", folder, "--out", at("many"), "--size", 32, "--jobs", 3, "--per-shard", 7)
    paths = sorted(at(name) for name in os.listdir(work) if name.startswith("many_"))
    same_shard(paths, expected, 3, "imagenet.py, many shards")
    check(len(paths) == -(-(len(expected) + len(bad)) // 7) and not os.path.exists(at("many.part")), f"{paths}")

    # the order of a file, which leaves a folder out
    write(at("classes.txt"), b"n02 with a blank\nn01\n")
    works("data/imagenet.py", folder, "--out", at("chosen"), "--size", 32, "--classes", at("classes.txt"))
    chosen = [(image, 0) for image, label in expected if label == 1] + [(image, 1) for image, label in expected if label == 0]
    same_shard([at("chosen.bin")], chosen, 2, "--classes")

    script_name = "data/imagenet.py"
    refused("other size", script_name, folder, "--out", at("one"), "--size", 33)
    refused("other per_shard", script_name, folder, "--out", at("many"), "--size", 32, "--per-shard", 8)
    shutil.copy(at("one.bin"), at("stranger.bin"))
    refused("no " + at("stranger.json"), script_name, folder, "--out", at("stranger"), "--size", 32)
    refused("cannot read", script_name, at("nowhere"), "--out", at("x"))
    refused("has no folders", script_name, os.path.join(folder, "n01"), "--out", at("x"))
    refused("--size 0 is not in", script_name, folder, "--out", at("x"), "--size", 0)
    refused("x.part", script_name, folder, "--out", at("nowhere", "x"))
    write(at("classes.txt"), b"n01\nn04\n")
    refused("lacks 1 of the 2 classes", script_name, folder, "--out", at("x"), "--classes", at("classes.txt"))
    write(at("classes.txt"), b"n01\nn01\n")
    refused("1 names twice", script_name, folder, "--out", at("x"), "--classes", at("classes.txt"))
    write(at("empty", "a", "bad.jpg"), b"?")
    check("none of the 1 images" in script(script_name, at("empty"), "--out", at("x")).stderr, "no image can be read")
    write(at("many_00001.bin"), content(at("many_00001.bin"))[:-1])
    refused("many_00001.bin: has", script_name, folder, "--out", at("many"), "--size", 32, "--per-shard", 7)

    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except ImportError:
        print("not run: torchvision's ImageFolder and Resize (no torchvision here)")
        return expected
    for name in bad:
        os.unlink(os.path.join(folder, name))
    data = ImageFolder(folder, transforms.Resize(32, transforms.InterpolationMode.BICUBIC))
    same_shard([at("one.bin")], [(np.asarray(image), label) for image, label in data], 3, "imagenet.py against torchvision")
    return expected


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return file.read().split()
    except OSError:
        return []


def test_resume():
    """Killed after its first shard and in the middle of others, the same command ends with the bytes of an undisturbed run."""
    folder = at("slow")
    for i in range(24):
        path = os.path.join(folder, f"c{i % 2}", f"{i:02}.JPEG")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        smooth(500, 700).save(path)
    write(os.path.join(folder, "c0", "bad.JPEG"), b"no")
    arguments = [folder, "--size", 128, "--per-shard", 4, "--jobs", 2, "--out"]
    works("data/imagenet.py", *arguments, at("alone"))
    names = [f"_{k:05}.bin" for k in range(7)]
    first, kills = None, 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen([sys.executable, os.path.join(ROOT, "data/imagenet.py"), *map(str, arguments), at("killed")],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sum(os.path.exists(at("killed" + name)) for name in names) < wanted:
            time.sleep(0.001)
        time.sleep(0.03)
        workers = children(process.pid)
        if process.poll() is None:
            kills += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        if first is None:
            first = os.stat(at("killed_00000.bin")).st_mtime_ns
            refused("is not in", "data/imagenet.py", *arguments, at("killed"), "--jobs", 0)
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{worker}") and "Z" not in content(f"/proc/{worker}/stat").decode().split()[2] for worker in workers):
            if time.monotonic() > deadline:
                check(False, f"workers {workers} outlive their parent")
                break
            time.sleep(0.01)
    there = sum(os.path.exists(at("killed" + name)) for name in names)
    check(kills == 3 and there < 7, f"{kills} kills in the middle, {there} of 7 shards before the last run: nothing was left to resume")
    done = works("data/imagenet.py", *arguments, at("killed"))
    check(f"{there} of 7 shards are there already" in done.stdout and "; 1 skipped" in done.stdout, done.stdout)
    check(all(content(at("alone" + name)) == content(at("killed" + name)) for name in names), "killed and resumed: other bytes")
    check(content(at("alone.json")) == content(at("killed.json")), "killed and resumed: another manifest")
    check(os.stat(at("killed_00000.bin")).st_mtime_ns == first, "a finished shard was made again")
    check(not [name for name in os.listdir(work) if name.startswith("killed") and not name.endswith((".bin", ".json"))], "temporary files are left")

    # two at once: the second one must not take the folder of the first
    os.makedirs(at("both.part"))
    import fcntl
    lock = os.open(at("both.part"), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    refused("another run", "data/imagenet.py", *arguments, at("both"))
    os.close(lock)


# ---- pictures ---------------------------------------------------------------------------------------------------------
def test_pictures():
    paths = []
    for i, (height, width) in enumerate(((50, 90), (91, 40), (64, 64), (37, 41))):
        paths.append(at(f"picture_{i}.png"))
        smooth(height, width).save(paths[-1])
    for size, crop in ((32, 0.875), (28, 1.0), (33, 0.9)):
        works("data/pictures.py", *paths, "--out", at("pictures.bin"), "--size", size, "--crop-pct", crop)
        expected = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            scale = int(np.floor(size / crop))
            width, height = image.size
            image = image.resize((scale, int(scale * height / width)) if width <= height else (int(scale * width / height), scale), Image.BICUBIC)
            left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
            expected.append((np.asarray(image)[top:top + size, left:left + size], 0))
        same_shard([at("pictures.bin")], expected, 1000, f"pictures.py --size {size} --crop-pct {crop}")
    works("data/pictures.py", paths[0], "--out", at("grey.bin"), "--size", 28, "--like", os.path.join(ROOT, "data/fashion_val.bin"))
    grey = Shard(at("grey.bin"))
    check((grey.classes, grey.channels, grey.count) == (10, 1, 1) and np.allclose(grey.mean, 0.2860), "--like a shard of grey images")
    run_trainer(True, "", "-eval", 1, "-j", at("grey.bin"))
    works("data/pictures.py", *paths, "--out", at("pictures.bin"), "--size", 32)
    run_trainer(True, "", "-eval", 1, "-j", at("pictures.bin"), "-size", 32, "-patch", 8, "-chans", 3, "-classes", 1000)
    refused("cannot read", "data/pictures.py", paths[0], at("nowhere.jpg"), "--out", at("x.bin"))
    refused("--crop-pct 0.0", "data/pictures.py", paths[0], "--out", at("x.bin"), "--crop-pct", 0)
    refused("not a data shard", "data/pictures.py", paths[0], "--out", at("x.bin"), "--like", paths[0])
    check(not os.path.exists(at("x.bin")), "a refused picture leaves a shard")


# ---- CIFAR ------------------------------------------------------------------------------------------------------------
def python2_batch(pixels, labels):
    """The pickle as Python 2's cPickle wrote it into the archives, protocol 2: byte strings, numpy's old names."""
    def string(s):
        s = s.encode("latin1") if isinstance(s, str) else s
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + struct.pack("<i", len(s)) + s

    def integers(values):
        return b"](" + b"".join(b"K" + bytes([v]) for v in values) + b"e"

    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string("b") + b"\x87R"
             b"(K\x01" + b"J" + struct.pack("<i", len(pixels)) + b"M\x00\x0c\x86" + b"cnumpy\ndtype\n" + string("u1") + b"K\x00K\x01\x87R"
             b"(K\x03" + string("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(pixels.tobytes()) + b"tb")
    items = string("batch_label") + string("training batch 1 of 5") + string("data") + array
    for key, values in labels.items():
        items += string(key) + integers(values)
    return b"\x80\x02}(" + items + b"u."


def tar_gz(path, files, folder):
    with tarfile.open(path, "w:gz") as archive:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {at('executed')}",)


def test_cifar():
    for classes, parts in ((10, [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]), (100, ["train", "test"])):
        python, python3, binary, images = {"readme.html": b"?"}, {}, {"batches.meta.txt": b"?"}, {}
        for part in parts:
            n = 12
            pixels = random.integers(0, 256, (n, 3072), dtype=np.uint8)
            label = random.integers(0, classes, n).tolist()
            label[0] = classes - 1
            labels = {"labels": label} if classes == 10 else {"fine_labels": label, "coarse_labels": [x // 5 for x in label]}
            python[part] = python2_batch(pixels, labels)
            python3[part] = pickle.dumps({b"data": pixels, **{k.encode(): v for k, v in labels.items()}}, protocol=2)
            columns = [labels[key] for key in reversed(sorted(labels))] if classes == 10 else [labels["coarse_labels"], labels["fine_labels"]]
            binary[part + ".bin"] = np.concatenate([np.array(columns, np.uint8).T, pixels], 1).tobytes()
            # red, green and blue planes of rows
            images[part] = [(np.stack([row[c * 1024:(c + 1) * 1024].reshape(32, 32) for c in range(3)], 2), x) for row, x in zip(pixels, label)]
        train, val = sum((images[part] for part in parts[:-1]), []), images[parts[-1]]
        folders = ("cifar-10-batches-py", "cifar-10-batches-bin") if classes == 10 else ("cifar-100-python", "cifar-100-binary")
        archives = [tar_gz(at(f"{classes}_python.tar.gz"), python, folders[0]), tar_gz(at(f"{classes}_python3.tar.gz"), python3, folders[0]),
                    tar_gz(at(f"{classes}_binary.tar.gz"), binary, folders[1])]
        made = []
        for archive in archives:
            out = [archive[:-7] + "_train.bin", archive[:-7] + "_val.bin"]
            done = works("data/cifar100.py", "--archive", archive, "--train-out", out[0], "--val-out", out[1])
            check("is none of the four published" in done.stderr, "an archive that was not published is not called so")
            same_shard(out[:1], train, classes, f"{archive}, training")
            same_shard(out[1:], val, classes, f"{archive}, test")
            made.append([content(path) for path in out])
        check(made[0] == made[1] == made[2], f"CIFAR-{classes}: the forms of the archive give other shards")
        run_trainer(True, "", "-i", out[0], "-j", out[1], "-size", 32, "-patch", 8, "-chans", 3, "-classes", classes, "-b", 4, "-x", 2)
        run_trainer(False, f"has {classes} classes", "-i", out[0], "-j", out[1], "-size", 32, "-patch", 8, "-chans", 3, "-classes", classes + 1)

    works("data/cifar100.py", "--archive", archives[2], "--normalize", "imagenet", "--train-out", at("t.bin"), "--val-out", at("v.bin"))
    check(np.allclose(Shard(at("t.bin")).mean, [0.485, 0.456, 0.406]) and np.allclose(Shard(out[0]).mean, [0.5071, 0.4865, 0.4409]), "--normalize")

    out = ["--train-out", at("x.bin"), "--val-out", at("y.bin")]
    name = "data/cifar100.py"
    refused("but --classes says 10", name, "--archive", archives[2], "--classes", 10, *out)
    refused("cannot read", name, "--archive", at("nowhere"), *out)
    whole = content(archives[2])
    for part in (0, 5, len(whole) // 2, len(whole) - 4):
        refused("is damaged or cut off", name, "--archive", write(at("cut.tar.gz"), whole[:part]), *out)
    tar = gzip.decompress(whole)
    for part in (len(tar) // 2, len(tar) // 512 // 2 * 512):  # cut off before it was compressed
        refused("cut off", name, "--archive", write(at("cut.tar.gz"), gzip.compress(tar[:part])), *out)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    refused("is damaged or cut off", name, "--archive", write(at("flipped.tar.gz"), bytes(flipped)), *out)
    refused("has none of the folders", name, "--archive", tar_gz(at("other.tar.gz"), {"a": b"1"}, "other"), *out)
    bad = {"train.bin": binary["train.bin"], "test.bin": binary["test.bin"][:-1]}
    refused("are not a multiple of 3074", name, "--archive", tar_gz(at("bad.tar.gz"), bad, "cifar-100-binary"), *out)
    bad["test.bin"] = b"\x00\x64" + bytes(3072)
    refused("labels up to 100", name, "--archive", tar_gz(at("bad.tar.gz"), bad, "cifar-100-binary"), *out)
    bad = {"train": python["train"], "test": pickle.dumps({b"data": Malicious(), b"fine_labels": [1]}, protocol=2)}
    refused("asks for posix.system", name, "--archive", tar_gz(at("bad.tar.gz"), bad, "cifar-100-python"), *out)
    bad["test"] = b"\x80\x02cnumpy.testing._private.utils\nrunstring\n(U\x01ad\x85R."
    refused("asks for numpy.testing", name, "--archive", tar_gz(at("bad.tar.gz"), bad, "cifar-100-python"), *out)
    bad["test"] = python2_batch(np.zeros((3, 3072), np.uint8), {"fine_labels": [1, 2]})
    refused("for 2 labels", name, "--archive", tar_gz(at("bad.tar.gz"), bad, "cifar-100-python"), *out)
    bad["test"] = python["test"][:-200]
    refused("is damaged", name, "--archive", tar_gz(at("bad.tar.gz"), bad, "cifar-100-python"), *out)
    check(not os.path.exists(at("x.bin")) and not os.path.exists(at("y.bin")), "a refused archive leaves a shard")
    test_download(archives[2], out)


def test_download(archive, out):
    """A server of our own in the place of the data set's home: its errors are errors."""
    packed = content(archive)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/none"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(packed) + (1000 if self.path.startswith("/cut") else 0)))
            self.end_headers()
            self.wfile.write(packed)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    digest = hashlib.sha256(packed).hexdigest()
    for path, known, pattern in (("none", digest, "404"), ("cut", digest, "cannot download"), ("good", "0" * 64, "with SHA-256"), ("good", digest, None)):
        code = ("import sys, cifar100; cifar100.HOME = sys.argv[1]; cifar100.SHA256['cifar-100-binary.tar.gz'] = sys.argv[2]; "
                "sys.argv[1:] = sys.argv[3:]; cifar100.main()")
        done = subprocess.run([sys.executable, "-c", code, f"http://127.0.0.1:{server.server_port}/{path}", known, *out], capture_output=True, text=True,
                              timeout=60, env=dict(os.environ, PYTHONPATH=os.path.join(ROOT, "data"), no_proxy="*"))
        if pattern is None:
            check(done.returncode == 0 and os.path.exists(at("x.bin")), f"download: {done.stderr[-300:]}")
        else:
            check(done.returncode == 1 and pattern in done.stderr and len(done.stderr.splitlines()) == 1 and not os.path.exists(at("x.bin")),
                  f"download of {path}: code {done.returncode}: {done.stderr[-300:]}")
    server.shutdown()


# ---- weights ----------------------------------------------------------------------------------------------------------
class Stored:
    """A storage of the imitation of torch below."""

    def __init__(self, kind, data):
        self.kind, self.data = kind, data


def imitated_pth(path, make, zipped):
    """Writes what torch.save writes, without torch. make(tensor) gives the object; tensor(kind, flat array, offset, size, stride)."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    saved = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    for kind in convert.STORAGES:
        setattr(torch, kind + "Storage", type(kind + "Storage", (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        pass
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    storages = []

    class Made:
        def __init__(self, storage, *geometry):
            self.arguments = (storage, *geometry, False, {})

        def __reduce__(self):
            return _rebuild_tensor_v2, self.arguments

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            if not isinstance(thing, Stored):
                return None
            if thing not in storages:
                storages.append(thing)
            common = ("storage", getattr(torch, thing.kind + "Storage"), str(storages.index(thing)), "cpu", len(thing.data))
            return common if zipped else common + (None,)

    def tensor(kind, data, offset, size, stride):
        return Made(data if isinstance(data, Stored) else Stored(kind, data), offset, tuple(size), tuple(stride))

    try:
        sys.modules.update({"torch": torch, "torch._utils": utils})
        body = io.BytesIO()
        Pickler(body, 2).dump(make(tensor))
    finally:
        for name, module in saved.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", body.getvalue())
            for i, storage in enumerate(storages):
                archive.writestr(f"archive/data/{i}", storage.data.tobytes())
            archive.writestr("archive/version", "3\n")
    else:
        with open(path, "wb") as file:
            for thing in (convert.LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
                pickle.dump(thing, file, 2)
            file.write(body.getvalue())
            pickle.dump([str(i) for i in range(len(storages))], file, 2)
            for storage in storages:
                file.write(struct.pack("<q", len(storage.data)) + storage.data.tobytes())
    return path


def test_convert():
    base = random.standard_normal(60).astype("<f4")
    halves = random.standard_normal(8).astype("<f2")
    brains = (random.standard_normal(6).astype("<f4").view("<u4") >> 16).astype("<u2")
    doubles = random.standard_normal(5)
    expected = {
        "plain": base[:12].reshape(3, 4), "transposed": base[:12].reshape(3, 4).T, "part": base[7:27:2], "scalar": base[59],
        "expanded": np.broadcast_to(base[3:5], (4, 2)), "empty": np.zeros((0, 3), "<f4"), "half": halves.astype("<f4").reshape(2, 4),
        "brain": (brains.astype("<u4") << 16).view("<f4"), "double": doubles.astype("<f4"), "count": np.array(7, "<i8"),
        "small": np.array([-3, 4], "<i8"), "yes": np.array([1, 0, 1], "<i8")}

    def weights(tensor):
        shared = Stored("Float", base)
        return {
            "plain": tensor(None, shared, 0, (3, 4), (4, 1)), "transposed": tensor(None, shared, 0, (4, 3), (1, 4)),
            "part": tensor(None, shared, 7, (10,), (2,)), "scalar": tensor(None, shared, 59, (), ()),
            "expanded": tensor(None, shared, 3, (4, 2), (0, 1)), "empty": tensor(None, shared, 60, (0, 3), (3, 1)),
            "half": tensor("Half", halves, 0, (2, 4), (4, 1)), "brain": tensor("BFloat16", brains, 0, (6,), (1,)),
            "double": tensor("Double", doubles, 0, (5,), (1,)), "count": tensor("Long", np.array([7], "<i8"), 0, (), ()),
            "small": tensor("Char", np.array([-3, 4], "i1"), 0, (2,), (1,)), "yes": tensor("Bool", np.array([1, 0, 1], "?"), 0, (3,), (1,))}

    def same(path, expected, text, key=None, prefix=""):
        out = at("converted.safetensors")
        done = works("data/convert.py", path, out, *(("--key", key) if key else ()))
        if done.returncode == 0:
            found = safetensors_file.load(out)[0]
            check(found.keys() == expected.keys() and all(
                found[name].dtype == expected[name].dtype and found[name].shape == expected[name].shape and found[name].tobytes() == expected[name].tobytes()
                for name in expected), f"{text}: {[n for n in expected if n not in found or not np.array_equal(found[n], expected[n])]}")
        return done

    import argparse
    from collections import OrderedDict
    for zipped in (True, False):
        form = "zip" if zipped else "legacy"
        path = imitated_pth(at(f"{form}.pth"), weights, zipped)
        same(path, expected, form)
        rest = {"args": argparse.Namespace(lr=0.1, model="deit"), "epoch": 3, "best": np.float64(81.5), "optimizer": {"state": {0: {"step": 1}}}}
        path = imitated_pth(at(f"{form}_nested.pth"), lambda t: {
            "model_ema": OrderedDict(weights(t)), "model": {"w": t("Float", base, 0, (60,), (1,)), "n": 3}, **rest}, zipped)
        done = same(path, {"w": base}, f"{form}, nested")
        check("from 'model' (also there: model_ema)" in done.stdout and "left out, no tensors: n" in done.stdout, done.stdout)
        same(path, expected, f"{form}, --key", "model_ema")
        refused("has no tensors under 'args'", "data/convert.py", path, "--key", "args")
        path = imitated_pth(at(f"{form}_parallel.pth"), lambda t: {"net": {"module.w": t("Float", base, 0, (60,), (1,))}}, zipped)
        same(path, {"w": base}, f"{form}, DistributedDataParallel")
        outside = [((61,), (1,), 0), ((2,), (60,), 0), ((3, 4), (20, 7), 0), ((1,), (1,), 60), ((1 << 40,), (0,), 0), ((-1,), (1,), 0), ((2,), (-1,), 5),
                   ((1,) * 9, (1,) * 9, 0), ((2,), (1, 1), 0)]
        for size, stride, offset in outside:
            path = imitated_pth(at("bad.pth"), lambda t: {"w": t("Float", base, offset, size, stride)}, zipped)
            check("has a tensor w of" in raises(path), f"size {size}, stride {stride}, offset {offset} is read")
        path = imitated_pth(at("bad.pth"), lambda t: {"w": t("Double", np.array([1e300]), 0, (1,), (1,))}, zipped)
        check("float32 cannot hold" in raises(path), "a double that float32 cannot hold is read")
        for bad in ({"a": 1}, [1, 2], "text"):
            check("dictionary" in raises(imitated_pth(at("bad.pth"), lambda t: bad, zipped)), f"{bad} is read")
        check("choose one with --key" in raises(imitated_pth(at("bad.pth"), lambda t: {k: weights(t) for k in "ab"}, zipped)), "two models")
        path = imitated_pth(at("bad.pth"), lambda t: {**weights(t), "evil": Malicious()}, zipped)
        refused("asks for posix.system", "data/convert.py", path)
        path = imitated_pth(at("bad.pth"), lambda t: {**weights(t), "net": threading.Event}, zipped)
        refused("asks for threading.Event", "data/convert.py", path)
        whole = content(at(f"{form}.pth"))
        for part in (0, 1, 3, 30, len(whole) // 3, len(whole) - 1):
            check(raises(write(at("cut.pth"), whole[:part])), f"{form} cut off at {part} of {len(whole)} is read")
        refused("cut off", "data/convert.py", write(at("cut.pth"), whole[:len(whole) - 9]))
        # any damage is refused with a sentence, or changes numbers only
        wrong = []
        for _ in range(400):
            damaged = bytearray(whole)
            for _ in range(random.integers(1, 4)):
                damaged[random.integers(len(whole))] = random.integers(256)
            try:
                convert.read(write(at("damaged.pth"), bytes(damaged)))
            except convert.Refused:
                pass
            except Exception as error:
                wrong.append(repr(error))
        check(not wrong, f"{form}: {len(wrong)} of 400 damaged files end with {wrong[:3]}")
    # a bare pickle, and what a pickle can do without a forbidden name
    refused("asks for posix.system", "data/convert.py", write(at("bare.pth"), pickle.dumps(Malicious(), 2)))
    refused("not one of torch.save", "data/convert.py", write(at("bare.pth"), pickle.dumps({"a": 1}, 2)))
    refused("no file of torch.save", "data/convert.py", write(at("page.pth"), b"<html>404 not found</html>"))
    with zipfile.ZipFile(at("other.zip"), "w") as archive:
        archive.writestr("a.txt", "a")
    refused("torch.save did not make it", "data/convert.py", at("other.zip"))
    evil = b"\x80\x02ccollections\nOrderedDict\n}U\x03getcos\nsystem\ns\x86b."
    with zipfile.ZipFile(at("evil.pth"), "w") as archive:
        archive.writestr("archive/data.pkl", evil)
    refused("asks for os.system", "data/convert.py", at("evil.pth"))
    refused("cannot be read", "data/convert.py", at("nowhere.pth"))
    check(not os.path.exists(at("executed")), "a file's code ran")
    # the trainer starts from converted weights as from its own: the same loss of the picture of test_pictures
    if run_trainer(True, "", "-x", 1, "-v", 0, "-b", 4, "-n", 1, "-o", at("run"), "-j", at("grey.bin")):
        own = at("run", "model_00000001.safetensors")
        arrays = safetensors_file.load(own)[0]
        path = imitated_pth(at("own.pth"), lambda t: {"model": {
            name: t("Float", array.ravel(), 0, array.shape, [s // 4 for s in array.strides]) for name, array in arrays.items()}}, True)
        same(path, arrays, "the trainer's own weights")
        results = [run_trainer(True, "", "-eval", 1, "-w", weights, "-j", at("grey.bin")) for weights in (own, at("converted.safetensors"))]
        lines = [[line for line in result.stdout.splitlines() if "top" in line or "loss" in line] for result in results]
        check(lines[0] and lines[0] == lines[1], f"evaluation of converted weights: {lines}")
    else:
        print(f"not run: what needs a trainer (no {trainer})")
    test_convert_safetensors(same)
    test_convert_torch(same)


def raises(path):
    """The sentence with which convert.read refuses a file, or nothing."""
    try:
        convert.read(path)
    except convert.Refused as error:
        return str(error)
    return ""


def test_convert_safetensors(same):
    numbers = {"f8": random.standard_normal((2, 3)), "f4": random.standard_normal(5).astype("<f4"),
               "f2": random.standard_normal((4, 1)).astype("<f2"),
               "i8": np.array(7), "i4": np.arange(-2, 2, dtype="<i4"), "u1": np.arange(250, 256, dtype="u1"),
               "yes": np.array([True, False])}
    floats = {name: array.astype("<f4" if array.dtype.kind == "f" else "<i8") for name, array in numbers.items()}
    bits = (random.standard_normal((2, 2)).astype("<f4").view("<u4") >> 16 << 16)
    numbers["bf"], floats["bf"] = (bits >> 16).astype("<u2").view(safetensors_file.BFLOAT16), bits.view("<f4")
    path = at("numbers.safetensors")
    safetensors_file.save(path, numbers)
    done = same(path, floats, "safetensors of all types")
    for line in ("F64 tensors became float32", "F16 tensors became float32", "BF16 tensors became float32",
                 "U8 tensors became int64"):
        check(f"\n1 {line}\n" in done.stdout, f"{line} is not said: {done.stdout}")
    check("F32" not in done.stdout and "I64" not in done.stdout, f"types that stay are named: {done.stdout}")
    refused("which have no entries", "data/convert.py", path, at("x.safetensors"), "--key", "model")
    refused("would be overwritten", "data/convert.py", path)
    whole = content(path)
    for cut in (whole[:9], whole[:60], whole[:-1], whole + b"0", whole.replace(b'"F16"', b'"F15"')):
        refused("is damaged or cut off", "data/convert.py", write(at("cut.safetensors"), cut), at("x.safetensors"))
    safetensors_file.save(path, {"w": np.array([1e300])})
    refused("float32 cannot hold", "data/convert.py", path, at("x.safetensors"))
    test_positions()
    test_adapted()


def test_positions():
    """Position embeddings of other grids, against those of PyTorch in float64."""
    fixture, pairs = safetensors_file.load(os.path.join(ROOT, "dev/reference/fixtures/positions.safetensors"))[0], 0
    for name, expected in fixture.items():
        if name.startswith("out."):
            old, side = map(int, name.split(".")[1:])
            positions = fixture[f"in.{old}"]
            found = convert.interpolate_positions(positions, side, side)
            error = np.abs(found - expected).max() / np.abs(expected).max() if found.shape == expected.shape else np.inf
            check(error <= 2e-7 and found.dtype == "<f4",
                  f"positions of {old} to {side}: {error} of the largest from PyTorch's")
            check(np.array_equal(found[:, 0], positions[:, 0]),
                  f"positions of {old} to {side}: the class token's is kept")
            pairs += 1
    check(pairs > 10, f"{pairs} pairs of grids")
    # where the rows of a grid are alike, 4 x 9 patches are those of 9 x 9 in every row
    alike = np.concatenate([fixture["in.7"][:, :1], np.tile(fixture["in.7"][:, 1:8], (1, 7, 1))], 1)
    wide, square = (convert.interpolate_positions(alike, rows, 9)[0, 1:].reshape(rows, 9, -1) for rows in (4, 9))
    check(np.abs(wide - square[0]).max() < 1e-6 and np.ptp(square[0], 0).min() > 0.1,
          "a grid of 4 x 9: rows come first")


def vit_weights(grid, patch, classes, head="head"):
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 1 + grid * grid, 8),
              "patch_embed.proj.weight": (8, 3, patch, patch),
              "norm.weight": (8,), f"{head}.weight": (classes, 8), f"{head}.bias": (classes,)}
    return {name: random.standard_normal(shape).astype("<f4") for name, shape in shapes.items()}


def test_adapted():
    """Weights for another image size and number of classes."""
    def convert_to(arrays, *options):
        safetensors_file.save(at("vit.safetensors"), arrays)
        done = works("data/convert.py", at("vit.safetensors"), at("out.safetensors"), *options)
        return safetensors_file.load(at("out.safetensors"))[0], done.stdout

    good = vit_weights(7, 4, 10)
    found, out = convert_to(good, "--size", 28, "--classes", 10)
    check(all(np.array_equal(found[name], good[name]) for name in good), "what fits is changed")
    check("embeddings are those of 7 x 7 patches already" in out and "head has 10 classes already" in out, out)
    half = {name: array.astype("<f2") for name, array in good.items()}
    found, out = convert_to(half, "--size", "16x36", "--classes", 300, "--seed", 7)
    check("position embeddings of 7 x 7 patches became 4 x 9\n" in out, out)
    check("the layer head of 10 classes became an untrained one of 300, seed 7\n" in out and "6 F16 tensors" in out,
          out)
    expected = convert.interpolate_positions(half["pos_embed"].astype("<f4"), 4, 9)
    check(np.array_equal(found["pos_embed"], expected), "a size of 16 x 36 pixels is 4 x 9 patches")
    body = [name for name in good if not name.startswith(("head", "pos_embed"))]
    check(all(np.array_equal(found[name], half[name].astype("<f4")) for name in body), "the body is changed")
    head = found["head.weight"]
    check(head.shape == (300, 8) and head.dtype == "<f4" and abs(head.mean()) < 2e-3 and 0.019 < head.std() < 0.021,
          "weights of the head")
    check(found["head.bias"].shape == (300,) and not found["head.bias"].any(), "biases of the head")
    for seed, same_head in ((7, True), (8, False)):
        again = convert_to(good, "--classes", 300, "--seed", seed)[0]
        check(np.array_equal(again["head.weight"], head) == same_head
              and np.array_equal(again["pos_embed"], good["pos_embed"]), f"seed {seed}")
    check(abs(convert_to(good, "--classes", 3)[0]["head.weight"][0, 0] / 0.032486908 - 1) < 1e-6,
          "the first number of seed 1")
    resnet = {"conv1.weight": good["patch_embed.proj.weight"], "bn1.num_batches_tracked": np.array(3),
              "fc.weight": good["head.weight"], "fc.bias": good["head.bias"]}
    found, out = convert_to(resnet, "--classes", 5)
    check(found["fc.weight"].shape == (5, 8) and found["fc.bias"].shape == (5,) and found.keys() == resnet.keys(),
          "the head of a ResNet")
    path = imitated_pth(at("vit.pth"), lambda t: {"model": {
        name: t("Float", array.ravel(), 0, array.shape, [s // 4 for s in array.strides])
        for name, array in good.items()}}, True)
    works("data/convert.py", path, at("out.safetensors"), "--size", 56, "--classes", 2)
    found = safetensors_file.load(at("out.safetensors"))[0]
    check(found["pos_embed"].shape == (1, 197, 8) and found["head.weight"].shape == (2, 8),
          "a .pth file for another size and other classes")

    distilled = {**good, "dist_token": good["cls_token"]}
    cases = [("which do not divide 30 x 30", good, "--size", 30),
             ("which do not divide 28 x 30", good, "--size", "28x30"),
             ("has no position embeddings", resnet, "--size", 28), ("is a distilled DeiT", distilled, "--size", 56),
             ("is a distilled DeiT", distilled, "--classes", 5),
             ("has no linear layer", {"a": good["cls_token"]}, "--classes", 5),
             ("has no linear layer", {**good, "head.bias": good["norm.weight"]}, "--classes", 5)]
    for shape in ((1, 51, 8), (1, 1, 8), (2, 50, 8), (50, 8)):
        cases.append((f"position embeddings of the shape {shape}", {**good, "pos_embed": np.zeros(shape, "<f4")},
                      "--size", 28))
    cases.append(("expected those of a class token",
                  {name: array for name, array in good.items() if name != "cls_token"}, "--size", 56))
    for sentence, arrays, *options in cases:
        safetensors_file.save(at("bad.safetensors"), arrays)
        refused(sentence, "data/convert.py", at("bad.safetensors"), at("x.safetensors"), *options)
    for options in (("--size", "0"), ("--size", "28x"), ("--size", "28.5"), ("--classes", "0"), ("--classes", "many"),
                    ("--seed", "-1")):
        done = script("data/convert.py", at("vit.safetensors"), at("x.safetensors"), *options)
        check(done.returncode == 2 and f"argument {options[0]}: must be" in done.stderr,
              f"{options}: {done.returncode}: {done.stderr}")
    check(not os.path.exists(at("x.safetensors")), "a file that is refused is written")


def test_convert_torch(same):
    try:
        import torch
    except ImportError:
        print("not run: files written by torch (no torch here)")
        return
    import argparse
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.Linear(5, 6))
    state = net.state_dict()
    state["view"] = torch.randn(6, 8)[1:5, ::3].t()
    state["channels_last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state["half"], state["brain"], state["double"] = torch.randn(7).half(), torch.randn(3, 5).bfloat16(), torch.randn(4).double()
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 2))
    state["tied"] = state["2.weight"]
    state["int"], state["bool"], state["none"], state["scalar"] = torch.arange(4, dtype=torch.int16), torch.tensor([True, False]), torch.zeros(0, 2), torch.tensor(2.5)
    expected = {name: value.detach().contiguous().to(torch.float32 if value.is_floating_point() else torch.int64).numpy() for name, value in state.items()}
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    for zipped in (True, False):
        form = f"torch {torch.__version__}, {'zip' if zipped else 'legacy'}"
        torch.save(state, at("t.pth"), _use_new_zipfile_serialization=zipped)
        same(at("t.pth"), expected, form)
        torch.save({"model": state, "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=torch.tensor(0.1), device=torch.device("cpu"),
                    shape=torch.Size([2])), "epoch": 7, "acc": np.float32(3)}, at("t.pth"), _use_new_zipfile_serialization=zipped)
        same(at("t.pth"), expected, f"{form}, checkpoint")
        torch.save(net, at("t.pth"), _use_new_zipfile_serialization=zipped)
        refused("asks for torch.nn.modules.container.Sequential", "data/convert.py", at("t.pth"))
        torch.save({"a": torch.randn(3).to(torch.complex64)}, at("t.pth"), _use_new_zipfile_serialization=zipped)
        refused("asks for torch.ComplexFloatStorage", "data/convert.py", at("t.pth"))
    torch.jit.script(torch.nn.Linear(2, 2)).save(at("t.pth"))
    refused("TorchScript", "data/convert.py", at("t.pth"))
    positions = torch.randn(1, 50, 3)
    grid = positions[:, 1:].double().reshape(1, 7, 7, 3).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(4, 12), mode="bicubic", antialias=True)
    expected = grid.permute(0, 2, 3, 1).reshape(1, 48, 3).numpy()
    error = np.abs(convert.interpolate_positions(positions.numpy(), 4, 12)[:, 1:] - expected).max()
    check(error < 5e-7, f"positions of 7 x 7 to 4 x 12 differ from torch's by {error}")


# ---- plot -------------------------------------------------------------------------------------------------------------
def test_plot():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("not run: dev/plot.py (no Python package matplotlib here; python3 -m pip install matplotlib)")
        return
    for name, shift in (("a", 0), ("b", 1)):
        lines = [f"s:{s} trl:{2 * 0.99 ** s + shift:.9g} lr:{0.001 * (1 - s / 200):.9g} norm:{'nan' if s == 7 else 1.5} ms:41.200\n" for s in range(1, 201)]
        lines.insert(100, f"s:100 tel:0.55 top1:{80.1 - shift} top5:99.2\n")
        lines.append(f"s:200 tel:0.5 top1:{82 - shift} top5:99.5\n")
        if name == "b":
            lines[4], lines[8] = "s:4 trl:2.2 lr:1.2.3\n", "\0\0garbage\n"
            lines.append("s:201 trl:1.5 lr:0.0")  # cut off
        write(at(name, "main.log"), "".join(lines).encode())
    done = works("dev/plot.py", at("a"), f"second={at('b', 'main.log')}", "-o", at("plot.png"))
    check("a: 200 steps, 2 evaluations, 0 damaged" in done.stdout and "second: 198 steps, 2 evaluations, 3 damaged" in done.stdout, done.stdout)
    image = np.asarray(Image.open(at("plot.png")).convert("RGB")).astype(int)
    for color in ((31, 92, 168), (211, 84, 0)):
        for name, half in (("left", image[:, :750]), ("right", image[:, 750:])):
            check((np.abs(half - color).sum(2) < 60).sum() > 100, f"no line of the color {color} in the {name} panel")
    # the first curve lies below the second: 1 less, on the same axes
    rows = [np.nonzero((np.abs(image[100:, 150:650] - color).sum(2) < 30).any(1))[0].mean() for color in ((31, 92, 168), (211, 84, 0))]
    check(rows[0] > rows[1] + 50, f"the higher loss is not drawn higher: rows {rows}")
    works("dev/plot.py", *[at("a")] * 8, "-o", at("plot.png"))
    refused("at most 8", "dev/plot.py", *[at("a")] * 9, "-o", at("plot.png"))
    # what a log has in addition is drawn: pale training accuracy, and dotted lines of the moving average
    write(at("d", "main.log"), "".join(["s:0 cached:1 total:2\n"] + [
        f"s:{s} trl:2 trtop1:{s / 4} lr:0.001 norm:1 ms:40 img:1552\n" for s in range(1, 201)] + [
        f"s:{s} tel:1.5 top1:10 top5:99\ns:{s} etel:1 etop1:40 etop5:99\n" for s in (100, 200)]).encode())
    done = works("dev/plot.py", at("d"), "-o", at("plot.png"))
    check("d: 200 steps, 2 evaluations, 0 damaged" in done.stdout, done.stdout)
    image = np.asarray(Image.open(at("plot.png")).convert("RGB")).astype(int)[:, 800:]
    check((np.abs(image[450:] - (31, 92, 168)).sum(2) < 60).sum() > 300, "the learning rate is not drawn")
    image = image[60:420]
    pale = (np.abs(image - (165, 190, 220)).sum(2) < 30)
    check(pale.any(0).sum() > 300, f"training accuracy covers {pale.any(0).sum()} columns")
    dark = [rows.sum() for rows in np.array_split((np.abs(image - (31, 92, 168)).sum(2) < 60), 2)]
    check(60 < dark[0] < 0.75 * dark[1], f"a dotted line above (40 %) and a whole one below (10 %): {dark} points")
    write(at("c", "main.log"), b"s:1 trl:nan lr:0 norm:nan ms:1\n")
    works("dev/plot.py", at("c"), "-o", at("plot.png"))
    write(at("c", "main.log"), b"s:1 tel:1 top1:10 top5:20\n")
    works("dev/plot.py", at("c"), "-o", at("plot.png"))
    write(at("c", "main.log"), b"hello\n")
    refused("has no line of a step", "dev/plot.py", at("c"), "-o", at("plot.png"))
    refused("cannot read", "dev/plot.py", at("nowhere"), "-o", at("plot.png"))
    refused("cannot write", "dev/plot.py", at("a"), "-o", at("nowhere", "plot.png"))
    refused("cannot write", "dev/plot.py", at("a"), "-o", at("plot.text"))


def main():
    try:
        for test in (test_imagenet, test_resume, test_pictures, test_cifar, test_convert, test_plot):
            start = time.monotonic()
            test()
            print(f"{test.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    finally:
        shutil.rmtree(work)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0 or passed == 0)


if __name__ == "__main__":
    main()
