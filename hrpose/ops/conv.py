"""A convolution at inference with what follows it: packed weights, the op, its reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose.errors import check, check_choice, check_count
from hrpose.ops import _ext
from hrpose.ops.maps import PARALLEL_ABOVE, checked_maps, kernel_takes, new_maps, strided_sizes
from hrpose.ops.panels import MULTIPLE, to_panels, winograd_panels

WHERE = "conv"


class PackedConv(NamedTuple):
    """What `pack_conv` makes of a convolution.

    weight (out, in, k, k) as it was; bias (out), float32 for bfloat16 weights; panels: weight as the kernel reads it,
    flat: a matrix per tap, or per factor of Winograd's F(tile x tile, 3 x 3) if tile is 2 or 4.
    """

    weight: Tensor
    bias: Tensor
    panels: Tensor
    stride: int
    tile: int
    relu: bool


def pack_conv(
    weight: Tensor, bias: Tensor, *, stride: int = 1, relu: bool = False, tile: int | None = None
) -> PackedConv:
    """Weights of a convolution as `conv` takes them; made once.

    Args:
        weight: (out, in, k, k), k 1 or 3, in and out multiples of 16, of any floating dtype.
        bias: (out), of the same dtype.
        stride: >= 1.
        relu: does a ReLU follow?
        tile: 0: a product per tap; 2 or 4: Winograd's way, for float32, k = 3 and stride 1 only; None: what is fastest.
            Winograd's weights take 1.8 (2) or 4 (4) times the memory of the original ones.
    Raises: InputError on other shapes or numbers.
    """
    shape = tuple(weight.shape)
    valid = len(shape) == 4 and shape[2] == shape[3] and shape[2] in (1, 3)
    check(valid, WHERE, f"weight must be (out, in, k, k) with k 1 or 3, got {shape}")
    for name, width in (("out", shape[0]), ("in", shape[1])):
        valid = width >= MULTIPLE and width % MULTIPLE == 0
        check(valid, WHERE, f"{name} width must be a multiple of {MULTIPLE}, got {width}")
    check(weight.is_floating_point(), WHERE, f"weight must be floating point, got {weight.dtype}")
    same = tuple(bias.shape) == shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device
    expected, got = f"({shape[0]},) {weight.dtype}", f"{tuple(bias.shape)} {bias.dtype}"
    check(same, WHERE, f"bias must be {expected} on {weight.device}, got {got} on {bias.device}")
    check_count(stride, WHERE, "stride")
    winograd = weight.dtype == torch.float32 and shape[2] == 3 and stride == 1
    if tile is None:
        tile = winograd_tile(shape[1], shape[0]) if winograd else 0
    check_choice(tile, (0, 2, 4) if winograd else (0,), WHERE, "tile")
    weight, bias = weight.detach(), bias.detach()
    bias = bias.float() if bias.dtype == torch.bfloat16 else bias
    panels = winograd_panels(weight, tile) if tile else tap_panels(weight)
    return PackedConv(weight, bias, panels, stride, tile, relu)


def tap_panels(weight: Tensor) -> Tensor:
    """Weights (out, in, k, k) -> panels of a matrix per tap, flat."""
    return torch.cat([to_panels(tap) for tap in weight.flatten(2).unbind(2)])


def winograd_tile(in_channels: int, out_channels: int) -> int:
    """The fastest tile of a 3x3 convolution. Large tiles save products, but their weights, which are read again for
    every image, outgrow the cache where there are many channels."""
    size = in_channels * out_channels
    return 4 if size <= 96 * 96 else 2 if size <= 256 * 256 else 0


def conv(x: Tensor, packed: PackedConv, residual: Tensor | None = None) -> Tensor:
    """A convolution, its bias, an addition and a ReLU in one pass, in evaluation mode.

        y = [relu] (W * x + b [+ residual])          padding k // 2

    Args:
        x: (N, in, H, W), N >= 0, H, W >= 1, of the dtype of the packed weights; channels_last is read as it is, other
            formats are copied. On the CPU float32 runs the kernel, and bfloat16 where the processor multiplies it
            (instruction sets avx512bf16 and amx); all else runs the reference, and so does an x that requires a
            gradient.
        packed: weights by `pack_conv`.
        residual: like the result, added before the ReLU.
    Returns: (N, out, ceil(H / stride), ceil(W / stride)), channels_last; differentiable in x and residual.
    Raises: InputError on a wrong shape, dtype or device.
    Cost: N H W in out k^2 / stride^2 multiplications; by Winograd's way 16 of 36 (tile 2) or 1 of 4 (tile 4), within
        1e-6 or 1e-5 of the largest value, and an infinity or NaN may spread as NaN to the outputs of its tile; on AMX
        one of the residual's to the other channels of its pixel.
    """
    if direct := _ext.direct():
        mode = (torch.is_grad_enabled(), torch.get_num_threads(), PARALLEL_ABOVE)
        y = direct.conv(x, packed, residual, *mode)
        if y is not None:
            return y
    x, residual = _checked(x, packed, residual)
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))
    if wants_grad or not kernel_takes(x):
        return _reference(x, packed.weight, packed.bias, packed.panels, residual, *packed[3:])
    run = _launch if _ext.unobserved(x, residual) else torch.ops.hrpose.conv
    return run(x, packed.weight, packed.bias, packed.panels, residual, *packed[3:])


def conv_reference(x: Tensor, packed: PackedConv, residual: Tensor | None = None) -> Tensor:
    """`conv` in plain PyTorch, for any floating dtype and any device."""
    x, residual = _checked(x, packed, residual)
    return _reference(x, packed.weight, packed.bias, packed.panels, residual, *packed[3:])


def _checked(x: Tensor, packed: PackedConv, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x = checked_maps(x, packed.weight.shape[1], packed.weight, WHERE)
    if residual is not None:
        h, w = strided_sizes(x, packed.stride)
        expected, got = (len(x), len(packed.weight), h, w), tuple(residual.shape)
        check(got == expected, WHERE, f"residual must be {expected}, got {got}")
        residual = checked_maps(residual, len(packed.weight), packed.weight, WHERE, "residual")
    return x, residual


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, panels: Tensor, residual: Tensor | None, stride: int, tile: int, relu: bool
) -> Tensor:
    y = F.conv2d(x, weight, bias.to(weight.dtype), stride, weight.shape[2] // 2)
    y = y if residual is None else y + residual
    return (F.relu(y) if relu else y).contiguous(memory_format=torch.channels_last)


def _conv_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, panels: Tensor, residual: Tensor | None, stride: int, tile: int, relu: bool
) -> Tensor:
    # An exported graph may run where there is no kernel.
    run = _launch if kernel_takes(x) else _reference
    return run(x, weight, bias, panels, residual, stride, tile, relu)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, panels: Tensor, residual: Tensor | None, stride: int, tile: int, relu: bool
) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    result = _conv_fake(x, weight, bias, panels, residual, stride, tile, relu)
    if not result.numel():
        return result
    n, in_channels, h, w = x.shape
    out_channels, kernel = weight.shape[0], weight.shape[2]
    parallel = result.numel() * in_channels * kernel * kernel > PARALLEL_ABOVE
    tensors = [x, residual, result, panels.contiguous(), bias.contiguous()]
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    sizes = (n, h, w, in_channels, out_channels, kernel, stride, tile, relu, x.dtype == torch.bfloat16)
    sizes += (torch.get_num_threads() if parallel else 1,)
    kernels = _ext.kernels()
    _memory, at = _ext.workspace(kernels.conv_workspace(*addresses, 0, *sizes))
    kernels.conv_fwd(*addresses, at, *sizes)
    return result


def _conv_fake(x: Tensor, weight: Tensor, bias, panels, residual, stride: int, tile, relu) -> Tensor:
    return new_maps(x, weight.shape[0], *strided_sizes(x, stride))


_ext.library.define(
    "conv(Tensor x, Tensor weight, Tensor bias, Tensor panels, Tensor? residual, int stride, int tile, bool relu)"
    " -> Tensor"
)
_ext.library.impl("conv", _conv_cpu, "CPU")
torch.library.register_fake("hrpose::conv", _conv_fake, lib=_ext.library)
