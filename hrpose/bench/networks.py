"""Rows of whole networks: `hrpose.optimize` against everything else that runs the same network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from hrpose.bench.case import DTYPES, REFERENCE, Case, Settings, WrongResult
from hrpose.bench.cuda_graph import enter_ours
from hrpose.bench.engines import invite_engines
from hrpose.bench.plan import Plan
from hrpose.cost import count_cost
from hrpose.models import create_model, list_models
from hrpose.optimize import optimize
from hrpose.published.table import default_input

BATCHES = (1, 16)
QUICK = "dpn4_32"
# Of the largest value in the output: rounding alone differs by 1e-6 in float32 and by 2 % in bfloat16.
LIMITS = {"fp32": 1e-4, "bf16": 0.05}
_SEGMENTATION_INPUT = (512, 256)  # a sixteenth of the paper's 2048 x 1024, which takes minutes per image


def input_size(name: str) -> tuple[int, int]:
    """(width, height) that a network is timed with: that of its papers, of segmentation networks less."""
    return _SEGMENTATION_INPUT if name.endswith("_seg") else default_input(name)[0]


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    batches = batches or BATCHES
    for name in list_models():
        width, height = input_size(name)
        for dtype in dtypes:
            for n in batches:
                quick = name == QUICK and dtype == dtypes[0] and n == batches[0]
                shape, build = f"{n}x3x{height}x{width}", partial(network_case, name, dtype, n)
                yield Plan("models", name, shape, dtype, build, quick)


@torch.no_grad()
def network_case(name: str, dtype: str, n: int, settings: Settings) -> Case:
    """Images to heatmaps (or whatever the network emits), everybody compared with the eager network in float32."""
    width, height = input_size(name)
    model, images = trained(name), torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))
    flops = 2 * n * count_cost(model, (width, height)).macs
    model, images = model.to(settings.device), images.to(settings.device)
    case = Case(model(images), LIMITS[dtype], flops=flops)
    try:
        fast = optimize(copy.deepcopy(model).to(DTYPES[dtype]))
    except RuntimeError as error:  # it checks its result, too
        raise WrongResult(str(error)) from error
    inputs = images.to(DTYPES[dtype]).to(memory_format=torch.channels_last)
    enter_ours(case, "hrpose.optimize", lambda: fast(inputs), settings.device)
    invite_engines(case, model, images, DTYPES[dtype], settings.threads)
    plain, given = model.to(DTYPES[dtype]), images.to(DTYPES[dtype])
    case.enter("eager", REFERENCE, lambda: plain(given))
    return case


def trained(name: str) -> nn.Module:
    """A network in eval mode whose batch norms have weights and statistics of their own, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name)
        randomise_batch_norms(model)
    return model


def randomise_batch_norms(model: nn.Module) -> None:
    """Fresh ones are ones and zeros: they leave nothing to fold, and some layers of a network without effect.

    Statistics drawn at random too, not those of images: with these a deep network without training amplifies rounding
    until bfloat16 means nothing. Leaves the model in eval mode.
    """
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
