"""benchmarks/on_gpu.sh without a GPU: its order, limits and reports, with stand-ins for nvidia-smi and Python."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "on_gpu.sh"
MODERN_BASH = "((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] > 1)))"
STEPS = ["machine", "build", "tests", "warpgroups", "bottlenecks", "profile", "dpn4_64", "compiled", "op_tests"]
STEPS += ["sanitizer", "ncu", "ops", "pipeline", "dpn4_32", "hrnet_w32", "chains"]
# Python as the script calls it: each call is written down; one whose arguments match $SLOW takes long, $WRONG fails.
PYTHON = f"""#!/bin/sh
[ "$1" = - ] && exec {sys.executable} "$@"
echo "$HRPOSE_CUDA_BOTTLENECKS: $*" >>"$CALLS"
echo "this is the output of $*"
case "$*" in *"${{SLOW:-nothing}}"*) sleep 60 ;; *"${{WRONG:-nothing}}"*) exit 3 ;; esac
exit 0
"""


def has_bash() -> bool:
    bash, needed = shutil.which("bash"), ("timeout", "tar")
    return bool(bash) and all(map(shutil.which, needed)) and not subprocess.run([bash, "-c", MODERN_BASH]).returncode


pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="not a source checkout: there is no benchmarks/on_gpu.sh"),
    pytest.mark.skipif(not has_bash(), reason="there is no bash of 4.2 or later, no timeout or no tar"),
]


@pytest.fixture
def on_gpu(tmp_path):
    """on_gpu(steps..., variable=value): the finished script, with what it wrote, and the calls of Python."""
    tools, out, calls = tmp_path / "bin", tmp_path / "out", tmp_path / "calls"
    tools.mkdir()
    for name, text in (("python3", PYTHON), ("nvidia-smi", "#!/bin/sh\necho 9.0\n"), ("nvcc", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*steps, card=True, **environment):
        if not card:
            (tools / "nvidia-smi").unlink()
        calls.write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HRPOSE_")}
        ours = {"PATH": f"{tools}:/usr/bin:/bin", "OUT": str(out), "CALLS": str(calls)}
        command = ["bash", str(SCRIPT), *steps]
        done = subprocess.run(command, env=kept | ours | environment, capture_output=True, text=True)
        done.logs = {path.stem: path.read_text() for path in out.glob("*.log")}
        done.calls, done.out = calls.read_text().splitlines(), out
        return done

    return run


def test_every_step_runs(on_gpu):
    done = on_gpu()
    assert done.returncode == 0 and done.stderr == ""
    assert re.findall(r"^(\w+): exit code 0, \d+ s$", done.stdout, re.M) == STEPS
    calls = "\n".join(done.calls)
    for part in ("-m pip install", "-k not warpgroups", "-k warpgroups", "dpn4_64 --batch 1 --ours", "pipeline"):
        assert part in calls
    assert "bottlenecks --dtype bf16 --only x32x24 --device cuda --batch 1 --batch 32 --batch 128 --json" in calls
    assert [c.split(":")[0] for c in done.calls if "--ours" in c] == ["mma", "mma", "wgmma", "wgmma"]
    assert "there is no compute-sanitizer" in done.logs["sanitizer"] and "there is no ncu" in done.logs["ncu"]


def test_the_first_steps_are_those_that_tell_most():
    """And each step has its seconds: of those of the first six, a lent machine's ten minutes hold all."""
    seconds = {name: int(number) for name, number in re.findall(r"\[(\w+)\]=(\d+)", SCRIPT.read_text())}
    assert list(seconds) == STEPS and sum(seconds[name] for name in STEPS[:6]) <= 600


def test_without_a_card_everything_says_so(on_gpu):
    done = on_gpu(card=False)
    assert done.returncode == 0 and done.calls == []
    assert {log.strip() for log in done.logs.values()} == {"skipped: there is no nvidia-smi on PATH, so no NVIDIA GPU"}


def test_a_step_that_would_not_fit_is_skipped(on_gpu):
    done = on_gpu("machine", "build", "pipeline", BUDGET="31")
    assert done.returncode == 0 and "this is the output" in done.logs["machine"]
    assert re.fullmatch(r"skipped: \d+ of 31 seconds are left, too few for one that may take 180\n", done.logs["build"])
    assert "-m hrpose bench pipeline" in "\n".join(done.calls)


def test_a_step_stops_at_its_limit_and_the_next_one_runs(on_gpu):
    done = on_gpu("tests", "pipeline", LIMIT="2", SLOW="-m pytest")
    assert done.returncode == 1 and "failed: tests" in done.stdout
    assert re.search(r"stopped after \d seconds", done.logs["tests"]) and "tests: exit code 124" in done.stdout
    assert "pipeline: exit code 0" in done.stdout


def test_without_a_build_nothing_runs(on_gpu):
    done = on_gpu("build", "tests", "dpn4_64", WRONG="pip install")
    assert done.returncode == 1 and len(done.calls) == 1
    assert done.logs["tests"] == done.logs["dpn4_64"] == "skipped: there is no build\n"


def test_kernels_for_warpgroups_that_fail_are_left_out(on_gpu):
    done = on_gpu("warpgroups", "bottlenecks", "profile", WRONG="-k warpgroups")
    assert done.returncode == 1 and "failed: warpgroups" in done.stdout
    assert [c.split(":")[0] for c in done.calls if "bench" in c] == ["mma", "mma", "mma"]


def test_reports_are_one_table_and_one_archive(on_gpu, tmp_path):
    def entry(name, kind, median):
        return {"name": name, "kind": kind, "median": median, "share": 0.5}

    row = {"op": "bottlenecks", "shape": "DPM C=64, 1x32x24", "dtype": "bf16", "error": None, "absent": {}}
    row["entries"] = [entry("hrpose", "hrpose", 0.04), entry("hrpose, wgmma", "hrpose", 0.025)]
    row["entries"] += [entry("torch.compile", "pytorch", 0.1), entry("eager", "reference", 0.3)]
    wrong = row | {"shape": "2x", "entries": [], "error": "it is wrong", "absent": {"somebody": "not installed"}}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bottlenecks.json").write_text(json.dumps({"rows": [row, wrong]}))
    done = on_gpu("machine", ARCHIVE=str(tmp_path / "all.tar.gz"))
    lines = done.stdout.splitlines()
    assert re.search(r"40\.0 us  50\.0% of peak   2\.50 x  hrpose$", lines[-4])
    assert re.search(r"25\.0 us  50\.0% of peak   4\.00 x  hrpose, wgmma$", lines[-3])
    assert "ERROR it is wrong" in lines[-2] and "without somebody: not installed" in lines[-1]
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert {"./machine.log", "./summary.txt", "./bottlenecks.json"} <= set(archive.getnames())


def test_unknown_steps_are_named(on_gpu):
    done = on_gpu("machine", "everything")
    assert done.returncode == 2 and done.stderr.endswith("chains, got everything\n") and done.calls == []
