"""The losses against the official JointsMSELoss and JointsOHKMMSELoss, restated as loops, and in a training step."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hrpose.data.dataset import Sample
from hrpose.data.targets import gaussian_targets
from hrpose.errors import InputError
from hrpose.train.loss import heatmap_mse, heatmap_ohkm, supervised_loss
from hrpose.train.step import StepOptions, train_step


def official(heatmaps: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """SimpleBaseline's and HRNet's JointsMSELoss in float64: half the mean of each joint, masked ones among them."""
    n, joints, height, width = heatmaps.shape
    total = 0.0
    for k in range(joints):
        squares = 0.0
        for i in range(n):
            for y in range(height):
                for x in range(width):
                    squares += (weights[i, k] * heatmaps[i, k, y, x] - weights[i, k] * targets[i, k, y, x]) ** 2
        total += 0.5 * squares / (n * height * width)
    return total / joints


@pytest.fixture
def batch(rng):
    shape = (3, 5, 7, 4)
    heatmaps, targets = rng.standard_normal(shape), rng.random(shape)
    weights = np.array([[1, 0, 1, 1.5, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], float)
    return [torch.from_numpy(a).float() for a in (heatmaps, targets, weights)]


def test_value(batch):
    expected = official(*(t.double().numpy() for t in batch))
    assert float(heatmap_mse(*batch)) == pytest.approx(expected, rel=1e-6)


def test_gradient(batch):
    """dL/dP = w^2 (P - G) / (N K H W)."""
    heatmaps, targets, weights = batch
    heatmaps.requires_grad_()
    heatmap_mse(heatmaps, targets, weights).backward()
    expected = weights[:, :, None, None] ** 2 * (heatmaps.detach() - targets) / heatmaps.numel()
    torch.testing.assert_close(heatmaps.grad, expected)
    assert not heatmaps.grad[1].any() and not heatmaps.grad[:, 4].any()
    inputs = heatmaps.detach().double().requires_grad_()
    step = 1e-3  # float32 inside: the finite difference of a quadratic is exact at any step
    change = torch.zeros_like(inputs)
    change[0, 0, 2, 1] = step
    with torch.no_grad():
        slope = (
            (heatmap_mse(inputs + change, targets, weights) - heatmap_mse(inputs - change, targets, weights)) / 2 / step
        )
    assert float(slope) == pytest.approx(float(expected[0, 0, 2, 1]), abs=1e-4)


def test_bf16_heatmaps_are_compared_in_float32(batch):
    heatmaps, targets, weights = batch
    loss = heatmap_mse(heatmaps.bfloat16(), targets, weights)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(
        official(*(t.double().numpy() for t in (heatmaps.bfloat16(), targets, weights))), rel=1e-6
    )


def test_hidden_joints_count_in_the_mean():
    heatmaps, targets = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    assert float(heatmap_mse(heatmaps, targets, torch.ones(1, 4))) == 0.5
    assert float(heatmap_mse(heatmaps, targets, torch.tensor([[1.0, 0, 0, 0]]))) == 0.125


def test_wrong_shapes(batch):
    heatmaps, targets, weights = batch
    with pytest.raises(InputError, match=r"heatmap_mse: targets must be \(3, 5, 7, 4\), got \(3, 5, 7, 3\)"):
        heatmap_mse(heatmaps, targets[..., :3], weights)
    with pytest.raises(InputError, match=r"heatmap_mse: weights must be \(3, 5\), got \(3, 4\)"):
        heatmap_mse(heatmaps, targets, weights[:, :4])


# Several outputs, hard keypoints --------------------------------------------------------------------------------------


def official_ohkm(heatmaps: np.ndarray, targets: np.ndarray, weights: np.ndarray, hard: int) -> float:
    """HRNet's JointsOHKMMSELoss in float64: of each person the mean of the largest joint losses."""
    total = 0.0
    for person, target, weight in zip(heatmaps, targets, weights, strict=True):
        losses = [0.5 * np.mean((w * p - w * t) ** 2) for p, t, w in zip(person, target, weight, strict=True)]
        total += sum(sorted(losses)[-hard:]) / hard
    return total / len(heatmaps)


@pytest.mark.parametrize("hard", [1, 2, 3, 5])
def test_value_of_hard_keypoints(batch, hard):
    expected = official_ohkm(*(t.double().numpy() for t in batch), hard)
    assert float(heatmap_ohkm(*batch, hard)) == pytest.approx(expected, rel=1e-6)
    assert (float(heatmap_mse(*batch)) == pytest.approx(expected, rel=1e-6)) == (hard == 5)


