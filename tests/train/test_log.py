"""The log of a run is cut back to what its checkpoint knows."""

import json

import pytest

from hrpose.errors import InputError
from hrpose.train.log import RunLog


def entry(kind: str, epoch: int, step: int) -> str:
    return json.dumps({"kind": kind, "epoch": epoch, "step": step})


LINES = [
    entry("step", 0, 50), entry("step", 0, 100), entry("epoch", 0, 100), entry("step", 1, 50), entry("step", 1, 100),
    entry("epoch", 1, 100), entry("step", 2, 50),
]  # fmt: skip


@pytest.mark.parametrize(
    ("resume_from", "kept"),
    [((0, 0), 0), ((0, 50), 1), ((0, 99), 1), ((0, 100), 2), ((1, 0), 3), ((1, 70), 4), ((1, 100), 5), ((2, 0), 6)],
)
def test_entries_of_the_past_are_kept(tmp_path, resume_from, kept):
    """A checkpoint at (1, 100) is from before epoch 1 was scored, so that epoch's own entry is to come."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line + "\n" for line in LINES))
    log = RunLog(path, resume_from)
    assert log.entries() == [json.loads(line) for line in LINES[:kept]]
    log.write(kind="epoch", epoch=9, step=1, AP=0.5)
    assert log.entries()[-1] == {"kind": "epoch", "epoch": 9, "step": 1, "AP": 0.5}


def test_a_new_log_replaces_the_old(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("old\n")
    assert RunLog(path).entries() == []
    assert RunLog(tmp_path / "missing.jsonl", (3, 4)).entries() == []


@pytest.mark.parametrize(
    "junk",
    [
        b'{"kind": "ep',
        b"\x00\x00\xff",
        b"[1, 2]",
        b"3",
        b'{"kind": "step"}',
        b'{"kind": "step", "epoch": "0", "step": 1}',
        b"",
    ],
)
def test_lines_that_are_not_whole_are_dropped(tmp_path, junk):
    path = tmp_path / "log.jsonl"
    path.write_bytes(LINES[0].encode() + b"\n" + junk)
    assert RunLog(path, (1, 0)).entries() == [json.loads(LINES[0])]


def test_a_log_that_needs_no_cut_is_not_written(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line + "\n" for line in LINES))
    before = path.stat().st_mtime_ns, path.stat().st_ino
    RunLog(path, (2, 50))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_log_that_cannot_be_written(tmp_path):
    log = RunLog(tmp_path / "run" / "log.jsonl")
    log.path.unlink()
    log.path.mkdir()
    with pytest.raises(InputError, match=r"log.jsonl: cannot be written \(Is a directory\)"):
        log.write(kind="step", epoch=0, step=50)
