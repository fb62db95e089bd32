#!/bin/bash
# Remakes the dumps that test_deit and test_resnet read. The same PyTorch gives the same bytes. PYTHON
# names the interpreter; PyTorch 1.13 and torchvision 0.14 are enough.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
dump() { "$python" "${1%%_*}.py" dump "dumps/$1.safetensors" "${@:2}"; }

# nothing is a multiple of 32, heads have 14 elements: every tail of every kernel runs
odd="--image_size 15 --patch_size 5 --in_chans 1 --embed_dim 42 --depth 2 --num_heads 3
     --num_classes 7 --batch_size 5"
dump deit_odd_g00 $odd --gamma 0 --seed 1
dump deit_odd_g70 $odd --gamma 0.7 --seed 2

# three channels, SGD with momentum
rgb="--image_size 16 --patch_size 4 --in_chans 3 --embed_dim 48 --depth 2 --num_heads 4
     --num_classes 10 --batch_size 6 --optimizer sgd --lr 0.05 --weight_decay 0.001"
dump deit_rgb_sgd_g00 $rgb --gamma 0 --seed 3
dump deit_rgb_sgd_g50 $rgb --gamma 0.5 --seed 4

# aligned: the vectorised and fused paths run
aligned="--image_size 32 --patch_size 8 --in_chans 3 --embed_dim 64 --depth 2 --num_heads 2
         --num_classes 16 --batch_size 8"
dump deit_aligned_g00 $aligned --gamma 0 --seed 5
dump deit_aligned_g90 $aligned --gamma 0.9 --seed 6

# the nano model's 50 tokens: more than one tile and one block of 16,384 elements. With this seed the
# threshold of blocks.0.attn.qkv falls on six equal |x|, of which five are kept
dump deit_tokens_g90 --image_size 28 --patch_size 4 --in_chans 1 --embed_dim 32 --depth 1 \
     --num_heads 2 --num_classes 10 --batch_size 12 --gamma 0.9 --seed 21

# one image, two classes, and a gamma at which nothing is kept: k is 0, weight gradients are 0
dump deit_none_kept --image_size 8 --patch_size 4 --in_chans 2 --embed_dim 16 --depth 1 \
     --num_heads 2 --num_classes 2 --batch_size 1 --gamma 0.9999 --seed 8

# drop-path: three blocks, so three rates; nothing divides anything, and the vector paths with gamma
# above 0. Three blocks round in bf16 by about what the test allows (PyTorch's own bf16 by more); with
# this seed ours stays below
dump deit_path_g00 --image_size 15 --patch_size 5 --in_chans 1 --embed_dim 33 --depth 3 \
     --num_heads 3 --num_classes 7 --batch_size 7 --gamma 0 --drop_path 0.4 --seed 32
dump deit_path_g70 --image_size 16 --patch_size 8 --in_chans 3 --embed_dim 32 --depth 3 --num_heads 2 \
     --num_classes 10 --batch_size 8 --gamma 0.7 --drop_path 0.5 --optimizer sgd --lr 0.05 \
     --weight_decay 0.001 --seed 32

# ResNet. With many another seed a value comes so near to 0 before a ReLU, in the first step or a later
# one, that rounding decides its sign and losses differ by 1e-3. With these, float64 has the same signs
# and masks, and moving all parameters by up to two units in their last place, at random and 40 times,
# moves the losses by less than 1e-6. "Cut": a threshold falls on equal |x|, of which some are kept

# basic blocks, ImageNet stem, sides 35, 18, 9, 9, 5, 3; weight decay so large that a norm without it
# shows in the losses; seed 12: cut
basic="--block basic --layers 1,1,1 --width 6 --stem imagenet --image_size 35 --in_chans 3
       --num_classes 7 --batch_size 4 --weight_decay 0.05"
dump resnet_basic_g00 $basic --gamma 0 --seed 8
dump resnet_basic_g70 $basic --gamma 0.7 --nesterov 1 --seed 12

# CIFAR stem, one channel, sides 9 and 5; two blocks without downsampling. At gamma 0.5 four layers keep
# zeros, for fewer than half of their inputs are above 0
cifar="--block basic --layers 2,1 --width 12 --stem cifar --image_size 9 --in_chans 1
       --num_classes 10 --batch_size 6"
dump resnet_cifar_g00 $cifar --gamma 0 --nesterov 1 --seed 7
dump resnet_cifar_g50 $cifar --gamma 0.5 --seed 2

# bottlenecks: in the first stage the downsampling has stride 1, the last block has none; seed 21: cut
bottleneck="--block bottleneck --layers 1,2 --width 6 --stem imagenet --image_size 35 --in_chans 2
            --num_classes 5 --batch_size 4 --weight_decay 0.05"
dump resnet_bottleneck_g00 $bottleneck --gamma 0 --nesterov 1 --seed 28
dump resnet_bottleneck_g90 $bottleneck --gamma 0.9 --seed 21

# bottlenecks behind the CIFAR stem, a width of 10 and odd sides, so no vector path fits; cut
dump resnet_cifarneck_g70 --block bottleneck --layers 1,1 --width 10 --stem cifar --image_size 9 \
     --in_chans 2 --num_classes 9 --batch_size 5 --gamma 0.7 --nesterov 1 --seed 8

# aligned: everything divides by 8 but the image's four channels; inputs of up to 65,536 elements
aligned="--block bottleneck --layers 1,1 --width 8 --stem cifar --image_size 16 --in_chans 4
         --num_classes 16 --batch_size 8 --lr 0.1 --weight_decay 0.01"
dump resnet_aligned_g00 $aligned --gamma 0 --seed 28
dump resnet_aligned_g90 $aligned --gamma 0.9 --nesterov 1 --seed 28

# all four stages, down to a side of 2; the width is odd; cut
dump resnet_stages_g70 --block bottleneck --layers 1,1,1,1 --width 3 --stem imagenet --image_size 33 \
     --in_chans 1 --num_classes 6 --batch_size 4 --gamma 0.7 --lr 0.02 --seed 33

# the stem's input is dropped too (mask.conv1); cut
dump resnet_stem_g70 --block basic --layers 1,1 --width 6 --stem imagenet --image_size 21 --in_chans 2 \
     --num_classes 4 --batch_size 6 --gamma 0.7 --g_all 1 --seed 6

# one image, one block, nothing is kept (k is 0), and neither momentum nor weight decay
dump resnet_none_g99 --block basic --layers 1 --width 5 --stem cifar --image_size 7 --in_chans 1 \
     --num_classes 2 --batch_size 1 --gamma 0.9999 --momentum 0 --weight_decay 0 --seed 3
