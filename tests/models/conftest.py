"""What the tests of several networks share."""

import pytest
import torch
from torch import nn


def _randomise(model: nn.Module, images: torch.Tensor) -> None:
    """Batch norms in which every value matters: those of the images' statistics, disturbed. With any others the maps of
    a deep network hardly depend on its input."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
        for module in model.eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 0.1 * module.running_var.sqrt() * torch.randn_like(module.running_mean)
                module.running_var *= torch.empty_like(module.running_var).uniform_(0.7, 1.4)


@pytest.fixture
def randomise():
    """The function above, for tests to call."""
    return _randomise
