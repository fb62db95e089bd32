#!/usr/bin/env python3
"""Shows runs in TensorBoard: reads the main.log that a trainer writes and writes TensorBoard's event files.

    dev/tensorboard.py RUN ...              follows the runs until Ctrl-C
    dev/tensorboard.py --once RUN ...       what the logs hold, for runs that have ended
    tensorboard --logdir DIR                shows the event files below DIR in a browser

RUN is a directory with main.log, or such a file. Event files are written beside main.log; with -o DIR, into DIR/NAME,
where NAME is the directory of the run. The time axis counts the milliseconds that the steps took, from the moment at
which this program starts. A run that is resumed cuts main.log back to its checkpoint: another event file then begins
at that step, and TensorBoard drops what it had from there on.
Needs the Python package tensorboard, but neither TensorFlow nor PyTorch.
"""
import argparse
import os
import re
import sys
import time

# without its own directory, for this file has the name of the package that it imports
sys.path = [folder for folder in sys.path if os.path.abspath(folder) != os.path.dirname(os.path.abspath(__file__))]
try:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError:
    sys.exit("dev/tensorboard.py: the Python package tensorboard is missing; python3 -m pip install tensorboard")

NUMBER = rb"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
LINE = re.compile(rb"s:\d{1,15}(?: \w+:" + NUMBER + rb")+\n")  # other lines are damaged; they are skipped
TRAIN_TAGS = {"norm": "gradient_norm", "ms": "ms_per_step", "img": "images_per_s"}


def fail(message):
    sys.exit(f"dev/tensorboard.py: {message}")


def tag(key, first):
    """TensorBoard's name of a number. The first key of its line says what the line is about: the memory plan (cached),
    a training step (trl), an evaluation of the weights' moving average (etel) or of the weights (any other)."""
    if first == "cached":
        return f"memory/{key}_MiB"
    if first.startswith("tr"):
        group, name = "train/", TRAIN_TAGS.get(key, key.removeprefix("tr"))
    elif first == "etel":
        group, name = "val/ema_", key.removeprefix("e").removeprefix("te")
    else:
        group, name = "val/", key.removeprefix("te")
    return group + re.sub("^l(?=_|$)", "loss", name.lstrip("_"))  # trl, tel; trl_box is one of several losses


class Run:
    """A main.log, the lines that were read of it, and the event file that is being written."""

    def __init__(self, path, folder):
        self.path, self.folder, self.writer = path, folder, None
        self.lines = [(0, 0, b"")]  # (first step after the line, byte after the line, line)
        self.clock = time.time()

    def begin(self):
        """Starts an event file. Its first event makes TensorBoard drop all numbers of that step and of later ones."""
        if self.writer is not None:
            self.writer.close()
        self.writer = EventFileWriter(self.folder)
        self.write(self.lines[-1][0], session_log=SessionLog(status=SessionLog.START))

    def write(self, step, **content):
        self.writer.add_event(Event(wall_time=self.clock, step=step, **content))

    def poll(self):
        """Writes what main.log holds beyond the lines that were read; begins anew where the file was cut."""
        with open(self.path, "rb") as file:
            count = len(self.lines)
            while True:  # until the last line is where it was read
                _, end, line = self.lines[-1]
                file.seek(end - len(line))
                if file.read(len(line)) == line:
                    break
                self.lines.pop()
            if self.writer is None or len(self.lines) < count:
                self.begin()
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the trainer has written a part of it
                next_step, end, _ = self.lines[-1]
                if LINE.fullmatch(line):
                    next_step = self.add(line.decode())
                self.lines.append((next_step, end + len(line), line))
        self.writer.flush()

    def add(self, line):
        """Writes the numbers of a line; returns the step after it."""
        (_, step), *pairs = (pair.split(":") for pair in line.split())
        numbers = {key: float(value) for key, value in pairs}
        self.clock += numbers.get("ms", 0) / 1000
        values = []
        for key, number in numbers.items():
            name = tag(key, pairs[0][0])
            values.append(Summary.Value(tag=name, simple_value=number / 2**20 if name.endswith("_MiB") else number))
        self.write(int(step), summary=Summary(value=values))
        return int(step) + 1


def find_runs(arguments, out):
    runs = {}
    for argument in arguments:
        path = os.path.abspath(argument if os.path.isfile(argument) else os.path.join(argument, "main.log"))
        folder = os.path.dirname(path)
        if out is not None:
            folder = os.path.join(out, os.path.basename(folder))
        if folder in runs:
            fail(f"{path} and {runs[folder].path} would both become event files in {folder}")
        runs[folder] = Run(path, folder)
    return list(runs.values())


def follow(runs, once):
    """Polls all runs, every second or once. A main.log that is not there is waited for, unless once."""
    waiting = set()
    while True:
        for run in runs:
            try:
                run.poll()
            except OSError as error:
                if once or not isinstance(error, FileNotFoundError):
                    fail(f"{error.filename or run.folder}: {error.strerror}")
                if run not in waiting:
                    print(f"waiting for {run.path}", flush=True)
                waiting.add(run)
        if once:
            return
        time.sleep(1)


def main():
    parser = argparse.ArgumentParser(description="Writes TensorBoard's event files from the main.log of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a directory with main.log, or such a file")
    parser.add_argument("-o", "--out", metavar="DIR", help="write into DIR/NAME of each run; default: beside main.log")
    parser.add_argument("--once", action="store_true", help="end with the last line; default: wait for more")
    options = parser.parse_args()
    runs = find_runs(options.runs, options.out)
    try:
        follow(runs, options.once)
    except KeyboardInterrupt:
        pass
    for run in runs:
        print(f"{run.path}: {len(run.lines) - 1} lines, event files in {run.folder}")


if __name__ == "__main__":
    main()
