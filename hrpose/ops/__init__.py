"""Public ops: each has a plain PyTorch reference beside it and, where it pays, a kernel of ours."""

from hrpose.ops.bottlenecks import (
    BottleneckWeights,
    PackedBottlenecks,
    bottlenecks,
    bottlenecks_reference,
    pack_bottlenecks,
)
from hrpose.ops.crop import crop, crop_reference
from hrpose.ops.decode import decode, decode_reference
from hrpose.ops.ram_sum import ram_sum, ram_sum_reference

__all__ = [
    "BottleneckWeights",
    "PackedBottlenecks",
    "bottlenecks",
    "bottlenecks_reference",
    "crop",
    "crop_reference",
    "decode",
    "decode_reference",
    "pack_bottlenecks",
    "ram_sum",
    "ram_sum_reference",
]
