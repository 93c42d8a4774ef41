"""Layers for inference: batch norm folded into weights that are packed for the fused ops, one module per op."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.errors import InputError, check
from hrpose.models.blocks import BasicBlock, Bottleneck
from hrpose.models.fold import folded
from hrpose.ops.basic_blocks import PackedBasicBlocks, basic_blocks, pack_basic_blocks
from hrpose.ops.bottlenecks import BottleneckWeights, PackedBottlenecks, bottlenecks, pack_bottlenecks
from hrpose.ops.conv import PackedConv, conv, pack_conv
from hrpose.ops.panels import MULTIPLE
from hrpose.ops.stem import KERNELS, PackedStem, pack_stem, stem


class Fused(nn.Module):
    """Packed weights of an op, its tensors as buffers; no parameters. To change their dtype, build it anew."""

    packed: tuple[str, ...] = ("panels",)  # the buffers that the kernel reads most of

    def __init__(self, packed: PackedBasicBlocks | PackedBottlenecks | PackedConv | PackedStem):
        super().__init__()
        self.fields = packed._fields
        for name, value in packed._asdict().items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.dtype = packed[0].dtype
        self.eval()

    def values(self) -> list[Any]:
        """The fields of the packed weights. Raises: InputError in training mode and after a change of dtype."""
        where = type(self).__name__
        if self.training:
            raise InputError(f"{where}: mode must be eval(), got train(): batch norm is folded into the weights")
        buffers = self._buffers  # getattr finds them last, after a search
        values = [buffers[name] if name in buffers else getattr(self, name) for name in self.fields]
        if values[0].dtype != self.dtype:
            raise InputError(f"{where}: dtype must stay {self.dtype}, got {values[0].dtype}: convert, then optimize")
        return values


class FusedBottlenecks(Fused):
    """A copy of a chain of `Bottleneck`s for inference: the same call and numbers, its own weights."""

    packed = ("weights", "winograd")

    @classmethod
    @torch.no_grad()
    def from_blocks(
        cls, blocks: Sequence[nn.Module], dtype: torch.dtype | None = None, layout: str | None = None
    ) -> "FusedBottlenecks":
        """The blocks as they are now, batch norm by its running statistics; later changes of theirs are not seen.

        Args:
            dtype:  of weights and maps, by default that of the blocks.
            layout: of the packed weights, see `pack_bottlenecks`.
        Raises: InputError unless all are Bottleneck, of widths the op takes, with the stride, if any, in the 3x3 of the
            first.
        """
        where = cls.__name__
        check(len(blocks) > 0, where, "blocks must be at least one, got none")
        for index, block in enumerate(blocks):
            got = type(block).__name__
            check(isinstance(block, Bottleneck), where, f"block {index} must be a Bottleneck, got {got}")
            strides = (block.conv1.stride[0], block.conv2.stride[0])
            fits = strides[0] == 1 and (index == 0 or strides[1] == 1)
            check(fits, where, f"block {index} must have its stride, if any, in the 3x3 of block 0, got {strides}")
        dtype = dtype or blocks[0].conv1.weight.dtype
        weights = [BottleneckWeights(*(None if t is None else t.to(dtype) for t in w)) for w in fold(blocks)]
        dilations = [block.conv2.dilation[0] for block in blocks]
        return cls(pack_bottlenecks(weights, dilations, blocks[0].conv2.stride[0], layout))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)), see `hrpose.ops.bottlenecks`."""
        return bottlenecks(x, PackedBottlenecks(*self.values()))


def fold(blocks: Sequence[nn.Module]) -> list[BottleneckWeights]:
    """Weights of bottlenecks with their batch norms in evaluation mode folded in, in float64."""
    chain = []
    for block in blocks:
        (w1, b1), (w2, b2) = folded(block.conv1, block.bn1), folded(block.conv2, block.bn2)
        (w3, b3), projection = folded(block.conv3, block.bn3), None
        if block.downsample is not None:
            projection, bias = folded(*block.downsample)
            projection, b3 = projection[:, :, 0, 0], b3 + bias
        chain.append(BottleneckWeights(w1[:, :, 0, 0], b1, w2, b2, w3[:, :, 0, 0], b3, projection))
    return chain


