#!/usr/bin/env python3
"""
The launches of a training step in dev/cuda/predict.py are those that the trainer makes, kernel by kernel, at every -r and with DropIT
off and on: a copy of the CPU device prints each launch, and a run of two steps less a run of one is a step.
    dev/test/test_launches.py BUILD     such as build/cpu-fp32, where the trainer has been built
"""
import collections
import os
import subprocess
import sys
import tempfile

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "dev", "cuda"))
import predict


def launches(program, steps, gamma, recompute):
    output = subprocess.run([program, "-bench", str(steps), "-b", "8", "-g", str(gamma), "-r", str(recompute)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, check=True, env=dict(os.environ, OMP_NUM_THREADS="1")).stderr
    return collections.Counter(line.split()[1].split("<")[0] for line in output.splitlines() if line.startswith("launch "))


build, passed, failed = sys.argv[1], 0, 0
with tempfile.TemporaryDirectory() as folder:
    device, program = os.path.join(folder, "cpu"), os.path.join(folder, "count")
    subprocess.run(["cp", "-r", os.path.join(ROOT, "dev", "cpu"), device], check=True)
    with open(os.path.join(device, "engine.h")) as f:
        engine = f.read()
    place = "    *launch = Launch{kernel,"
    assert engine.count(place) == 1, "engine.h has another begin_launch"
    with open(os.path.join(device, "engine.h"), "w") as f:
        f.write(engine.replace(place, '    fprintf(stderr, "launch %s\\n", kernel);\n' + place))
    command = open(os.path.join(build, "command")).read().replace("-I dev/cpu", "-I " + device).split()
    subprocess.run(command[:1] + ["-w", "-x", "c++", os.path.join(build, "train_deit.cpp"), "-x", "none", "-o", program] + command[1:] + ["-O0"],
                   check=True, cwd=ROOT)
    for gamma in [0.0, 0.7]:
        for recompute in range(4):
            counted = launches(program, 2, gamma, recompute) - launches(program, 1, gamma, recompute)
            walk = predict.Step("deit_nano", 8, gamma, recompute, "fp32").launches
            expected = collections.Counter(k["kernel"] for k in walk if k["kernel"].endswith("_kernel"))
            same = counted == expected and len(counted) > 10
            passed, failed = passed + same, failed + (not same)
            differ = ["%s: %d, predict.py %d" % (k, counted[k], expected[k]) for k in counted | expected if counted[k] != expected[k]]
            print("%s gamma %g, -r %d: %d launches; %s" % ("ok  " if same else "FAIL", gamma, recompute, sum(counted.values()), "; ".join(differ)))
print("%d passed, %d failed" % (passed, failed))
sys.exit(0 if failed == 0 else 1)
