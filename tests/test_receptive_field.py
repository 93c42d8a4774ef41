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


def two_dots(count, distance, generator):
    """Images (count, 3, 32, 16) of a green and a blue dot in one row, which of them is joint 0 told by the colour of a
    band `distance` pixels above; target heatmaps; rows and columns (count, 2) of the joints."""
    height, width = 32, 16

    def draw(low, high):
        return torch.randint(low, high, (count,), generator=generator)

    images, n = 0.1 * torch.randn(count, 3, height, width, generator=generator), torch.arange(count)
    green_first, row, columns = draw(0, 2), draw(24, 30), torch.stack([draw(2, 6), draw(10, 14)], 1)
    images[n, 1, row, columns[:, 0]] += 3
    images[n, 2, row, columns[:, 1]] += 3
    for thickness in (-1, 0, 1):
        images[n, 0, row - distance + thickness] += torch.where(green_first > 0, 2.0, -2.0)[:, None]
    columns = torch.where(green_first[:, None] > 0, columns, columns.flip(1))
    targets = torch.zeros(count, 2, height, width)
    for joint in (0, 1):
        targets[n, joint, row, columns[:, joint]] = 1
    return images, targets, row[:, None].expand(-1, 2), columns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "distance", "sees"), [("pyramid", 18, True), ("reversed", 18, True), (1, 18, False), (1, 4, True)]
)
def test_what_a_module_learns_to_see(scheme, distance, sees):
    """Trained to tell two dots apart by a band: plain bottlenecks see 6 pixels far, and beyond that they guess."""
    torch.manual_seed(0)
    generator, steps = torch.Generator().manual_seed(0), 250
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    network = nn.Sequential(stem, DilationPyramidModule(8, scheme), nn.Conv2d(32, 2, 1))
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for _ in range(steps):
        images, targets, _, _ = two_dots(16, distance, generator)
        loss = ((network(images) - targets).square() * (1 + 30 * targets)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, _, rows, columns = two_dots(400, distance, generator)
    with torch.no_grad():
        maps = network.eval()(images)
    n, joints = torch.arange(400)[:, None], torch.arange(2)
    found = maps[n, joints, rows, columns] > maps[n, joints, rows, columns.flip(1)]
    share = float(found.float().mean())
    assert share > 0.95 if sees else 0.4 < share < 0.6
