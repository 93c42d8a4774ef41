"""The maps that ops on convolutions read and write: what they must be, new ones, and which of them have a kernel."""

import torch
from torch import Tensor

from hrpose.errors import check
from hrpose.ops import _ext

# Below this many multiplications, waking other threads costs more than it saves.
PARALLEL_ABOVE = 2_000_000


def kernel_takes(x: Tensor) -> bool:
    """Is there a CPU kernel of convolutions for maps of this device and dtype?"""
    if not _ext.usable(x):
        return False
    if x.dtype != torch.bfloat16:
        return x.dtype == torch.float32
    # A compiler cannot see into the native module; the op, which it does not see into either, asks again when it runs.
    return torch.compiler.is_compiling() or _ext.kernels().bf16()


def checked_maps(x: Tensor, channels: int, weights: Tensor, where: str, name: str = "x") -> Tensor:
    """x as a tensor. Raises: InputError unless it is (N, channels, H, W), H, W >= 1, of the dtype and on the device of
    the weights."""
    x = _ext.to_tensor(x, where, name, weights)
    shape = x.shape
    if len(shape) != 4 or shape[1] != channels or shape[2] < 1 or shape[3] < 1:
        check(False, where, f"{name} must be (N, {channels}, H, W) with H, W >= 1, got {tuple(shape)}")
    if x.dtype != weights.dtype or x.device != weights.device:
        kind, got = (f"{t.dtype} on {t.device}" for t in (weights, x))
        check(False, where, f"{name} must be {kind} like the packed weights, got {got}")
    return x


def strided_sizes(x: Tensor, stride: int) -> tuple[int, int]:
    """ceil(H / stride), ceil(W / stride) of maps (N, C, H, W)."""
    _, _, h, w = x.shape
    return (h, w) if stride == 1 else (1 + (h - 1) // stride, 1 + (w - 1) // stride)


def new_maps(x: Tensor, channels: int, h: int, w: int) -> Tensor:
    """Uninitialised (N, channels, h, w), channels_last, with the N, dtype and device of x."""
    return x.new_empty_strided((x.shape[0], channels, h, w), (h * w * channels, 1, w * channels, channels))