def test_only_the_hardest_keypoints_have_a_gradient(batch):
    """dL/dP = w^2 (P - G) / (N M H W) for the M hardest joints of each person; a hidden joint is easier than any."""
    heatmaps, targets, weights = batch
    heatmaps[0, 3] = 100.0  # weight 1.5
    heatmaps[0, 1] = 1000.0  # hidden
    heatmaps[2, 2] = -50.0
    heatmaps.requires_grad_()
    heatmap_ohkm(heatmaps, targets, weights, 1).backward()
    expected = torch.zeros_like(heatmaps)
    with torch.no_grad():
        for person, joint in ((0, 3), (2, 2)):
            error = heatmaps[person, joint] - targets[person, joint]
            expected[person, joint] = weights[person, joint] ** 2 * error / (3 * 1 * 7 * 4)
    torch.testing.assert_close(heatmaps.grad, expected)  # the second person has no visible joint


@pytest.mark.parametrize("hard", [0, 6])
def test_number_of_hard_keypoints_is_that_of_joints_at_most(batch, hard):
    message = rf"heatmap_ohkm: hard_keypoints must be 1\.\.5, the number of joints, got {hard}"
    with pytest.raises(InputError, match=message):
        heatmap_ohkm(*batch, hard)


def test_hard_keypoints_of_wrong_shapes(batch):
    heatmaps, targets, weights = batch
    with pytest.raises(InputError, match=r"heatmap_ohkm: targets must be \(3, 5, 7, 4\), got \(3, 5, 6, 4\)"):
        heatmap_ohkm(heatmaps, targets[:, :, :6], weights, 2)
    with pytest.raises(InputError, match=r"heatmap_ohkm: weights must be \(3, 5\), got \(2, 5\)"):
        heatmap_ohkm(heatmaps, targets, weights[:2], 2)


@pytest.mark.parametrize("hard", [None, 2])
def test_losses_of_all_outputs_are_added_and_the_last_one_looks_for_the_hard_keypoints(batch, rng, hard):
    heatmaps, targets, weights = batch
    outputs = [torch.from_numpy(rng.standard_normal(heatmaps.shape)).float() for _ in range(2)] + [heatmaps]
    wanted, shown = targets.double().numpy(), weights.double().numpy()
    losses = [official(output.double().numpy(), wanted, shown) for output in outputs]
    if hard is not None:
        losses[-1] = official_ohkm(heatmaps.double().numpy(), wanted, shown, hard)
    assert float(supervised_loss(outputs, targets, weights, hard)) == pytest.approx(sum(losses), rel=1e-6)
    alone = supervised_loss([heatmaps], targets, weights, hard)
    assert float(alone) == pytest.approx(losses[-1], rel=1e-6)


class TwoOutputs(nn.Module):
    """Two heatmap heads of stride 4; the first divides by `divisor`."""

    def __init__(self, divisor: float = 1.0):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 5, 4, 4), nn.Conv2d(3, 5, 4, 4)
        self.divisor = divisor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(images) / self.divisor, self.last(images)


@pytest.fixture
def persons(rng):
    joints = torch.from_numpy(rng.uniform(0, 32, (2, 5, 2))).float()
    visible = torch.tensor([[1.0, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
    images = torch.from_numpy(rng.standard_normal((2, 3, 32, 32))).float()
    return Sample(images, joints, visible, torch.arange(2))


@pytest.mark.parametrize("hard", [None, 3])
def test_step_of_a_model_with_two_outputs(persons, hard):
    torch.manual_seed(0)
    model = TwoOutputs()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        first, last = (output.double().numpy() for output in model(persons.image))
    targets, weights = (t.double().numpy() for t in gaussian_targets(persons.joints, persons.visible, (8, 8), 1.0, 4))
    expected = official(first, targets, weights)
    expected += official(last, targets, weights) if hard is None else official_ohkm(last, targets, weights, hard)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = train_step(model, optimizer, persons, torch.device("cpu"), StepOptions(1.0, hard_keypoints=hard))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_step_is_skipped_if_any_output_is_not_finite(persons):
    model = TwoOutputs(divisor=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = train_step(model, optimizer, persons, torch.device("cpu"), StepOptions(1.0))
    assert loss != loss
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_step_with_more_hard_keypoints_than_joints_changes_nothing(persons):
    model = TwoOutputs()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"hard_keypoints must be 1\.\.5, the number of joints, got 8"):
        train_step(model, optimizer, persons, torch.device("cpu"), StepOptions(1.0, hard_keypoints=8))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
