"""Weighted sum of maps resampled to one size, then ReLU: exchange units of HRNet and of Resolution-wise Attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hrpose.errors import InputError
from hrpose.ops import _ext

WHERE = "ram_sum"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSOR = "a dense tensor of float32, float64, bfloat16 or float16"
KERNEL_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
KERNEL_TERMS = 8  # kMaxTerms in csrc/cpu/kernels.h and csrc/cuda/kernels.h
CUDA_VALUES = 1 << 30  # the CUDA kernels count in int32
# On CUDA a block takes so many values of a gradient and sample; more blocks of a sample than this fill every card.
PART_VALUES, MAX_PARTS = 2048, 512
# Up to this many output values (two images of 32 x 64 x 48) waking other threads costs more than it saves.
PARALLEL_ABOVE = 2 * 32 * 64 * 48
FLOAT_BYTES = 4


def ram_sum(inputs: Sequence[Tensor], weights: Tensor | None = None, interpolation: str = "nearest") -> Tensor:
    """Sum of maps brought to the size of the largest, each sample weighing them its own way, then ReLU.

        y[n] = relu( sum_h weights[n,h] * resample_h(inputs[h])[n] )        [RAM + GPR, eq. 3; HRNet without weights]

        nearest:  resample(x)[y,x] = x[y // f, x // f]
        bilinear: torch.nn.functional.interpolate with align_corners=False

    The sum goes from left to right. The mean of resample_h(x) over its pixels is that of x, in real arithmetic and for
    both interpolations: with whole factors every pixel of x contributes weights that add up to f^2. So attention may
    pool its maps before they are resampled.

    Args:
        inputs: M >= 1 maps (N, C, H / f_h, W / f_h) on one device, f_h >= 1 whole, N >= 0, others >= 1, in any order,
            at least one with f_h = 1; float32, float64, bfloat16 or float16, brought to their common dtype.
        weights: (N, M) floating point, None for ones. Used in float32 (float64 with float64 inputs).
        interpolation: "nearest" or "bilinear".

    Returns: (N, C, H, W) in the common dtype, from the kernel in the memory format (NCHW or channels_last) of the first
        input with f_h = 1. bfloat16 and float16 are summed in float32 and rounded once. NaN stays NaN. Differentiable
        in inputs and weights, twice too; the second derivative runs in plain PyTorch.
    Raises: InputError on a wrong number of inputs, shape, dtype, device or interpolation.
    Cost: reads each input and writes the output once; keeps the output for the gradient, with weights the inputs too.
        float32 and bfloat16 on a CPU, float16 too on CUDA (maps below 2^30 values) run on a kernel, if M <= 8;
        everything else, and whatever is being exported, on `ram_sum_reference`.
    """
    if (direct := _ext.direct()) and (interpolation == "nearest" or interpolation == "bilinear"):
        mode = (torch.is_grad_enabled(), torch.get_num_threads(), PARALLEL_ABOVE)
        out = direct.ram_sum(inputs, weights, interpolation == "bilinear", *mode)
        if out is not None:
            return out
    tensors, weights, factors = _checked(inputs, weights, interpolation)
    bilinear = interpolation == "bilinear"
    if not _has_kernel(tensors[factors.index(1)], factors) or _needs_plain_ops():
        return _reference(tensors, weights, factors, bilinear)
    if torch.is_grad_enabled() and any([t.requires_grad for t in (*tensors, weights) if t is not None]):
        return _RamSum.apply(weights, factors, bilinear, *tensors)
    run = _launch if _ext.unobserved(*tensors, weights) else _fwd
    return run(tensors, weights, factors, bilinear)


def ram_sum_reference(
    inputs: Sequence[Tensor], weights: Tensor | None = None, interpolation: str = "nearest"
) -> Tensor:
    """`ram_sum` in plain PyTorch, on any device. The kernels equal it bit for bit in float32 with "nearest"."""
    tensors, weights, factors = _checked(inputs, weights, interpolation)
    return _reference(tensors, weights, factors, interpolation == "bilinear")


def _checked(
    inputs: Sequence[Tensor], weights: Tensor | None, interpolation: str
) -> tuple[list[Tensor], Tensor | None, list[int]]:
    """Inputs in one dtype, weights in the dtype of the sum, the factors f_h."""
    if interpolation != "nearest" and interpolation != "bilinear":
        raise InputError(f"{WHERE}: interpolation must be 'nearest' or 'bilinear', got {interpolation!r}")
    if not isinstance(inputs, (list, tuple)) or not inputs:
        got = "none" if isinstance(inputs, (list, tuple)) else type(inputs).__name__
        raise InputError(f"{WHERE}: inputs must be a list or tuple of at least one tensor, got {got}")
    shapes, height, width = [], 0, 0
    for h, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.dtype not in FLOATS:
            raise InputError(f"{WHERE}: inputs[{h}] must be {TENSOR}, got {_kind(x)}")
        shapes.append(shape := x.shape)
        if len(shape) != 4 or not (shape[1] and shape[2] and shape[3]):
            raise InputError(f"{WHERE}: inputs[{h}] must be (N, C, H, W) with C, H, W >= 1, got {tuple(shape)}")
        height, width = max(height, shape[2]), max(width, shape[3])

    n, c, _, _ = shapes[0]
    dtype, device, factors = inputs[0].dtype, inputs[0].device, []
    for h, x in enumerate(inputs):
        x_n, x_c, x_height, x_width = shapes[h]
        if x_n != n or x_c != c:
            raise InputError(f"{WHERE}: inputs[{h}] must have N = {n}, C = {c} like inputs[0], got {tuple(x.shape)}")
        factor = height // x_height
        if x_height * factor != height or x_width * factor != width:
            raise InputError(
                f"{WHERE}: inputs[{h}] must be smaller than {height} x {width}, the greatest height and width, by one "
                f"whole factor in both directions, got {x_height} x {x_width}"
            )
        if x.device != device:
            raise InputError(f"{WHERE}: inputs[{h}] must be on {device} like inputs[0], got {x.device}")
        if x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
        factors.append(int(factor))

    if weights is not None:
        if not isinstance(weights, Tensor) or weights.layout != torch.strided or weights.dtype not in FLOATS:
            raise InputError(f"{WHERE}: weights must be {TENSOR}, got {_kind(weights)}")
        if weights.shape != (n, len(inputs)):
            raise InputError(
                f"{WHERE}: weights must be (N, M) = ({n}, {len(inputs)}), one per sample and input, "
                f"got {tuple(weights.shape)}"
            )
        if weights.device != device:
            raise InputError(f"{WHERE}: weights must be on {device} like inputs, got {weights.device}")
        wide = _wide(dtype)
        weights = weights if weights.dtype == wide else weights.to(wide)
    return [x.to(dtype) if x.dtype != dtype else x for x in inputs], weights, factors


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return str(value.dtype if value.layout == torch.strided else value.layout)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _needs_plain_ops() -> bool:
    """Is the caller one that knows PyTorch's own ops only: the tracer of a graph to be exported (torch.export says so
    from 2.7 on), a transform of torch.func, forward-mode differentiation, which would take our derivative for 0?"""
    return (
        torch.jit.is_tracing()
        or getattr(torch.compiler, "is_exporting", bool)()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _has_kernel(full: Tensor, factors: Sequence[int]) -> bool:
    if len(factors) > KERNEL_TERMS or not _ext.usable(full, cuda=True):
        return False
    return full.dtype in KERNEL_DTYPES[full.device.type] and (full.is_cpu or full.numel() < CUDA_VALUES)


def _reference(inputs: Sequence[Tensor], weights: Tensor | None, factors: Sequence[int], bilinear: bool) -> Tensor:
    size = inputs[factors.index(1)].shape[2:]
    total = None
    for h, (x, factor) in enumerate(zip(inputs, factors, strict=True)):
        x = x.to(_wide(x.dtype))
        if factor > 1:
            x = _resample(x, size, factor, bilinear)
        if weights is not None:
            x = x * weights[:, h, None, None, None]
        total = x if total is None else total + x
    return total.relu().to(inputs[0].dtype)


def _resample(x: Tensor, size: Sequence[int], factor: int, bilinear: bool) -> Tensor:
    # PyTorch finds the place of pixel y as y * (1 / factor) in float32. Where the factor is no power of two that is
    # inexact: bilinear weights are then off by about 1e-7 y, "nearest" for some factors (41) takes the pixel before.
    if bilinear:
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    mode = "nearest-exact" if factor & (factor - 1) else "nearest"
    return torch.nn.functional.interpolate(x, size, mode=mode)


def _reference_backward(
    grad: Tensor, out: Tensor, inputs: Sequence[Tensor], weights: Tensor | None, factors: Sequence[int], bilinear: bool
) -> list[Tensor]:
    """What ram_sum_bwd computes, in differentiable PyTorch."""
    g = grad.masked_fill(out <= 0, 0).to(_wide(out.dtype))
    adjoints = {f: _adjoint(g, f, bilinear) for f in factors}
    if weights is None:
        return [adjoints[f].to(out.dtype) for f in factors]
    gradients = [(adjoints[f] * weights[:, h, None, None, None]).to(out.dtype) for h, f in enumerate(factors)]
    products = [(adjoints[f] * x).sum((1, 2, 3)) for f, x in zip(factors, inputs, strict=True)]
    return [*gradients, torch.stack(products, dim=1)]


def _adjoint(g: Tensor, factor: int, bilinear: bool) -> Tensor:
    """The transpose of _resample."""
    if factor == 1:
        return g
    n, c, height, width = g.shape
    h, w = height // factor, width // factor
    if not bilinear:
        return g.reshape(n, c, h, factor, w, factor).sum((3, 5))
    return torch.ops.aten.upsample_bilinear2d_backward(g, [height, width], [n, c, h, w], False)


def _fwd_any(inputs: list[Tensor], weights: Tensor | None, factors: list[int], bilinear: bool) -> Tensor:
    full = inputs[factors.index(1)]
    if not _has_kernel(full, factors):  # a graph of torch.compile, run without the native module
        return _reference(inputs, weights, factors, bilinear).contiguous(memory_format=_memory_format(full))
    return _launch(inputs, weights, factors, bilinear)


def _launch(inputs: list[Tensor], weights: Tensor | None, factors: list[int], bilinear: bool) -> Tensor:
    full = inputs[factors.index(1)]
    form = _memory_format(full)
    out = torch.empty_like(full, memory_format=form)
    inputs = [x.contiguous(memory_format=form) for x in inputs]
    weights = None if weights is None else weights.contiguous()
    n, h, w, c, share = _images(out, factors)
    if out.is_cuda:
        with _ext.current_stream(out) as stream:
            _ext.kernels().ram_sum_fwd_cuda(
                [x.data_ptr() for x in inputs],
                factors,
                0 if weights is None else weights.data_ptr(),
                out.data_ptr(),
                *(n, h, w, c, share, bilinear, _ext.CUDA_TYPES[out.dtype], stream),
            )
        return out
    threads = torch.get_num_threads() if n * h * w * c > PARALLEL_ABOVE else 1
    kernels, addresses = _ext.kernels(), ([x.data_ptr() for x in inputs], factors)
    addresses += (0 if weights is None else weights.data_ptr(), out.data_ptr())
    sizes = (n, h, w, c, share, bilinear, out.dtype == torch.bfloat16, threads)
    _memory, at = _ext.workspace(kernels.ram_sum_workspace(*addresses, 0, *sizes))
    kernels.ram_sum_fwd(*addresses, at, *sizes)
    return out


def _bwd_any(
    grad: Tensor, out: Tensor, inputs: list[Tensor], weights: Tensor | None, factors: list[int], bilinear: bool
) -> list[Tensor]:
    grads = _bwd_fake(grad, out, inputs, weights, factors, bilinear)
    if not _has_kernel(out, factors):
        computed = _reference_backward(grad, out, inputs, weights, factors, bilinear)
        return [to.copy_(g) for to, g in zip(grads, computed, strict=True)]
    form = _memory_format(out)
    grad, out = grad.contiguous(memory_format=form), out.contiguous(memory_format=form)
    inputs = [x.contiguous(memory_format=form) for x in inputs]
    weights = None if weights is None else weights.contiguous()
    n, h, w, c, share = _images(out, factors)
    if out.is_cuda:
        parts = max(1, min(MAX_PARTS, share * h * w * c // PART_VALUES))
        products = torch.empty((n // share, len(factors), parts), dtype=torch.float32, device=out.device)
        with _ext.current_stream(out) as stream:
            _ext.kernels().ram_sum_bwd_cuda(
                grad.data_ptr(),
                out.data_ptr(),
                [x.data_ptr() for x in inputs],
                factors,
                0 if weights is None else weights.data_ptr(),
                [g.data_ptr() for g in grads[: len(factors)]],
                products.data_ptr(),
                *(parts, n, h, w, c, share, bilinear, _ext.CUDA_TYPES[out.dtype], stream),
            )
        if weights is not None:
            grads[-1].copy_(products.sum(2, dtype=torch.float64))
        return grads
    room = w * c * (h + 2) + sum([h // f * (w // f) * c for f in factors if f > 1])
    threads = torch.get_num_threads() if n * h * w * c > PARALLEL_ABOVE else 1
    _memory, workspace = _ext.workspace(threads * room * FLOAT_BYTES)
    products = torch.empty((n, len(factors)), dtype=torch.float64)
    _ext.kernels().ram_sum_bwd(
        grad.data_ptr(),
        out.data_ptr(),
        [x.data_ptr() for x in inputs],
        factors,
        0 if weights is None else weights.data_ptr(),
        [g.data_ptr() for g in grads[: len(factors)]],
        products.data_ptr(),
        workspace,
        *(room, n, h, w, c, share, bilinear, out.dtype == torch.bfloat16, threads),
    )
    if weights is not None:
        grads[-1].copy_(products.view(-1, share, len(factors)).sum(1))
    return grads


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 and not x.is_contiguous() else torch.contiguous_format


def _images(out: Tensor, factors: list[int]) -> tuple[int, int, int, int, int]:
    """What the kernel takes for images: how many, their h, w and c, and how many of them make one sample."""
    n, c, h, w = out.shape
    if max(factors) == 1:  # pixels have no neighbours: any shape will do, here one with long rows
        return (n, 1, 1, c * h * w, 1) if out.is_cuda else (n, c, h * w, 1, 1)
    return (n * c, h, w, 1, c) if out.is_contiguous() else (n, h, w, c, 1)


def _fwd_fake(inputs: list[Tensor], weights: Tensor | None, factors: list[int], bilinear: bool) -> Tensor:
    x = inputs[factors.index(1)]
    return torch.empty_like(x, memory_format=_memory_format(x))


def _bwd_fake(
    grad: Tensor, out: Tensor, inputs: list[Tensor], weights: Tensor | None, factors: list[int], bilinear: bool
) -> list[Tensor]:
    n, c, h, w = out.shape
    form = _memory_format(out)
    grads = [
        torch.empty((n, c, h // f, w // f), dtype=out.dtype, device=out.device, memory_format=form) for f in factors
    ]
    return grads if weights is None else [*grads, torch.empty_like(weights)]


class _RamSum(torch.autograd.Function):
    """Outside the op and taken only for gradients: registered with the op it would cost every call 5 us."""

    @staticmethod
    def forward(ctx, weights: Tensor | None, factors: list[int], bilinear: bool, *inputs: Tensor) -> Tensor:
        out = _fwd(list(inputs), weights, factors, bilinear)
        ctx.factors, ctx.bilinear = factors, bilinear
        ctx.save_for_backward(out, weights, *([] if weights is None else inputs))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        out, weights, *inputs = ctx.saved_tensors
        # While the gradient's own graph is recorded, autograd must see what it is made of.
        run = _reference_backward if torch.is_grad_enabled() else _bwd
        if weights is None:  # inputs of one factor have one gradient
            distinct = list(dict.fromkeys(ctx.factors))
            grads = dict(zip(distinct, run(grad, out, [], None, distinct, ctx.bilinear), strict=True))
            return None, None, None, *[grads[f] for f in ctx.factors]
        *grads, weight_grads = run(grad, out, inputs, weights, ctx.factors, ctx.bilinear)
        return weight_grads, None, None, *grads


_ext.library.define("ram_sum_fwd(Tensor[] inputs, Tensor? weights, int[] factors, bool bilinear) -> Tensor")
_ext.implement("ram_sum_fwd", _fwd_any)
torch.library.register_fake("hrpose::ram_sum_fwd", _fwd_fake, lib=_ext.library)
_ext.library.define(
    "ram_sum_bwd(Tensor grad, Tensor out, Tensor[] inputs, Tensor? weights, int[] factors, bool bilinear) -> Tensor[]"
)
_ext.implement("ram_sum_bwd", _bwd_any)
torch.library.register_fake("hrpose::ram_sum_bwd", _bwd_fake, lib=_ext.library)
_fwd, _bwd = torch.ops.hrpose.ram_sum_fwd.default, torch.ops.hrpose.ram_sum_bwd.default
