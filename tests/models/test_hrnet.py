"""HRNet against a restatement of the official network with functions of its state dict alone, and its other heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.models.hrnet import HighResolutionModule

State = dict[str, Tensor]
MODULES = {1: 1, 2: 4, 3: 3}  # exchange units behind each transition


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases and statistics with no special values, scaled so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 4:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
        elif name.endswith(("weight", "running_var")):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def block(state: State, name: str, x: Tensor) -> Tensor:
    """A basic block, or a bottleneck if it has a third convolution."""
    y = F.relu(norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)))
    y = norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", y))
    if f"{name}.conv3.weight" in state:
        y = norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", F.relu(y)))
    if f"{name}.downsample.0.weight" in state:
        x = norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x))
    return F.relu(y + x)


def exchange(state: State, name: str, maps: list[Tensor]) -> list[Tensor]:
    """Every output that the state dict has layers for."""
    outputs = [i for i in range(len(maps)) if any(key.startswith(f"{name}.{i}.") for key in state)]
    result = []
    for i in outputs:
        total = None
        for j, x in enumerate(maps):
            if j > i:
                x = norm(state, f"{name}.{i}.{j}.1", conv(state, f"{name}.{i}.{j}.0", x))
                x = F.interpolate(x, scale_factor=2 ** (j - i), mode="nearest")
            for k in range(i - j):
                x = norm(state, f"{name}.{i}.{j}.{k}.1", conv(state, f"{name}.{i}.{j}.{k}.0", x, 2))
                x = x if k == i - j - 1 else F.relu(x)
            total = x if total is None else total + x
        result.append(F.relu(total))
    return result


def trunk(state: State, images: Tensor) -> list[Tensor]:
    x = F.relu(norm(state, "bn1", conv(state, "conv1", images, 2)))
    x = F.relu(norm(state, "bn2", conv(state, "conv2", x, 2)))
    for i in range(4):
        x = block(state, f"layer1.{i}", x)
    maps = [x]
    for t, modules in MODULES.items():
        new = []
        for i in range(t + 1):
            name = f"transition{t}.{i}"
            if f"{name}.0.weight" in state:
                new.append(F.relu(norm(state, f"{name}.1", conv(state, f"{name}.0", maps[i]))))
            elif f"{name}.0.0.weight" in state:
                new.append(F.relu(norm(state, f"{name}.0.1", conv(state, f"{name}.0.0", maps[-1], 2))))
            else:
                new.append(maps[i])
        maps = new
        for m in range(modules):
            for b in range(t + 1):
                for k in range(4):
                    maps[b] = block(state, f"stage{t + 1}.{m}.branches.{b}.{k}", maps[b])
            maps = exchange(state, f"stage{t + 1}.{m}.fuse_layers", maps)
    return maps


def images(height: int = 64, width: int = 96, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def compare(model: nn.Module, restated: Tensor, got: Tensor) -> None:
    assert got.shape == restated.shape
    assert got.std() > 1e-3 and torch.isfinite(got).all()
    assert relative_error(got, restated) < 1e-6


# The pose network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hrnet_w18", "hrnet_w32", pytest.param("hrnet_w48", marks=pytest.mark.slow)])
def test_heatmaps_are_those_of_the_official_network(name):
    model = fill(create_model(name))
    state = model.state_dict()
    with torch.no_grad():
        compare(model, conv(state, "final_layer", trunk(state, images())[0]), model(images()))


def test_state_dict_entries_of_the_official_checkpoints():
    """The layout, written out; five entries per batch norm."""
    convs = ["conv1", "conv2", "layer1.0.downsample.0"]
    norms = ["bn1", "bn2", "layer1.0.downsample.1"]
    for i in range(4):
        convs += [f"layer1.{i}.conv{k}" for k in (1, 2, 3)]
        norms += [f"layer1.{i}.bn{k}" for k in (1, 2, 3)]
    for name in ("transition1.0", "transition1.1.0", "transition2.2.0", "transition3.3.0"):
        convs.append(f"{name}.0")
        norms.append(f"{name}.1")
    for stage, modules in ((2, 1), (3, 4), (4, 3)):
        for m in range(modules):
            for b in range(stage):
                convs += [f"stage{stage}.{m}.branches.{b}.{k}.conv{c}" for k in range(4) for c in (1, 2)]
                norms += [f"stage{stage}.{m}.branches.{b}.{k}.bn{c}" for k in range(4) for c in (1, 2)]
            for i in range(1 if (stage, m) == (4, 2) else stage):
                for j in range(stage):
                    fuse = f"stage{stage}.{m}.fuse_layers.{i}.{j}"
                    steps = [fuse] if j > i else [f"{fuse}.{k}" for k in range(i - j)]
                    convs += [f"{step}.0" for step in steps]
                    norms += [f"{step}.1" for step in steps]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{name}.weight" for name in convs} | {f"{name}.{part}" for name in norms for part in parts}
    expected |= {"final_layer.weight", "final_layer.bias"}
    assert len(expected) == 1754
    for name in ("hrnet_w32", "hrnet_w48"):
        with torch.device("meta"):
            assert create_model(name).state_dict().keys() == expected


@pytest.mark.parametrize(
    ("name", "size", "params", "macs", "gmacs"),
    [
        ("hrnet_w32", (192, 256), 28_536_113, 7_645_003_776, 7.120),
        ("hrnet_w32", (288, 384), 28_536_113, None, 16.020),
        ("hrnet_w48", (192, 256), 63_595_745, None, 14.614),
        ("hrnet_w48", (288, 384), 63_595_745, None, 32.882),
        ("hrnet_w18_cls", (224, 224), 21.299, None, 3.989),
        ("hrnet_w30_cls", (224, 224), 37.712, None, 7.549),
        ("hrnet_w40_cls", (224, 224), 57.557, None, 11.820),
        ("hrnet_w44_cls", (224, 224), 21.931, None, 3.901),
        ("hrnet_w76_cls", (224, 224), 40.783, None, 7.303),
        ("hrnet_w96_cls", (224, 224), 57.482, None, 10.246),
        ("hrnetv2_w48_seg", (2048, 1024), 65.859, None, 696.2),
        ("hrnetv2_w40_seg", (2048, 1024), 45.894, None, 498.7),
    ],
)
def test_counts_of_the_specification(name, size, params, macs, gmacs):
    with torch.device("meta"):
        cost = count_cost(create_model(name), size)
    assert cost.params == params or round(cost.params / 1e6, 3) == params
    assert macs is None or cost.macs == macs
    assert round(cost.gmacs(), len(str(gmacs).split(".")[1])) == gmacs
    assert cost.macs == cost.macs_deconv_output_grid


@pytest.mark.parametrize(("name", "gigamacs"), [("hrnetv2_w48_seg", 747.5), ("hrnetv2_w40_seg", 535.4)])
def test_segmentation_in_decimal_units(name, gigamacs):
    with torch.device("meta"):
        assert round(count_cost(create_model(name), (2048, 1024)).gmacs(10**9), 1) == gigamacs


def test_exchange_unit_by_hand():
    """Two branches of one channel whose blocks pass their input on."""
    module = HighResolutionModule((1, 2), outputs=2).eval()
    for name, tensor in module.state_dict().items():
        if name.startswith("branches") and "bn2" in name and name.endswith("weight"):
            tensor.zero_()
        elif tensor.ndim == 4:
            tensor.fill_(1.0)
        elif name.endswith("running_var"):
            tensor.fill_(1 - 1e-5)  # with epsilon: a batch norm that does nothing
    high = torch.arange(16.0).reshape(1, 1, 4, 4)
    low = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [-9.0, 10.0]]])[None]
    with torch.no_grad():
        first, second = module([high, low.relu()])
    up = low.relu().sum(1, keepdim=True).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(first, high + up)
    down = F.conv2d(high, torch.ones(1, 1, 3, 3), stride=2, padding=1)
    torch.testing.assert_close(second, low.relu() + down)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 48)])
def test_wrong_images(shape):
    with torch.device("meta"), pytest.raises(InputError, match=r"HRNet: images must be .* multiples of 32, got"):
        create_model("hrnet_w18")(torch.empty(shape))


def test_wrong_arguments():
    with pytest.raises(InputError, match="num_keypoints must be an integer >= 1, got 0"):
        create_model("hrnet_w18", 0)
    with pytest.raises(InputError, match=r"option of hrnet_w18 must be one of left out, it has none, got 'width'"):
        create_model("hrnet_w18", width=3)
    with pytest.raises(InputError, match="num_keypoints must be left out, got 17"):
        create_model("hrnet_w18_cls", 17)
    with pytest.raises(InputError, match="num_classes must be an integer >= 1, got 0"):
        create_model("hrnet_w18_cls", num_classes=0)


# The other heads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hrnet_w18_cls", "hrnet_w44_cls"])
def test_classifier_is_the_official_network(name):
    model = fill(create_model(name, num_classes=7))
    state = model.state_dict()
    with torch.no_grad():
        maps = [block(state, f"incre_modules.{i}.0", x) for i, x in enumerate(trunk(state, images()))]
        y = maps[0]
        for i in range(3):
            down = F.relu(norm(state, f"downsamp_modules.{i}.1", conv(state, f"downsamp_modules.{i}.0", y, 2)))
            y = maps[i + 1] + down
        y = F.relu(norm(state, "final_layer.1", conv(state, "final_layer.0", y)))
        y = F.adaptive_avg_pool2d(y, 1).flatten(1)
        compare(model, F.linear(y, state["classifier.weight"], state["classifier.bias"]), model(images()))


def concatenated(state: State, x: Tensor) -> Tensor:
    maps = trunk(state, x)
    up = [F.interpolate(m, maps[0].shape[2:], mode="bilinear", align_corners=False) for m in maps[1:]]
    return torch.cat([maps[0], *up], 1)


def test_segmentation_head():
    model = fill(create_model("hrnetv2_w40_seg", num_classes=5))
    state = model.state_dict()
    with torch.no_grad():
        y = F.relu(norm(state, "last_layer.1", conv(state, "last_layer.0", concatenated(state, images()))))
        got = model(images())
        compare(model, conv(state, "last_layer.3", y), got)
    assert got.shape == (2, 5, 16, 24)


def test_feature_pyramid():
    model = fill(create_model("hrnetv2p_w18", channels=8))
    state = model.state_dict()
    with torch.no_grad():
        got = model(images(64, 128))
        x = conv(state, "reduction_conv", concatenated(state, images(64, 128)))
        assert [tuple(level.shape) for level in got] == [(2, 8, 16 >> i, 32 >> i) for i in range(5)]
        for i, level in enumerate(got):
            mean = x.unfold(2, 2**i, 2**i).unfold(3, 2**i, 2**i).mean((4, 5))
            compare(model, conv(state, f"fpn_convs.{i}", mean), level)
    with pytest.raises(InputError, match="multiples of 64"):
        model(images(64, 96))
