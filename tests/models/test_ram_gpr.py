"""RAM + GPR: its numbers, its equations restated, and how it starts from HRNet."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hrpose.cost import count_cost
from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.models.hrnet import HighResolutionModule, branch_widths
from hrpose.models.ram_gpr import GradualPyramidRefinement, RamGpr, ResolutionAttentionModule, ResolutionWeights


def maps(widths, height: int = 16, width: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(height >> b, width >> b) for b in range(len(widths))]
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(widths, sizes, strict=True)]


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic away from its starting value."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(tensor + (0.5 * noise if "var" in name else 0.1 * (noise - 0.5)))
    return model.eval()


# Numbers of the paper -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "params", "gmacs", "printed_m", "printed_g"),
    [
        ("ram_gpr_w32", (192, 256), 31_402_185, 7.655, 31.4, 7.7),
        ("ram_gpr_w32", (288, 384), 31_402_185, 17.225, 31.4, 17.2),
        ("ram_gpr_w48", (192, 256), 70_032_365, 15.817, 70.0, 15.8),
        ("ram_gpr_w48", (288, 384), 70_032_365, 35.589, 70.0, 35.6),
    ],
)
def test_counts(name, size, params, gmacs, printed_m, printed_g):
    with torch.device("meta"):
        cost = count_cost(create_model(name), size)
    assert cost.params == params and round(params / 1e6, 1) == printed_m
    assert round(cost.gmacs(), 3) == gmacs and round(cost.gmacs(), 1) == printed_g


@pytest.mark.parametrize(("width", "attention", "rows"), [(32, 8_904, 769_984), (48, 13_224, 1_730_208)])
def test_parameters_of_the_parts(width, attention, rows):
    """The layer table of the refinement, the attention's 88 pairs with 176 affine values, three more exchange rows."""
    with torch.device("meta"):
        model = create_model(f"ram_gpr_w{width}")
        hrnet = create_model(f"hrnet_w{width}")
    found = [m for m in model.modules() if isinstance(m, ResolutionWeights)]
    assert len(found) == 2 + 4 * 3 + 3 * 4
    assert sum(m.omega.numel() + m.beta.numel() for m in found) == 176
    assert sum(p.numel() for m in found for p in m.parameters()) == attention
    refinement = sum(p.numel() for p in model.refinement.parameters()) + sum(
        p.numel() for p in model.heatmap.parameters()
    )
    steps = [list(model.refinement.deconvs), list(model.refinement.refines)]
    sizes = [sum(p.numel() for p in m.parameters()) for pair in zip(*steps, strict=True) for m in pair]
    table = {
        32: ([1_049_088, 113_856, 590_208, 50_816, 262_400, 20_000], 2_087_745),
        48: ([2_360_064, 255_456, 1_327_680, 113_856, 590_208, 44_700], 4_694_021),
    }
    assert (sizes, refinement) == table[width]
    names = dict(model.named_parameters())
    extra = sum(p.numel() for name, p in names.items() if name.startswith("stage4.2.fuse_layers") and name[21] != "0")
    assert extra == rows
    head = sum(p.numel() for p in hrnet.final_layer.parameters())
    total = sum(p.numel() for p in hrnet.parameters()) - head + rows + attention + refinement
    assert total == sum(p.numel() for p in names.values())


# Attention ------------------------------------------------------------------------------------------------------------


def test_weights_are_the_equations():
    """One row: pool the rescaled map, 1x1 convolution to a scalar, softmax over the inputs, affine."""
    torch.manual_seed(0)
    weights = ResolutionWeights(3, 5)
    for parameter in weights.parameters():
        nn.init.normal_(parameter)
    terms = maps((5, 5, 5))
    energies = torch.stack(
        [
            F.interpolate(x, terms[0].shape[2:], mode="nearest").mean((2, 3)) @ weights.score.weight[h, :, 0, 0]
            + weights.score.bias[h]
            for h, x in enumerate(terms)
        ],
        dim=1,
    )
    want = weights.omega * energies.exp() / energies.exp().sum(1, keepdim=True) + weights.beta
    torch.testing.assert_close(weights(terms), want)
    want_sum = (weights.omega * energies.softmax(1)).sum(1) + weights.beta.sum()
    torch.testing.assert_close(weights(terms).sum(1), want_sum)


