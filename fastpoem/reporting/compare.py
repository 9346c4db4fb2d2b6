"""Runs side by side in figures and settings, as HTML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastpoem.config import TrainConfig
from fastpoem.reporting.charts import written
from fastpoem.reporting.told import Told, last, number, part
from fastpoem.reporting.words import Say

STATES = {"training": "is training", "finished": "finished", "stopped": "stopped"}
UNTOLD = {"out", "resume"}  # they differ between any two runs and say nothing of them


def figures(run: Told, say: Say) -> list[tuple[str, str, str]]:
    """(what, its value, a remark) of what one wants to know of a run first. The losses are those of its last whole epoch, or where there is
    none yet of its last row."""
    source, of, loss, accuracy = (run.epochs, "epoch", "mean_loss", "mean_accuracy")
    if not run.epochs or run.done > run.epochs[-1]["step"]:
        source, of, loss, accuracy = (run.steps, "rows", "loss_mean", "accuracy_mean")
    best = run.best
    remark = ""
    if best is not None:
        perplexity = written(math.exp(min(best["val_loss"], 100)))
        remark = say("epoch {epoch}, perplexity {perplexity}").format(epoch=best.get("epoch"), perplexity=perplexity)
    rate = run.mean_rate("tokens_per_s")
    poems = run.mean_rate("poems_per_s")
    speed = f"{say('tokens/s')}, {written(poems)} {say('poems/s')}" if rate and poems else ""
    return [
        (say("State"), say(STATES[run.state]), _progress(run, say)),
        (say(f"Loss of the last {of}"), _number(last(source, loss), say), ""),
        (say(f"Accuracy of the last {of}"), _number(last(source, accuracy), say, percent=True), ""),
        (say("Best validation loss"), _number(best["val_loss"] if best else None, say), remark),
        (say("Speed"), written(rate) if rate else say("not yet"), speed),
        (say("Time"), duration(run.seconds) if run.seconds is not None else say("not yet"), _left(run, say)),
    ]


def overview(runs: Sequence[Told], say: Say) -> str:
    """One run as tiles, several as a table."""
    if len(runs) == 1:
        tiles = "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>'
            for name, value, more in figures(runs[0], say)
        )
        return f'<div class="tiles">{tiles}</div>'
    found = [figures(run, say) for run in runs]
    heads = list[str]()
    for column in zip(*found, strict=True):
        heads.append(" / ".join(dict.fromkeys(name for name, _, _ in column)))
    losses = [run.best["val_loss"] if run.best else math.inf for run in runs]
    lowest = losses.index(min(losses)) if min(losses) < math.inf else -1
    lines = []
    for index, (run, figs) in enumerate(zip(runs, found, strict=True)):
        marked = ["best" if index == lowest and at == 3 else "" for at in range(len(figs))]
        cells = "".join(
            f'<td class="{mark}">{escape(value)}<small>{escape(more)}</small></td>'
            for mark, (_, value, more) in zip(marked, figs, strict=True)
        )
        lines.append(f'<tr class="c{index}"><th scope="row"><i class="dot"></i>{escape(run.name)}</th>{cells}</tr>')
    head = "".join(f"<th>{escape(name)}</th>" for name in (say("Run"), *heads))
    return f'<div class="wide"><table class="runs"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def about(run: Told, say: Say) -> str:
    """Data, model and device of a run in a line."""
    parts = list[str]()
    if run.manifest is not None:
        name, poems = run.manifest["source"].get("name"), run.manifest["counts"]["rows"]
        parts.append(say("{poems} poems from {name}").format(poems=f"{poems:,}", name=name))
    shape = part(run.config, "model")
    if {"n_layer", "n_embd"} <= shape.keys():
        parts.append(say("{layers}-layer model, {width} wide").format(layers=shape["n_layer"], width=shape["n_embd"]))
    parts += [str(run.config[name]) for name in ("device", "dtype") if run.config.get(name)]
    return " · ".join(parts)


def settings(runs: Sequence[Told], say: Say) -> str:
    """What differs between the runs, what is not the default, and the rest folded away."""
    flat = [_flat(run) for run in runs]
    known = [one for one in flat if one] or flat  # a run whose config.json is damaged differs in nothing that is known
    names = [*dict.fromkeys(name for one in known for name in one)]
    default = {name: _shown(value) for name, value in dataclasses.asdict(TrainConfig()).items()}
    differ = [name for name in names if len({one.get(name, "–") for one in known}) > 1]
    changed = [
        name
        for name in names
        if name not in differ and name in default and known[0].get(name, default[name]) != default[name]
    ]
    rest = [name for name in names if name not in differ and name not in changed]
    parts = []
    if len(runs) > 1:
        parts.append(f"<h3>{say('What differs between the runs')}</h3>")
        parts.append(_table(differ, flat, runs, say) if differ else f"<p>{say('The runs have the same settings.')}</p>")
    one = known[:1]
    parts.append(f"<h3>{say('What is not the default')}</h3>")
    parts.append(
        _table(changed, one, [], say, default) if changed else f"<p>{say('Every setting is the default.')}</p>"
    )
    parts.append(
        f"<details><summary>{say('All the others')} ({len(rest)})</summary>{_table(rest, one, [], say)}</details>"
    )
    return "".join(parts)


def _table(
    names: Iterable[str],
    flat: Sequence[Mapping[str, str]],
    runs: Sequence[Told],
    say: Say,
    default: Mapping[str, str] | None = None,
) -> str:
    heads = [f'<th class="c{index}"><i class="dot"></i>{escape(run.name)}</th>' for index, run in enumerate(runs)]
    heads = heads or ["<th></th>"]
    heads += [f"<th>{say('default')}</th>"] * (default is not None)
    lines = []
    for name in names:
        cells = [f"<td>{escape(one.get(name, '–'))}</td>" for one in flat]
        cells += [f'<td class="faint">{escape(default[name])}</td>'] if default is not None else []
        lines.append(f"<tr><th scope='row'><code>{escape(name)}</code></th>{''.join(cells)}</tr>")
    head = f"<thead><tr><th>{say('Setting')}</th>{''.join(heads)}</tr></thead>"
    return f'<div class="wide"><table class="settings">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _flat(run: Told) -> dict[str, str]:
    """Everything that config.json tells, in a flat list of texts; what `auto` came to stands beside it."""
    config = run.config
    found = {name: _shown(value) for name, value in run.settings.items() if name not in UNTOLD}
    found |= {
        f"{name} (used)": _shown(config[name]) for name in ("dtype", "batching", "device", "threads") if name in config
    }
    for group, name in (("model", "model."), ("store", "store."), ("versions", "version of ")):
        found |= {name + key: _shown(value) for key, value in part(config, group).items()}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)


def _progress(run: Told, say: Say) -> str:
    if run.planned is None:
        return say("{done} steps").format(done=f"{run.done:,}")
    return say("{done} of {planned} steps").format(done=f"{run.done:,}", planned=f"{run.planned:,}")


def _left(run: Told, say: Say) -> str:
    """How long a run that trains will still take, by its last ten rows."""
    rows = [row for row in run.steps if number(row.get("seconds")) is not None][-11:]
    if run.state != "training" or run.planned is None or len(rows) < 2:
        return say("setting up excluded")
    pace = (rows[-1]["seconds"] - rows[0]["seconds"]) / max(1, rows[-1]["step"] - rows[0]["step"])
    return say("about {time} left").format(time=duration(pace * max(0, run.planned - run.done)))


def duration(seconds: float) -> str:
    """42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _number(value: float | None, say: Say, *, percent: bool = False) -> str:
    if value is None:
        return say("not yet")
    return f"{value:.1%}" if percent else f"{value:.3f}"
