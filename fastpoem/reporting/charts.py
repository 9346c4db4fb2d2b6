"""Which charts a report has, as numbers: what the page draws as SVG and the PNGs with matplotlib is the same.

A chart has lines of several runs over one of three axes (steps, epochs, time). A rate of learning is drawn as it is; what is noisy is drawn
twice, as logged (thin) and smoothed (strong).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastpoem.reporting.told import Row, Told, number

Style = Literal["plain", "raw", "smooth", "dots", "dashed"]
AXES = ("step", "epoch", "time")
MOST = 400  # points of a line: more than a chart has room for
SPANS = 25  # a smoothed line looks back over this part of its rows
KNOWN = {
    "step", "epoch", "event", "lr", "loss", "loss_mean", "accuracy", "accuracy_mean", "grad_norm", "poems", "tokens", "tokens_per_s",
    "poems_per_s", "seconds", "skipped", "loss_scale", "spike_step", "spike_z", "mean_loss", "mean_accuracy", "val_loss", "val_accuracy",
}  # fmt: skip


class Point(NamedTuple):
    """Where a row stands on each axis, and its value. `epoch` and `seconds` are None where they are not known."""

    step: int
    epoch: float | None
    seconds: float | None
    value: float


class Line(NamedTuple):
    run: int
    label: str  # what it is beside its run, empty where that is plain
    style: Style
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """`unit` is what the vertical axis counts; `percent`: its values are shares; `log`: it is logarithmic; `zero`: it begins at 0."""

    key: str
    title: str
    unit: str
    lines: list[Line]
    percent: bool = False
    log: bool = False
    zero: bool = False
    note: str = ""

    def bounds(self) -> tuple[float, float]:
        """What the vertical axis spans: all of the strong lines, and of the thin ones all but their outermost hundredth."""
        values = list[float]()
        for line in self.lines:
            mine = sorted(point.value for point in line.points)
            cut = -(-len(mine) // 100) if line.style == "raw" else 0
            values += mine[cut : len(mine) - cut]
        low, high = min(values), max(values)
        if self.log:
            return low / 1.15, high * 1.15
        if self.zero:
            return 0.0, high * 1.06 or 1.0
        room = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
        low, high = low - room, high + room
        return (max(0.0, low), min(1.0, high)) if self.percent else (low, high)


def charts(runs: Sequence[Told]) -> list[Chart]:
    """The charts that the rows of some runs allow, without those that nothing is known for."""
    noisy = lambda *names: _lines(runs, lambda run, at: _noisy(run, at, *names))
    by_epoch = lambda ours, theirs: _lines(runs, lambda run, at: _epochs(run, at, ours, theirs))
    norms = noisy("grad_norm")
    found = [
        Chart("loss", "Loss", "nats per token", noisy("loss_mean", "loss")),
        Chart("accuracy", "Accuracy", "of tokens predicted", noisy("accuracy_mean", "accuracy"), percent=True),
        Chart("validation-loss", "Validation loss", "nats per token", by_epoch("val_loss", "mean_loss")),
        Chart(
            "validation-accuracy",
            "Validation accuracy",
            "of tokens predicted",
            by_epoch("val_accuracy", "mean_accuracy"),
            percent=True,
        ),
        Chart(
            "learning-rate",
            "Learning rate",
            "learning rate",
            _lines(runs, lambda run, at: _plain(run, at, "lr")),
            zero=True,
        ),
        Chart("gradient-norm", "Gradient norm", "global norm, before clipping", norms, log=_is_wide(norms)),
        Chart("throughput", "Throughput", "real tokens per second", _lines(runs, _speed), zero=True),
        Chart(
            "loss-scale", "Loss scale", "of fp16", _lines(runs, lambda run, at: _plain(run, at, "loss_scale")), log=True
        ),
    ]
    for name in _others(runs):
        lines = _lines(runs, lambda run, at, name=name: _plain(run, at, name, dots=True))  # type: ignore[misc]
        share = all(0 <= point.value <= 1 for line in lines for point in line.points)
        title = name.replace("_", " ").capitalize()
        found.append(Chart(name.replace("_", "-"), title, "share" if share else "", lines, percent=share, zero=True))
    return [chart for chart in found if any(line.points for line in chart.lines)]


def legend(one: Chart) -> str:
    """What the kinds of lines of a chart are."""
    styles = {line.style for line in one.lines}
    if "dashed" in styles:
        return "dashed: on the training poems, mean of the epoch"
    return "thin: as logged; strong: smoothed" if "raw" in styles else ""


def axes(runs: Sequence[Told]) -> list[str]:
    """The horizontal axes that every run's points stand on."""
    there = {"step": True, "epoch": all(run.steps_an_epoch for run in runs)}
    there["time"] = all(run.seconds is not None for run in runs)
    return [axis for axis in AXES if there[axis]]


def along(line: Line, axis: str, unit: float = 1.0) -> list[tuple[float, float]]:
    """(x, y) of a line's points on an axis; unit: seconds in what the axis of time counts."""
    at = {"step": 0, "epoch": 1, "time": 2}[axis]
    by = unit if axis == "time" else 1.0
    return [(place / by, point.value) for point in line.points if (place := point[at]) is not None]


def time_unit(runs: Sequence[Told]) -> tuple[float, str]:
    """(its seconds, its name) of the unit in which the longest run is a number that one can think of."""
    longest = max((run.seconds or 0.0 for run in runs), default=0.0)
    return (1.0, "seconds") if longest < 120 else (60.0, "minutes") if longest < 7200 else (3600.0, "hours")


