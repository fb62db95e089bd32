#!/usr/bin/env python3
"""Makes data shards of CIFAR-100 (fine labels) or CIFAR-10.

    python3 data/cifar100.py --normalize imagenet                # downloads CIFAR-100, 161 MB; to fine-tune ImageNet weights
    python3 data/cifar100.py --classes 10                        # CIFAR-10
    python3 data/cifar100.py --archive cifar-100-python.tar.gz   # python or binary form, as downloaded

Writes data/cifar100_train.bin and data/cifar100_val.bin, 32 x 32 pixels. The trainer normalises by the mean
and the standard deviation in the header: the set's, or ImageNet's. Of the python form the pickles are read as
data: no code from the archive runs.
"""
import argparse
import gzip
import hashlib
import http.client
import io
import os
import sys
import tarfile
import urllib.request
import zlib

try:
    import numpy as np
except ImportError as error:
    sys.exit(f"data/cifar100.py: the Python package {error.name} is missing; install python3-numpy")

from convert import Refused, Restricted
from shard import ShardError, write_labelled

HERE = os.path.dirname(os.path.abspath(__file__))
HOME = "https://www.cs.toronto.edu/~kriz"
SHA256 = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "cifar-100-python.tar.gz": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}
# folder in the archive: classes, training files, test files, and where the label is:
# the key of a pickle, or the number of label bytes before the pixels, the last of which counts
FORMS = {
    "cifar-10-batches-py": (10, [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], "labels"),
    "cifar-10-batches-bin": (10, [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    "cifar-100-python": (100, ["train"], ["test"], "fine_labels"),
    "cifar-100-binary": (100, ["train.bin"], ["test.bin"], 2),
}
# mean and standard deviation of pixels / 255
STATISTICS = {
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    10: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    100: ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
}
PIXELS = 3 * 32 * 32
MOST_BYTES = 1 << 30  # of an unpacked archive; the largest has 186 MB


def fail(message):
    sys.exit(f"data/cifar100.py: {message}")


def download(classes):
    name = f"cifar-{classes}-binary.tar.gz"
    origin = f"{HOME}/{name}"
    print(f"downloading {origin}", flush=True)
    try:
        with urllib.request.urlopen(origin, timeout=60) as reply:  # raises on 4xx and 5xx
            packed = reply.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        fail(f"cannot download {origin} ({error}); get it another way and name the file with --archive")
    found = hashlib.sha256(packed).hexdigest()
    if found != SHA256[name]:
        fail(f"{origin} sent {len(packed)} bytes with SHA-256 {found}, expected {SHA256[name]}; try again later")
    return packed, origin


class Array:
    """What a pickled numpy array says of itself, as numpy's __setstate__ would get it."""
    state = None

    def set_state(self, state):
        self.state = state


# in the place of numpy's functions: nothing of numpy is called with arguments from a file
ALLOWED = {("_codecs", "encode"): lambda text, *_: text.encode("latin1"),  # bytes, as Python 3 writes them for Python 2
           ("numpy", "ndarray"): Array, ("numpy", "dtype"): lambda code, *_: code}
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    ALLOWED[module, "_reconstruct"] = lambda *_: Array()


def from_pickle(content, key):
    """Pixels uint8 (N, 3072) and labels of a batch in the python form, which is Python 2's."""
    batch = Restricted(io.BytesIO(content), ALLOWED, encoding="latin1").load()
    # as Python 3 writes it, the keys are bytes
    batch = {name.decode("latin1") if isinstance(name, bytes) else name: value for name, value in batch.items()}
    _, shape, dtype, fortran, data = batch["data"].state
    data = data.encode("latin1") if isinstance(data, str) else data
    labels = batch[key]
    if not (type(labels) is list and all(type(label) is int and 0 <= label <= 255 for label in labels)
            and shape == (len(labels), PIXELS) and dtype in ("u1", "|u1") and not fortran and len(data) == len(labels) * PIXELS):
        raise Refused(f"data of shape {shape} and type {dtype} for {len(labels)} labels, expected uint8 (N, {PIXELS})")
    return np.frombuffer(data, np.uint8).reshape(-1, PIXELS), np.array(labels, np.int64)


def from_binary(content, label_bytes):
    if len(content) % (label_bytes + PIXELS) != 0:
        raise Refused(f"{len(content)} bytes are not a multiple of {label_bytes + PIXELS}")
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + PIXELS)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def unpack(packed, origin, classes):
    """classes and, for training and test, images uint8 (N, 32, 32, 3) and labels."""
    files, wanted = {}, {f"{folder}/{name}" for folder, form in FORMS.items() for name in form[1] + form[2]}
    try:
        # unpacked to its end first, for only there gzip compares its checksum
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            fail(f"{origin} unpacks to more than {MOST_BYTES} bytes; it is no CIFAR archive")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                name = os.path.normpath(member.name)
                if member.isfile() and name in wanted:
                    files[name] = archive.extractfile(member).read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        fail(f"{origin} is damaged or cut off, or no .tar.gz ({error}); get it again")
    folders = {name.split("/")[0] for name in files}
    if len(folders) != 1:
        fail(f"{origin} has {'more than one' if folders else 'none'} of the folders {', '.join(FORMS)}; "
             "give one of the four archives as downloaded")
    folder = folders.pop()
    count, train, test, label = FORMS[folder]
    if classes not in (None, count):
        fail(f"{origin} is CIFAR-{count}, but --classes says {classes}")
    parts = []
    for names in (train, test):
        pixels, labels = [], []
        for name in names:
            member = f"{folder}/{name}"
            if member not in files:
                fail(f"{origin} lacks {member}: it is damaged or cut off; get it again")
            try:
                one = from_binary(files[member], label) if type(label) is int else from_pickle(files[member], label)
            except Refused as error:
                fail(f"{origin}: {member}: {error}")
            except Exception as error:  # a damaged pickle can raise anything
                fail(f"{origin}: {member} is damaged ({type(error).__name__}: {str(error)[:120]}); get it again")
            pixels.append(one[0])
            labels.append(one[1])
        labels = np.concatenate(labels)
        if len(labels) == 0 or labels.max() >= count:
            fail(f"{origin}: {folder} has {len(labels)} labels up to {max(labels, default=0)}, expected some below {count}")
        parts.append((np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels))
    return count, *parts


def main():
    parser = argparse.ArgumentParser(description="Makes data shards of CIFAR-100 or CIFAR-10.")
    parser.add_argument("--classes", type=int, choices=(10, 100), help="which set to download (default 100)")
    parser.add_argument("--archive", metavar="FILE", help="one of the four .tar.gz files (python or binary form), not a download")
    parser.add_argument("--normalize", choices=("cifar", "imagenet"), default="cifar",
                        help="whose mean and standard deviation the trainer applies; imagenet is what the published fine-tuning of "
                             "ImageNet weights uses (default cifar)")
    parser.add_argument("--train-out", metavar="FILE", help="default data/cifar100_train.bin or data/cifar10_train.bin")
    parser.add_argument("--val-out", metavar="FILE", help="default data/cifar100_val.bin or data/cifar10_val.bin")
    options = parser.parse_args()
    if options.archive:
        origin = options.archive
        try:
            with open(origin, "rb") as file:
                packed = file.read()
        except OSError as error:
            fail(f"cannot read {origin}: {error.strerror}")
        if hashlib.sha256(packed).hexdigest() not in SHA256.values():
            print(f"data/cifar100.py: note: {origin} is none of the four published archives, by its SHA-256", file=sys.stderr)
    else:
        packed, origin = download(options.classes or 100)
    # everything is read and checked before the first file is written
    classes, train, test = unpack(packed, origin, options.classes)
    mean, std = STATISTICS["imagenet" if options.normalize == "imagenet" else classes]
    for part, name, given in ((train, "train", options.train_out), (test, "val", options.val_out)):
        try:
            write_labelled(given or os.path.join(HERE, f"cifar{classes}_{name}.bin"), *part, classes, mean, std)
        except ShardError as error:
            fail(error)


if __name__ == "__main__":
    main()
