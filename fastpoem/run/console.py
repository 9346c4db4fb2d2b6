"""What a person sees of a run: lines, and on a terminal below them what is being done right now.

There is one live display, of two rows at most, and it is up whenever something is done that takes longer than a moment: while the step is
compiled, while training runs, and to the end, while the last poems are validated on and the last checkpoint is written. Where nobody
watches (a pipe, a file) the same is told in lines, and of silence that lasts it is said what it is.

What it shows it was told: it asks no device for anything. It is drawn by a thread of its own four times a second, whatever a step takes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fastpoem.run import words
from fastpoem.run.words import clock, put, rounded, share, size

NOTICED = 3.0  # seconds of silence after which somebody wonders
MOMENT = 0.3  # seconds that are over before a display of what they are for could be read
A_SECOND = 4  # drawings
COLUMNS = 80  # of a line in a log, where what it says allows that
LABEL = 12  # columns of a summary's first


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody listens any more, which is no reason to stop training."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Figures(NamedTuple):
    """The newest that is known of training. seconds_a_step: None where nobody knows yet; memory: bytes."""

    loss: float
    accuracy: float
    tokens_per_s: float
    seconds_a_step: float | None
    memory: int


class _Phase:
    """Something that is being done, `done` of `total` parts of it."""

    def __init__(self, what: str) -> None:
        self.what, self.begun, self.done, self.total = what, time.monotonic(), 0, 0

    def at(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def __str__(self) -> str:
        parts = f" {self.done}/{self.total}" if self.total else ""
        return f"{self.what} …{parts}  {clock(time.monotonic() - self.begun)}"


class Voice:
    """Lines on the console, with a live display below them where there is a terminal. quiet: nothing at all. lang: auto, en or zh."""

    def __init__(self, quiet: bool = False, lang: str = "auto", console: Console | None = None) -> None:
        self.console = console or _Console(highlight=False, quiet=quiet, soft_wrap=True)
        self.lang = words.language(lang, self.console.is_terminal)
        self.quiet = quiet
        self.live = not quiet and self.console.is_terminal and not self.console.is_dumb_terminal
        self.done, self.total, self.epochs, self.steps = 0, 0, 1, 1
        self.figures: Figures | None = None
        self.busy: Callable[[], bool] = lambda: False  # whether a checkpoint is being written meanwhile
        self._phases: list[_Phase] = []
        self._training = False
        self._lock = threading.RLock()
        self._display = Live(
            console=self.console, refresh_per_second=A_SECOND, transient=True, get_renderable=self._drawn
        )

    def words(self, english: str, *values: Any) -> str:
        return put(self.lang, english, *values)

    def say(self, english: str, *values: Any) -> None:
        """A line. english: a template of str.format where there are values, in which it is looked up in the console's language."""
        line = self.words(english, *values)
        try:
            spelled = line.encode(self.console.encoding, "backslashreplace").decode(self.console.encoding)
            self.console.print(spelled, markup=False)
        except OSError:  # a terminal that is gone
            _Console.on_broken_pipe(self.console)  # type: ignore[arg-type]

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """A summary: (label in English, text) a row. On a terminal its lines are wrapped to the width, in a pipe they are whole."""
        for label, text in rows:
            name = Text(self.words(label))
            name.pad_right(max(1, LABEL - name.cell_len))
            if not self.live:
                self.say(f"{name.plain}{text}")
                continue
            grid = Table.grid(padding=0)
            grid.add_column(width=LABEL, no_wrap=True, style="bold")
            grid.add_column(max_width=self.console.width - LABEL - 1, overflow="fold")
            grid.add_row(Text(name.plain.strip()), Text(text))
            self.console.print(grid, soft_wrap=False)

    @contextmanager
    def phase(self, english: str, *values: Any) -> Iterator[Callable[[int, int], None]]:
        """Inside, something is done that says nothing of its own: on a terminal it is shown, with how many of its parts are done where what
        this gives is called with that; elsewhere, if it lasts long enough to be noticed, it is said."""
        phase = _Phase(self.words(english, *values))
        late = self._show if self.live else lambda: self.say(f"{phase.what} …")
        timer = threading.Timer(MOMENT if self.live else NOTICED, late)
        timer.daemon = True
        with self._lock:
            self._phases.append(phase)
        timer.start()
        try:
            yield phase.at
        finally:
            timer.cancel()
            with self._lock:
                self._phases.remove(phase)
            self._hide()

    def start(self, done: int, total: int, steps: int, epochs: int, rows: Sequence[dict[str, Any]] = ()) -> None:
        """Training begins: `done` of `total` steps are behind it, which left `rows`; `steps` are an epoch of `epochs`."""
        self.done, self.total, self.steps, self.epochs, self._training = done, total, steps, epochs, True
        self._show()

    def advance(self) -> None:
        self.done += 1

    def row(self, row: dict[str, Any], seconds_left: float | None = None) -> None:
        """A row of metrics.jsonl, its losses possibly not finite."""
        if row.get("event") == "epoch":
            self.say(epoch_line(row, self.epochs, self.lang))
        else:
            self.say(step_line(row, self.epochs, self.total, seconds_left, self.lang, left=not self.live))

    def stop(self) -> None:
        self._training = False
        self._hide()

    def close(self) -> None:
        """Nothing will be said any more."""

    def _show(self) -> None:
        with self._lock, suppress(OSError):  # a terminal that is gone is no reason to stop training
            if self.live and (self._training or self._phases) and not self._display.is_started:
                self._display.start(refresh=True)
                self.console.show_cursor(True)  # or a process that is killed would leave a terminal without

    def _hide(self) -> None:
        with self._lock, suppress(OSError):
            if self._display.is_started and not (self._training or self._phases):
                self._display.stop()

    def _drawn(self) -> RenderableType:
        rows: list[RenderableType] = []
        if self._training:
            rows += [self._bar(), self._told()]
        if phase := next(iter(self._phases[-1:]), None):
            kind = "line" if self.console.options.ascii_only else "dots"
            rows[1:] = [Spinner(kind, Text(str(phase), no_wrap=True, overflow="ellipsis"))]
        return Group(*rows)

    def _where(self) -> tuple[str, str]:
        """How far training is: in epochs and steps; as a share, with the time left where that is known."""
        epoch = min(self.epochs, self.done // self.steps + 1)
        where = [self.words("epoch {0}/{1}", epoch, self.epochs), self.words("step {0}/{1}", self.done, self.total)]
        after = f"{self.done / max(1, self.total):.0%}"
        pace = self.figures and self.figures.seconds_a_step
        if pace is not None:
            after += "  " + self.words("left {0}", clock(pace * max(0, self.total - self.done)))
        return "  ".join(where), after

    def _bar(self) -> RenderableType:
        where, after = self._where()
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(1, self.total), completed=self.done)
        grid.add_row(Text(where), bar, Text(after))
        return grid

    def _told(self) -> Text:
        if self.figures is None:
            return Text(self.words("the first step …"), style="dim")
        parts = [
            self.words("loss {0}", f"{self.figures.loss:.3f}"),
            self.words("acc {0}", share(self.figures.accuracy)),
            self.words("{0} tok/s", rounded(self.figures.tokens_per_s)),
            size(self.figures.memory),
            *([self.words("saving")] if self.busy() else []),
        ]
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis", style="dim")


