"""A chain of residual bottlenecks at inference, fused: packed weights, the op, its reference."""

import functools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hrpose.errors import check, check_choice
from hrpose.ops import _ext
from hrpose.ops.fragments import MULTIPLE as FRAGMENT
from hrpose.ops.fragments import from_core_matrices, from_fragments, to_core_matrices, to_fragments
from hrpose.ops.maps import PARALLEL_ABOVE, checked_maps, kernel_takes, new_maps, strided_sizes
from hrpose.ops.panels import MULTIPLE, from_panels, to_panels, winograd_panels

WHERE = "bottlenecks"
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_MIDS = (32, 64, 128)
WGMMA_MIDS = (32, 64)
WGMMA_BYTES = 220 << 10  # of weights that a step may have, all of them in shared memory: 227 KB less biases
# How a matrix is laid out, and taken apart again.
LAYOUTS = {
    "panels": (to_panels, from_panels),
    "fragments": (to_fragments, from_fragments),
    "core_matrices": (to_core_matrices, from_core_matrices),
    "rows": (Tensor.flatten, Tensor.view),
}
FOR_KERNELS = ("fragments", "core_matrices")  # of CUDA


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
    """What `pack_bottlenecks` makes of a chain: three tensors, and the sizes that say how to read them.

    biases: b1, b2, b3 of each block. winograd: w2 in Winograd's domain, for "panels" of float32 only, else empty.
    weights, by layout:

    "panels": [outputs / 32][inputs][32], the last one of 16 for an odd multiple of 16, of each block's w1, w2 (tap by
        tap) and w3, then of the projection. bfloat16 panels are [outputs / 32][inputs / 2][32][2], as its dot products
        want them, and its biases float32. For the CPU.
    "fragments": what a lane of a GPU multiplies lies side by side, see `to_fragments`, in the order in which a block of
        threads needs it, see `_slices`. bfloat16 and float16 with float32 biases.
    "core_matrices": the same for the tensor cores of sm_90a, see `to_core_matrices`; w1 of block 0 as fragments.
    "rows": the matrices of "panels" as they are, for the reference on a GPU.
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
    layout: str


def pack_bottlenecks(
    blocks: Sequence[BottleneckWeights], dilations: Sequence[int], stride: int = 1, layout: str | None = None
) -> PackedBottlenecks:
    """Weights of a chain as `bottlenecks` takes them; made once, 17 to 53 values per 17 of the originals.

    Args:
        blocks: at least one; all of the same mid and out widths, multiples of 16 like the input's. Only the first may
            have a projection, and needs one where its input differs from its output in width.
        dilations: of the 3x3 of each block, >= 1.
        stride: of the first block's 3x3 and shortcut, >= 1.
        layout: see `PackedBottlenecks`; by default the one for the device of the weights, on which `bottlenecks` then
            runs. To name another is to pack for another device, or for other kernels of the same: "fragments" for what
            `fragments_take`, "core_matrices" for what `core_matrices_take`.
    Raises: InputError on other shapes or numbers, or a layout that is not for them.
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
    fits = first.projection is not None or in_channels == out
    got = f"None for {in_channels} -> {out} channels"
    check(fits, WHERE, f"projection of block 0 must be a tensor where the width changes, got {got}")

    project = first.projection is not None
    layout = default_layout(first.w1, in_channels, mid, out, project) if layout is None else layout
    check_choice(layout, tuple(LAYOUTS), WHERE, "layout")
    fits = layout != "fragments" or fragments_take(first.w1.dtype, in_channels, mid, out)
    fits = fits and (layout != "core_matrices" or core_matrices_take(first.w1.dtype, in_channels, mid, out, project))
    got = f"{layout!r} for {first.w1.dtype}, {in_channels} -> {mid} -> {out} channels"
    check(fits, WHERE, f"layout must be another one for these weights, got {got}")

    matrices = {("w1", i): b.w1 for i, b in enumerate(blocks)} | {("w3", i): b.w3 for i, b in enumerate(blocks)}
    matrices |= {(tap, i): b.w2[:, :, tap // 3, tap % 3] for i, b in enumerate(blocks) for tap in range(9)}
    matrices |= {} if first.projection is None else {("projection", 0): first.projection}
    slices = _slices(layout, mid, out, project, len(blocks))
    parts = [LAYOUTS[_layout_of(name, layout)][0](matrices[name][rows, cols]) for name, rows, cols in slices]
    # Each layout in a shape of its own, so that no state dict of one is taken for one of another.
    weights = torch.cat(parts).view({"fragments": (-1, 8), "core_matrices": (-1, 8, 8)}.get(layout, (-1,)))
    biases = torch.cat([bias for b in blocks for bias in (b.b1, b.b2, b.b3)])
    biases = biases.float() if biases.dtype == torch.bfloat16 or layout in FOR_KERNELS else biases
    winograd = weights.new_empty(0)
    if weights.dtype == torch.float32 and layout == "panels":
        winograd = torch.cat([winograd_panels(b.w2, 4) for b in blocks])
    return PackedBottlenecks(
        weights.detach(), biases.detach(), winograd.detach(),
        in_channels, mid, out, project, stride, tuple(dilations), layout,
    )  # fmt: skip


def fragments_take(dtype: torch.dtype, in_channels: int, mid: int, out: int) -> bool:
    """Are there CUDA kernels for these weights?"""
    return dtype in CUDA_DTYPES and mid in CUDA_MIDS and in_channels % FRAGMENT == out % FRAGMENT == 0


def core_matrices_take(dtype: torch.dtype, in_channels: int, mid: int, out: int, project: bool) -> bool:
    """Are there CUDA kernels for warpgroups for these weights?"""
    fits = dtype in CUDA_DTYPES and mid in WGMMA_MIDS and in_channels % mid == out % mid == 0
    return fits and 2 * (9 * mid * mid + out * (in_channels * project + 2 * mid)) <= WGMMA_BYTES


def default_layout(weights: Tensor, in_channels: int, mid: int, out: int, project: bool) -> str:
    """The layout that `bottlenecks` wants on the device of these weights, of their dtype.

    That of the kernels for warps, unless those for warpgroups are asked for and run: which are faster has not been
    measured on a card yet. Raises: InputError on a wrong HRPOSE_CUDA_BOTTLENECKS.
    """
    if not weights.is_cuda:
        return "panels"
    wgmma = chosen_kernels() == "wgmma" and warpgroups(weights)
    if wgmma and core_matrices_take(weights.dtype, in_channels, mid, out, project):
        return "core_matrices"
    fits = _tensor_cores(weights) and fragments_take(weights.dtype, in_channels, mid, out)
    return "fragments" if fits else "rows"


def chosen_kernels() -> str | None:
    """What the environment variable HRPOSE_CUDA_BOTTLENECKS names: "mma", kernels for warps, "wgmma", those for
    warpgroups where there are any, or None. Raises: InputError on another name."""
    name = os.environ.get("HRPOSE_CUDA_BOTTLENECKS") or None
    check_choice(name, (None, "mma", "wgmma"), WHERE, "HRPOSE_CUDA_BOTTLENECKS")
    return name


def _tensor_cores(weights: Tensor) -> bool:
    """Do kernels of ours run on the card of these weights, and does it multiply bfloat16?"""
    return _ext.usable(weights, cuda=True) and torch.cuda.get_device_capability(weights.device) >= (8, 0)


def warpgroups(weights: Tensor) -> bool:
    """Do kernels of ours for warpgroups run on the card of these weights? They are code for sm_90a alone."""
    if not weights.is_cuda or not _ext.usable(weights, cuda=True):
        return False
    if torch.cuda.get_device_capability(weights.device) != (9, 0):
        return False
    return "90a" in _ext.native().cuda_archs.split(";")


def _slices(
    layout: str, mid: int, out: int, project: bool, blocks: int
) -> Iterator[tuple[tuple[str | int, int], slice, slice]]:
    """What lies one after the other in packed weights: a matrix by (name, block), and its rows and columns.

    For kernels of CUDA: w1 of block 0; of each block the taps, then, of each 32 outputs ("core_matrices": each `mid`),
    the projection, w3, and the columns of the next block's w1 that read them. Other layouts: whole matrices, as
    `PackedBottlenecks` says.
    """
    every, streamed = slice(None), layout in FOR_KERNELS
    step = mid if layout == "core_matrices" else 32
    if streamed:
        yield ("w1", 0), every, every
    for block in range(blocks):
        if not streamed:
            yield ("w1", block), every, every
        for tap in range(9):
            yield (tap, block), every, every
        for part in [slice(i, i + step) for i in range(0, out, step)] if streamed else [every]:
            if streamed and project and block == 0:
                yield ("projection", 0), part, every
            yield ("w3", block), part, every
            if streamed and block + 1 < blocks:
                yield ("w1", block + 1), every, part
    if not streamed and project:
        yield ("projection", 0), every, every


def _layout_of(name: tuple[str | int, int], layout: str) -> str:
    """How a matrix lies: of packed core matrices, the first w1 is for the same kernel as that of fragments."""
    return "fragments" if layout == "core_matrices" and name == ("w1", 0) else layout


def _matrices(
    weights: Tensor, layout: str, in_channels: int, mid: int, out: int, project: bool, blocks: int
) -> dict[tuple[str | int, int], Tensor]:
    """What was packed, by (name, block)."""
    weights, begin = weights.flatten(), 0
    parts: dict[tuple[str | int, int], list[Tensor]] = {}
    for name, rows, cols in _slices(layout, mid, out, project, blocks):
        ins = {"projection": in_channels, "w1": out if name[1] else in_channels}.get(name[0], mid)
        shape = (len(range(out if name[0] in ("w3", "projection") else mid)[rows]), len(range(ins)[cols]))
        end = begin + shape[0] * shape[1]
        parts.setdefault(name, []).append(LAYOUTS[_layout_of(name, layout)][1](weights[begin:end], *shape))
        begin = end
    return {name: torch.cat(part, 1 if name[0] == "w1" else 0) for name, part in parts.items()}


def bottlenecks(x: Tensor, packed: PackedBottlenecks) -> Tensor:
    """A chain of residual bottlenecks in evaluation mode, each a pass over x that keeps all else in the cache.

        y = relu(W1_i x + b1_i),  z = relu(W2_i * y + b2_i),  x <- relu(shortcut_i(x) + W3_i z + b3_i),  i = 1, 2, ...

    W2_i *: the 3x3 of dilation d_i with padding d_i, in the first block with the stride. shortcut_i: the identity, in
    the first block of every stride-th pixel, or the 1x1 projection of these where there is one.

    Args:
        x: (N, in, H, W), N >= 0, H, W >= 1, of the dtype of the packed weights. channels_last is read as it is, other
            formats are copied. On the CPU float32 runs the kernel, and bfloat16 where the processor multiplies it
            (instruction sets avx512bf16 and amx); on CUDA, from compute capability 8.0 on, bfloat16 and float16 of mid
            width 32, 64 or 128 and in and out widths that are multiples of 32, as far as a block's shared memory holds
            the weights of a step. All else runs the reference, float32 on CUDA too, and so does an x that requires a
            gradient.
        packed: weights by `pack_bottlenecks`, for this device.

    Returns: (N, out, ceil(H / stride), ceil(W / stride)), channels_last; differentiable in x.
    Raises: InputError on a wrong shape, dtype or device, or weights that were packed for another device.
    Cost: N H W mid (in + 9 mid + out) multiplications for a block of stride 1, less what lies in padding and what, on
        the CPU, Winograd's F(4x4, 3x3) saves, which is within 3e-6 of float64 for the six blocks of a dilation
        pyramid, 6e-6 with 128 channels. An infinity or NaN in x may spread as NaN over 4x4 pixels around it.
    """
    if direct := _ext.direct():
        mode = (torch.is_grad_enabled(), torch.get_num_threads(), PARALLEL_ABOVE)
        y = direct.bottlenecks(x, packed, *mode)
        if y is not None:
            return y
    x = checked_maps(x, packed.in_channels, packed.weights, WHERE)
    if (packed.layout == "panels") != x.is_cpu and (x.is_cpu or x.is_cuda):
        wanted = "'panels'" if x.is_cpu else "'fragments', 'core_matrices' or 'rows'"
        got = f"{packed.layout!r}: pack them for this device"
        check(False, WHERE, f"layout of weights on {x.device.type} must be {wanted}, got {got}")
    wants_grad = torch.is_grad_enabled() and x.requires_grad
    kernel = packed.layout in FOR_KERNELS if x.is_cuda else kernel_takes(x)
    if not kernel or wants_grad:
        return _reference(x, *packed)
    run = _launch if x.is_cpu and _ext.unobserved(x) else torch.ops.hrpose.bottlenecks
    return run(x, *packed)


def bottlenecks_reference(x: Tensor, packed: PackedBottlenecks) -> Tensor:
    """`bottlenecks` in plain PyTorch, for any floating dtype and any device."""
    return _reference(checked_maps(x, packed.in_channels, packed.weights, WHERE), *packed)


def _reference(
    x: Tensor, weights: Tensor, biases: Tensor, winograd: Tensor, in_channels: int, mid: int, out: int,
    project: bool, stride: int, dilations: Sequence[int], layout: str,
) -> Tensor:  # fmt: skip
    packed = _matrices(weights, layout, in_channels, mid, out, project, len(dilations))
    matrices = {name: matrix[:, :, None, None] for name, matrix in packed.items()}
    offsets = iter(biases.to(x.dtype).split([mid, mid, out] * len(dilations)))
    for index, dilation in enumerate(dilations):
        step = 1 if index else stride
        w2 = torch.cat([matrices[tap, index] for tap in range(9)], 2).unflatten(2, (3, 3)).squeeze(4)
        y = F.relu(F.conv2d(x, matrices["w1", index], next(offsets)))
        y = F.relu(F.conv2d(y, w2, next(offsets), step, dilation, dilation))
        shortcut = x[:, :, ::step, ::step]
        shortcut = F.conv2d(shortcut, matrices["projection", 0]) if project and index == 0 else shortcut
        x = F.relu(F.conv2d(y, matrices["w3", index], next(offsets)) + shortcut)
    return x.contiguous(memory_format=torch.channels_last)


def _bottlenecks_cpu(
    x: Tensor, weights: Tensor, biases: Tensor, winograd: Tensor, in_channels: int, mid: int, out: int,
    project: bool, stride: int, dilations: Sequence[int], layout: str,
) -> Tensor:  # fmt: skip
    # An exported graph may run where there is no kernel.
    run = _launch if layout == "panels" and kernel_takes(x) else _reference
    return run(x, weights, biases, winograd, in_channels, mid, out, project, stride, dilations, layout)


def _launch(
    x: Tensor, weights: Tensor, biases: Tensor, winograd: Tensor, in_channels: int, mid: int, out: int,
    project: bool, stride: int, dilations: Sequence[int], layout: str,
) -> Tensor:  # fmt: skip
    n, _, h, w = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    result = _bottlenecks_fake(x, weights, biases, winograd, in_channels, mid, out, project, stride, dilations, layout)
    if not result.numel():
        return result
    products = n * h * w * mid * (in_channels + 9 * mid + out) * len(dilations)
    threads = torch.get_num_threads() if products > PARALLEL_ABOVE else 1
    tensors = [x, result, weights.contiguous(), biases.contiguous(), winograd.contiguous(), _int64(tuple(dilations))]
    addresses = [t.data_ptr() for t in tensors]  # 0 for a tensor without values
    sizes = (n, h, w, in_channels, mid, out, len(dilations), stride, x.dtype == torch.bfloat16)
    sizes += (project, threads)
    kernels = _ext.kernels()
    _memory, at = _ext.workspace(kernels.bottlenecks_workspace(*addresses, 0, *sizes))
    kernels.bottlenecks_fwd(*addresses, at, *sizes)
    return result


@functools.lru_cache
def _int64(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values)


def _bottlenecks_cuda(
    x: Tensor, weights: Tensor, biases: Tensor, winograd: Tensor, in_channels: int, mid: int, out: int,
    project: bool, stride: int, dilations: Sequence[int], layout: str,
) -> Tensor:  # fmt: skip
    n, _, h, w = x.shape
    arguments = (weights, biases, winograd, in_channels, mid, out, project, stride, dilations, layout)
    result = _bottlenecks_fake(x, *arguments)
    if not result.numel():
        return result
    wgmma = layout == "core_matrices"
    if layout not in FOR_KERNELS or not (warpgroups(x) if wgmma else _tensor_cores(x)):
        return _reference(x, *arguments)
    x = x.contiguous(memory_format=torch.channels_last)
    x, weights, biases = (_aligned(t) for t in (x, weights.contiguous(), biases.contiguous()))
    sizes = (n, h, w, in_channels, mid, out, stride, project, wgmma, _ext.CUDA_TYPES[x.dtype])
    with _ext.current_stream(x) as stream:
        room = _ext.native().bottlenecks_workspace_cuda(list(dilations), *sizes)
        if room < 0:
            return _reference(x, *arguments)
        workspace = torch.empty(room, dtype=torch.uint8, device=x.device)
        addresses = [t.data_ptr() for t in (x, result, weights, biases, workspace)]
        _ext.native().bottlenecks_fwd_cuda(*addresses, list(dilations), *sizes, stream)
    return result


def _aligned(tensor: Tensor) -> Tensor:
    """At a multiple of 16 bytes, as all memory that torch allocates is, but not every view of it."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _bottlenecks_fake(
    x: Tensor, weights, biases, winograd, in_channels, mid, out: int, project, stride: int, dilations, layout
) -> Tensor:
    return new_maps(x, out, *strided_sizes(x, stride))


_ext.library.define(
    "bottlenecks(Tensor x, Tensor weights, Tensor biases, Tensor winograd, int in_channels, int mid, int out,"
    " bool project, int stride, int[] dilations, str layout) -> Tensor"
)
_ext.library.impl("bottlenecks", _bottlenecks_cpu, "CPU")
_ext.library.impl("bottlenecks", _bottlenecks_cuda, "CUDA")
torch.library.register_fake("hrpose::bottlenecks", _bottlenecks_fake, lib=_ext.library)
