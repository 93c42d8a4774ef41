"""A chain of residual blocks of two 3x3 convolutions at inference, fused: packed weights, the op, its reference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose.errors import check
from hrpose.ops import _ext
from hrpose.ops.conv import pack_conv
from hrpose.ops.maps import PARALLEL_ABOVE, checked_maps, kernel_takes, new_maps

WHERE = "basic_blocks"


class PackedBasicBlocks(NamedTuple):
    """What `pack_basic_blocks` makes of a chain of B blocks of C channels.

    weights (2 B, C, C, 3, 3), biases (2 B, C) and panels of their convolutions in turn, see `PackedConv`.
    """

    weights: Tensor
    biases: Tensor
    panels: Tensor
    tile: int


def pack_basic_blocks(convs: Sequence[tuple[Tensor, Tensor]], *, tile: int | None = None) -> PackedBasicBlocks:
    """Weights of a chain as `basic_blocks` takes them; made once.

    Args:
        convs: weight (C, C, 3, 3) and bias (C) of each convolution, two per block, batch norm folded in; C a multiple
            of 16, all of one floating dtype.
        tile: as in `pack_conv`.
    Raises: InputError on other shapes or numbers.
    """
    check(len(convs) >= 2 and len(convs) % 2 == 0, WHERE, f"convs must be two per block, got {len(convs)}")
    first = convs[0][0]
    for index, (weight, _) in enumerate(convs):
        square = weight.shape == first.shape and weight.ndim == 4 and weight.shape[0] == weight.shape[1]
        expected = f"(C, C, 3, 3) {first.dtype}, the same of all"
        got = f"{tuple(weight.shape)} {weight.dtype}"
        same = square and weight.shape[2:] == (3, 3) and weight.dtype == first.dtype
        check(same, WHERE, f"weight {index} must be {expected}, got {got}")
    packed = [pack_conv(weight, bias, tile=tile) for weight, bias in convs]
    weights, biases = torch.stack([p.weight for p in packed]), torch.stack([p.bias for p in packed])
    return PackedBasicBlocks(weights, biases, torch.cat([p.panels for p in packed]), packed[0].tile)


def basic_blocks(x: Tensor, packed: PackedBasicBlocks) -> Tensor:
    """A chain of residual basic blocks in evaluation mode, as HRNet's branches are.

        y = relu(W1_i * x + b1_i),  x <- relu(W2_i * y + b2_i + x),  i = 1, 2, ...

    Args:
        x: (N, C, H, W), N >= 0, H, W >= 1, of the dtype of the packed weights; channels_last is read as it is, other
            formats are copied. Which run the kernel: see `conv`.
        packed: weights by `pack_basic_blocks`.
    Returns: the same shape, channels_last; differentiable in x.
    Raises: InputError on a wrong shape, dtype or device.
    Cost: see `conv`, twice per block.
    """
    if direct := _ext.direct():
        mode = (torch.is_grad_enabled(), torch.get_num_threads(), PARALLEL_ABOVE)
        y = direct.basic_blocks(x, packed, *mode)
        if y is not None:
            return y
    x = checked_maps(x, packed.weights.shape[2], packed.weights, WHERE)
    if not kernel_takes(x) or (torch.is_grad_enabled() and x.requires_grad):
        return _reference(x, *packed)
    return (_launch if _ext.unobserved(x) else torch.ops.hrpose.basic_blocks)(x, *packed)


def basic_blocks_reference(x: Tensor, packed: PackedBasicBlocks) -> Tensor:
    """`basic_blocks` in plain PyTorch, for any floating dtype and any device."""
    return _reference(checked_maps(x, packed.weights.shape[2], packed.weights, WHERE), *packed)


def _reference(x: Tensor, weights: Tensor, biases: Tensor, panels: Tensor, tile: int) -> Tensor:
    biases = biases.to(weights.dtype)
    for i in range(0, len(weights), 2):
        y = F.relu(F.conv2d(x, weights[i], biases[i], padding=1))
        x = F.relu(F.conv2d(y, weights[i + 1], biases[i + 1], padding=1) + x)
    return x.contiguous(memory_format=torch.channels_last)


def _basic_blocks_cpu(x: Tensor, weights: Tensor, biases: Tensor, panels: Tensor, tile: int) -> Tensor:
    # An exported graph may run where there is no kernel.
    return (_launch if kernel_takes(x) else _reference)(x, weights, biases, panels, tile)


def _launch(x: Tensor, weights: Tensor, biases: Tensor, panels: Tensor, tile: int) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    result = _basic_blocks_fake(x, weights, biases, panels, tile)
    if not result.numel():
        return result
    n, channels, h, w = x.shape
    parallel = x.numel() * channels * 9 * len(weights) > PARALLEL_ABOVE
    tensors = [x, result, panels.contiguous(), biases.contiguous()]
    addresses = [t.data_ptr() for t in tensors]
    threads = torch.get_num_threads() if parallel else 1
    sizes = (n, h, w, channels, len(weights) // 2, tile, x.dtype == torch.bfloat16, threads)
    kernels = _ext.kernels()
    _memory, at = _ext.workspace(kernels.basic_blocks_workspace(*addresses, 0, *sizes))
    kernels.basic_blocks_fwd(*addresses, at, *sizes)
    return result


def _basic_blocks_fake(x: Tensor, weights, biases, panels, tile) -> Tensor:
    return new_maps(x, *x.shape[1:])


_ext.library.define("basic_blocks(Tensor x, Tensor weights, Tensor biases, Tensor panels, int tile) -> Tensor")
_ext.library.impl("basic_blocks", _basic_blocks_cpu, "CPU")
torch.library.register_fake("hrpose::basic_blocks", _basic_blocks_fake, lib=_ext.library)
