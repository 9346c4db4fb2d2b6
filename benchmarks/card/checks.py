"""Is it right here: the doctor's examination, and one by one the checks that it leaves to the runs that need them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.card.place import TINY, Place
from fastpoem.doctor import checks, machine, trial, verdicts
from fastpoem.doctor.apart import SECONDS
from fastpoem.doctor.examine import examine
from fastpoem.engine.compile import why_not_compile


def doctor(place: Place, seconds: float, quick: bool = False) -> dict[str, Any]:
    """The doctor's JSON. small: of a trial with a small model, and without rates, which take a CPU minutes. One check that hangs may not
    cost the others their time."""
    with contextlib.ExitStack() as stack:
        if place.small:
            stack.enter_context(mock.patch.object(machine, "rates", lambda device: {}))
            for name in ("train", "notebook"):
                stack.enter_context(mock.patch.object(trial, name, partial(getattr(trial, name), shape=TINY)))
        say = lambda line: print(line, file=sys.stderr, flush=True)
        return examine(place.device, quick=quick or place.small, say=say, seconds=min(SECONDS, seconds / 12))


def names(device: torch.device) -> list[str]:
    """Every check there is for this device: three precisions on a GPU, rows and packed, with and without compiler; and what training
    uses by default at the real model's shape."""
    vocabulary, compiles = checks.REAL.vocab_size, device.type == "cuda" and why_not_compile(device) is None
    kinds = (torch.bfloat16, torch.float32, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    found = [
        name
        for dtype in kinds
        for packed in (True, False)
        for name in checks.wanted(dtype, vocabulary=vocabulary, packed=packed, compiles=compiles, graphs=True)
    ]
    kind = str(kinds[0])[6:]
    full = [
        name
        for more in (" packed", "")
        for name in (f"compiled {kind}{more} full", f"replay {kind}{more} full compiled")
    ]
    return list(dict.fromkeys([*found, *(full if compiles else ())]))


def check(name: str, place: Place) -> dict[str, Any]:
    """One check, in this process: whoever runs entries begins another after one that fails."""
    records = checks.run(name, place.device)
    if place.gpu:
        verdicts.remember(verdicts.card(place.device), {name: records})
    return {"ok": all(record.ok for record in records), "records": [dataclasses.asdict(record) for record in records]}
