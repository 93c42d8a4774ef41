"""Training by several processes as if by one: the same samples, averaged gradients, steps that all take or all skip.

``torch.nn.parallel.DistributedDataParallel`` averages the gradients while they are computed. As every rank has an equal
share of the batch and the losses are means, their average is the gradient of the whole batch.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hrpose.errors import check
from hrpose.ranks import Ranks
from hrpose.train.step import BufferCopy
from hrpose.train.stop import StopRequest


def check_share(batch_size: int, ranks: Ranks) -> None:
    """Raise unless a batch can be cut into equal shares: only of these is the average gradient the batch's."""
    rule = f"must be divisible by the number of processes, {ranks.world}, among whom it is shared"
    check(batch_size % ranks.world == 0, "fit", f"batch_size {rule}, got {batch_size}")


def with_averaged_gradients(model: nn.Module, ranks: Ranks, size: tuple[int, int]) -> nn.Module:
    """The module to call instead of `model`, whose backward pass averages the gradients of all ranks.

    Starts by making the weights of all ranks those of rank 0. `size`: (width, height) of the input. Alone it is the
    model itself.
    """
    if ranks.world == 1:
        return model
    device = next(model.parameters()).device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch 2.13, about another name for broadcast_buffers
        network = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,  # they are averaged, see SharedStatistics
            gradient_as_bucket_view=True,  # the gradients are where they travel from: no second copy
        )
    # After its first pass it groups the gradients anew, and would add them up in another order from then on: a resumed
    # run of three processes would differ in the last bits. So that pass is made here, on nothing.
    buffers = BufferCopy(model)
    buffers.take()
    blank = torch.zeros(2, 3, size[1], size[0], device=device).contiguous(memory_format=torch.channels_last)
    found = network.train()(blank)
    sum(heatmaps.sum() for heatmaps in ((found,) if isinstance(found, Tensor) else found)).backward()
    network.zero_grad()
    buffers.put_back()
    return network


class Agreement:
    """What all ranks make of each step: the loss of the whole batch, whether it counts, and whether to stop.

    bad_ranks: if the last step was skipped, those whose loss was not finite; all, if only the gradients were not.
    """

    def __init__(self, ranks: Ranks, stop: StopRequest) -> None:
        self.ranks, self.stop = ranks, stop
        self.bad_ranks = list(range(ranks.world))
        self._signal = 0

    def __call__(self, loss: float) -> float:
        """The mean of the ranks' losses, so that it is finite for all or for none, as the averaged gradients are."""
        losses, signals = zip(*self.ranks.gather_numbers([loss, self.stop.signal]), strict=True)
        self._signal = int(max(signals))
        bad = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
        self.bad_ranks = bad or list(range(len(losses)))
        return float("nan") if bad else sum(losses) / len(losses)

    @property
    def signal(self) -> int:
        """The signal that asks to stop. One that came to any rank counts for all, from the next step on."""
        return self.stop.signal if self.ranks.world == 1 else self._signal

    def ask(self) -> int:
        """The same between steps."""
        self._signal = int(max(signal for (signal,) in self.ranks.gather_numbers([self.stop.signal])))
        return self._signal


class SharedStatistics:
    """The running statistics of batch norm, made the mean of all ranks' after each step.

    Each rank normalises its own share, so its statistics know only that; the mean knows the whole batch. As all ranks
    have the same, a checkpoint holds all there is.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
        self.buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
        self.ranks = ranks

    @torch.no_grad()
    def average(self) -> None:
        if self.ranks.world == 1 or not self.buffers:
            return
        flat = torch.cat(self.buffers)
        dist.all_reduce(flat)
        flat /= self.ranks.world
        torch._foreach_copy_(self.buffers, list(flat.split([len(b) for b in self.buffers])))


def share_batch_norm(model: nn.Module) -> None:
    """Make batch norm normalise over the batch of all ranks, in place: twice the messages of a step, in turn, for each
    layer. State dict and behaviour in eval mode stay as they are."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            # The very module, so that its weights stay the optimizer's, as another kind of BatchNorm2d.
            module.__class__ = _SharedBatchNorm if module.weight.device.type == "cpu" else _SharedBatchNormOnDevice
            module.process_group = None  # of SyncBatchNorm: all


class _SharedBatchNormOnDevice(nn.SyncBatchNorm, nn.BatchNorm2d):
    """PyTorch's own."""


class _SharedBatchNorm(nn.BatchNorm2d):
    """The same from its definition for the CPU, where PyTorch's own does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        wide = x.to(self.weight.dtype)
        mean = _MeanOfRanks.apply(wide.mean((0, 2, 3)))
        centred = wide - mean[:, None, None]
        variance = _MeanOfRanks.apply(centred.square().mean((0, 2, 3)))
        count = dist.get_world_size() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class _MeanOfRanks(torch.autograd.Function):
    """y_r = 1/W sum_s x_s on every rank r; the gradient has the same form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _MeanOfRanks.forward(ctx, gradient)
