"""Rows of `ops.stem`: the first layers of HRNet and DPN, and of ResNets."""

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
CHANNELS, HEIGHT, WIDTH = 64, 256, 192
KERNELS = (3, 7)  # with 7 a max-pooling follows


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    batches = batches or BATCHES
    for dtype in dtypes:
        for kernel in KERNELS:
            for n in batches:
                shape = f"{kernel}x{kernel}/2{', pool' * (kernel == 7)}, {n}x3x{HEIGHT}x{WIDTH}"
                quick = kernel == KERNELS[0] and dtype == dtypes[0] and n == batches[0]
                yield Plan("stem", "stem", shape, dtype, partial(stem_case, kernel, n, dtype), quick)


def stem_case(kernel: int, n: int, dtype: str, settings: Settings) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pool = [nn.MaxPool2d(3, 2, 1)] if kernel == 7 else []
        layers = nn.Sequential(nn.Conv2d(3, CHANNELS, kernel, 2, kernel // 2), nn.ReLU(), *pool).eval()
        x = torch.randn(n, 3, HEIGHT, WIDTH)
    return layers_case(layers, _pack, x, dtype, settings)


def _pack(layers: nn.Sequential, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    conv = layers[0]
    packed = ops.pack_stem(conv.weight.to(dtype), conv.bias.to(dtype), stride=2, pool=len(layers) == 3)
    return lambda images: ops.stem(images, packed)
