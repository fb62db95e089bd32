#!/bin/sh
# What a user can get wrong on the command line of a trainer: each must end with one sentence on stderr and exit code 1,
# and write nothing. Then what must work: help, plan, evaluation, logs, the same bits twice.
#   dev/test/cli.sh ./train_deit
set -u
program=$1
. "$(dirname "$0")/verdict.sh"

# refused PATTERN ARGUMENTS...: exit code 1, one line that begins with "error:" and holds PATTERN, no output directory
refused() {
    pattern=$1
    shift
    timeout 60 "$program" "$@" -o "$work/out" >"$work/stdout" 2>"$work/stderr" </dev/null
    code=$?
    lines=$(grep -c '' "$work/stderr")
    [ $code = 1 ] && [ "$lines" = 1 ] && grep -q "^error: .*$pattern" "$work/stderr" && [ ! -e "$work/out" ]
    verdict $? "$* -> code $code, $lines lines: $(head -c 300 "$work/stderr")"
    rm -rf "$work/out"
}

train=data/fashion_train.bin
val=data/fashion_val.bin
refused 'unknown flag -q' -q 1
refused 'unknown flag --gamma' --gamma 0.5
refused '-g must be between' -g 1.5
refused '-g must be between' -g 1
refused '-g must be between' -g nan
refused '-g must be between' -g -0.1
refused '-g wants a number' -g half
refused '-b must be between' -b 0
refused '-b wants a whole number' -b 6.5
refused '-b wants a number' -b 6x
refused '-b must be between' -b 99999999999
refused '-e must be between' -e 0
refused '-r must be between' -r 4
refused '-l must be between' -l inf
refused 'is not a model' -m deit_huge
refused 'is not an optimizer' -opt lion
refused 'is not a strategy' -s maxk
refused 'is not a recipe' -recipe deit_ti_cifar100
refused 'is not a schedule' -schedule batch
refused '-drop_path must be between' -drop_path 1
refused '-ema must be between' -ema 1
refused 'does not divide into patches' -size 30
refused 'does not divide into patches' -size 28x30 -plan 1
for size in 28x x28 28x0 -28 28x28x28 99999 large ''; do refused '-size wants N or HxW' -size "$size"; done
refused 'images are loaded as squares' -size 28x32
refused '-chunk must be between' -chunk 0
refused '-wd_all must be between' -wd_all 2
for gone in -tb -bench -bench_data; do refused "unknown flag $gone" $gone 1; done
refused 'cannot open .*nowhere' -i nowhere.bin
refused 'is not a regular file' -i data
refused 'has images of 1 channels' -chans 3
refused 'has 10 classes' -classes 7
refused '-predict needs weights' -predict data/fashion_val.bin
refused 'give one of them' -eval 1 -sheet "$work/sheet"
refused '-crop must be between' -crop 2
refused '-scale must be between' -crop 1 -scale 0
refused '-crop_pct must be between' -crop_pct 1.1
refused '-repeats must be between' -repeats 0
refused '-threads must be between' -threads 1000
refused 'has 9984 images in an epoch, fewer than the 9999' -b 9999 -repeats 3
refused 'the shards of .*fashion_train.* are not all made yet' -i "$(mkdir -p "$work/fashion_train.part"; cp $train "$work/fashion_train_00000.bin"; echo "$work/fashion_train")"
refused 'fewer than the' -b 20000
refused 'cannot open .*nowhere.safetensors' -w nowhere.safetensors -i nowhere.bin -j nowhere.bin # weights come first
refused '-stats reports on DropIT' -stats 1
refused '-plan wants' -plan lots
for aa in rand rand-m9 rand-m9-inc0 rand-m11-inc1 rand-inc1 rand-m9-inc1- rand-m9-n0-inc1 rand-m9-p0.5-inc1 rand-mx-inc1 augmix-m3 autoaugment ''; do
    refused 'is not a RandAugment' -aa "$aa"
done
refused '-reprob must be between' -reprob 1.5
refused '-mixup must be between' -mixup -1
# the last flag lacks its value
timeout 60 "$program" -b >"$work/stdout" 2>"$work/stderr"
[ $? = 1 ] && grep -q 'error: flag -b lacks its value' "$work/stderr"
verdict $? "a missing value"

# damaged shards, as training and as validation shard
: >"$work/empty"
refused 'is empty' -i "$work/empty"
for n in 1 8 12 16 24 28 32 36 40 56 72 80 88 124 127 128 160 64000 1632127; do
    head -c $n $val >"$work/cut"
    refused 'cut' -i "$work/cut"
    refused 'cut' -j "$work/cut"
