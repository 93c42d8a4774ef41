"""Whether several threads help: where other processes hold the cores, OpenMP's threads wait for one another in vain."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F


def slowdown_of_threads(budget_s: float = 0.5) -> float:
    """How many times longer a convolution takes with torch's threads than with one; 1 where there is one thread.

    Below 1 they help. Two threads on a machine with one free core have been measured to be 30 times slower than one.
    Leaves the number of threads as it was, and the random generators alone.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return 1.0
    images, kernel = torch.ones(4, 64, 64, 48), torch.ones(64, 64, 3, 3)  # 0.5 G multiply-adds
    images = images.contiguous(memory_format=torch.channels_last)
    times = {}
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            times[count] = _median_seconds(images, kernel, budget_s / 2)
    finally:
        torch.set_num_threads(threads)
    return times[threads] / times[1]


@torch.inference_mode()
def _median_seconds(images: torch.Tensor, kernel: torch.Tensor, budget_s: float) -> float:
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < budget_s and len(taken) < 9):
        started = time.perf_counter()
        F.conv2d(images, kernel, padding=1)
        taken.append(time.perf_counter() - started)
    return sorted(taken)[len(taken) // 2]
