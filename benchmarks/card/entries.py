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

    def contender(name: str, poems: int, needs: float) -> None:
        run = partial(speed.contender, name, poems)
        add(f"{name}, batch {poems}", "speed", needs, run, most=150, small_needs=5)

    def batch(poems: int, batching: str) -> None:
        add(
            f"batch {poems}, {batching}",
            "speed",
            35 if batching == "pack" else 60,
            partial(speed.batch, poems, batching),
        )

    def compared(name: str) -> None:
        run = forms.COMPARED[name]
        add(name, "forms", 70 if run is forms.resumed else 35, untimed(run))

    def learn_(name: str) -> None:
        add(f"learn {name}", "learn", 50, partial(learn.learn, name), most=150, small_needs=25)

    smallest, *more = batches
    usual = 256 if 256 in more else more[0]
    first = [smallest, usual, *(batches[at] for at in (2, 6) if len(batches) > 6)]
    # What a first call of nine minutes should hold.
    add("doctor, quick", "checks", 60, partial(checks.doctor, quick=True), most=200, small_needs=20)
    add("epoch", "speed", 60, speed.epoch, most=200)
    batch(smallest, "pack")
    contender(NOTEBOOK, smallest, 30)
    contender(TRAINER, smallest, 60)
    batch(usual, "pack")
    if not small:  # there the compiler takes most of a minute for each
        contender(TRAINER, usual, 60)
    add("bandwidth", "speed", 15, bandwidth.bandwidth)
    late, *others = forms.COMPARED
    compared(late)
    fast, *rest = learn.RUNS
    learn_(fast)

    for form in forms.FORMS:
        add(f"steps, {form}", "forms", 45 if "compiled" in form else 25, untimed(partial(forms.steps, form)))
    for name in others:
        compared(name)
    add("memcheck", "checks", 40, partial(tools.sanitizer, "memcheck"), most=150)
    if not small:
        add("doctor", "checks", 90, checks.doctor, most=300)
    for poems in first[2:]:
        batch(poems, "pack")
    learn_(rest[0])
    for poems in first[2:]:
        contender(TRAINER, poems, 60)
    for poems in first:
        batch(poems, "bucket")
    for form in ("fp32", "compiled + graphs"):
        add(f"steps with dropout, {form}", "forms", 30, untimed(partial(forms.steps, form, dropout=0.1)))
    add("racecheck", "checks", 40, partial(tools.sanitizer, "racecheck"), most=150)
    add("ncu", "speed", 40, tools.ncu, most=120)
    for name in rest[1:]:
        learn_(name)
    for poems in (one for one in batches if one not in first):
        batch(poems, "pack")
    for poems in (one for one in batches if one not in first):
        batch(poems, "bucket")
        contender(TRAINER, poems, 60)
    for name in checks.names(device):
        needs = 60 if "full" in name else 25 if name.startswith(("compiled", "replay")) else 8
        add(f"{CHECKED}{name}", "checks", needs, untimed(partial(checks.check, name)), small_needs=2)
    return listed


def chosen(listed: Sequence[Entry], part: str, only: Sequence[str]) -> list[Entry]:
    return [one for one in listed if (one.name in only if only else part in ("all", one.part))]
