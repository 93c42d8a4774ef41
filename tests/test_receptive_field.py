"""Equations 1 to 6 of the DPN paper against its figures and against the gradients of the real module."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.models.dpn import DilationPyramidModule, dilations
from hrpose.receptive_field import dilated, is_complete, normal, pyramid, reachable_offsets, strided


def test_figure_2():
    """Three layers of kernel 3: (a) normal 7, (b) dilation two 13 with gaps, (c) DPM 15 complete, (d) stride two 15."""
    rf_a = rf_b = rf_c = rf_d = jump = 1
    for d in (4, 2, 1):
        rf_a = normal(rf_a)
        rf_b = dilated(rf_b, 2)
        rf_c = dilated(rf_c, d)
        rf_d, jump = strided(rf_d, jump, stride=2)
    assert (rf_a, rf_b, rf_c, rf_d, jump) == (7, 13, 15, 15, 8)
    assert is_complete((1, 1, 1)) and is_complete((4, 2, 1)) and not is_complete((2, 2, 2))
    assert reachable_offsets((2, 2, 2)) == [-6, -4, -2, 0, 2, 4, 6]
    assert reachable_offsets((4, 2, 1)) == list(range(-7, 8))


def test_stem():
    """7x7 stride 2, pooling 3x3 stride 2: 7 + 2 * 2 = 11 pixels at a spacing of 4."""
    assert strided(*strided(1, 1, stride=2, kernel=7), stride=2) == (11, 4)


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("kernel", [3, 5])
def test_equation_6_sums_equation_2(n, kernel):
    rf = 1
    for d in dilations("pyramid", n):
        rf = dilated(rf, d, kernel)
    assert rf == pyramid(n, kernel) == kernel + (kernel - 1) * sum(2**i for i in range(1, n))


def test_default_module_sees_127_pixels_without_gaps():
    assert pyramid(6) == 127
    for scheme in ("pyramid", "reversed"):
        assert reachable_offsets(dilations(scheme)) == list(range(-63, 64))
    for d in (2, 4, 6, 8):  # Table III
        assert reachable_offsets(dilations(d)) == list(range(-6 * d, 6 * d + 1, d))
        assert not is_complete(dilations(d))
    assert is_complete(dilations(1))


def test_reach_equals_convolved_supports():
    """The definition, independently: convolve the layers' indicator functions."""
    for stack, kernel in (((3, 1), 3), ((5, 2), 3), ((5, 1), 5), ((), 3)):
        support = torch.ones(1, 1, 1)
        for d in stack:
            taps = torch.zeros(1, 1, (kernel - 1) * d + 1)
            taps[..., ::d] = 1
            support = nn.functional.conv1d(support, taps, padding=(kernel - 1) * d)
        radius = support.shape[-1] // 2
        assert reachable_offsets(stack, kernel) == (support[0, 0].nonzero()[:, 0] - radius).tolist()
    assert is_complete((3, 1)) and not is_complete((4, 1)) and is_complete((5, 1), kernel=5)


@pytest.mark.parametrize("scheme", ["pyramid", "reversed", 1, 2, 8])
def test_gradient_of_one_output_pixel(scheme):
    """With positive weights nothing cancels, so the gradient is nonzero exactly where an input pixel contributes."""
    torch.manual_seed(0)
    module = DilationPyramidModule(1, scheme).double().eval()
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.uniform_(0.1, 1)
    size = 131
    x = torch.ones(1, 4, size, size, dtype=torch.double, requires_grad=True)
    module(x)[0, 0, size // 2, size // 2].backward()
    touched = x.grad[0].abs().sum(0) > 0
    offsets = torch.tensor(reachable_offsets(dilations(scheme))) + size // 2
    expected = torch.zeros(size, size, dtype=torch.bool)
    expected[offsets[:, None], offsets[None, :]] = True
    assert torch.equal(touched, expected)
    if scheme == "pyramid":
        assert touched.sum() == 127 * 127
    if scheme == 2:
        rows = touched.any(1).nonzero()[:, 0].tolist()
        assert {b - a for a, b in pairwise(rows)} == {2} and len(rows) == 13


def test_wrong_arguments():
    with pytest.raises(InputError, match="kernel must be odd and >= 1, got 4"):
        reachable_offsets((1,), kernel=4)
    with pytest.raises(InputError, match=r"dilations must be >= 1, got \[2, 0\]"):
        is_complete((2, 0))
