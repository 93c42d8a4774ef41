"""Rows of `ops.ram_sum`: the first output of a four-branch exchange unit of width 32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose import ops
from hrpose.bench.case import DTYPES, PYTORCH, REFERENCE, Case, Settings
from hrpose.bench.cuda_graph import enter_ours
from hrpose.bench.engines import COMPILE, compiled
from hrpose.bench.plan import Plan

BATCHES = (1, 16)
CHANNELS, HEIGHT, WIDTH, FACTORS = 32, 64, 48, (1, 2, 4, 8)
MODES = ("nearest", "bilinear")
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
# Of the largest value. bfloat16: PyTorch rounds after every step, the kernel once.
LIMITS = {"fp32": 1e-5, "bf16": 0.05}


def plans(batches: Sequence[int] | None, dtypes: Sequence[str]) -> Iterator[Plan]:
    batches = batches or BATCHES
    for dtype, n, mode, layout, train in product(dtypes, batches, MODES, LAYOUTS, (False, True)):
        shape = f"{n}x{CHANNELS}x{HEIGHT}x{WIDTH} {mode} {layout}{' + grad' * train}"
        quick = (dtype, n, layout, train) == (dtypes[0], batches[0], "NHWC", False)
        yield Plan("ram_sum", "ram_sum", shape, dtype, partial(ram_sum_case, n, mode, layout, train, dtype), quick)


def ram_sum_case(n: int, mode: str, layout: str, train: bool, dtype: str, settings: Settings) -> Case:
    """Forward, or with `train` forward and backward, with a weight per sample and map."""
    generator = torch.Generator().manual_seed(n)

    def random(*shape: int) -> Tensor:
        values = torch.rand(shape, generator=generator) + 0.5
        return (signs * values).to(settings.device, DTYPES[dtype], memory_format=LAYOUTS[layout])

    # One sign per channel: where terms cancel, rounding would decide whether ReLU passes the gradient on.
    signs = torch.randn(n, CHANNELS, 1, 1, generator=generator).sign()
    inputs = [random(n, CHANNELS, HEIGHT // f, WIDTH // f) for f in FACTORS]
    weights = torch.rand(n, len(FACTORS), generator=generator).to(settings.device)
    grad = random(n, CHANNELS, HEIGHT, WIDTH)
    leaves = [t.requires_grad_(train) for t in (*inputs, weights)]

    def run(op, given=inputs, factors=weights, leaves=leaves, grad=grad):
        with torch.set_grad_enabled(train):
            out = op(given, factors, mode)
            return torch.autograd.grad(out, leaves, grad) if train else out

    exact = [t.detach().double().requires_grad_(train) for t in leaves]
    expected = run(composite, exact[:-1], exact[-1], exact, grad.double())
    maps = sum(t.nbytes for t in inputs)
    # Backward: the gradient, the output and the inputs are read, the inputs' gradients written.
    nbytes = maps + grad.nbytes + train * (2 * grad.nbytes + 2 * maps)
    case = Case(expected, LIMITS[dtype], nbytes=nbytes)
    enter_ours(case, "hrpose", lambda: run(ops.ram_sum), settings.device)
    in_graph = settings.device.type == "cuda" and not train
    fast = compiled(composite, settings.device, leaves) if in_graph else torch.compile(composite, dynamic=False)
    case.invite(COMPILE, PYTORCH, lambda: lambda: run(fast))
    case.enter("reference", REFERENCE, lambda: run(ops.ram_sum_reference))
    return case


def composite(inputs: Sequence[Tensor], weights: Tensor, mode: str) -> Tensor:
    """What one would write in PyTorch."""
    total = None
    for h, x in enumerate(inputs):
        if h:
            x = F.interpolate(x, inputs[0].shape[2:], mode=mode)
        x = x * weights[:, h, None, None, None].to(x.dtype)
        total = x if total is None else total + x
    return total.relu()
