"""Public ops: each has a plain PyTorch reference beside it and, where it pays, a kernel of ours."""

from hrpose.ops.basic_blocks import PackedBasicBlocks, basic_blocks, basic_blocks_reference, pack_basic_blocks
from hrpose.ops.bottlenecks import (
    BottleneckWeights,
    PackedBottlenecks,
    bottlenecks,
    bottlenecks_reference,
    pack_bottlenecks,
)
from hrpose.ops.conv import PackedConv, conv, conv_reference, pack_conv
from hrpose.ops.crop import crop, crop_reference
from hrpose.ops.decode import decode, decode_reference
from hrpose.ops.ram_sum import ram_sum, ram_sum_reference
from hrpose.ops.stem import PackedStem, pack_stem, stem, stem_reference

__all__ = [
    "BottleneckWeights",
    "PackedBasicBlocks",
    "PackedBottlenecks",
    "PackedConv",
    "PackedStem",
    "basic_blocks",
    "basic_blocks_reference",
    "bottlenecks",
    "bottlenecks_reference",
    "conv",
    "conv_reference",
    "crop",
    "crop_reference",
    "decode",
    "decode_reference",
    "pack_basic_blocks",
    "pack_bottlenecks",
    "pack_conv",
    "pack_stem",
    "ram_sum",
    "ram_sum_reference",
    "stem",
    "stem_reference",
]
