"""Fused bottlenecks against the modules they were made from."""

import pytest
import torch
from torch import nn

from hrpose import create_model
from hrpose.errors import InputError
from hrpose.models.blocks import BasicBlock, Bottleneck
from hrpose.models.fused import FusedBottlenecks, fold
from hrpose.ops import BottleneckWeights, pack_bottlenecks


@pytest.fixture
def blocks():
    """Two bottlenecks, the first with stride and projection, with statistics as training leaves them."""
    torch.manual_seed(0)
    chain = nn.Sequential(Bottleneck(32, 16, 64, stride=2, dilation=2), Bottleneck(64, 16, 64, dilation=3))
    return randomised(chain)


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.2, 1.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def close(got, want):
    return got.shape == want.shape and float((got - want).abs().max() / want.abs().max()) < 4e-6


@torch.no_grad()
def test_equals_the_modules(isa, blocks):
    x = torch.randn(2, 32, 9, 11)
    assert close(FusedBottlenecks.from_blocks(blocks)(x), blocks(x))
    half = FusedBottlenecks.from_blocks(blocks, torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), blocks(x), rtol=0.05, atol=0.05)
    net = randomised(create_model("dpn1_64"))
    for part, channels in ((net.conv1, 64), (net.conv2, 256), (net.dpm[0], 256)):
        x = torch.randn(1, channels, 24, 16)
        assert close(FusedBottlenecks.from_blocks(part)(x), part.double()(x.double()))
        part.float()


def test_gradient_in_x(isa, blocks):
    x, fused = torch.randn(1, 32, 5, 4, requires_grad=True), FusedBottlenecks.from_blocks(blocks)
    (want,), (got,) = (torch.autograd.grad(model(x).square().sum(), x) for model in (blocks, fused))
    assert close(got, want) and float(want.abs().max()) > 0


@torch.no_grad()
def test_it_is_a_module(blocks, tmp_path):
    fused, x = FusedBottlenecks.from_blocks(blocks), torch.randn(2, 32, 8, 6)
    want = fused(x)
    assert not list(fused.parameters()) and set(fused.state_dict()) == {"weights", "biases", "winograd"}
    other = FusedBottlenecks.from_blocks(randomised(blocks))  # draws anew
    assert not torch.equal(other(x), want)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), want)
    assert torch.equal(torch.compile(fused, fullgraph=True, backend="eager")(x), want)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(fused, (x,), dynamic_shapes=[{0: batch}]).module()
    assert close(exported(torch.cat((x, x))), torch.cat((want, want)))
    assert fused.to("meta")(x.to("meta")).shape == want.shape


def test_a_state_dict_of_another_layout_is_refused():
    chain = nn.Sequential(Bottleneck(64, 32, 64)).bfloat16().eval()
    fused = FusedBottlenecks.from_blocks(chain)
    (weights,), dilations = [BottleneckWeights(*map(as_bfloat16, w)) for w in fold(chain)], [1]
    other = FusedBottlenecks(pack_bottlenecks([weights], dilations, 1, "fragments"))
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        other.load_state_dict(fused.state_dict())
    with pytest.raises(InputError, match=r"^bottlenecks: layout of weights on cpu must be 'panels', got 'fragments'"):
        other(torch.zeros(1, 64, 4, 4, dtype=torch.bfloat16))


def as_bfloat16(tensor):
    return None if tensor is None else tensor.bfloat16()


def test_folding_by_hand():
    """One channel value: w 2, batch norm (x - 3) / sqrt(3.99999 + 1e-5) * 5 + 7 = 5 w x / 2 - 7.5 + 7."""
    chain = nn.Sequential(Bottleneck(16, 16, 16))
    norm = chain[0].bn2
    nn.init.constant_(chain[0].conv2.weight, 2)
    for tensor, value in ((norm.weight, 5), (norm.bias, 7), (norm.running_mean, 3), (norm.running_var, 4 - norm.eps)):
        nn.init.constant_(tensor, value)
    (folded,) = fold(chain)
    assert folded.projection is None
    assert torch.allclose(folded.w2, torch.tensor(5.0).double(), atol=1e-6)
    assert torch.allclose(folded.b2, torch.tensor(-0.5).double(), atol=1e-6)


def test_mistakes_are_named(blocks):
    fused = FusedBottlenecks.from_blocks(blocks)
    x = torch.zeros(1, 32, 4, 4)
    with pytest.raises(InputError, match=r"^FusedBottlenecks: mode must be eval\(\), got train\(\)"):
        fused.train()(x)
    with pytest.raises(InputError, match=r"dtype must stay torch.float32, got torch.bfloat16: convert, then optimize"):
        fused.eval().bfloat16()(x.bfloat16())
    wrong = [
        (nn.Sequential(), "blocks must be at least one, got none"),
        (nn.Sequential(BasicBlock(16)), "block 0 must be a Bottleneck, got BasicBlock"),
        (nn.Sequential(Bottleneck(16, 16, 32, stride=2, stride_in="1x1")), r"the 3x3 of block 0, got \(2, 1\)"),
        (nn.Sequential(*blocks, Bottleneck(64, 16, 64, stride=2)), r"block 2 must have its stride.*got \(1, 2\)"),
    ]
    for chain, message in wrong:
        with pytest.raises(InputError, match=f"^FusedBottlenecks: .*{message}"):
            FusedBottlenecks.from_blocks(chain)
    with pytest.raises(InputError, match=r"^bottlenecks: mid width must be a multiple of 16, got 8"):
        FusedBottlenecks.from_blocks(nn.Sequential(Bottleneck(32, 8, 32)))
