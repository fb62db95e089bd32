#!/bin/bash
# Remakes fixtures/ranks_g70.txt: the losses of 10 steps in which DropIT selects on each of 2 and 3 ranks, by deit.py, from the trainer's
# initial weights on the bundled images; beside them the losses where it selects over the whole batch of a step. dev/test/ranks.sh
# compares the trainer with them. PYTHON names an interpreter with PyTorch (1.13 is enough).
#   make train_deit DEVICE=cpu && dev/reference/make_ranks.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# a step of learning rate 0 writes the initial weights
./train_deit -l 0 -x 1 -b 1 -n 1 -v 0 -o "$work/init" >"$work/stdout"
flags="-x 10 -v 0 -warmup 5 -flip 1 -g 0.7"
losses() { # losses NAME ARGUMENTS...
    "$python" dev/reference/deit.py train $flags -seed 1 -threads 1 -w "$work/init/model_00000001.safetensors" "${@:2}" -o "$work/$1" >"$work/stdout"
    sed -n 's/.* trl:\([^ ]*\) .*/\1/p' "$work/$1/main.log"
}
for strategy in mink random; do
    for ranks in 2 3; do
        paste -d ' ' <(losses ranks -s $strategy -b 16 -ranks $ranks) <(losses whole -s $strategy -b $((16 * ranks))) |
            awk -v s=$strategy -v n=$ranks '{ print s, n, NR, $1, $2 }'
    done
done >"$work/losses"
{
    echo "# made by dev/reference/make_ranks.sh; -b 16 $flags"
    echo "# strategy, ranks, step, loss where each rank selects, loss where one selection spans the whole batch"
    cat "$work/losses"
} >dev/reference/fixtures/ranks_g70.txt
echo "wrote dev/reference/fixtures/ranks_g70.txt: $(wc -l <"$work/losses") losses"
