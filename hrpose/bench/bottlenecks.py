"""Rows of `ops.bottlenecks`: chains of residual bottlenecks as DPN has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from hrpose.bench.case import Case, Settings
from hrpose.bench.layers import layers_case
from hrpose.bench.networks import randomise_batch_norms
from hrpose.bench.plan import Plan
from hrpose.models import create_model
from hrpose.models.dpn import DilationPyramidModule
from hrpose.models.fused import FusedBottlenecks

BATCHES = (1, 16)
# Name, stage of dpn1_64 (None: a dilation pyramid module alone), C of the module, (height, width) of its input.
CHAINS = (
    ("DPM C=64", None, 64, (32, 24)),
    ("DPM C=64", None, 64, (64, 48)),
    ("DPM C=32", None, 32, (32, 24)),
    ("DPM C=32", None, 32, (64, 48)),
    ("DPN conv1", "conv1", 64, (64, 48)),
    ("DPN conv2", "conv2", 64, (64, 48)),
)
QUICK = (0, 2)


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    batches = batches or BATCHES
    for dtype in dtypes:
        for index, (name, stage, channels, size) in enumerate(CHAINS):
            for n in batches:
                shape = f"{name}, {n}x{size[0]}x{size[1]}"
                build = partial(bottlenecks_case, stage, channels, n, size, dtype)
                quick = index in QUICK and dtype == dtypes[0] and n == batches[0]
                yield Plan("bottlenecks", "bottlenecks", shape, dtype, build, quick)


def bottlenecks_case(
    stage: str | None, channels: int, n: int, size: tuple[int, int], dtype: str, settings: Settings
) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = DilationPyramidModule(channels) if stage is None else getattr(create_model("dpn1_64"), stage)
        randomise_batch_norms(blocks)
        x = torch.randn(n, blocks[0].conv1.in_channels, *size)

    def pack(folded: nn.Sequential, dtype: torch.dtype) -> FusedBottlenecks:
        return FusedBottlenecks.from_blocks(blocks.to(folded[0].conv1.weight.device), dtype)  # it folds by itself

    return layers_case(blocks, pack, x, dtype, settings)
