"""The log of a run: one JSON object a line, cut back on resume to what the checkpoint knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hrpose.errors import InputError, check
from hrpose.files import write_atomically


class RunLog:
    """Appends entries to a JSON-lines file.

    Each has "kind" ("step" or "epoch"), "epoch" (from 0) and "step" (batches done in that epoch).
    """

    def __init__(self, path: str | Path, resume_from: tuple[int, int] | None = None) -> None:
        """Start a new log, or with `resume_from` = (epoch, step) keep the entries that come before that point.

        An epoch's own entry is written after its last step, so a checkpoint within the epoch, or at its last step,
        comes before it. Lines that are not whole (the end of a run that was killed while it wrote) are dropped.
        """
        self.path = Path(path)
        old = self.path.read_bytes() if self.path.exists() else None
        lines = [] if resume_from is None or old is None else old.splitlines()
        new = b"".join(line + b"\n" for line in lines if _is_before(line, resume_from))
        if new != old:
            write_atomically(self.path, new)

    def write(self, **entry: Any) -> None:
        """Append an entry. Raises: InputError naming the file if it cannot be written (disk full)."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def entries(self) -> list[dict[str, Any]]:
        return read_log(self.path)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log; without the last line if a run that writes it, or was killed, has not ended it. None of a
    file that is not there. Raises: InputError naming file and line if it is no log."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        check(isinstance(entry, dict), f"{path}, line {number}", f"must be an object of JSON, got {line[:40]!r}")
        entries.append(entry)
    return entries


def _is_before(line: bytes, resume_from: tuple[int, int]) -> bool:
    try:
        entry = json.loads(line)
        epoch, step = entry["epoch"], entry["step"]
        if entry["kind"] == "epoch":
            return epoch < resume_from[0]
        return (epoch, step) <= resume_from
    except (ValueError, TypeError, KeyError):
        return False
