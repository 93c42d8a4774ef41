"""One training step: targets, forward, loss, backward, update; a step that is not finite changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hrpose.data.dataset import Sample
from hrpose.data.targets import gaussian_targets
from hrpose.errors import check
from hrpose.train.loss import supervised_loss

_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    sigma:          of the target Gaussians in heatmap pixels.
    precision:      "fp32", or "bf16" or "fp16" for mixed precision.
    hard_keypoints: of ``supervised_loss``.
    joint_weights:  (K,) factors of the joints' differences, on the step's device; None: 1.
    accumulate:     parts that the batch is computed in, one after the other.
    clip_norm:      largest norm of the gradient; None: any.
    """

    sigma: float
    precision: str = "fp32"
    hard_keypoints: int | None = None
    joint_weights: Tensor | None = None
    accumulate: int = 1
    clip_norm: float | None = None


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Sample,
    device: torch.device,
    options: StepOptions,
    statistics: BufferCopy | None = None,
    scaler: torch.amp.GradScaler | None = None,
    agree: Callable[[float], float] = lambda loss: loss,
) -> float:
    """One step on a batch: targets on the device, forward, loss, backward, update. Returns the loss, NaN if it was
    skipped.

    The model gives heatmaps, or with intermediate supervision a tuple of them, each of which is compared with the same
    targets.
    If the loss or a gradient is not finite nothing is updated, the running statistics of batch norm included: one such
    step would otherwise make every weight NaN. `statistics` is the place to keep these meanwhile, for use in many
    steps. `scaler` is for fp16: it multiplies the loss so that small gradients do not vanish. If that makes large ones
    overflow, nothing is updated, the scale is lowered, and the loss, which is finite, is returned. `agree` makes the
    loss of the whole batch of that of this process's share: see ``distributed.Agreement``.
    """
    statistics = statistics or BufferCopy(model)
    statistics.take()
    optimizer.zero_grad()
    loss = torch.zeros((), device=device)
    *before, last = _parts(batch, options.accumulate)
    unaveraged = getattr(model, "no_sync", nullcontext)  # of several processes: their gradients meet once, at the end
    for part in (*before, last):
        with nullcontext() if part is last else unaveraged():
            # The losses are means over persons, so the batch's is the mean of its parts' by their sizes.
            share = _loss(model, part, device, options) * (len(part.image) / len(batch.image))
            (scaler.scale(share) if scaler else share).backward()
        loss = loss + share.detach()
    if scaler:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    found, size = torch.stack([loss.double(), norm.double()]).tolist()  # the step's one wait for a GPU
    found = agree(found)
    if math.isfinite(found) and math.isfinite(size):
        if options.clip_norm is not None and size > options.clip_norm:
            torch._foreach_mul_(gradients, options.clip_norm / size)
        optimizer.step()
        if scaler:
            scaler.update()
        return found
    statistics.put_back()
    if scaler:
        overflow = math.isfinite(found) and scaler.get_scale() > 1
        # A number as argument keeps the scale: data that is bad says nothing about it.
        scaler.update(None if overflow else scaler.get_scale())
        if overflow:
            return found
    return float("nan")


def _parts(batch: Sample, count: int) -> list[Sample]:
    """The batch in `count` parts of nearly the same size, none of them empty."""
    if count == 1:
        return [batch]
    count = min(count, len(batch.image))
    return [Sample(*fields) for fields in zip(*(field.tensor_split(count) for field in batch), strict=True)]


def _loss(model: nn.Module, batch: Sample, device: torch.device, options: StepOptions) -> Tensor:
    images = batch.image.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, _MIXED.get(options.precision), enabled=options.precision in _MIXED):
        found = model(images)
    outputs = (found,) if isinstance(found, Tensor) else found
    height, width = outputs[-1].shape[2:]
    stride = images.shape[3] / width
    targets, weights = gaussian_targets(
        batch.joints.to(device), batch.visible.to(device), (width, height), options.sigma, stride
    )
    if options.joint_weights is not None:
        weights = weights * options.joint_weights
    return supervised_loss(outputs, targets, weights, options.hard_keypoints)


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
    """What "auto" means here: bf16 where the device multiplies it faster than fp32, else fp32.

    Raises: InputError for fp16 elsewhere than on CUDA.
    """
    rule = f"fp16 needs a CUDA device, {device} computes in bf16 or fp32"
    check(precision != "fp16" or device.type == "cuda", "precision", rule)
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
