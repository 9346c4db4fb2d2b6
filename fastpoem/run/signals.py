"""SIGINT, SIGTERM and a closed terminal's SIGHUP are, in training, a request that the loop answers.

The request is noted, the loop finishes the step it is in and writes a checkpoint; a second signal ends the process then and there.
What the signals do before and after training is `fastpoem.cli.run_command`'s.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType


def heeded() -> list[int]:
    """The signals that ask a command to stop. nohup has SIGHUP ignored, and so it stays."""
    hangup: list[int] = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
    return [signal.SIGINT, signal.SIGTERM, *(one for one in hangup if signal.getsignal(one) != signal.SIG_IGN)]


class StopRequest:
    """A context in which the signals are noted in `signal` (None, or its number) and not raised."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._note) for number in heeded()}
        else:
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until a signal comes. By looking: a handler must not touch a lock, which it may have interrupted."""
        end = time.monotonic() + seconds
        while self.signal is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for one in self._before:
            signal.signal(one, signal.SIG_DFL)
