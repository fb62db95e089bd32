#!/usr/bin/env python3
"""An independent PyTorch ViT/DeiT with DropIT: what train_deit.cu is compared with.

    deit.py dump FILE ...   writes weights, one batch, logits, loss, every gradient and the losses
                            of some steps: a safetensors file that test_deit reads
    deit.py init FILE ...   writes initial weights, for -w of the trainer and of `train`
    deit.py train ...       trains with the trainer's flags on the trainer's batches

Nothing is shared with the trainer but the published definitions and the random numbers of rng.py.
PyTorch 1.13 is enough. Names of parameters are timm's.
"""
import argparse
import collections
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rng

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PROGRAM = os.path.basename(sys.argv[0])  # resnet.py too trains and writes dumps with these functions
sys.path.insert(0, os.path.join(ROOT, "data"))
import safetensors_file  # noqa: E402  (data/ is no package)
from shard import Shard, ShardError  # noqa: E402

# ----------------------------------------------------------------------------
# DropIT

BLOCK = 16384  # elements of a block in the strategies fastmink and random


def keep_largest(key, k):
    """Mask of the k largest keys of each row, ties by lowest index. key (rows, n), any integer k.

    Same result as a stable sort by (-key, index), in linear time: everything above the k-th largest
    key is kept, and of those that equal it the first ones.
    """
    if k == 0:
        return torch.zeros_like(key, dtype=torch.bool)
    place = key.shape[1] - k
    threshold = torch.from_numpy(np.partition(key.numpy(), place, axis=1)[:, place:place + 1].copy())
    mask = key >= threshold
    if bool((mask.sum(dim=1) == k).all()):
        return mask  # no tie is cut in two, the usual case
    above, tied = key > threshold, key == threshold
    places = k - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= places))


class Dropit:
    """Which elements of a linear layer's input its weight gradient will see."""

    def __init__(self, gamma, strategy="mink", seed=0):
        self.gamma, self.strategy, self.seed = gamma, strategy, seed
        self.step = 0      # counts the forward passes that train, for the random strategy's keys
        self.masks = None  # a dictionary collects the masks of a step, by layer name

    def count(self, n):
        return int(n * (1 - self.gamma))

    def mask(self, flat, layer_id):
        n = flat.numel()
        if self.strategy == "mink":
            return keep_largest(flat.abs()[None], self.count(n))[0]
        if self.strategy == "fastmink":
            key = flat.abs()
        else:
            keys = rng.dropit_keys(self.seed, layer_id, self.step, n)
            key = torch.from_numpy(keys.astype(np.int64))
        whole = n // BLOCK * BLOCK
        parts = [keep_largest(key[:whole].view(-1, BLOCK), self.count(BLOCK)).view(-1)]
        if whole < n:
            parts.append(keep_largest(key[whole:][None], self.count(n - whole))[0])
        return torch.cat(parts)

    def select(self, flat, name, layer_id):
        """Indices (int32, rising) of the kept elements of the flattened input."""
        if self.strategy == "topk":
            # the published line: which of several ties stay is up to torch.topk, the order as well
            return flat.abs().topk(self.count(flat.numel()), sorted=False)[1].to(torch.int32)
        mask = self.mask(flat, layer_id)
        if self.masks is not None:
            self.masks[name] = mask
        return mask.nonzero().view(-1).to(torch.int32)


class DropitLinearFunction(torch.autograd.Function):
    """y = x w^T + b that caches k values and indices of x. Only w's gradient is approximate."""

    @staticmethod
    def forward(ctx, x, weight, bias, dropit, name, layer_id):
        flat = x.detach().reshape(-1)
        index = dropit.select(flat, name, layer_id)
        ctx.save_for_backward(flat.gather(0, index.long()), index, weight)
        ctx.shape = x.shape
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dout):
        values, index, weight = ctx.saved_tensors
        buffer = values.new_zeros(ctx.shape.numel()).scatter_(0, index.long(), values)
        buffer = buffer.view(-1, ctx.shape[-1])
        dout = dout.reshape(-1, dout.shape[-1])
        dweight = dout.t() @ buffer
        # as published: the input's gradient goes where the unpacked input was
        dinput = torch.matmul(dout, weight, out=buffer).view(ctx.shape)
        return dinput, dweight, dout.sum(0), None, None, None