@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_fresh_attention_is_hrnets_exchange_unit_exactly(branches, dtype, mode):
    """Zero attention weights, omega = M, beta = 0: every weight is 1, and not a bit differs."""
    torch.manual_seed(branches)
    widths = branch_widths(8, branches)
    plain = HighResolutionModule(widths, branches)
    attentive = ResolutionAttentionModule(widths, branches)
    missing = attentive.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("attention.") for name in missing)
    plain, attentive = (m.train(mode == "train").to(dtype) for m in (plain, attentive))
    inputs = [x.to(dtype) for x in maps(widths)]
    for got, want in zip(attentive(inputs), plain(inputs), strict=True):
        assert torch.equal(got, want)
    weights = attentive.attention[0]([torch.randn(2, 8, 4, 4, dtype=dtype)] * branches)
    assert (weights == 1).all()


def test_attention_weighs_every_term():
    torch.manual_seed(0)
    widths = branch_widths(4, 3)
    module = shake(ResolutionAttentionModule(widths, 3))
    inputs = maps(widths)
    with torch.no_grad():
        branched = [branch(x) for branch, x in zip(module.branches, inputs, strict=True)]
        for i, got in enumerate(module(inputs)):
            terms = [t(x) for t, x in zip(module.fuse_layers[i], branched, strict=True)]
            weights = module.attention[i](terms)
            up = [F.interpolate(t, got.shape[2:], mode="nearest") for t in terms]
            want = sum(w[:, None, None, None] * t for w, t in zip(weights.unbind(1), up, strict=True)).relu()
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            assert (weights - 1).abs().max() > 1e-3 and weights[0].tolist() != weights[1].tolist()


@pytest.mark.parametrize("refinement", [True, False])
def test_fresh_network_computes_hrnets_features(refinement):
    torch.manual_seed(0)
    hrnet = shake(create_model("hrnet_w18")).eval()
    model = RamGpr(width=18, refinement=refinement).eval()
    result = model.load_state_dict(hrnet.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.features(images)[0], hrnet.features(images)[0])
        if not refinement:
            assert not result.unexpected_keys
            assert torch.equal(model(images), hrnet(images))


# Refinement -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_refinement_is_the_equations(branches, interpolation):
    torch.manual_seed(0)
    widths = branch_widths(8, branches)
    module = shake(GradualPyramidRefinement(widths, interpolation=interpolation))
    inputs = maps(widths)
    with torch.no_grad():
        x = inputs[-1]
        for step, finer in enumerate(reversed(inputs[:-1])):
            deconv, norm, _ = module.deconvs[step]
            up = F.conv_transpose2d(x, deconv.weight, stride=2, padding=1)
            up = F.batch_norm(up, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
            options = {"align_corners": False} if interpolation == "bilinear" else {}
            x = F.interpolate(x, scale_factor=2, mode=interpolation, **options) + up
            x = module.refines[step](torch.cat([x, finer], 1))
        torch.testing.assert_close(module(inputs), x)
    assert x.shape == (2, module.channels, 16, 24)


def test_ablations():
    with torch.device("meta"):
        plain, hrnet = create_model("ram_gpr_w32", attention=False, refinement=False), create_model("hrnet_w32")
        assert plain.state_dict().keys() == hrnet.state_dict().keys()
        without = create_model("ram_gpr_w32", attention=False)
    assert sum(p.numel() for p in without.parameters()) == 31_402_185 - 8_904
    assert not any("attention" in name for name in without.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "no"}, "attention must be True or False, got 'no'"),
        ({"refinement": 1}, "refinement must be True or False, got 1"),
        ({"interpolation": "cubic"}, "interpolation must be 'bilinear' or 'nearest', got 'cubic'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        create_model("ram_gpr_w32", **options)
