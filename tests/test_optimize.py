"""The inference form: the same numbers from every kind of network, nothing of the original touched."""

import copy

import pytest
import torch
from torch import nn

from hrpose.errors import InputError
from hrpose.models import create_model, is_pose_model, list_models
from hrpose.models.fused import FusedBottlenecks
from hrpose.ops import _ext
from hrpose.optimize import optimize

LIGHT = "dpn1_32 hrnet_w18 simple_baseline_r50 hourglass1 cpn_r50".split()
EACH = [pytest.param(name, marks=[] if name in LIGHT else [pytest.mark.slow]) for name in list_models()]


def trained(name: str, **options) -> nn.Module:
    """A network whose batch norms have weights, biases and statistics of their own, as after training."""
    torch.manual_seed(0)
    model = create_model(name, 5 if is_pose_model(name) else None, **options)
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


@pytest.mark.skipif(not _ext.isas(), reason="the native module is not installed")
def test_chains_of_bottlenecks_are_fused():
    fast = optimize(trained("dpn4_64"))
    assert all(isinstance(part, FusedBottlenecks) for part in (fast.conv1, fast.conv2, fast.dpm))
    assert isinstance(optimize(trained("hrnet_w18")).layer1, FusedBottlenecks)


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
