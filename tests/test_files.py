"""Files are written whole or not at all, whatever fails in between."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hrpose
from hrpose import files
from hrpose.errors import InputError
from hrpose.files import write_atomically


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "file.bin"
    for content in (b"first", b"", b"second" * 100_000):
        write_atomically(path, content)
        assert path.read_bytes() == content
    write_atomically(str(path), b"from a text path")
    assert path.read_bytes() == b"from a text path"
    assert os.listdir(path.parent) == ["file.bin"]


def disk_full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """A file on a disk that is full after 10 bytes."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, content):
        self.file.write(content[:10])
        disk_full()


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_the_previous_file(tmp_path, monkeypatch, where):
    path = tmp_path / "last.pt"
    write_atomically(path, b"the previous one")
    if where == "write":
        monkeypatch.setattr(files, "open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(os, where, disk_full)
    with pytest.raises(InputError, match=r"last.pt: cannot be written \(No space left on device\)$"):
        write_atomically(path, b"the next one, longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"the previous one" and os.listdir(tmp_path) == ["last.pt"]


def test_a_real_full_disk(tmp_path):
    """A file size limit of the operating system, met in the middle of the content."""
    code = f"""
import resource, signal
from hrpose.files import write_atomically
write_atomically({str(tmp_path / "f")!r}, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_atomically({str(tmp_path / "f")!r}, bytes(5 << 20))
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(hrpose.__file__).parents[1]
    )
    assert "f: cannot be written (File too large)" in done.stdout, done.stderr
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_passes_and_leaves_nothing_behind(tmp_path, monkeypatch, stop):
    path = tmp_path / "last.pt"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(stop))
    with pytest.raises(stop):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pt"]


def test_content_is_on_the_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    """A power cut after the rename must not find an empty file under the name."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(os.fstat(descriptor).st_size), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "file", b"12345")
    assert calls == [5, "replace"]


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in ("file/below.pt", "folder", "x" * 300, "zero\0byte"):
        with pytest.raises(InputError, match="cannot be written") as caught:
            write_atomically(f"{tmp_path}/{path}", b"new")
        assert str(caught.value).startswith(f"{tmp_path}/{path}: ")
    for path in ("", "."):
        with pytest.raises(InputError, match="cannot be written"):
            write_atomically(path, b"new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_long_name_that_the_file_system_allows(tmp_path):
    write_atomically(tmp_path / ("n" * 255), b"content")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"content"


def test_what_is_no_regular_file_stays_what_it_is(tmp_path):
    """Renaming over /dev/null would replace the device for the whole machine."""
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomically(pipe, b"through the pipe")
    reader.join(10)
    assert received == [b"through the pipe"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_threads_that_write_one_file_do_not_mix(tmp_path):
    path, errors = tmp_path / "file", []

    def write(letter):
        try:
            for _ in range(30):
                write_atomically(path, letter * 50_000)
                assert len(set(path.read_bytes())) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(bytes([65 + i]),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and path.stat().st_size == 50_000 and os.listdir(tmp_path) == ["file"]
