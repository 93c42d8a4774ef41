"""Public ops: each has a plain PyTorch reference beside it and, where it pays, a kernel of ours."""

from hrpose.ops.crop import crop, crop_reference
from hrpose.ops.decode import decode, decode_reference
from hrpose.ops.ram_sum import ram_sum, ram_sum_reference

__all__ = ["crop", "crop_reference", "decode", "decode_reference", "ram_sum", "ram_sum_reference"]
