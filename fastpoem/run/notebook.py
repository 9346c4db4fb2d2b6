"""What a person sees of a run in a notebook: one output of its cell, drawn anew while the run goes on.

A kernel has no terminal, and its outputs cannot be written over but by their id. So everything that the console would say is kept here, and
drawn as a whole: what is trained, the bar, the loss so far, the last rows, poems. It is HTML and SVG without a script or a library, which
every notebook shows and keeps; its colours are those of the text around it. A thread draws it twice a second, whatever a step takes; what it
costs does not grow with the run, as all of it is bounded. The last state is drawn by `close`, so a cell that is stopped leaves it on view.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from typing import Any

from fastpoem.reporting.svg import COLOURS, curve, picture
from fastpoem.run.console import Figures, Voice, step_line
from fastpoem.run.words import clock, language, rounded, share

SECONDS = 0.5  # between two drawings
STEPS, EPOCHS = 10, 30  # rows of the table
LINES, KEPT = 12, 500  # on view, the rest folded away
POINTS = 300  # of the curve, at most twice as many
COLUMNS = ("epoch", "step", "loss", "accuracy", "val. loss", "val. accuracy", "tokens/s", "time")
STYLE = f"""<style>.fastpoem{{font:13px/1.5 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;max-width:1000px}}
.fastpoem table{{margin:4px 0;border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}}
.fastpoem td,.fastpoem th{{padding:1px 12px 1px 0;text-align:right;border:0;font-weight:400;white-space:nowrap}}
.fastpoem tr{{background:none!important}}
.fastpoem th{{opacity:.7}}.fastpoem .epoch td{{font-weight:600}}
.fastpoem .told td,.fastpoem .told th{{text-align:left;vertical-align:baseline;white-space:pre-wrap;overflow-wrap:anywhere}}
.fastpoem .told th{{white-space:nowrap}}.fastpoem .faint{{opacity:.7;white-space:pre}}
.fastpoem .ends{{white-space:pre;display:flex;justify-content:space-between;gap:16px}}
.fastpoem .bar{{height:8px;border-radius:4px;overflow:hidden;background:rgba(128,128,128,.25)}}
.fastpoem .bar div{{height:8px;background:{COLOURS[0]}}}
.fastpoem .both{{display:flex;flex-wrap:wrap;gap:8px 24px;align-items:flex-start;margin:8px 0}}</style>"""


def voice_of(quiet: bool, lang: str) -> Voice:
    """What speaks where this is called: in a notebook's kernel, or on a console."""
    return Notebook(lang) if not quiet and in_a_notebook() else Voice(quiet, lang)


def in_a_notebook() -> bool:
    """Whether a kernel runs this. Spyder's console is one too, which shows no output anew."""
    ipython = sys.modules.get("IPython")  # who runs in a kernel has it
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None and "spyder_kernels" not in sys.modules


