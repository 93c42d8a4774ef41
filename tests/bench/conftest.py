"""What tests of the benchmark share."""

import pytest
import torch


@pytest.fixture
def not_compiled(monkeypatch):
    """torch.compile gives back what it is given: compiling takes longer than all else in these tests."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **settings: function)
