"""The native build: what setup.py may import, what instruction-set units may export, whether all of it compiles."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
CXX = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source checkout: there is no setup.py")
needs_cxx = pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")


@pytest.fixture(scope="module")
def build():
    """setup.py as a module, its call of setup() left out."""
    setuptools, calls = pytest.importorskip("setuptools"), []
    before, setuptools.setup = setuptools.setup, lambda **keywords: calls.append(keywords)
    try:
        spec = importlib.util.spec_from_file_location("hrpose_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        setuptools.setup = before
    assert len(calls) == 1
    return module


def test_setup_imports_only_build_requirements():
    names = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"setuptools", "pybind11", "ninja"}


def test_no_torch_header_and_one_pybind11_file():
    including = {"pybind11": set(), "torch": set(), "ATen": set()}
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for header in re.findall(r'#include\s*[<"]([^>"]+)', path.read_text()):
            if header.split("/")[0] in including:
                including[header.split("/")[0]].add(path.name)
    assert including == {"pybind11": {"bindings.cpp"}, "torch": set(), "ATen": set()}


@needs_cxx
@pytest.mark.parametrize("isa", ISAS)
def test_isa_units_export_one_table(build, tmp_path, isa):
    """A weak function or an initialiser could run on a processor that lacks the unit's instructions."""
    if not shutil.which("nm"):
        pytest.skip("there is no nm")
    machine = subprocess.run([CXX, "-dumpmachine"], capture_output=True, text=True).stdout
    if isa != "generic" and not machine.startswith("x86_64"):
        pytest.skip(f"{isa} is not built for {machine.strip()}")
    source, unit = ROOT / "csrc" / "cpu" / f"kernels_{isa}.cpp", tmp_path / "unit.o"
    openmp = ["-fopenmp"] if build.accepts([CXX], "-fopenmp") else []
    if not build.accepts([CXX], *build.ISA_FLAGS[isa]):
        pytest.skip(f"{CXX} does not know {isa}")
    flags = [*build.CXX_FLAGS, *openmp, *build.KERNEL_FLAGS, *build.ISA_FLAGS[isa], "-Werror"]
    command = [CXX, *flags, "-c", str(source), "-o", str(unit)]
    subprocess.run(command, check=True)
    symbols = [line.split()[-2:] for line in subprocess.check_output(["nm", unit], text=True).splitlines()]
    defined = [name for kind, name in symbols if kind.isupper() and kind != "U"]
    assert len(defined) == 1 and f"kernels_{isa}" in defined[0], defined
    assert not [name for kind, name in symbols if kind in "vVwW" or "_GLOBAL__sub" in name or "__cxx_global" in name]


# Of ptxas: waits and fences that it adds for registers of a running wgmma, and wgmma that it makes serial.
WGMMA_NOTES = r"\(?C75(?:0[7-9]|1\d|20)\b.*"


