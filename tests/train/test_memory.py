"""Memory that is kept between steps: page faults and mapped blocks are counted."""

import ctypes
import os
import resource
import subprocess
import sys

import pytest
import torch

from hrpose.train import memory
from hrpose.train.memory import memory_kept

needs_glibc = pytest.mark.skipif(
    memory._set_by_user() or not hasattr(memory._glibc(), "mallinfo2"), reason="needs glibc 2.33 by its own rules"
)


def faults_of_a_block() -> int:
    """Page faults of taking and dropping 64 MB; the least of nine, since the heap may have to grow for some."""
    faults = []
    for _ in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(64 << 20, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)


class MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def is_mapped(size: int = 1 << 30) -> bool:
    """Whether glibc maps a block of `size` by itself, which it unmaps when the block is freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    before = mallinfo2().hblks
    block = torch.empty(size, dtype=torch.uint8)
    return mallinfo2().hblks == before + block.ndim


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_blocks() -> None:
    assert faults_of_a_block() >= 32 and is_mapped()  # 32 where the system gives pages of 2 MB to everyone
    before = resident()
    with memory_kept() as kept:
        assert kept
        assert faults_of_a_block() < 8
        assert resident() > before + (50 << 20)
        with memory_kept() as inner:  # the end of an inner one does not end the outer
            assert not inner
        assert faults_of_a_block() < 8 and not is_mapped(128 << 20)
    assert resident() < before + (50 << 20) and is_mapped()


@needs_glibc
def test_blocks_are_faulted_in_once_and_given_back_at_the_end():
    """In a process of its own: the heap of this one has room that other tests have left."""
    found = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@needs_glibc
def test_rules_are_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), memory_kept():
        raise ZeroDivisionError
    assert is_mapped()


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_MAX_", "4"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_the_environment_has_decided(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with memory_kept() as kept:
        assert not kept


def test_without_glibc_nothing_happens(monkeypatch):
    class Musl:
        mallopt = malloc_trim = None

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Musl())
    with memory_kept() as kept:
        assert not kept


if __name__ == "__main__":
    check_blocks()
