"""One step: parts of a batch, clipping, weighted joints, scaled losses, and what does not count as one."""

import math

import pytest
import torch
from torch import nn

from hrpose.checkpoint import digest
from hrpose.data.dataset import Sample
from hrpose.data.targets import gaussian_targets
from hrpose.errors import InputError
from hrpose.models import create_model
from hrpose.train.loss import joint_weights
from hrpose.train.step import StepOptions, resolve_precision, train_step

CPU = torch.device("cpu")


def plain_network() -> nn.Module:
    """Stride 4, no batch norm, float64."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 5, 1)]
    return nn.Sequential(*layers).double()


def persons(count: int = 7) -> Sample:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=generator).double()
    visible = (torch.rand(count, 5, generator=generator) < 0.8).float()
    return Sample(images, torch.rand(count, 5, 2, generator=generator) * 32, visible, torch.arange(count))


def after(steps: int, options: StepOptions, lr: float = 0.1) -> tuple[nn.Module, list[float]]:
    model = plain_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, [train_step(model, optimizer, persons(), CPU, options) for _ in range(steps)]


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [2, 3, 7, 9])
@pytest.mark.parametrize("hard_keypoints", [None, 2])
def test_parts_of_a_batch_make_the_same_step(accumulate, hard_keypoints):
    """7 persons in 2, 3 and 7 parts of unlike sizes; 9 are more than there are persons."""
    whole, losses = after(4, StepOptions(1.0, hard_keypoints=hard_keypoints))
    parts, their_losses = after(4, StepOptions(1.0, hard_keypoints=hard_keypoints, accumulate=accumulate))
    assert largest_difference(whole, parts) < 1e-14 and largest_difference(whole, plain_network()) > 1e-4
    assert their_losses == pytest.approx(losses, rel=1e-13)


def test_gradient_is_clipped_to_its_norm():
    """Without momentum the first step is lr times the gradient, whose norm is then the limit, or its own if smaller."""

    @torch.no_grad()
    def difference(one: nn.Module, other: nn.Module) -> torch.Tensor:
        return torch.cat([(a - b).flatten() for a, b in zip(one.parameters(), other.parameters(), strict=True)])

    def moved(clip_norm: float | None) -> torch.Tensor:
        model, _ = after(1, StepOptions(1.0, clip_norm=clip_norm), lr=1.0)
        return difference(plain_network(), model)

    free = moved(None)
    assert moved(1e9).equal(free)
    clipped = moved(0.25 * float(free.norm()))
    torch.testing.assert_close(clipped, 0.25 * free, rtol=1e-12, atol=1e-15)


def test_weighted_joints():
    names = ("nose", "left_elbow", "right_wrist", "relb", "lank", "Knee_L")
    assert joint_weights(names).tolist() == pytest.approx([1, 1.2, 1.5, 1.2, 1.5, 1.2])
    with pytest.raises(InputError, match=r"weighted_joints: is for skeletons with elbows, .* got tip, base"):
        joint_weights(("tip", "base"))
    factors = torch.tensor([1.0, 1.2, 1.5, 1.2, 1.5])
    _, (loss,) = after(1, StepOptions(1.0, joint_weights=factors))
    batch = persons()
    targets, weights = gaussian_targets(batch.joints, batch.visible, (8, 8), 1.0, 4)
    difference = ((plain_network()(batch.image) - targets) * (weights * factors)[:, :, None, None]).square()
    assert loss == pytest.approx(0.5 * float(difference.detach().mean()), rel=1e-6)


class Scaler:
    """What train_step uses of torch.amp.GradScaler, which needs CUDA; its gradients beyond 1e5 overflow, as in fp16."""

    def __init__(self, scale: float) -> None:
        self.value, self.unscaled, self.updates = scale, 0, []

    def scale(self, loss):
        return loss * self.value

    def unscale_(self, optimizer):
        self.unscaled += 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.where(p.grad.abs() > 1e5, math.inf, p.grad) / self.value

    def get_scale(self):
        return self.value

    def update(self, value=None):
        self.updates.append(value)
        self.value = self.value / 2 if value is None and len(self.updates) == self.unscaled else self.value


def test_scaled_losses_give_the_same_step():
    whole, losses = after(3, StepOptions(1.0))
    model, scaler = plain_network(), Scaler(1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = StepOptions(1.0, accumulate=2, clip_norm=1e6)
    found = [train_step(model, optimizer, persons(), CPU, options, scaler=scaler) for _ in range(3)]
    assert largest_difference(whole, model) < 1e-14 and found == pytest.approx(losses, rel=1e-13)
    assert scaler.unscaled == len(scaler.updates) == 3


def batch_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return create_model("dpn1_32", 5).train()


def test_overflow_of_the_scaler_is_no_bad_data():
    """Nothing changes, the scale is lowered, the loss is finite; at a scale of 1 the gradient itself is too large."""
    model, batch = batch_norm_network(), persons()._replace(image=persons().image.float())
    optimizer = torch.optim.Adam(model.parameters())
    before = digest(model.state_dict())
    scaler = Scaler(1e12)
    assert math.isfinite(train_step(model, optimizer, batch, CPU, StepOptions(1.0), scaler=scaler))
    assert digest(model.state_dict()) == before and scaler.updates == [None]
    model.heatmap.register_forward_hook(lambda module, given, out: out + (out - out.detach()).abs().sqrt())
    scaler = Scaler(1.0)
    assert math.isnan(train_step(model, optimizer, batch, CPU, StepOptions(1.0), scaler=scaler))
    assert digest(model.state_dict()) == before and scaler.updates == [1.0]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_bad_data_changes_nothing(accumulate, scaled):
    """Whichever part of the batch it is in; and the scale, about which it says nothing, stays."""
    model, batch = batch_norm_network(), persons()._replace(image=persons().image.float())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    options = StepOptions(1.0, accumulate=accumulate, clip_norm=1.0)
    assert train_step(model, optimizer, batch, CPU, options) > 0
    before = digest([model.state_dict(), optimizer.state_dict()])
    for person in (0, 6):
        image = batch.image.clone()
        image[person, 0, 0, 0] = math.inf
        scaler = Scaler(1024.0) if scaled else None
        assert math.isnan(train_step(model, optimizer, batch._replace(image=image), CPU, options, scaler=scaler))
        assert digest([model.state_dict(), optimizer.state_dict()]) == before
        assert scaler is None or scaler.updates == [1024.0]


def test_half_precision_needs_a_device_for_it():
    assert resolve_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(InputError, match="precision: fp16 needs a CUDA device, cpu computes in bf16 or fp32"):
        resolve_precision("fp16", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_card():
    """The scale starts too high for these losses' gradients, is lowered without a bad step, and the network learns."""
    device = torch.device("cuda")
    model = batch_norm_network().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    batch = persons()._replace(image=persons().image.float())
    losses = [
        train_step(model, optimizer, batch, device, StepOptions(1.0, "fp16", accumulate=2), scaler=scaler)
        for _ in range(80)
    ]
    assert all(math.isfinite(loss) for loss in losses) and losses[-1] < 0.5 * losses[0]
    assert 1 < scaler.get_scale() < 2.0**40
