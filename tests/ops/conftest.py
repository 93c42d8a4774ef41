"""What the tests of several ops share."""

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from hrpose.ops import _ext

# The sanitizer sees the end of memory by itself, and nothing of what is written into a fence.
FENCE = 0 if "libasan" in os.environ.get("LD_PRELOAD", "") else 4096  # bytes
MARGIN = 256  # values


@pytest.fixture
def fenced_workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel's workspace ends where the kernel said, at a fence that must stay whole, and begins as NaN: what is read
    before it is written shows in a result. Ops go the long way, on which this workspace is asked for."""
    fences: list[torch.Tensor] = []

    def check() -> None:
        while fences:
            assert fences.pop().eq(255).all(), "a kernel wrote beyond its workspace"

    def workspace(size: int) -> tuple[torch.Tensor, int]:
        check()
        memory = torch.full((size + FENCE,), 255, dtype=torch.uint8)
        fences.append(memory[size:])
        return memory, memory.data_ptr()

    monkeypatch.setattr(_ext, "workspace", workspace)
    monkeypatch.setattr(_ext, "_direct", None)
    yield
    check()


@pytest.fixture
def random_maps(rng: np.random.Generator) -> Callable[..., torch.Tensor]:
    """random_maps(n, c, h, w): normal float32 values, channels_last, with NaN on both sides of them in memory."""

    def random_maps(n: int, c: int, h: int, w: int) -> torch.Tensor:
        maps = torch.full((n * h * w * c + 2 * MARGIN,), torch.nan)[MARGIN:-MARGIN].view(n, h, w, c).permute(0, 3, 1, 2)
        return maps.copy_(torch.from_numpy(rng.normal(size=(n, c, h, w))))

    return random_maps


@pytest.fixture
def compiles_and_exports() -> Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], None]:
    """compiles_and_exports(function, x): a function of a batch is the same in one graph of the compiler, and exported
    with a batch of any size; x holds two."""

    def compiles_and_exports(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
        want = function(x)
        assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), want)

        class Module(torch.nn.Module):
            forward = staticmethod(function)

        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(Module(), (x,), dynamic_shapes=[{0: batch}])
        three = torch.cat((x, x[:1]))
        assert torch.equal(exported.module()(x), want) and torch.equal(exported.module()(three), function(three))

    return compiles_and_exports
