#!/usr/bin/env python3
"""Reads and writes the data shards that the trainers load. data/README.md has the byte table.

A shard is one file: header, index, records. Numpy only. Both directions check everything that the
trainers check, so that a shard which this module writes, a trainer accepts.

    python3 data/shard.py FILE ...    checks every byte of each file and says what is in it
"""
import math
import os
import struct
import sys
import tempfile
import zlib

import numpy as np

MAGIC = b"DROPIT\r\n"  # the line ending reveals a copy in text mode
VERSION = 1
HEADER_BYTES = 128
CRC_OFFSET = 124
TASKS = {"classification": 0, "detection": 1}

# packed, little endian, without padding: the field order is the byte table's
HEADER = np.dtype([
    ("magic", "S8"), ("version", "<u4"), ("header_bytes", "<u4"), ("file_bytes", "<u8"),
    ("images", "<u4"), ("classes", "<u4"), ("channels", "<u4"), ("task", "<u4"),
    ("mean", "<f4", 4), ("std", "<f4", 4), ("index_offset", "<u8"), ("data_offset", "<u8"),
    ("zero", "u1", 36), ("crc", "<u4")])
INDEX = np.dtype([
    ("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("label", "<i4"),
    ("annotation_bytes", "<u4"), ("crc", "<u4"), ("zero", "<u4")])
assert HEADER.itemsize == HEADER_BYTES and INDEX.itemsize == 32


class ShardError(ValueError):
    """What was found, what was expected, what to do next: one sentence."""


def _require(condition, path, message):
    if not condition:
        raise ShardError(f"{path}: {message}")


class Shard:
    """A checked, read-only shard. Pixels stay on disk (mapped) until image() asks for them."""

    def __init__(self, path):
        self.path = path
        size = os.path.getsize(path)
        _require(size >= HEADER_BYTES, path,
                 f"has {size} bytes, less than the header's {HEADER_BYTES}; make the shard again")
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        raw = self._bytes[:HEADER_BYTES].tobytes()
        # numpy strips trailing zero bytes of an S8, so the magic is compared as raw bytes
        _require(raw[:8] == MAGIC, path,
                 f"starts with {raw[:8]!r}, not with {MAGIC!r}: not a data shard")
        header = np.frombuffer(raw, HEADER)[0]
        number = lambda field: int(header[field])
        _require(number("version") == VERSION, path,
                 f"is a shard of version {number('version')}, this program reads {VERSION}; "
                 "make the shard again with the script in data/")
        _require(number("header_bytes") == HEADER_BYTES, path,
                 f"says {number('header_bytes')} header bytes, version 1 has {HEADER_BYTES}")
        _require(number("file_bytes") == size, path,
                 f"has {size} bytes, its header says {number('file_bytes')}: copy it again")
        count = number("images")
        # every count is checked against the size before anything of that size is read
        data_offset = HEADER_BYTES + INDEX.itemsize * count
        _require(1 <= count and data_offset <= size, path,
                 f"says {count} images, which do not fit into its {size} bytes")
        _require(number("index_offset") == HEADER_BYTES and number("data_offset") == data_offset,
                 path, f"says that index and data start at {number('index_offset')} and "
                       f"{number('data_offset')}, expected {HEADER_BYTES} and {data_offset}")
        self.index = np.frombuffer(self._bytes[HEADER_BYTES:data_offset].tobytes(), INDEX)
        crc = zlib.crc32(self.index.tobytes(), zlib.crc32(raw[:CRC_OFFSET]))
        _require(crc == number("crc"), path,
                 f"header and index have CRC-32 {crc:08x}, expected {number('crc'):08x}: "
                 "the file is damaged")
        self.classes, self.channels = number("classes"), number("channels")
        self.task, self.count = number("task"), count
        self.mean = header["mean"][:self.channels].copy()
        self.std = header["std"][:self.channels].copy()
        self._check_fields(header, size)

    def _check_fields(self, header, size):
        path, index = self.path, self.index
        _require(1 <= self.channels <= 4, path, f"says {self.channels} channels, expected 1 to 4")
        _require(self.classes >= 1, path, "says 0 classes, expected at least 1")
        _require(self.task in TASKS.values(), path, f"says task {self.task}, expected 0 or 1")
        _require(np.isfinite(header["mean"]).all() and np.isfinite(header["std"]).all()
                 and (header["std"] > 0).all(), path,
                 f"has mean {header['mean']} and std {header['std']}, expected finite, std above 0")
        _require((header["mean"][self.channels:] == 0).all()
                 and (header["std"][self.channels:] == 1).all(), path,
                 "has a mean other than 0 or a std other than 1 for a channel that it lacks")
        _require(not header["zero"].any() and not index["zero"].any(), path,
                 "has reserved bytes that are not zero")
        # Python integers: the product of hostile sizes must not wrap around
        offset = int(header["data_offset"])
        for i, entry in enumerate(index.tolist()):
            start, height, width, label, annotation = entry[:5]
            _require(1 <= height <= 65535 and 1 <= width <= 65535, path, f"image {i} is {height}x{width}, sides are 1 to 65535")
            _require(start == offset, path,
                     f"image {i} starts at byte {start}, expected {offset} (no gaps, no overlap)")
            offset += height * width * self.channels + annotation
            _require(offset <= size, path, f"image {i} ends at byte {offset}, the file at {size}")
            if self.task == TASKS["classification"]:
                _require(0 <= label < self.classes, path,
                         f"image {i} has label {label}, expected 0 to {self.classes - 1}")
                _require(annotation == 0, path,
                         f"image {i} has {annotation} annotation bytes, expected 0")
            else:
                _require(label == -1, path, f"image {i} has label {label}, expected -1")
        _require(offset == size, path, f"has {size - offset} bytes behind the last image")

    def record(self, i):
        """The bytes of record i, checked against their CRC-32."""
        entry = self.index[i]
        start = int(entry["offset"])
        length = self.pixels(i) + int(entry["annotation_bytes"])
        data = self._bytes[start:start + length].tobytes()
        _require(zlib.crc32(data) == int(entry["crc"]), self.path,
                 f"image {i} has CRC-32 {zlib.crc32(data):08x}, expected {int(entry['crc']):08x}: "
                 "the file is damaged")
        return data

    def pixels(self, i):
        entry = self.index[i]
        return int(entry["height"]) * int(entry["width"]) * self.channels

    def image(self, i):
        """Image i as uint8 (H, W, C)."""
        shape = (int(self.index[i]["height"]), int(self.index[i]["width"]), self.channels)
        return np.frombuffer(self.record(i), np.uint8, self.pixels(i)).reshape(shape)

    def annotation(self, i):
        return self.record(i)[self.pixels(i):]

    def batch(self, numbers):
        """Images as float32 (B, C, H, W), normalised as the trainers do, and labels int32 (B)."""
        pixels = np.stack([self.image(i) for i in numbers]).astype(np.float32)
        pixels = (pixels / np.float32(255) - self.mean) / self.std
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), self.index["label"][numbers]


