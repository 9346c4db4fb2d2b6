"""The page: one HTML file that needs nothing else, read on a wide screen and on a phone, on paper and without JavaScript.

Charts are SVG drawn here. One of three axes is shown at a time, which is CSS alone; the page's script only reads values out under the pointer
and hides a run. No font, script or picture is loaded from anywhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastpoem.reporting import compare, svg
from fastpoem.reporting.charts import Chart, along, axes, charts, legend, time_unit
from fastpoem.reporting.lengths import lengths
from fastpoem.reporting.poems import poems
from fastpoem.reporting.told import Told, number
from fastpoem.reporting.words import Say
from fastpoem.version import __version__

MARK = '<meta name="generator" content="fastpoem.report">'
HERE = Path(__file__).parent
LABELS = {"step": "Steps", "epoch": "Epochs", "time": "Time"}


def page(runs: Sequence[Told], say: Say) -> str:
    """The whole page. Its charts are those that the runs' rows allow."""
    chinese = say("Settings") != "Settings"
    title = escape(f"{', '.join(run.name for run in runs)} · {say('Training report')}")
    shown = axes(runs) or ["step"]
    made = say("Made by fastpoem {version}, {date}.").format(version=__version__, date=time.strftime("%Y-%m-%d %H:%M"))
    parts = [
        f'<!DOCTYPE html>\n<html lang="{"zh-CN" if chinese else "en"}"><head><meta charset="utf-8">{MARK}',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title><style>{(HERE / 'page.css').read_text(encoding='utf-8')}{_colours(runs)}</style></head><body>",
        *(f'<input type="radio" name="axis" id="by-{axis}"{" checked" * (axis == shown[0])}>' for axis in shown),
        f'<header><h1>{say("Training report")}</h1><p class="about">{_about(runs, say)}</p></header>',
        _bar(runs, shown, say),
        f"<main>{_section('overview', say('Overview'), compare.overview(runs, say) + _notes(runs, say))}",
        _section("curves", say("Curves"), _curves(runs, shown, say)),
        _section("lengths", say("Lengths and buckets"), lengths(runs, say)),
        _section("poems", say("Poems over time"), poems(runs, say)),
        _section("settings", say("Settings"), compare.settings(runs, say)),
        f'</main><footer>{escape(made)}</footer><div id="tip" hidden></div>',
        f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n",
    ]
    return "\n".join(parts)


def _section(ident: str, title: str, content: str) -> str:
    return f'<section id="{ident}"><h2>{title}</h2>{content}</section>'


def _colours(runs: Sequence[Told]) -> str:
    """The colour of each run, for its dots."""
    return "".join(f".c{index}{{--run:{svg.colour(index)}}}" for index in range(len(runs)))


def _about(runs: Sequence[Told], say: Say) -> str:
    """What was trained on what, a sentence for each that differs."""
    return "<br>".join(dict.fromkeys(escape(compare.about(run, say)) for run in runs if compare.about(run, say)))


def _bar(runs: Sequence[Told], shown: Sequence[str], say: Say) -> str:
    """Which runs there are, and along what they are drawn."""
    chips = ""
    if len(runs) > 1:
        chips = "".join(
            f'<button class="chip c{index}" data-run="{index}" aria-pressed="true"><i class="dot"></i>{escape(run.name)}</button>'
            for index, run in enumerate(runs)
        )
    labels = "".join(f'<label for="by-{axis}">{say(LABELS[axis])}</label>' for axis in shown)
    return f'<nav><div class="chips">{chips}</div><div class="axis">{labels}</div></nav>'


def _notes(runs: Sequence[Told], say: Say) -> str:
    """What of a run is missing, damaged or odd."""
    lines = list[str]()
    for run in runs:
        said = [_translated(note, say) for note in run.notes]
        counted = [sum(number(row.get("skipped")) or 0 for row in rows) for rows in (run.epochs, run.steps)]
        skipped = max(counted)  # the rows of the epoch that has not ended are in the second only
        if skipped == 1:
            said.append(say("one step was skipped: its loss or gradient was not finite"))
        elif skipped:
            said.append(
                say("{count} steps were skipped: their loss or gradient was not finite").format(count=f"{skipped:,}")
            )
        if spikes := [row["spike_step"] for row in run.steps if isinstance(row.get("spike_step"), int)]:
            steps = ", ".join(f"{step:,}" for step in spikes[:8]) + (" …" if len(spikes) > 8 else "")
            said.append(say("loss spikes at step {steps}").format(steps=steps))
        name = f"<b>{escape(run.name)}</b>: " if len(runs) > 1 else ""
        lines += [f"<li>{name}{escape(line)}</li>" for line in said]
    return f'<ul class="notes">{"".join(lines)}</ul>' if lines else ""


