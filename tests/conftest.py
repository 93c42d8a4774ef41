"""Fixtures every test may use: instruction sets, a seeded generator, the folder of real data."""

import os
from pathlib import Path

# Before torch is loaded, for this process and those it starts: the tests' networks are too small for threads to help,
# and on a machine with one busy core OpenMP's spinning makes two threads 30 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from hrpose.ops import _ext


@pytest.fixture(params=_ext.isas() or [None], ids=lambda name: name or "reference")
def isa(request: pytest.FixtureRequest):
    """Runs the test once per instruction set of this machine, once on the reference where there is no native module."""
    if request.param is None:
        yield None
        return
    before = _ext.isa()
    _ext.set_isa(request.param)
    yield request.param
    _ext.set_isa(before)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors of the test are; on CUDA only where there is a card."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with coco_mini/ and opencv4_crops/: $HRPOSE_DATA, or shared/data beside the checkout."""
    named = os.environ.get("HRPOSE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "coco_mini").is_dir():
        pytest.skip(f"real data not found: set HRPOSE_DATA to a folder with coco_mini/ (looked in {folder})")
    return folder
