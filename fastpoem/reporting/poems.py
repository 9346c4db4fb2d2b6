"""The poems that runs wrote while they trained, prompt by prompt, in the order of training, the runs beside one another, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastpoem.reporting.told import Told
from fastpoem.reporting.words import Say

SHOWN, MOST = 8, 200  # poems of a run for a prompt: at first, and unfolded


def poems(runs: Sequence[Told], say: Say) -> str:
    prompts = [*dict.fromkeys(one["prompt"] for run in runs for one in run.samples)]
    if not prompts:
        none = (
            "No poems were written while these runs trained. Train with --sample-every N, or look at what the model writes "
            "now: python -m fastpoem.generate --model RUN"
        )
        return f'<p class="empty">{escape(say(none))}</p>'
    return "".join(_prompt(prompt, runs, say) for prompt in prompts)


def _prompt(prompt: str, runs: Sequence[Told], say: Say) -> str:
    columns = []
    for index, run in enumerate(runs):
        mine = [one for one in run.samples if one["prompt"] == prompt]
        if not mine:
            continue
        name = f'<h4><i class="dot"></i>{escape(run.name)}</h4>' if len(runs) > 1 else ""
        chosen = _spread(mine, SHOWN)
        more = ""
        if len(mine) > len(chosen):
            count = say("All {count} of them").format(count=len(mine))
            more = f"<details><summary>{count}</summary>{_listed(_spread(mine, MOST), say)}</details>"
        columns.append(f'<div class="c{index} r{index}">{name}{_listed(chosen, say)}{more}</div>')
    title = f"<q>{escape(prompt)}</q>" if prompt else say("no prompt")
    return f'<div class="prompt"><h3>{title}</h3><div class="columns">{"".join(columns)}</div></div>'


def _listed(rows: Sequence[Mapping[str, Any]], say: Say) -> str:
    lines = []
    for row in rows:
        when = say("step {step}").format(step=f"{row['step']:,}")
        if row["epoch"] is not None:
            epoch = say("epoch {epoch}").format(epoch=f"{row['epoch']:.4g}")
            when = f"{epoch}<small>{when}</small>"
        text, prompt = row["poem"], row["prompt"]
        rest = text.removeprefix(prompt)
        begins = f"<b>{escape(prompt)}</b>" if prompt and rest != text else ""
        lines.append(f"<dt>{when}</dt><dd>{begins}{escape(rest)}</dd>")
    return f'<dl class="poems">{"".join(lines)}</dl>'


def _spread(rows: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """At most `most` of the rows, evenly spread, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[round(at * (len(rows) - 1) / (most - 1))] for at in range(most)]
