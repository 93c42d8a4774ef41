"""The exponential moving average of a network's weights: less noisy than the weights of any one step."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Average:
    """A network whose weights, and statistics of batch norm, are the average of another's over the steps.

        a <- d a + (1 - d) w,    d = min(decay, (1 + n) / (10 + n)) in step n

    The smaller d of the first steps lets the start, which is random, be forgotten in a short run too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model` after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            pair = by_type.setdefault(mine.dtype, ([], []))
            pair[0].append(mine)
            pair[1].append(theirs)
        for dtype, (mine, theirs) in by_type.items():  # in one call per type, see BufferCopy
            if dtype.is_floating_point:
                torch._foreach_lerp_(mine, theirs, 1 - decay)
            else:
                torch._foreach_copy_(mine, theirs)
