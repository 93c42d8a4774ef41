"""Builds hrpose._C (C++17, pybind11) with flags per instruction set, and its CUDA half with nvcc; never imports torch.

HRPOSE_CUDA=0|1 forbids or demands CUDA (unset: if nvcc is found), HRPOSE_CUDA_ARCHS="80;90a" replaces the list of
architectures; CXX, CXXFLAGS and LDFLAGS are honoured. Without a C++ compiler, and on Windows, hrpose installs as pure
Python.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEFAULT_ARCHS = "75;80;86;89;90a;100;120"
AVX2 = ["-mavx2", "-mfma", "-mbmi2"]
AVX512 = [*AVX2, *(f"-mavx512{extension}" for extension in ("f", "bw", "dq", "vl"))]
ISA_FLAGS = {"generic": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512bf16"], "-mamx-tile", "-mamx-bf16"]
# -ffp-contract=off: kernels equal their PyTorch references bit for bit, and OpenCV's fixed point is exact, only while
# a*b+c is rounded twice. The two -fno flags drop errno and exception flags, which block vectorisation, and no value.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=off"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror=missing-field-initializers"]
PYTHON_UNITS = ("bindings.cpp", "tensors.cpp")  # which, like those in direct/, know Python's headers
KERNEL_FLAGS = ["-fno-exceptions"]  # their tables would refer to a weak symbol, see test_isa_units_export_one_table
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]  # no contraction, as above; tensor cores are not concerned
LINK_FLAGS = {"darwin": ["-bundle", "-undefined", "dynamic_lookup"]}.get(sys.platform, ["-shared"])


def find_cxx() -> list[str]:
    """The compiler as a command, [] if there is none. A CXX that does not exist is an error: nothing else is tried."""
    if os.name == "nt":
        return []
    if cxx := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(cxx[0]):
            sys.exit(f"hrpose: CXX must name a C++17 compiler, got {cxx[0]!r}, which is not on PATH")
        return cxx
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


def accepts(cxx: list[str], *flags: str) -> bool:
    """Does a program compile and link with these flags?"""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text("int main() { return 0; }\n")
        command = [*cxx, *flags, "probe.cpp", "-o", "probe"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def find_nvcc() -> str | None:
    wanted = os.environ.get("HRPOSE_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"hrpose: HRPOSE_CUDA must be 0, 1 or unset, got {wanted!r}")
    home = os.environ.get("CUDA_HOME")
    nvcc = (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")
    if wanted == "1" and not nvcc:
        sys.exit("hrpose: HRPOSE_CUDA=1 needs nvcc, which is neither in $CUDA_HOME/bin nor on PATH")
    return nvcc if wanted != "0" else None


def cuda_archs(nvcc: str) -> list[str]:
    """Architectures to build for. The default list shrinks to what this nvcc knows; the user's own never does."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    chosen = os.environ.get("HRPOSE_CUDA_ARCHS", "")
    archs = [arch for arch in re.split(r"[;,\s]+", chosen or DEFAULT_ARCHS) if arch]
    unknown = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or arch.rstrip("af") not in known]
    if not archs or (chosen and unknown) or len(unknown) == len(archs):
        valid, got = ";".join(sorted(known, key=int)), chosen or DEFAULT_ARCHS
        sys.exit(f"hrpose: HRPOSE_CUDA_ARCHS must list architectures that {nvcc} knows ({valid}), got {got!r}")
    return [arch for arch in archs if arch not in unknown]


