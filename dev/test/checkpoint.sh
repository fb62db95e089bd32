#!/bin/bash
# Checkpoints of a trainer: killed at any moment and resumed, a run ends with the same bits as one left alone; a damaged checkpoint is
# passed over; a full disk, changed flags and foreign directories are refused with a sentence and lose nothing.
#   dev/test/checkpoint.sh ./train_deit
set -u
program=$1
. "$(dirname "$0")/verdict.sh"
run() { timeout 300 "$program" "$@" >"$work/stdout" 2>"$work/stderr" </dev/null; }
# refused PATTERN ARGUMENTS...: exit code 1, the last line begins with "error:" and holds PATTERN
refused() {
    pattern=$1
    shift
    run "$@"
    code=$?
    [ $code = 1 ] && tail -n 1 "$work/stderr" | grep -q "^error: .*$pattern"
    verdict $? "$* -> code $code: $(head -c 300 "$work/stderr")"
}
losses() { sed 's/ ms:.*//' "$1/main.log"; }
# flips a bit of byte $2 of file $1
damage() { printf "\\$(printf %o $(($(od -An -tu1 -j "$2" -N 1 "$1") ^ 4)))" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }

# everything that depends on the step: the order of the data, flips, augmentation and mixing, the random strategy, accumulation, the moments,
# drop-path, the moving average, the learning rate
flags="-patch 7 -b 8 -a 2 -flip 1 -aa rand-m9-mstd0.5-inc1 -reprob 0.25 -mixup 0.8 -cutmix 1 -g 0.6 -s random -x 150 -e 1 -v 0 -n 1 -keep 3
    -drop_path 0.3 -ema 0.99 -min_lr 1e-4 -warmup_lr 1e-5"
run $flags -o "$work/alone"
verdict $? "a run left alone: $(cat "$work/stderr")"
run $flags -o "$work/twice"
cmp -s "$work/alone/model_00000150.safetensors" "$work/twice/model_00000150.safetensors"
verdict $? "the same command twice writes the same model file"
[ "$(ls "$work/alone" | wc -l)" = 11 ] # and main.log and the best weights
verdict $? "-keep 3 keeps three: $(ls "$work/alone" | tr '\n' ' ')"

kills=0
while [ $kills -lt 20 ]; do
    "$program" $flags -y 1 -o "$work/killed" >"$work/stdout" 2>"$work/stderr" </dev/null &
    sleep 0.$((RANDOM % 4))$((RANDOM % 10))
    if kill -9 $! 2>/dev/null; then kills=$((kills + 1)); fi
    wait $! 2>/dev/null
    [ -s "$work/stderr" ] && break
    [ -e "$work/killed/DONE_00000150" ] && break
done
! [ -s "$work/stderr" ]
verdict $? "resumed after $kills kills: $(head -c 300 "$work/stderr")"
run $flags -y 1 -o "$work/killed"
verdict $? "the last resume after $kills kills: $(cat "$work/stderr")"
for kind in model_00000150 state_00000150_00000; do
    cmp -s "$work/alone/$kind.safetensors" "$work/killed/$kind.safetensors"
    verdict $? "$kind after $kills kills has other bits"
done
[ "$(losses "$work/alone")" = "$(losses "$work/killed")" ]
verdict $? "main.log after $kills kills"
[ $kills -ge 10 ]
verdict $? "only $kills kills before the run was over"