class Linear(nn.Linear):
    """nn.Linear with an optional DropIT. dropit, name and layer_id are set by Deit.use_dropit."""
    dropit = None

    def forward(self, x):
        if self.dropit is None or not self.training:
            return F.linear(x, self.weight, self.bias)
        return DropitLinearFunction.apply(x, self.weight, self.bias, self.dropit, self.name,
                                          self.layer_id)


# ----------------------------------------------------------------------------
# the model, as timm builds it

class PatchEmbed(nn.Module):
    dropit = None

    def __init__(self, config):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, patch, stride=patch)

    def forward(self, image):
        if self.dropit is None or not self.training:
            return self.proj(image).flatten(2).transpose(1, 2)
        # the convolution as a linear layer: patches (B, T-1, in_chans*P*P), a patch as (c, kh, kw)
        patches = F.unfold(image, self.proj.kernel_size, stride=self.proj.stride).transpose(1, 2)
        weight = self.proj.weight.flatten(1)
        return DropitLinearFunction.apply(patches, weight, self.proj.bias, self.dropit, self.name,
                                          self.layer_id)


class Attention(nn.Module):
    fused = False  # one operator that keeps no T x T matrix, where PyTorch has it

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) * (C // self.heads) ** -0.5
            x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, T, C))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath:
    """Which branches of which images are left out: timm's DropPath on the trainer's draws."""

    def __init__(self, rate, depth, seed):
        # timm: [x.item() for x in torch.linspace(0, drop_path_rate, depth)]
        self.rates, self.seed = torch.linspace(0, rate, depth).tolist(), seed
        self.step = 0         # counts the forward passes that train
        self.first_image = 0  # of this rank's batch among those of all ranks

    def scales(self, block, branch, images):
        """0 for an image that leaves the branch out (0: attention, 1: mlp), else 1 / keep."""
        keep = 1 - self.rates[block]
        places = (2 * block + branch << 32) + self.first_image + np.arange(images)
        uniform = (rng.philox(self.seed, rng.DROP_PATH, self.step, places)[0] + 0.5) / 2.0**32
        return torch.from_numpy(uniform < keep).float().div_(keep)

    def __call__(self, x, block, branch):
        if self.rates[block] == 0:
            return x
        return x * self.scales(block, branch, x.shape[0]).to(x.dtype)[:, None, None]


class Block(nn.Module):
    drop_path = None

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x):
        if self.drop_path is None or not self.training:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = x + self.drop_path(self.attn(self.norm1(x)), self.index, 0)
        return x + self.drop_path(self.mlp(self.norm2(x)), self.index, 1)


class Deit(nn.Module):
    checkpointing = False  # keep only each block's input, run the block again in the backward pass

    def __init__(self, config):
        super().__init__()
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, config.embed_dim))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.head = Linear(config.embed_dim, config.num_classes)

    def forward(self, image):
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            if self.checkpointing:
                # reentrant: its input is a saved tensor, which bench_deit_cpu.py can count
                x = checkpoint(block, x, use_reentrant=True)
            else:
                x = block(x)
        return self.head(self.norm(x)[:, 0])

    def use_drop_path(self, drop_path):
        for i, block in enumerate(self.blocks):
            block.drop_path, block.index = drop_path, i

    def use_dropit(self, dropit, every_layer=False):
        """Drops in the four linears of every block; every_layer: in patch embedding and head too.

        Layer ids: 4 * block + (0 qkv, 1 proj, 2 fc1, 3 fc2), then patch embedding, then head.
        """
        layers = [(f"blocks.{i}.{name}", block.get_submodule(name))
                  for i, block in enumerate(self.blocks)
                  for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        if every_layer:
            layers += [("patch_embed.proj", self.patch_embed), ("head", self.head)]
        for layer_id, (name, layer) in enumerate(layers):
            layer.dropit, layer.name, layer.layer_id = dropit, name, layer_id


def decays(name, parameter):
    """Tensors of two or more dims do, class token and positions excepted."""
    return parameter.ndim >= 2 and name not in ("cls_token", "pos_embed")


def make_optimizer(model, options, decays=decays, nesterov=False):
    """Weight decay where decays(name, parameter) says so."""
    named = list(model.named_parameters())
    groups = [{"params": [p for name, p in named if decays(name, p)],
               "weight_decay": options.weight_decay},
              {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0}]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2),
                             eps=options.eps)