def step_line(
    row: dict[str, Any], epochs: int, last_step: int, seconds_left: float | None, lang: str = "en", *, left: bool = True
) -> str:
    """A logged step for a person, in 80 columns. `row` as in metrics.jsonl, its losses possibly not finite; the loss and the accuracy
    shown are the means since the last line, as one step's follow the length of its poems. seconds_left: None where nobody knows; it is
    left out where there is no room for it."""
    parts = [
        put(lang, "epoch {0}/{1}", row["epoch"], epochs),
        put(lang, "step {0}/{1}", row["step"], last_step),
        put(lang, "mean loss {0}", f"{row['loss_mean']:.3f}"),
        put(lang, "acc {0}", share(row["accuracy_mean"])),
        put(lang, "{0} tok/s", rounded(row["tokens_per_s"])),
    ]
    if left and seconds_left is not None:
        for_it = put(lang, "left {0}", clock(seconds_left))
        parts += [for_it] if cell_len("  ".join([*parts, for_it])) <= COLUMNS else []
    if "skipped" in row:
        why = f"too large for fp16; the loss scale is now {row['loss_scale']:,.0f}" if "loss_scale" in row else ""
        parts.append(put(lang, "skipped {0} ({1})", row["skipped"], why or "loss or gradient not finite"))
    return "  ".join(parts)


def epoch_line(row: dict[str, Any], epochs: int, lang: str = "en") -> str:
    """An epoch for a person: means over its steps, and what validation found."""
    parts = [
        put(lang, "epoch {0}/{1}", row["epoch"], epochs),
        put(lang, "mean loss {0}", f"{row['mean_loss']:.4f}"),
        put(lang, "acc {0}", f"{row['mean_accuracy']:.2%}"),
    ]
    if row["val_loss"] is not None:
        parts.append(put(lang, "validation loss {0:.4f}", row["val_loss"]))
        parts.append(put(lang, "acc {0}", f"{row['val_accuracy']:.2%}"))
    return "  ".join(parts)
