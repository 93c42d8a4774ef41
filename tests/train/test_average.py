"""The moving average of weights, against its definition in float64."""

import copy

import torch

from hrpose.models import create_model
from hrpose.train.average import Average


def test_average_is_its_definition():
    torch.manual_seed(0)
    model = create_model("dpn1_32", 5)
    average = Average(model, 0.5)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 12):
        for name, value in model.state_dict().items():
            value.add_(1 if name.endswith("tracked") else torch.randn_like(value))
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    assert decay == 0.5 and average.steps == 11
    for name, value in average.model.state_dict().items():
        if name.endswith("tracked"):
            assert value == 11
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_average_shares_nothing_with_the_network():
    model = create_model("dpn1_32", 5).to(memory_format=torch.channels_last)
    before = copy.deepcopy(model.state_dict())
    average = Average(model, 0.9)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    assert average.model.hrpose_config == model.hrpose_config
    for value in model.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in average.model.state_dict().items())
