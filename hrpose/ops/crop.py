"""Affine crops of an image to the network's input, normalised in the same pass."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hrpose.errors import InputError
from hrpose.ops import _ext

WHERE = "crop"
MAX_IMAGE_SIDE = 1 << 20  # the kernel's clamped fixed-point coordinates still end outside such an image
MAX_SIDE = 1 << 14
MAX_STRIDE = 1 << 31
MAX_VALUES = 1 << 31  # 8 GiB of float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("exact", "opencv4")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Up to this many output pixels (two crops of 192 x 256) waking other threads costs more than it saves.
PARALLEL_ABOVE = 1 << 17


def crop(
    image: Tensor,
    transforms: Tensor,
    size: tuple[int, int],
    mode: str = "exact",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: Tensor | None = None,
    mirror: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Bilinear affine crops of one image, zero outside it, ready for the network.

        (sx, sy) = inverse(transforms[n]) (x, y);   v = bilinear image at (sx, sy), a neighbour outside counting as 0
        out[n, c, y, x] = v                         without mean and std: 0..255
                        = (v / 255 - mean_c) / std_c

    Args:
        image: (H, W, 3) uint8, any strides, sides 1..2^20. Channels keep their order. A part of a picture and the first
            three channels of one with four are read where they are, on CPUs; other strides cost a copy.
        transforms: (N, 2, 3) float32 or float64, image px -> crop px, pixel centres at integers, N >= 0; finite and
            invertible.
        size: (width, height) of the crops, 1..16384 each, at most 2^31 values of output.
        mode: "exact": coordinates in double, weights and sums in float32. "opencv4": what cv::warpAffine(INTER_LINEAR)
            of OpenCV 2.4-4.x computes, in steps of 1/32 px and rounded to whole grey levels, which published results
            were made with.
        mean, std: three numbers each, in units of 1 (not 255), std > 0; both or neither.
        out: where to write the crops, of the shape, dtype and memory format they have: their place in a batch, say.
        mirror: append the mirrored copies, crop.flip(3), for the flip test.
        dtype: torch.float32, or torch.bfloat16 or torch.float16, which the float32 values are rounded to.
        memory_format: torch.contiguous_format, or torch.channels_last, which networks prefer.

    Returns: (N, 3, height, width), with `mirror` (2 N, 3, height, width), on the image's device; `out` where given.
    Raises: InputError on a wrong shape, dtype, device, size, mode, normalisation, memory format or `out`, and on a
        transform that is not finite or not invertible, naming its index. On CUDA the latter waits for the result; while
        a CUDA graph is being captured it cannot, and such a crop is NaN.
    Cost: reads at most 12 bytes and writes 12 bytes per pixel of the crops, 6 in the half types, twice that with
        `mirror`, in a kernel on CPUs and CUDA. float16 is made of float32 on the CPU.
    """
    if direct := _ext.direct():
        plain = type(size) is tuple and len(size) == 2 and type(size[0]) is type(size[1]) is int
        if plain and mode in MODES and memory_format in LAYOUTS and (dtype is DTYPES[0] or dtype is DTYPES[1]):
            image = _ext.to_tensor(image, WHERE, "image")
            output = bool(mirror), dtype is DTYPES[1], memory_format is torch.channels_last
            threads = (True, torch.get_num_threads(), PARALLEL_ABOVE)  # True: an `out` with a gradient is refused
            arguments = *size, mode == "opencv4", *_scale_bias(mean, std), out, *output, *threads
            if (crops := direct.crop(image, transforms, *arguments)) is not None:
                return crops
    image, transforms, width, height, scale, bias = _checked(image, transforms, size, mode, mean, std)
    _check_output(transforms.shape[0], width, height, mirror, dtype, memory_format)
    output = bool(mirror), dtype, memory_format == torch.channels_last
    arguments = image, transforms, width, height, mode == "opencv4", scale, bias, *output
    if out is not None:
        shape = (transforms.shape[0] * (2 if mirror else 1), 3, height, width)
        _check_out(out, shape, dtype, memory_format, image.device)
    run = _reference
    if _ext.usable(image, cuda=True):  # and so are the transforms, on the same device
        if _ext.unobserved(image, transforms):
            return _launch(*arguments, out)
        run = torch.ops.hrpose.crop
    return run(*arguments) if out is None else out.copy_(run(*arguments))


