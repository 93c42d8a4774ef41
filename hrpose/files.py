"""Writing files so that a reader, or a power cut, never meets half of one."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from hrpose.errors import InputError


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all: to a file beside it, flushed to disk, which is then renamed.

    Folders that are missing are made. Where writing fails (disk full, no permission) the previous file stays as it was.
    What is not a regular file, such as /dev/stdout, is written to as it is: a rename would replace the device.
    Raises: InputError naming the path.
    """
    path = Path(path)
    # Cut short, because a name has at most 255 bytes; two threads never write to the same one.
    beside = path.parent / f".{path.name[:40]}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:  # an interrupt, too, leaves nothing behind
        with contextlib.suppress(OSError, ValueError):
            beside.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
        if isinstance(error, ValueError):  # a name with a zero byte
            raise InputError(f"{path}: cannot be written ({error})") from error
        raise