def state(model):
    """{name: tensor} of a model's parameters and, where it has batch norm, running statistics."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if not name.endswith("num_batches_tracked")}


def set_parameters(model, values, origin):
    """Copies {name: array} into the model's state; every name and shape must match."""
    own = state(model)
    values = {name: value for name, value in values.items() if not name.endswith("num_batches_tracked")}
    for name in sorted(set(own) ^ set(values)):
        sys.exit(f"{origin}: {'lacks' if name in own else 'has the unknown'} {name}")
    with torch.no_grad():
        for name, parameter in own.items():
            if tuple(values[name].shape) != tuple(parameter.shape):
                sys.exit(f"{origin}: {name} has shape {values[name].shape}, "
                         f"the model's is {tuple(parameter.shape)}")
            parameter.copy_(torch.from_numpy(np.array(values[name])))


def initial_parameters(model, seed):
    """What training starts from, float32. Every tensor has its own step of the generator."""
    values = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        n, shape = parameter.numel(), tuple(parameter.shape)
        if name.startswith("patch_embed.proj"):  # PyTorch's default for a convolution
            bound = model.patch_embed.proj.weight[0].numel() ** -0.5
            value = bound * (2 * rng.uniform(seed, rng.INIT, i, n) - 1)
        elif name == "cls_token":
            value = 1e-6 * rng.normal(seed, rng.INIT, i, n)
        elif "norm" in name:
            value = np.full(n, 1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias"):
            value = np.zeros(n)
        else:
            # timm's trunc_normal_ cuts at +-2, a hundred standard deviations away
            value = np.clip(0.02 * rng.normal(seed, rng.INIT, i, n), -2, 2)
        values[name] = value.astype(np.float32).reshape(shape)
    return values


# ----------------------------------------------------------------------------
# dump: one batch, everything that test_deit compares

def bf16_values(x):
    """The nearest values that bf16 holds too, as float32.

    A trainer in bf16 then starts from the dump's own parameters and images, and the comparison
    shows the rounding of its arithmetic alone.
    """
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) & np.uint32(0xffff0000)).view(np.float32)


def dump_parameters(model, seed):
    """Values of a size at which every tensor matters: no zero bias, no norm's weight of one.

    Running statistics are float32 in a trainer in bf16 too, so theirs are not rounded to bf16.
    """
    values = {}
    for i, (name, parameter) in enumerate(state(model).items()):
        value = rng.normal(seed, rng.INIT, i, parameter.numel())
        if name.endswith("running_mean") or name.endswith("running_var"):
            value = 0.3 * value if name.endswith("mean") else np.exp(0.3 * value)
            values[name] = value.astype(np.float32)
            continue
        if parameter.ndim == 1:
            value = 1 + 0.2 * value if name.endswith("weight") else 0.1 * value
        elif name in ("cls_token", "pos_embed"):
            value = 0.3 * value
        else:
            value = value * parameter[0].numel() ** -0.5
        values[name] = bf16_values(value).reshape(tuple(parameter.shape))
    return values


