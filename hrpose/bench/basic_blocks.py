"""Rows of `ops.basic_blocks`: the branches of an HRNet-W32 module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hrpose import ops
from hrpose.bench.case import Case, Settings
from hrpose.bench.layers import layers_case
from hrpose.bench.networks import randomise_batch_norms
from hrpose.bench.plan import Plan
from hrpose.models.blocks import BasicBlock

BATCHES = (1, 16)
BLOCKS = 4  # of a branch
BRANCHES = ((32, (64, 48)), (64, (32, 24)), (128, (16, 12)), (256, (8, 6)))  # channels, (height, width)


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    batches = batches or BATCHES
    for dtype in dtypes:
        for channels, size in BRANCHES:
            for n in batches:
                shape = f"{BLOCKS} blocks, {n}x{channels}x{size[0]}x{size[1]}"
                build = partial(basic_blocks_case, channels, n, size, dtype)
                quick = channels == BRANCHES[0][0] and dtype == dtypes[0] and n == batches[0]
                yield Plan("basic_blocks", "basic_blocks", shape, dtype, build, quick)


def basic_blocks_case(channels: int, n: int, size: tuple[int, int], dtype: str, settings: Settings) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = nn.Sequential(*(BasicBlock(channels) for _ in range(BLOCKS)))
        randomise_batch_norms(blocks)
        x = torch.randn(n, channels, *size)
    return layers_case(blocks, _pack, x, dtype, settings)


def _pack(folded: nn.Sequential, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    convs = [conv for block in folded for conv in (block.conv1, block.conv2)]
    packed = ops.pack_basic_blocks([(conv.weight.to(dtype), conv.bias.to(dtype)) for conv in convs])
    return lambda x: ops.basic_blocks(x, packed)
