"""``torch.compile`` for training, and one sentence instead of a traceback where it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hrpose.errors import InputError


def compiled(model: nn.Module, wanted: bool) -> nn.Module:
    """What to call instead of `model`, whose weights it shares; the names in the model's state dict stay."""
    return torch.compile(model) if wanted else model


@contextmanager
def compile_failure_as_input_error(wanted: bool) -> Iterator[None]:
    """Around the calls: there the network is compiled, with a compiler that may be missing."""
    if not wanted:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    try:
        yield
    except TorchDynamoException as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"compile: torch.compile failed ({reason}); train with compile=false") from error