def gencode(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest (without a or f: such PTX runs on no later card)."""
    newest = max((arch.rstrip("af") for arch in archs), key=int)
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(newest, f"compute_{newest}")]
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets]


class BuildNative(build_ext):
    """Compiles and links with ninja; each edge of build.ninja carries its whole command."""

    def run(self) -> None:
        nvcc = find_nvcc()  # first, so that a wrong HRPOSE_CUDA is an error whatever else is missing
        if not find_cxx():
            why = "Windows is not supported" if os.name == "nt" else "no C++ compiler (c++, g++ or clang++) was found"
            if os.environ.get("HRPOSE_CUDA") == "1":
                sys.exit(f"hrpose: HRPOSE_CUDA=1 needs the native module, but {why}")
            print(f"hrpose: {why}; installing without the native module: everything works, in plain PyTorch")
            self.extensions = []
        elif os.environ.get("HRPOSE_CUDA") != "0":
            print(f"hrpose: building with CUDA: {nvcc}" if nvcc else "hrpose: no nvcc found, building for the CPU only")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cxx, nvcc, temp = find_cxx(), find_nvcc(), Path(self.build_temp).resolve()
        openmp = ["-fopenmp"] if accepts(cxx, "-fopenmp") else []
        machine = subprocess.run([*cxx, "-dumpmachine"], capture_output=True, text=True).stdout
        x86 = machine.startswith(("x86_64", "amd64"))
        archs = cuda_archs(nvcc) if nvcc else []
        defines = ["-DHRPOSE_X86"] * x86
        # GCC knows AVX-512 BF16 from version 10 on, AMX from 11 on.
        known = [isa for isa, flags in ISA_FLAGS.items() if not flags or (x86 and accepts(cxx, *flags))]
        defines += [f"-DHRPOSE_{isa.upper()}" for isa in ("avx512bf16", "amx") if isa in known]
        if nvcc:
            defines += ["-DHRPOSE_WITH_CUDA", f'-DHRPOSE_CUDA_ARCHS="{";".join(archs)}"']
        includes = [f"-I{sysconfig.get_path('include')}", "-isystem", pybind11.get_include()]
        common = [*CXX_FLAGS, *openmp, *defines, *shlex.split(os.environ.get("CXXFLAGS", ""))]

        edges = []  # (output, inputs, command)
        for source in sorted(Path("csrc").resolve().rglob("*.*")):
            isa = source.stem.removeprefix("kernels_")
            if source.suffix not in (".cpp", ".cu") or (source.suffix == ".cu" and not nvcc):
                continue
            if isa in ISA_FLAGS and isa not in known:
                continue
            out = temp / f"{source.parent.name}_{source.name}.o"
            if source.suffix == ".cu":
                host = "-fPIC,-fvisibility=hidden,-Wall,-Wextra"
                command = [nvcc, *NVCC_FLAGS, "-cudart", "static", *gencode(archs), "-Xcompiler", host]
            else:
                python = source.name in PYTHON_UNITS or source.parent.name == "direct"
                own = [*KERNEL_FLAGS, *ISA_FLAGS[isa]] if isa in ISA_FLAGS else []
                command = [*cxx, *common, *own, *(includes if python else [])]
            edges.append((out, [source], [*command, "-MMD", "-MF", f"{out}.d", "-c", str(source), "-o", str(out)]))
        module, objects = Path(self.get_ext_fullpath(ext.name)).resolve(), [edge[0] for edge in edges]
        link = [*LINK_FLAGS, *openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
        if nvcc:  # nvcc knows where its static cudart is; hide it, or torch's own cudart may answer our calls
            host = [part for flag in link for part in ("-Xcompiler", flag)]
            link = [nvcc, "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", *host]
        else:
            link = [*cxx, *link]
        edges.append((module, objects, [*link, *map(str, objects), "-o", str(module)]))

        temp.mkdir(parents=True, exist_ok=True)
        module.parent.mkdir(parents=True, exist_ok=True)
        run_edges(edges, temp)


def run_edges(edges: list[tuple[Path, list[Path], list[str]]], temp: Path) -> None:
    """Run every command; with ninja in parallel, and only where an input, a header or the command itself changed."""
    try:
        from ninja import BIN_DIR

        ninja = shutil.which("ninja", path=BIN_DIR)
    except ImportError:
        ninja = shutil.which("ninja")
    if not ninja:
        for _, _, command in edges:
            subprocess.run(command, check=True)
        return
    rule = "rule {}\n command = $cmd\n description = $out\n"
    text = [rule.format("link"), rule.format("compile") + " depfile = $out.d\n deps = gcc\n"]
    for out, inputs, command in edges:
        files = [re.sub(r"([$ :])", r"$\1", str(path)) for path in (out, *inputs)]
        edge = f"build {files[0]}: {'link' if out is edges[-1][0] else 'compile'} {' '.join(files[1:])}"
        text.append(f"{edge}\n cmd = {shlex.join(command).replace('$', '$$')}\n")
    (temp / "build.ninja").write_text("\n".join(text))
    if subprocess.run([ninja, "-C", str(temp)]).returncode:
        sys.exit("hrpose: the native module did not compile, see above (HRPOSE_CUDA=0 leaves out its CUDA half)")


setup(ext_modules=[Extension("hrpose._C", sources=[])], cmdclass={"build_ext": BuildNative})
