"""The inference form: the same numbers from every kind of network, nothing of the original touched."""

import copy
import io
import sys
import threading

import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.models import create_model, is_pose_model, list_models
from hrpose.models.dpn import DPN
from hrpose.models.fused import Fused, FusedBasicBlocks, FusedBottlenecks, FusedConv, FusedStem
from hrpose.models.hrnet import HRNet
from hrpose.models.resnet import BLOCKS
from hrpose.ops import _ext
from hrpose.optimize import optimize

needs_native = pytest.mark.skipif(not _ext.isas(), reason=str(_ext.why_reference()))
LIGHT = "dpn1_32 hrnet_w18 simple_baseline_r50 hourglass1 cpn_r50".split()
EACH = [pytest.param(name, marks=[] if name in LIGHT else [pytest.mark.slow]) for name in list_models()]


def trained(name: str, **options) -> nn.Module:
    """A network whose batch norms have weights, biases and statistics of their own, as after training."""
    torch.manual_seed(0)
    return as_after_training(create_model(name, 5 if is_pose_model(name) else None, **options))


def as_after_training(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
            nn.init.normal_(module.bias, 0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(model: nn.Module, n: int = 2) -> torch.Tensor:
    side = max(32, model.size_multiple)
    return torch.randn(n, 3, 2 * side, side, generator=torch.Generator().manual_seed(1))


def tensors(output) -> tuple[torch.Tensor, ...]:
    return (output,) if isinstance(output, torch.Tensor) else output


@pytest.mark.parametrize("name", EACH)
def test_same_numbers(name):
    model = trained(name)
    before = copy.deepcopy(model.state_dict())
    fast = optimize(model)
    with torch.no_grad():
        for got, want in zip(tensors(fast(images(model))), tensors(model(images(model))), strict=True):
            assert ((got - want).norm() / want.norm()).item() < 2e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    left = [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    in_front = [m for m in model.modules() if type(m).__name__ == "PreActivationBottleneck"]
    assert len(left) == len(in_front)  # the batch norm before an hourglass's first convolution has nothing to go into
    assert fast.hrpose_config == model.hrpose_config and fast.size_multiple == model.size_multiple
    assert not fast.training and not any(p.requires_grad for p in fast.parameters())


@needs_native
def test_chains_of_bottlenecks_are_fused():
    fast = optimize(trained("dpn4_64"))
    assert all(isinstance(part, FusedBottlenecks) for part in (fast.conv1, fast.conv2, fast.dpm))
    assert isinstance(optimize(trained("hrnet_w18")).layer1, FusedBottlenecks)


@needs_native
@torch.no_grad()
def test_the_last_block_before_a_strided_reduction_computes_what_it_reads():
    """A quarter of the pixels; where the reduction has no stride, all of them."""
    model = trained("dpn1_32")
    fast, x = optimize(model), torch.randn(1, 64, 18, 12)
    assert [len(part.dilations) for part in fast.conv1] == [2, 1] and fast.reduce[0].stride == 1
    want = model.conv1(x)
    assert fast.conv1(x).shape == (1, 256, 9, 6)
    torch.testing.assert_close(fast.conv1(x), want[:, :, ::2, ::2], rtol=0, atol=2e-5 * float(want.abs().max()))
    assert model.reduce[0].stride == (2, 2) and model.conv1[2].conv2.stride == (1, 1)
    for same in (trained("dpn1_32", resolution="high"), trained("dpn1_64")):
        assert isinstance(optimize(same).conv1, FusedBottlenecks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    model = trained("dpn1_32").to(dtype)
    x = images(model).to(dtype)
    with torch.no_grad():
        got, want, exact = optimize(model)(x), model(x), copy.deepcopy(model).double()(x.double())
    assert got.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(got, want)
    else:  # folded weights are rounded once more, but there are fewer roundings in between
        errors = [((y.double() - exact).norm() / exact.norm()).item() for y in (got, want)]
        assert errors[0] < 1.5 * errors[1]


def test_compiles_and_exports():
    model = trained("dpn1_32")
    fast, x = optimize(model), images(model)
    with torch.no_grad():
        want = fast(x)
        torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="eager")(x), want)
        exported = torch.export.export(fast, (x,), dynamic_shapes={"images": {0: torch.export.Dim("n", min=1, max=64)}})
        torch.testing.assert_close(exported.module()(images(model, 3))[:2], fast(images(model, 3))[:2])


def test_an_optimized_network_stays_as_it_is():
    fast = optimize(trained("dpn1_32"), torch.bfloat16)
    assert optimize(fast) is fast and optimize(fast, torch.bfloat16) is fast
    with pytest.raises(InputError, match=r"optimize: dtype must be torch.bfloat16, in which this model was opt"):
        optimize(fast, torch.float32)


def test_training_mode_is_refused():
    with pytest.raises(InputError, match=r"optimize: model must be in eval mode \(model.eval\(\)\), got one in tr"):
        optimize(create_model("dpn1_32"))


def test_a_wrong_copy_is_noticed(monkeypatch):
    """A kernel that is off by little on every value."""
    forward = FusedBottlenecks.forward
    monkeypatch.setattr(FusedBottlenecks, "forward", lambda self, x: forward(self, x) * 1.01)
    if not _ext.isas():
        pytest.skip("the native module is not installed")
    with pytest.raises(RuntimeError, match="the inference form differs from the model by"):
        optimize(trained("dpn1_32"))


HEADS = [
    {"interpolation": "bilinear"},
    {"interpolation": "nearest"},
    {"upsample": "plain"},
    {"upsample": "plain", "interpolation": "nearest"},
    {"resolution": "high"},
    {"resolution": "high", "final_upsample": 1},
    {"resolution": "high", "final_upsample": 1, "upsample": "plain"},
]


@torch.no_grad()
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_merged_heads(options):
    """One convolution in front of the up-sampling instead of one on either side, exactly: in float64."""
    torch.manual_seed(0)
    model = as_after_training(DPN(5, modules=1, width=32, **options)).double()
    nn.init.normal_(model.heatmap.weight, std=0.1)
    nn.init.normal_(model.heatmap.bias)
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    fast, want = optimize(model), model(x)
    got = fast(x)
    assert got.shape == want.shape and float((got - want).abs().max() / want.abs().max()) < 1e-13
    convs = [m for m in fast.upsample if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size) for m in convs] == [(128, 5, (1, 1))]
    assert isinstance(fast.heatmap, nn.Identity) and isinstance(fast.upsample[-1], nn.Upsample)


@needs_native
@pytest.mark.parametrize("width", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_all_of_hrnet_is_fused(width):
    torch.manual_seed(0)
    fast = optimize(as_after_training(HRNet(5, width=width)))
    left = [name for name, m in fast.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    assert not left
    assert isinstance(fast.conv1, FusedStem) and not fast.conv1.pool and fast.conv1.stride == 2
    assert isinstance(fast.conv2, FusedConv) and fast.conv2.relu and fast.conv2.stride == 2
    assert isinstance(fast.layer1, FusedBottlenecks) and isinstance(fast.final_layer, FusedConv)
    assert fast.final_layer.outputs == 5 and not fast.final_layer.relu
    for stage, modules, branches in ((fast.stage2, 1, 2), (fast.stage3, 4, 3), (fast.stage4, 3, 4)):
        assert len(stage) == modules and all(len(module.branches) == branches for module in stage)
        for module in stage:
            assert all(isinstance(branch, FusedBasicBlocks) for branch in module.branches)
            assert [len(branch.weights) for branch in module.branches] == [8] * branches  # four blocks of two


@needs_native
def test_stems_pool(monkeypatch):
    """A network's first convolution, ReLU and pooling are one op, whatever holds them."""
    monkeypatch.setitem(BLOCKS, 50, (1, 1, 1, 1))
    for name, attribute in (("dpn1_32", "conv0"), ("simple_baseline_r50", "conv1")):
        fast = optimize(trained(name))
        (stem,) = [m for m in fast.modules() if isinstance(m, FusedStem)]
        assert stem.pool and stem is getattr(fast, attribute)
        assert not [m for m in fast.modules() if isinstance(m, nn.MaxPool2d)]


@needs_native
def test_weights_lie_side_by_side():
    """In the order of the modules, at cache lines, in one piece of memory that begins at a huge page."""
    fast = optimize(trained("dpn1_32"))
    packed = [getattr(m, name) for m in fast.modules() if isinstance(m, Fused) for name in m.packed]
    begins, ends = [t.data_ptr() for t in packed], [t.data_ptr() + t.nbytes for t in packed]
    assert len(packed) >= 6 and begins[0] % _ext.HUGE_PAGE == 0 and not any(begin % 64 for begin in begins)
    assert all(0 <= begin - end < 64 for end, begin in zip(ends, begins[1:], strict=False))
    assert len({t.untyped_storage().data_ptr() for t in packed}) == 1


@torch.no_grad()
def test_it_is_a_module():
    """Copied, saved and loaded, it gives the same; and shares no weights with what it came from."""
    model = trained("dpn1_32")
    fast, x, file = optimize(model), images(model), io.BytesIO()
    want = fast(x)
    torch.save(fast, file)
    file.seek(0)
    copies = {"deepcopy": copy.deepcopy(fast), "file": torch.load(file, weights_only=False)}
    copies["state dict"] = optimize(create_model("dpn1_32", 5).eval())
    copies["state dict"].load_state_dict(copy.deepcopy(fast.state_dict()))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    assert torch.equal(fast(x), want) and want.any()
    for tensor in fast.state_dict().values():
        tensor.zero_()
    for name, other in copies.items():
        assert torch.equal(other(x), want), name
    assert not torch.equal(fast(x), want)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_of_python_do_not_meet(dtype):
    """Kernels run without the interpreter's lock, each thread with a workspace of its own."""
    fast, calls = optimize(trained("dpn1_32").to(dtype)), 12
    inputs = [torch.randn(1, 3, 64, 48).to(dtype) for _ in range(2)]
    wants, wrong, done = [fast(x) for x in inputs], [], []
    start = threading.Barrier(len(inputs))

    @torch.no_grad()
    def call(x, want):
        start.wait()
        for _ in range(calls):
            (done if torch.equal(fast(x), want) else wrong).append(want)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, wants, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(done) == calls * len(inputs) and not torch.equal(*wants)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_break_in_the_graph(dtype):
    """HRNet has every fused layer but pooling."""
    torch.manual_seed(0)
    model = as_after_training(HRNet(5, width=16)).to(dtype)
    fast, x = optimize(model), torch.randn(1, 3, 64, 32).to(dtype)
    with torch.no_grad():
        assert torch.equal(torch.compile(fast, fullgraph=True, backend="eager")(x), fast(x))


@torch.no_grad()
def test_float32_by_tf32_is_not_refused(monkeypatch):
    """As cuDNN multiplies by default: both factors of every convolution with 11 significant bits. The check, told that
    this is a card, has to allow for it."""
    convolve = nn.functional.conv2d

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def tf32(x, weight, *rest):
        return convolve(rounded(x.contiguous()), rounded(weight.contiguous()), *rest)

    model = trained("dpn1_32")
    fast = optimize(model)  # float32 kernels
    x = images(model)
    exact = fast(x)
    monkeypatch.setattr(nn.functional, "conv2d", tf32)
    error = ((model(x) - exact).norm() / exact.norm()).item()
    module = sys.modules[optimize.__module__]
    on_cpu, on_card = (module._tolerance(torch.float32, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_cpu < error < on_card / 2
