"""ResNet against torchvision's layout: counts and names written out, its equations restated with functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models.cpn import cpn_r50
from hrpose.models.resnet import ResNetClassifier, ResNetTrunk, resnet50_cls, resnet101_cls, resnet152_cls
from hrpose.models.simple_baseline import simple_baseline_r50

BUILDERS = {50: resnet50_cls, 101: resnet101_cls, 152: resnet152_cls}
BLOCKS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


def counts(depth: int, side: int, classes: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates for a square image, layer by layer."""
    pixels = (side // 4) ** 2
    params, macs = 3 * 64 * 49 + 2 * 64, 3 * 64 * 49 * 4 * pixels
    width = 64
    for mid, blocks, stride in zip([64, 128, 256, 512], BLOCKS[depth], [1, 2, 2, 2], strict=True):
        for block in range(blocks):
            params += width * mid + 9 * mid * mid + mid * 4 * mid + 2 * (mid + mid + 4 * mid)
            macs += width * mid * pixels  # the first 1x1 still has the pixels of the stage before
            if block == 0:
                pixels //= stride**2
                params += width * 4 * mid + 2 * 4 * mid
                macs += width * 4 * mid * pixels
            macs += (9 * mid * mid + mid * 4 * mid) * pixels
            width = 4 * mid
    return params + 2048 * classes + classes, macs + 2048 * classes


def entries(depth: int) -> list[str]:
    """Names of torchvision's state dict, in its order."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["conv1.weight", *(f"bn1.{x}" for x in norm)]
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            here = f"layer{stage}.{block}"
            for i in (1, 2, 3):
                names += [f"{here}.conv{i}.weight", *(f"{here}.bn{i}.{x}" for x in norm)]
            if block == 0:
                names += [f"{here}.downsample.0.weight", *(f"{here}.downsample.1.{x}" for x in norm)]
    return [*names, "fc.weight", "fc.bias"]


def naive_features(state: dict, images: torch.Tensor, blocks: list[int], stride_in: str) -> list[torch.Tensor]:
    def conv_norm(x, conv, norm, stride=1, padding=0):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        mean, var, weight, bias = (
            state[f"{norm}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    x = F.relu(conv_norm(images, "conv1", "bn1", stride=2, padding=3))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    maps = []
    for stage in range(1, 5):
        for block in range(blocks[stage - 1]):
            stride = 2 if stage > 1 and block == 0 else 1
            first, second = (1, stride) if stride_in == "3x3" else (stride, 1)
            here = f"layer{stage}.{block}"
            y = F.relu(conv_norm(x, f"{here}.conv1", f"{here}.bn1", first))
            y = F.relu(conv_norm(y, f"{here}.conv2", f"{here}.bn2", second, padding=1))
            y = conv_norm(y, f"{here}.conv3", f"{here}.bn3")
            if block == 0:
                x = conv_norm(x, f"{here}.downsample.0", f"{here}.downsample.1", stride)
            x = F.relu(x + y)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    ("depth", "params", "params_m", "gmacs"),
    [(50, 25_557_032, 25.557, 3.808), (101, 44_549_160, 44.549, 7.266), (152, 60_192_808, 60.193, 10.723)],
)
def test_counts(depth, params, params_m, gmacs):
    """The integers are those of torchvision's documentation."""
    with torch.device("meta"):
        model = BUILDERS[depth]()
    cost = count_cost(model, (224, 224))
    assert (cost.params, cost.macs) == counts(depth, 224, 1000)
    assert (cost.params, round(cost.params / 1e6, 3), round(cost.gmacs(), 3)) == (params, params_m, gmacs)


def test_caffe_strides_cost_less():
    """The first 1x1 of stages 2, 3 and 4 runs on a quarter of the pixels; names and shapes are the same."""
    with torch.device("meta"):
        trunks = [ResNetTrunk(50, stride_in=stride_in) for stride_in in ("3x3", "1x1")]
    for trunk in trunks:
        trunk.forward = trunk.features
    new, old = (count_cost(trunk, (224, 224)).macs for trunk in trunks)
    assert new - old == (56**2 - 28**2) * 256 * 128 + (28**2 - 14**2) * 512 * 256 + (14**2 - 7**2) * 1024 * 512
    shapes = [{name: value.shape for name, value in trunk.state_dict().items()} for trunk in trunks]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("depth", "number"), [(50, 320), (101, 626), (152, 932)])
def test_names_are_those_of_torchvision(depth, number):
    with torch.device("meta"):
        names = list(BUILDERS[depth]().state_dict())
    assert len(names) == number
    assert names == entries(depth)


def test_trunk_is_shared_by_name_and_shape():
    """What an ImageNet checkpoint gives to the pose networks: all of it but `fc`."""
    with torch.device("meta"):
        given = resnet50_cls().state_dict()
        for network in (simple_baseline_r50(), cpn_r50()):
            wanted = {name: v.shape for name, v in network.state_dict().items() if name.startswith(network.trunk)}
            assert wanted == {name: v.shape for name, v in given.items() if not name.startswith("fc.")}
            assert len(wanted) == 318


@pytest.mark.parametrize("stride_in", ["3x3", "1x1"])
def test_features_are_the_stated_ones(randomise, stride_in):
    torch.manual_seed(0)
    trunk, images = ResNetTrunk(50, stride_in=stride_in).double(), torch.randn(2, 3, 64, 96, dtype=torch.double)
    trunk.forward = trunk.features
    randomise(trunk, images)
    with torch.no_grad():
        got = trunk.features(images)
        want = naive_features(trunk.state_dict(), images, BLOCKS[50], stride_in)
    assert [tuple(x.shape) for x in got] == [(2, 256, 16, 24), (2, 512, 8, 12), (2, 1024, 4, 6), (2, 2048, 2, 3)]
    assert (got[-1][0] - got[-1][1]).norm() > 0.1 * got[-1].norm()  # the features are of the image
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() < 1e-9 * y.norm()


def test_logits_are_of_the_averaged_features(randomise):
    torch.manual_seed(0)
    model, images = resnet50_cls(num_classes=7).double(), torch.randn(2, 3, 64, 64, dtype=torch.double)
    randomise(model, images)
    state = model.state_dict()
    with torch.no_grad():
        got = model(images)
        last = naive_features(state, images, BLOCKS[50], "3x3")[-1]
    want = last.flatten(2).mean(2) @ state["fc.weight"].T + state["fc.bias"]
    assert got.shape == (2, 7)
    assert (got - want).norm() < 1e-9 * want.norm()


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = resnet50_cls(num_classes=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            assert parameter.abs().max() == 0, name  # fresh blocks pass their input on, and gradients with it
            nn.init.constant_(parameter, 0.2)
    F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_wrong_arguments():
    with pytest.raises(InputError, match=r"ResNetTrunk: depth must be 50 or 101 or 152, got 34"):
        ResNetTrunk(34)
    with pytest.raises(InputError, match=r"ResNetTrunk: stride_in must be '3x3' or '1x1', got '7x7'"):
        ResNetTrunk(50, stride_in="7x7")
    with torch.device("meta"):
        with pytest.raises(InputError, match=r"ResNetClassifier: num_classes must be an integer >= 1, got 0"):
            resnet50_cls(num_classes=0)
        model = ResNetClassifier(depth=50)
        for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 48), (1, 3, 50, 64)):
            message = r"ResNetClassifier: images must be \(N, 3, H, W\) with H and W multiples of 32, got \("
            with pytest.raises(InputError, match=message):
                model(torch.empty(shape))
