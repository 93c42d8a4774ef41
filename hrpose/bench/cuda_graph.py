"""Our calls on CUDA as torch.compile's best mode runs others': captured once, then replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hrpose.bench.case import OURS, Case


def enter_ours(case: Case, name: str, call: Callable[[], Any], device: torch.device) -> None:
    """Enter the call as it is; on CUDA its graph too, unless it cannot be captured because it waits for the card."""
    case.enter(name, OURS, call)
    if device.type == "cuda":
        case.invite(f"{name}, CUDA graph", OURS, lambda: captured(call))


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays the call on the same memory and returns the outputs, which the next replay overwrites."""
    side = torch.cuda.Stream()  # capturing wants everything that is set up on first use to be there already
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
