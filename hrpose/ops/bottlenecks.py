"""A chain of residual bottlenecks at inference, fused: packed weights, the op, its reference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose.errors import check
from hrpose.ops import _ext
from hrpose.ops.panels import MULTIPLE, from_panels, to_panels, winograd_panels

WHERE = "bottlenecks"
# Below this many multiplications per image or batch, waking other threads costs more than it saves.
PARALLEL_ABOVE = 2_000_000


class BottleneckWeights(NamedTuple):
    """Weights of one bottleneck, batch norm folded in; all of one floating dtype.

    w1 (mid, in), b1 (mid): 1x1. w2 (mid, mid, 3, 3), b2 (mid): 3x3. w3 (out, mid), b3 (out): 1x1. projection (out, in):
    the shortcut, its bias added to b3; None for the identity.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    projection: Tensor | None = None


class PackedBottlenecks(NamedTuple):
    """What `pack_bottlenecks` makes of a chain: three flat tensors, and the sizes that say how to read them.

    weights: panels [outputs / 32][inputs][32], the last one of 16 for an odd multiple of 16, of each block's w1, w2
    (tap by tap) and w3, then of the projection. biases: b1, b2, b3 of each block. winograd: w2 in Winograd's domain,
    for float32 only, else empty. bfloat16 panels are [outputs / 32][inputs / 2][32][2], as its dot products want them,
    and its biases float32.
    """

    weights: Tensor
    biases: Tensor
    winograd: Tensor
    in_channels: int
    mid_channels: int
    out_channels: int
    project: bool
    stride: int
    dilations: tuple[int, ...]


def pack_bottlenecks(
    blocks: Sequence[BottleneckWeights], dilations: Sequence[int], stride: int = 1
) -> PackedBottlenecks:
    """Weights of a chain as `bottlenecks` takes them; made once, 17 to 53 values per 17 of the originals.

    Args:
        blocks: at least one; all of the same mid and out widths, multiples of 16 like the input's. Only the first may
            have a projection, and needs one where its input differs from its output in width or size.
        dilations: of the 3x3 of each block, >= 1.
        stride: of the first block's 3x3 and projection, >= 1.
    Raises: InputError on other shapes or numbers.
    """
    check(len(blocks) >= 1, WHERE, "blocks must be at least one, got none")
    numbers = [stride, *dilations]
    valid = all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in numbers)
    check(valid, WHERE, f"stride and dilations must be integers >= 1, got {stride!r} and {list(dilations)}")
    check(len(dilations) == len(blocks), WHERE, f"dilations must be {len(blocks)}, one per block, got {len(dilations)}")
    first = blocks[0]
    check(first.w1.ndim == 2, WHERE, f"w1 of block 0 must be (mid, in), got {tuple(first.w1.shape)}")
    mid, in_channels = first.w1.shape
    out = first.w3.shape[0] if first.w3.ndim else 0
    for name, width in (("in", in_channels), ("mid", mid), ("out", out)):
        valid = width >= MULTIPLE and width % MULTIPLE == 0
        check(valid, WHERE, f"{name} width must be a multiple of {MULTIPLE}, got {width}")
    for index, block in enumerate(blocks):
        ins = out if index else in_channels
        shapes = {"w1": (mid, ins), "b1": (mid,), "w2": (mid, mid, 3, 3), "b2": (mid,), "w3": (out, mid), "b3": (out,)}
        shapes |= {} if block.projection is None else {"projection": (out, ins)}
        for name, shape in shapes.items():
            value = getattr(block, name)
            got = tuple(value.shape)
            check(got == shape, WHERE, f"{name} of block {index} must be {shape}, got {got}")
            same = value.dtype == first.w1.dtype and value.device == first.w1.device and value.is_floating_point()
            kind = f"{first.w1.dtype} on {first.w1.device}" if first.w1.is_floating_point() else "floating point"
            got = f"{value.dtype} on {value.device}"
            check(same, WHERE, f"{name} of block {index} must be {kind}, got {got}")
        check(not index or block.projection is None, WHERE, f"projection of block {index} must be None, got a tensor")
    fits = first.projection is not None or (stride == 1 and in_channels == out)
    got = f"None for {in_channels} -> {out} channels, stride {stride}"
    check(fits, WHERE, f"projection of block 0 must be a tensor where width or size change, got {got}")

    matrices = [m for b in blocks for m in (b.w1, *b.w2.flatten(2).unbind(2), b.w3)]
    matrices += [] if first.projection is None else [first.projection]
    weights = torch.cat([to_panels(m) for m in matrices])
    biases = torch.cat([bias for b in blocks for bias in (b.b1, b.b2, b.b3)])
    biases = biases.float() if biases.dtype == torch.bfloat16 else biases
    winograd = weights.new_empty(0)
    if weights.dtype == torch.float32:
        winograd = torch.cat([winograd_panels(b.w2, 4) for b in blocks])
    return PackedBottlenecks(
        weights.detach(), biases.detach(), winograd.detach(),
        in_channels, mid, out, first.projection is not None, stride, tuple(dilations),
    )  # fmt: skip


