#!/usr/bin/env python3
"""Makes the weights that a trainer reads: safetensors in float32, from a .pth file of torch.save or from
safetensors, also for another image size or number of classes. Needs numpy, not torch.

    python3 data/convert.py deit_small_patch16_224-cd65a155.pth      # writes ...-cd65a155.safetensors
    python3 data/convert.py checkpoint.pth ema.safetensors --key model_ema
    python3 data/convert.py deit.safetensors small.safetensors --size 32 --classes 100 --seed 1

All floating types become float32, all integers and booleans int64; names stay. --size interpolates the
position embeddings of a ViT as timm's resample_abs_pos_embed does. --classes replaces the last linear
layer (head or fc) by an untrained one, initialised as timm does it for a ViT: biases are 0, and --seed
draws the weights from the normal distribution with standard deviation 0.02.

Both forms of torch.save are read: zip, and the older one of several pickles in a row. A pickle is a
program, and torch.load of such days ran it; here a file gets the few names of ALLOWED, all of them inert
stand-ins, and one that asks for anything else is refused by that name. The weights may be the whole file or
an entry of it; a prefix "module." on every name (DistributedDataParallel) is taken off; what is no tensor is
left out, by name.
"""
import argparse
import math
import os
import pickle
import re
import sys
import zipfile
from collections import Counter
from typing import NamedTuple

try:
    import numpy as np
except ImportError as error:
    sys.exit(f"data/convert.py: the Python package {error.name} is missing; install python3-numpy")

import safetensors_file
from safetensors_file import BFLOAT16, NAMES

LEGACY_MAGIC, LEGACY_VERSION = 0x1950a86a20f9469cfc6c, 1001
# where checkpoints keep their weights, the first that is there is taken
USUAL_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema")
UNCHANGED = "Float", "F32", "Long", "I64"  # types that stay
MOST_DIMS = 8  # what the trainers read


class Refused(ValueError):
    """What is wrong with the file, the rest of a sentence that begins with its name."""


class Inert:
    """Stands in for an object that does not matter: takes everything, keeps nothing."""

    def __init__(self, *_):
        pass


class Restricted(pickle._Unpickler):
    """Unpickles data. The names of `allowed`, {(module, name): stand-in}, are all that a file can call.

    The base is Python's own in Python: the one in C obeys a damaged file that asks for a memo of 64 GB.
    """
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, allowed, **options):
        super().__init__(file, **options)
        self.allowed = allowed

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise Refused(f"asks for {module}.{name}; only data is read, so it is refused and none of it was run")
        return self.allowed[module, name]

    def persistent_load(self, pid):
        raise Refused(f"refers to the foreign object {str(pid)[:80]!r}")

    def get_extension(self, code):
        raise Refused(f"asks for the registered object {code}; only data is read")

    def load_build(self):
        # the usual one sets attributes of whatever lies on the stack, classes and functions too
        state = self.stack.pop()
        if hasattr(self.stack[-1], "set_state"):
            self.stack[-1].set_state(state)
    dispatch[pickle.BUILD[0]] = load_build


class StorageType(NamedTuple):
    name: str
    dtype: np.dtype


class Storage(NamedTuple):
    type: StorageType
    key: str
    numel: int   # of the whole storage
    offset: int  # where this view of it begins


class Tensor(NamedTuple):
    storage: Storage
    offset: int
    size: tuple
    stride: tuple


def rebuild_tensor(storage, offset, size, stride, *_):
    return Tensor(storage, offset, size, stride)


def rebuild_parameter(tensor, *_):
    return tensor


STORAGES = {"Float": "<f4", "Double": "<f8", "Half": "<f2", "BFloat16": BFLOAT16, "Long": "<i8",
            "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"}
ALLOWED = {
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
}
# what training scripts save beside the weights
for inert in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar",
              "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
              "numpy._core.multiarray._reconstruct", "torch.Size", "torch.device", "pathlib.PosixPath",
              "builtins.set", "__builtin__.set"):
    ALLOWED[tuple(inert.rsplit(".", 1))] = Inert
for kind, dtype in STORAGES.items():
    for module in ("torch", "torch.cuda"):
        ALLOWED[module, kind + "Storage"] = StorageType(kind, np.dtype(dtype))


def whole(*numbers):
    return all(type(n) is int and n >= 0 for n in numbers)


