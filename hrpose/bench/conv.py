"""Rows of `ops.conv`: convolutions with bias and ReLU as they stand between the blocks of DPN and HRNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hrpose import ops
from hrpose.bench.case import Case, Settings
from hrpose.bench.layers import layers_case
from hrpose.bench.plan import Plan

BATCHES = (1, 16)
# Kernel, stride, channels in and out, (height, width) of the input.
CONVS = (
    (3, 1, 64, 64, (64, 48)),
    (3, 2, 32, 64, (64, 48)),
    (1, 1, 64, 256, (64, 48)),
    (1, 1, 256, 64, (64, 48)),
    (3, 1, 256, 256, (16, 12)),
)


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    batches = batches or BATCHES
    for dtype in dtypes:
        for kernel, stride, ins, outs, size in CONVS:
            for n in batches:
                shape = f"{kernel}x{kernel}/{stride} {ins}-{outs}, {n}x{size[0]}x{size[1]}"
                build = partial(conv_case, kernel, stride, ins, outs, n, size, dtype)
                quick = (kernel, stride, ins, outs, size) == CONVS[0] and dtype == dtypes[0] and n == batches[0]
                yield Plan("conv", "conv", shape, dtype, build, quick)


def conv_case(
    kernel: int, stride: int, ins: int, outs: int, n: int, size: tuple[int, int], dtype: str, settings: Settings
) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(ins, outs, kernel, stride, kernel // 2), nn.ReLU()).eval()
        x = torch.randn(n, ins, *size)
    return layers_case(layers, _pack, x, dtype, settings)


def _pack(layers: nn.Sequential, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    conv = layers[0]
    packed = ops.pack_conv(conv.weight.to(dtype), conv.bias.to(dtype), stride=conv.stride[0], relu=True)
    return lambda x: ops.conv(x, packed)