# random crops and repeats: resumed in the middle of an epoch, with another number of reader threads; not with other crops
crops="-b 8 -a 2 -size 32 -crop 1 -flip 1 -repeats 3 -x 10 -e 1 -v 0 -n 5"
run $crops -o "$work/crops"
verdict $? "a run with crops: $(cat "$work/stderr")"
cp -r "$work/crops" "$work/crops_again"
rm "$work/crops_again"/*00000010*
refused '-scale' $crops -scale 0.5 -y 1 -o "$work/crops_again"
run $crops -threads 0 -y 1 -o "$work/crops_again"
cmp -s "$work/crops/model_00000010.safetensors" "$work/crops_again/model_00000010.safetensors"
verdict $? "crops resumed: other bits: $(cat "$work/stderr")"

# damage: the newest checkpoint is passed over with a warning, and what follows has the same bits
cp -r "$work/alone" "$work/damaged"
damage "$work/damaged/model_00000150.safetensors" 5000
run $flags -y 1 -o "$work/damaged"
verdict $? "a damaged model: $(cat "$work/stderr")"
grep -q "^warning: the checkpoint of step 150 .* damaged" "$work/stderr"
verdict $? "a damaged model is named: $(cat "$work/stderr")"
cmp -s "$work/alone/model_00000150.safetensors" "$work/damaged/model_00000150.safetensors"
verdict $? "the bits after a damaged checkpoint"
head -c 9000 "$work/alone/state_00000150_00000.safetensors" >"$work/damaged/state_00000150_00000.safetensors"
damage "$work/damaged/state_00000149_00000.safetensors" 9000
rm "$work/damaged/model_00000148.safetensors"
refused 'no checkpoint in .* is whole' $flags -y 1 -o "$work/damaged"
refused 'has the checksum' -eval 1 -w "$work/damaged/state_00000149_00000.safetensors"

# what must not go on
refused 'holds checkpoints of another run' $flags -o "$work/alone"
refused 'was written with -l 0.002.*, not 0.003' $flags -l 0.003 -y 1 -o "$work/alone"
refused 'was written with -s random, not mink' $flags -s mink -y 1 -o "$work/alone"
refused 'was written with -aa rand-m9-mstd0.5-inc1, not none' $flags -aa none -y 1 -o "$work/alone"
refused 'need a directory' -n 5
refused 'need a directory' -y 1
run $flags -y 1 -r 3 -o "$work/alone"
verdict $? "another -r changes no bit: $(cat "$work/stderr")"
run -patch 7 -w "$work/alone/model_00000150.safetensors" -eval 1
verdict $? "a checkpoint's weights are read: $(cat "$work/stderr")"

# a disk that is full: files may not grow beyond 1 MiB, the state needs more
cp -r "$work/alone" "$work/full"
rm "$work/full"/*150*
(trap '' XFSZ; ulimit -f 1024; timeout 300 "$program" $flags -y 1 -o "$work/full" >"$work/stdout" 2>"$work/stderr" </dev/null)
[ $? = 1 ] && grep -q '^error: cannot write .*state_00000150_00000' "$work/stderr"
verdict $? "a full disk: $(cat "$work/stderr")"
[ -e "$work/full/DONE_00000149" ] && [ ! -e "$work/full/DONE_00000150" ] && ! ls "$work/full"/*.tmp >/dev/null 2>&1
verdict $? "what a full disk leaves: $(ls "$work/full" | tr '\n' ' ')"
run $flags -y 1 -o "$work/full"
verdict $? "resumed after a full disk: $(cat "$work/stderr")"
cmp -s "$work/alone/model_00000150.safetensors" "$work/full/model_00000150.safetensors"
verdict $? "the bits after a full disk"

# the best weights: those of the evaluation with the highest top-1, written once more neither after a resume nor for less
value() { head -c 4096 "$1" | grep -ao "\"$2\":\"[^\"]*\"" | head -n 1 | cut -d '"' -f 4; } # value FILE KEY of its metadata
best_of() { # best_of DIRECTORY [STEP]: step and top-1 of the best evaluation in main.log up to STEP
    awk -F '[: ]' -v last="${2:-999999999}" '$3 == "tel" && $2 <= last && $6 > best + 0 { best = $6; step = $2 } END { print step, best }' "$1/main.log"
}
# an epoch has 8 steps; a learning rate that rises too far makes the best evaluation one in the middle
few="-i data/fashion_val.bin -patch 14 -b 250 -e 6 -schedule epoch -warmup_epochs 2 -warmup_lr 0.001 -min_lr 0.8 -l 0.1 -opt sgd -n 4 -keep 2"
few="$few -ema 0.9 -drop_path 0.2"
run $few -o "$work/best"
verdict $? "a run with evaluations: $(cat "$work/stderr")"
log_step=$(best_of "$work/best" | cut -d ' ' -f 1)
[ "$log_step" -gt 8 ] && [ "$log_step" -lt 48 ] && [ "$(value "$work/best/best.safetensors" step)" = "$log_step" ] && [ "$(value "$work/best/best.safetensors" best_step)" = "$log_step" ]
verdict $? "best.safetensors is of step $(value "$work/best/best.safetensors" step), main.log has: $(best_of "$work/best")"
[ "$(value "$work/best/state_00000048_00000.safetensors" best_step)" = "$log_step" ] && [ "$(grep -c 'etel:.* etop1:' "$work/best/main.log")" = 6 ]
verdict $? "the state knows the best step, the average was evaluated: $(grep -c etop1 "$work/best/main.log") times"
run -patch 14 -w "$work/best/best.safetensors" -eval 1
top1=$(value "$work/best/best.safetensors" best_top1)
tail -n 1 "$work/stdout" | grep -q "top1=$(printf %.2f "$top1") "
verdict $? "the best weights evaluate to $(tail -n 1 "$work/stdout"), expected $top1"
# back to a checkpoint before the best evaluation: what stands on the disk is kept, and all ends with the same bits
before=$((log_step - 4))
cp -r "$work/best" "$work/back"
run $few -x $before -o "$work/back_start"
rm "$work/back"/DONE_* "$work/back"/model_* "$work/back"/state_*
cp "$work/back_start"/*_"$(printf %08d $before)"* "$work/back"
inode=$(stat -c %i "$work/back/best.safetensors")
run $few -y 1 -o "$work/back"
verdict $? "resumed from step $before, before the best: $(cat "$work/stderr")"
[ "$(stat -c %i "$work/back/best.safetensors")" = "$inode" ]
verdict $? "best.safetensors was written again after a resume from step $before"
for kind in best model_00000048 state_00000048_00000; do
    cmp -s "$work/best/$kind.safetensors" "$work/back/$kind.safetensors"
    verdict $? "$kind after a resume from step $before has other bits"
done
# the same without the file, and with one of another run in its place: written anew
for other in none "$work/alone/best.safetensors"; do
    rm -r "$work/back"
    cp -r "$work/back_start" "$work/back"
    rm "$work/back/best.safetensors"
    [ "$other" = none ] || cp "$other" "$work/back/best.safetensors"
    run $few -y 1 -o "$work/back"
    cmp -s "$work/best/best.safetensors" "$work/back/best.safetensors"
    verdict $? "best.safetensors anew, $other: $(cat "$work/stderr")"
done
refused 'was written with -ema 0.9.*, not 0.8' $few -ema 0.8 -y 1 -o "$work/best"
refused 'was written with -drop_path 0.2.*, not 0' $few -drop_path 0 -y 1 -o "$work/best"
refused 'was written with -schedule epoch, not step' $few -schedule step -y 1 -o "$work/best"

# An older version wrote old_checkpoint, with every flag that it had in the metadata; its main.log goes on to step 8. Most of
# its weights are zero, so that it is small (it began with -w). Resumed, it has the same losses. A flag that is at its default
# writes no entry, so that a later version that has another flag resumes this one's checkpoints
old="-size 4 -patch 2 -b 8 -a 2 -n 4 -v 0 -flip 1 -g 0.5 -l 0.02 -warmup 3 -clip 1 -x 8"
cp -r "$(dirname "$0")/../reference/fixtures/old_checkpoint" "$work/old"
gunzip "$work/old"/*.gz
touch "$work/old/DONE_00000004"
mv "$work/old/main.log" "$work/old_losses"
refused 'was written with -wd_all 0, not 1' $old -wd_all 1 -y 1 -o "$work/old"
refused 'was written with -ema 0, not 0.5' $old -ema 0.5 -y 1 -o "$work/old"
run $old -y 1 -o "$work/old"
verdict $? "an older version's checkpoint: $(cat "$work/stderr")"
sed -n 's/^s:\([5-8]\) trl:\([^ ]*\) .*norm:\([^ ]*\).*/\1 \2 \3/p' "$work/old_losses" >"$work/expected"
sed -n 's/^s:\([5-8]\) trl:\([^ ]*\) .*norm:\([^ ]*\).*/\1 \2 \3/p' "$work/old/main.log" | paste -d ' ' "$work/expected" - | awk '
    { for (i = 1; i <= 3; i++) { e = $(i+3) / $i - 1; if (NF != 6 || !(e * e <= 1e-12)) bad = 1 } } END { exit bad || NR != 4 }'
verdict $? "losses after an older version's checkpoint: $(tail -n 2 "$work/old/main.log")"
[ "$(value "$work/old/model_00000008.safetensors" -l)" = 0.02 ] && [ -z "$(value "$work/old/model_00000008.safetensors" -wd_all)" ] &&
    [ -z "$(value "$work/old/model_00000008.safetensors" -ema)" ]
verdict $? "flags in the metadata: $(head -c 600 "$work/old/model_00000008.safetensors" | tail -c 592)"
run $old -wd_all 1 -o "$work/decayed"
[ "$(value "$work/decayed/model_00000008.safetensors" -wd_all)" = 1 ]
verdict $? "-wd_all 1 stands in the metadata: $(cat "$work/stderr")"
refused 'was written with -wd_all 1, not 0' $old -x 9 -y 1 -o "$work/decayed"

echo "$passed passed, $failed failed"
[ $failed = 0 ]
