"""How weights lie in memory for the CUDA kernels: what one lane of a warp multiplies, side by side."""

from torch import Tensor

MULTIPLE = 32  # of which both sizes of a matrix must be one


def to_fragments(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> [inputs / 32][outputs / 32][4][32 lanes][8], flat.

    Tile i of four (mma.m16n8k16) and lane 4 g + t have output 8 (g // 2) + 2 i + g % 2 and inputs 8 t to 8 t + 7 of
    their 32: then the sums that lane 4 g + t gets, columns 2 t and 2 t + 1 of each tile, are outputs 8 t to 8 t + 7.
    """
    outputs, inputs = matrix.shape
    axes = matrix.reshape(outputs // 32, 4, 4, 2, inputs // 32, 4, 8)  # 32 outputs as 8 j + 2 i + k; 32 inputs
    return axes.permute(4, 0, 2, 1, 3, 5, 6).flatten()  # g = 2 j + k


def from_fragments(fragments: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `to_fragments` was given."""
    axes = fragments.reshape(inputs // 32, outputs // 32, 4, 4, 2, 4, 8)
    return axes.permute(1, 3, 2, 4, 0, 5, 6).reshape(outputs, inputs)
