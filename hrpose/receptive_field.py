"""Receptive fields of stacked convolutions: equations 1 to 6 of the DPN paper, and the test for gaps ("gridding").

Sizes are in pixels of the stack's input along one axis; a stack starts with receptive field 1 and jump 1.
"""

from collections.abc import Sequence

from hrpose.errors import check


def normal(rf: int, kernel: int = 3) -> int:
    """RF_{n+1} = RF_n + k - 1: one more convolution of stride and dilation 1. [eq. 1]"""
    return dilated(rf, 1, kernel)


def dilated(rf: int, dilation: int, kernel: int = 3) -> int:
    """RF_{n+1} = RF_n + (k - 1) d_{n+1}: one more convolution of dilation d. [eq. 2]"""
    return rf + (kernel - 1) * dilation


def strided(rf: int, jump: int, stride: int, kernel: int = 3) -> tuple[int, int]:
    """One more convolution or pooling of stride s, after layers whose strides multiply to the jump j_n.

        RF_{n+1} = RF_n + (k - 1) j_n                                                                    [eq. 3]
        j_{n+1}  = j_n s_{n+1}                                                                           [eq. 4]

    Returns: RF_{n+1}, j_{n+1}.
    """
    return rf + (kernel - 1) * jump, jump * stride


def pyramid(n: int, kernel: int = 3) -> int:
    """RF_total = (k - 1)(2^N - 1) + 1 of the N layers of eq. 5, whose dilations are d_i = 2^(N-i). [eq. 6]"""
    return (kernel - 1) * (2**n - 1) + 1


def reachable_offsets(dilations: Sequence[int], kernel: int = 3) -> list[int]:
    """Offsets, ascending, of the input pixels that one output pixel of a stack of dilated convolutions depends on.

    An offset is a sum of t_i d_i with one tap t_i in -(k-1)/2 .. (k-1)/2 per layer.

    Raises: InputError for an even kernel or a dilation below 1.
    """
    check(kernel >= 1 and kernel % 2 == 1, "reachable_offsets", f"kernel must be odd and >= 1, got {kernel}")
    check(all(d >= 1 for d in dilations), "reachable_offsets", f"dilations must be >= 1, got {list(dilations)}")
    reach = kernel // 2
    offsets = {0}
    for dilation in dilations:
        offsets = {offset + tap * dilation for offset in offsets for tap in range(-reach, reach + 1)}
    return sorted(offsets)


def is_complete(dilations: Sequence[int], kernel: int = 3) -> bool:
    """Whether every pixel inside the receptive field contributes; False is the gridding issue of section III-A.

    Raises: InputError as `reachable_offsets`.
    """
    offsets = reachable_offsets(dilations, kernel)
    return len(offsets) == offsets[-1] - offsets[0] + 1
