"""The Dilation Pyramid Net: its layers, its schemes of dilation, its start."""

import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.models.blocks import DilatedConv2d, initialise
from hrpose.models.dpn import DPN, DilationPyramidModule, dilations

SIZE = (64, 48)  # H, W: small, not square, a multiple of 8


def random_images(n: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def active_model(name: str, **options) -> nn.Module:
    """A model in which every layer matters: fresh residual blocks end in a zero weight and pass their input on."""
    torch.manual_seed(0)
    model = create_model(name, num_keypoints=5, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight.abs().max() == 0:
            nn.init.constant_(module.weight, 0.2)
    return model


def settled_model(name: str, **options) -> nn.Module:
    """An active model in eval mode whose batch norms know the statistics of its activations, as after training."""
    model = active_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(random_images(4, seed=1))
    return model.eval()


def test_dilations_of_the_paper():
    assert dilations("pyramid") == (32, 16, 8, 4, 2, 1)
    assert dilations("reversed") == (1, 2, 4, 8, 16, 32)
    assert dilations(6) == (6, 6, 6, 6, 6, 6)
    assert dilations("pyramid", n=3) == (4, 2, 1)  # Fig. 2 (c)


@pytest.mark.parametrize("scheme", ["pyramid", "reversed", 4])
def test_scheme_reaches_the_convolutions(scheme):
    model = create_model("dpn2_32", dilation=scheme)
    found = [m.dilation for m in model.dpm.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert found == [(d, d) for d in dilations(scheme) * 2]


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({}, (24, 40), (6, 10)),
        ({"upsample": "plain"}, (24, 40), (6, 10)),
        ({"resolution": "high"}, (20, 28), (10, 14)),
        ({"resolution": "high", "final_upsample": 1}, (20, 28), (5, 7)),
        ({"resolution": "high", "upsample": "plain"}, (20, 28), (10, 14)),
        ({"resolution": "high", "upsample": "plain", "final_upsample": 1}, (20, 28), (5, 7)),
    ],
)
@pytest.mark.parametrize("name", ["dpn1_32", "dpn1_64"])
def test_map_size_of_every_option(name, options, size, expected):
    with torch.device("meta"):
        model = create_model(name, **options)
        assert model(torch.empty(2, 3, *size)).shape == (2, 17, *expected)


@pytest.mark.parametrize("name", ["dpn1_32", "dpn1_64"])
@pytest.mark.parametrize(("resolution", "stride", "multiple"), [("medium", 4, 8), ("high", 2, 4)])
def test_only_sizes_with_whole_maps_are_taken(name, resolution, stride, multiple):
    """Without the check every other size would give a map that is not the image divided by the stride."""
    with torch.device("meta"):
        model = create_model(name, resolution=resolution)
        for height in range(2 * multiple, 3 * multiple + 1):
            images = torch.empty(1, 3, height, 2 * multiple)
            if height % multiple == 0:
                assert model(images).shape[2:] == (height // stride, 2 * multiple // stride)
                continue
            with pytest.raises(InputError, match=rf"multiples of {multiple}, got \(1, 3, {height}, {2 * multiple}\)"):
                model(images)
            model.size_multiple = 1
            assert model(images).shape[2] * stride != height
            model.size_multiple = multiple


@pytest.mark.parametrize("shape", [(3, 64, 48), (1, 1, 64, 48), (1, 3, 64, 44)])
def test_wrong_images(shape):
    with pytest.raises(InputError, match=r"images must be \(N, 3, H, W\)"):
        create_model("dpn1_32")(torch.zeros(shape))


def test_layers_of_table_one():
    """Shapes after each named layer for a 256x192 image, and where the strides are."""
    with torch.device("meta"):
        model = create_model("dpn4_64")
        shapes = {}
        for name, module in model.named_children():
            module.register_forward_hook(lambda m, args, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
        model(torch.empty(1, 3, 256, 192))
    assert shapes == {
        "conv0": (64, 128, 96),
        "pooling": (64, 64, 48),
        "conv1": (256, 64, 48),
        "conv2": (512, 32, 24),
        "reduce": (256, 32, 24),
        "dpm": (256, 32, 24),
        "upsample": (256, 64, 48),
        "heatmap": (17, 64, 48),
    }
    assert (len(model.conv1), len(model.conv2), len(model.dpm), len(model.dpm[0])) == (3, 4, 4, 6)
    assert model.conv2[0].conv1.stride == (1, 1) and model.conv2[0].conv2.stride == (2, 2)
    assert create_model("dpn4_32").reduce[0].stride == (2, 2)
    assert [n for n, p in model.named_parameters() if n.endswith("bias") and "conv" in n and p.ndim != 1] == []
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None] == ["heatmap"]


@pytest.mark.parametrize(("channels", "params"), [(64, 422_400), (32, 106_752)])
def test_parameters_of_a_module(channels, params):
    module = DilationPyramidModule(channels)
    assert sum(p.numel() for p in module.parameters()) == params
    assert sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d)) == params - 6 * 12 * channels