def crop_reference(
    image: Tensor,
    transforms: Tensor,
    size: tuple[int, int],
    mode: str = "exact",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mirror: bool = False,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """`crop` in plain PyTorch, on any device with float64; equal to the kernels bit for bit."""
    image, transforms, width, height, scale, bias = _checked(image, transforms, size, mode, mean, std)
    _check_output(transforms.shape[0], width, height, mirror, dtype, memory_format)
    output = bool(mirror), dtype, memory_format == torch.channels_last
    return _reference(image, transforms, width, height, mode == "opencv4", scale, bias, *output)


def _checked(
    image: Tensor,
    transforms: Tensor,
    size: tuple[int, int],
    mode: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[Tensor, Tensor, int, int, Sequence[float], Sequence[float]]:
    """Arguments as the kernel and the reference want them; mean and std as out = v * scale + bias."""
    image = _ext.to_tensor(image, WHERE, "image")
    if image.dtype != torch.uint8:
        raise InputError(f"{WHERE}: image must be uint8, got {image.dtype}")
    shape = image.shape
    if len(shape) != 3 or shape[2] != 3:
        raise InputError(f"{WHERE}: image must be (H, W, 3), got {tuple(shape)}")
    if not (1 <= shape[0] <= MAX_IMAGE_SIDE and 1 <= shape[1] <= MAX_IMAGE_SIDE):
        raise InputError(f"{WHERE}: image must have sides of 1..{MAX_IMAGE_SIDE} px, got {tuple(shape[:2])}")
    transforms = _ext.to_tensor(transforms, WHERE, "transforms", image)
    transforms = transforms.detach() if transforms.requires_grad else transforms
    shape = transforms.shape
    if len(shape) != 3 or shape[1] != 2 or shape[2] != 3:
        raise InputError(f"{WHERE}: transforms must be (N, 2, 3), got {tuple(shape)}")
    if transforms.dtype not in (torch.float32, torch.float64) or transforms.device != image.device:
        raise InputError(
            f"{WHERE}: transforms must be float32 or float64 on {image.device}, "
            f"got {transforms.dtype} on {transforms.device}"
        )
    try:
        width, height = map(int, size)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{WHERE}: size must be (width, height), got {size!r}") from error
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise InputError(f"{WHERE}: size must be (width, height) of 1..{MAX_SIDE} px each, got {size!r}")
    if mode not in MODES:
        raise InputError(f"{WHERE}: mode must be 'exact' or 'opencv4', got {mode!r}")
    return image, transforms, width, height, *_scale_bias(mean, std)


def _check_out(
    out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> None:
    valid = isinstance(out, Tensor) and out.shape == shape and out.dtype == dtype and out.device == device
    if not valid or not out.is_contiguous(memory_format=memory_format) or out.requires_grad:
        got = f"{tuple(out.shape)} {out.dtype} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
        kind = "contiguous" if memory_format == torch.contiguous_format else "channels_last"
        wanted = f"a {kind} {shape} {str(dtype).removeprefix('torch.')} on {device}"
        raise InputError(f"{WHERE}: out must be {wanted} without gradient, got {got}")


def _check_output(
    n: int, width: int, height: int, mirror: bool, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    if n * (6 if mirror else 3) * width * height > MAX_VALUES:
        raise InputError(
            f"{WHERE}: transforms must be few enough for {MAX_VALUES} output values, "
            f"got {n} crops of {width} x {height}{' and their copies' * bool(mirror)}; crop in batches"
        )
    if dtype not in DTYPES:
        raise InputError(f"{WHERE}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if memory_format not in LAYOUTS:
        raise InputError(f"{WHERE}: memory_format must be one of {', '.join(map(str, LAYOUTS))}, got {memory_format}")


def _scale_bias(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Sequence[float], Sequence[float]]:
    if mean is None and std is None:
        return (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    if mean is None or std is None:
        raise InputError(f"{WHERE}: mean and std must be given together, got mean={mean!r}, std={std!r}")
    try:
        means, stds = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError) as error:
        raise InputError(f"{WHERE}: mean and std must be three numbers each, got {mean!r}, {std!r}") from error
    # The compiler traces into the function; to the cache it objects.
    return (_folded if torch.compiler.is_compiling() else _cached_folded)(means, stds)


def _folded(means: tuple[float, ...], stds: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(v / 255 - mean) / std as v * scale + bias."""
    if len(means) != 3 or len(stds) != 3 or not all(map(math.isfinite, means + stds)) or min(stds) <= 0:
        raise InputError(
            f"{WHERE}: mean and std must be three finite numbers each, std > 0, got {list(means)}, {list(stds)}"
        )
    scale, bias = tuple([1 / (255 * s) for s in stds]), tuple([-m / s for m, s in zip(means, stds, strict=True)])
    if max(map(abs, scale + bias)) > torch.finfo(torch.float32).max:
        raise InputError(f"{WHERE}: 1 / std and mean / std must fit float32, got {list(means)}, {list(stds)}")
    return scale, bias


_cached_folded = functools.lru_cache(_folded)


def _reference(
    image: Tensor, transforms: Tensor, width: int, height: int, opencv4: bool, scale: Sequence[float],
    bias: Sequence[float], mirror: bool = False, dtype: torch.dtype = torch.float32, channels_last: bool = False,
) -> Tensor:  # fmt: skip
    inverse = torch.ops.hrpose.invert_affine(transforms)[..., None, None]  # (N, 2, 3, 1, 1)
    x = torch.arange(width, dtype=torch.float64, device=image.device)
    y = torch.arange(height, dtype=torch.float64, device=image.device)[:, None]
    column, row = inverse[:, :, 0] * x, inverse[:, :, 1] * y + inverse[:, :, 2]  # (N, 2, 1, w), (N, 2, h, 1)
    if opencv4:  # column and row terms are rounded to 1/1024 px, their sum to 1/32; 16 is half a step
        steps = _clamp(_round(column * 1024) + (_round(row * 1024) + 16), 2.0**30).long() >> 5
        corner, fraction = steps >> 5, (steps & 31).float()
    else:
        source = _clamp(column + row, 2.0**30)
        corner = source.floor()
        corner, fraction = corner.long(), (source - corner).float()
    (ix, iy), (fx, fy) = corner.unbind(1), fraction[..., None].unbind(1)  # (N, h, w), (N, h, w, 1)

    (a, b), (c, d) = ([_tap(image, iy + j, ix + i) for i in (0, 1)] for j in (0, 1))
    if opencv4:
        grey = (32 - fy) * ((32 - fx) * a + fx * b) + fy * ((32 - fx) * c + fx * d)
        grey = (grey * (1 / 1024) + 0.5).floor()
    else:
        top, bottom = a + fx * (b - a), c + fx * (d - c)
        grey = top + fy * (bottom - top)
    grey = grey * torch.tensor(scale, device=image.device) + torch.tensor(bias, device=image.device)
    grey = torch.cat((grey, grey.flip(2))) if mirror else grey
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return grey.to(dtype).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def _tap(image: Tensor, iy: Tensor, ix: Tensor) -> Tensor:
    """(N, h, w, 3) float32 values of the pixels, 0 outside the image."""
    h, w = image.shape[:2]
    inside = (ix >= 0) & (ix < w) & (iy >= 0) & (iy < h)
    return image[iy.clamp(0, h - 1), ix.clamp(0, w - 1)].float() * inside[..., None]


def _clamp(value: Tensor, limit: float) -> Tensor:
    """Within +-limit, NaN at its lower end: what comes out fits an integer and, beyond every image, is outside."""
    return torch.where(value > -limit, value, -limit).clamp(max=limit)


def _round(value: Tensor) -> Tensor:
    return _clamp(value, 2.0**50).round()  # half to even, like cvRound


def _invert_affine(transforms: Tensor) -> Tensor:
    """(N, 2, 3) float64 inverses, in the operation order of OpenCV.

    An op of its own, opaque to the compiler: it refuses by value what cannot be inverted, and a fused multiply-add
    would change the last bit.
    """
    (a, b, tx), (c, d, ty) = (row.unbind(1) for row in transforms.double().unbind(1))
    det = a * d - b * c
    scale = 1.0 / det
    ia, ib, ic, id_ = d * scale, b * -scale, c * -scale, a * scale
    inverse = torch.stack((ia, ib, -ia * tx - ib * ty, ic, id_, -ic * tx - id_ * ty), dim=1).reshape(-1, 2, 3)
    good = (det != 0) & torch.isfinite(transforms).flatten(1).all(1) & torch.isfinite(inverse).flatten(1).all(1)
    if not bool(good.all()):
        _refuse(transforms, int((~good).nonzero()[0]))
    return inverse


def _refuse(transforms: Tensor, index: int) -> None:
    raise InputError(f"{WHERE}: transforms[{index}] must be finite and invertible, got {transforms[index].tolist()}")


def _crop(
    image: Tensor, transforms: Tensor, width: int, height: int, opencv4: bool, scale: Sequence[float],
    bias: Sequence[float], mirror: bool = False, dtype: torch.dtype = torch.float32, channels_last: bool = False,
) -> Tensor:  # fmt: skip
    # An exported graph may run where there is no kernel.
    run = _launch if _ext.usable(image, transforms, cuda=True) else _reference
    return run(image, transforms, width, height, opencv4, scale, bias, mirror, dtype, channels_last)


_floats = torch.empty(0, dtype=torch.float32)


def _launch(
    image: Tensor, transforms: Tensor, width: int, height: int, opencv4: bool, scale: Sequence[float],
    bias: Sequence[float], mirror: bool = False, dtype: torch.dtype = torch.float32, channels_last: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    on_cpu = image.is_cpu
    if on_cpu and dtype == torch.float16:
        wide = _launch(image, transforms, width, height, opencv4, scale, bias, mirror, torch.float32, channels_last)
        return wide.to(dtype) if out is None else out.copy_(wide)
    if not (on_cpu and _rows_of_pixels(image)):
        image = image.contiguous()
    if transforms.dtype != torch.float64:
        transforms = transforms.double()
    transforms = transforms.contiguous()
    n = transforms.shape[0]
    if out is not None:
        pass
    elif on_cpu and dtype == torch.float32 and not channels_last:
        out = _floats.new_empty(2 * n if mirror else n, 3, height, width)  # naming the dtype takes twice as long
    else:
        out = _crop_fake(image, transforms, width, height, opencv4, scale, bias, mirror, dtype, channels_last)
    rows, columns, _ = image.shape
    sizes, normalise, layout = (rows, columns, n, height, width), (*scale, *bias), (opencv4, mirror, channels_last)
    if on_cpu:
        row, pixel, _ = image.stride()
        addresses = image.data_ptr(), transforms.data_ptr(), out.data_ptr()
        threads = torch.get_num_threads() if n * height * width > PARALLEL_ABOVE else 1
        first_bad = _ext.kernels().crop_fwd(
            *addresses, row, pixel, *sizes, *normalise, *layout, dtype == torch.bfloat16, threads
        )
        if first_bad >= 0:
            _refuse(transforms, first_bad)
        return out
    bad = image.new_empty(n, dtype=torch.bool)
    addresses = [t.data_ptr() for t in (image, transforms, out, bad)]
    with _ext.current_stream(image) as stream:
        _ext.kernels().crop_fwd_cuda(*addresses, *sizes, *normalise, *layout, _ext.CUDA_TYPES[dtype], stream)
        capturing = torch.cuda.is_current_stream_capturing()
    if not capturing and True in (flags := bad.tolist()):
        _refuse(transforms, flags.index(True))
    return out


def _rows_of_pixels(image: Tensor) -> bool:
    """Does the CPU kernel read these strides: pixels of three bytes, or of four of which it takes three?"""
    row, pixel, channel = image.stride()
    return channel == 1 and pixel in (3, 4) and 0 <= row < MAX_STRIDE


def _crop_fake(
    image: Tensor, transforms: Tensor, width: int, height: int, opencv4, scale, bias,
    mirror: bool = False, dtype: torch.dtype = torch.float32, channels_last: bool = False,
) -> Tensor:  # fmt: skip
    n = transforms.shape[0] * (2 if mirror else 1)
    if channels_last:
        return image.new_empty((n, height, width, 3), dtype=dtype).permute(0, 3, 1, 2)
    return image.new_empty((n, 3, height, width), dtype=dtype)


# It waits for the card, which no CUDA graph may; the compiler then leaves it out of its own.
_unsafe = [tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None]  # torch has it since 2.8
_ext.library.define("invert_affine(Tensor transforms) -> Tensor", tags=_unsafe)
_ext.library.impl("invert_affine", _invert_affine, "CompositeExplicitAutograd")
torch.library.register_fake(
    "hrpose::invert_affine", lambda transforms: torch.empty_like(transforms, dtype=torch.float64), lib=_ext.library
)
_ext.library.define(
    "crop(Tensor image, Tensor transforms, int width, int height, bool opencv4, float[] scale, float[] bias,"
    " bool mirror=False, ScalarType dtype=float, bool channels_last=False) -> Tensor"
)
_ext.implement("crop", _crop)
torch.library.register_fake("hrpose::crop", _crop_fake, lib=_ext.library)
