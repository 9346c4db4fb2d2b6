"""A chart as SVG, whole in itself: what moves on the page (the reading under the pointer) is drawn over it by the page's script."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from html import escape

from fastpoem.reporting.charts import Chart, Line, along, labels, ticks

COLOURS = ("#2563eb", "#d9480f", "#0b8a5f", "#9333ea", "#b7791f", "#0e7490", "#be185d", "#4d7c0f", "#475569", "#7f1d1d")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 24, 44
INK, FAINT, RULE, GRID = "#1f2328", "#59636e", "#8b949e", "#e6e8eb"


def colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def frame(
    x: tuple[float, float], y: tuple[float, float], *, log: bool = False
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """What maps values to places in the plot."""
    scale = math.log if log else float
    low, high = scale(y[0]), scale(y[1])
    across = lambda value: LEFT + (WIDTH - LEFT - RIGHT) * (value - x[0]) / (x[1] - x[0])
    up = lambda value: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (scale(value) - low) / (high - low)
    return across, up


def span(lines: Sequence[Line], axis: str, unit: float) -> tuple[float, float]:
    """What the horizontal axis spans: from 0 on, as no training begins later."""
    most = max((x for line in lines for x, _ in along(line, axis, unit)), default=1.0)
    return 0.0, most or 1.0


def axes(
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    percent: bool = False,
    whole: bool = False,
) -> str:
    """The grid, ticks and names of both axes. Ticks stand outside the plot, and the vertical axis' name above it, where no line comes."""
    across, up = frame(x, y, log=log)
    parts = []
    marks = ticks(*y, log=log)
    for value, label in zip(marks, labels(marks, percent=percent), strict=True):
        at = up(value)
        parts.append(f'<path class="g" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="t" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    bottom = HEIGHT - BOTTOM
    marks = ticks(*x, about=6)
    for value, label in zip(marks, labels(marks, whole=whole), strict=True):
        at = across(value)
        parts.append(f'<path class="k" d="M{at:.1f} {bottom}v4"/>')
        parts.append(f'<text class="t" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="k" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text class="n" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>')
    parts.append(f'<text class="n" x="0" y="12">{escape(y_label)}</text>')
    return "".join(parts)


def opened(title: str, key: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-key="{key}" xmlns="http://www.w3.org/2000/svg">'


def chart(one: Chart, axis: str, unit: float, *, x_label: str, y_label: str, ident: str) -> str:
    """A line chart over an axis. ident: unique on the page."""
    x, y = span(one.lines, axis, unit), one.bounds()
    across, up = frame(x, y, log=one.log)
    whole = axis == "step"
    parts = [
        opened(one.title, ident),
        f'<clipPath id="{ident}"><rect x="{LEFT}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 5}" height="{HEIGHT - TOP - BOTTOM + 6}"/></clipPath>',
        axes(x, y, x_label=x_label, y_label=y_label, log=one.log, percent=one.percent, whole=whole),
        f'<g clip-path="url(#{ident})">',
    ]
    order = ("raw", "dashed", "plain", "smooth", "dots")
    for line in sorted(one.lines, key=lambda line: order.index(line.style)):
        places = [(across(x), up(y)) for x, y in along(line, axis, unit) if y > 0 or not one.log]
        if not places:
            continue
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<g class="r{line.run} {line.style}" stroke="{colour(line.run)}" fill="{colour(line.run)}">')
        parts.append(f'<path d="{path}" fill="none"/>')
        if line.style == "dots" or len(places) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        parts.append("</g>")
    return "".join([*parts, "</g></svg>"])


def bars(
    title: str, ident: str, counts: Sequence[tuple[int, int, int]], total: int, *, x_label: str, y_label: str
) -> str:
    """Poems by length. counts: (length, poems, bucket), ascending."""
    first, final = counts[0][0], counts[-1][0]
    most = max(poems for _, poems, _ in counts)
    x, y = (first - 1.5, final + 1.5), (0.0, most * 1.2)
    across, up = frame(x, y)
    wide = max(1.0, min(14.0, 0.82 * (across(1) - across(0))))
    parts = [opened(title, ident), axes(x, y, x_label=x_label, y_label=y_label, whole=True)]
    for length, poems, bucket in counts:
        top = up(poems)
        parts.append(
            f'<rect class="b{bucket % 2}" x="{across(length) - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{length}: {poems:,} ({poems / total:.1%})</title></rect>'
        )
    taller = list[float]()  # a label stands over its own bar and beside every taller one
    for length, poems, _ in sorted(counts, key=lambda one: -one[1]):
        at = min(max(across(length), LEFT + 15), WIDTH - RIGHT - 15)
        if poems >= 0.04 * total and all(abs(at - other) > 32 for other in taller):
            top = up(poems) - 5
            parts.append(f'<text class="l" x="{at:.1f}" y="{top - 14:.1f}" text-anchor="middle">{length}</text>')
            parts.append(f'<text class="h" x="{at:.1f}" y="{top:.1f}" text-anchor="middle">{poems / total:.0%}</text>')
        taller.append(across(length))
    return "".join([*parts, "</svg>"])


def curve(lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], width: int = 400, height: int = 210) -> str:
    """A small chart with axes that needs no style of the page and takes the colour of the text around it: for a notebook, whatever its
    theme. lines: (label, style, points); dots are in the second colour. Empty without two points."""
    points = [point for _, _, line in lines for point in line]
    if len(points) < 2:
        return ""
    (x0, x1), (y0, y1) = ((min(one), max(one)) for one in zip(*points, strict=True))
    room = 0.04 * (y1 - y0) or 0.05 * abs(y1) or 1.0
    y0, y1 = y0 - room, y1 + room
    left, top, right, bottom = 44, 22, 10, 20
    across = lambda x: left + (width - left - right) * (x - x0) / ((x1 - x0) or 1)
    up = lambda y: height - bottom - (height - top - bottom) * (y - y0) / (y1 - y0)
    parts = [
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" '
        'font-family="system-ui,sans-serif" font-size="11" style="max-width:100%">'
    ]
    marks = ticks(y0, y1, about=5)
    for value, label in zip(marks, labels(marks), strict=True):
        parts.append(f'<path d="M{left} {up(value):.1f}H{width - right}" stroke="currentColor" opacity=".15"/>')
        parts.append(_faint(left - 6, up(value) + 4, "end", label))
    marks = ticks(x0, x1, about=6)
    for value, label in zip(marks, labels(marks, whole=True), strict=True):
        parts.append(_faint(across(value), height - 4, "middle", label))
    at = left
    for label, style, line in lines:
        paint, places = COLOURS[style == "dots"], [(across(x), up(y)) for x, y in line]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        look = 'stroke-width="1" opacity=".35"' if style == "raw" else 'stroke-width="2"'
        if places:
            parts.append(f'<path d="{path}" fill="none" stroke="{paint}" stroke-linejoin="round" {look}/>')
        if places and label:
            parts.append(f'<text x="{at}" y="12" fill="{paint}" font-weight="600">{escape(label)}</text>')
            at += 24 + sum(7 if ord(letter) < 128 else 11 for letter in label)
        if style == "dots" or len(places) == 1:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{paint}"/>' for x, y in places]
    return "".join([*parts, "</svg>"])


def picture(drawn: str) -> str:
    """A curve that stays: as an image, since a notebook that is not trusted shows images but of SVG the texts only. Grey is read on either
    ground; while it changes it is better left as it is, because a new image flickers."""
    content = base64.b64encode(drawn.replace("currentColor", "#808080").encode()).decode()
    return f'<img alt="" style="max-width:100%" src="data:image/svg+xml;base64,{content}">' if drawn else ""


def _faint(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor" opacity=".7">{text}</text>'
