"""Fused layers against the modules they were made from."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrpose import create_model
from hrpose.errors import InputError
from hrpose.models.blocks import BasicBlock, Bottleneck
from hrpose.models.fused import FusedBasicBlocks, FusedBottlenecks, FusedConv, FusedStem, fold
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


def relative_error(got, want):
    assert got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max())


@torch.no_grad()
def test_basic_blocks_equal_the_modules(isa):
    torch.manual_seed(0)
    blocks, x = randomised(nn.Sequential(BasicBlock(32), BasicBlock(32), BasicBlock(32))), torch.randn(2, 32, 9, 11)
    want = copy.deepcopy(blocks).double()(x.double())
    fused = FusedBasicBlocks.from_blocks(blocks)
    assert relative_error(fused(x), want) < 2e-5  # Winograd's F(4 x 4, 3 x 3)
    assert relative_error(FusedBasicBlocks.from_blocks(blocks.double())(x.double()), want) < 1e-13
    half = FusedBasicBlocks.from_blocks(blocks.bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half, want) < 0.05


# Layer, does a ReLU follow. Outputs that are no multiple of 16 are filled up; 512 -> 256 has the direct 3x3.
CONVS = [
    (lambda: nn.Conv2d(16, 17, 1), False),
    (lambda: nn.Conv2d(32, 48, 3, stride=2, padding=1, bias=False), True),
    (lambda: nn.Conv2d(16, 5, 3, padding=1), True),
    (lambda: nn.Conv2d(64, 64, 1, stride=3, bias=False), True),
    (lambda: nn.Conv2d(512, 256, 3, padding=1), False),
]


@torch.no_grad()
@pytest.mark.parametrize(("make", "relu"), CONVS, ids=range(len(CONVS)))
def test_a_convolution_equals_its_module(isa, make, relu):
    torch.manual_seed(0)
    layer = make()
    assert FusedConv.takes(layer)
    x, fused = torch.randn(2, layer.in_channels, 7, 10), FusedConv.from_conv(layer, relu)
    got, want = fused(x), copy.deepcopy(layer).double()(x.double())
    assert relative_error(got, F.relu(want) if relu else want) < 2e-5
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got.min() >= 0) == relu and (want.min() < 0)
    nn.init.zeros_(layer.weight)
    assert torch.equal(fused(x), got)  # weights of its own
    half = FusedConv.from_conv(make().bfloat16(), relu)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == got.shape


@torch.no_grad()
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "bias"), [(7, 2, False), (3, 2, True), (5, 1, True)])
def test_a_stem_equals_its_modules(isa, kernel, stride, bias, pool):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 32, kernel, stride, kernel // 2, bias=bias)
    assert FusedStem.takes(layer)
    images, fused = torch.randn(2, 3, 15, 22), FusedStem.from_conv(layer, pool)
    want = F.relu(copy.deepcopy(layer).double()(images.double()))
    want = F.max_pool2d(want, 3, 2, 1) if pool else want
    assert relative_error(fused(images), want) < 2e-6


def test_what_is_taken():
    taken = [nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(32, 1, 1, stride=2), nn.Conv2d(16, 16, (3, 3), (2, 2), (1, 1))]
    left = [
        nn.Conv2d(17, 16, 1),
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, (1, 3), padding=(0, 1)),
        nn.Conv2d(16, 16, 3, (1, 2), padding=1),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(16, 16, 1),
        nn.Linear(16, 16),
    ]
    assert all(map(FusedConv.takes, taken)) and not any(map(FusedConv.takes, left))
    taken = [nn.Conv2d(3, 16, 7, 2, 3), nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(3, 32, 1)]
    left = [
        nn.Conv2d(3, 24, 7, 2, 3),
        nn.Conv2d(1, 16, 7, 2, 3),
        nn.Conv2d(3, 48, 3, padding=1, groups=3),
        nn.Conv2d(3, 16, 9, padding=4),
        nn.Conv2d(3, 16, 7, 2, 2),
        nn.Conv2d(3, 16, 7, (2, 1), 3),
        nn.Conv2d(3, 16, 3, padding=2, dilation=2),
        nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(3, 16, 3, padding=1),
    ]
    assert all(map(FusedStem.takes, taken)) and not any(map(FusedStem.takes, left))


MODULES = {  # name -> drawn anew at every call, and the channels of its input
    "FusedBottlenecks": (lambda: FusedBottlenecks.from_blocks([randomised(Bottleneck(32, 16, 32))]), 32),
    "FusedBasicBlocks": (lambda: FusedBasicBlocks.from_blocks([randomised(BasicBlock(32))]), 32),
    "FusedConv": (lambda: FusedConv.from_conv(nn.Conv2d(32, 17, 3, padding=1), True), 32),
    "FusedStem": (lambda: FusedStem.from_conv(nn.Conv2d(3, 32, 7, 2, 3), True), 3),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_each_is_a_module(isa, name):
    torch.manual_seed(0)
    make, channels = MODULES[name]
    fused, x = make(), torch.randn(2, channels, 9, 7)
    want, file = fused(x), io.BytesIO()
    assert type(fused).__name__ == name and not list(fused.parameters()) and not want.requires_grad
    other = make()
    assert not torch.equal(other(x), want)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), want)
    torch.save(fused, file)
    file.seek(0)
    saved, copied = torch.load(file, weights_only=False), copy.deepcopy(fused)
    for buffer in fused.buffers():
        buffer.zero_()
    for module in (saved, copied):
        assert torch.equal(module(x), want)
    assert not torch.equal(fused(x), want)
    assert torch.equal(torch.compile(other, fullgraph=True, backend="eager")(x), want)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(other, (x,), dynamic_shapes=[{0: batch}]).module()
    assert close(exported(torch.cat((x, x))), torch.cat((want, want)))
    assert other.to("meta")(x.to("meta")).shape == want.shape


@pytest.mark.parametrize("name", MODULES)
def test_each_names_mistakes(name):
    make, channels = MODULES[name]
    fused, x = make(), torch.zeros(1, channels, 8, 8)
    with pytest.raises(InputError, match=rf"^{name}: mode must be eval\(\), got train\(\)"):
        fused.train()(x)
    with pytest.raises(InputError, match=rf"^{name}: dtype must stay torch.float32, got torch.float64: convert, then"):
        fused.eval().double()(x.double())


def test_basic_blocks_of_other_kinds_are_refused():
    with pytest.raises(InputError, match=r"^FusedBasicBlocks: block 1 must be a BasicBlock, got Bottleneck"):
        FusedBasicBlocks.from_blocks([BasicBlock(16), Bottleneck(16, 16, 16)])
    with pytest.raises(InputError, match=r"out width must be a multiple of 16, got 18"):
        FusedBasicBlocks.from_blocks([BasicBlock(18)])