done
{ head -c 8 $val; printf '\002'; tail -c +10 $val; } >"$work/version"
refused 'is of shard version 2' -i "$work/version"
for n in 0 30 126 128 5000 700000; do
    { head -c $n $val; head -c $((n + 1)) $val | tail -c 1 | tr '\000-\377' '\001-\377\000'; tail -c +$((n + 2)) $val; } >"$work/flip"
    refused 'flip' -i "$work/flip"
done

# too little memory: what is needed, what is there, what would fit
timeout 60 env CPU_MEMORY=60000000 "$program" -b 128 -o "$work/out" >"$work/stdout" 2>"$work/stderr"
if grep -q '^device: CPU' "$work/stdout"; then
    [ ! -e "$work/out" ] && grep -q '^error: [0-9]* bytes of device memory are needed, 60000000 are free; the largest batch that fits is -b [1-9]' "$work/stderr"
    verdict $? "too little memory: $(cat "$work/stderr")"
    fits=$(sed 's/.*-b \([0-9]*\),.*/\1/' "$work/stderr")
    timeout 60 env CPU_MEMORY=60000000 "$program" -b "$fits" -x 1 -v 0 >"$work/stdout" 2>"$work/stderr"
    verdict $? "-b $fits, said to fit: $(cat "$work/stderr")"
fi

# weights: a file that is not of this model lists what is wrong and says so in one last sentence
timeout 60 "$program" -w dev/reference/dumps/deit_odd_g00.safetensors -o "$work/out" >"$work/stdout" 2>"$work/stderr"
[ $? = 1 ] && [ ! -e "$work/out" ] && tail -n 1 "$work/stderr" | grep -q '^error: .*do not fit' && grep -q 'head.weight: missing' "$work/stderr"
verdict $? "weights of another model: $(tail -n 1 "$work/stderr")"

# a loss that is not finite stops the run and names a tensor
timeout 120 "$program" -l 1e6 -opt sgd -x 50 -v 0 -warmup 0 >"$work/stdout" 2>"$work/stderr"
[ $? = 1 ] && grep -q '^error: step .*the first tensor that is not is: [a-z]' "$work/stderr"
verdict $? "a loss that is not finite: $(cat "$work/stderr")"

# what works
"$program" -h >"$work/stdout" 2>&1 && grep -q -e '-g  *DropIT' "$work/stdout"
verdict $? "-h"
# a recipe sets the defaults, flags override it before and after it, and -h shows both
for order in "-b 7 -recipe deit_s_cifar100" "-recipe deit_s_cifar100 -b 7"; do
    "$program" $order -h >"$work/stdout" 2>&1 && grep -q -e '^  -b .*(default 7)' "$work/stdout" && grep -q -e '^  -e .*(default 1000)' "$work/stdout" &&
        grep -q -e '^  -m .*(default deit_small)' "$work/stdout" && grep -q '^  vit_b_imagenet: -m vit_base' "$work/stdout" &&
        "$program" $order -plan 1 | grep -q '^| moving average '
    verdict $? "a recipe: $order"
done
"$program" -m deit_tiny -b 64 -plan 1 >"$work/stdout" 2>&1 &&
    tail -n 1 "$work/stdout" | grep -q '^plan cached=[0-9]* scratch=[0-9]* parameters=[0-9]* gradients=[0-9]* optimizer=[0-9]* total=[0-9]*$'
verdict $? "-plan 1"
for run in a b; do
    timeout 120 "$program" -g 0.7 -x 4 -b 32 -v 0 -o "$work/$run" >"$work/stdout.$run" 2>&1
    sed 's/ ms:.*//' "$work/$run/main.log" >"$work/log.$run"
done
[ -s "$work/log.a" ] && cmp -s "$work/log.a" "$work/log.b" && grep -q '^final loss=[0-9.]* top1=[0-9.]* top5=[0-9.]*$' "$work/stdout.a"
verdict $? "the same command twice gives the same losses"
timeout 120 "$program" -g 0.7 -x 4 -b 16 -a 2 -v 0 -o "$work/c" >"$work/stdout" 2>&1 && [ "$(grep -c trl "$work/c/main.log")" = 4 ]
verdict $? "gradient accumulation"
timeout 60 "$program" -eval 1 >"$work/stdout" 2>&1 && tail -n 1 "$work/stdout" | grep -q '^final loss='
verdict $? "-eval 1"

