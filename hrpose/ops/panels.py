"""How weights lie in memory for the CPU kernels: panels of outputs, and the factors of Winograd's convolution."""

import torch
from torch import Tensor

MULTIPLE = 16  # of which all widths must be one
PANEL = 32  # kPanel of csrc/cpu/product.inl

# G of Winograd's F(T, 3): T + 2 factors from 3 weights. Points 0, 1, -1 and infinity for T = 2; 2 and -2 too for T = 4.
_G = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}


def depth(dtype: torch.dtype) -> int:
    """Inputs that lie side by side: two bfloat16 values make one dot product."""
    return 2 if dtype == torch.bfloat16 else 1


def to_panels(matrix: Tensor) -> Tensor:
    """(outputs, inputs) -> [outputs / 32][inputs / depth][32][depth] and, of what is left, the same with 16, flat."""
    d = depth(matrix.dtype)
    return torch.cat([p.T.unflatten(0, (-1, d)).transpose(1, 2).flatten() for p in matrix.split(PANEL)])


def from_panels(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """What `to_panels` was given."""
    d, whole = depth(panels.dtype), outputs // PANEL * PANEL
    first = panels[: whole * inputs].view(-1, inputs // d, PANEL, d).transpose(1, 2).reshape(whole, inputs)
    last = panels[whole * inputs :].view(inputs // d, outputs - whole, d).transpose(0, 1).reshape(-1, inputs)
    return torch.cat([first, last])


def winograd_panels(weight: Tensor, tile: int) -> Tensor:
    """Weights (outputs, inputs, 3, 3) of a convolution -> float32 panels of G w G^T, flat: for each panel of outputs a
    matrix per factor.

    Args:
        tile: T = 2 or 4: F(T x T, 3 x 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks".
    """
    g = torch.tensor(_G[tile], dtype=torch.float64, device=weight.device)
    factors = torch.einsum("yi,xj,ocij->yxoc", g, g, weight.double()).flatten(0, 1).float()
    return torch.cat([to_panels(matrix) for panel in factors.split(PANEL, 1) for matrix in panel])