def write_shard(path, images, count, classes, mean, std, task="classification"):
    """Writes `count` items of `images`: tuples (uint8 (H, W, C), label[, annotation bytes]).

    The file appears under its name only when it is whole: a temporary name, sync, rename.
    """
    channels = len(mean)
    if not (1 <= channels <= 4 and len(std) == channels and count >= 1 and classes >= 1):
        raise ValueError(f"{count} images, {classes} classes, {channels} means, {len(std)} stds")
    if not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(mean, std)):
        raise ValueError(f"mean {mean} and std {std} must be finite, std above 0")
    index = np.zeros(count, INDEX)
    offset = HEADER_BYTES + index.nbytes
    directory = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.seek(offset)
            written = 0
            for item in images:
                pixels, label = item[0], item[1]
                annotation = item[2] if len(item) > 2 else b""
                if written == count:
                    raise ValueError(f"more than the {count} images announced")
                if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
                    raise ValueError(f"image {written} is {pixels.dtype} {pixels.shape}, "
                                     f"expected uint8 (H, W, {channels})")
                if task == "classification" and not (0 <= label < classes and not annotation):
                    raise ValueError(f"image {written}: label {label} of {classes} classes, "
                                     f"{len(annotation)} annotation bytes")
                record = pixels.tobytes() + annotation
                index[written] = (offset, pixels.shape[0], pixels.shape[1],
                                  label if task == "classification" else -1,
                                  len(annotation), zlib.crc32(record), 0)
                file.write(record)
                offset += len(record)
                written += 1
            if written != count:
                raise ValueError(f"{written} images, {count} announced")
            header = np.zeros(1, HEADER)
            header["magic"], header["version"] = MAGIC, VERSION
            header["header_bytes"] = HEADER_BYTES
            header["file_bytes"], header["images"], header["classes"] = offset, count, classes
            header["channels"], header["task"] = channels, TASKS[task]
            header["mean"][0, :channels], header["std"][0] = mean, 1
            header["std"][0, :channels] = std
            header["index_offset"] = HEADER_BYTES
            header["data_offset"] = HEADER_BYTES + index.nbytes
            start = header.tobytes()[:CRC_OFFSET]
            crc = zlib.crc32(index.tobytes(), zlib.crc32(start))
            file.seek(0)
            file.write(start + struct.pack("<I", crc) + index.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's files are private; a data file is not
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_labelled(path, images, labels, classes, mean, std):
    """A classification shard of an array of images, compared with its labels as read back; says what was written. Raises a ShardError."""
    try:
        write_shard(path, ((image, int(label)) for image, label in zip(images, labels)), len(labels), classes, mean, std)
        same = np.array_equal(Shard(path).index["label"], labels)  # what is on disk is what was meant
    except (OSError, ShardError) as error:
        raise ShardError(f"cannot write {path}: {error}") from None
    _require(same, path, "the labels read back differ")
    print(f"wrote {path}: {len(labels)} images, {os.path.getsize(path)} bytes")


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: shard.py FILE ...")
    for path in sys.argv[1:]:
        try:
            shard = Shard(path)
            for i in range(shard.count):
                shard.record(i)
        except (OSError, ShardError) as error:
            sys.exit(f"data/shard.py: {error}")
        height, width = shard.index["height"], shard.index["width"]
        task = {number: name for name, number in TASKS.items()}[shard.task]
        print(f"{path}: {task}, {shard.count} images of {height.min()}x{width.min()} to "
              f"{height.max()}x{width.max()}, {shard.channels} channels, {shard.classes} classes, "
              f"mean {shard.mean}, std {shard.std}: whole")


if __name__ == "__main__":
    main()
