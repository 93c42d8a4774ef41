"""Rows of `ops.bottlenecks`: chains of residual bottlenecks as DPN has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hrpose.bench.case import DTYPES, OURS, Case, Settings, check_results
from hrpose.bench.cuda_graph import captured
from hrpose.bench.layers import layers_case
from hrpose.bench.networks import randomise_batch_norms
from hrpose.bench.plan import Plan
from hrpose.models import create_model
from hrpose.models.dpn import DilationPyramidModule
from hrpose.models.fused import FusedBottlenecks
from hrpose.ops.bottlenecks import chosen_kernels, core_matrices_take, warpgroups

WARPGROUPS = "hrpose, wgmma, CUDA graph"
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

    case = layers_case(blocks, pack, x, dtype, settings)
    if chosen_kernels() is None:  # else "hrpose" is what was chosen
        _invite_warpgroups(case, blocks, x.to(settings.device, DTYPES[dtype], memory_format=torch.channels_last))
    return case


@torch.no_grad()
def _invite_warpgroups(case: Case, blocks: nn.Sequential, x: Tensor) -> None:
    """Enter the kernels for warpgroups where they run, beside those for warps, which are the default: a wrong result of
    the former leaves out them alone."""
    first = blocks[0]
    widths = (first.conv1.in_channels, first.conv1.out_channels, first.conv3.out_channels)
    if not warpgroups(x) or not core_matrices_take(x.dtype, *widths, first.downsample is not None):
        return

    def checked() -> Callable[[], Tensor]:
        ours = FusedBottlenecks.from_blocks(blocks.to(x.device), x.dtype, "core_matrices")
        alone = Case(case.expected, case.limit)
        alone.enter(WARPGROUPS, OURS, captured(lambda: ours(x)))
        check_results(alone)
        return alone.contenders[0].call

    case.invite(WARPGROUPS, OURS, checked)
