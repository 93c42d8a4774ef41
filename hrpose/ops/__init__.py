"""Public ops: each has a plain PyTorch reference beside it and, where it pays, a kernel of ours."""

from hrpose.ops.crop import crop, crop_reference
from hrpose.ops.decode import decode, decode_reference

__all__ = ["crop", "crop_reference", "decode", "decode_reference"]
