#!/usr/bin/env python3
"""Makes data shards of images in class folders, as ImageNet has them: FOLDER/n01440764/....JPEG.

    python3 data/imagenet.py imagenet/train --out data/imagenet_train --per-shard 20000
    python3 data/imagenet.py imagenet/val   --out data/imagenet_val   --per-shard 20000

writes data/imagenet_train_00000.bin, ... (without --per-shard: data/imagenet_train.bin) and
data/imagenet_train.json, which says what the shards hold. Images are RGB, resized (bicubic,
antialiased) until the shorter side has --size pixels, not cropped. Which images there are, their order
and their labels, the size of the longer side, and that EXIF orientation is ignored: all as torchvision's
ImageFolder and Resize have it. An image that cannot be read is named and skipped.

The same command goes on where it was killed: a shard under its name is whole and is not made again.
The same images give the same bytes with any --jobs (and the same version of Pillow).
"""
import argparse
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import time
import warnings

try:
    import numpy as np
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    sys.exit(f"data/imagenet.py: the Python package {error.name} is missing; install python3-numpy and python3-pil")

from shard import Shard, ShardError, write_shard

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as every published model uses them
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LONGEST = 65535  # pixels of a side that the trainers read


def fail(message):
    sys.exit(f"data/imagenet.py: {message}")


def load_image(path, mode="RGB"):
    """The pixels as stored, whatever EXIF says of the camera's orientation; grey, CMYK, palette and alpha become RGB."""
    with open(path, "rb") as file, Image.open(file) as image:
        return image.convert(mode)


def resize_shorter(image, size):
    width, height = image.size
    longer = size * max(width, height) // min(width, height)
    if longer > LONGEST:
        raise ValueError(f"{width} x {height} pixels, resized its longer side would have {longer}")
    return image.resize((size, longer) if width <= height else (longer, size), Image.BICUBIC)


