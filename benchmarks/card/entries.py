"""All that is measured, the most valuable first: by name, its part, the seconds that it needs on a card and small on a CPU, and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.budget import BATCHES
from benchmarks.card import bandwidth, checks, forms, learn, speed, tools
from benchmarks.card.place import Place

PARTS = ("checks", "forms", "speed", "learn")
TRAINER, NOTEBOOK = "trainer, compiled", "notebook"
CHECKED = "check "  # how the names of single checks begin


class Entry(NamedTuple):
    """needs: seconds that it takes where nothing goes wrong, and below which it is not begun. most: seconds after which it is ended.
    run: from (place, seconds that it has) to what it found; raises Missing where this machine has not what it needs."""

    name: str
    part: str
    needs: float
    most: float
    run: Callable[[Place, float], dict[str, Any]]


def entries(device: torch.device, small: bool) -> list[Entry]:
    """The list for a device. On a GPU `needs` are guesses for an H100 whose compilers' caches are cold."""
    batches = (16, 32) if small else BATCHES
    listed: list[Entry] = []

    def add(
        name: str,
        part: str,
        needs: float,
        run: Callable[..., dict[str, Any]],
        most: float | None = None,
        small_needs: float = 2,
    ) -> None:
        needs = small_needs if small else needs
        listed.append(Entry(name, part, needs, 240 if small else most or 3 * needs + 60, run))

    untimed = lambda run: lambda place, seconds: run(place)
    add("doctor", "checks", 90, checks.doctor, most=300, small_needs=20)
    for form in forms.FORMS:
        add(f"steps, {form}", "forms", 45 if "compiled" in form else 25, untimed(partial(forms.steps, form)))
    add("epoch", "speed", 60, speed.epoch, most=200)
    add("bandwidth", "speed", 15, bandwidth.bandwidth)
    first = [batches[at] for at in (0, 4, 2, 6)] if len(batches) > 6 else [*batches]
    for poems in first:
        add(f"batch {poems}, pack", "speed", 35, partial(speed.batch, poems, "pack"))
    add(f"{NOTEBOOK}, batch {batches[0]}", "speed", 30, partial(speed.contender, NOTEBOOK, batches[0]), most=60)
    add(
        f"{TRAINER}, batch {batches[0]}",
        "speed",
        60,
        partial(speed.contender, TRAINER, batches[0]),
        most=150,
        small_needs=5,
    )
    for name, run in forms.COMPARED.items():
        add(name, "forms", 70 if run is forms.resumed else 35, untimed(run))
    for name in ("fast, 0.2 / width", "default"):
        add(f"learn {name}", "learn", 50, partial(learn.learn, name), most=120)
    add("memcheck", "checks", 40, partial(tools.sanitizer, "memcheck"), most=150)
    for poems in [*first[1:]]:
        add(f"{TRAINER}, batch {poems}", "speed", 60, partial(speed.contender, TRAINER, poems), most=150, small_needs=5)
    for poems in first:
        add(f"batch {poems}, bucket", "speed", 45, partial(speed.batch, poems, "bucket"))
    for form in ("fp32", "compiled + graphs"):
        add(f"steps with dropout, {form}", "forms", 30, untimed(partial(forms.steps, form, dropout=0.1)))
    add("racecheck", "checks", 40, partial(tools.sanitizer, "racecheck"), most=150)
    add("ncu", "speed", 40, tools.ncu, most=120)
    for name in learn.RUNS:
        if name not in ("fast, 0.2 / width", "default"):
            add(f"learn {name}", "learn", 50, partial(learn.learn, name), most=150)
    for poems in (one for one in batches if one not in first):
        add(f"batch {poems}, pack", "speed", 35, partial(speed.batch, poems, "pack"))
    for poems in (one for one in batches if one not in first):
        add(f"batch {poems}, bucket", "speed", 45, partial(speed.batch, poems, "bucket"))
        add(f"{TRAINER}, batch {poems}", "speed", 60, partial(speed.contender, TRAINER, poems), most=150, small_needs=5)
    for name in checks.names(device):
        needs = 25 if name.startswith(("compiled", "replay")) else 8
        add(f"{CHECKED}{name}", "checks", needs, untimed(partial(checks.check, name)), small_needs=2)
    return listed


def chosen(listed: Sequence[Entry], part: str, only: Sequence[str]) -> list[Entry]:
    return [one for one in listed if (one.name in only if only else part in ("all", one.part))]
