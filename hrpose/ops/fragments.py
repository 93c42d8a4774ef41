"""How weights lie in memory for the CUDA kernels: side by side what one lane of a warp multiplies, or what the tensor
cores of a warpgroup read from shared memory.

In both, 32 channels stand in an order in which the lane that loads eight of them in a row also sums eight in a row: of
channels 8 j + 2 i + k, k fastest, then j, then i.
"""

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


def to_core_matrices(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> [inputs / 8][outputs / 8][8 outputs][8 inputs], flat: core matrices of wgmma, whose outputs
    and inputs are both in the order above.

    Row c of core matrix i of four has output 8 (c // 2) + 2 i + c % 2 of its 32; column c of core matrix i of four has
    input 8 (c // 2) + 2 i + c % 2, words i of what lanes t = c // 2 load.
    """
    outputs, inputs = matrix.shape
    axes = matrix.reshape(outputs // 32, 4, 4, 2, inputs // 32, 4, 4, 2)  # both as 8 j + 2 i + k
    return axes.permute(4, 6, 0, 2, 1, 3, 5, 7).flatten()


def from_core_matrices(values: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `to_core_matrices` was given."""
    axes = values.reshape(inputs // 32, 4, outputs // 32, 4, 4, 2, 4, 2)
    return axes.permute(2, 4, 3, 5, 0, 6, 1, 7).reshape(outputs, inputs)
