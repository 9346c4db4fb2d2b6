"""SIGINT, SIGTERM and a closed terminal's SIGHUP ask a command to stop. The handler notes that, and we ask for it at places of our own.

Raising from a handler would raise wherever the program happens to be: inside a library's import, which then swallows it, ends half
imported, or aborts the process. So nothing here raises but `ask`, which stands between the stages of an import, between blocks of a text,
between checks, and in every loop of ours. What may last long and asks nothing (a download) runs beside us: `waiting`. Training asks by
`StopRequest`: it finishes its step and writes a checkpoint. While a command only imports, which takes half a minute on busy cores, nothing
can be lost and there is nothing to tidy: there the handler itself ends the process, without raising.

A second signal ends the process then and there. One that comes within a moment of the first is the same request: `timeout` sends to the
process and to its group, a terminal that closes is announced by the shell and by the kernel.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

from fastpoem.errors import rank

MOMENT = 0.1  # seconds; nobody presses Ctrl-C twice within it
AGAIN = "(again: stop now)"
Result = TypeVar("Result")

_noted: int | None = None
_since = 0.0
_before: dict[int, Any] = {}  # whose turn it was before we listened; empty while we do not
_a_command = False  # the process is ours to end
_on_a_terminal = False  # whether the handler may answer there
_importing = False  # and does nothing else


class Stopped(KeyboardInterrupt):
    """A signal was noted, and its place to be answered is here. Not an Exception: what goes on after errors must not go on after this."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def heeded() -> list[int]:
    """The signals that ask a command to stop. nohup has SIGHUP ignored, and so it stays."""
    hangup: list[int] = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
    return [signal.SIGINT, signal.SIGTERM, *(one for one in hangup if signal.getsignal(one) != signal.SIG_IGN)]


def listen(*, command: bool = False) -> None:
    """Note these signals from now on. command: for the rest of the process, and on a terminal it is said at once that one was heard."""
    global _a_command, _on_a_terminal
    if command:
        _a_command = True
        _on_a_terminal = sys.stderr is not None and os.isatty(
            2
        )  # None where it is closed: 2 may be a file of ours later
    if not _before and _in_the_main_thread():  # elsewhere Python allows no handlers
        for number in heeded():
            _before[number] = signal.signal(number, _note)


def _leave() -> None:
    """Give the signals back to who had them."""
    global _noted
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
    _noted = None


def _note(number: int, frame: FrameType | None) -> None:
    """The handler. It must not touch a lock, which the code that it interrupts may hold: no printing, no events."""
    global _noted, _since
    if _importing:
        if _on_a_terminal:  # where something may stand in the line already
            os.write(2, b"\n")
        leave(number)
    if _noted is None:
        _noted, _since = number, time.monotonic()
        if _on_a_terminal:
            with suppress(OSError):
                os.write(2, f"\nstopping {AGAIN}\n".encode())
    elif time.monotonic() - _since > MOMENT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def noted() -> int | None:
    """The number of the signal that asked this process to stop, or None.

    Once it is known here, a second one need not wait for Python, which may hang in a library: it is the system's."""
    if _noted is not None and time.monotonic() - _since > MOMENT and _in_the_main_thread():
        for number in _before:
            signal.signal(number, signal.SIG_DFL)
    return _noted


def _in_the_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def ask() -> None:
    """Raises Stopped where a signal has been noted. To be called where a stop leaves nothing half done."""
    if (number := noted()) is not None:
        raise Stopped(number)


def imported(*modules: str) -> None:
    """Import these one after another, asking between them: each may take seconds."""
    global _importing
    for name in modules:
        ask()
        _importing = _a_command
        try:
            importlib.import_module(name)
        finally:
            _importing = False
    ask()


def leave(number: int) -> NoReturn:
    """End the process then and there, whatever still runs in other threads, with the line and the code of a signal."""
    if sys.stderr is not None and rank() == 0:
        with suppress(OSError):
            os.write(2, f"fastpoem: {Stopped(number)}\n".encode())
    os._exit(128 + number)


def waiting(call: Callable[[], Result]) -> Result:
    """What `call` returns or raises, computed in a thread that a signal does not wait for. Raises Stopped, the thread then being left to
    itself: only for what may be cut off anywhere, as a download."""
    found: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        ask()
    if failed:
        raise failed[0]
    return found[0]


def deliver(number: int) -> None:
    """Give a signal that was noted to whoever listened before: Python raises KeyboardInterrupt for SIGINT, the system ends the process for
    the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    signal.raise_signal(number)


class StopRequest:
    """A context in which the signals are noted, and what asks for them in a loop: `signal` is None, or the number of the first.

    Where a command listens already nothing changes; elsewhere the handlers of before come back at the end."""

    _mine = False

    def __enter__(self) -> StopRequest:
        self._mine = not _before
        listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            self._last = _noted
            _leave()

    _last: int | None = None

    @property
    def signal(self) -> int | None:
        return noted() or self._last

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until a signal comes. By looking: a handler must not touch a lock, which it may have interrupted."""
        end = time.monotonic() + seconds
        while self.signal is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(0.1, left))

    @contextmanager
    def answered(self, say: Callable[[str], None], doing: str) -> Iterator[None]:
        """While this lasts, the first signal is answered at once by a line of `say`: by a thread that looks, since a handler may not print,
        and in a notebook only Python's own output is seen."""
        global _on_a_terminal
        over, told, before = threading.Event(), threading.Lock(), _on_a_terminal

        def tell() -> None:
            if told.acquire(blocking=False):
                say(f"{doing} {AGAIN}")

        def look() -> None:
            while not over.wait(0.1):
                if _noted is not None:
                    tell()
                    return

        thread = threading.Thread(target=look, name="signals", daemon=True)
        thread.start()
        _on_a_terminal = False
        try:
            yield
        finally:
            _on_a_terminal = before
            over.set()
            thread.join()
            if _noted is not None:
                tell()
