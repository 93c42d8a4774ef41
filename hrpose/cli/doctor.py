"""`hrpose doctor`: what is installed, what the kernels use, and why an op runs on the reference."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import hrpose
from hrpose.ops import _ext
from hrpose.ranks import backends
from hrpose.train.step import resolve_precision
from hrpose.train.threads import slowdown_of_threads

PACKAGES = ("torch", "numpy", "pillow", "pycocotools", "tqdm")
SWITCHES = ("HRPOSE_EXT", "HRPOSE_ISA", "HRPOSE_CUDA_BOTTLENECKS")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="versions, instruction set, CUDA, and why an op runs without a kernel")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    found = diagnose()
    print(json.dumps(found) if options.json else format_diagnosis(found))


def diagnose() -> dict[str, Any]:
    """Everything a bug report needs, as plain values."""
    native = _ext.report()
    on_cuda = "torch sees no CUDA device"
    if torch.cuda.is_available():
        on_cuda = _ext.why_reference(torch.empty(0, device="cuda"), cuda=True)
    return {
        "hrpose": hrpose.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "threads_speedup": round(1 / slowdown_of_threads(), 2),
        "precision": resolve_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "native": native,
        "torch_cuda": torch.version.cuda,
        "cuda": _ext.cuda_probe(),
        "reference": {
            "cpu": _ext.why_reference(torch.empty(0)),
            "cuda": on_cuda,
        },
        "distributed": backends(),
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
    }


def format_diagnosis(found: dict[str, Any]) -> str:
    native, cuda = found["native"], found["cuda"]
    lines = [
        f"hrpose {found['hrpose']}, Python {found['python']}, {found['platform']}",
        "packages    " + ", ".join(f"{name} {number}" for name, number in found["packages"].items()),
        f"threads     {found['threads']}{_judge_threads(found)}; training precision by default: {found['precision']}",
    ]
    if native["native"]:
        openmp = "with OpenMP" if native["openmp"] else "without OpenMP: one thread"
        lines.append(f"native      yes, {openmp}")
        lines.append(
            f"instructions {native['isa'] or 'none: ' + str(native['reason'])} (of {', '.join(native['isas'])})"
        )
    else:
        lines.append(f"native      no: {native['reason']}")
    lines.append(f"CUDA build  {'for ' + ', '.join(native['cuda_archs']) if native['cuda'] else 'no'}")
    for device in cuda["devices"]:
        code = f"runs our sm_{device['code_arch'] // 10} code" if device["code_arch"] else f"problem: {device['error']}"
        capability = ".".join(map(str, device["capability"]))
        lines.append(f"CUDA card   {device['name']}, compute capability {capability}, {code}")
    lines.append(
        f"CUDA        {cuda['problem'] or 'driver {}.{}, runtime {}.{}'.format(*cuda['driver'], *cuda['runtime'])}"
    )
    lines.append(f"torch CUDA  {found['torch_cuda'] or 'this torch is a CPU build'}")
    lines.append(f"distributed {', '.join(found['distributed']) or 'no: this torch is built without'}")
    for device, reason in found["reference"].items():
        where = f"ops on {device.upper()}"
        lines.append(f"{where:<11} {'our kernels' if reason is None else 'PyTorch reference: ' + reason}")
    for name, value in found["environment"].items():
        lines.append(f"{name} = {value}")
    return "\n".join(lines)


def _judge_threads(found: dict[str, Any]) -> str:
    if found["threads"] == 1:
        return ""
    busy = "" if found["threads_speedup"] > 0.7 else ": other processes use the cores, try OMP_NUM_THREADS=1"
    return f", {found['threads_speedup']} times as fast as one now{busy}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