def list_images(folder, classes_file):
    """(class names, [(path below folder, label)]) in the order of the shards"""
    try:
        there = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if classes_file:
            with open(classes_file, encoding="utf-8") as file:
                classes = [line.strip() for line in file if line.strip()]
        else:
            classes = there
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read {getattr(error, 'filename', None) or classes_file}: {getattr(error, 'strerror', None) or error}")
    if not there:
        fail(f"{folder} has no folders; each class needs one (ImageNet's validation images come without: sort them by their labels first)")
    if len(set(classes)) != len(classes):
        fail(f"{classes_file} has {len(classes) - len(set(classes))} names twice")
    missing = [name for name in classes if name not in there]
    if missing or not classes:
        fail(f"{folder} lacks {len(missing)} of the {len(classes)} classes of {classes_file}, {', '.join(missing[:3])}; one folder name a line")
    if len(classes) < len(there):
        print(f"{len(there) - len(classes)} folders are not in {classes_file} and left out")
    images = []
    for label, name in enumerate(classes):
        before = len(images)
        for root, _, files in sorted(os.walk(os.path.join(folder, name), followlinks=True)):
            images += [(os.path.relpath(os.path.join(root, file), folder), label)
                       for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
        if len(images) == before:
            fail(f"{os.path.join(folder, name)} has no images ({' '.join(EXTENSIONS)})")
    return classes, images


def work(pipe, lock, parents, folder, images, size, spool):
    """Resizes the images whose numbers come through the pipe, appends them to the spool and says where they lie."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too
    os.close(lock)  # else it would be held, and the other pipes open, behind a parent that was killed
    for other in parents:
        other.close()
    warnings.simplefilter("ignore")  # damaged EXIF, transparency: the pixels count
    try:
        with open(spool, "wb") as file:
            offset = 0
            for i in iter(pipe.recv, None):
                try:
                    pixels = np.asarray(resize_shorter(load_image(os.path.join(folder, images[i][0])), size))
                except MemoryError:
                    raise
                except UnidentifiedImageError:
                    pipe.send((i, "not an image"))
                    continue
                except Exception as error:  # a damaged image can raise anything
                    pipe.send((i, str(error) or type(error).__name__))
                    continue
                file.write(pixels.tobytes())
                pipe.send((i, (offset, pixels.shape)))
                offset += pixels.nbytes
        pipe.send(None)
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except (OSError, MemoryError) as error:
        pipe.send(("failed", f"{spool}: {error or 'out of memory'}"))


class Progress:
    def __init__(self, total, todo):
        self.total, self.todo, self.done = total, todo, 0
        self.start = self.last = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def step(self):
        self.done += 1
        now = time.monotonic()
        if now - self.last < (1 if self.terminal else 60):
            return
        self.last = now
        rate = self.done / (now - self.start)
        left = int((self.todo - self.done) / rate)
        print(f"{self.total - self.todo + self.done}/{self.total} images | {rate:.0f} images/s | "
              f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left   ", end="\r" if self.terminal else "\n", file=sys.stderr, flush=True)


def resize_all(folder, images, options, part, lock, progress):
    """For each image (number of the spool, offset, shape), or the reason why it cannot be read."""
    context = multiprocessing.get_context("fork")
    pipes, workers, results, following, finished = [], [], [None] * len(images), 0, 0
    for j in range(min(options.jobs, len(images))):
        ours, theirs = context.Pipe()
        pipes.append(ours)
        workers.append(context.Process(target=work, daemon=True, args=(
            theirs, lock, list(pipes), folder, images, options.size, os.path.join(part, f"spool_{j}"))))
        workers[-1].start()
        theirs.close()

    told = set()  # that there are no more

    def hand_out(pipe):
        nonlocal following
        if following < len(images):
            pipe.send(following)
            following += 1
        elif pipe not in told:
            pipe.send(None)
            told.add(pipe)

    for pipe in pipes + pipes:  # two each: a worker never waits for the next number
        hand_out(pipe)
    open_pipes = list(pipes)
    while open_pipes:
        for pipe in multiprocessing.connection.wait(open_pipes):
            try:
                reply = pipe.recv()
                if reply is None:
                    open_pipes.remove(pipe)
                    continue
                i, result = reply
                if i == "failed":
                    fail(result)
                results[i] = result if isinstance(result, str) else (pipes.index(pipe), *result)
                finished += 1
                progress.step()
                hand_out(pipe)
            except (EOFError, OSError):
                fail("a worker process died, perhaps for want of memory; run again with fewer --jobs")
    for worker in workers:
        worker.join()
    assert finished == len(images)
    return results


def make_shard(path, folder, images, classes, options, part, lock, progress):
    """Returns how many images were skipped. The header needs their number, so the pixels wait in spools."""
    results = resize_all(folder, images, options, part, lock, progress)
    bad = [(name, result) for (name, _), result in zip(images, results) if isinstance(result, str)]
    for name, reason in bad:
        print(f"data/imagenet.py: skipped {os.path.join(folder, name)}: {reason}", file=sys.stderr, flush=True)
    if len(bad) == len(images):
        fail(f"none of the {len(images)} images of {path} can be read")
    spools = {}
    for j in range(min(options.jobs, len(images))):
        name = os.path.join(part, f"spool_{j}")
        spools[j] = np.memmap(name, np.uint8, "r") if os.path.getsize(name) > 0 else None

    def items():
        for (_, label), result in zip(images, results):
            if not isinstance(result, str):
                j, offset, (height, width, channels) = result
                yield spools[j][offset:offset + height * width * channels].reshape(height, width, channels), label

    temporary = os.path.join(part, "shard")  # what a killed run leaves lies in this folder, and goes with it
    write_shard(temporary, items(), len(images) - len(bad), len(classes), MEAN, STD)
    os.replace(temporary, path)
    for j in spools:
        os.unlink(os.path.join(part, f"spool_{j}"))
    return len(bad)


def take_lock(part):
    """Makes the folder for temporary files, empty and ours alone."""
    if not os.path.isdir(part):
        os.mkdir(part)
    lock = os.open(part, os.O_RDONLY)
    for attempt in range(20):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == 19:
                fail(f"another run is writing to {part}; wait for it")
            time.sleep(0.1)
    for entry in os.scandir(part):
        os.unlink(entry.path)
    return lock


def check_manifest(path, manifest, shards, part):
    """Shards that are there must be of these images and options; a new manifest appears before the first shard."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            try:
                found = json.load(file)
            except ValueError:
                found = None
        if found != manifest:
            differ = [key for key in manifest if not isinstance(found, dict) or found.get(key) != manifest[key]]
            fail(f"{path} is of a run with other {', '.join(differ) or 'contents'}; choose another --out, or delete it and its shards")
    elif any(os.path.exists(name) for name in shards):
        fail(f"{next(name for name in shards if os.path.exists(name))} exists, but no {path} that says what is in it; "
             "choose another --out, or delete it")
    else:
        temporary = os.path.join(part, "manifest")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description="Makes data shards of images in class folders.")
    parser.add_argument("folder", help="has a folder for each class")
    parser.add_argument("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, or PREFIX_00000.bin, ... with --per-shard; and PREFIX.json")
    parser.add_argument("--size", type=int, default=256, metavar="N", help="pixels of the shorter side (default 256)")
    parser.add_argument("--per-shard", type=int, default=0, metavar="N", help="images in a shard (default: all in one); "
                        "20000 of ImageNet take about 5 GB")
    parser.add_argument("--classes", metavar="FILE", help="folder names, one a line, in the order of the labels (default: all, sorted)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: one a core)")
    options = parser.parse_args()
    for flag, value, least, most in (("--size", options.size, 1, 4096), ("--per-shard", options.per_shard, 0, 1 << 30), ("--jobs", options.jobs, 1, 1024)):
        if not least <= value <= most:
            fail(f"{flag} {value} is not in {least} to {most}")
    folder, out = options.folder, options.out
    classes, images = list_images(folder, options.classes)
    per_shard = options.per_shard or len(images)
    firsts = range(0, len(images), per_shard)
    shards = [f"{out}_{k:05}.bin" if options.per_shard else f"{out}.bin" for k in range(len(firsts))]
    names = hashlib.sha256("".join(f"{label} {name}\n" for name, label in images).encode("utf-8", "surrogateescape")).hexdigest()
    manifest = {"size": options.size, "per_shard": options.per_shard, "images": len(images), "names_sha256": names, "classes": classes}
    part = out + ".part"
    try:
        lock = take_lock(part)
        check_manifest(out + ".json", manifest, shards, part)
        planned = {path: images[first:first + per_shard] for path, first in zip(shards, firsts)}
        finished = [path for path in shards if os.path.exists(path)]
        skipped = sum(len(planned[path]) - Shard(path).count for path in finished)
        if finished:
            print(f"{len(finished)} of {len(shards)} shards are there already", flush=True)
        progress = Progress(len(images), len(images) - sum(len(planned[path]) for path in finished))
        for path in shards:
            if path not in finished:
                skipped += make_shard(path, folder, planned[path], classes, options, part, lock, progress)
                print(f"wrote {path}: {os.path.getsize(path)} bytes", flush=True)
        shutil.rmtree(part)
    except ShardError as error:
        fail(f"{error}; delete it and run again")
    except OSError as error:
        fail(f"cannot go on at {error.filename or out}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here")
    print(f"{len(images) - skipped} images of {len(classes)} classes in {len(shards)} shard{'s' * (len(shards) > 1)}; {skipped} skipped")


if __name__ == "__main__":
    main()
