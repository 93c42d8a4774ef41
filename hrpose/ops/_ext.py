"""Loads the native module hrpose._C once, chooses its instruction set, and says why an op runs without it."""

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch  # before hrpose._C, so that both share the OpenMP runtime that torch brings
from torch import Tensor

from hrpose.errors import InputError

library = torch.library.Library("hrpose", "DEF")  # every op registers here; two of them would be an error of torch's

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most ARM systems
KEPT = 64 << 20  # bytes of workspace that a thread keeps
_thread = threading.local()

CUDA_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Type in csrc/cuda/kernels.h
HOW_TO_GET_IT = "run `pip install .` in a checkout of hrpose with a C++ compiler"


def _load() -> tuple[ModuleType | None, str | None]:
    if os.environ.get("HRPOSE_EXT") == "0":
        return None, "the native module is disabled by HRPOSE_EXT=0"
    try:
        return importlib.import_module("hrpose._C"), None
    except ModuleNotFoundError:
        return None, f"the native module is not installed ({HOW_TO_GET_IT})"
    except ImportError as error:
        return None, f"the native module does not load: {error} ({HOW_TO_GET_IT})"


def _find_observers() -> Callable[[], object]:
    """A function that answers false while nobody watches which ops run; torch has no public one."""
    try:
        modes, overrides = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
        transforms, tracer = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
        profiler = torch._C._autograd._profiler_enabled
    except AttributeError:  # a torch that calls them otherwise: be watched, always
        return lambda: True
    forward_ad = torch.autograd.forward_ad
    return lambda: modes() or overrides() or transforms() or tracer() or profiler() or forward_ad._current_level >= 0


def _find_direct() -> ModuleType | None:
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return _native.direct if _native and table is not None and _native.read_tensors(Tensor, table) else None


_observed = _find_observers()
_native, _why_not_native = _load()
_direct = _find_direct()
_isa: str | None = None  # chosen on first use, so that a wrong HRPOSE_ISA cannot break `import hrpose`


def native() -> ModuleType | None:
    """hrpose._C, or None where it is not installed, does not load, or HRPOSE_EXT=0 forbids it."""
    return _native


def implement(name: str, function: Callable) -> None:
    """Registers an implementation of an op for the CPU and CUDA; it looks for a kernel itself."""
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)


def kernels() -> ModuleType:
    """hrpose._C with its instruction set chosen; only for callers that know it is there.

    Raises: InputError if the environment variable HRPOSE_ISA names an instruction set this build or processor lacks.
    """
    if _isa is None:
        set_isa(os.environ.get("HRPOSE_ISA") or None)
    return _native


def isas() -> list[str]:
    """Instruction sets that this build has and this processor runs, best first; [] without the native module."""
    return _native.isas() if _native else []


def isa() -> str | None:
    """The instruction set in use, None without the native module. Raises: InputError on a wrong HRPOSE_ISA."""
    return kernels().isa() if _native else None


def set_isa(name: str | None) -> None:
    """Use this instruction set from now on, in every thread; None takes the best one.

    Raises: InputError if this build or this processor lacks it.
    """
    global _isa
    if _native is None:
        raise InputError(f"HRPOSE_ISA: name must be unset, got {name!r}: {_why_not_native}")
    name = _native.isas()[0] if name is None else name
    if not _native.set_isa(name):
        raise InputError(f"HRPOSE_ISA: name must be one of {', '.join(isas())} on this machine, got {name!r}")
    _isa = name


def why_reference(*tensors: Tensor | None, dtype: torch.dtype | None = None, cuda: bool = False) -> str | None:
    """One sentence on why an op on these tensors runs on the PyTorch reference, None if it runs on a kernel.

    Args:
        tensors: what the op was given; None entries are skipped.
        dtype: the one dtype the kernel takes, None if the op has checked or converts them.
        cuda: is there a kernel for CUDA too?
    """
    return _why_reference(tensors, dtype, cuda)


def _why_reference(tensors: tuple[Tensor | None, ...], dtype: torch.dtype | None, cuda: bool) -> str | None:
    if _native is None:
        return _why_not_native
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_cpu:
            pass
        elif tensor.is_cuda and cuda:
            reason = _why_not_on(tensor.device.index)
            if reason is not None:
                return reason
        else:
            kernels = "are kernels for the CPU and CUDA" if cuda else "is a kernel for the CPU"
            return f"there {kernels} only, the tensors are on {tensor.device.type}"
        if dtype is not None and tensor.dtype != dtype:
            return f"the kernel takes {dtype}, the tensors are {tensor.dtype}"
    return None


def usable(*tensors: Tensor | None, dtype: torch.dtype | None = None, cuda: bool = False) -> bool:
    """Does an op on these tensors run on a kernel? See `why_reference`."""
    return _why_reference(tensors, dtype, cuda) is None


_cuda_reasons: dict[int, str | None] = {}  # by device


@torch.compiler.assume_constant_result  # the compiler cannot see into the native module
def _why_not_on(device: int) -> str | None:
    """Why no kernel of ours runs on a CUDA device, None if they do. Asks the driver once."""
    if device not in _cuda_reasons:
        _cuda_reasons[device] = _ask_why_not_on(device)
    return _cuda_reasons[device]


def _ask_why_not_on(device: int) -> str | None:
    if not _native.cuda_archs:
        return "the native module was built without CUDA"
    try:
        devices = _native.cuda_host()["devices"]
    except RuntimeError as error:
        return f"CUDA does not answer: {error}"
    if device >= devices:
        return "there is no such CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if not has_code(_native.cuda_archs.split(";"), major, minor):
        archs = _native.cuda_archs.replace(";", ", ")
        return f"the kernels were built for {archs}, the card has compute capability {major}.{minor}"
    return None