# crops, other sizes; the number of reader threads changes nothing; a shard under its name and as a set of one
cp $train "$work/set_00000.bin"
for threads in 0 1 5; do
    timeout 120 "$program" -i "$([ $threads = 1 ] && echo "$work/set" || echo $train)" -size 32 -crop 1 -flip 1 -repeats 3 -crop_pct 0.875 -x 4 -b 16 -v 0 \
        -threads $threads -o "$work/threads$threads" >"$work/stdout" 2>&1
    sed 's/ ms:.*//' "$work/threads$threads/main.log" >"$work/log.$threads"
done
[ "$(grep -c trl: "$work/log.0")" = 4 ] && cmp -s "$work/log.0" "$work/log.1" && cmp -s "$work/log.0" "$work/log.5"
verdict $? "random crops of 32 pixels, with 0, 1 and 5 reader threads: $(tail -n 1 "$work/stdout")"

# a step line stands on stdout a few times a second, in main.log always; the log begins with the bytes of the plan
timeout 120 "$program" -i data/fashion_train -b 1 -patch 28 -x 300 -v 0 -o "$work/steps" >"$work/stdout" 2>&1 # finds fashion_train.bin
[ "$(grep -c '^s:[0-9]* trl:' "$work/steps/main.log")" = 300 ] && [ "$(grep -c '^step ' "$work/stdout")" -lt 150 ] &&
    grep -q '^step *1/300 ' "$work/stdout" && grep -q '^step *300/300 ' "$work/stdout" &&
    head -n 1 "$work/steps/main.log" | grep -q '^s:0 cached:[1-9][0-9]* total:[1-9][0-9]*$' &&
    tail -n 1 "$work/steps/main.log" | grep -q '^s:300 tel:[0-9.]* top1:[0-9.]* top5:[0-9.]*$' &&
    ! grep ' trl:' "$work/steps/main.log" | grep -qv ' trtop1:[0-9.]* trtop5:[0-9.]* lr:[^ ]* norm:[^ ]* ms:[0-9.]* img:[0-9.]*$'
verdict $? "300 short steps: $(grep -c '^step ' "$work/stdout") lines; $(head -n 2 "$work/steps/main.log")"

# what changes how the passes are cut into chunks, and which tensors decay
timeout 60 "$program" -chunk 1 -b 32 -x 2 -v 0 >"$work/stdout" 2>&1 && grep -q 'chunks of 16 images$' "$work/stdout"
verdict $? "-chunk 1: $(grep chunks "$work/stdout")"
"$program" -size 56x28 -b 2 -plan 1 | grep '^| patches ' >"$work/high"
"$program" -size 28 -b 4 -plan 1 | grep '^| patches ' >"$work/square"
[ -s "$work/high" ] && cmp -s "$work/high" "$work/square"
verdict $? "two images of 56 x 28 have as many patches as four of 28: $(cat "$work/high")"

# DropIT's report: a line for each copy of its four tensors, every second step
timeout 60 "$program" -g 0.7 -stats 2 -b 16 -x 3 -v 0 >"$work/stdout" 2>&1
[ "$(grep -c '^stats [a-z0-9_]* *copy *[0-3] | kept  30.0[0-9] % of the elements,' "$work/stdout")" = 32 ]
verdict $? "-stats 2: $(grep '^stats' "$work/stdout" | head -n 2)"
timeout 60 "$program" -b 5 -sheet "$work/sheet" >"$work/stdout" 2>&1 && head -c 400 "$work/sheet" | grep -q '"image":{"dtype":"F32","shape":\[5,1,28,28\]'
verdict $? "-sheet writes safetensors: $(tail -n 1 "$work/stdout")"

# bytes of what the forward pass caches for DeiT-Ti at 224 pixels, batch 64, in fp32: at most what was promised, in MiB
plan() { # plan LEVEL GAMMA CACHED
    "$program" -m deit_tiny -b 64 -r "$1" -g "$2" -plan 1 | sed -n 's/^plan cached=\([0-9]*\) scratch=\([0-9]*\) .*/\1 \2/p' | {
        read -r cached scratch
        [ "$cached" -le $(($3 * 1048576)) ] && [ "$scratch" -le $((300 * 1048576)) ]
    }
    verdict $? "-plan of -r $1 -g $2: at most $3 MiB cached, 300 MiB scratch"
}
if grep -q '^device: .*fp32' "$work/stdout"; then
    plan 0 0 1850; plan 0 0.7 1320; plan 0 0.9 1165
    plan 1 0 1180; plan 1 0.7 1105; plan 1 0.9 1080
    plan 2 0 390;  plan 2 0.7 320;  plan 2 0.9 295
    plan 3 0 170;  plan 3 0.7 170;  plan 3 0.9 170
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
