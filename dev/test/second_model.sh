#!/bin/bash
# The shared sections of the trainers serve another model, dev/test/second_model.cu: from inside, and as a program that
# trains, writes checkpoints, resumes and runs on several ranks.
#   dev/test/second_model.sh build/cpu-fp32/dev/test/second_model
set -u
program=$1
. "$(dirname "$0")/verdict.sh"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
run() { timeout 60 "$program" "$@" >"$work/stdout" 2>"$work/stderr" </dev/null; }
ranks() { # ranks N ARGUMENTS...
    local n=$1
    shift
    timeout 60 mpirun --oversubscribe -np "$n" "$program" "$@" >"$work/stdout" 2>"$work/stderr" </dev/null
}
tensors() { "$program" -tensors "$1" | grep -E "^$2" | sort; } # tensors FILE PATTERN: names and checksums
same() { cmp -s "$work/$1.safetensors" "$work/$2.safetensors"; }

CPU_PROTECT=1 "$program" -check >"$work/checks" 2>&1
verdict $? "-check: $(cat "$work/checks")"
passed=$((passed + $(tail -n 1 "$work/checks" | grep -o '^[0-9]*' || echo 0)))

# it learns; what it takes is what -plan 1 says, and main.log
run -x 30 -v 0 -n 10 -ema 0.9 -o "$work/alone"
verdict $? "30 steps: $(cat "$work/stderr")"
log=$work/alone/main.log
awk -F '[: ]' '$3 == "trl" { if (first == "") first = $4; last = $4 } END { exit !(last < 0.85 * first) }' "$log"
verdict $? "the loss falls: $(grep trl "$log" | sed -n '1p;$p')"
[ "$(grep -cE '^s:30 (trl:.* trerror:|tel:.* error:.* right:|etel:.* eerror:.* eright:)' "$log")" = 3 ]
verdict $? "the names of the metrics in main.log: $(tail -n 2 "$log")"
grep -aq '"best_right":"' "$work/alone/model_00000030.safetensors"
verdict $? "the best score has the name of its metric"
run -ema 0.9 -plan 1
planned=$(tail -n 1 "$work/stdout" | sed 's/plan \(cached=[0-9]*\).* total=/s:0 \1 total:/; s/=/:/')
[ "$planned" = "$(head -n 1 "$log")" ]
verdict $? "-plan 1 and main.log: $(tail -n 1 "$work/stdout"), $(head -n 1 "$log")"
run -plan 40MiB && grep -qE ' max_batch=[1-9][0-9]* ' "$work/stdout"
verdict $? "the largest batch: $(tail -n 1 "$work/stdout")"

# killed and resumed: the same bits, buffers and their moving average included
"$program" -x 30 -v 0 -n 10 -ema 0.9 -y 1 -o "$work/killed" >/dev/null 2>&1 </dev/null &
for _ in $(seq 500); do
    if [ -e "$work/killed/DONE_00000010" ]; then break; fi
    sleep 0.01
