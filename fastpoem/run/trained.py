"""The trained model of a run: RUN/model, or its newest whole checkpoint, which is a model folder too, while there is none or the run has
gone on since.

Which step RUN/model is of stands in its card. Times of files would not say it of a run that was copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastpoem.errors import InputError
from fastpoem.paths import given_path

_STEP = re.compile(r"^\| steps \| ([\d,]+) \|$", re.MULTILINE)  # as fastpoem.run.card has it


def trained_model(name: str, say: Callable[[str], None]) -> str:
    """The folder of the model that `name` means: a run's, or `name` itself where it is none's. `say` hears which of a run's it is.
    Raises InputError for a run that has none."""
    folder = given_path("--model", name)
    try:
        is_run = (folder / "metrics.jsonl").is_file() or (folder / "checkpoints").is_dir()
    except OSError:
        is_run = False
    if not is_run:
        return name
    model = model_of(folder)
    older = folder / "model"
    since = (
        f": the run went on after {older} was written" if model != older and (older / "config.json").is_file() else ""
    )
    say(f"the model is {model}{since}")
    return str(model)


def model_of(run: Path, *, stopped: bool = False) -> Path:
    """RUN/model; or the newest whole checkpoint where there is none, or the run was `stopped` or has gone on, so that RUN/model is of an
    earlier end. Raises InputError where the run has neither."""
    model = run / "model"
    step = _step(model) if (model / "config.json").is_file() else 0
    if not stopped and (step is None or (step and step >= max(_steps(run), default=0))):
        return model
    from fastpoem.run import checkpoint  # torch takes seconds to import

    found = checkpoint.newest_whole(run)
    if step and not stopped:
        behind = found is not None and int(found.name.removeprefix("step-")) > step
        if found is None or not behind or (_leaves_the_best(run) and checkpoint.best_step(found) == step):
            return model
    if found is None:
        mend = "train it to its first checkpoint, with --resume"
        raise InputError(run, "holds no model and no whole checkpoint yet", mend)
    return found


def _step(model: Path) -> int | None:
    """The step that RUN/model is of. None where its card does not say."""
    with suppress(OSError, ValueError):
        if found := _STEP.search((model / "README.md").read_text(encoding="utf-8")):
            return int(found[1].replace(",", ""))
    return None


def _steps(run: Path) -> list[int]:
    """Those of the run's checkpoints, whole or not."""
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    return [int(name) for name in names if name.isdecimal()]


def _leaves_the_best(run: Path) -> bool:
    """Does the run leave its best checkpoint in RUN/model?"""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]["best"] is True
    return False
