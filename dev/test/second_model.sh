#!/bin/bash
# The shared sections of the trainers serve another model: dev/test/second_model.cu, from inside and as a program that trains,
# writes checkpoints, resumes and runs on several ranks.
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

"$program" -check >"$work/checks" 2>&1
verdict $? "-check: $(cat "$work/checks")"
passed=$((passed + $(tail -n 1 "$work/checks" | grep -o '^[0-9]*' || echo 0)))

# it learns; what it takes is what -plan 1 says, and main.log
run -x 30 -v 0 -n 10 -ema 0.9 -o "$work/alone"
verdict $? "30 steps: $(cat "$work/stderr")"
awk -F '[: ]' '$3 == "trl" { if (first == "") first = $4; last = $4 } END { exit !(last < 0.85 * first) }' "$work/alone/main.log"
verdict $? "the loss falls: $(grep trl "$work/alone/main.log" | sed -n '1p;$p')"
grep -q ' trerror:' "$work/alone/main.log" && grep -qE '^s:30 tel:[^ ]* error:[^ ]* right:' "$work/alone/main.log" && grep -q '^s:30 etel:.* eright:' "$work/alone/main.log"
verdict $? "the names of the metrics in main.log: $(tail -n 2 "$work/alone/main.log")"
grep -aq '"best_right":"' "$work/alone/model_00000030.safetensors"
verdict $? "the best score has the name of its metric"
run -ema 0.9 -plan 1
[ "$(tail -n 1 "$work/stdout" | sed 's/plan \(cached=[0-9]*\).* total=/\1 total:/; s/=/:/')" = "$(head -n 1 "$work/alone/main.log" | cut -c 5-)" ]
verdict $? "-plan 1 and main.log: $(tail -n 1 "$work/stdout"), $(head -n 1 "$work/alone/main.log")"
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
run -x 30 -v 0 -n 10 -ema 0.9 -y 1 -rate 0.5 -o "$work/alone"
[ $? = 1 ] && grep -q 'was written with -rate 0.25, not 0.5' "$work/stderr"
verdict $? "a flag of its own is compared: $(cat "$work/stderr")"

# what the files hold
fixed='stem\.(weight|bias)|stages\.[0-9.]*mean'
[ "$(tensors "$work/alone/model_00000030.safetensors" "($fixed) " | wc -l)" = 5 ] && [ "$(tensors "$work/alone/model_00000030.safetensors" . | wc -l)" = 19 ]
verdict $? "the model file: $(tensors "$work/alone/model_00000030.safetensors" .)"
[ "$(tensors "$work/alone/state_00000030_00000.safetensors" "ema\.($fixed) " | wc -l)" = 5 ] &&
    [ "$(tensors "$work/alone/state_00000030_00000.safetensors" "exp_avg(_sq)?\." | wc -l)" = 28 ]
verdict $? "the state file: $(tensors "$work/alone/state_00000030_00000.safetensors" .)"
stem=$(tensors "$work/alone/model_00000010.safetensors" stem)
[ "$(tensors "$work/alone/model_00000030.safetensors" stem)" = "$stem" ]
verdict $? "frozen tensors move"
[ "$(tensors "$work/alone/state_00000030_00000.safetensors" ema.stem | sed s/ema.//)" = "$stem" ]
verdict $? "the moving average of frozen tensors moves"
[ "$(tensors "$work/alone/model_00000010.safetensors" 'stages.*mean')" != "$(tensors "$work/alone/model_00000030.safetensors" 'stages.*mean')" ]
verdict $? "buffers do not move"
run -w "$work/alone/model_00000030.safetensors" -eval 1
[ "$(tail -n 1 "$work/stdout" | cut -d ' ' -f 3)" = "error=$(sed -n 's/^s:30 tel:[^ ]* error:\([^ ]*\) .*/\1/p' "$work/alone/main.log" | xargs printf %.2f)" ]
verdict $? "-w reads buffers too: $(tail -n 1 "$work/stdout"), $(tail -n 2 "$work/alone/main.log" | head -n 1)"

