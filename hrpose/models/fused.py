"""Bottlenecks for inference: batch norm folded into the weights, a chain of blocks as one call of the fused op."""

import torch
from torch import Tensor, nn

from hrpose.errors import InputError, check
from hrpose.models.blocks import Bottleneck
from hrpose.models.fold import folded
from hrpose.ops.bottlenecks import BottleneckWeights, PackedBottlenecks, bottlenecks, pack_bottlenecks

WHERE = "FusedBottlenecks"


def fold(blocks: nn.Sequential) -> list[BottleneckWeights]:
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


class FusedBottlenecks(nn.Module):
    """A copy of a chain of `Bottleneck`s for inference: the same call and numbers, its own weights.

    It has no parameters; its packed weights are buffers. To change their dtype, build it anew from the blocks.
    """

    def __init__(self, packed: PackedBottlenecks):
        super().__init__()
        self.dtype = packed.weights.dtype
        for name in ("weights", "biases", "winograd"):
            self.register_buffer(name, getattr(packed, name))
        self.sizes = packed[3:]
        self.eval()

    @classmethod
    @torch.no_grad()
    def from_blocks(cls, blocks: nn.Sequential, dtype: torch.dtype | None = None) -> "FusedBottlenecks":
        """The blocks as they are now, batch norm by its running statistics; later changes of theirs are not seen.

        Args:
            dtype: of weights and maps, by default that of the blocks.
        Raises: InputError unless all are Bottleneck, of widths the op takes, with the stride, if any, in the 3x3 of the
            first.
        """
        check(len(blocks) > 0, WHERE, "blocks must be at least one, got none")
        for index, block in enumerate(blocks):
            check(
                isinstance(block, Bottleneck), WHERE, f"block {index} must be a Bottleneck, got {type(block).__name__}"
            )
            strides = (block.conv1.stride[0], block.conv2.stride[0])
            fits = strides[0] == 1 and (index == 0 or strides[1] == 1)
            check(fits, WHERE, f"block {index} must have its stride, if any, in the 3x3 of block 0, got {strides}")
        dtype = dtype or blocks[0].conv1.weight.dtype
        weights = [BottleneckWeights(*(None if t is None else t.to(dtype) for t in w)) for w in fold(blocks)]
        dilations = [block.conv2.dilation[0] for block in blocks]
        return cls(pack_bottlenecks(weights, dilations, blocks[0].conv2.stride[0]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)), see `hrpose.ops.bottlenecks`.

        Raises: InputError in training mode, after a change of dtype, and on a wrong x.
        """
        if self.training:
            raise InputError(f"{WHERE}: mode must be eval(), got train(): batch norm is folded into the weights")
        if self.weights.dtype != self.dtype:
            got = self.weights.dtype
            raise InputError(
                f"{WHERE}: dtype must stay {self.dtype}, got {got}: use from_blocks of the converted blocks"
            )
        return bottlenecks(x, PackedBottlenecks(self.weights, self.biases, self.winograd, *self.sizes))
