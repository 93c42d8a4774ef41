"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, which see what changes no result.

By hand, in a scratch copy of the checkout, since a module that is built so loads under the sanitizers alone:

    export CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
    HRPOSE_CUDA=0 LDFLAGS="-fsanitize=address,undefined" python setup.py build_ext --inplace
    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
    ASAN_OPTIONS=detect_leaks=0 python -m pytest tests/ops
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
SANITIZERS = "-fsanitize=address,undefined"
COPIED = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "csrc", "hrpose", "tests")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs Python, with these arguments, in a copy of the checkout with sanitizers in its native module."""
    if CXX is None or not sys.platform.startswith("linux") or not (ROOT / "setup.py").is_file():
        pytest.skip("not a source checkout on Linux with a C++ compiler")
    for name in ("setuptools", "pybind11"):
        pytest.importorskip(name)
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{CXX} has no {name}")
        libraries.append(path)
    folder = tmp_path_factory.mktemp("sanitized")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    flags = f"{SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
    build = {"HRPOSE_CUDA": "0", "CXX": CXX, "CXXFLAGS": flags, "LDFLAGS": SANITIZERS}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=os.environ | build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Python itself leaks.
    changes = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(folder)}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HRPOSE_")}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=inherited | changes, capture_output=True, text=True)

    return run


def test_kernels_are_clean(sanitized):
    done = sanitized("-c", "from hrpose.ops import _ext; print(_ext.native().__file__, _ext.report()['reason'])")
    assert "/sanitized" in done.stdout and done.stdout.endswith(" None\n"), done.stdout + done.stderr
    done = sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops")
    assert done.returncode == 0, done.stdout + done.stderr


SHORT = """
import torch
from hrpose.ops import _ext, conv, pack_conv

def workspace(size):
    memory = torch.empty(size // 2, dtype=torch.uint8)
    return memory, memory.data_ptr()

_ext.workspace, _ext._direct = workspace, None
conv(torch.zeros(1, 16, 8, 8), pack_conv(torch.zeros(16, 16, 3, 3), torch.zeros(16)))
"""


def test_a_short_workspace_is_found(sanitized):
    done = sanitized("-c", SHORT)
    assert done.returncode != 0 and "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