# a frozen weight of a block, and decay
run -x 3 -v 0 -n 3 -freeze 2 -wd_all 1 -wd 1 -o "$work/frozen"
run -x 1 -v 0 -n 1 -freeze 2 -o "$work/frozen_1"
[ "$(tensors "$work/frozen/model_00000003.safetensors" 'stem|stages.0.*fc1.weight')" = "$(tensors "$work/frozen_1/model_00000001.safetensors" 'stem|stages.0.*fc1.weight')" ]
verdict $? "-freeze 2: frozen weights move"
decay() { run -x 1 -v 0 -n 1 -opt sgd -wd "$2" -wd_all "$3" -o "$work/$1" && tensors "$work/$1/model_00000001.safetensors" . >"$work/$1.list"; }
decay none 0 0 && decay some 1 0 && decay all 1 1
verdict $? "weight decay: $(cat "$work/stderr")"
[ "$(diff "$work/none.list" "$work/some.list" | grep '^>' | grep -c weight)" = 7 ] && [ "$(diff "$work/none.list" "$work/some.list" | grep -c '^>')" = 7 ]
verdict $? "-wd decays the weights alone: $(diff "$work/none.list" "$work/some.list")"
[ "$(diff "$work/some.list" "$work/all.list" | grep '^>' | grep -c bias)" = 7 ] && [ "$(diff "$work/some.list" "$work/all.list" | grep -c '^>')" = 7 ]
verdict $? "-wd_all 1 decays the biases too: $(diff "$work/some.list" "$work/all.list")"

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
[ "$(grep -o '^stats [^|]*' "$work/stdout" | sort | tr -s ' ' | tr '\n' ';')" = 'stats last copy 0 ;stats relu copy 0 ;stats relu copy 1 ;stats relu copy 3 ;' ]
verdict $? "-stats of each dropped tensor: $(grep ^stats "$work/stdout")"

# defaults by model, a recipe, its flags in -h, predictions, a batch to look at, a loss that is not finite
run -recipe fast
verdict $? "-recipe: $(cat "$work/stderr")"
grep -q '^model: single' "$work/stdout" && grep -q '^training data: 2000 images' "$work/stdout" && grep -q '^step  *3/3 ' "$work/stdout"
verdict $? "the recipe: $(head -n 6 "$work/stdout")"
run -h && grep -q '^  -rate .*(default 0.25)$' "$work/stdout" && grep -q -- '-l .*(default 0.002)$' "$work/stdout"
verdict $? "-h: $(grep -E -- '-(rate|l) ' "$work/stdout")"
run -w "$work/alone/model_00000030.safetensors" -predict data/fashion_val.bin && [ "$(grep -cE '^image [0-9]+: ([0-9] 0\.[0-9]{6}(, |$)){5}' "$work/stdout")" = 2000 ]
verdict $? "-predict: $(head -n 3 "$work/stdout")"
run -sheet "$work/sheet.safetensors" && [ "$(tensors "$work/sheet.safetensors" . | wc -l)" = 4 ]
verdict $? "-sheet: $(cat "$work/stderr")"
run -x 9 -v 0 -opt sgd -l 1e6
[ $? = 1 ] && grep -q '^error: step [0-9]*: loss .* the first tensor that is not is: \(parameter\|activation\|gradient\)' "$work/stderr"
verdict $? "not finite: $(cat "$work/stderr")"

# ranks: the trainer compares their weights itself; each has seen other images, and an evaluation has rank 0's buffers on all
if command -v mpirun >/dev/null && grep -q DMULTI_GPU "$(dirname "$program")/../../command"; then
    for n in 2 3; do
        for sharded in 0 1; do
            ranks $n -x 6 -v 0 -n 6 -b 10 -a 2 -g 0.5 -freeze 1 -ema 0.9 -watch 1 -z $sharded -o "$work/ranks_${n}_$sharded"
            verdict $? "$n ranks, -z $sharded: $(head -c 500 "$work/stderr")"
            [ "$(grep ^buffers: "$work/stdout" | tr '\n' ';')" = "buffers: differ in training, equal now, those of rank 0;buffers: differ in training, equal now, others;" ]
            verdict $? "$n ranks, -z $sharded: $(grep ^buffers: "$work/stdout")" # the second evaluation has the moving average
        done
        for kind in model_00000006 state_00000006_00000; do
            same "ranks_${n}_0/$kind" "ranks_${n}_1/$kind"
            verdict $? "$n ranks: $kind with -z 1 has other bits"
        done
        [ "$(tensors "$work/ranks_${n}_1/model_00000006.safetensors" stem)" = "$stem" ] &&
            [ "$(tensors "$work/ranks_${n}_1/state_00000006_00000.safetensors" ema.stem | sed s/ema.//)" = "$stem" ]
        verdict $? "$n ranks: frozen tensors move"
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
else
    echo "not run: ranks of the second model (no MPI here)"
fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
