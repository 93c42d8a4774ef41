"""Emulated kernels under AddressSanitizer and UndefinedBehaviorSanitizer, which see what changes no result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def sanitized(compiler):
    """Runs tests of this folder with sanitizers in the kernels."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.check_output([compiler[0], f"-print-file-name={name}"], text=True).strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler[0]} has no {name}")
        libraries.append(path)
    # Python itself leaks.
    changes = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "HRPOSE_EMULATION_FLAGS": flags}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE), *arguments]
        return subprocess.run(command, env=os.environ | changes, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_kernels_are_clean(sanitized):
    done = sanitized("-k", "not planted")  # kernels with bugs are for the emulator to find
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_planted_overrun_is_found(sanitized):
    done = sanitized("-s", "-m", "slow", "-k", "test_decode and one and many")
    assert "ERROR: AddressSanitizer: heap-" in done.stderr  # overflow, or freed memory beyond it
