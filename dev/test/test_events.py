"""Reads a trainer's TensorBoard event file by the format's definition, checks every checksum, and compares its numbers with main.log.

usage: test_events.py ./train_deit
"""
import struct
import subprocess
import sys
import tempfile
from pathlib import Path


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def fields(data):
    """(number, value) of each field of a message: ints, 8- and 4-byte strings, and bytes."""
    def varint(i):
        value = shift = 0
        while True:
            value |= (data[i] & 127) << shift
            shift += 7
            i += 1
            if data[i - 1] < 128:
                return value, i
    i = 0
    while i < len(data):
        key, i = varint(i)
        kind = key & 7
        if kind == 0:
            value, i = varint(i)
        else:
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, i = varint(i)
            value, i = data[i:i + length], i + length
        yield key >> 3, value


def read(path):
    """[(step, tag, value)], of the first record its version."""
    data, at, rows, version = path.read_bytes(), 0, [], None
    while at < len(data):
        size, size_crc = struct.unpack_from("<QI", data, at)
        record = data[at + 12:at + 12 + size]
        assert size_crc == masked(data[at:at + 8]), f"checksum of the length at byte {at}"
        assert struct.unpack_from("<I", data, at + 12 + size)[0] == masked(record), f"checksum of the record at byte {at}"
        event = dict(fields(record))
        if 3 in event:
            version = event[3]
        else:
            value = dict(fields(dict(fields(event[5]))[1]))
            rows.append((event[2], value[1].decode(), struct.unpack("<f", value[2])[0]))
        at += size + 16
    assert version == b"brain.Event:2", version
    return rows


assert crc32c(b"123456789") == 0xE3069283
with tempfile.TemporaryDirectory() as work:
    subprocess.run([sys.argv[1], "-b", "16", "-x", "7", "-v", "0", "-o", f"{work}/out", "-tb", f"{work}/out/tb"], check=True, stdout=subprocess.DEVNULL)
    rows = {(step, tag): value for step, tag, value in read(next(Path(work, "out", "tb").iterdir()))}
    checks = 0
    for line in Path(work, "out", "main.log").read_text().splitlines():
        entry = {key: float(value) for key, value in (part.split(":") for part in line.split())}
        tags = {"trl": "train/loss", "lr": "train/lr", "norm": "train/gradient_norm", "tel": "val/loss", "top1": "val/top1", "top5": "val/top5"}
        for key, tag in tags.items():
            if key in entry:
                got = rows[int(entry["s"]), tag]
                assert abs(got - entry[key]) <= 1e-6 * abs(entry[key]), (line, tag, got)
                checks += 1
    assert checks == 7 * 3 + 3, checks
print(f"{checks} passed, 0 failed")