def compiler_log(build, source: Path, targets: list[str], folder: Path) -> str:
    flags = [*build.NVCC_FLAGS, "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
    command = [NVCC, *flags, *targets, "-c", str(source), "-o", str(folder / "unit.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_nvcc
@needs_cxx
@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_sources_compile(build, monkeypatch, tmp_path, source):
    """For every architecture, without warnings, registers spilled to memory or wgmma that ptxas repairs or makes
    serial."""
    monkeypatch.delenv("HRPOSE_CUDA_ARCHS", raising=False)
    targets = [flag for flag in build.gencode(build.cuda_archs(NVCC)) if "code=sm_" in flag]
    log = compiler_log(build, source, targets, tmp_path)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= log.count("Compiling entry function") and set(spills) <= {("0", "0")}
    assert len(spills) >= len(targets) or source.name == "bottlenecks.cu"  # which calls the kernels of other files
    assert not re.findall(WGMMA_NOTES, log)


@needs_nvcc
@needs_cxx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [("", ""), ("wait_products<0>();", "wait_products<1>();"), ("fence_products();", ""), ("wait_products<0>();", "")],
    ids=["as it is", "a group less is waited for", "no fence", "no wait"],
)
def test_what_ptxas_says_of_wgmma_is_seen(build, tmp_path, old, new):
    """It notices a register in use by the tensor cores, so its silence on the real kernel means something."""
    if "90" not in build.cuda_archs(NVCC) and "90a" not in build.cuda_archs(NVCC):
        pytest.skip(f"{NVCC} does not know sm_90a")
    for path in (ROOT / "csrc" / "cuda").glob("*.h"):
        shutil.copy(path, tmp_path)
    source, kernel = tmp_path / "bottlenecks_wgmma_32.cu", tmp_path / "bottlenecks_wgmma.h"
    shutil.copy(ROOT / "csrc" / "cuda" / source.name, source)
    assert not old or kernel.read_text().count(old) == 1
    kernel.write_text(kernel.read_text().replace(old, new) if old else kernel.read_text())
    log = compiler_log(build, source, ["-gencode=arch=compute_90a,code=sm_90a"], tmp_path)
    assert bool(re.findall(WGMMA_NOTES, log)) == bool(old)
    ptx = tmp_path / "unit.ptx"
    subprocess.run([NVCC, *build.NVCC_FLAGS, "-arch=compute_90a", "-ptx", str(source), "-o", str(ptx)], check=True)
    assert "wgmma.mma_async.sync.aligned.m64n32k16" in ptx.read_text()  # and not an empty kernel


@needs_nvcc
def test_cuda_archs(build, monkeypatch):
    monkeypatch.delenv("HRPOSE_CUDA_ARCHS", raising=False)
    defaults = build.DEFAULT_ARCHS.split(";")
    assert build.cuda_archs(NVCC) == [arch for arch in defaults if arch in build.cuda_archs(NVCC)] != []
    monkeypatch.setenv("HRPOSE_CUDA_ARCHS", "80, 90a")
    assert build.cuda_archs(NVCC) == ["80", "90a"]
    assert build.gencode(["80", "90a"])[-1] == "-gencode=arch=compute_90,code=compute_90"
    for wrong in ("sm_80", "80;12", "native", ";", "-1"):
        monkeypatch.setenv("HRPOSE_CUDA_ARCHS", wrong)
        with pytest.raises(SystemExit, match="HRPOSE_CUDA_ARCHS must list architectures"):
            build.cuda_archs(NVCC)


def test_switches(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    for value, result in (("0", None), ("", None)):
        monkeypatch.setenv("HRPOSE_CUDA", value)
        assert build.find_nvcc() is result
    for value, message in (("1", "HRPOSE_CUDA=1 needs nvcc"), ("yes", "HRPOSE_CUDA must be 0, 1 or unset, got 'yes'")):
        monkeypatch.setenv("HRPOSE_CUDA", value)
        with pytest.raises(SystemExit, match=message):
            build.find_nvcc()
    assert build.find_cxx() == []
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="CXX must name a C\\+\\+17 compiler, got 'no-such-compiler'"):
        build.find_cxx()


def checkout(folder: Path) -> Path:
    """A copy of what the build reads, so that it writes nowhere else."""
    for name in ("setup.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "hrpose"\nversion = "0"\n[tool.setuptools]\npackages = ["hrpose"]\n'
    )
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "hrpose").mkdir()
    return folder


def build_in(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


@needs_cxx
def test_broken_source_is_an_error_and_no_compiler_is_not(tmp_path):
    for name in ("setuptools", "pybind11"):
        pytest.importorskip(name)
    folder = checkout(tmp_path)
    done = build_in(folder, PATH="/nonexistent", HRPOSE_CUDA="0", CXX="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no C++ compiler") == 1 and not list((folder / "hrpose").iterdir())
    (folder / "csrc" / "bindings.cpp").write_text("this is no C++\n")
    done = build_in(folder, HRPOSE_CUDA="0")
    assert done.returncode == 1 and "bindings.cpp" in done.stdout + done.stderr


@needs_cxx
@pytest.mark.slow
def test_only_what_changed_recompiles(tmp_path):
    for name in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(name)
    folder = checkout(tmp_path)
    assert build_in(folder, HRPOSE_CUDA="0").returncode == 0
    assert (folder / "hrpose" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").is_file()
    assert "no work to do" in build_in(folder, HRPOSE_CUDA="0").stdout
    (folder / "csrc" / "cpu" / "dispatch.cpp").touch()
    again = build_in(folder, HRPOSE_CUDA="0").stdout
    assert "[2/2]" in again and "bindings" not in again
