"""What this machine can do at most, measured: arithmetic and bandwidth that a row's share of the peak refers to."""

from __future__ import annotations

import torch

from hrpose.bench.case import DTYPES
from hrpose.bench.timing import measure, stopwatch_for

MEMORY_BYTES = 256 * 2**20  # a stream that no core's share of a cache holds
_MOST_BYTES = 2**30
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices: large enough for PyTorch's best speed, small enough to be quick


class Peaks:
    """Ceilings of a device with torch's present number of threads, each measured once, when first asked for.

    Arithmetic: PyTorch's product of square matrices, which oneDNN or cuBLAS bring within some percent of what the
    multiply-add units (with bfloat16 also AVX-512 BF16, AMX or tensor cores) do at most. Bandwidth: PyTorch's sum of as
    many bytes as the row touches, so that a row which lives in a cache is compared with that cache. Both take the 10th
    percentile of the times.

    A share may exceed 100 %: Winograd's convolutions do with fewer multiplications than are counted, exact tap skipping
    with fewer still, and a kernel that fetches ahead reads faster than the sum.
    """

    def __init__(self, device: torch.device, seconds: float = 0.4):
        self.device, self.seconds = device, seconds
        self._gflops: dict[str, float] = {}
        self._gbs: dict[int, float] = {}

    def gflops(self, dtype: str) -> float:
        """GFLOP/s in "fp32" or "bf16"."""
        if dtype not in self._gflops:
            side = _SIDE[self.device.type]
            # At random: cards take less power for equal numbers, and then run faster than they ever do on maps.
            a, b = torch.rand(2, side, side, device=self.device).sub(0.5).to(DTYPES[dtype])
            out = torch.empty_like(a)
            self._gflops[dtype] = 2 * side**3 / self._seconds_of(lambda: torch.mm(a, b, out=out)) / 1e9
        return self._gflops[dtype]

    def gbs(self, nbytes: float) -> float:
        """GB/s of reading about that many bytes (on CUDA always memory's: small ones would measure the launch)."""
        least = 4096 if self.device.type == "cpu" else _MOST_BYTES
        size = 2 ** (min(max(int(nbytes), least), _MOST_BYTES) - 1).bit_length()  # few sizes: most rows share one
        if size not in self._gbs:
            values = torch.ones(size // 4, device=self.device)
            self._gbs[size] = size / self._seconds_of(values.sum) / 1e9
        return self._gbs[size]

    def report(self, dtypes: tuple[str, ...] = ("fp32",)) -> dict[str, float]:
        """For a header: GFLOP/s per dtype, and GB/s of memory."""
        found = {f"{dtype} GFLOP/s": self.gflops(dtype) for dtype in dtypes}
        return {**found, "memory GB/s": self.gbs(MEMORY_BYTES)}

    def _seconds_of(self, function) -> float:
        return measure({"": function}, self.seconds, stopwatch=stopwatch_for(self.device))[""].p10 / 1e3