done
kill -9 $! 2>/dev/null
wait $! 2>/dev/null
rm -f "$work/killed"/*0000030*
run -x 30 -v 0 -n 10 -ema 0.9 -y 1 -o "$work/killed"
verdict $? "resumed: $(cat "$work/stderr")"
grep -q '^resuming after step' "$work/stdout"
verdict $? "it did not resume"
for kind in model_00000030 state_00000030_00000; do
    same "alone/$kind" "killed/$kind"
    verdict $? "$kind of a resumed run has other bits"
done
# the evaluation at a step that only -x makes the last leaves no trace in its checkpoint
run -x 10 -v 0 -n 10 -ema 0.9 -o "$work/stopped"
same alone/model_00000010 stopped/model_00000010
verdict $? "a run that -x stops at step 10 has other bits: $(cat "$work/stderr")"
run -x 30 -v 0 -n 10 -ema 0.9 -y 1 -rate 0.5 -o "$work/alone"
[ $? = 1 ] && grep -q 'was written with -rate 0.25, not 0.5' "$work/stderr"
verdict $? "a flag of its own is compared: $(cat "$work/stderr")"

# what the files hold
model10=$work/alone/model_00000010.safetensors
model30=$work/alone/model_00000030.safetensors
state30=$work/alone/state_00000030_00000.safetensors
[ "$(tensors "$model30" 'stem|stages.*mean' | wc -l)" = 5 ] && [ "$(tensors "$model30" . | wc -l)" = 19 ]
verdict $? "the model file: $(tensors "$model30" .)"
# of the 17 moving averages, 3 are of buffers; frozen tensors have none
[ "$(tensors "$state30" 'ema\.' | wc -l)" = 17 ] && [ "$(tensors "$state30" 'ema\.stages.*mean' | wc -l)" = 3 ] &&
    [ "$(tensors "$state30" 'exp_avg(_sq)?\.' | wc -l)" = 28 ]
verdict $? "the state file: $(tensors "$state30" .)"
stem=$(tensors "$model10" stem)
[ "$(tensors "$model30" stem)" = "$stem" ]
verdict $? "frozen tensors move"
[ "$(tensors "$model10" 'stages.*mean')" != "$(tensors "$model30" 'stages.*mean')" ]
verdict $? "buffers do not move"
run -w "$model30" -eval 1
error=$(sed -n 's/^s:30 tel:[^ ]* error:\([^ ]*\) .*/\1/p' "$log" | xargs printf %.2f)
[ "$(tail -n 1 "$work/stdout" | cut -d ' ' -f 3)" = "error=$error" ]
verdict $? "-w reads buffers too: $(tail -n 1 "$work/stdout"), in main.log: $error"

# a frozen weight of a block, and decay
run -x 3 -v 0 -n 3 -freeze 2 -wd_all 1 -wd 1 -o "$work/frozen"
run -x 1 -v 0 -n 1 -freeze 2 -o "$work/frozen_1"
first=$(tensors "$work/frozen_1/model_00000001.safetensors" 'stem|stages.0.*fc1.weight')
[ -n "$first" ] && [ "$(tensors "$work/frozen/model_00000003.safetensors" 'stem|stages.0.*fc1.weight')" = "$first" ]
verdict $? "-freeze 2: frozen weights move"
decay() { # decay NAME -wd -wd_all
    run -x 1 -v 0 -n 1 -opt sgd -wd "$2" -wd_all "$3" -o "$work/$1"
    verdict $? "-wd $2 -wd_all $3: $(cat "$work/stderr")"
    tensors "$work/$1/model_00000001.safetensors" . >"$work/$1.list"
}
# changed ONE OTHER: how many weights, biases and other tensors are not the same
changed() {
    diff "$work/$1.list" "$work/$2.list" |
        awk '/^>/ { n[/weight/ ? 1 : /bias/ ? 2 : 3]++ } END { print n[1]+0, n[2]+0, n[3]+0 }'
}
decay none 0 0
decay some 1 0
decay all 1 1
[ "$(changed none some)" = "7 0 0" ]
verdict $? "-wd decays the weights alone: $(changed none some)"
[ "$(changed some all)" = "0 7 0" ]
verdict $? "-wd_all 1 decays the biases too: $(changed some all)"

# what is recomputed has the same bits, with chunks that do not divide the batch
for gamma in 0 0.5; do
    for level in 0 1 2 3; do
        run -x 10 -v 0 -n 10 -images 7 -g $gamma -g_all 1 -r $level -a 2 -o "$work/r_${gamma}_$level"
        verdict $? "-g $gamma -r $level: $(cat "$work/stderr")"
        same "r_${gamma}_0/model_00000010" "r_${gamma}_$level/model_00000010"
        verdict $? "-g $gamma -r $level has other bits"
    done
done
! same r_0_0/model_00000010 r_0.5_0/model_00000010
verdict $? "-g 0.5 changes nothing"
for level in 0 1; do
    run -x 10 -v 0 -n 10 -images 7 -g 0.5 -s random -r $level -o "$work/random_$level"
done
same random_0/model_00000010 random_1/model_00000010
verdict $? "-s random -r 1 has other bits"
run -x 1 -v 0 -g 0.5 -g_all 1 -stats 1
reported=$(grep -o '^stats [^|]*' "$work/stdout" | awk '{ print $2 $4 }' | sort | xargs)
[ "$reported" = 'last0 relu0 relu1 relu3' ]
verdict $? "-stats of each dropped tensor: $(grep ^stats "$work/stdout")"

