"""Heatmaps to keypoints: flip merge, arg-max, quarter offset or DARK, map to the image."""

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hrpose.errors import InputError
from hrpose.ops import _ext

WHERE = "decode"
# Below this many heatmap values (64 images of 17 x 64 x 48) waking other threads costs more than it saves.
PARALLEL_ABOVE = 64 * 17 * 64 * 48
MAX_MAP = 1 << 30  # the kernels count the values of a map in int32
MAX_MAPS = 1 << 30  # blocks of a CUDA grid
MAX_JOINTS = 256  # kMaxJoints in csrc/cuda/kernels.h
REFINEMENTS = ("quarter", "dark", "none")
MAX_BLUR = 27  # kMaxBlur in csrc/{cpu,cuda}/kernels.h
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALVES)


def decode(
    heatmaps: Tensor,
    flipped: Tensor | None = None,
    flip_pairs: Sequence[tuple[int, int]] | None = None,
    shift: bool = True,
    refine: str = "quarter",
    transforms: Tensor | None = None,
    blur: int = 11,
) -> tuple[Tensor, Tensor]:
    """Keypoints and their scores from heatmaps, as HRNet, Simple Baselines and DARK publish it (get_final_preds).

        v[n,k,y,x] = (heatmaps[n,k,y,x] + flipped[n, perm k, y, W-1-max(x-s, 0)]) / 2,  s = 1 with `shift`, else 0
        score      = max v;  (px, py) = its first position, (0, 0) unless score > 0
        quarter:     px += sign(v[py,px+1] - v[py,px-1]) / 4,  py likewise,  if 1 < px < W-1 and 1 < py < H-1
        dark:        (px, py) -= H^-1 g,  if 1 < px < W-2 and 1 < py < H-2 and det H is finite and not 0;  g, H: the
                     differences of log max(G * v, 1e-10) around (px, py) that stand for its derivatives
        keypoint   = transforms[n] @ (px, py, 1)

    Args:
        heatmaps: (N, K, H, W) floating point, N >= 0, others >= 1. float32 is decoded by a kernel on CPUs and CUDA, so
            are float16 and bfloat16, as what they are in float32; float64 runs the reference in float64.
        flipped: the same shape and dtype: maps of the mirrored input as the network emitted them, neither mirrored back
            nor with joints swapped.
        flip_pairs: (left, right) joint indices that trade places in the mirror; required with `flipped` ([] for none),
            unused without.
        shift: move the mirrored-back maps one column to the right, column 0 staying, because a strided grid is not
            symmetric (SHIFT_HEATMAP). Without `flipped` it does nothing.
        refine: "quarter", "none", or "dark": a step to the maximum of the Gaussian that a heatmap is near its peak
            (Distribution-Aware coordinate Representation of Keypoints, Zhang et al. 2020). The step is not bounded.
        transforms: (N, 2, 3) float32 or float64, heatmap px -> image px; computed in double. None keeps heatmap px.
            Not checked for NaN: a transform with NaN gives keypoints with NaN.
        blur: for "dark", the side of the Gaussian G in heatmap px, odd, 3..27: 11 for networks trained with targets of
            sigma 2, 17 for sigma 3. Its own sigma is OpenCV's for that side, 2 or 2.9.

    Returns: keypoints (N, K, 2) float32 x, y, pixel centres at integers; scores (N, K) float32. A map with a NaN in it
        (after merging) gives NaN for all three; infinities are ordinary values. Not differentiable: inputs are
        detached.
    Raises: InputError on a wrong shape, dtype, device, flip pair, refine or blur.
    Cost: reads every heatmap value once; 12 bytes out per map. "dark" blurs 5 x 5 pixels of each map, not all.
    """
    if direct := _ext.direct():
        found = _directly(direct, heatmaps, flipped, flip_pairs, shift, refine, transforms, blur)
        if found is not None:
            return found
    heatmaps, flipped, perm, transforms = _checked(heatmaps, flipped, flip_pairs, refine, transforms)
    taps = _taps(refine, blur)
    run = _reference
    if _has_kernel(heatmaps):
        run = _launch if _ext.unobserved(heatmaps, flipped, transforms) else torch.ops.hrpose.decode
    return run(heatmaps, flipped, perm, shift, refine == "quarter", transforms, taps)