def has_code(archs: list[str], major: int, minor: int) -> bool:
    """Does a build for these architectures ("80", "90a") run on a card of this compute capability?

    Machine code does within its major version from its minor version on, with an "a" on that card alone; the PTX of the
    newest architecture runs on every later card.
    """
    card = 10 * major + minor
    if card >= max(int(arch.rstrip("af")) for arch in archs):
        return True
    same_major = [arch for arch in archs if int(arch.rstrip("af")) // 10 == major]
    return any(arch == f"{card}a" if arch.endswith("a") else int(arch.rstrip("f")) <= card for arch in same_major)


@contextlib.contextmanager
def current_stream(tensor: Tensor) -> Iterator[int]:
    """The handle of the current stream of a CUDA tensor's device, which is the current device meanwhile."""
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def direct() -> ModuleType | None:
    """Functions of the native module that take tensors as they are (csrc/direct/direct.h). None while something looks
    on that must see the op (`unobserved`) and where torch does not tell C how its tensors lie.

    They return None, having done nothing, for all but the plain case; then the op itself goes on.
    """
    return None if torch.compiler.is_compiling() or _isa is None or _observed() else _direct


def unobserved(*tensors: Tensor | None) -> bool:
    """Are these plain tensors, with no compiler, tracer, mode, function transform or profiler of torch looking on?

    Then an op may call its kernel itself: the way through torch's dispatcher takes as long as decoding one image.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:  # a loop, not any(): this is there for speed
        # is_neg: torch's dispatcher, not the memory, knows the sign of what `x.conj().imag` gives
        if tensor is not None and (type(tensor) is not Tensor or tensor.is_neg()):
            return False
    return not _observed()


def huge(size: int) -> Tensor:
    """Uninitialised bytes on huge pages, where the system has them: with small ones, a kernel that walks through tens
    of megabytes of weights waits for a page table entry every 4 KiB."""
    memory = torch.empty((size // HUGE_PAGE + 2) * HUGE_PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_PAGE
    if _native:
        _native.advise_huge_pages(memory.data_ptr() + begin, memory.numel() - HUGE_PAGE)
    return memory[begin : begin + size]


def workspace(size: int) -> tuple[Tensor, int]:
    """Uninitialised memory of `size` bytes for a kernel's own use until the next call of this thread: what keeps it
    alive, and its address, at the beginning of a cache line. Memory of up to KEPT bytes is kept for later calls."""
    memory = getattr(_thread, "memory", None)
    if memory is None or memory.numel() < size:
        memory = huge(size)
        if size <= KEPT:
            _thread.memory = memory
    return memory, memory.data_ptr()


def report() -> dict:
    """What `hrpose doctor` prints about the native module: native, reason, isa, isas, openmp, cuda, cuda_archs.

    `reason` says why there is no native module, or why its HRPOSE_ISA is refused; else it is None.
    """
    reason, current = _why_not_native, None
    try:
        current = isa()
    except InputError as error:
        reason = str(error)
    archs = _native.cuda_archs if _native else ""
    return {
        "native": _native is not None,
        "reason": reason,
        "isa": current,
        "isas": isas(),
        "openmp": bool(_native and _native.openmp),
        "cuda": bool(archs),
        "cuda_archs": archs.split(";") if archs else [],
    }


def cuda_probe() -> dict:
    """What the CUDA half of the native module sees: driver and runtime as (major, minor), devices, problem.

    Each device is a dict of name, capability (major, minor), code_arch (the architecture of our code that ran on it,
    900 for sm_90; None if none ran) and error. `problem` is one sentence if nothing of ours runs on a card, else None.
    Creates a CUDA context on every card: for diagnosis, not for import time.
    """
    answer = {"driver": None, "runtime": None, "devices": [], "problem": None}
    if _native is None or not _native.cuda_archs:
        return answer | {"problem": _why_not_native or "the native module was built without CUDA"}
    try:
        host = _native.cuda_host()
    except RuntimeError as error:
        return answer | {"problem": f"CUDA does not answer: {error}"}
    for key in ("driver", "runtime"):
        answer[key] = (host[key] // 1000, host[key] % 1000 // 10) if host[key] else None
    answer["devices"] = devices = [_native.cuda_device(index) for index in range(host["devices"])]
    if not devices:
        answer["problem"] = "there is no CUDA device" + ("" if answer["driver"] else " and no driver")
    elif all(device["code_arch"] is None for device in devices):
        archs = _native.cuda_archs.replace(";", ", ")
        answer["problem"] = f"the kernels were built for {archs} and run on no card here: {devices[0]['error']}"
    return answer


def to_tensor(value: object, where: str, name: str, like: Tensor | None = None) -> Tensor:
    """A dense tensor: tensors as they are, array-likes without a copy where possible, on the device of `like`.

    Raises: InputError "<where>: <name> must be a tensor or an array ...".
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise InputError(f"{where}: {name} must be a dense tensor, got {value.layout}")
        return value
    try:
        array = np.asarray(value)
        if any(stride < 0 for stride in array.strides):
            array = np.ascontiguousarray(array)  # torch has no negative strides
        if not array.flags.writeable:
            array = np.asarray(_Writeable(array))
        return torch.as_tensor(array, device=None if like is None else like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise InputError(f"{where}: {name} must be a tensor or an array of numbers, got {got} ({error})") from error


class _Writeable:
    """A read-only array under a writeable name: torch warns about read-only memory, which PIL images have."""

    def __init__(self, array: np.ndarray) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self.array = array  # keeps the memory alive
