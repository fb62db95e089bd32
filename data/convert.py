#!/usr/bin/env python3
"""Turns a .pth file of torch.save into safetensors under the same names. Needs numpy, not torch.

    python3 data/convert.py deit_small_patch16_224-cd65a155.pth      # writes ...-cd65a155.safetensors
    python3 data/convert.py checkpoint.pth ema.safetensors --key model_ema

Both forms are read: zip, and the older one of several pickles in a row. A pickle is a program, and
torch.load of such days ran it; here a file gets the few names of ALLOWED, all of them inert stand-ins,
and one that asks for anything else is refused by that name. The weights may be the whole file or an
entry of it; a prefix "module." on every name (DistributedDataParallel) is taken off. All floating
types become float32, all integers and booleans int64; what is no tensor is left out, by name.
"""
import argparse
import os
import pickle
import sys
import zipfile
from typing import NamedTuple

try:
    import numpy as np
except ImportError as error:
    sys.exit(f"data/convert.py: the Python package {error.name} is missing; install python3-numpy")

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "dev", "reference"))
import safetensors_file  # noqa: E402  (found by the line above)

LEGACY_MAGIC, LEGACY_VERSION = 0x1950a86a20f9469cfc6c, 1001
# where checkpoints keep their weights, the first that is there is taken
USUAL_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema")
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
    dtype: str


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


BFLOAT16 = "bfloat16"  # numpy has none
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
        ALLOWED[module, kind + "Storage"] = StorageType(kind, dtype)


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


def itemsize(kind):
    return 2 if kind.dtype == BFLOAT16 else np.dtype(kind.dtype).itemsize


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
        length = count * itemsize(used[key].type)
        if length > size - file.tell():
            raise Refused(f"is cut off: storage {key} of {count} numbers does not fit into its {size} bytes")
        storages[key] = file.read(length)
    return content, lambda storage: storages[storage.key]


def to_array(name, tensor, read):
    """float32 or int64, contiguous. Everything that the file claims is checked before memory is taken."""
    storage, offset, size, stride = tensor
    if not (isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MOST_DIMS
            and whole(offset, storage.offset, *size, *stride)):
        raise Refused(f"has a tensor {name} of offset {offset!r}, size {size!r}, stride {stride!r}")
    data, numbers = read(storage), 1
    count = len(data) // itemsize(storage.type)
    for side in size:
        numbers *= side
    offset += storage.offset
    last = offset + sum((side - 1) * step for side, step in zip(size, stride))
    # a stride of 0 repeats numbers, so that a few bytes could claim any size
    if numbers > max(count, 1 << 24) or (numbers > 0 and last >= count):
        raise Refused(f"has a tensor {name} of size {size}, stride {stride}, offset {offset} in a storage of {count} numbers")
    bfloat16 = storage.type.dtype == BFLOAT16
    flat = np.frombuffer(data, "<u2" if bfloat16 else storage.type.dtype, count)
    if numbers == 0:
        view = flat[:0].reshape(size)
    else:
        view = np.lib.stride_tricks.as_strided(flat[offset:], size, [step * flat.itemsize for step in stride])
    if bfloat16:
        return (view.astype("<u4") << np.uint32(16)).view("<f4")  # the upper half of a float32
    if view.dtype.kind != "f":
        return view.astype("<i8", order="C")
    with np.errstate(over="ignore"):
        array = view.astype("<f4", order="C")
    if view.dtype.itemsize > 4 and not (np.isfinite(array) | ~np.isfinite(view)).all():
        raise Refused(f"has numbers in {name} that float32 cannot hold")
    return array


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


def read(path, key=None):
    """({name: array}, key, other keys, [what was left out], {type: tensors})"""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(0)
            content, storage_bytes = read_zip(path) if start[:2] == b"PK" else read_legacy(path, file)
        weights, key, others = find_weights(content, key)
        arrays, left_out, kinds, cache = {}, [], {}, {}

        def cached(storage):  # several tensors may share one
            if storage.key not in cache:
                data = storage_bytes(storage)
                if len(data) < storage.numel * itemsize(storage.type):
                    raise Refused(f"is cut off: storage {storage.key} has {len(data)} bytes for {storage.numel} numbers")
                cache[storage.key] = data
            return cache[storage.key]

        for name, value in weights.items():
            if isinstance(value, Tensor) and isinstance(name, str) and name != "__metadata__":
                arrays[name] = to_array(name, value, cached)
                kinds[value.storage.type.name] = kinds.get(value.storage.type.name, 0) + 1
            else:
                left_out.append(str(name)[:80])
        if not arrays:
            raise Refused("has tensors, but none under a name")
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise Refused(f"is damaged or cut off ({type(error).__name__}: {str(error)[:120]})") from None
    if all(name.startswith("module.") for name in arrays):
        arrays = {name[len("module."):]: array for name, array in arrays.items()}
    return arrays, key, others, left_out, kinds


def main():
    parser = argparse.ArgumentParser(description="Turns a .pth file into safetensors under the same names, without running code from it.")
    parser.add_argument("pth", help="what torch.save wrote")
    parser.add_argument("out", nargs="?", help="default: the same name with .safetensors")
    parser.add_argument("--key", help=f"entry of the file that has the weights (default: the whole file, or the first of {', '.join(USUAL_KEYS)})")
    options = parser.parse_args()
    out = options.out or os.path.splitext(options.pth)[0] + ".safetensors"
    try:
        if os.path.exists(out) and os.path.samefile(out, options.pth):
            raise Refused("would be overwritten; name another output")
        arrays, key, others, left_out, kinds = read(options.pth, options.key)
    except Refused as error:
        sys.exit(f"data/convert.py: {options.pth} {error}")
    try:
        safetensors_file.save(out, arrays, {"format": "pt"})
    except OSError as error:
        sys.exit(f"data/convert.py: cannot write {out}: {error.strerror or error}")
    print(f"wrote {out}: {len(arrays)} tensors, {sum(array.size for array in arrays.values())} numbers"
          + (f", from {key!r}" if key else "") + (f" (also there: {', '.join(others)})" if others else ""))
    for kind, count in kinds.items():
        if kind != "Float":
            print(f"{count} {kind} tensors became {'float32' if 'f' in STORAGES[kind] else 'int64'}")
    if left_out:
        print(f"left out, no tensors: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
