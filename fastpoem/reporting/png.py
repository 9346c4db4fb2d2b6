"""The report's charts as pictures, for a paper or a chat: matplotlib, twice the resolution of a screen, in letters that every machine has."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpoem.errors import InputError
from fastpoem.reporting import svg
from fastpoem.reporting.charts import Chart, along, charts, labels, legend, ticks
from fastpoem.reporting.told import Told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MISSING = "pip install 'fastpoem[plots]'"
STYLES: dict[str, dict[str, Any]] = {
    "raw": {"linewidth": 0.8, "alpha": 0.3},
    "dashed": {"linewidth": 1.2, "linestyle": "--", "alpha": 0.75},
    "dots": {"linewidth": 1.8, "marker": "o", "markersize": 4},
}


def why_not() -> str | None:
    """The reason why no pictures can be made here, None where they can."""
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed"


def pictures(runs: Sequence[Told], prefix: Path) -> list[Path]:
    """A PNG of each chart, named `prefix`-loss.png and so on. Raises OSError, and InputError without matplotlib."""
    made = []
    for one in charts(runs):
        figure = _figure(7, 3.9)
        draw(figure.subplots(), one, runs)
        made.append(prefix.with_name(f"{prefix.name}-{one.key}.png"))
        figure.savefig(made[-1], dpi=200)
    return made


def panels(runs: Sequence[Told]) -> Figure:
    """The charts of some runs in one figure, two beside each other."""
    found = charts(runs)
    rows = max(1, -(-len(found) // 2))
    figure = _figure(11, 3.3 * rows)
    places = [*figure.subplots(rows, 2, squeeze=False).flat]
    for place, one in zip(places, found, strict=False):
        draw(place, one, runs)
    for place in places[len(found) :]:
        place.set_visible(False)
    return figure


def _figure(width: float, height: float) -> Figure:
    if reason := why_not():
        raise InputError("plot", reason, MISSING)
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:  # notebooks know of figures only where pyplot was imported
            self.savefig(found := io.BytesIO(), format="png", dpi=100)
            return found.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


def draw(place: Any, one: Chart, runs: Sequence[Told]) -> None:
    """A chart on matplotlib's axes."""
    plain = [run.name if run.name.isascii() else f"run {index + 1}" for index, run in enumerate(runs)]
    named = set[int]()
    for line in one.lines:
        points = along(line, "step")
        label = None
        if line.style not in ("raw", "dashed") and line.run not in named:
            named.add(line.run)
            label = plain[line.run]
        style = STYLES.get(line.style, {"linewidth": 1.8})
        if len(points) == 1:
            style = {**style, "marker": "o", "markerfacecolor": "white" if line.style == "dashed" else None}
        place.plot(*zip(*points, strict=True), color=svg.colour(line.run), label=label, **style)
    if one.log:
        place.set_yscale("log")
    low, high = one.bounds()
    place.set_ylim(low, high)
    place.set_xlim(0, 1.01 * max(point.step for line in one.lines for point in line.points))
    marks = ticks(low, high, log=one.log)
    place.set_yticks(marks, labels(marks, percent=one.percent))
    place.minorticks_off()
    place.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    place.spines[["top", "right", "left"]].set_visible(False)
    place.spines["bottom"].set_color(svg.RULE)
    place.tick_params(labelsize=9, color=svg.RULE, labelcolor=svg.INK)
    place.tick_params(axis="y", length=0)
    place.grid(axis="y", color=svg.GRID)
    place.set_axisbelow(True)
    place.set_title(one.title, loc="left", fontsize=11, color=svg.INK)
    place.set_xlabel(" · ".join(filter(None, ("optimizer step", legend(one)))), fontsize=9, color=svg.FAINT)
    place.set_ylabel(one.unit, fontsize=9, color=svg.FAINT)
    if len(runs) > 1:  # above the plot, where no line comes
        place.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=min(4, len(runs)),
            frameon=False,
            fontsize=9,
            borderaxespad=0.2,
        )
