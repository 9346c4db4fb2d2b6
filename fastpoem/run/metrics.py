"""What a run tells programs: metrics.jsonl, and the mirrors of it that were asked for. What it tells a person is `fastpoem.run.console`'s."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastpoem import disk
from fastpoem.run.trackers import Trackers

LONGEST_ROW = 1 << 16  # bytes


class Mark(NamedTuple):
    """A place in metrics.jsonl: bytes before it, and their sha256."""

    bytes: int
    sha256: str


class Metrics:
    """The rows of a run: kept in `rows`, appended to `metrics.jsonl` a whole line at a time, mirrored to `trackers` once there are any.

    Rows that the disk does not take stay in memory, no part of them in the file, and are tried again with the next one; a file that
    vanishes is written anew. `error` says why rows are missing from the file, or is None.
    """

    def __init__(
        self,
        folder: Path,
        *,
        done: int,
        keep: Mark | None,
        say: Callable[[str], None],
        hold: Callable[[], None],
    ) -> None:
        """keep: what of an existing file belongs to the `done` steps that a run goes on from; the rest, of steps that will be done
        again, is cut off. hold: raises where the folder is another run's by now. Raises OSError."""
        self.path, self.say, self.hold = folder / "metrics.jsonl", say, hold
        self.error: str | None = None
        self.rows: list[dict[str, Any]] = []
        self._digest, self._size = hashlib.sha256(), 0
        self._before_last = self.mark()
        if keep is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        else:
            for row in _surviving(self.path, done, keep, say):
                self._add(row)
            self._file = self._write_anew()
        self._held = b""  # rows that are not in the file yet
        self.trackers: Trackers | None = None

    def mark(self, *, without_last: bool = False) -> Mark:
        """The place after all rows, or before the last."""
        return self._before_last if without_last else Mark(self._size, self._digest.hexdigest())

    def write(self, row: dict[str, Any]) -> None:
        """Add a row. Values that are not finite become null, as JSON has no others."""
        self._held += self._add({name: None if _is_odd(value) else value for name, value in row.items()})
        self.flush()
        if self.trackers is not None:
            self.trackers.write(self.rows[-1])

    def flush(self) -> None:
        """Bring the file up to date, as far as the disk lets."""
        try:
            self.hold()
            if not _is_same(self._file, self.path):
                self.say(f"{self.path} had vanished and is written anew")
                fresh = self._write_anew()
                os.close(self._file)
                self._file = fresh
            elif self._held:
                end = self._size - len(self._held)
                if os.pwrite(self._file, self._held, end) < len(self._held):
                    os.ftruncate(self._file, end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._held, self.error = b"", None
        except OSError as error:
            if self.error is None:
                self.say(f"{self.path} could not be written: {error}; its rows are kept in memory and tried again")
            self.error = f"{self.path} could not be written: {error}"

    def close(self) -> None:
        os.close(self._file)
        if self.trackers is not None:
            self.trackers.close()

    def _add(self, row: dict[str, Any]) -> bytes:
        line = _line(row)
        self.rows.append(row)
        self._before_last = self.mark()
        self._digest.update(line)
        self._size += len(line)
        return line

    def _write_anew(self) -> int:
        """Replace the file by one that holds all rows, in one step; a handle on it."""
        made = self.path.with_name(f".{self.path.name}.partial")
        made.unlink(missing_ok=True)
        disk.write_bytes(made, b"".join(map(_line, self.rows)))
        os.replace(made, self.path)
        return os.open(self.path, os.O_RDWR)


def fits(state: Mapping[str, Any]) -> bool:
    """Can the marks in a state have been written?"""
    marks = state.get("metrics"), state.get("metrics_at_the_end")
    return all(
        isinstance(mark, list) and len(mark) == 2 and type(mark[0]) is int and mark[0] >= 0 and isinstance(mark[1], str)
        for mark in marks
    )


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _is_odd(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _surviving(path: Path, done: int, keep: Mark, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows of an existing file that belong to the first `done` steps."""
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size >= keep.bytes:
                whole = stream.read(keep.bytes)
                if hashlib.sha256(whole).hexdigest() == keep.sha256:
                    return [json.loads(line) for line in whole.splitlines()]
            stream.seek(0)
            rows = list(_whole_rows(stream, done))
    except FileNotFoundError:
        rows = []
    say(f"{path} is not as it was when the checkpoint was written: {len(rows)} rows of it are whole and kept")
    return rows


def _whole_rows(stream: BinaryIO, done: int) -> Iterator[dict[str, Any]]:
    """Rows in rising order, none twice, up to the first line that is none."""
    last = (0, False)
    while line := stream.readline(LONGEST_ROW):
        try:
            row = json.loads(line)
            here = (row["step"], "event" in row)
            fits = line.endswith(b"\n") and type(here[0]) is int and last < here <= (done, True)
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if not fits:
            return
        yield row
        last = here


def _is_same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
