"""The same training in every form: launched plainly, compiled, replayed, both; from one seed, on the same poems, beside fp32 without any of it.

Then what goes wrong late: a capture that fails in the middle of a run, a checkpoint while graphs replay, a run that is stopped and resumed. On
a GPU some kernels add in whatever order threads come, so two runs of the same do not agree to the last bit: the plain run is done twice, and
`spread` is how far it is from itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.card.place import Missing, Place
from fastpoem.engine.compile import forms
from fastpoem.model.hub import WEIGHTS
from fastpoem.run import checkpoint
from fastpoem.run.loop import Loop
from fastpoem.signals import StopRequest

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "plain": {},
    "compiled": {"compile": "on"},
    "graphs": {"graphs": "on"},
    "compiled + graphs": {"compile": "on", "graphs": "on"},
}
OFF = {"compile": "off", "graphs": "off", "batching": "pack", "lr": None, "schedule": "constant", "warmup_steps": 20}
LEAST = 1e-3  # relative difference of two losses that is nothing, in 16 bits


def steps(form: str, place: Place, dropout: float = 0.0) -> dict[str, Any]:
    """`losses` and `norms` of each step; `recompiled`: forms that were compiled after the warm-up; `recorded`: graphs; `said`: its lines."""
    if "graphs" in FORMS[form] and not place.gpu:
        raise Missing("a CPU replays nothing")
    count = place.size(300, 8)
    with place.folder() as out:
        settings = {**OFF, **FORMS[form], "dropout": dropout, "max_steps": count, "log_every": 1}
        with place.run(out / "run", place.size(5200, 200), **settings) as (loop, said):
            before, loop.save = forms(), lambda **_: None  # type: ignore[method-assign]
            loop.run(StopRequest())
            rows = _rows(loop)
            found: dict[str, Any] = {
                "losses": [row["loss"] for row in rows],
                "norms": [row["grad_norm"] for row in rows],
            }
            launch = loop.step.launch
            found |= {
                "recompiled": forms() - before,
                "recorded": len(getattr(launch, "recorded", ())),
                "said": _first(said),
            }
            return found | {"broken": getattr(launch, "broken", False)}


def late(place: Place) -> dict[str, Any]:
    """A capture that is made to fail in the middle of a run with dropout: the recording asks the device a question, which no capture allows.
    `ok`: it was said, and all losses are the plain run's."""
    if not place.gpu:
        raise Missing("nothing is captured on a CPU")
    count, dropped = place.size(40, 8), list[Any]()

    def planted(loop: Loop) -> None:
        work, one_step = loop.step.work, loop.one_step
        graphs: Any = loop.step.launch

        def asks(shape: Any) -> None:
            work(shape)
            if torch.cuda.is_current_stream_capturing():
                loop.step.account.last.sum().item()

        def late_step() -> None:
            if loop.done == count // 2:  # its size has to be recorded again, which fails
                loop.step.work = asks  # type: ignore[method-assign]
                shape = loop.feed(loop.order(*divmod(loop.done, loop.order.steps))).shape
                dropped.append(
                    graphs.recorded.pop(shape, None)
                )  # a graph that goes while others replay: pytorch #193402
            one_step()

        loop.one_step = late_step  # type: ignore[method-assign]

    plain, again = (_losses(place, count, replays=False, graphs="on") for _ in range(2))  # batches of the same sizes
    with place.folder() as out, _short(place, out, count, graphs="on") as (loop, said):
        planted(loop)
        loop.run(StopRequest())
        mine, broken = [row["loss"] for row in _rows(loop)], loop.step.launch.broken  # type: ignore[attr-defined]
    about = [line for line in said if "could not be recorded" in line]
    found = _compared(mine, plain, again)
    return found | {"ok": found["ok"] and broken and len(about) == 1, "said": about, "steps_after": count - count // 2}


def saved(place: Place) -> dict[str, Any]:
    """Checkpoints that are written while graphs replay. `ok`: each holds, bit for bit, the weights that the device had at its step, and the
    losses are those of a run that writes none."""
    count, every = place.size(30, 12), place.size(7, 5)
    plain, again = (_losses(place, count, graphs="on") for _ in range(2))
    with place.folder() as out, _short(place, out, count, graphs="on", save_every=every, keep=1000) as (loop, _):
        optimizer, save = loop.step.optimizer, loop.save
        was: dict[int, torch.Tensor] = {}

        def noted(**how: Any) -> None:
            was[loop.done] = optimizer.master.clone()
            save(**how)

        loop.save = noted  # type: ignore[method-assign]
        loop.run(StopRequest())
        mine = [row["loss"] for row in _rows(loop)]
        wrong, written = [], checkpoint.listed(loop.folder)
        for step, path in written:
            kept = load_file(path / WEIGHTS)
            if step not in was or any(
                not torch.equal(kept[name], one.cpu()) for name, one in optimizer.named(was[step])
            ):
                wrong.append(step)
    found = _compared(mine, plain, again)
    return found | {
        "ok": found["ok"] and not wrong and len(written) > 1,
        "checkpoints": len(written),
        "wrong": sorted(wrong),
    }


def resumed(place: Place) -> dict[str, Any]:
    """A run that a signal stops halfway and that goes on, against one that was never stopped: losses, and the weights at the end."""
    count = place.size(60, 12)
    settings = {"compile": "on" if place.gpu else "off", "graphs": "on"}
    plain, again = (_losses(place, count, **settings) for _ in range(2))
    with place.folder() as out:
        with _short(place, out, count, **settings) as (loop, _):
            one_step = loop.one_step

            def stopped() -> None:
                one_step()
                if loop.done == count // 2:
                    os.kill(os.getpid(), signal.SIGTERM)

            loop.one_step = stopped  # type: ignore[method-assign]
            with StopRequest() as stop:
                ended = loop.run(stop)
            halfway = loop.done
        with _short(place, out, count, resume=True, **settings) as (loop, _):
            loop.run(StopRequest())
            mine = [row["loss"] for row in _rows(loop)]
    found = _compared(mine, plain, again)
    return found | {"ok": found["ok"] and ended == signal.SIGTERM, "stopped_after": halfway}


def _short(place: Place, out: Path, count: int, **settings: Any) -> Any:
    """A short run with dropout, every step in its rows."""
    return place.run(
        out / "run", place.size(1300, 200), **{**OFF, "dropout": 0.1, "max_steps": count, "log_every": 1, **settings}
    )


def _losses(place: Place, count: int, replays: bool = True, **settings: Any) -> list[float]:
    with place.folder() as out, _short(place, out, count, **settings) as (loop, _):
        loop.save = lambda **_: None  # type: ignore[method-assign]
        if not replays:
            loop.step.launch = None
        loop.run(StopRequest())
        return [row["loss"] for row in _rows(loop)]


def _rows(loop: Loop) -> list[dict[str, Any]]:
    return [row for row in loop.metrics.rows if "event" not in row]


def _compared(mine: list[float], plain: list[float], again: list[float]) -> dict[str, Any]:
    """`apart`: the largest relative difference of two losses of one step; `spread`: of the plain run from itself."""
    apart, spread = _apart(mine, plain), _apart(again, plain)
    return {"ok": apart <= max(LEAST, 4 * spread), "apart": apart, "spread": spread, "steps": len(mine)}


def _apart(mine: list[float], other: list[float]) -> float:
    if len(mine) != len(other) or None in mine or None in other:
        return float("inf")
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(mine, other, strict=True))


def _first(said: list[str], most: int = 30) -> list[str]:
    return [line for line in said if not line.startswith("epoch ")][:most]


COMPARED: dict[str, Callable[[Place], dict[str, Any]]] = {
    "a capture that fails late": late,
    "checkpoints while graphs replay": saved,
    "stopped and resumed": resumed,
}