def blank_patches(config, batch_size, seed):
    """bool (B, 1, H, W): about a fifth of the patches, which give exact ties in the first block."""
    grid = config.image_size // config.patch_size
    # steps far from those of the parameters, here and in dump_batch
    blank = rng.uniform(seed, rng.INIT, 1 + (1 << 20), batch_size * grid * grid) < 0.2
    blank = blank.reshape(batch_size, 1, grid, grid)
    return blank.repeat(config.patch_size, axis=2).repeat(config.patch_size, axis=3)


def dump_batch(config, batch_size, seed, blank):
    """Images of noise, but where they are blank, and labels."""
    shape = (batch_size, config.in_chans, config.image_size, config.image_size)
    image = rng.normal(seed, rng.INIT, 1 << 20, math.prod(shape)).reshape(shape)
    image = bf16_values(np.where(blank, -0.5, image))
    label = rng.uniform(seed, rng.INIT, 2 + (1 << 20), batch_size) * config.num_classes
    return image, label.astype(np.int32)


# What trains: model, optimizer, the Dropit that the model may use, and start(step, rank), which is
# called before each forward pass that trains and says which random numbers it draws
Run = collections.namedtuple("Run", "model optimizer dropit start")


def make_run(options, config, values, origin, dtype=torch.float32):
    model = Deit(config).to(dtype)
    set_parameters(model, values, origin)
    dropit = Dropit(options.gamma, options.strategy, options.seed)
    if options.gamma > 0:
        model.use_dropit(dropit, options.g_all)
    drop_path = DropPath(options.drop_path, config.depth, options.seed)
    if options.drop_path > 0:
        model.use_drop_path(drop_path)

    def start(step, rank):
        dropit.step = drop_path.step = step
        dropit.seed = options.seed ^ (rank << 48)  # ranks draw different elements
    return Run(model, make_optimizer(model, options), dropit, start)


def run_dump(run, steps, image, label):
    """Trains on the one batch. (losses, first step's logits, gradients, masks)."""
    image = torch.from_numpy(image).to(next(run.model.parameters()).dtype)
    label = torch.from_numpy(label).long()
    losses, first = [], None
    for step in range(steps):
        run.start(step, 0)
        run.dropit.masks = {} if step == 0 else None
        run.optimizer.zero_grad()
        logits = run.model(image)
        loss = F.cross_entropy(logits, label)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradients = {name: p.grad.clone().numpy() for name, p in run.model.named_parameters()}
            masks = {name: mask.numpy() for name, mask in run.dropit.masks.items()}
            first = logits.detach().numpy().copy(), gradients, masks
        run.optimizer.step()
    return np.array(losses), *first


def write_dump(options, metadata, make, values, image, label):
    """make(options, options, values, "dump", dtype) gives a Run that starts from `values`."""
    run = make(options, options, values, "dump", torch.float32)
    losses, logits, gradients, masks = run_dump(run, options.steps, image, label)
    # float64 beside it says how much of the losses is rounding: the test's tolerance is 1e-4
    exact, _, exact_gradients, exact_masks = run_dump(
        make(options, options, values, "dump", torch.float64), options.steps, image, label)
    drift = np.max(np.abs(losses - exact) / exact)
    swapped = sum(int((masks[name] != exact_masks[name]).sum()) for name in masks)
    worst = max(np.max(np.abs(gradients[name] - g)) / (np.max(np.abs(g)) or 1.0)
                for name, g in exact_gradients.items())
    tensors = {"image": image, "label": label, "logits": logits,
               "loss": np.float32(losses[:1]), "losses": np.float32(losses)}
    tensors.update({f"param.{name}": values[name] for name in gradients})
    tensors.update({f"grad.{name}": value for name, value in gradients.items()})
    for name, value in state(run.model).items():
        if name not in gradients:  # running statistics, before the first step and after the last
            tensors[f"buffer.{name}"], tensors[f"after.{name}"] = values[name], value.numpy()
    tensors.update({f"mask.{name}": np.packbits(mask.reshape(-1), bitorder="little")
                    for name, mask in masks.items()})
    safetensors_file.save(options.file, tensors, metadata)
    print(f"{os.path.basename(options.file)}: {os.path.getsize(options.file)} bytes, loss "
          f"{losses[0]:.6f} -> {losses[-1]:.6f}; against float64: losses {drift:.1e}, gradients "
          f"{worst:.1e}, {swapped} mask bits")


