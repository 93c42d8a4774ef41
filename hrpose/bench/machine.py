"""What a measurement is worthless without: processor, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hrpose.bench.case import Settings
from hrpose.ops import _ext

PACKAGES = ("torch", "numpy", "onnxruntime", "openvino", "opencv-python-headless")


def describe(settings: Settings, hrpose_version: str) -> dict[str, Any]:
    """Plain values for a report's head."""
    device = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else "cpu"
    return {
        "hrpose": hrpose_version,
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device,
        "isa": _ext.isa(),
        "threads": settings.threads,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def format_machine(found: dict[str, Any], peaks: dict[str, float]) -> str:
    packages = ", ".join(f"{name} {found[name] or 'missing'}" for name in PACKAGES)
    at = f" at {found['commit']}" if found["commit"] else ""
    plural = "s" if found["threads"] > 1 else ""
    lines = [
        f"hrpose {found['hrpose']}{at}, Python {found['python']}, {packages}",
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} thread{plural}, "
        f"kernels: {found['isa'] or 'none, the native module is missing'}",
        *([] if found["device"] == "cpu" else [found["device"]]),
        f"measured peaks: {', '.join(f'{value:.0f} {name}' for name, value in peaks.items())}",
    ]
    return "\n".join(lines)


def cpu_name() -> str:
    """As Linux knows it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def commit() -> str | None:
    """Of the checkout that runs, with "+" if it was changed since; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