def test_module_is_the_stated_sequence():
    """Equation 5 and the bottleneck, written out with functions."""
    torch.manual_seed(0)
    module = DilationPyramidModule(2).double().eval()
    x = torch.randn(1, 8, 9, 11, dtype=torch.double)
    want = x
    for block, d in zip(module, (32, 16, 8, 4, 2, 1), strict=True):
        y = want
        for i, (kernel, dilation) in enumerate([(1, 1), (3, d), (1, 1)], start=1):
            weight = getattr(block, f"conv{i}").weight
            y = nn.functional.conv2d(y, weight, padding=dilation * (kernel // 2), dilation=dilation)
            y = y / (1 + 1e-5) ** 0.5  # a fresh batch norm: mean 0, variance 1
            y = y.relu() if i < 3 else (y + want).relu()
        want = y
    torch.testing.assert_close(module(x), want)


def test_widest_dilation_sees_only_its_centre_on_a_medium_map():
    """On a 32x24 map the outer taps of d = 32 always read padding; on 64x48 they do not."""
    torch.manual_seed(0)
    block = DilationPyramidModule(2)[0].eval()
    assert block.conv2.dilation == (32, 32)
    small, large = torch.randn(1, 8, 32, 24), torch.randn(1, 8, 64, 48)
    with torch.no_grad():
        before = block(small), block(large)
        outer = torch.ones(3, 3, dtype=torch.bool)
        outer[1, 1] = False
        block.conv2.weight[..., outer] = 0
        torch.testing.assert_close(block(small), before[0])
        assert (block(large) - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dilation", "size"), [(8, (8, 6)), (8, (8, 8)), (7, (8, 6)), (8, (6, 9)), (1, (1, 1)), (32, (32, 24))]
)
def test_centre_tap_alone_gives_the_same_values_and_gradients(dilation, size):
    """Nothing differs from the full convolution, on either side of the size from which on the short cut is taken."""
    torch.manual_seed(0)
    conv = DilatedConv2d(5, 7, dilation=dilation).double()
    x = torch.randn(2, 5, *size, dtype=torch.double, requires_grad=True)
    got, want = conv(x), nn.functional.conv2d(x, conv.weight, padding=dilation, dilation=dilation)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    grad = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, [x, conv.weight], grad), torch.autograd.grad(want, [x, conv.weight], grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    outer = torch.autograd.grad(conv(x).sum(), conv.weight)[0].clone()
    outer[..., 1, 1] = 0
    assert (outer == 0).all() == (dilation >= max(size))


def test_strided_convolution_has_no_short_cut():
    conv = DilatedConv2d(1, 1, stride=2, dilation=2)
    x = torch.randn(1, 1, 2, 2)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, stride=2, padding=2, dilation=2))


@pytest.mark.parametrize("upsample", ["conv1x1", "plain"])
def test_nearest_up_sampling_is_constant_over_pairs_of_pixels(upsample):
    """Nearest x2 and a 1x1 head: each 2x2 square of the heatmap has one value; bilinear has not. Both cost the same."""
    for interpolation, same in (("nearest", True), ("bilinear", False)):
        model = settled_model("dpn1_32", upsample=upsample, interpolation=interpolation)
        with torch.no_grad():
            out = model(random_images())
        squares = out[..., ::2, ::2], out[..., 1::2, 1::2]
        assert torch.allclose(*squares, atol=1e-6) == same


def test_initial_weights():
    torch.manual_seed(0)
    model = create_model("dpn4_64")
    assert abs(model.heatmap.weight.std().item() / 0.001 - 1) < 0.05 and model.heatmap.bias.abs().max() == 0
    # He's fan-out variance: 2 / (out_channels * kernel area)
    for conv, fan_out in ((model.conv2[1].conv2, 128 * 9), (model.dpm[0][0].conv3, 256), (model.conv0[0], 64 * 49)):
        assert abs(conv.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.05
    for name, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == (0 if name.endswith("bn3") else 1)).all() and (m.bias == 0).all(), name


def test_fresh_blocks_pass_their_input_on():
    module = DilationPyramidModule(4)
    x = torch.rand(1, 16, 8, 6)
    assert not torch.equal(module(x), x)
    initialise(module, nn.Conv2d(1, 1, 1))
    assert torch.equal(module(x), x)


def test_a_small_model_learns_two_images():
    """A few steps of Adam bring the loss far below that of the best constant map, its variance."""
    torch.manual_seed(0)
    model = create_model("dpn1_32", num_keypoints=2)
    images = random_images(2)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(12), indexing="ij")
    target = torch.stack([torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 8) for cx, cy in ((3, 4), (8, 11))])
    target = torch.stack([target, target.flip(0)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(25):
        loss = (model(images) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.4 * target.var().item()


def test_wrong_class_arguments():
    with pytest.raises(InputError, match="width must be 64 or 32, got 48"):
        DPN(width=48, modules=1)
    with pytest.raises(InputError, match=r"modules must be an integer >= 1, got 1\.5"):
        DPN(width=32, modules=1.5)
