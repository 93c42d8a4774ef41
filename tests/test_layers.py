"""The package's architecture: imports point downwards, nothing undeclared is needed, importing has no side effects."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hrpose

ROOT = Path(hrpose.__file__).parent
LAYERS = [
    {"errors", "files", "matlab", "ranks", "skeleton", "geometry", "image", "pillow_memory", "ops", "shipped", "synth"},
    {"models", "cost", "receptive_field", "published", "data", "eval", "checkpoint", "optimize"},
    {"infer", "viz"},
    {"train", "bench"},
    {"cli", "__main__"},
]
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit_of(path):
    """The module or package directly below hrpose that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path):
    """Full names of all modules a file imports, within functions too."""
    package = ("hrpose", *path.relative_to(ROOT).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from hrpose import ops` imports a unit; `from hrpose.ops import crop` may import a name of one
            names += [f"{module}.{alias.name}" for alias in node.names] if module == "hrpose" else [module]
    return names


def units_imported(path):
    found = {name.split(".")[1] for name in imported(path) if name.startswith("hrpose.")}
    return found - {unit_of(path)}


def test_every_module_has_a_layer():
    assert {unit_of(path) for path in MODULES} <= LAYER.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_do_not_point_upwards(path):
    upwards = {unit for unit in units_imported(path) if LAYER[unit] > LAYER[unit_of(path)]}
    assert not upwards


def test_there_is_no_cycle():
    graph = {}
    for path in MODULES:
        graph.setdefault(unit_of(path), set()).update(units_imported(path))
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("errors") < order.index("geometry") < order.index("data") < order.index("train")


def test_nothing_imports_the_package_as_a_whole_or_the_tests():
    for path in MODULES:
        names = imported(path)
        whole = "hrpose" in names and unit_of(path) not in ("cli", "__main__")
        assert not whole and not any(name.split(".")[0] in ("tests", "conftest", "pytest") for name in names), path


def test_only_declared_dependencies_are_imported():
    declared, optional = {"torch", "numpy", "PIL", "pycocotools", "tqdm"}, {"onnxruntime", "openvino", "cv2"}
    for path in [*MODULES, ROOT / "__init__.py"]:
        names = {name.split(".")[0] for name in imported(path)}
        others = names - declared - {"hrpose", ""} - sys.stdlib_module_names
        assert others <= {"bench": optional, "matlab": {"scipy"}}.get(unit_of(path), set()), path
        top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
        assert not others & {alias.name for node in top for alias in node.names}, f"{path}: not when it is imported"
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    needed = re.search(r"^dependencies = \[(.*)\]", project, re.MULTILINE).group(1)
    assert sorted(re.findall(r'"([a-z]+)', needed)) == sorted("pillow" if d == "PIL" else d for d in declared)
    extra = re.search(r"^bench = \[(.*)\]", project, re.MULTILINE).group(1)
    assert {"opencv-python-headless<5" if d == "cv2" else d for d in optional} <= set(re.findall(r'"([^"]+)"', extra))


def test_there_are_no_modules_of_leftovers():
    names = {path.stem for path in MODULES} | {path.parent.name for path in MODULES}
    assert not names & {"utils", "util", "core", "common", "helpers", "misc", "base"}


def test_the_checks_above_can_fail(tmp_path, monkeypatch):
    """A file with imports of every spelling, all of which the helpers see."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "ops" / "bad.py"
    path.parent.mkdir()
    path.write_text(
        "import hrpose.train.fit\nfrom hrpose import data, cli\nfrom hrpose.eval.coco import oks_nms\n"
        "from ..viz import draw_poses\nfrom . import _ext\nfrom .crop import crop\n"
        "def late():\n    import yaml, tests.conftest\n    from hrpose.infer import Predictor\n"
    )
    assert units_imported(path) == {"train", "data", "cli", "eval", "viz", "infer"}
    assert {"yaml", "tests.conftest"} <= set(imported(path))


IMPORT = """
import sys
events = []
sys.addaudithook(lambda name, args: events.append(name) if name in {events!r} else None)
import torch
before, random = set(sys.modules), torch.get_rng_state()
started = len(events)
import hrpose
assert len(events) == started, events  # no process was started: nothing was compiled, nothing was asked of the system
new = set(sys.modules) - before
unwanted = [name for name in ("matplotlib", "pycocotools", "torch.utils.cpp_extension", "setuptools", "scipy", "cv2",
                              "tensorboard", "hrpose.cli") if name in new]
assert not unwanted, unwanted
assert torch.equal(random, torch.get_rng_state())
""".replace("{events!r}", repr({"subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "socket.connect"}))


@pytest.mark.parametrize("extension", ["", "0"], ids=["native", "reference"])
def test_import_prints_and_starts_nothing(tmp_path, extension):
    before = {path for path in ROOT.rglob("*") if "__pycache__" not in path.parts}
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT.parent), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    if extension:
        environment["HRPOSE_EXT"] = extension
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:hrpose", "-c", IMPORT],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert before == {path for path in ROOT.rglob("*") if "__pycache__" not in path.parts}
    assert not list(tmp_path.iterdir())


def test_scoring_needs_no_plotting_library():
    """pycocotools can draw; computing an AP must not import matplotlib for it."""
    code = "import sys, pycocotools.cocoeval, hrpose.eval.coco; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout == "False\n"
