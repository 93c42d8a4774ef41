"""Where a network's time goes: its kernels with hrpose.optimize and with torch.compile, and the time by the clock.

    python3 benchmarks/profile_network.py dpn4_64 --batch 128
    HRPOSE_CUDA_BOTTLENECKS=wgmma python3 benchmarks/profile_network.py dpn4_64 --batch 128 --ours

Where the clock shows much more than the kernels do, launching them is the bottleneck; else the table begins with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hrpose.bench import measure
from hrpose.bench.case import DTYPES, Settings
from hrpose.bench.cuda_graph import captured
from hrpose.bench.engines import COMPILE, compiled
from hrpose.bench.networks import input_size, trained
from hrpose.bench.run import settled
from hrpose.bench.timing import stopwatch_for
from hrpose.models.fold import fold_batch_norms
from hrpose.models.fused import FusedBottlenecks
from hrpose.optimize import optimize

OURS = "hrpose.optimize"
CALLS = 10
LINES = 15  # of a table
WIDTH = 88  # of a kernel's name


def kernels(call: Callable[[], object], device: torch.device) -> list[tuple[str, float, float]]:
    """(name, microseconds, launches) per call of each kernel, the longest first; on a CPU of PyTorch's operators."""
    on_card = device.type == "cuda"
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]) as found:
        for _ in range(CALLS):
            call()
        if on_card:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if on_card else DeviceType.CPU
    # Annotations span kernels, which count by themselves.
    events = [
        e for e in found.key_averages() if e.device_type == wanted and not getattr(e, "is_user_annotation", False)
    ]
    times = [(e.key, e.self_device_time_total if on_card else e.self_cpu_time_total, e.count) for e in events]
    rows = [(name, time / CALLS, count / CALLS) for name, time, count in times if time]
    return sorted(rows, key=lambda row: -row[1])


def table(title: str, rows: list[tuple[str, float, float]], clocks: dict[str, float]) -> str:
    """clocks: milliseconds per call, by how it is called."""
    total, launches = sum(row[1] for row in rows), sum(row[2] for row in rows)
    clock = ", ".join(f"{1e3 * ms:.0f} us {name}" for name, ms in clocks.items())
    lines = [f"{title}: {total:.0f} us in {launches:.0f} kernels; by the clock {clock}"]
    lines += [f"{us:9.1f} us {us / total:6.1%} {count:6.1f} x  {name[:WIDTH]}" for name, us, count in rows[:LINES]]
    rest = rows[LINES:]
    if rest:
        us = sum(row[1] for row in rest)
        lines.append(f"{us:9.1f} us {us / total:6.1%} {sum(row[2] for row in rest):6.1f} x  {len(rest)} others")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--ours", action="store_true", help="without torch.compile, which tunes for minutes")
    parser.add_argument("--run", action="store_true", help="only call ours a few times, under another profiler")
    options = parser.parse_args()
    device, dtype = options.device, DTYPES[options.dtype]
    width, height = input_size(options.network)
    model = trained(options.network).to(device)
    images = torch.randn(options.batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(device, dtype, memory_format=torch.channels_last)
    with settled(Settings(torch.get_num_threads(), device=device)):
        fast = optimize(model, dtype)
        if options.run:
            for _ in range(3):
                fast(images)
            return
        fold_batch_norms(model)
        model = model.to(dtype).to(memory_format=torch.channels_last)
        theirs = compiled(model, device, [images])
        calls = {OURS: lambda: fast(images)} | ({} if options.ours else {COMPILE: lambda: theirs(images)})
        layouts = sorted({module.layout for module in fast.modules() if isinstance(module, FusedBottlenecks)})
        for name, call in calls.items():
            kind = f" ({', '.join(layouts)})" if name == OURS and layouts else ""
            title = f"{name}{kind}, {options.network} {options.batch}x3x{height}x{width} {options.dtype}"
            ways = {"a call": call}
            if device.type == "cuda" and name == OURS:
                ways["in a CUDA graph"] = captured(call)
            clocks = {way: t.median for way, t in measure(ways, stopwatch=stopwatch_for(device)).items()}
            print(table(title, kernels(call, device), clocks), flush=True)


if __name__ == "__main__":
    main()
