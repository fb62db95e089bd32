"""Test of dev/tensorboard.py: TensorBoard's own reader must find the numbers of main.log, of runs that have ended, that
go on and that were resumed. Needs the Python package tensorboard.

usage: test_events.py ./train_deit
"""
import logging
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError:
    print("not run: dev/tensorboard.py (no Python package tensorboard here; python3 -m pip install tensorboard)")
    print("0 passed, 0 failed")
    sys.exit(0)

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it says what it drops
SCRIPT = str(Path(__file__).resolve().parents[1] / "tensorboard.py")
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"NOT OK {what}", flush=True)


def convert(*arguments, env=None):
    done = subprocess.run([sys.executable, SCRIPT, "--once", *map(str, arguments)], capture_output=True, text=True,
                          timeout=60, env=env)
    return done.returncode, done.stdout, done.stderr


def shown(folder):
    """{(step, tag): value} as TensorBoard shows it; a step that it shows twice has the value None."""
    events, found = EventAccumulator(str(folder)), {}
    events.Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found[event.step, tag] = None if (event.step, tag) in found else event.value
    return found


def differing(found, expected):
    return [key for key in found.keys() | expected.keys() if found.get(key) is None or key not in expected
            or not abs(found[key] - expected[key]) <= 1e-6 * abs(expected[key])]


def same(found, expected, what):
    wrong = differing(found, expected)
    check(not wrong, f"{what}: {len(wrong)} numbers differ, among them {wrong[:5]}")


def log_lines(first, last, loss):
    return "".join(f"s:{s} trl:{loss + s / 8:.9g} trtop1:{s / 4} lr:1e-05 norm:2.5 ms:40.000 img:1552\n"
                   for s in range(first, last + 1))


def of_log(first, last, loss):
    """What log_lines should become."""
    rows = {}
    for s in range(first, last + 1):
        tags = {"loss": loss + s / 8, "top1": s / 4, "lr": 1e-5, "gradient_norm": 2.5, "ms_per_step": 40,
                "images_per_s": 1552}
        rows.update({(s, f"train/{tag}"): value for tag, value in tags.items()})
    return rows


def test_trainer(work):
    run = work / "trained"
    done = subprocess.run([sys.argv[1], "-b", "16", "-x", "7", "-v", "0", "-o", str(run)], stdout=subprocess.DEVNULL)
    check(done.returncode == 0, "the trainer does not train")
    tags = {"trl": "train/loss", "trtop1": "train/top1", "trtop5": "train/top5", "lr": "train/lr",
            "norm": "train/gradient_norm", "ms": "train/ms_per_step",
            "img": "train/images_per_s", "tel": "val/loss", "top1": "val/top1", "top5": "val/top5"}
    expected = {}
    for line in (run / "main.log").read_text().splitlines():
        (_, step), *pairs = (pair.split(":") for pair in line.split())
        for key, value in pairs:
            known = key not in ("cached", "total")
            expected[int(step), tags[key] if known else f"memory/{key}_MiB"] = float(value) / (1 if known else 2**20)
    code, out, err = convert(run)
    check(code == 0 and err == "" and f"event files in {run}" in out, f"a trainer's run: {code}: {err}")
    same(shown(run), expected, "a trainer's run")
    losses = sum(tag == "train/loss" for _, tag in expected)
    check(losses == 7 and (7, "val/top5") in expected, f"the trainer's main.log has {losses} steps")


def test_tags(work):
    """Every form of line; damaged ones are skipped."""
    text = """s:0 cached:3145728 total:2097152.5 x:0
s:1 trl:2.26 trtop1:31.2 lr:0.00048 norm:3.1 ms:41.2 img:1552
s:2 trl:2.25 lr:0.00048 norm:nan ms:41.2
s:936 tel:0.55 top1:80.1 top5:99.2
s:936 etel:0.5 etop1:81 etop5:99.5 eap:7
garbage
s:3 trl:1 trl_box:0.5 tracc:7 rpn:1.2.3
s:3 trl:1 trl_box:0.5 tracc:7 rpn:-0.25
s:940 ap:37.5 ap50:58 te_mask:3
"""
    for name in ("tags", "again"):
        (work / name).mkdir()
        (work / name / "main.log").write_text(text)
    code, _, err = convert(work / "tags" / "main.log", work / "again", "-o", work / "out")
    check(code == 0 and err == "" and len(list((work / "tags").iterdir())) == 1, f"-o: {code}: {err}")
    found = shown(work / "out" / "tags")
    check(found.pop((2, "train/gradient_norm"), 0) != 0, "a norm that is not a number is left out")
    steps = {
        0: {"memory/cached_MiB": 3, "memory/total_MiB": 2 + 0.5 / 2**20, "memory/x_MiB": 0},
        1: {"train/loss": 2.26, "train/top1": 31.2, "train/lr": 0.00048, "train/gradient_norm": 3.1,
            "train/ms_per_step": 41.2, "train/images_per_s": 1552},
        2: {"train/loss": 2.25, "train/lr": 0.00048, "train/ms_per_step": 41.2},
        936: {"val/loss": 0.55, "val/top1": 80.1, "val/top5": 99.2,
              "val/ema_loss": 0.5, "val/ema_top1": 81, "val/ema_top5": 99.5, "val/ema_ap": 7},
        3: {"train/loss": 1, "train/loss_box": 0.5, "train/acc": 7, "train/rpn": -0.25},
        940: {"val/ap": 37.5, "val/ap50": 58, "val/mask": 3}}
    expected = {(step, tag): value for step, values in steps.items() for tag, value in values.items()}
    same(found, expected, "all forms of lines")
    check(shown(work / "out" / "again").keys() == shown(work / "out" / "tags").keys(), "the second run")