def dump_metadata(options, model, config_names, sgd_names=("momentum",)):
    keys = [*config_names, "batch_size", "gamma", "optimizer", "lr", "weight_decay"]
    keys += sgd_names if options.optimizer == "sgd" else ["beta1", "beta2", "eps"]
    return {"model": model, **{key: getattr(options, key) for key in keys}}


def dump(options):
    metadata = dump_metadata(options, "deit", CONFIG_NAMES)
    if options.drop_path > 0:
        metadata.update(drop_path=options.drop_path, drop_path_seed=options.seed)
    blank = blank_patches(options, options.batch_size, options.seed)
    image, label = dump_batch(options, options.batch_size, options.seed, blank)
    write_dump(options, metadata, make_run, dump_parameters(Deit(options), options.seed), image, label)


# ----------------------------------------------------------------------------
# train: the trainer's flags, the trainer's batches

MODELS = {  # image, patch, channels, classes, dim, depth, heads
    "deit_nano": (28, 4, 1, 10, 64, 4, 4),
    "deit_tiny": (224, 16, 3, 1000, 192, 12, 3),
    "deit_small": (224, 16, 3, 1000, 384, 12, 6),
    "deit_base": (224, 16, 3, 1000, 768, 12, 12),
    "vit_base": (224, 16, 3, 1000, 768, 12, 12),
}
CONFIG_NAMES = ("image_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth",
                "num_heads")


def model_config(name):
    return argparse.Namespace(**dict(zip(CONFIG_NAMES, MODELS[name])))


def override(config, options):
    """The configuration with what flags say of it."""
    return argparse.Namespace(**{name: getattr(options, name, None) or value
                                 for name, value in vars(config).items()})


