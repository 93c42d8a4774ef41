"""The inference form of a network: the same heatmaps, sooner."""

import copy

import torch
from torch import Tensor, nn

from hrpose.errors import check
from hrpose.models.blocks import Bottleneck
from hrpose.models.fold import fold_batch_norms
from hrpose.models.fused import FusedBottlenecks
from hrpose.ops import _ext
from hrpose.ops.bottlenecks import MULTIPLE

# Of the output's norm: folding and other orders of summation round differently; a wrong layer is off by most of it.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def optimize(model: nn.Module) -> nn.Module:
    """A copy of a network for inference alone: chains of bottlenecks in the fused kernel, batch norm folded into the
    other convolutions, weights in channels_last.

    The copy is run beside the original on a random image before it is returned. It can be exported and compiled like
    the original; its state dict is another, and its device and dtype are settled.

    Args:
        model: made by ``create_model``, in eval mode, float32 or bfloat16 (or another floating type), on any device.
    Returns: a module with the same call: images (N, 3, H, W) in the model's dtype -> heatmaps (N, K, H/4, W/4), or
        whatever else the network emits.
    Raises: InputError for a model in training mode.
    """
    check(not model.training, "optimize", "model must be in eval mode (model.eval()), got one in training mode")
    fast = copy.deepcopy(model).requires_grad_(False)
    if _ext.usable(*fast.parameters(), dtype=torch.float32):
        _fuse_bottlenecks(fast)
    fold_batch_norms(fast)
    fast.to(memory_format=torch.channels_last).eval()
    _compare(model, fast)
    return fast


def _fuse_bottlenecks(module: nn.Module) -> None:
    """Replace every Sequential of bottlenecks, and every Sequential of such, by the kernel."""
    for name, child in module.named_children():
        blocks = _chain(child)
        if blocks and all(_fusable(block, index == 0) for index, block in enumerate(blocks)):
            setattr(module, name, FusedBottlenecks.from_blocks(nn.Sequential(*blocks)))
        else:
            _fuse_bottlenecks(child)


def _chain(module: nn.Module) -> list[Bottleneck]:
    """The bottlenecks of a Sequential that holds nothing else, [] for another module."""
    if isinstance(module, Bottleneck):
        return [module]
    if not isinstance(module, nn.Sequential):
        return []
    parts = [_chain(child) for child in module]
    return [block for part in parts for block in part] if all(parts) else []


def _fusable(block: Bottleneck, first: bool) -> bool:
    """Does the kernel take it? Only the first of a chain may change width or size, with the stride in its 3x3."""
    widths = (block.conv1.in_channels, block.conv1.out_channels, block.conv3.out_channels)
    plain = block.conv1.stride == (1, 1) and (first or block.downsample is None)
    return plain and all(width % MULTIPLE == 0 for width in widths)


@torch.no_grad()
def _compare(model: nn.Module, fast: nn.Module) -> None:
    """Raise unless both give the same on a small image; a difference is a mistake of ours."""
    parameter = next(model.parameters())
    side = 2 * getattr(model, "size_multiple", 32)
    noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    images = noise.to(parameter.device, parameter.dtype)
    for want, got in zip(_tensors(model(images)), _tensors(fast(images)), strict=True):
        error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
        if not error <= _TOLERANCE[parameter.dtype]:
            raise RuntimeError(f"optimize: the inference form differs from the model by {error:.1e} of its output")


def _tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output
