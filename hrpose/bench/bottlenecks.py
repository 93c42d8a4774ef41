"""Rows of `ops.bottlenecks`: chains of residual bottlenecks as DPN has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hrpose.bench.case import DTYPES, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.cuda_graph import enter_ours
from hrpose.bench.engines import COMPILE, compiled
from hrpose.bench.networks import randomise_batch_norms
from hrpose.bench.plan import Plan
from hrpose.cost import count_cost
from hrpose.models import create_model
from hrpose.models.dpn import DilationPyramidModule
from hrpose.models.fold import fold_batch_norms
from hrpose.models.fused import FusedBottlenecks

BATCHES = (1, 16)
# Of the largest value: rounding differs by 1e-6 in float32 (Winograd's included), by a percent in bfloat16.
LIMITS = {"fp32": 2e-5, "bf16": 0.05}
# Name, network and stage of it (None: a dilation pyramid module alone), C of the module, (height, width) of its input.
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
    for dtype in dtypes:
        for index, (name, stage, width, size) in enumerate(CHAINS):
            for n in batches or BATCHES:
                yield Plan(
                    "bottlenecks",
                    "bottlenecks",
                    f"{name}, {n}x{size[0]}x{size[1]}",
                    dtype,
                    partial(bottlenecks_case, stage, width, n, size, dtype),
                    quick=index in QUICK and dtype == dtypes[0] and n == (batches or BATCHES)[0],
                )


@torch.no_grad()
def bottlenecks_case(
    stage: str | None, channels: int, n: int, size: tuple[int, int], dtype: str, settings: Settings
) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = DilationPyramidModule(channels) if stage is None else getattr(create_model("dpn1_64"), stage)
        x = torch.randn(n, blocks[0].conv1.in_channels, *size)
        randomise_batch_norms(blocks)
    macs = count_cost(_Widened(blocks, x.shape[1]), (size[1], size[0])).macs
    exact = torch.cat([copy.deepcopy(blocks).double()(part.double()) for part in x.split(1)])
    case = Case(exact, LIMITS[dtype], flops=2 * n * macs)
    blocks, x = blocks.to(settings.device), x.to(settings.device, DTYPES[dtype])
    x = x.to(memory_format=torch.channels_last)
    fused = FusedBottlenecks.from_blocks(blocks, DTYPES[dtype])
    enter_ours(case, "hrpose", lambda: fused(x), settings.device)
    folded = copy.deepcopy(blocks)
    fold_batch_norms(folded)
    folded = folded.to(DTYPES[dtype]).to(memory_format=torch.channels_last)
    fast = compiled(folded, settings.device)
    case.invite(COMPILE, PYTORCH, lambda: lambda: fast(x))
    if settings.device.type == "cuda":
        case.enter("eager, channels_last", PYTORCH, lambda: folded(x))
    plain = blocks.to(DTYPES[dtype])
    given = x.contiguous()
    case.enter("eager", REFERENCE, lambda: plain(given))
    return case


class _Widened(nn.Module):
    """The chain as `count_cost` wants a network: it takes images."""

    def __init__(self, blocks: nn.Module, channels: int):
        super().__init__()
        self.blocks, self.channels = blocks, channels

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images.new_empty(len(images), self.channels, *images.shape[2:]))
