"""Writing files so that a reader, or a power cut, never meets half of one."""

from __future__ import annotations

import os
from pathlib import Path

from hrpose.errors import InputError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all: to a file beside it first, flushed to disk, then renamed.

    Where writing fails (disk full, no permission) the previous file stays as it was. Raises: InputError naming the path.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
