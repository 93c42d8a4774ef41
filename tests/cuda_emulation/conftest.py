"""Compiles the kernels of csrc/cuda for the CPU (see emulator.h) and calls their launchers."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
CXX = next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
# -O1 is where compiling and running together take least. Pragmas are those of nvcc.
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-DHRPOSE_EMULATION", f"-I{HERE}", f"-I{SOURCES}", "-fPIC", "-shared"]
# Without these two the dynamic linker merges the emulators of several libraries.
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique"]


class EmulationError(RuntimeError):
    """What a launcher returned."""


class Emulated:
    """Launchers by name, as `extern "C"` functions that return null or a message."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.configure()

    def configure(self, schedule: str = "forward", seed: int = 1, multiprocessors: int = 132) -> None:
        """The order threads and blocks run in, forward, reverse or shuffled, and what the card says it has."""
        configure = self.library.simt_configure
        configure(ctypes.c_char_p(schedule.encode()), ctypes.c_uint64(seed), ctypes.c_int(multiprocessors))

    def release(self) -> None:
        """Give back memory that the next call takes anew."""
        self.library.simt_release()

    def __call__(self, name: str, *arguments: object) -> None:
        """Tensors and None go as pointers, integers and booleans as int64_t, floats as double, lists as arrays of
        pointers or int64_t. Raises: EmulationError with the launcher's message."""
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        error = function(*map(_argument, arguments))
        if error is not None:
            raise EmulationError(error.decode())


def _argument(value: object) -> object:
    if value is None or isinstance(value, torch.Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, (list, tuple)):
        elements = [_argument(element) for element in value]
        return (type(elements[0]) * len(elements))(*elements)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)


def _accepts(flag: str) -> bool:
    return subprocess.run([CXX, flag, "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def compiler() -> list[str]:
    """The command that makes a shared library, but for its units. The environment variable HRPOSE_EMULATION_FLAGS adds
    flags, of sanitizers say."""
    if CXX is None:
        pytest.skip("there is no C++ compiler to emulate CUDA with")
    if os.name == "nt" or not SOURCES.is_dir():
        pytest.skip("not a source checkout on Linux or macOS: there is no csrc/cuda to emulate")
    flags = [flag for flag in FLAGS if flag != "-fno-gnu-unique" or _accepts(flag)]  # clang has no such symbols
    return [CXX, *flags, *shlex.split(os.environ.get("HRPOSE_EMULATION_FLAGS", ""))]


@pytest.fixture(scope="session")
def emulate(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    """emulate(source, shim, edits=()) compiles a file of csrc/cuda, or a text of its own, and the functions in `shim`
    that call its launchers. `edits` are pairs (old, new) of texts: planted bugs, each in one place."""
    folder = tmp_path_factory.mktemp("emulated")
    built: dict[str, Emulated] = {}

    def emulate(source: str, shim: str = "", edits: Sequence[tuple[str, str]] = ()) -> Emulated:
        path = SOURCES / source if source.endswith(".cu") else None
        text = path.read_text() if path else source
        for old, new in edits:
            assert text.count(old) == 1, f"{text.count(old)} places to edit: {old}"
            text = text.replace(old, new)
        shim = f'#pragma GCC visibility push(default)\n#line 1 "shim"\n{shim}\n'
        text = f'#line 1 "{path or "kernel.cu"}"\n{text}\n{shim}'
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in built:
            unit, library = folder / f"{key}.cu", folder / f"{key}.so"
            unit.write_text(text)
            done = subprocess.run([*compiler, str(unit), "-o", str(library)], capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, done.stderr
            for other in built.values():
                other.release()
            built[key] = Emulated(library)
        return built[key]

    return emulate


@pytest.fixture
def fenced() -> Callable[[torch.Tensor, float], torch.Tensor]:
    """fenced(tensor, post) copies a tensor, strides too, to where the memory on both sides is full of posts."""

    def fenced(tensor: torch.Tensor, post: float) -> torch.Tensor:
        margin = 256
        storage = torch.full((tensor.numel() + 2 * margin,), post, dtype=tensor.dtype)
        return storage.as_strided(tensor.shape, tensor.stride(), margin).copy_(tensor)

    return fenced


@pytest.fixture
def emulation_error() -> type[Exception]:
    return EmulationError


@pytest.fixture(params=["forward", "reverse", "shuffled"])
def schedule(request: pytest.FixtureRequest) -> str:
    """Orders of the threads that a correct kernel does not notice."""
    return request.param
