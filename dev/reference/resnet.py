#!/usr/bin/env python3
"""torchvision's ResNet with DropIT: what train_resnet.cu is compared with.

    resnet.py dump FILE ...   writes weights, running statistics, one batch, logits, loss, every
                              gradient and the losses of some steps: a file that test_resnet reads
    resnet.py init FILE ...   writes initial weights, for -w of the trainer and of `train`
    resnet.py train ...       trains with the trainer's flags on the trainer's batches

Blocks, stages and forward pass are torchvision's own classes; here are DropIT for a convolution and
what torchvision does not build: other widths, the CIFAR stem, fewer stages. Dumps and training are
deit.py's. PyTorch 1.13 with torchvision 0.14 is enough. check_resnet.py tests this file.
"""
import argparse
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import deit
import rng

# ----------------------------------------------------------------------------
# DropIT


class DropitConvFunction(torch.autograd.Function):
    """y = conv2d(x, w) that caches k values and indices of x. Only w's gradient is approximate.

    Elements are counted in the order (B, H, W, C), in which the trainer has them in memory: of equal
    magnitudes the first ones in this order are kept.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding, dropit, name, layer_id):
        B, C, H, W = x.shape
        flat = x.detach().permute(0, 2, 3, 1).reshape(-1)
        index = dropit.select(flat, name, layer_id)
        if dropit.masks is not None:
            # a dump has its masks in the order of torch's tensors
            mask = dropit.masks[name].view(B, H, W, C)
            dropit.masks[name] = mask.permute(0, 3, 1, 2).reshape(-1)
        ctx.save_for_backward(flat.gather(0, index.long()), index, weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, dout):
        values, index, weight = ctx.saved_tensors
        B, C, H, W = ctx.shape
        kept = values.new_zeros(ctx.shape.numel()).scatter_(0, index.long(), values)
        kept = kept.view(B, H, W, C).permute(0, 3, 1, 2).contiguous()
        dweight = conv2d_weight(kept, weight.shape, dout, ctx.stride, ctx.padding)
        dinput = None
        if ctx.needs_input_grad[0]:  # the images do not need one
            dinput = conv2d_input(ctx.shape, weight, dout, ctx.stride, ctx.padding)
        return dinput, dweight, None, None, None, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d with an optional DropIT. dropit, name and layer_id are set by Resnet.use_dropit."""
    dropit = None

    def forward(self, x):
        if self.dropit is None or not self.training:
            return super().forward(x)
        return DropitConvFunction.apply(x, self.weight, self.stride, self.padding, self.dropit,
                                        self.name, self.layer_id)


# ----------------------------------------------------------------------------
# the model

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
STAGES = 4  # as many as torchvision's forward pass has