def learning_rate(step, steps, options):
    """Linear warm-up, then half a cosine that would reach zero at `steps`."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, steps - options.warmup)
    return 0.5 * options.lr * (1 + math.cos(math.pi * progress))


def open_shard(path, config):
    try:
        shard = Shard(path)
    except (OSError, ShardError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    side = config.image_size
    if not (shard.channels == config.in_chans and shard.classes == config.num_classes
            and (shard.index["height"] == side).all() and (shard.index["width"] == side).all()):
        sys.exit(f"{PROGRAM}: {path} has {shard.channels} channels, {shard.classes} classes and "
                 f"images of {shard.index['height'][0]}x{shard.index['width'][0]}; the model "
                 f"expects {config.in_chans}, {config.num_classes}, {side}x{side}")
    return shard


def evaluate(model, shard, batch_size):
    """Mean cross-entropy without smoothing, top-1 and top-5 (0 to 1) over the whole shard."""
    model.eval()
    loss, top1, top5 = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, shard.count, batch_size):
            image, label = shard.batch(np.arange(start, min(start + batch_size, shard.count)))
            label = torch.from_numpy(label).long()
            logits = model(torch.from_numpy(image))
            loss += F.cross_entropy(logits, label, reduction="sum").item()
            own = logits.gather(1, label[:, None])
            # rank of the true class; a NaN is larger than nothing, so it must not count as right
            rank = (~(logits <= own)).sum(dim=1)
            top1 += int((rank < 1).sum())
            top5 += int((rank < 5).sum())
    model.train()
    return loss / shard.count, top1 / shard.count, top5 / shard.count


def starting_values(options, model, initial):
    """What a training run starts from: the file that -w names, or initial(model, seed)."""
    if not options.weights:
        return initial(model, options.seed), "initial values"
    try:
        return safetensors_file.load(options.weights)[0], options.weights
    except (OSError, ValueError) as error:
        sys.exit(f"{PROGRAM}: {error}")


def train(options):
    config = override(model_config(options.model), options)
    shards = open_shard(options.data, config), open_shard(options.validation, config)
    values = starting_values(options, Deit(config), initial_parameters)
    fit(options, make_run(options, config, *values), *shards)


def fit(options, run, data, validation):
    """Trains as the trainer does and prints its lines."""
    model, optimizer = run.model, run.optimizer
    # the ranks of a run are parts of a step here, one after the other: each has its own images and
    # its own selection, and the gradients add up
    B, accumulation, ranks = options.batch_size, options.accumulation, options.ranks
    step_images = B * accumulation * ranks
    steps_per_epoch = data.count // step_images
    if steps_per_epoch == 0:
        sys.exit(f"{PROGRAM}: {options.data} has {data.count} images, less than one step of "
                 f"{step_images}")
    steps = options.epochs * steps_per_epoch
    log = None
    if options.output:
        os.makedirs(options.output, exist_ok=True)
        log = open(os.path.join(options.output, "main.log"), "w")
    last = min(steps, options.stop) if options.stop else steps
    for step in range(last):
        began = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = rng.epoch_permutation(options.seed, epoch, data.count)
        lr = learning_rate(step, steps, options)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        total = 0.0
        for part in range(accumulation * ranks):
            micro, rank = divmod(part, ranks)
            positions = (place * accumulation * ranks + part) * B + np.arange(B)
            image, label = data.batch(order[positions])
            if options.flip:
                mirrored = rng.flips(options.seed, epoch, positions)
                image[mirrored] = image[mirrored][..., ::-1]
            run.start(step * accumulation + micro, rank)
            logits = model(torch.from_numpy(image))
            loss = F.cross_entropy(logits, torch.from_numpy(label).long(),
                                   label_smoothing=options.smoothing) / (accumulation * ranks)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or math.inf).item()
        optimizer.step()
        ms = 1000 * (time.perf_counter() - began)
        print(f"step {step + 1:5d}/{steps} | loss {total:.6f} | norm {norm:8.4f} | lr {lr:.2e} | "
              f"{ms:8.2f} ms | {1000 * step_images / ms:7.0f} img/s", flush=True)
        if log:
            log.write(f"s:{step + 1} trl:{total:.9g} lr:{lr:.9g} norm:{norm:.9g}\n")
        if not math.isfinite(total):
            sys.exit(f"{PROGRAM}: the loss of step {step + 1} is {total}")
        every = options.every * steps_per_epoch
        if step + 1 == last or (every and (step + 1) % every == 0):
            scores = evaluate(model, validation, B)
            print("eval  epoch %d | loss %.6f | top-1 %6.2f%% | top-5 %6.2f%%"
                  % (epoch + 1, scores[0], 100 * scores[1], 100 * scores[2]), flush=True)
            if log:
                log.write("s:%d tel:%.9g top1:%.9g top5:%.9g\n"
                          % (step + 1, scores[0], 100 * scores[1], 100 * scores[2]))
    if log:
        log.close()
    loss, top1, top5 = scores
    print("final loss=%.6f top1=%.2f top5=%.2f" % (loss, 100 * top1, 100 * top5))


# ----------------------------------------------------------------------------
# command line

def gamma(text):
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def dump_flags(one):
    one.add_argument("file")
    one.add_argument("--batch_size", type=positive, default=4)
    one.add_argument("--gamma", type=gamma, default=0.0)
    one.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    for name, default in (("lr", 1e-3), ("weight_decay", 0.05), ("beta1", 0.9), ("beta2", 0.999),
                          ("eps", 1e-8), ("momentum", 0.9)):
        one.add_argument(f"--{name}", type=float, default=default)
    one.add_argument("--steps", type=positive, default=10)
    one.add_argument("--seed", type=int, default=1)
    one.set_defaults(strategy="mink", g_all=0)


def training_flags(one):
    flag = one.add_argument
    flag("-i", dest="data", default=os.path.join(ROOT, "data", "fashion_train.bin"))
    flag("-j", dest="validation", default=os.path.join(ROOT, "data", "fashion_val.bin"))
    flag("-o", dest="output", help="directory for main.log")
    flag("-size", dest="image_size", type=positive)
    flag("-chans", dest="in_chans", type=positive)
    flag("-classes", dest="num_classes", type=positive)
    flag("-b", dest="batch_size", type=positive, default=64)
    flag("-a", dest="accumulation", type=positive, default=1)
    flag("-ranks", type=positive, default=1,
         help="as mpirun -np N: N batches a step, each with its own selection")
    flag("-e", dest="epochs", type=positive, default=6)
    flag("-x", dest="stop", type=int, default=0, help="stop after this many steps; 0: never")
    flag("-l", dest="lr", type=float, default=2e-3)
    flag("-opt", dest="optimizer", choices=("adamw", "sgd"), default="adamw")
    flag("-wd", dest="weight_decay", type=float, default=0.05)
    flag("-beta1", type=float, default=0.9)
    flag("-beta2", type=float, default=0.999)
    flag("-momentum", type=float, default=0.9, help="SGD")
    flag("-warmup", type=int, default=50, help="steps")
    flag("-smoothing", type=float, default=0.0)
    flag("-clip", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    flag("-flip", type=int, choices=(0, 1), default=0)
    flag("-g", dest="gamma", type=gamma, default=0.0)
    flag("-s", dest="strategy", choices=("mink", "fastmink", "random"), default="mink")
    flag("-g_all", type=int, choices=(0, 1), default=0)
    flag("-w", dest="weights", help="safetensors file of initial weights")
    flag("-v", dest="every", type=int, default=1, help="evaluate every N epochs; 0: at the end")
    flag("-seed", type=int, default=0)
    flag("-threads", type=positive, default=2)
    one.set_defaults(eps=1e-8)


def add_config(parser):
    for name, default in zip(CONFIG_NAMES, MODELS["deit_nano"]):
        parser.add_argument(f"--{name}", type=positive, default=default)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)

    one = modes.add_parser("dump", help="write a dump for test_deit", allow_abbrev=False)
    dump_flags(one)
    add_config(one)
    one.add_argument("--drop_path", type=float, default=0.0, help="rate of the last block")
    one.set_defaults(run=dump)

    one = modes.add_parser("init", help="write initial weights", allow_abbrev=False)
    one.add_argument("file")
    add_config(one)
    one.add_argument("-m", dest="model", choices=MODELS, help="a model by its name")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=init)

    one = modes.add_parser("train", help="train as the trainer does", allow_abbrev=False)
    one.add_argument("-m", dest="model", choices=MODELS, default="deit_nano")
    training_flags(one)
    one.add_argument("-patch", dest="patch_size", type=positive)
    one.add_argument("-drop_path", type=float, default=0.0)
    one.set_defaults(run=train)

    options = parser.parse_args(arguments)
    if options.mode != "train" and options.image_size % options.patch_size:
        parser.error(f"image size {options.image_size} is no multiple of {options.patch_size}")
    if options.mode != "train" and options.embed_dim % options.num_heads:
        parser.error(f"dim {options.embed_dim} is no multiple of {options.num_heads} heads")
    return options


def write_initial(path, model, values):
    safetensors_file.save(path, values)
    print(f"wrote {path}: {sum(p.numel() for p in model.parameters())} parameters")


def init(options):
    model = Deit(model_config(options.model) if options.model else options)
    write_initial(options.file, model, initial_parameters(model, options.seed))


def main(options):
    # one thread and deterministic algorithms for dumps: the same bytes again with the same PyTorch
    torch.set_num_threads(options.threads if options.mode == "train" else 1)
    torch.use_deterministic_algorithms(True)
    options.run(options)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
