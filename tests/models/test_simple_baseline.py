"""SimpleBaseline against the official network: counts and names written out, its layers restated with functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models.simple_baseline import (
    SimpleBaseline,
    simple_baseline_r50,
    simple_baseline_r101,
    simple_baseline_r152,
)

BUILDERS = {50: simple_baseline_r50, 101: simple_baseline_r101, 152: simple_baseline_r152}
BLOCKS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
TRUNK = {
    50: 23_508_032,
    101: 42_500_160,
    152: 58_143_808,
}  # torchvision's networks less 2049 * 1000 of fc


def meta_model(depth: int, keypoints: int = 17, **options) -> SimpleBaseline:
    with torch.device("meta"):
        return BUILDERS[depth](keypoints, **options)


def trunk_macs(depth: int, size: tuple[int, int]) -> int:
    """7x7 convolution and bottlenecks; the first 1x1 of a stage has the pixels of the stage before."""
    pixels = size[0] * size[1] // 16
    macs, width = 3 * 64 * 49 * 4 * pixels, 64
    for mid, blocks, stride in zip([64, 128, 256, 512], BLOCKS[depth], [1, 2, 2, 2], strict=True):
        before, pixels = pixels, pixels // stride**2
        macs += width * mid * before + width * 4 * mid * pixels + (blocks - 1) * 4 * mid * mid * pixels
        macs += blocks * (9 * mid * mid + 4 * mid * mid) * pixels
        width = 4 * mid
    return macs


@pytest.mark.parametrize(
    ("depth", "kernel", "channels", "keypoints"),
    [(50, 4, 256, 17), (101, 4, 256, 17), (152, 4, 256, 17), (50, 3, 256, 16), (50, 2, 128, 17)],
)
def test_counts_by_hand(depth, kernel, channels, keypoints):
    cost = count_cost(meta_model(depth, keypoints, deconv_channels=channels, deconv_kernel=kernel), (192, 256))
    deconvs = [kernel**2 * before * channels for before in (2048, channels, channels)]
    head = channels * keypoints
    assert cost.params == TRUNK[depth] + sum(deconvs) + 3 * 2 * channels + head + keypoints
    pixels = [6 * 8, 12 * 16, 24 * 32, 48 * 64]
    rest = trunk_macs(depth, (192, 256)) + head * pixels[3]
    exact = sum(weights * p for weights, p in zip(deconvs, pixels[:3], strict=True))
    assert (cost.macs, cost.macs_deconv_output_grid) == (rest + exact, rest + 4 * exact)


@pytest.mark.parametrize(
    ("depth", "keypoints", "size", "params_m", "output_grid", "exact"),
    [
        (50, 17, (192, 256), 34.000, 8.991, 5.05),
        (101, 17, (192, 256), 52.992, 12.378, 8.44),
        (152, 17, (192, 256), 68.635, 15.765, 11.83),
        (152, 17, (288, 384), 68.635, 35.470, 26.61),
        (152, 16, (256, 256), 68.635, 21.019, None),
    ],
)
def test_counts_of_the_specification(depth, keypoints, size, params_m, output_grid, exact):
    """The papers print 34.0 M, 53.0 M, 68.6 M and, over the output grid of the deconvolutions, 8.9, 12.4, 15.7."""
    cost = count_cost(meta_model(depth, keypoints), size)
    assert round(cost.params / 1e6, 3) == params_m
    assert round(cost.gmacs(deconv="output_grid"), 3) == output_grid
    assert exact is None or round(cost.gmacs(), 2) == exact


def test_parameters_of_the_official_network():
    assert sum(p.numel() for p in meta_model(50).parameters()) == 33_999_697


@pytest.mark.parametrize(("depth", "number"), [(50, 338), (101, 644), (152, 950)])
def test_names_are_those_of_the_official_checkpoints(depth, number):
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{x}" for x in norm)]
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)] + [("downsample.0", "downsample.1")] * (block == 0)
            for conv, bn in pairs:
                names += [f"layer{stage}.{block}.{conv}.weight", *(f"layer{stage}.{block}.{bn}.{x}" for x in norm)]
    for deconv in (0, 3, 6):
        names += [f"deconv_layers.{deconv}.weight", *(f"deconv_layers.{deconv + 1}.{x}" for x in norm)]
    state = meta_model(depth).state_dict()
    assert list(state) == [*names, "final_layer.weight", "final_layer.bias"]
    assert len(state) == number
    shapes = [tuple(state[f"deconv_layers.{i}.weight"].shape) for i in (0, 3, 6)]
    assert shapes == [(2048, 256, 4, 4), (256, 256, 4, 4), (256, 256, 4, 4)]


def naive_forward(state: dict, images: torch.Tensor, kernel: int) -> torch.Tensor:
    """The official network of depth 50 in eval mode, from its weights by name."""

    def norm(x, name):
        values = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, training=False, eps=1e-5)

    x = F.conv2d(images, state["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(F.relu(norm(x, "bn1")), kernel_size=3, stride=2, padding=1)
    for stage, blocks in enumerate([3, 4, 6, 3], start=1):
        for block in range(blocks):
            here, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{here}.conv1.weight"]), f"{here}.bn1"))
            y = F.relu(norm(F.conv2d(y, state[f"{here}.conv2.weight"], stride=stride, padding=1), f"{here}.bn2"))
            y = norm(F.conv2d(y, state[f"{here}.conv3.weight"]), f"{here}.bn3")
            if block == 0:
                x = norm(F.conv2d(x, state[f"{here}.downsample.0.weight"], stride=stride), f"{here}.downsample.1")
            x = F.relu(x + y)
    padding, output_padding = {4: (1, 0), 3: (1, 1), 2: (0, 0)}[kernel]
    for i in (0, 3, 6):
        weight = state[f"deconv_layers.{i}.weight"]
        x = F.conv_transpose2d(x, weight, stride=2, padding=padding, output_padding=output_padding)
        x = F.relu(norm(x, f"deconv_layers.{i + 1}"))
    return F.conv2d(x, state["final_layer.weight"], state["final_layer.bias"])


@pytest.mark.parametrize("kernel", [4, 3, 2])
def test_forward_is_the_official_one(randomise, kernel):
    torch.manual_seed(0)
    model = simple_baseline_r50(5, deconv_channels=32, deconv_kernel=kernel).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    nn.init.normal_(model.final_layer.weight)
    nn.init.normal_(model.final_layer.bias)
    randomise(model, images)
    with torch.no_grad():
        got, want = model(images), naive_forward(model.state_dict(), images, kernel)
    assert got.shape == (2, 5, 16, 16)
    assert (got[0] - got[1]).norm() > 0.1 * got.norm()  # the maps are of the image
    assert (got - want).norm() < 1e-9 * want.norm()


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = simple_baseline_r50(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.2)
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 5, 16, 16)
    (out - 1).pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_initial_weights():
    """The official 0.001 for the head; the deconvolutions, which no checkpoint precedes, at He's scale."""
    torch.manual_seed(0)
    model = simple_baseline_r50()
    assert abs(model.final_layer.weight.std().item() / 0.001 - 1) < 0.05
    assert model.final_layer.bias.abs().max() == 0
    assert model.deconv_layers[3].weight.std().item() > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deconv_kernel": 5}, r"SimpleBaseline: deconv_kernel must be 2 or 3 or 4, got 5"),
        ({"deconv_channels": 0}, r"SimpleBaseline: deconv_channels must be an integer >= 1, got 0"),
        ({"num_keypoints": True}, r"SimpleBaseline: num_keypoints must be an integer >= 1, got True"),
    ],
)
def test_wrong_arguments(options, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        simple_baseline_r50(**options)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 64, 80)])
def test_wrong_images(shape):
    model = meta_model(50)
    with pytest.raises(InputError, match=r"SimpleBaseline: images must be \(N, 3, H, W\) with H and W multiples of 32"):
        model(torch.empty(shape, device="meta"))
    with pytest.raises(InputError, match="SimpleBaseline: depth must be 50 or 101 or 152, got 18"):
        SimpleBaseline(depth=18)