def bottlenecks(x: Tensor, packed: PackedBottlenecks) -> Tensor:
    """A chain of residual bottlenecks in evaluation mode, each a pass over x that keeps all else in the cache.

        y = relu(W1_i x + b1_i),  z = relu(W2_i * y + b2_i),  x <- relu(shortcut_i(x) + W3_i z + b3_i),  i = 1, 2, ...

    W2_i *: the 3x3 of dilation d_i with padding d_i, in the first block with the stride. shortcut_i: the identity, in
    the first block the strided 1x1 projection where there is one.

    Args:
        x: (N, in, H, W), N >= 0, H, W >= 1, of the dtype of the packed weights. channels_last is read as it is, other
            formats are copied. On the CPU float32 runs the kernel, and bfloat16 where the processor multiplies it
            (instruction sets avx512bf16 and amx); all else runs the reference, and so does an x that requires a
            gradient.
        packed: weights by `pack_bottlenecks`.

    Returns: (N, out, ceil(H / stride), ceil(W / stride)), channels_last; differentiable in x.
    Raises: InputError on a wrong shape, dtype or device.
    Cost: N H W mid (in + 9 mid + out) multiplications for a block of stride 1, less what lies in padding and what
        Winograd's F(4x4, 3x3) saves, which is within 3e-6 of float64 for six blocks. An infinity or NaN in x may spread
        as NaN over the 4x4 pixels of its neighbours.
    """
    x = _checked(x, packed)
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    if _ext.usable(x) and x.dtype in (torch.float32, torch.bfloat16) and not wants_grad:
        return torch.ops.hrpose.bottlenecks(x, *packed)
    return _reference(x, *packed)


def bottlenecks_reference(x: Tensor, packed: PackedBottlenecks) -> Tensor:
    """`bottlenecks` in plain PyTorch, for any floating dtype and any device."""
    return _reference(_checked(x, packed), *packed)


def _checked(x: Tensor, packed: PackedBottlenecks) -> Tensor:
    x = _ext.to_tensor(x, WHERE, "x", packed.weights)
    channels = packed.in_channels
    valid = x.ndim == 4 and x.shape[1] == channels and x.shape[2] >= 1 and x.shape[3] >= 1
    check(valid, WHERE, f"x must be (N, {channels}, H, W) with H, W >= 1, got {tuple(x.shape)}")
    kind, got = (f"{t.dtype} on {t.device}" for t in (packed.weights, x))
    check(kind == got, WHERE, f"x must be {kind} like the packed weights, got {got}")
    return x.contiguous(memory_format=torch.channels_last)


def _reference(
    x: Tensor, weights: Tensor, biases: Tensor, winograd: Tensor, in_channels: int, mid: int, out: int,
    project: bool, stride: int, dilations: Sequence[int],
) -> Tensor:  # fmt: skip
    shapes = []
    for index in range(len(dilations)):
        shapes += [(mid, out if index else in_channels), *[(mid, mid)] * 9, (out, mid)]
    shapes += [(out, in_channels)] if project else []
    flat = weights.split([rows * cols for rows, cols in shapes])
    matrices = [from_panels(panels, *shape)[:, :, None, None] for panels, shape in zip(flat, shapes, strict=True)]
    offsets = iter(biases.to(x.dtype).split([mid, mid, out] * len(dilations)))
    for index, dilation in enumerate(dilations):
        w1, *taps, w3 = matrices[11 * index : 11 * index + 11]
        step = 1 if index else stride
        w2 = torch.cat(taps, 2).unflatten(2, (3, 3)).squeeze(4)
        y = F.relu(F.conv2d(x, w1, next(offsets)))
        y = F.relu(F.conv2d(y, w2, next(offsets), step, dilation, dilation))
        shortcut = F.conv2d(x, matrices[-1], stride=stride) if project and index == 0 else x
        x = F.relu(F.conv2d(y, w3, next(offsets)) + shortcut)
    return x.contiguous(memory_format=torch.channels_last)


def _bottlenecks_cpu(
    x: Tensor, weights: Tensor, biases: Tensor, winograd: Tensor, in_channels: int, mid: int, out: int,
    project: bool, stride: int, dilations: Sequence[int],
) -> Tensor:  # fmt: skip
    bf16 = x.dtype == torch.bfloat16
    if not _ext.usable(x) or (bf16 and not _ext.kernels().bf16()):
        return _reference(x, weights, biases, winograd, in_channels, mid, out, project, stride, dilations)
    n, _, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    result = _bottlenecks_fake(x, weights, biases, winograd, in_channels, mid, out, project, stride, dilations)
    if not result.numel():
        return result
    products = x.numel() // in_channels * mid * (in_channels + 9 * mid + out) * len(dilations)
    threads = torch.get_num_threads() if products > PARALLEL_ABOVE else 1
    tensors = [x, result, weights.contiguous(), biases.contiguous(), winograd.contiguous(), torch.tensor(dilations)]
    addresses = [t.data_ptr() for t in tensors]  # 0 for a tensor without values
    sizes = (n, h, w, in_channels, mid, out, len(dilations), stride, bf16, project, threads)
    kernels = _ext.kernels()
    _memory, at = _ext.workspace(kernels.bottlenecks_workspace(*addresses, 0, *sizes))
    kernels.bottlenecks_fwd(*addresses, at, *sizes)
    return result


def _bottlenecks_fake(
    x: Tensor, weights, biases, winograd, in_channels, mid, out: int, project, stride: int, dilations
) -> Tensor:
    h, w = (1 + (size - 1) // stride for size in x.shape[2:])
    return x.new_empty((x.shape[0], h, w, out)).permute(0, 3, 1, 2)


_ext.library.define(
    "bottlenecks(Tensor x, Tensor weights, Tensor biases, Tensor winograd, int in_channels, int mid, int out,"
    " bool project, int stride, int[] dilations) -> Tensor"
)
_ext.library.impl("bottlenecks", _bottlenecks_cpu, "CPU")
torch.library.register_fake("hrpose::bottlenecks", _bottlenecks_fake, lib=_ext.library)