def test_follow(work):
    """A log that begins late, grows by parts of lines, is cut back twice, and a tool that is started again."""
    run, log = work / "live", work / "live" / "main.log"

    def appears(expected, what):
        for _ in range(100):
            time.sleep(0.1)
            if run.exists() and not differing(shown(run), expected):
                break
        same(shown(run), expected, what)

    tool = subprocess.Popen([sys.executable, SCRIPT, str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)
    try:
        check(tool.stdout.readline() == f"waiting for {log}\n", "what is waited for is said")
        run.mkdir()
        file = open(log, "w")

        def write(text):
            file.write(text)
            file.flush()

        write(log_lines(1, 40, 2) + "s:40 tel:1 top1:50 top5:60\n" + log_lines(41, 41, 2)[:-9])
        evaluated = {(40, "val/loss"): 1, (40, "val/top1"): 50, (40, "val/top5"): 60}
        appears({**of_log(1, 40, 2), **evaluated}, "a log as far as it has whole lines")
        write(log_lines(41, 41, 2)[-9:] + log_lines(42, 50, 2))
        appears({**of_log(1, 50, 2), **evaluated}, "a log that grows")
        check(len(list(run.glob("events.*"))) == 1, "one event file as long as the log only grows")
        file.seek(0)
        file.truncate(len(log_lines(1, 20, 2)))
        file.seek(0, 2)
        write(log_lines(21, 60, 3))  # longer than it was, but with other numbers
        appears({**of_log(1, 20, 2), **of_log(21, 60, 3)}, "a run that is resumed at step 20")
        file.truncate(len(log_lines(1, 5, 2)))
        appears(of_log(1, 5, 2), "a log that is cut back, and goes on later")
        file.seek(0, 2)
        write(log_lines(6, 7, 4))
        last = {**of_log(1, 5, 2), **of_log(6, 7, 4)}
        appears(last, "a run that is resumed at step 5")
        check(len(list(run.glob("events.*"))) == 3, "an event file for each time that the log is cut")
        file.close()
    finally:
        tool.send_signal(signal.SIGINT)
        out, err = tool.communicate(timeout=30)
    check(tool.returncode == 0 and err == "" and f"{log}: 7 lines" in out,
          f"the end by Ctrl-C: {tool.returncode}: {out}{err}")
    code, _, err = convert(run)
    check(code == 0 and err == "", f"once more: {err}")
    same(shown(run), last, "a log that is read again")


def test_refused(work):
    code, _, err = convert(work / "nowhere")
    check(code == 1 and err == f"dev/tensorboard.py: {work}/nowhere/main.log: No such file or directory\n",
          f"no log: {code}: {err}")
    for folder in (work / "a" / "run", work / "b" / "run"):
        folder.mkdir(parents=True)
        (folder / "main.log").write_text(log_lines(1, 2, 0))
    code, _, err = convert(work / "a" / "run", work / "b" / "run", "-o", work / "c")
    check(code == 1 and "would both become event files in" in err and err.count("\n") == 1,
          f"two runs of one name: {code}: {err}")
    code, _, err = convert(work / "a" / "run", "-o", work / "a" / "run" / "main.log")
    check(code == 1 and "main.log" in err and err.count("\n") == 1,
          f"event files that cannot be written: {code}: {err}")
    (work / "without" / "tensorboard").mkdir(parents=True)
    (work / "without" / "tensorboard" / "__init__.py").write_text("raise ImportError")
    code, _, err = convert(work / "a" / "run", env={"PYTHONPATH": str(work / "without")})
    check(code == 1 and err.count("\n") == 1 and "python3 -m pip install tensorboard" in err,
          f"without the package: {code}: {err}")


with tempfile.TemporaryDirectory() as directory:
    for test in (test_trainer, test_tags, test_follow, test_refused):
        test(Path(directory).resolve())
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0 or passed == 0)
