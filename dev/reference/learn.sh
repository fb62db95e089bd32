#!/bin/bash
# The table of accuracies: Fashion-MNIST whole, nano, crop, flip, erasing, mixup and smoothing, gamma 0 and 0.9, four seeds, in the trainer
# and in learn.py. A run whose log in build/learn is whole is not run again. Exit code 1 when the means over the seeds differ by more
# than 0.7 points. PYTHON names an interpreter with PyTorch, SEEDS the seeds, PARTS which of "trainer reference" are run.
#   make train_deit && dev/reference/learn.sh
set -u
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
seeds=${SEEDS:-1 2 3 4} # one seed alone is half a point up or down
train=data/fashion_full_train.bin
val=data/fashion_full_val.bin
logs=build/learn
flags="-i $train -j $val -b 128 -e 4 -l 1e-3 -warmup 100 -crop 1 -scale 0.5 -flip 1 -reprob 0.25 -mixup 0.2 -smoothing 0.1"
mkdir -p $logs
{ [ -f $train ] && [ -f $val ]; } || "$python" data/fashion.py || exit 1
for gamma in 0 0.9; do
    for seed in $seeds; do
        for part in ${PARTS:-trainer reference}; do
            log=$logs/${part}_g${gamma}_s$seed.log
            grep -q '^final' "$log" 2>/dev/null && continue
            program=./train_deit
            [ $part = trainer ] || program="$python dev/reference/learn.py"
            echo "+ $program $flags -g $gamma -seed $seed" >&2
            $program $flags -g $gamma -seed "$seed" >"$log" || exit 1
        done
    done
done
echo "top-1 %, mean over seeds $seeds (each of them)"
failed=0
for gamma in 0 0.9; do
    for part in trainer reference; do
        for seed in $seeds; do sed -n "s/^final .*top1=\([0-9.]*\).*/$part \1/p" "$logs/${part}_g${gamma}_s$seed.log"; done
    done | awk -v gamma=$gamma '
        { sum[$1] += $2; n[$1]++; each[$1] = each[$1] " " $2 }
        END { if (!n["trainer"] || n["trainer"] != n["reference"]) { print "gamma " gamma ": runs are missing"; exit 1 }
              d = (sum["trainer"] - sum["reference"]) / n["trainer"]
              printf "gamma %-3s | trainer %.2f (%s ) | reference %.2f (%s ) | difference %+.2f\n", gamma, sum["trainer"] / n["trainer"],
                  each["trainer"], sum["reference"] / n["reference"], each["reference"], d
              exit !(d <= 0.7 && d >= -0.7) }' || failed=1
done
exit $failed
