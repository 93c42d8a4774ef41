"""Stacked Hourglass: the Torch7 inventory, the published cost, its formulas, its supervision, its start."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models.hourglass import (
    Hourglass,
    HourglassModule,
    PreActivationBottleneck,
    hourglass1,
    hourglass2,
    hourglass4,
    hourglass8,
)


def images(n: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def active(model: nn.Module) -> nn.Module:
    """With blocks that do more than pass their input on, and batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, PreActivationBottleneck):
            nn.init.normal_(module.conv3.weight, std=0.02, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 4.0, 6.0, generator=generator)
            nn.init.normal_(module.running_mean, std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def two() -> nn.Module:
    torch.manual_seed(0)
    return active(Hourglass(5, stacks=2)).eval()


def conv(c_in: int, c_out: int, kernel: int) -> int:
    return c_in * c_out * kernel**2 + c_out


def residual(c_in: int, c_out: int) -> int:
    """Residual.lua: batch norms before the convolutions, a 1x1 on the shortcut where the width changes."""
    half = c_out // 2
    convolutions = conv(c_in, half, 1) + conv(half, half, 3) + conv(half, c_out, 1)
    return 2 * (c_in + half + half) + convolutions + (conv(c_in, c_out, 1) if c_in != c_out else 0)


@pytest.mark.parametrize("build", [hourglass1, hourglass2, hourglass4, hourglass8])
def test_parameters_are_those_of_the_torch7_code(build):
    """hg.lua at its defaults with 17 heatmaps: 13 residuals in an hourglass, one after it, `lin`, head, and the two
    convolutions back, which the last hourglass lacks."""
    stacks = int(build.__name__.removeprefix("hourglass"))
    stem = conv(3, 64, 7) + 2 * 64 + residual(64, 128) + residual(128, 128) + residual(128, 256)
    stack = 14 * residual(256, 256) + conv(256, 256, 1) + 2 * 256 + conv(256, 17, 1)
    back = conv(256, 256, 1) + conv(17, 256, 1)
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == stem + stacks * stack + (stacks - 1) * back


@pytest.mark.parametrize(
    ("refine", "params_m", "gmacs"), [("after", 25.438, 19.178), ("bottom", 25.438, 14.322), ("none", 23.722, 14.303)]
)
def test_cost_of_eight_stacks(refine, params_m, gmacs):
    """After: the original. The other two are near the 14.3 G that HRNet's table prints."""
    with torch.device("meta"):
        model = hourglass8(refine=refine)
    cost = count_cost(model, (192, 256))
    assert (round(cost.params / 1e6, 3), round(cost.gmacs(), 3)) == (params_m, gmacs)


@pytest.mark.parametrize(("c_in", "c_out"), [(8, 8), (6, 8)])
def test_block_is_the_stated_formula(c_in, c_out):
    torch.manual_seed(0)
    block = active(PreActivationBottleneck(c_in, c_out)).double().eval()
    x = torch.randn(2, c_in, 5, 4, dtype=torch.double)
    y = x
    for i in (1, 2, 3):
        norm, layer = getattr(block, f"bn{i}"), getattr(block, f"conv{i}")
        mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        y = ((y - mean) / (variance + 1e-5) ** 0.5).relu()
        y = nn.functional.conv2d(y, layer.weight, layer.bias, padding=layer.weight.shape[2] // 2)
    shortcut = x if c_in == c_out else nn.functional.conv2d(x, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x), y + shortcut)


@pytest.mark.parametrize("bottom", [1, 2])
def test_hourglass_is_the_stated_sequence(bottom):
    """Written out without recursion: down with a skip at each of the four sizes, and up again."""
    torch.manual_seed(0)
    module = active(HourglassModule(4, bottom)).eval()
    levels = [module]
    while isinstance(levels[-1].inner, HourglassModule):
        levels.append(levels[-1].inner)
    assert len(levels) == 4 and len(levels[-1].inner) == bottom
    x = torch.randn(1, 256, 16, 32)
    with torch.no_grad():
        y, skips, sizes = x, [], []
        for level in levels:
            skips.append(level.skip(y))
            n, c, h, w = y.shape
            y = level.down(y.view(n, c, h // 2, 2, w // 2, 2).amax((3, 5)))
            sizes.append(tuple(y.shape[2:]))
        y = levels[-1].inner(y)
        for level, skip in zip(levels[::-1], skips[::-1], strict=True):
            y = skip + level.up(y).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(module(x), y)
    assert sizes == [(8, 16), (4, 8), (2, 4), (1, 2)]


def test_second_stack_sees_the_features_and_heatmaps_of_the_first(two):
    with torch.no_grad():
        x = two.stem(images())
        features = two.features[0](two.hourglasses[0](x))
        heatmaps = two.heatmaps[0](features)
        x = x + two.merge_features[0](features) + two.merge_heatmaps[0](heatmaps)
        final = two.heatmaps[1](two.features[1](two.hourglasses[1](x)))
        torch.testing.assert_close(two(images()), final)
        whole = copy.copy(two)
        whole.training = True  # the batch norms stay as they are
        outputs = whole(images())
    assert len(outputs) == 2
    torch.testing.assert_close(outputs[0], heatmaps)
    torch.testing.assert_close(outputs[1], final)


@pytest.mark.parametrize("stacks", [1, 3])
def test_outputs_in_training_and_after(stacks):
    torch.manual_seed(0)
    model = Hourglass(5, stacks=stacks)
    outputs = model(images(height=64, width=128))
    assert isinstance(outputs, tuple) and [o.shape for o in outputs] == [(2, 5, 16, 32)] * stacks
    with torch.no_grad():
        final = model.eval()(images(height=64, width=128))
    assert isinstance(final, Tensor) and final.shape == (2, 5, 16, 32)


def test_each_output_teaches_what_comes_before_it(two):
    model = copy.deepcopy(two).train()
    outputs = model(images())
    (outputs[0] - 1).square().mean().backward(retain_graph=True)
    first, second = model.hourglasses[0].up.conv2.weight, model.hourglasses[1].up.conv2.weight
    assert first.grad.abs().max() > 0 and second.grad is None
    model.zero_grad()
    (outputs[1] - 1).square().mean().backward()
    assert first.grad.abs().max() > 0 and second.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(64, 96), (32, 64), (192, 250)])
def test_only_sizes_that_can_be_halved_six_times(size):
    with torch.device("meta"):
        model = hourglass1()
        assert model(torch.empty(1, 3, 128, 192))[0].shape == (1, 17, 32, 48)
        message = rf"Hourglass: images must be .* multiples of 64, got \(1, 3, {size[0]}, {size[1]}\)"
        with pytest.raises(InputError, match=message):
            model(torch.empty(1, 3, *size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stacks": 0}, "Hourglass: stacks must be an integer >= 1, got 0"),
        ({"stacks": 1, "num_keypoints": 1.5}, r"Hourglass: num_keypoints must be an integer >= 1, got 1\.5"),
        ({"stacks": 1, "refine": "before"}, "Hourglass: refine must be 'after' or 'bottom' or 'none', got 'before'"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        Hourglass(**options)


# The start of the training --------------------------------------------------------------------------------------------


def test_fresh_blocks_pass_their_input_on_and_learn():
    torch.manual_seed(0)
    model = Hourglass(5, stacks=1).train()
    block = model.hourglasses[0].skip
    x = torch.randn(2, 256, 8, 8)
    assert torch.equal(block(x), x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (model(images())[0] - 1).square().mean().backward()
        optimizer.step()
    for name, parameter in block.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad.abs().max() > 1e-7, name


def test_untrained_stack_of_eight_in_bf16():
    """bf16 rounds by up to 0.4 % per layer, which blocks at He's size would multiply to nearly half of the output."""
    torch.manual_seed(0)
    model = Hourglass(5, stacks=8).train()
    with torch.no_grad():
        want = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images())
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b).norm() < 0.1 * b.norm()