class Curve:
    """Points (step, value), of which neighbours are put together where they become too many."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._each, self._next = 1, list[tuple[float, float]]()

    def add(self, step: int, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        self._next.append((step, value))
        if len(self._next) == self._each:
            self.points.append(_middle(self._next))
            self._next = []
        if len(self.points) == 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self._each = [_middle(pair) for pair in pairs], 2 * self._each


def _middle(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*points, strict=True)
    return sum(xs) / len(xs), sum(ys) / len(ys)


class Notebook(Voice):
    """The voice of a run in a notebook. Other threads may speak too; nothing waits for a drawing."""

    def __init__(self, lang: str = "auto") -> None:
        super().__init__(lang=lang)
        self.lang, self.live = language(lang, True), True
        self._before: list[tuple[str, str]] = []  # (label, text) said before training
        self._after: deque[tuple[str, str]] = deque(maxlen=KEPT)  # and since
        self._began = False
        self._rows: dict[bool, deque[dict[str, Any]]] = {False: deque(maxlen=STEPS), True: deque(maxlen=EPOCHS)}
        self._loss, self._validation = Curve(), Curve()
        self._drawn_of: Figures | None = None
        self._output: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw_on, name="notebook", daemon=True)

    def say(self, english: str, *values: Any) -> None:
        (self._after if self._began else self._before).append(("", self.words(english, *values)))
        self._show()

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        (self._after if self._began else self._before).extend((self.words(label), text) for label, text in rows)
        self._show()

    def start(self, done: int, total: int, steps: int, epochs: int, rows: Sequence[dict[str, Any]] = ()) -> None:
        self._began = True
        for row in rows:
            self._keep(row)
            self._loss.add(row["step"], row.get("loss_mean"))
        super().start(done, total, steps, epochs)

    def advance(self) -> None:
        super().advance()
        if self.figures is not self._drawn_of and self.figures is not None:
            self._drawn_of = self.figures
            self._loss.add(self.done, self.figures.loss)

    def row(self, row: dict[str, Any], seconds_left: float | None = None) -> None:
        self._keep(row)
        if "skipped" in row and "event" not in row:  # why is in no column
            self.say(step_line(row, self.epochs, self.total, None, self.lang))

    def close(self) -> None:
        self._over.set()
        if self._output is not None:
            self._thread.join()
            self._draw()

    def _keep(self, row: dict[str, Any]) -> None:
        steps = self._rows[False]
        if (
            "event" in row and steps and steps[-1]["step"] == row["step"]
        ):  # the epoch's row is in the place of its last step's
            last = steps.pop()
            row = {name: last[name] for name in ("tokens_per_s", "seconds") if name in last} | row
        self._rows["event" in row].append(row)
        self._validation.add(row["step"], row.get("val_loss"))

    def _show(self) -> None:
        """Have an output, which is drawn from now on."""
        with self._lock, suppress(Exception):  # a frontend that is gone is no reason to stop training
            if self._output is None:
                from IPython.display import display

                self._output = display(self._bundle(), raw=True, display_id=True)
                self._thread.start()

    def _hide(self) -> None:
        """It stays."""

    def _draw_on(self) -> None:
        while not self._over.wait(SECONDS):
            self._draw()

    def _draw(self) -> None:
        with suppress(Exception):
            self._output.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        """The output, and what stands for it where HTML is not shown."""
        plain = [f"{label}  {text}".strip() for label, text in [*self._before, *self._after]]
        return {"text/html": self.html(), "text/plain": "\n".join([*(self._where() if self._began else ()), *plain])}

    def html(self) -> str:
        """All of it, as it is now."""
        parts = [STYLE, _said(self._before)]
        phase = next(iter(self._phases[-1:]), "")
        if self._began:
            where, after = self._where()
            parts.append(f'<div class="ends"><span>{escape(where)}</span><span>{escape(after)}</span></div>')
            done = f"width:{self.done / max(1, self.total):.1%}"
            parts.append(f'<div class="bar" role="progressbar"><div style="{done}"></div></div>')
        if phase or self._training or self.figures:
            parts.append(f'<div class="faint">{escape(str(phase) or self._told().plain)}</div>')
        lines = [(self.words("loss"), "plain", [*self._loss.points])]
        lines.append((self.words("validation loss"), "dots", [*self._validation.points]))
        drawn = picture(curve(lines)) if self._over.is_set() else curve(lines)
        parts.append(f'<div class="both">{drawn}{self._table()}</div>')
        said = [*self._after]
        if len(said) > LINES:
            parts.append(
                f"<details><summary>{self.words('{0} lines before these', len(said) - LINES)}</summary>{_said(said[:-LINES])}</details>"
            )
        return f'<div class="fastpoem">{"".join([*parts, _said(said[-LINES:])])}</div>'

    def _table(self) -> str:
        rows = sorted([*self._rows[False], *self._rows[True]], key=lambda row: (row["step"], "event" in row))
        cells = [_cells(row) for row in rows]
        shown = [at for at in range(len(COLUMNS)) if any(line[at] for line in cells)]  # without validation, no columns
        lines = [
            f"<tr{' class=epoch' * ('event' in row)}>{''.join(f'<td>{line[at]}</td>' for at in shown)}</tr>"
            for row, line in zip(rows, cells, strict=True)
        ]
        head = "".join(f"<th>{self.words(COLUMNS[at])}</th>" for at in shown)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>" if lines else ""


def _cells(row: dict[str, Any]) -> list[str]:
    """A row of metrics.jsonl as COLUMNS has it; empty what is not in it, or is no number."""
    known = {name: value for name, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
    write = lambda name, how: how(known[name]) if name in known else ""
    loss, accuracy = ("mean_loss", "mean_accuracy") if "event" in row else ("loss_mean", "accuracy_mean")
    return [
        str(row["epoch"]),
        f"{row['step']:,}",
        write(loss, "{:.3f}".format),
        write(accuracy, share),
        write("val_loss", "{:.3f}".format),
        write("val_accuracy", share),
        write("tokens_per_s", rounded),
        write("seconds", clock),
    ]


def _said(lines: Sequence[tuple[str, str]]) -> str:
    left = 'style="text-align:left"'  # for notebooks that are not trusted, which leave STYLE out
    cells = [
        f"<tr><th {left}>{escape(label)}</th><td {left}>{escape(text)}</td></tr>"
        if label
        else f'<tr><td colspan="2" {left}>{escape(text)}</td></tr>'
        for label, text in lines
    ]
    return f'<table class="told">{"".join(cells)}</table>' if cells else ""
