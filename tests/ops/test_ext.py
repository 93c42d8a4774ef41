"""The loader of the native module: how it is found, forced, refused, and what it says of itself."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hrpose
from hrpose import ops
from hrpose.errors import InputError
from hrpose.ops import _ext

needs_native = pytest.mark.skipif(_ext.native() is None, reason=str(_ext.why_reference()))


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter with only these HRPOSE_ variables; it may print nothing on stderr."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HRPOSE_")}
    environment = inherited | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    folder = Path(hrpose.__file__).parents[1]  # where the package that is tested is, installed or not
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


TRY_DECODE = """
import torch
from hrpose.errors import InputError
from hrpose.ops import _ext, decode
try:
    decode(torch.zeros(1, 1, 2, 2))
    print("ran", _ext.isa())
except InputError as error:
    print(error, "|", _ext.report()["reason"])
"""


@needs_native
def test_hrpose_isa_is_obeyed_or_refused():
    names = _ext.isas()
    assert names[-1] == "generic" and len(set(names)) == len(names)
    assert run(TRY_DECODE, HRPOSE_ISA="generic") == "ran generic\n"
    message = f"HRPOSE_ISA: name must be one of {', '.join(names)} on this machine, got 'avx9000'"
    assert run(TRY_DECODE, HRPOSE_ISA="avx9000") == f"{message} | {message}\n"


@needs_native
def test_set_isa(isa):
    assert _ext.isa() == isa == _ext.report()["isa"]
    with pytest.raises(InputError, match=r"HRPOSE_ISA: name must be one of .*, got 'mmx'"):
        _ext.set_isa("mmx")
    assert _ext.isa() == isa
    _ext.set_isa(None)
    assert _ext.isa() == _ext.isas()[0]


def test_import_is_silent_and_lazy():
    """A wrong HRPOSE_ISA is no reason to fail before an op runs; nothing that compiles is even imported."""
    code = "import hrpose.ops, sys; print('torch.utils.cpp_extension' in sys.modules)"
    assert run(code, HRPOSE_ISA="wrong") == "False\n"


def test_disabled():
    code = "from hrpose.ops import _ext\nprint(_ext.native(), _ext.isas(), _ext.isa(), _ext.why_reference(), sep='|')\n"
    code += "try: _ext.set_isa('generic')\nexcept ValueError as error: print(error)"
    why = "the native module is disabled by HRPOSE_EXT=0"
    assert run(code, HRPOSE_EXT="0") == f"None|[]|None|{why}\nHRPOSE_ISA: name must be unset, got 'generic': {why}\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'hrpose._C'"), "the native module is not installed"),
        (ImportError("libgomp.so.1: cannot open"), "the native module does not load: libgomp.so.1: cannot open"),
    ],
)
def test_missing_module_says_how_to_get_it(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.delenv("HRPOSE_EXT", raising=False)
    monkeypatch.setattr(_ext.importlib, "import_module", fail)
    module, why = _ext._load()
    assert module is None and why.startswith(reason)
    assert "`pip install .` in a checkout of hrpose with a C++ compiler" in why


@needs_native
def test_why_reference():
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    assert _ext.why_reference(cpu, None, dtype=torch.float32) is None and _ext.usable(cpu)
    assert _ext.why_reference(cpu, meta) == "there is a kernel for the CPU only, the tensors are on meta"
    assert _ext.why_reference(cpu.double(), dtype=torch.float32) == (
        "the kernel takes torch.float32, the tensors are torch.float64"
    )


class OnCuda:
    """What `why_reference` looks at of a tensor."""

    is_cuda, is_cpu, dtype, device = True, False, torch.float32, torch.device("cuda", 0)


@needs_native
@pytest.mark.parametrize(
    ("archs", "devices", "reason"),
    [
        ("", 1, "the native module was built without CUDA"),
        ("80;90a", 0, "there is no such CUDA device"),
        ("80;90a", 1, None),
        ("90a;100", 1, "the kernels were built for 90a, 100, the card has compute capability 8.9"),
        ("80", RuntimeError("driver too old"), "CUDA does not answer: driver too old"),
    ],
)
def test_why_not_on_cuda(monkeypatch, archs, devices, reason):
    class Native:
        cuda_archs = archs

        def cuda_host(self):
            if isinstance(devices, Exception):
                raise devices
            return {"devices": devices}

    monkeypatch.setattr(_ext, "_native", Native())
    monkeypatch.setattr(_ext, "_cuda_reasons", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert _ext.why_reference(OnCuda(), cuda=True) == reason
    assert _ext.why_reference(OnCuda()) == "there is a kernel for the CPU only, the tensors are on cuda"
    if reason is None:
        assert _ext.why_reference(OnCuda(), dtype=torch.float16, cuda=True).startswith("the kernel takes torch.float16")
        answer = torch.compile(lambda: _ext._why_not_on(0), fullgraph=True, backend="eager")
        assert answer() is None


@pytest.mark.parametrize(
    ("archs", "runs", "fails"),
    [
        (["80", "90a"], [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        (["75", "86", "100"], [(7, 5), (8, 6), (8, 9), (10, 0), (10, 3), (12, 0)], [(7, 0), (8, 0), (9, 0)]),
        (["90a", "120"], [(9, 0), (12, 0), (12, 1)], [(8, 9), (10, 0)]),
        (["100f", "120"], [(10, 0), (10, 3), (12, 0)], [(9, 0), (11, 0)]),
    ],
)
def test_has_code(archs, runs, fails):
    assert [_ext.has_code(archs, *card) for card in (*runs, *fails)] == [True] * len(runs) + [False] * len(fails)


def test_report_and_probe():
    report, probe = _ext.report(), _ext.cuda_probe()
    assert set(report) == {"native", "reason", "isa", "isas", "openmp", "cuda", "cuda_archs"}
    assert report["native"] == (report["reason"] is None) == (report["isa"] in report["isas"])
    assert report["cuda"] == bool(report["cuda_archs"])
    if not report["cuda"]:
        assert probe["devices"] == [] and probe["problem"]
    elif not torch.cuda.is_available():
        assert probe["runtime"] and "no CUDA device" in probe["problem"]
    else:
        for index, device in enumerate(probe["devices"]):
            assert device["capability"] == torch.cuda.get_device_capability(index)
            assert (device["code_arch"] is None) == (device["error"] is not None)


def test_to_tensor():
    tensor = torch.zeros(3)
    assert _ext.to_tensor(tensor, "op", "x") is tensor
    array = np.arange(6.0).reshape(2, 3)
    assert _ext.to_tensor(array, "op", "x").data_ptr() == array.ctypes.data  # no copy
    array.flags.writeable = False
    assert _ext.to_tensor(array, "op", "x").data_ptr() == array.ctypes.data
    assert not array.flags.writeable
    assert _ext.to_tensor(array[::-1, ::-1], "op", "x").tolist() == [[5, 4, 3], [2, 1, 0]]
    assert _ext.to_tensor([[1.5, 2]], "op", "x", like=torch.zeros(1, device="meta")).device.type == "meta"
    with pytest.raises(InputError, match=r"^op: x must be a tensor or an array of numbers, got list"):
        _ext.to_tensor([1, "a"], "op", "x")


@needs_native
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch.jit.trace
def test_whoever_watches_sees_the_ops(rng):
    """Without the dispatcher only while nobody does."""
    maps = torch.from_numpy(rng.normal(size=(2, 3, 8, 6))).float()
    image, eye = torch.zeros(5, 4, 3, dtype=torch.uint8), torch.eye(3)[None, :2]

    def both():
        return ops.decode(maps), ops.crop(image, eye, (4, 5))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    assert _ext.unobserved(maps, None)
    names = []
    with Seen():
        assert not _ext.unobserved(maps)
        both()
    assert {"hrpose::decode", "hrpose::crop"} <= set(names)
    with torch.profiler.profile() as profile:
        both()
    assert {"hrpose::decode", "hrpose::crop"} <= {event.key for event in profile.key_averages()}
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(maps)
    assert not _ext.unobserved(fake)
    assert ops.decode(fake)[0].shape == (2, 3, 2)
    traced = torch.jit.trace(lambda values: ops.decode(values)[0], maps)
    assert torch.equal(traced(-maps), ops.decode(-maps)[0]) and not torch.equal(traced(-maps), traced(maps))
    assert not torch.equal(ops.decode(-maps)[0], ops.decode(maps)[0])
    watched = []
    torch.func.vmap(lambda values: watched.append(_ext.unobserved(values)) or values)(maps)
    assert watched == [False]
    assert _ext.unobserved(maps) and not _ext.unobserved(torch.nn.Parameter(maps))


@needs_native
def test_lazily_negated_tensors(rng):
    """Their memory holds the other sign."""
    images = torch.from_numpy(rng.normal(size=(1, 3, 8, 8)) + 1j * rng.normal(size=(1, 3, 8, 8))).cfloat().conj().imag
    packed = ops.pack_stem(torch.ones(16, 3, 3, 3), torch.ones(16))
    assert images.is_neg() and not _ext.unobserved(images)
    assert torch.equal(ops.stem(images, packed), ops.stem(images.resolve_neg(), packed))
    assert torch.equal(ops.decode(images)[0], ops.decode(images.resolve_neg())[0])
    assert torch.equal(ops.ram_sum([images]), torch.relu(images))