def _directly(
    direct: ModuleType, heatmaps: Tensor, flipped: Tensor | None, flip_pairs: Sequence[tuple[int, int]] | None,
    shift: bool, refine: str, transforms: Tensor | None, blur: int,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The result, None where the plain case is not given."""
    permutation = gaussian = None
    if flipped is not None:
        if type(flip_pairs) is not tuple or type(heatmaps) is not Tensor or heatmaps.dim() != 4:
            return None
        try:
            permutation = _int32(_cached_permutation(flip_pairs, heatmaps.shape[1]))
        except (TypeError, ValueError):  # worded elsewhere
            return None
    if refine == "dark" and type(blur) is int and 3 <= blur <= MAX_BLUR and blur % 2:
        gaussian = _gaussian_tensor(blur)
    elif refine != "quarter" and refine != "none":
        return None
    mode = (False, torch.get_num_threads(), PARALLEL_ABOVE)
    tensors = (heatmaps, flipped, permutation, transforms)
    return direct.decode(*tensors, bool(shift), refine == "quarter", gaussian, *mode)


def decode_reference(
    heatmaps: Tensor,
    flipped: Tensor | None = None,
    flip_pairs: Sequence[tuple[int, int]] | None = None,
    shift: bool = True,
    refine: str = "quarter",
    transforms: Tensor | None = None,
    blur: int = 11,
) -> tuple[Tensor, Tensor]:
    """`decode` in plain PyTorch, on any device; equal to the kernels bit for bit, "dark" as far as their logarithms in
    double are."""
    heatmaps, flipped, perm, transforms = _checked(heatmaps, flipped, flip_pairs, refine, transforms)
    return _reference(heatmaps, flipped, perm, shift, refine == "quarter", transforms, _taps(refine, blur))


def _checked(
    heatmaps: Tensor,
    flipped: Tensor | None,
    flip_pairs: Sequence[tuple[int, int]] | None,
    refine: str,
    transforms: Tensor | None,
) -> tuple[Tensor, Tensor | None, Sequence[int], Tensor | None]:
    """Arguments as the kernels and the reference want them: detached, pairs as a permutation."""
    heatmaps = _detached(heatmaps, "heatmaps")
    if heatmaps.dtype not in DTYPES:
        raise InputError(f"{WHERE}: heatmaps must be floating point, got {heatmaps.dtype}")
    shape = heatmaps.shape
    if len(shape) != 4 or not (shape[1] and shape[2] and shape[3]):
        raise InputError(f"{WHERE}: heatmaps must be (N, K, H, W) with K, H, W >= 1, got {tuple(shape)}")
    if refine not in REFINEMENTS:
        raise InputError(f"{WHERE}: refine must be 'quarter', 'dark' or 'none', got {refine!r}")

    perm = []
    if flipped is not None:
        flipped = _detached(flipped, "flipped", heatmaps)
        if flipped.shape != shape:
            raise InputError(
                f"{WHERE}: flipped must be of the shape of heatmaps {tuple(shape)}, got {tuple(flipped.shape)}"
            )
        if flipped.dtype != heatmaps.dtype or flipped.device != heatmaps.device:
            raise InputError(
                f"{WHERE}: flipped must be {heatmaps.dtype} on {heatmaps.device} like heatmaps, "
                f"got {flipped.dtype} on {flipped.device}"
            )
        if flip_pairs is None:
            raise InputError(f"{WHERE}: flip_pairs must be given with flipped ([] if no joints trade places), got None")
        perm = _permutation(flip_pairs, shape[1])
    if transforms is not None:
        transforms = _detached(transforms, "transforms", heatmaps)
        if transforms.shape != (shape[0], 2, 3):
            raise InputError(
                f"{WHERE}: transforms must be (N, 2, 3) = ({shape[0]}, 2, 3), got {tuple(transforms.shape)}"
            )
        if transforms.dtype not in (torch.float32, torch.float64) or transforms.device != heatmaps.device:
            raise InputError(
                f"{WHERE}: transforms must be float32 or float64 on {heatmaps.device}, "
                f"got {transforms.dtype} on {transforms.device}"
            )
    return heatmaps, flipped, perm, transforms


def check_blur(blur: int, where: str) -> None:
    """Raise an InputError unless `blur` is a side that DARK's Gaussian can have."""
    if not isinstance(blur, int) or isinstance(blur, bool) or not 3 <= blur <= MAX_BLUR or blur % 2 == 0:
        raise InputError(f"{where}: blur must be an odd integer, 3..{MAX_BLUR}, got {blur!r}")


def _taps(refine: str, blur: int) -> int:
    """How many taps DARK's Gaussian has, 0 for another refinement."""
    if refine != "dark":
        return 0
    check_blur(blur, WHERE)
    return blur


def _gaussian(taps: int) -> list[float]:
    """As cv2.getGaussianKernel(taps, 0) makes it."""
    sigma = 0.3 * ((taps - 1) / 2 - 1) + 0.8
    values = [math.exp(-((i - taps // 2) ** 2) / (2 * sigma**2)) for i in range(taps)]
    return [value / sum(values) for value in values]


@functools.lru_cache
def _gaussian_tensor(taps: int) -> Tensor:
    return torch.tensor(_gaussian(taps), dtype=torch.float64)


def _wide(tensor: Tensor | None) -> Tensor | None:
    return tensor.float() if tensor is not None and tensor.dtype in HALVES else tensor


def _has_kernel(heatmaps: Tensor) -> bool:
    return heatmaps.dtype != torch.float64 and _ext.usable(heatmaps, cuda=True)


def _detached(value: object, name: str, like: Tensor | None = None) -> Tensor:
    tensor = _ext.to_tensor(value, WHERE, name, like)
    return tensor.detach() if tensor.requires_grad else tensor


def _permutation(flip_pairs: Sequence[tuple[int, int]], joints: int) -> Sequence[int]:
    if type(flip_pairs) is tuple and not torch.compiler.is_compiling():  # the compiler objects to caches
        try:
            return _cached_permutation(flip_pairs, joints)
        except (TypeError, ValueError):
            pass  # anything but plain integers, or an error that is worded below
    try:
        pairs = [(int(left), int(right)) for left, right in flip_pairs]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{WHERE}: flip_pairs must be pairs of joint indices, got {flip_pairs!r}") from error
    return _swapped(pairs, joints)


@functools.lru_cache
def _cached_permutation(flip_pairs: tuple[tuple[int, int], ...], joints: int) -> tuple[int, ...]:
    if not all(type(joint) is int for pair in flip_pairs for joint in pair):
        raise TypeError  # it might change behind the cache's back
    return tuple(_swapped(flip_pairs, joints))


def _swapped(pairs: Sequence[tuple[int, int]], joints: int) -> list[int]:
    perm, seen = list(range(joints)), set()
    for left, right in pairs:
        if not (0 <= left < joints and 0 <= right < joints):
            raise InputError(f"{WHERE}: flip_pairs must be joint indices in 0..{joints - 1}, got ({left}, {right})")
        if left == right or left in seen or right in seen:
            raise InputError(f"{WHERE}: flip_pairs must name each joint at most once, got ({left}, {right}) in {pairs}")
        seen.update((left, right))
        perm[left], perm[right] = right, left
    return perm


@functools.lru_cache
def _int32(perm: tuple[int, ...]) -> Tensor:
    return torch.tensor(perm, dtype=torch.int32)


def _reference(
    heatmaps: Tensor, flipped: Tensor | None, perm: Sequence[int], shift: bool, quarter: bool,
    transforms: Tensor | None, taps: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heatmaps, flipped = _wide(heatmaps), _wide(flipped)
    n, k, h, w = heatmaps.shape
    if flipped is not None:
        mirrored = flipped[:, list(perm)].flip(3)
        if shift:
            mirrored = torch.cat((mirrored[..., :1], mirrored[..., : w - 1]), dim=3)
        heatmaps = (heatmaps + mirrored) * 0.5
    flat = heatmaps.reshape(n, k, h * w)
    index = flat.argmax(2, keepdim=True)
    score = flat.gather(2, index).squeeze(2)
    index = index.squeeze(2) * (score > 0)
    px, py = index % w, index // w
    x, y = px.double(), py.double()
    if quarter and min(h, w) > 3:
        inside = (px > 1) & (px < w - 1) & (py > 1) & (py < h - 1)
        # Outside, any index that exists will do; comparing instead of subtracting keeps inf - inf out.
        around = (index * inside + (w + 1) * ~inside).unsqueeze(2)
        x = x + _quarter_step(flat.gather(2, around - 1), flat.gather(2, around + 1)) * inside
        y = y + _quarter_step(flat.gather(2, around - w), flat.gather(2, around + w)) * inside
    if taps:
        step_x, step_y = _taylor_step(heatmaps, px, py, taps)
        x, y = x - step_x, y - step_y
    keypoints = torch.stack((x, y), dim=2)
    if transforms is not None:
        row_x, row_y = transforms.double()[:, :, None].unbind(1)
        keypoints = torch.stack([t[..., 0] * x + t[..., 1] * y + t[..., 2] for t in (row_x, row_y)], dim=2)
    nan = flat.isnan().any(2)
    return keypoints.float().masked_fill(nan[..., None], torch.nan), score.float().masked_fill(nan, torch.nan)


def _quarter_step(low: Tensor, high: Tensor) -> Tensor:
    return (0.25 * ((high > low).double() - (high < low).double())).squeeze(2)


def _taylor_step(maps: Tensor, px: Tensor, py: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """DARK's H^-1 g in x and in y, float64; 0 where no step is taken.

    The original scales the blurred map back to the maximum it had before. That multiplies it by a constant, which the
    differences of logarithms do not see; so it is left out, and only the pixels around the peak are blurred. The two
    differ only where a blurred value within two pixels of the peak is below 1e-10, which takes negative values there
    (or a peak below 1e-8): the logarithm of the floor then stands as far below the others' as that constant says.
    """
    h, w = maps.shape[2:]
    reach = taps // 2 + 2  # the differences span two pixels to each side, and the blur of these its own half more
    offsets = torch.arange(-reach, reach + 1, device=maps.device)
    columns, rows = px[..., None, None] + offsets, py[..., None, None] + offsets[:, None]
    inside = (columns >= 0) & (columns < w) & (rows >= 0) & (rows < h)
    index = rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)
    values = maps.flatten(2).gather(2, index.flatten(2)).unflatten(2, index.shape[2:])
    values = values.double().masked_fill(~inside, 0)
    across = sum(tap * values[..., i : i + 5] for i, tap in enumerate(_gaussian(taps)))
    blurred = sum(tap * across[..., i : i + 5, :] for i, tap in enumerate(_gaussian(taps)))
    level = blurred.clamp(min=1e-10).log()

    def at(j: int, i: int) -> Tensor:  # of pixel (px + i, py + j)
        return level[..., 2 + j, 2 + i]

    gx, gy = (at(0, 1) - at(0, -1)) / 2, (at(1, 0) - at(-1, 0)) / 2
    hxx, hyy = (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4, (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4
    hxy = (at(1, 1) - at(-1, 1) - at(1, -1) + at(-1, -1)) / 4
    det = hxx * hyy - hxy * hxy
    taken = (px > 1) & (px < w - 2) & (py > 1) & (py < h - 2) & (det != 0) & det.isfinite()
    det = torch.where(taken, det, torch.inf)
    steps = (hyy * gx - hxy * gy) / det, (hxx * gy - hxy * gx) / det
    return torch.where(taken, steps[0], 0), torch.where(taken, steps[1], 0)


def _decode(
    heatmaps: Tensor, flipped: Tensor | None, perm: Sequence[int], shift: bool, quarter: bool,
    transforms: Tensor | None, taps: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # An exported graph may run where there is no kernel.
    run = _launch if _has_kernel(heatmaps) else _reference
    return run(heatmaps, flipped, perm, shift, quarter, transforms, taps)


def _launch(
    heatmaps: Tensor, flipped: Tensor | None, perm: Sequence[int], shift: bool, quarter: bool,
    transforms: Tensor | None, taps: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, k, h, w = heatmaps.shape
    on_cpu, narrow = heatmaps.is_cpu, heatmaps.dtype != torch.float32
    if h * w > MAX_MAP or (not on_cpu and (n * k > MAX_MAPS or k > MAX_JOINTS)):
        return _reference(heatmaps, flipped, perm, shift, quarter, transforms, taps)
    if on_cpu and narrow:
        heatmaps, flipped, narrow = _wide(heatmaps), _wide(flipped), False
    heatmaps = heatmaps.contiguous()
    mirrors = affines = 0  # null pointers
    if flipped is not None:
        flipped = flipped.contiguous()
        mirrors = flipped.data_ptr()
    if transforms is not None:
        if transforms.dtype != torch.float64:
            transforms = transforms.double()
        transforms = transforms.contiguous()
        affines = transforms.data_ptr()
    like = heatmaps.new_empty(0, dtype=torch.float32) if narrow else heatmaps
    keypoints, scores = like.new_empty(n, k, 2), like.new_empty(n, k)  # naming the dtype would take another 0.5 us
    maps, results = heatmaps.data_ptr(), (keypoints.data_ptr(), scores.data_ptr())
    if on_cpu:
        permutation = None if flipped is None else _int32(tuple(perm))
        joints = 0 if permutation is None else permutation.data_ptr()
        threads = torch.get_num_threads() if n * k * h * w > PARALLEL_ABOVE else 1
        gaussian = _gaussian_tensor(taps).data_ptr() if taps else 0
        sizes = (n, k, h, w, shift, quarter, gaussian, taps)
        _ext.kernels().decode_fwd(maps, mirrors, joints, affines, *results, *sizes, threads)
    else:
        gaussian = _gaussian(taps) if taps else []
        sizes = (n, k, h, w, shift, quarter, gaussian, _ext.CUDA_TYPES[heatmaps.dtype])
        with _ext.current_stream(heatmaps) as stream:
            _ext.kernels().decode_fwd_cuda(maps, mirrors, list(perm), affines, *results, *sizes, stream)
    return keypoints, scores


def _decode_fake(heatmaps: Tensor, flipped, perm, shift, quarter, transforms, taps=0) -> tuple[Tensor, Tensor]:
    n, k = heatmaps.shape[:2]
    return heatmaps.new_empty(n, k, 2, dtype=torch.float32), heatmaps.new_empty(n, k, dtype=torch.float32)


_ext.library.define(
    "decode(Tensor heatmaps, Tensor? flipped, int[] perm, bool shift, bool quarter, Tensor? transforms, int taps=0)"
    " -> (Tensor, Tensor)"
)
_ext.implement("decode", _decode)
torch.library.register_fake("hrpose::decode", _decode_fake, lib=_ext.library)