Where = Callable[[Row], tuple[int, float | None, float | None]]


def _lines(runs: Sequence[Told], make: Callable[[Told, Where], Iterable[tuple[str, Style, list[Point]]]]) -> list[Line]:
    return [
        Line(index, label, style, thinned(points))
        for index, run in enumerate(runs)
        for label, style, points in make(run, _where(run))
        if points
    ]


def _where(run: Told) -> Where:
    """Where each row of a run stands on the axes."""
    clock = {row["step"]: number(row.get("seconds")) for row in run.steps}
    an_epoch = run.steps_an_epoch
    return lambda row: (row["step"], row["step"] / an_epoch if an_epoch else None, clock.get(row["step"]))


def _points(rows: Iterable[Row], at: Where, *names: str) -> list[Point]:
    """The finite values of the first of `names` that each row has."""
    found = []
    for row in rows:
        name = next((one for one in names if one in row), names[0])
        if (value := number(row.get(name))) is not None:
            found.append(Point(*at(row), value))
    return found


def _noisy(run: Told, at: Where, *names: str) -> list[tuple[str, Style, list[Point]]]:
    raw = _points(run.steps, at, *names)
    if len(raw) < SPANS:
        return [("", "plain", raw)]
    return [("as logged", "raw", raw), ("", "smooth", smoothed(raw))]


def _speed(run: Told, at: Where) -> list[tuple[str, Style, list[Point]]]:
    """Tokens a second, each row counted by the seconds that it is of: a row of one step is the more often off."""
    raw = _points(run.steps, at, "tokens_per_s")
    if len(raw) < SPANS:
        return [("", "plain", raw)]
    clock = [point.seconds or 0.0 for point in raw]
    took = [max(1e-9, now - then) for then, now in zip([0.0, *clock], clock, strict=False)]
    return [("as logged", "raw", raw), ("", "smooth", smoothed(raw, took))]


def _plain(run: Told, at: Where, name: str, *, dots: bool = False) -> list[tuple[str, Style, list[Point]]]:
    return [("", "dots" if dots else "plain", _points(run.rows, at, name))]


def _epochs(run: Told, at: Where, ours: str, theirs: str) -> list[tuple[str, Style, list[Point]]]:
    mine = _points(run.epochs, at, ours)
    return [("training", "dashed", _points(run.epochs, at, theirs)), ("", "dots", mine)] if mine else []


def _others(runs: Sequence[Told]) -> list[str]:
    """Names of numbers that rows have and no chart of ours shows, in the order in which they come."""
    seen = {name: None for run in runs for row in run.rows for name, value in row.items() if number(value) is not None}
    return [name for name in seen if name not in KNOWN]


def _is_wide(lines: Sequence[Line]) -> bool:
    values = sorted(point.value for line in lines for point in line.points)
    return bool(values) and values[0] > 0 and values[-1 - len(values) // 100] > 20 * values[len(values) // 100]


def smoothed(points: Sequence[Point], weights: Sequence[float] | None = None) -> list[Point]:
    """A moving mean that looks back over a 25th of the points, free of the pull of its beginning. weights: what each point counts."""
    keep = 1 - 2 / (1 + max(1.0, len(points) / SPANS))
    found, total, weight = list[Point](), 0.0, 0.0
    for point, own in zip(points, weights or [1.0] * len(points), strict=True):
        total, weight = keep * total + own * point.value, keep * weight + own
        found.append(point._replace(value=total / weight))
    return found


def thinned(points: list[Point], most: int = MOST) -> list[Point]:
    """At most `most` of the points, in order: the first, the last, and of each stretch its lowest and its highest."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * (len(points) - 2) / (most - 2))
    kept = {0, len(points) - 1}
    for begin in range(1, len(points) - 1, stretch):
        part = range(begin, min(begin + stretch, len(points) - 1))
        kept |= {min(part, key=lambda at: points[at].value), max(part, key=lambda at: points[at].value)}
    return [points[at] for at in sorted(kept)]


def ticks(low: float, high: float, about: int = 7, *, log: bool = False) -> list[float]:
    """Round numbers within [low, high], some `about` of them."""
    if log:
        decades = math.log10(high / low)
        of = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 4 else (1,)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        every = max(1, math.ceil(decades / 6)) if of == (1,) else 1
        return [
            mark * 10.0**power
            for power in powers
            if power % every == 0
            for mark in of
            if low <= mark * 10.0**power <= high
        ]
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(size * by for by in (1, 2, 2.5, 5, 10) if (high - low) / (size * by) <= about)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(marks: Sequence[float], *, percent: bool = False, whole: bool = False) -> list[str]:
    """The numbers beside an axis' ticks, all written in one way."""
    if percent or whole or max(map(abs, marks), default=0.0) < 1e-3:
        return [written(mark, percent=percent, whole=whole) for mark in marks]
    return [f"{mark:.6g}" if abs(mark) < 1 else written(mark) for mark in marks]


def written(value: float, *, percent: bool = False, whole: bool = False) -> str:
    """A number beside a tick or in a table: 3.25, 0.0015, 2e-5, 12,500, 1.2M, 35%."""
    if whole:
        return f"{value:,.0f}"
    if percent:
        return f"{value:.3g}%".replace("100.%", "100%") if (value := 100 * value) < 100 else "100%"
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 999_500:
        return f"{value / 1e6:.3g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"
