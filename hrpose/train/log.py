"""The log of a run: one JSON object a line, cut back on resume to what the checkpoint knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hrpose.files import write_atomically


class RunLog:
    """Appends entries to a JSON-lines file. Each has "epoch" and "step" (batches done in that epoch)."""

    def __init__(self, path: str | Path, resume_from: tuple[int, int] | None = None) -> None:
        """Start a new log, or with `resume_from` = (epoch, step) keep the entries of the past up to there."""
        self.path = Path(path)
        kept = []
        if resume_from is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # the last line of a run that was killed while it wrote
                    continue
                if (entry["epoch"], entry["step"]) <= resume_from:
                    kept.append(line)
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
