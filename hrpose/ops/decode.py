"""Heatmaps to keypoints: flip merge, arg-max, quarter offset, map to the image."""

import functools
from collections.abc import Sequence

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
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALVES)


def decode(
    heatmaps: Tensor,
    flipped: Tensor | None = None,
    flip_pairs: Sequence[tuple[int, int]] | None = None,
    shift: bool = True,
    refine: str = "quarter",
    transforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keypoints and their scores from heatmaps, as HRNet and Simple Baselines publish it (get_final_preds).

        v[n,k,y,x] = (heatmaps[n,k,y,x] + flipped[n, perm k, y, W-1-max(x-s, 0)]) / 2,  s = 1 with `shift`, else 0
        score      = max v;  (px, py) = its first position, (0, 0) unless score > 0
        quarter:     px += sign(v[py,px+1] - v[py,px-1]) / 4,  py likewise,  if 1 < px < W-1 and 1 < py < H-1
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
        refine: "quarter" or "none".
        transforms: (N, 2, 3) float32 or float64, heatmap px -> image px; computed in double. None keeps heatmap px.
            Not checked for NaN: a transform with NaN gives keypoints with NaN.

    Returns: keypoints (N, K, 2) float32 x, y, pixel centres at integers; scores (N, K) float32. A map with a NaN in it
        (after merging) gives NaN for all three; infinities are ordinary values. Not differentiable: inputs are
        detached.
    Raises: InputError on a wrong shape, dtype, device, flip pair or refine.
    Cost: reads every heatmap value once; 12 bytes out per map.
    """
    heatmaps, flipped, perm, transforms = _checked(heatmaps, flipped, flip_pairs, refine, transforms)
    run = _reference
    if _has_kernel(heatmaps):
        run = _launch if _ext.unobserved(heatmaps, flipped, transforms) else torch.ops.hrpose.decode
    return run(heatmaps, flipped, perm, shift, refine == "quarter", transforms)


def decode_reference(
    heatmaps: Tensor,
    flipped: Tensor | None = None,
    flip_pairs: Sequence[tuple[int, int]] | None = None,
    shift: bool = True,
    refine: str = "quarter",
    transforms: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode` in plain PyTorch, on any device; equal to the kernels bit for bit."""
    heatmaps, flipped, perm, transforms = _checked(heatmaps, flipped, flip_pairs, refine, transforms)
    return _reference(heatmaps, flipped, perm, shift, refine == "quarter", transforms)


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
    if len(shape) != 4 or min(shape[1:]) < 1:
        raise InputError(f"{WHERE}: heatmaps must be (N, K, H, W) with K, H, W >= 1, got {tuple(shape)}")
    if refine not in ("quarter", "none"):
        raise InputError(f"{WHERE}: refine must be 'quarter' or 'none', got {refine!r}")

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
        if transforms.ndim != 3 or transforms.shape[0] != shape[0] or transforms.shape[1:] != (2, 3):
            raise InputError(
                f"{WHERE}: transforms must be (N, 2, 3) = ({shape[0]}, 2, 3), got {tuple(transforms.shape)}"
            )
        if transforms.dtype not in (torch.float32, torch.float64) or transforms.device != heatmaps.device:
            raise InputError(
                f"{WHERE}: transforms must be float32 or float64 on {heatmaps.device}, "
                f"got {transforms.dtype} on {transforms.device}"
            )
    return heatmaps, flipped, perm, transforms


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
    heatmaps: Tensor, flipped: Tensor | None, perm: Sequence[int], shift: bool, quarter: bool, transforms: Tensor | None
) -> tuple[Tensor, Tensor]:
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
    keypoints = torch.stack((x, y), dim=2)
    if transforms is not None:
        row_x, row_y = transforms.double()[:, :, None].unbind(1)
        keypoints = torch.stack([t[..., 0] * x + t[..., 1] * y + t[..., 2] for t in (row_x, row_y)], dim=2)
    nan = flat.isnan().any(2)
    return keypoints.float().masked_fill(nan[..., None], torch.nan), score.float().masked_fill(nan, torch.nan)


def _quarter_step(low: Tensor, high: Tensor) -> Tensor:
    return (0.25 * ((high > low).double() - (high < low).double())).squeeze(2)


def _decode(
    heatmaps: Tensor, flipped: Tensor | None, perm: Sequence[int], shift: bool, quarter: bool, transforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    # An exported graph may run where there is no kernel.
    run = _launch if _has_kernel(heatmaps) else _reference
    return run(heatmaps, flipped, perm, shift, quarter, transforms)


def _launch(
    heatmaps: Tensor, flipped: Tensor | None, perm: Sequence[int], shift: bool, quarter: bool, transforms: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, k, h, w = heatmaps.shape
    if h * w > MAX_MAP or (heatmaps.is_cuda and (n * k > MAX_MAPS or k > MAX_JOINTS)):
        return _reference(heatmaps, flipped, perm, shift, quarter, transforms)
    if heatmaps.dtype != torch.float32 and heatmaps.is_cpu:
        heatmaps, flipped = _wide(heatmaps), _wide(flipped)
    heatmaps = heatmaps.contiguous()
    mirrors = affines = 0  # null pointers
    if flipped is not None:
        flipped = flipped.contiguous()
        mirrors = flipped.data_ptr()
    if transforms is not None:
        transforms = transforms.double().contiguous()
        affines = transforms.data_ptr()
    keypoints = heatmaps.new_empty((n, k, 2), dtype=torch.float32)
    scores = heatmaps.new_empty((n, k), dtype=torch.float32)
    maps, results = heatmaps.data_ptr(), (keypoints.data_ptr(), scores.data_ptr())
    if heatmaps.is_cpu:
        permutation = None if flipped is None else _int32(tuple(perm))
        joints = 0 if permutation is None else permutation.data_ptr()
        threads = torch.get_num_threads() if n * k * h * w > PARALLEL_ABOVE else 1
        _ext.kernels().decode_fwd(maps, mirrors, joints, affines, *results, n, k, h, w, shift, quarter, threads)
    else:
        kind = _ext.CUDA_TYPES[heatmaps.dtype]
        with _ext.current_stream(heatmaps) as stream:
            _ext.kernels().decode_fwd_cuda(
                maps, mirrors, list(perm), affines, *results, n, k, h, w, shift, quarter, kind, stream
            )
    return keypoints, scores


def _decode_fake(heatmaps: Tensor, flipped, perm, shift, quarter, transforms) -> tuple[Tensor, Tensor]:
    n, k = heatmaps.shape[:2]
    return heatmaps.new_empty(n, k, 2, dtype=torch.float32), heatmaps.new_empty(n, k, dtype=torch.float32)


_ext.library.define(
    "decode(Tensor heatmaps, Tensor? flipped, int[] perm, bool shift, bool quarter, Tensor? transforms)"
    " -> (Tensor, Tensor)"
)
_ext.implement("decode", _decode)
torch.library.register_fake("hrpose::decode", _decode_fake, lib=_ext.library)
