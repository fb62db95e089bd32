"""Reads and writes safetensors files with numpy alone, so that no package is needed.

Layout: u64 length of the header (little endian), the header (JSON), the data. An entry of the
header is name -> {dtype, shape, data_offsets}, offsets counted from the start of the data.
numpy has no bfloat16: such a tensor is an array of the type BFLOAT16, 16 bits without a meaning, which
data/convert.py turns into float32.
"""
import json
import os
import tempfile

import numpy as np

BFLOAT16 = np.dtype([("bits", "<u2")])
DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16,
          "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
          "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
          "BOOL": np.dtype("?")}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # the limit of the published readers


def save(path, tensors, metadata=None):
    """tensors: {name: array}, written in this order, wider types first so that all are aligned."""
    header, offset, arrays = {}, 0, []
    if metadata:
        header["__metadata__"] = {key: str(value) for key, value in metadata.items()}
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        array = np.asarray(array, order="C")
        header[name] = {"dtype": NAMES[array.dtype.newbyteorder("<")], "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
        arrays.append(array)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    directory = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays:
                file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path):
    """(tensors, metadata). A file that breaks the format raises a ValueError that says how."""
    with open(path, "rb") as file:
        content = file.read()
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(HEADER_LIMIT, len(content) - 8):
        raise ValueError(f"{path}: {len(content)} bytes cannot hold a header of {length} bytes; "
                         "not a safetensors file, or cut off")
    try:
        header = json.loads(content[8:8 + length])
        metadata = header.pop("__metadata__", {})
        entries = []
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if not all(type(n) is int and n >= 0 for n in (start, end, *entry["shape"])):
                raise ValueError(f"{name} has an offset or a side that is no natural number")
            entries.append((start, end, name, str(entry["dtype"]), entry["shape"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the header is not a safetensors header ({error})") from None
    data, expected, tensors = content[8 + length:], 0, {}
    for start, end, name, dtype, shape in sorted(entries):
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} has type {dtype}, expected one of {list(DTYPES)}")
        size = DTYPES[dtype].itemsize
        for side in shape:
            size *= side
        if start != expected or end - start != size or end > len(data):
            raise ValueError(f"{path}: {name} lies at bytes {start} to {end} of {len(data)}, "
                             f"expected {expected} to {expected + size}")
        tensors[name] = np.frombuffer(data[start:end], DTYPES[dtype]).reshape(shape)
        expected = end
    if expected != len(data):
        raise ValueError(f"{path}: {len(data) - expected} bytes behind the last tensor")
    return tensors, metadata
