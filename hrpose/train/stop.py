"""Signals that ask a run to stop: noted, so that the step in progress is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(BaseException):
    """The run was asked to stop by a signal (SIGTERM, SIGINT, SIGHUP) and its checkpoint is written.

    Like KeyboardInterrupt no Exception: it may be raised by a signal within code that catches those.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # what a shell reports for a process that died of the signal


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGHUP instead of dying of them, so that the step in progress is finished and saved.

    A second signal does what it would have done without us. Signals that this process was started to ignore (nohup)
    stay ignored.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at_once: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    @contextmanager
    def at_once(self, when: str) -> Iterator[None]:
        """Where nothing is lost by it, a signal raises Interrupted on the spot."""
        self._at_once = when
        try:
            self._raise_if_asked()
            yield
            self._raise_if_asked()  # Python drops what a handler raises within __del__
        finally:
            self._at_once = None

    def _raise_if_asked(self) -> None:
        if self.signal:
            raise Interrupted(f"stopped {self._at_once}", self.signal)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        self._restore()
        if self._at_once:
            self._raise_if_asked()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: Any) -> None:
        self._restore()