def _translated(note: str, say: Say) -> str:
    """A note of `told`, which may have a number in it."""
    words = note.split()
    if words[0] == "line":
        return say(note.replace(f"line {words[1]} ", "line {line} ", 1)).format(line=words[1])
    return say(note)


def _curves(runs: Sequence[Told], shown: Sequence[str], say: Say) -> str:
    found = charts(runs)
    if not found:
        return f'<p class="empty">{say("Nothing is logged yet.")}</p>'
    return f'<div class="grid">{"".join(_figure(one, runs, shown, say) for one in found)}</div>'


def _figure(one: Chart, runs: Sequence[Told], shown: Sequence[str], say: Say) -> str:
    """A chart along each of the axes, and its values for the script."""
    seconds, unit = time_unit(runs)
    names = {"step": say("optimizer step"), "epoch": say("epoch"), "time": say(f"{unit} of training")}
    drawn = "".join(
        f'<div class="by-{axis}">'
        + svg.chart(one, axis, seconds, x_label=names[axis], y_label=say(one.unit), ident=f"{one.key}-{axis}")
        + "</div>"
        for axis in shown
    )
    geometry = {axis: {"x": svg.span(one.lines, axis, seconds), "lines": _values(one, axis, seconds)} for axis in shown}
    data = {
        "axes": geometry,
        "percent": one.percent,
        "names": names,
        "runs": [run.name for run in runs],
        "words": {line.label: say(line.label) for line in one.lines if line.label},
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure id="{one.key}"><figcaption><b>{escape(say(one.title))}</b><span>{say(legend(one))}</span></figcaption>{drawn}'
        f'<script type="application/json">{text}</script></figure>'
    )


def _values(one: Chart, axis: str, seconds: float) -> list[object]:
    """[run, label, colour, [[x, y] …]] of each line that is read out: not of the thin ones."""
    bottom = (
        min((y for line in one.lines for _, y in along(line, axis) if y > 0), default=1.0) if one.log else -math.inf
    )
    return [
        [line.run, line.label, [[_short(x), _short(y)] for x, y in along(line, axis, seconds) if y >= bottom]]
        for line in one.lines
        if line.style != "raw"
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}") if not float(value).is_integer() else int(value)


def summary(run: Told, say: Say) -> str:
    """A run as the last line of a notebook's cell: its figures, a curve of its loss, and how to have poems of it."""
    faint = 'style="opacity:.7"'
    rows = [(name, value, more, "") for name, value, more in compare.figures(run, say)]
    rows.append((say("Poems"), "", "", f"fastpoem.Run({str(run.folder)!r}).generate('春', count=3)"))
    cells = "".join(
        f'<tr><td style="text-align:left"><span {faint}>{escape(name)}</span></td><td style="text-align:left">{escape(value)} '
        f"<span {faint}>{escape(more)}</span>{f'<code>{escape(code)}</code>' if code else ''}</td></tr>"
        for name, value, more, code in rows
    )
    found = {one.key: one.lines for one in charts([run]) if one.key in ("loss", "validation-loss")}
    lines = [
        ("" if line.style == "raw" else say("Loss"), line.style, along(line, "step")) for line in found.get("loss", [])
    ]
    lines += [
        (say("Validation loss"), "dots", along(line, "step"))
        for line in found.get("validation-loss", [])
        if line.style == "dots"
    ]
    return (
        f'<div style="display:flex;flex-wrap:wrap;gap:8px 32px;align-items:center"><div><b>{escape(str(run.folder))}</b>'
        f"<div {faint}>{escape(compare.about(run, say))}</div><table>{cells}</table></div><div>{svg.picture(svg.curve(lines))}</div></div>"
    )
