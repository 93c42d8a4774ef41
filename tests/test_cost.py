"""Parameter and multiply-accumulate counts: by hand and from the layer table of the Dilation Pyramid Net."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hrpose.cost import Cost, count_cost
from hrpose.errors import InputError
from hrpose.models import create_model


def meta_model(name: str, num_keypoints: int = 17, **options) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, num_keypoints, **options)


def table_one(
    modules: int, c: int, keypoints: int, size: tuple[int, int], high: bool = False, upsample: int = 2
) -> tuple[int, int]:
    """Parameters and multiply-accumulates of Table I, layer by layer, with the up-sampling unit 1x1 + batch norm."""
    quarter = size[0] // 4 * (size[1] // 4)
    middle = quarter if high else quarter // 4
    trunk = 4 * c
    convs = [(7 * 7 * 3 * 64, 4 * quarter, 64)]  # (weights, output pixels, channels of the batch norm)
    for i in range(3):
        convs += [((64 if i == 0 else 256) * 64, quarter, 64), (9 * 64 * 64, quarter, 64), (64 * 256, quarter, 256)]
    convs += [(64 * 256, quarter, 256)]
    if c == 64:
        for i in range(4):
            entry = (256 * 128, quarter, 128) if i == 0 else (512 * 128, middle, 128)
            convs += [entry, (9 * 128 * 128, middle, 128), (128 * 512, middle, 512)]
        convs += [(256 * 512, middle, 512), (512 * trunk, middle, trunk)]
    else:
        convs += [(256 * trunk, middle, trunk)]
    for _ in range(6 * modules):
        convs += [(trunk * c, middle, c), (9 * c * c, middle, c), (c * trunk, middle, trunk)]
    convs += [(trunk * trunk, middle, trunk)]
    params = sum(weights + 2 * channels for weights, _, channels in convs) + trunk * keypoints + keypoints
    macs = sum(weights * pixels for weights, pixels, _ in convs) + trunk * keypoints * middle * upsample**2
    return params, macs


# The papers' figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [32, 64])
@pytest.mark.parametrize("modules", [1, 2, 3, 4])
@pytest.mark.parametrize(("size", "keypoints"), [((192, 256), 17), ((256, 256), 16), ((288, 384), 17)])
def test_counts_equal_the_layer_table(modules, c, size, keypoints):
    name = f"dpn{modules}_{c}"
    cost = count_cost(meta_model(name, keypoints), size)
    assert (cost.params, cost.macs) == table_one(modules, c, keypoints, size)
    assert cost.macs_deconv_output_grid == cost.macs


@pytest.mark.parametrize(
    ("name", "options", "keypoints", "size", "params", "gmacs"),
    [
        # Three decimals of the specification's counts; "unit" column and the DPN_32 family.
        ("dpn1_64", {}, 17, (192, 256), 2.069, 2.106),
        ("dpn2_64", {}, 17, (192, 256), 2.492, 2.405),
        ("dpn3_64", {}, 17, (192, 256), 2.914, 2.704),
        ("dpn4_64", {}, 17, (192, 256), 3.337, 3.003),
        ("dpn1_64", {"resolution": "high"}, 17, (192, 256), 2.069, 5.993),
        ("dpn2_64", {"resolution": "high"}, 17, (192, 256), 2.492, 7.189),
        ("dpn3_64", {"resolution": "high"}, 17, (192, 256), 2.914, 8.384),
        ("dpn4_64", {"resolution": "high"}, 17, (192, 256), 3.337, 9.579),
        ("dpn4_64", {}, 16, (256, 256), 3.336, 4.003),
        ("dpn1_32", {}, 17, (192, 256), 0.384, 0.833),
        ("dpn2_32", {}, 17, (192, 256), 0.491, 0.908),
        ("dpn3_32", {}, 17, (192, 256), 0.597, 0.983),
        ("dpn4_32", {}, 17, (192, 256), 0.704, 1.057),
        ("dpn4_32", {}, 16, (256, 256), 0.704, 1.409),
        # The other readings: no convolution before the x2, no x2 at high resolution.
        ("dpn4_64", {"upsample": "plain"}, 17, (192, 256), 3.270, 2.956),
        ("dpn1_64", {"upsample": "plain"}, 17, (192, 256), None, 2.060),
        ("dpn4_32", {"upsample": "plain"}, 17, (192, 256), 0.688, 1.046),
        ("dpn1_64", {"resolution": "high", "upsample": "plain", "final_upsample": 1}, 17, (192, 256), None, 5.769),
        ("dpn4_64", {"resolution": "high", "upsample": "plain", "final_upsample": 1}, 17, (192, 256), 3.270, 9.354),
        ("dpn1_64", {"resolution": "high", "final_upsample": 1}, 17, (192, 256), None, 5.96),
        ("dpn4_64", {"resolution": "high", "final_upsample": 1}, 17, (192, 256), None, 9.54),
    ],
)
def test_counts_of_the_specification(name, options, keypoints, size, params, gmacs):
    cost = count_cost(meta_model(name, keypoints, **options), size)
    assert params is None or round(cost.params / 1e6, 3) == params
    assert round(cost.gmacs(), len(str(gmacs).split(".")[1])) == gmacs


def test_high_resolution_counts_equal_the_layer_table():
    for upsample in (2, 1):
        model = meta_model("dpn3_64", resolution="high", final_upsample=upsample)
        cost = count_cost(model, (192, 256))
        assert (cost.params, cost.macs) == table_one(3, 64, 17, (192, 256), high=True, upsample=upsample)


@pytest.mark.parametrize("name", ["dpn2_32", "dpn1_64"])
def test_dilation_scheme_costs_nothing(name):
    """Tables II, III and V compare at equal cost."""
    costs = [count_cost(meta_model(name, dilation=d), (192, 256)) for d in ("pyramid", "reversed", 1, 2, 4, 6, 8)]
    assert all(cost == costs[0] for cost in costs)


def test_cost_of_one_module():
    """1.2834e9 multiply-accumulates at 64x48 for C = 64."""
    four, three = (count_cost(meta_model(f"dpn{n}_64", resolution="high"), (192, 256)) for n in (4, 3))
    assert four.macs - three.macs == 417_792 * 64 * 48 == 1_283_457_024
    assert four.params - three.params == 422_400


# The counter ----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Grouped, dilated and strided convolutions, two transposed ones, a layer called twice, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (3, 5), stride=2, padding=(1, 2), bias=True)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.up_grouped = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.linear = nn.Linear(4, 5)

    def forward(self, x):
        x = self.norm(self.grouped(self.grouped(self.conv(x))))
        x = self.up_grouped(self.up(x))
        return self.linear(x.movedim(1, -1))


def test_mixed_network_by_hand():
    model = Mixed()
    cost = count_cost(model, (12, 16))
    quarter, full, double = 8 * 6, 16 * 12, 32 * 24  # pixels after conv, up, up_grouped
    exact = {
        "conv": 8 * 3 * 15 * quarter,
        "grouped": 8 * 2 * 9 * quarter,
        "up": 8 * 6 * 16 * quarter,
        "up_grouped": 6 * 2 * 9 * full,
        "linear": 4 * 5 * double,
    }
    assert [(layer.name, layer.macs) for layer in cost.layers] == [
        (name, exact[name]) for name in ("conv", "grouped", "grouped", "up", "up_grouped", "linear")
    ]
    assert cost.macs == sum(exact.values()) + exact["grouped"]
    assert cost.macs_deconv_output_grid == cost.macs + 3 * (exact["up"] + exact["up_grouped"])
    assert cost.params == 368 + 152 + 16 + 774 + 112 + 25


def test_deconvolution_head_of_simple_baseline():
    """Three 4x4 stride-2 deconvolutions from 8x6: the output grid charges four times the true count."""
    with torch.device("meta"):
        up = [nn.ConvTranspose2d(256, 256, 4, 2, 1, bias=False) for _ in range(3)]
        model = nn.Sequential(nn.Conv2d(3, 256, 1, stride=32), *up)
    cost = count_cost(model, (192, 256))
    first = 3 * 256 * 48
    exact = 256 * 256 * 16 * (8 * 6 + 16 * 12 + 32 * 24)
    assert (cost.macs, cost.macs_deconv_output_grid) == (first + exact, first + 4 * exact)
    assert cost.gmacs(deconv="output_grid") == (first + 4 * exact) / 2**30
    assert cost.gmacs(10**9) == (first + exact) / 1e9


@pytest.mark.parametrize("name", ["dpn2_32", "dpn1_64"])
def test_equals_hooks_on_a_real_run(name):
    """Every output value of a convolution costs the weights of one filter."""
    model = create_model(name, 5).eval()
    macs = 0

    def add(module, args, out):
        nonlocal macs
        macs += out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 48))
    seen = macs
    assert count_cost(model, (48, 64)).macs == seen
    assert macs == seen  # the counter does not run the model's own hooks


def test_equals_torch_flop_counter():
    """torch counts two floating-point operations per multiply-accumulate."""
    # At 1/8 of 512 pixels no dilation reaches the size of the map, so every tap is computed.
    for model, side in ((meta_model("dpn1_64"), 512), (Mixed(), 32)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
        assert counter.get_total_flops() == 2 * count_cost(model, (side, side)).macs


def test_model_is_left_alone():
    model = create_model("dpn1_32").train()
    model.conv0.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    tensors = {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}

    def check_unchanged():
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert {name: id(t) for name, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())

    cost = count_cost(model, (8, 8))  # one pixel per channel: batch norm in training mode would refuse it
    assert cost.params == sum(p.numel() for p in model.parameters())
    check_unchanged()
    with pytest.raises(InputError, match="multiples of 8"):
        count_cost(model, (48, 60))
    check_unchanged()


def test_tied_parameters_count_once():
    first, second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
    second.weight = first.weight
    cost = count_cost(nn.Sequential(first, second), (2, 2))
    assert (cost.params, cost.macs) == (9, 2 * 9 * 4)


def test_half_precision_model():
    assert count_cost(create_model("dpn1_32").bfloat16(), (192, 256)).macs == 894_566_400


def test_wrong_arguments():
    cost = Cost(1, 2, 3, ())
    with pytest.raises(InputError, match=r"unit must be 2\*\*30 or 10\*\*9, got 1000"):
        cost.gmacs(1000)
    with pytest.raises(InputError, match="deconv must be 'exact' or 'output_grid', got 'input'"):
        cost.gmacs(deconv="input")
    for size in ((192,), (192, 0), (192.0, 256)):
        with pytest.raises(InputError, match="size must be two integers >= 1"):
            count_cost(Mixed(), size)


def test_training_counts_the_heads_that_only_training_runs():
    """CPN's global heatmaps: four heads of 1x1 256 -> 256 and 3x3 256 -> 17, at 1/4 to 1/32 of the image."""
    model = meta_model("cpn_r50")
    pixels = sum((256 >> level) * (192 >> level) for level in (2, 3, 4, 5))
    difference = count_cost(model, (192, 256), training=True).macs - count_cost(model, (192, 256)).macs
    assert difference == (256 * 256 + 9 * 256 * 17) * pixels
    assert count_cost(meta_model("dpn1_32"), (192, 256), training=True).macs == 894_566_400
