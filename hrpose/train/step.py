"""One training step: targets, forward, loss, backward, update; a step that is not finite changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hrpose.data.dataset import Sample
from hrpose.data.targets import gaussian_targets
from hrpose.train.loss import supervised_loss


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sample,
    sigma: float,
    device: torch.device,
    bf16: bool,
    statistics: BufferCopy | None = None,
    hard_keypoints: int | None = None,
    agree: Callable[[float], float] = lambda loss: loss,
) -> float:
    """One step on a batch: targets on the device, forward, loss, backward, update. Returns the loss, NaN if it was
    skipped.

    The model gives heatmaps, or with intermediate supervision a tuple of them, each of which is compared with the same
    targets; `hard_keypoints` is that of ``supervised_loss``.
    If the loss or a gradient is not finite nothing is updated, the running statistics of batch norm included: one such
    step would otherwise make every weight NaN. `statistics` is the place to keep these meanwhile, for use in many
    steps. `agree` makes the loss of the whole batch of that of this process's share: see ``distributed.Agreement``.
    """
    statistics = statistics or BufferCopy(model)
    statistics.take()
    images = batch.image.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        found = model(images)
    outputs = (found,) if isinstance(found, Tensor) else found
    height, width = outputs[-1].shape[2:]
    stride = images.shape[3] / width
    targets, weights = gaussian_targets(
        batch.joints.to(device), batch.visible.to(device), (width, height), sigma, stride
    )
    loss = supervised_loss(outputs, targets, weights, hard_keypoints)
    optimizer.zero_grad()
    loss.backward()
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = agree(float(loss.detach()))
    if math.isfinite(found) and torch.isfinite(torch.stack(norms).sum()):
        optimizer.step()
        return found
    statistics.put_back()
    return float("nan")


class BufferCopy:
    """A copy of a model's buffers, made and put back in one call per type: one by one, hundreds of small tensors would
    cost a GPU more than a small network's layers do."""

    def __init__(self, model: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [(buffers, [torch.empty_like(b) for b in buffers]) for buffers in by_type.values()]

    @torch.no_grad()
    def take(self) -> None:
        for buffers, copies in self._pairs:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        for buffers, copies in self._pairs:
            torch._foreach_copy_(buffers, copies)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means here: bf16 where the device multiplies it faster than fp32, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    try:
        return any(getattr(torch.cpu, name)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    except (AttributeError, RuntimeError):  # private functions of torch, which may go
        return False
