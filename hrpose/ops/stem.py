"""The first layers of a network at inference, fused: packed weights, the op, its reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose.errors import check, check_count
from hrpose.ops import _ext
from hrpose.ops.maps import PARALLEL_ABOVE, checked_maps, kernel_takes, new_maps, strided_sizes
from hrpose.ops.panels import MULTIPLE, to_panels

WHERE = "stem"
KERNELS = (1, 3, 5, 7)  # up to kMaxKernel of csrc/cpu/kernels.h
# The values of a term are filled up to a multiple of this: AMX multiplies 32 at a time.
_STEP = {torch.bfloat16: 32}


class PackedStem(NamedTuple):
    """What `pack_stem` makes of a convolution.

    weight (out, 3, k, k) as it was; bias (out), float32 for bfloat16 weights; panels: weight as the kernel reads it,
    flat: for each row of taps a matrix of the 3 k values that lie side by side, in bfloat16 filled up with zeros.
    """

    weight: Tensor
    bias: Tensor
    panels: Tensor
    stride: int
    pool: bool


def pack_stem(weight: Tensor, bias: Tensor, *, stride: int = 2, pool: bool = False) -> PackedStem:
    """Weights of a convolution of images as `stem` takes them; made once.

    Args:
        weight: (out, 3, k, k), k 1, 3, 5 or 7, out a multiple of 16, of any floating dtype.
        bias: (out), of the same dtype.
        stride: of the convolution, >= 1.
        pool: does a 3x3 max-pooling of stride 2 and padding 1 follow?
    Raises: InputError on other shapes or numbers.
    """
    shape = tuple(weight.shape)
    valid = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] and shape[2] in KERNELS
    check(valid, WHERE, f"weight must be (out, 3, k, k) with k of {KERNELS}, got {shape}")
    valid = shape[0] >= MULTIPLE and shape[0] % MULTIPLE == 0
    check(valid, WHERE, f"out width must be a multiple of {MULTIPLE}, got {shape[0]}")
    check(weight.is_floating_point(), WHERE, f"weight must be floating point, got {weight.dtype}")
    same = tuple(bias.shape) == shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device
    got = f"{tuple(bias.shape)} {bias.dtype} on {bias.device}"
    check(same, WHERE, f"bias must be ({shape[0]},) {weight.dtype} on {weight.device}, got {got}")
    check_count(stride, WHERE, "stride")
    weight, bias = weight.detach(), bias.detach()
    rows = weight.permute(2, 0, 3, 1).flatten(2)  # (k, out, 3 k): the taps of a row, red, green and blue of each
    filled = F.pad(rows, (0, _depth(weight) - rows.shape[2]))
    panels = torch.cat([to_panels(matrix) for matrix in filled])
    return PackedStem(weight, bias.float() if bias.dtype == torch.bfloat16 else bias, panels, stride, pool)


def _depth(weight: Tensor) -> int:
    step = _STEP.get(weight.dtype, 1)
    return -(-3 * weight.shape[3] // step) * step


def stem(images: Tensor, packed: PackedStem) -> Tensor:
    """A convolution of images, ReLU and, if packed so, a max-pooling, in evaluation mode.

        y = [maxpool] relu(W * images + b)          padding k // 2; 3x3, stride 2, padding 1

    Args:
        images: (N, 3, H, W), N >= 0, H, W >= 1, of the dtype of the packed weights, in any memory format. On the CPU
            float32 runs the kernel, and bfloat16 where the processor multiplies it; all else runs the reference, and so
            do images that require a gradient.
        packed: weights by `pack_stem`.
    Returns: (N, out, ceil(H / stride), ceil(W / stride)), with pooling half of that, rounded up; channels_last.
    Raises: InputError on a wrong shape, dtype or device.
    Cost: N H W out 3 k^2 / stride^2 multiplications; nothing larger than a few rows is stored before the pooling. In
        bfloat16 an infinity or NaN may spread as NaN to outputs whose taps end up to 10 columns to its left.
    """
    if direct := _ext.direct():
        mode = (torch.is_grad_enabled(), torch.get_num_threads(), PARALLEL_ABOVE)
        y = direct.stem(images, packed, *mode)
        if y is not None:
            return y
    images = checked_maps(images, 3, packed.weight, WHERE, "images")
    if not kernel_takes(images) or (torch.is_grad_enabled() and images.requires_grad):
        return _reference(images, *packed)
    return (_launch if _ext.unobserved(images) else torch.ops.hrpose.stem)(images, *packed)


def stem_reference(images: Tensor, packed: PackedStem) -> Tensor:
    """`stem` in plain PyTorch, for any floating dtype and any device."""
    images = checked_maps(images, 3, packed.weight, WHERE, "images")
    return _reference(images, *packed)


def _reference(images: Tensor, weight: Tensor, bias: Tensor, panels: Tensor, stride: int, pool: bool) -> Tensor:
    y = F.relu(F.conv2d(images, weight, bias.to(weight.dtype), stride, weight.shape[2] // 2))
    return (F.max_pool2d(y, 3, 2, 1) if pool else y).contiguous(memory_format=torch.channels_last)


def _stem_cpu(images: Tensor, weight: Tensor, bias: Tensor, panels: Tensor, stride: int, pool: bool) -> Tensor:
    # An exported graph may run where there is no kernel.
    return (_launch if kernel_takes(images) else _reference)(images, weight, bias, panels, stride, pool)


def _launch(images: Tensor, weight: Tensor, bias: Tensor, panels: Tensor, stride: int, pool: bool) -> Tensor:
    result = _stem_fake(images, weight, bias, panels, stride, pool)
    if not result.numel():
        return result
    n, _, h, w = images.shape
    parallel = result.numel() * 3 * weight.shape[2] ** 2 > PARALLEL_ABOVE
    tensors = [images, result, panels.contiguous(), bias.contiguous()]
    addresses = [t.data_ptr() for t in tensors]
    sizes = (n, h, w, *images.stride(), weight.shape[0], weight.shape[2], stride, _depth(weight), pool)
    sizes += (images.dtype == torch.bfloat16, torch.get_num_threads() if parallel else 1)
    kernels = _ext.kernels()
    _memory, at = _ext.workspace(kernels.stem_workspace(*addresses, 0, *sizes))
    kernels.stem_fwd(*addresses, at, *sizes)
    return result


def _stem_fake(images: Tensor, weight: Tensor, bias, panels, stride: int, pool: bool) -> Tensor:
    h, w = strided_sizes(images, stride)
    return new_maps(images, weight.shape[0], *((1 + (h - 1) // 2, 1 + (w - 1) // 2) if pool else (h, w)))


_ext.library.define("stem(Tensor images, Tensor weight, Tensor bias, Tensor panels, int stride, bool pool) -> Tensor")
_ext.library.impl("stem", _stem_cpu, "CPU")
torch.library.register_fake("hrpose::stem", _stem_fake, lib=_ext.library)