class FusedBasicBlocks(Fused):
    """A copy of a chain of `BasicBlock`s for inference: the same call and numbers, its own weights."""

    @classmethod
    @torch.no_grad()
    def from_blocks(cls, blocks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> "FusedBasicBlocks":
        """The blocks as they are now, see `FusedBottlenecks.from_blocks`. Raises: InputError unless all are BasicBlock,
        of a width the op takes."""
        for index, block in enumerate(blocks):
            got = type(block).__name__
            check(isinstance(block, BasicBlock), cls.__name__, f"block {index} must be a BasicBlock, got {got}")
        pairs = [pair for block in blocks for pair in ((block.conv1, block.bn1), (block.conv2, block.bn2))]
        dtype = dtype or pairs[0][0].weight.dtype
        return cls(pack_basic_blocks([tuple(t.to(dtype) for t in folded(*pair)) for pair in pairs]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, see `hrpose.ops.basic_blocks`."""
        return basic_blocks(x, PackedBasicBlocks(*self.values()))


class FusedConv(Fused):
    """A copy of a convolution for inference, with the ReLU that follows it, if any: the same numbers, its own weights.

    Outputs are filled up to what the op takes; those beyond `outputs` are cut off.
    """

    @classmethod
    @torch.no_grad()
    def from_conv(cls, layer: nn.Conv2d, relu: bool) -> "FusedConv":
        """The layer as it is now. Raises: InputError for a kernel or inputs the op does not take."""
        outputs, dtype = layer.out_channels, layer.weight.dtype
        bias = layer.weight.new_zeros(outputs) if layer.bias is None else layer.bias
        more = -outputs % MULTIPLE
        weight, bias = F.pad(layer.weight, (0, 0, 0, 0, 0, 0, 0, more)), F.pad(bias, (0, more))
        fused = cls(pack_conv(weight.to(dtype), bias, stride=layer.stride[0], relu=relu))
        fused.outputs = outputs
        return fused

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Can `from_conv` make one of it?"""
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or layer.dilation != (1, 1):
            return False
        kernel = layer.kernel_size[0]
        square = layer.kernel_size == (kernel, kernel) and layer.stride[0] == layer.stride[1] and kernel in (1, 3)
        same = layer.padding == (kernel // 2, kernel // 2) and layer.padding_mode == "zeros"
        return square and same and layer.in_channels % MULTIPLE == 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)), see `hrpose.ops.conv`."""
        y = conv(x, PackedConv(*self.values()))
        whole = y.shape[1] == self.outputs
        return y if whole else y[:, : self.outputs].contiguous(memory_format=torch.channels_last)


class FusedStem(Fused):
    """A copy of the first layers for inference: convolution of images, ReLU, max-pooling if any."""

    @classmethod
    @torch.no_grad()
    def from_conv(cls, layer: nn.Conv2d, pool: bool) -> "FusedStem":
        """The layer as it is now, with the ReLU and, if `pool`, the pooling that follow it. Raises: InputError for a
        convolution the op does not take."""
        bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
        return cls(pack_stem(layer.weight, bias, stride=layer.stride[0], pool=pool))

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Can `from_conv` make one of it?"""
        plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.dilation == (1, 1)
        if not plain or layer.in_channels != 3:
            return False
        kernel = layer.kernel_size[0]
        square = layer.kernel_size == (kernel, kernel) and layer.stride[0] == layer.stride[1] and kernel in KERNELS
        same = layer.padding == (kernel // 2, kernel // 2) and layer.padding_mode == "zeros"
        return square and same and layer.out_channels % MULTIPLE == 0

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, out, H / stride, W / stride), halved by the pooling; see `hrpose.ops.stem`."""
        return stem(images, PackedStem(*self.values()))