class Resnet(ResNet):
    """torchvision's ResNet with any width, number of stages and channels, and with either stem."""

    def __init__(self, config):
        nn.Module.__init__(self)  # torchvision's would build its own stem and widths
        # what torchvision's _make_layer reads
        self._norm_layer, self.inplanes, self.dilation = nn.BatchNorm2d, config.width, 1
        self.groups, self.base_width = 1, 64
        imagenet = config.stem == "imagenet"
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(config.in_chans, config.width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        layers = [int(blocks) for blocks in config.layers.split(",")]
        for i in range(STAGES):
            stage = nn.Identity()
            if i < len(layers):
                stride = 1 if i == 0 else 2
                stage = self._make_layer(BLOCKS[config.block], config.width << i, layers[i], stride)
            self.add_module(f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = deit.Linear(self.inplanes, config.num_classes)
        for module in self.modules():
            if type(module) is nn.Conv2d:
                module.__class__ = Conv2d  # torchvision's blocks build nn.Conv2d; this adds DropIT to it

    def use_dropit(self, dropit, every_layer=False):
        """Drops in every convolution but the stem's and in the head; every_layer: in the stem's too.

        A downsampling reads what its block's conv1 reads: it has the same name and id, and with them
        the same elements. Ids: by the order in the model, the stem last.
        """
        readers = {}  # an input's name: the layers that read it
        for name, layer in self.named_modules():
            if isinstance(layer, (Conv2d, deit.Linear)) and name != "conv1":
                readers.setdefault(name.replace("downsample.0", "conv1"), []).append(layer)
        if every_layer:
            readers["conv1"] = [self.conv1]
        for layer_id, (name, layers) in enumerate(readers.items()):
            for layer in layers:
                layer.dropit, layer.name, layer.layer_id = dropit, name, layer_id


def initial_parameters(model, seed):
    """What training starts from, float32: torchvision's distributions, drawn from rng.py."""
    steps = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    values = {}
    for name, tensor in deit.state(model).items():
        n, shape = tensor.numel(), tuple(tensor.shape)
        if len(shape) == 4:  # kaiming_normal_ with the fan-out, for a ReLU
            deviation = (2 / (shape[0] * shape[2] * shape[3])) ** 0.5
            value = deviation * rng.normal(seed, rng.INIT, steps[name], n)
        elif name.startswith("fc."):  # PyTorch's default for a linear layer
            bound = model.fc.in_features ** -0.5
            value = bound * (2 * rng.uniform(seed, rng.INIT, steps[name], n) - 1)
        else:  # a norm's weight and variance are 1, its bias and mean 0
            value = np.full(n, 1.0 if name.endswith(("weight", "running_var")) else 0.0)
        values[name] = value.astype(np.float32).reshape(shape)
    return values


def make_run(options, config, values, origin, dtype=torch.float32):
    model = Resnet(config).to(dtype)
    deit.set_parameters(model, values, origin)
    dropit = deit.Dropit(options.gamma, options.strategy, options.seed)
    if options.gamma > 0:
        model.use_dropit(dropit, options.g_all)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def start(step, rank):
        dropit.step, dropit.seed = step, options.seed ^ (rank << 48)
        for norm in norms:
            norm.momentum = 0.0 if rank else 0.1  # the model's running statistics are rank 0's

    def decays(name, parameter):
        return options.decay_all or parameter.ndim >= 2
    optimizer = deit.make_optimizer(model, options, decays, bool(options.nesterov))
    return deit.Run(model, optimizer, dropit, start)


# ----------------------------------------------------------------------------
# dump, init, train

CONFIG_NAMES = ("block", "layers", "width", "stem", "image_size", "in_chans", "num_classes")
MODELS = {
    "resnet8": ("basic", "1,1,1", 16, "cifar", 28, 1, 10),
    "resnet18": ("basic", "2,2,2,2", 64, "imagenet", 224, 3, 1000),
    "resnet34": ("basic", "3,4,6,3", 64, "imagenet", 224, 3, 1000),
    "resnet50": ("bottleneck", "3,4,6,3", 64, "imagenet", 224, 3, 1000),
    "resnet101": ("bottleneck", "3,4,23,3", 64, "imagenet", 224, 3, 1000),
}


def configure(options):
    """The model that -m names, with what other flags say of it."""
    named = argparse.Namespace(**dict(zip(CONFIG_NAMES, MODELS[options.model])))
    return deit.override(named, options)


def blank_rows(config, batch_size, seed):
    """bool (B, 1, H, W): up to half of the rows from the last one up, which give exact ties."""
    side = config.image_size
    share = 1 - 0.5 * rng.uniform(seed, rng.INIT, 1 + (1 << 20), batch_size)
    rows = np.arange(side) >= np.ceil(share * side)[:, None]
    return rows[:, None, :, None].repeat(side, axis=3)


def dump(options):
    metadata = deit.dump_metadata(options, "resnet", CONFIG_NAMES, ("momentum", "nesterov"))
    image, label = deit.dump_batch(options, options.batch_size, options.seed,
                                   blank_rows(options, options.batch_size, options.seed))
    values = deit.dump_parameters(Resnet(options), options.seed)
    deit.write_dump(options, metadata, make_run, values, image, label)


def init(options):
    model = Resnet(configure(options))
    deit.write_initial(options.file, model, initial_parameters(model, options.seed))


def train(options):
    config = configure(options)
    shards = [deit.open_shard(path, config) for path in (options.data, options.validation)]
    values = deit.starting_values(options, Resnet(config), initial_parameters)
    deit.fit(options, make_run(options, config, *values), *shards)


def layers(text):
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){0,3}", text):
        raise argparse.ArgumentTypeError(f"must be 1 to {STAGES} numbers such as 2,2,2,2, got {text}")
    return text


def config_flags(one, dashes):
    flag = one.add_argument
    flag(f"{dashes}block", choices=BLOCKS)
    flag(f"{dashes}layers", type=layers, help="blocks of each stage, with commas between them")
    flag(f"{dashes}width", type=deit.positive, help="channels of the first stage")
    flag(f"{dashes}stem", choices=("imagenet", "cifar"))


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    modes = parser.add_subparsers(dest="mode", required=True)

    one = modes.add_parser("dump", help="write a dump for test_resnet", allow_abbrev=False)
    deit.dump_flags(one)
    config_flags(one, "--")
    for name in ("image_size", "in_chans", "num_classes"):
        one.add_argument(f"--{name}", type=deit.positive)
    one.add_argument("--nesterov", type=int, choices=(0, 1), default=0)
    one.add_argument("--g_all", type=int, choices=(0, 1), default=0)
    one.set_defaults(run=dump, optimizer="sgd", lr=0.05, weight_decay=1e-4, decay_all=1,
                     **dict(zip(CONFIG_NAMES, MODELS["resnet8"])))

    one = modes.add_parser("init", help="write initial weights", allow_abbrev=False)
    one.add_argument("file")
    one.add_argument("-m", dest="model", choices=MODELS, default="resnet8")
    config_flags(one, "--")
    for name in ("in_chans", "num_classes"):
        one.add_argument(f"--{name}", type=deit.positive)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=init)

    one = modes.add_parser("train", help="train as the trainer does", allow_abbrev=False)
    one.add_argument("-m", dest="model", choices=MODELS, default="resnet8")
    config_flags(one, "-")
    deit.training_flags(one)
    one.add_argument("-nesterov", type=int, choices=(0, 1), default=0)
    one.add_argument("-wd_all", dest="decay_all", type=int, choices=(0, 1), default=1,
                     help="1: weight decay also on norms and biases")
    one.set_defaults(run=train, optimizer="sgd", lr=0.1, weight_decay=1e-4)

    options = parser.parse_args(arguments)
    if options.mode != "init" and options.nesterov and options.momentum == 0:
        parser.error("Nesterov's momentum needs a momentum above 0")
    return options


if __name__ == "__main__":
    deit.main(parse(sys.argv[1:]))
