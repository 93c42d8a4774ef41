"""Where packed weights lie, value by value, and Winograd's factors of them against a convolution written out."""

import numpy as np
import pytest
import torch

from hrpose.ops.panels import from_panels, to_panels, winograd_panels

# Of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", sections 4.1 and 4.2: what a tile of T outputs
# makes of its T + 2 inputs, and of the products.
B_T = {
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
A_T = {
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}


def place(output, within, outputs, inputs, depth=1, matrices=1, index=0):
    """Where weight (output, within) of matrix `index` lies, of as many in each panel."""
    panel, width = output // 32, min(32, outputs - output // 32 * 32)
    at = panel * matrices * inputs * 32 + index * inputs * width
    return at + within // depth * width * depth + output % 32 * depth + within % depth


@pytest.mark.parametrize(("dtype", "depth"), [(torch.float32, 1), (torch.float64, 1), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (32, 24), (48, 16), (80, 32), (96, 2)])
def test_panels_lie_as_documented(dtype, depth, outputs, inputs):
    matrix = torch.arange(outputs * inputs).view(outputs, inputs).remainder(251).to(dtype)
    panels = to_panels(matrix)
    assert panels.dtype == dtype and panels.shape == (outputs * inputs,)
    values = panels.tolist()
    for o, i in np.ndindex(outputs, inputs):
        assert values[place(o, i, outputs, inputs, depth)] == float(matrix[o, i])
    assert torch.equal(from_panels(panels, outputs, inputs), matrix)
    assert torch.equal(to_panels(matrix.T.contiguous().T), panels)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("outputs", [16, 48, 64])
def test_winograd_equals_a_convolution(rng, tile, outputs):
    """Y = A^T ((G w G^T) (B^T d B)) A, the products summed over the inputs."""
    inputs, side = 16, tile + 2
    weight, d = rng.normal(size=(outputs, inputs, 3, 3)), rng.normal(size=(inputs, side, side))
    panels = winograd_panels(torch.from_numpy(weight), tile)
    assert panels.dtype == torch.float32 and panels.shape == (side * side * outputs * inputs,)
    values = panels.double().numpy()
    places = [
        [[place(o, i, outputs, inputs, 1, side * side, f) for f in range(side * side)] for i in range(inputs)]
        for o in range(outputs)
    ]
    factors = values[np.array(places)].reshape(outputs, inputs, side, side)
    b, a = np.array(B_T[tile], float), np.array(A_T[tile], float)
    products = np.einsum("oiyx,iyx->oyx", factors, b @ d @ b.T)
    want = np.zeros((outputs, tile, tile))
    for y, x, ky, kx in np.ndindex(tile, tile, 3, 3):
        want[:, y, x] += weight[:, :, ky, kx] @ d[:, y + ky, x + kx]
    assert np.abs(a @ products @ a.T - want).max() < 1e-5 * np.abs(want).max()
    assert np.allclose(factors[:, :, 0, 0], weight[:, :, 0, 0] / {2: 1, 4: 16}[tile], rtol=1e-6)