class TensorUnpickler(Restricted):
    """Storages become names: their bytes come later, or never."""

    def persistent_load(self, pid):
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
            super().persistent_load(pid)
        kind, key, numel, view = pid[1], pid[2], pid[4], pid[5] if len(pid) > 5 else None
        if not (isinstance(kind, StorageType) and isinstance(key, str) and whole(numel)):
            raise Refused(f"has a storage of the kind {str(pid)[:80]!r}")
        return Storage(kind, key, numel, view[1] if view is not None else 0)


def read_zip(path):
    """(object, function that gives the bytes of a storage)"""
    archive = zipfile.ZipFile(path)
    pickles = [name for name in archive.namelist() if name.count("/") <= 1 and name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise Refused("is a zip file, but torch.save did not make it: it has no data.pkl")
    folder = pickles[0][:-len("data.pkl")]
    if folder + "constants.pkl" in archive.namelist():
        raise Refused("is a TorchScript program; save its state_dict() with torch.save")

    def member(name):
        info = archive.getinfo(folder + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"has a packed member {name}, which torch.save does not write")
        return archive.read(info)  # compares the CRC-32, too

    if folder + "byteorder" in archive.namelist() and member("byteorder") != b"little":
        raise Refused("has numbers in big-endian order")
    with archive.open(pickles[0]) as file:
        return TensorUnpickler(file, ALLOWED).load(), lambda storage: member("data/" + storage.key)


def read_legacy(path, file):
    used = {}

    class Noting(TensorUnpickler):
        def persistent_load(self, pid):
            storage = super().persistent_load(pid)
            used[storage.key] = storage
            return storage

    try:
        magic = Restricted(file, ALLOWED).load()
    except Refused:
        raise
    except Exception:
        raise Refused("is no file of torch.save, neither zip nor pickles, or it is cut off") from None
    if magic != LEGACY_MAGIC:
        raise Refused("is a pickle, but not one of torch.save")
    version, system = Restricted(file, ALLOWED).load(), Restricted(file, ALLOWED).load()
    if version != LEGACY_VERSION or not system["little_endian"]:
        raise Refused(f"is of version {version} on a machine {system}, expected {LEGACY_VERSION} and little-endian")
    content = Noting(file, ALLOWED).load()
    storages, size = {}, os.path.getsize(path)
    for key in Restricted(file, ALLOWED).load():
        count = int.from_bytes(file.read(8), "little")
        length = count * used[key].type.dtype.itemsize
        if length > size - file.tell():
            raise Refused(f"is cut off: storage {key} of {count} numbers does not fit into its {size} bytes")
        storages[key] = file.read(length)
    return content, lambda storage: storages[storage.key]


def widened(name, array):
    """float32 or int64, contiguous."""
    if array.dtype == BFLOAT16:
        bits = array["bits"].astype("<u4", order="C")
        return (bits << np.uint32(16)).view("<f4")  # bfloat16 is the upper half of a float32
    if array.dtype.kind != "f":
        return array.astype("<i8", order="C")
    with np.errstate(over="ignore"):
        floats = array.astype("<f4", order="C")
    if array.dtype.itemsize > 4 and not (np.isfinite(floats) | ~np.isfinite(array)).all():
        raise Refused(f"has numbers in {name} that float32 cannot hold")
    return floats


def to_array(name, tensor, read):
    """Everything that the file claims is checked before memory is taken."""
    storage, offset, size, stride = tensor
    if not (isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
            and len(size) == len(stride) <= MOST_DIMS and whole(offset, storage.offset, *size, *stride)):
        raise Refused(f"has a tensor {name} of offset {offset!r}, size {size!r}, stride {stride!r}")
    data, numbers = read(storage), 1
    count = len(data) // storage.type.dtype.itemsize
    for side in size:
        numbers *= side
    offset += storage.offset
    last = offset + sum((side - 1) * step for side, step in zip(size, stride))
    # a stride of 0 repeats numbers, so that a few bytes could claim any size
    if numbers > max(count, 1 << 24) or (numbers > 0 and last >= count):
        raise Refused(f"has a tensor {name} of size {size}, stride {stride}, offset {offset} "
                      f"in a storage of {count} numbers")
    flat = np.frombuffer(data, storage.type.dtype, count)
    if numbers == 0:
        return widened(name, flat[:0].reshape(size))
    steps = [step * flat.itemsize for step in stride]
    return widened(name, np.lib.stride_tricks.as_strided(flat[offset:], size, steps))


def find_weights(content, key):
    """(the dictionary of tensors, its key or None, the keys of others)"""
    def tensors(x):
        return isinstance(x, dict) and any(isinstance(value, Tensor) for value in x.values())

    if not isinstance(content, dict):
        raise Refused(f"holds no dictionary but {type(content).__name__}; save model.state_dict()")
    found = [k for k in content if isinstance(k, str) and tensors(content[k])]
    if key is not None:
        if key not in found:
            raise Refused(f"has no tensors under {key!r}; it has them under: {', '.join(found) or 'no key'}")
    elif tensors(content):
        return content, None, found
    else:
        usual = [k for k in USUAL_KEYS if k in found]
        if not usual and len(found) != 1:
            keys = ", ".join(str(k)[:40] for k in list(content)[:20])
            raise Refused(f"has tensors under {', '.join(found)}; choose one with --key" if found else
                          f"has no dictionary of tensors; its keys: {keys or 'none'}")
        key = (usual or found)[0]
    return content[key], key, [k for k in found if k != key]


def read_torch(path, key):
    """([(name, type in the file, array)], key, other keys, [what was left out]) of a file of torch.save"""
    with open(path, "rb") as file:
        packed = file.read(2) == b"PK"
        file.seek(0)
        content, storage_bytes = read_zip(path) if packed else read_legacy(path, file)
    weights, key, others = find_weights(content, key)
    found, left_out, cache = [], [], {}

    def cached(storage):  # several tensors may share one
        if storage.key not in cache:
            data = storage_bytes(storage)
            if len(data) < storage.numel * storage.type.dtype.itemsize:
                raise Refused(f"is cut off: storage {storage.key} has {len(data)} bytes for {storage.numel} numbers")
            cache[storage.key] = data
        return cache[storage.key]

    for name, value in weights.items():
        if isinstance(value, Tensor) and isinstance(name, str) and name != "__metadata__":
            found.append((name, value.storage.type.name, to_array(name, value, cached)))
        else:
            left_out.append(str(name)[:80])
    if not found:
        raise Refused("has tensors, but none under a name")
    return found, key, others, left_out


def read(path, key=None):
    """({name: array}, key, other keys, [what was left out], {(type in the file, type here): tensors})"""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{" and start[:2] != b"PK":  # safetensors: the header's length, then the header
            if key is not None:
                raise Refused("is of safetensors, which have no entries; leave out --key")
            tensors, others, left_out = safetensors_file.load(path)[0], [], []
            found = [(name, NAMES[value.dtype], widened(name, value)) for name, value in tensors.items()]
        else:
            found, key, others, left_out = read_torch(path, key)
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        text = str(error).removeprefix(f"{path}: ")[:120]
        raise Refused(f"is damaged or cut off ({type(error).__name__}: {text})") from None
    kinds = Counter((kind, array.dtype.name) for _, kind, array in found if kind not in UNCHANGED)
    prefix = "module." if all(name.startswith("module.") for name, _, _ in found) else ""
    return {name.removeprefix(prefix): array for name, _, array in found}, key, others, left_out, kinds


def cubic_weights(new, old):
    """(new, old): element i of the new side is the sum of the old elements, each times its weight in row i, as
    in PyTorch's F.interpolate(mode="bicubic", antialias=True): a cubic with a = -0.5 that reaches two elements
    of the coarser side to left and right."""
    scale = old / new
    x = np.abs(np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * scale) / max(scale, 1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


def interpolate_positions(positions, rows, columns):
    """(1, 1 + rows * columns, C) from (1, 1 + old * old, C), in float64. The first is the class token's and stays.
    In timm: resample_abs_pos_embed(positions, (rows, columns))"""
    old = math.isqrt(positions.shape[1] - 1)
    grid = positions[0, 1:].astype("<f8").reshape(old, old, -1)
    filters = cubic_weights(rows, old), cubic_weights(columns, old)
    grid = np.einsum("ia,jb,abc->ijc", *filters, grid, optimize=True)
    return np.concatenate([positions[:, :1], grid.reshape(1, rows * columns, -1).astype("<f4")], 1)


def set_size(arrays, height, width):
    """Interpolates the position embeddings for images of another size; returns a sentence about it."""
    positions, patch = arrays.get("pos_embed"), arrays.get("patch_embed.proj.weight")
    if positions is None or patch is None or patch.ndim != 4 or not patch.shape[2] == patch.shape[3] > 0:
        raise Refused("has no position embeddings of patches (pos_embed, patch_embed.proj.weight) for --size")
    side, shape = patch.shape[2], positions.shape
    patches = shape[1] - 1 if len(shape) == 3 else 0
    old = math.isqrt(max(patches, 0))
    if "cls_token" not in arrays or shape[0] != 1 or patches < 1 or old * old != patches:
        raise Refused(f"has position embeddings of the shape {shape}, expected those of a class token "
                      "and of a square grid of patches")
    if height % side or width % side:
        raise Refused(f"has patches of {side} x {side} pixels, which do not divide {height} x {width} pixels")
    rows, columns = height // side, width // side
    if (rows, columns) == (old, old):
        return f"the position embeddings are those of {old} x {old} patches already"
    arrays["pos_embed"] = interpolate_positions(positions, rows, columns)
    return f"position embeddings of {old} x {old} patches became {rows} x {columns}"


def set_classes(arrays, classes, seed):
    """Replaces the last linear layer by an untrained one; returns a sentence about it."""
    for name in "head", "fc":
        weight, bias = (arrays.get(f"{name}.{part}", np.zeros(0)) for part in ("weight", "bias"))
        if weight.ndim == 2 and bias.shape == weight.shape[:1]:
            break
    else:
        raise Refused("has no linear layer head or fc with weights and biases for --classes")
    if len(weight) == classes:
        return f"the layer {name} has {classes} classes already"
    # numpy promises the numbers of RandomState for all its versions
    normal = np.random.RandomState(seed).standard_normal((classes, weight.shape[1]))
    arrays[f"{name}.weight"] = (0.02 * normal).astype("<f4")
    arrays[f"{name}.bias"] = np.zeros(classes, "<f4")
    return f"the layer {name} of {len(weight)} classes became an untrained one of {classes}, seed {seed}"


def adapted(arrays, size, classes, seed):
    """Changes the weights for images of `size` (height, width) and for a number of classes, where these are given.
    Returns sentences that say what was done."""
    if (size or classes) and ("dist_token" in arrays or "head_dist.weight" in arrays):
        raise Refused("is a distilled DeiT: it has a distillation token (dist_token, head_dist) that the trainers "
                      "do not train; take the DeiT without `distilled` in its name")
    changes = [set_size(arrays, *size)] if size else []
    return changes + ([set_classes(arrays, classes, seed)] if classes else [])


def image_size(text):
    """(height, width) from N or HxW"""
    match = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be pixels from 1 to 9999, N or HxW, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def number(least, most):
    def parse(text):
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {text!r}")
        return int(text)
    return parse


def main():
    parser = argparse.ArgumentParser(description="Makes the weights that a trainer reads, safetensors in float32, "
                                     "from safetensors or a .pth file, of which it runs no code.")
    parser.add_argument("weights", help="what torch.save wrote, or safetensors")
    parser.add_argument("out", nargs="?", help="default: the same name with .safetensors")
    parser.add_argument("--key", help="entry of a .pth file that has the weights (default: the whole file, or the "
                        f"first of {', '.join(USUAL_KEYS)})")
    parser.add_argument("--size", type=image_size,
                        help="interpolate a ViT's position embeddings for images of N x N pixels, or HxW")
    parser.add_argument("--classes", type=number(1, 10**6),
                        help="make an untrained last layer for this number of classes")
    parser.add_argument("--seed", type=number(0, 2**32 - 1), default=1, help="of the untrained layer, default 1")
    options = parser.parse_args()
    out = options.out or os.path.splitext(options.weights)[0] + ".safetensors"
    try:
        if os.path.exists(out) and os.path.samefile(out, options.weights):
            raise Refused("would be overwritten; name another output")
        arrays, key, others, left_out, kinds = read(options.weights, options.key)
        changes = adapted(arrays, options.size, options.classes, options.seed)
    except Refused as error:
        sys.exit(f"data/convert.py: {options.weights} {error}")
    try:
        safetensors_file.save(out, arrays, {"format": "pt"})
    except OSError as error:
        sys.exit(f"data/convert.py: cannot write {out}: {error.strerror or error}")
    print(f"wrote {out}: {len(arrays)} tensors, {sum(array.size for array in arrays.values())} numbers"
          + (f", from {key!r}" if key else "") + (f" (also there: {', '.join(others)})" if others else ""))
    for (old, new), count in kinds.items():
        print(f"{count} {old} tensors became {new}")
    if left_out:
        print(f"left out, no tensors: {', '.join(left_out)}")
    for change in changes:
        print(change)


if __name__ == "__main__":
    main()
