"""CPN against the paper's figures and the equations of its docstring, restated with functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models.cpn import CPN, cpn_r50

PIXELS = [48 * 64, 24 * 32, 12 * 16, 6 * 8]  # of C2..C5 at 192 x 256
WIDTHS = [256, 512, 1024, 2048]


def bottleneck(width: int) -> int:
    """Weights of a bottleneck width -> 128 -> 256 and of its projection."""
    return width * 128 + 9 * 128 * 128 + 128 * 256 + (width * 256 if width != 256 else 0)


def trunk_macs(layout: str) -> int:
    macs, width = 3 * 64 * 49 * 4 * PIXELS[0], 64
    for stage, (mid, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        before = PIXELS[max(stage - 1, 0)] if layout == "torchvision" else PIXELS[stage]
        macs += width * mid * before + width * 4 * mid * PIXELS[stage] + (blocks - 1) * 4 * mid * mid * PIXELS[stage]
        macs += blocks * (9 * mid * mid + 4 * mid * mid) * PIXELS[stage]
        width = 4 * mid
    return macs


def meta_model(**options) -> CPN:
    with torch.device("meta"):
        return cpn_r50(**options)


def naive_forward(
    state: dict, maps: list[torch.Tensor], upsample_first: bool
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Global maps from coarse to fine and the refined ones, from C2..C5 and weights by name."""

    def conv_norm(x, conv, norm, padding=0):
        values = [state[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(F.conv2d(x, state[f"{conv}.weight"], padding=padding), *values, training=False, eps=1e-5)

    def pair(x, name, padding=0):
        return conv_norm(x, f"{name}.0", f"{name}.1", padding)

    def residual(x, name):
        y = F.relu(conv_norm(x, f"{name}.conv1", f"{name}.bn1"))
        y = F.relu(conv_norm(y, f"{name}.conv2", f"{name}.bn2", padding=1))
        y = conv_norm(y, f"{name}.conv3", f"{name}.bn3")
        return F.relu(y + (pair(x, f"{name}.downsample") if name == "fuse" else x))

    def up(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    c2, c3, c4, c5 = maps
    pyramid = [F.relu(pair(c5, "laterals.0"))]
    for i, c in enumerate([c4, c3, c2]):
        below = pyramid[-1]
        below = pair(up(below, 2), f"merges.{i}") if upsample_first else up(pair(below, f"merges.{i}"), 2)
        pyramid.append(F.relu(pair(c, f"laterals.{i + 1}")) + below)
    global_maps, columns = [], []
    for i, (level, factor, blocks) in enumerate(zip(pyramid, (8, 4, 2, 1), (3, 2, 1, 0), strict=True)):
        head = F.relu(pair(level, f"global_heads.{i}.0"))
        global_maps.append(up(pair(head, f"global_heads.{i}.1", padding=1), factor))
        for block in range(blocks):
            level = residual(level, f"refine.{i}.{block}")
        columns.append(up(level, factor))
    refined = pair(residual(torch.cat(columns, 1), "fuse"), "final_layer", padding=1)
    return global_maps, refined


def test_parameters():
    """Trunk of torchvision's ResNet-50, laterals, merges, heads, refinement; batch norm follows every convolution."""
    convs = [(width * 256, 256) for width in WIDTHS] + [(256 * 256, 256)] * 3
    convs += [(256 * 256, 256), (9 * 256 * 17, 17)] * 4
    convs += [(bottleneck(256), 128 + 128 + 256)] * 6 + [(bottleneck(1024), 128 + 128 + 256 + 256), (9 * 256 * 17, 17)]
    params = 23_508_032 + sum(weights + 2 * channels for weights, channels in convs)
    for options in ({}, {"layout": "caffe"}, {"merge": "upsample_first"}):
        assert sum(p.numel() for p in meta_model(**options).parameters()) == params == 27_010_538


@pytest.mark.parametrize(
    ("layout", "merge", "inference", "whole"),
    [
        ("torchvision", "conv_first", 6.152, 6.549),
        ("torchvision", "upsample_first", 6.336, 6.734),
        ("caffe", "conv_first", 5.941, 6.339),
        ("caffe", "upsample_first", 6.125, 6.523),
    ],
)
def test_multiply_accumulates(layout, merge, inference, whole):
    """The specification's 6.734 and 6.339 include the heads of the global maps; inference needs none of them."""
    macs = trunk_macs(layout)
    macs += sum(256 * width * pixels for width, pixels in zip(WIDTHS, PIXELS, strict=True))
    macs += 256 * 256 * sum(PIXELS[1:] if merge == "conv_first" else PIXELS[:3])
    macs += bottleneck(256) * (PIXELS[1] + 2 * PIXELS[2] + 3 * PIXELS[3])
    macs += (bottleneck(1024) + 9 * 256 * 17) * PIXELS[0]
    heads = (256 * 256 + 9 * 256 * 17) * sum(PIXELS)

    model = meta_model(layout=layout, merge=merge)
    cost = count_cost(model, (192, 256))
    assert (cost.macs, round(cost.gmacs(), 3)) == (macs, inference)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.train()(torch.empty(1, 3, 256, 192, device="meta"))
    assert counter.get_total_flops() == 2 * (macs + heads)
    assert round((macs + heads) / 2**30, 3) == whole


def test_printed_digits():
    """HRNet's notes: 27.0 M and 6.2."""
    cost = count_cost(meta_model(), (192, 256))
    assert (round(cost.params / 1e6, 1), round(cost.gmacs(), 1)) == (27.0, 6.2)


@pytest.mark.parametrize("upsample_first", [False, True])
def test_forward_is_the_stated_one(randomise, upsample_first):
    torch.manual_seed(0)
    model = cpn_r50(5, merge="upsample_first" if upsample_first else "conv_first").double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    randomise(model, images)
    with torch.no_grad():
        want, refined = naive_forward(model.state_dict(), model.features(images), upsample_first)
        got = model(images)
        assert got.shape == (2, 5, 16, 16)
        assert (got[0] - got[1]).norm() > 0.1 * got.norm()  # the maps are of the image
        assert (got - refined).norm() < 1e-9 * refined.norm()
        model.training = True  # the network alone: its batch norms keep the statistics they have
        outputs = model(images)
    assert len(outputs) == 5
    for x, y in zip(outputs, [*want, refined], strict=True):
        assert x.shape == (2, 5, 16, 16)
        assert (x - y).norm() < 1e-9 * y.norm()


def test_both_orders_of_merging_are_one_function(randomise):
    torch.manual_seed(0)
    first, second = cpn_r50(5).double(), cpn_r50(5, merge="upsample_first").double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.double)
    randomise(first, images)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        want = first(images)
        assert (second(images) - want).norm() < 1e-9 * want.norm()


def test_layout_places_the_strides():
    for layout, first, second in (("torchvision", 1, 2), ("caffe", 2, 1)):
        model = meta_model(layout=layout)
        for stage in (model.layer2, model.layer3, model.layer4):
            assert stage[0].conv1.stride == (first, first) and stage[0].conv2.stride == (second, second)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = cpn_r50(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.2)
    outputs = model(torch.randn(2, 3, 64, 64))
    assert isinstance(outputs, tuple) and [tuple(x.shape) for x in outputs] == [(2, 5, 16, 16)] * 5
    sum((x - 1).pow(2).mean() for x in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_fresh_maps_are_as_large_as_targets():
    """sqrt(pi 2^2 / (64 * 48)) = 0.064 is the deviation of a Gaussian target of sigma 2 on a 64x48 map."""
    torch.manual_seed(0)
    model = cpn_r50(5)
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 64))
    assert 0.05 < outputs[-1].std() < 0.07  # not up-sampled, which would smooth it
    for head in (*(head[1] for head in model.global_heads), model.final_layer):
        assert abs(head[0].weight.std().item() / 0.001 - 1) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "tensorflow"}, r"CPN: layout must be 'torchvision' or 'caffe', got 'tensorflow'"),
        ({"merge": "sum"}, r"CPN: merge must be 'conv_first' or 'upsample_first', got 'sum'"),
        ({"num_keypoints": 0}, r"CPN: num_keypoints must be an integer >= 1, got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        cpn_r50(**options)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 48)])
def test_wrong_images(shape):
    with pytest.raises(InputError, match=r"CPN: images must be \(N, 3, H, W\) with H and W multiples of 32, got \("):
        meta_model()(torch.empty(shape, device="meta"))
