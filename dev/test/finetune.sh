#!/bin/bash
# Fine-tuning from weights that timm saved: the losses of ten steps of SGD and AdamW are those of timm itself, which
# dev/reference/finetune_timm.py wrote down. 6e-7 was measured; AdamW that also decays class token and positions is 5e-5 away, biases and norms 3e-4.
#   dev/test/finetune.sh ./train_deit
set -u
program=$1
. "$(dirname "$0")/verdict.sh"
fixtures=$(dirname "$0")/../reference/fixtures
gzip -dc "$fixtures/timm_nano.safetensors.gz" >"$work/timm.safetensors"
while read -r optimizer line; do
    # timm's "sgd" is Nesterov's: compared where the trainer has it
    [ "$optimizer" = '#' ] || ! "$program" -h | grep -q -w "$optimizer" && continue
    timeout 120 "$program" ${line#*: } -w "$work/timm.safetensors" -i "$fixtures/timm_images.bin" -j "$fixtures/timm_images.bin" -o "$work/$optimizer" \
        >"$work/stdout" 2>"$work/stderr" </dev/null
    verdict $? "$optimizer: $(cat "$work/stderr")"
    echo ${line%:*} | tr ' ' '\n' >"$work/expected"
    sed -n 's/.* trl:\([^ ]*\) .*/\1/p' "$work/$optimizer/main.log" | paste -d ' ' "$work/expected" - | awk '
        { e = ($2 - $1) / $1; if (e < 0) e = -e; if (NF != 2 || !(e <= 5e-6)) bad = 1; if (e > worst) worst = e }
        END { printf "largest difference %.1e, %d steps\n", worst, NR; exit bad || NR != 10 }' >"$work/difference"
    verdict $? "$optimizer, against timm: $(cat "$work/difference")"
    echo "$optimizer: $(cat "$work/difference")"
done <"$fixtures/timm_losses.txt"
# an evaluation sees nothing of what training does to images, labels and activations
evaluation() { # evaluation ARGUMENTS...: the scores
    timeout 60 "$program" -size 32 -patch 8 -chans 3 -b 7 -w "$work/timm.safetensors" -i "$fixtures/timm_images.bin" -j "$fixtures/timm_images.bin" -eval 1 \
        "$@" 2>"$work/stderr" </dev/null | grep '^final '
}
plain=$(evaluation)
training=$(evaluation -g 0.9 -g_all 1 -drop_path 0.9 -ema 0.9 -flip 1 -aa rand-m9-mstd0.5-inc1 -reprob 1 -mixup 1 -cutmix 1 -smoothing 0.5)
[ -n "$plain" ] && [ "$plain" = "$training" ]
verdict $? "an evaluation, $plain, with the flags of training: $training $(cat "$work/stderr")"
[ $passed -ge 5 ] || [ $failed -gt 0 ]
verdict $? "SGD and AdamW were both compared"
echo "$passed passed, $failed failed"
[ $failed = 0 ]