# defaults by model, a recipe, its flags in -h, predictions, a batch to look at, a loss that is not finite
run -recipe fast
verdict $? "-recipe: $(cat "$work/stderr")"
[ "$(grep -cE '^model: single|^training data: 2000 images|^step +3/3 ' "$work/stdout")" = 3 ]
verdict $? "the recipe: $(head -n 6 "$work/stdout")"
run -h && grep -q '^  -rate .*(default 0.25)$' "$work/stdout" && grep -q -- '-l .*(default 0.002)$' "$work/stdout"
verdict $? "-h: $(grep -E -- '-(rate|l) ' "$work/stdout")"
run -w "$model30" -predict data/fashion_val.bin
[ "$(grep -cE '^image [0-9]+: ([0-9] 0\.[0-9]{6}(, |$)){5}' "$work/stdout")" = 2000 ]
verdict $? "-predict: $(head -n 3 "$work/stdout")"
run -sheet "$work/sheet.safetensors" && [ "$(tensors "$work/sheet.safetensors" . | wc -l)" = 4 ]
verdict $? "-sheet: $(cat "$work/stderr")"
run -x 9 -v 0 -opt sgd -l 1e6
[ $? = 1 ] && grep -qE '^error: step [0-9]+: loss .*the first .* is: (parameter|activation|gradient)' "$work/stderr"
verdict $? "not finite: $(cat "$work/stderr")"

# ranks: the trainer compares their weights itself; each has seen other images, and an evaluation has rank
# 0's buffers on all
if command -v mpirun >/dev/null && grep -q DMULTI_GPU "$(dirname "$program")/../../command"; then
    for n in 2 3; do
        for sharded in 0 1; do
            out=ranks_${n}_$sharded
            ranks $n -x 6 -v 0 -n 6 -b 10 -a 2 -g 0.5 -freeze 1 -ema 0.9 -watch 1 -z $sharded -o "$work/$out"
            verdict $? "$n ranks, -z $sharded: $(head -c 500 "$work/stderr")"
            grep ^buffers: "$work/stdout" >"$work/buffers" # of two evaluations: the second has the moving average
            printf 'buffers: differ in training, equal now, %s\n' 'those of rank 0' others | cmp -s - "$work/buffers"
            verdict $? "$n ranks, -z $sharded: $(cat "$work/buffers")"
            for kind in model_00000006 state_00000006_00000; do
                same "ranks_${n}_0/$kind" "$out/$kind"
                verdict $? "$n ranks: $kind with -z $sharded has other bits"
            done
            [ "$(tensors "$work/$out/model_00000006.safetensors" stem)" = "$stem" ]
            verdict $? "$n ranks: frozen tensors move"
        done
    done
    # resumed, from sharded states to whole ones
    flags="-v 0 -n 3 -b 10 -g 0.5 -ema 0.9"
    ranks 2 $flags -x 6 -o "$work/ranks_alone"
    ranks 2 $flags -x 3 -z 1 -o "$work/ranks_resumed"
    ranks 2 $flags -x 6 -y 1 -o "$work/ranks_resumed"
    verdict $? "2 ranks resumed: $(head -c 500 "$work/stderr")"
    for kind in model_00000006 state_00000006_00000; do
        same "ranks_alone/$kind" "ranks_resumed/$kind"
        verdict $? "2 ranks resumed: $kind has other bits"
    done
    # and from whole states to sharded ones
    rm "$work/ranks_resumed"/*00000006*
    ranks 2 $flags -x 6 -z 1 -y 1 -o "$work/ranks_resumed"
    same ranks_alone/state_00000006_00000 ranks_resumed/state_00000006_00000
    verdict $? "2 ranks resumed with -z 1: other bits: $(head -c 500 "$work/stderr")"
    # weights that differ between ranks are not saved
    ranks 2 $flags -x 3 -err 1 -o "$work/ranks_err"
    [ $? != 0 ] && grep -q '^error: the weights of rank 1 are not those of rank 0' "$work/stderr" && [ ! -e "$work/ranks_err/DONE_00000003" ]
    verdict $? "weights that differ: $(head -c 500 "$work/stderr"; ls "$work/ranks_err")"
else
    echo "not run: ranks of the second model (no MPI here)"
fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
