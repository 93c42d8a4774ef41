"""Small batches as CUDA graphs: all layers of a network in one launch, where launches take longer than layers."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Graphs are made for these batches; others up to the largest are filled up to the next. Four persons and their mirror
# images; in larger batches the layers take longer than their launches.
SIZES = (1, 2, 4, 8)

Network = Callable[[Tensor], Tensor]


class Captured(NamedTuple):
    """A network on fixed memory: `replay` reads `images` and overwrites `heatmaps`."""

    images: Tensor
    replay: Callable[[], None]
    heatmaps: Tensor


class Device(Protocol):
    """What `Graphed` asks of a device that has graphs."""

    def capture(self, network: Network, images: Tensor) -> Captured:
        """The network on this memory. Raises: RuntimeError where it cannot be captured, or memory is short."""

    def turn(self) -> AbstractContextManager[None]:
        """Within it, what is launched follows whatever was launched in earlier turns, on their streams."""


class Graphed:
    """A network that gives the same heatmaps, small batches by graphs that are captured when first met.

    Args:
        network: images (N, 3, H, W) -> heatmaps, each image's by itself, without waiting for the device.
        device: see `Cuda`.
    Threads may share it: one after the other they have its memory, which is freed with it.
    """

    def __init__(self, network: Network, device: Device) -> None:
        self.network = network
        self.reason: str | None = None  # why there are no graphs, once one could not be captured
        self._device, self._lock = device, threading.Lock()
        self._captured: dict[tuple, Captured] = {}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        n = len(images)
        size = next((size for size in SIZES if n <= size), None)
        if n and size is not None and self.reason is None:
            with self._lock, self._device.turn():
                captured = self._graph(images, size)
                if captured is not None:
                    captured.images[:n].copy_(images)  # rows behind are of an earlier batch, and nobody looks at theirs
                    captured.replay()
                    return captured.heatmaps[:n].clone()
        return self.network(images)

    def _graph(self, images: Tensor, size: int) -> Captured | None:
        """Made on the first call for images like these; None where that fails, which is said once."""
        key = size, images.shape[1:], images.dtype
        if key not in self._captured and self.reason is None:
            room = torch.zeros((size, *images.shape[1:]), dtype=images.dtype, device=images.device)
            try:
                room = room.contiguous(memory_format=torch.channels_last)
                self._captured[key] = self._device.capture(self.network, room)
            except RuntimeError as error:
                self.reason = str(error).partition("\n")[0] or type(error).__name__
                self._captured.clear()
                warnings.warn(f"hrpose: no CUDA graphs, layers are launched one by one: {self.reason}", stacklevel=4)
        return self._captured.get(key)


class Cuda:
    """Graphs of one CUDA device. They share memory, for no two of them run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()
        self._side = torch.cuda.Stream(device)  # one for all captures: cuBLAS keeps workspace for every stream it meets

    def capture(self, network: Network, images: Tensor) -> Captured:
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            self._side
        ):  # capturing wants everything that is set up on first use to be there already
            for _ in range(2):
                network(images)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may go on, for example to wait for results of theirs.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            heatmaps = network(images)
        torch.cuda.current_stream().wait_stream(self._side)
        return Captured(images, graph.replay, heatmaps)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)
