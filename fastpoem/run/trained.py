"""The trained model of a run: RUN/model, or while there is none, its newest whole checkpoint, which is a model folder too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastpoem.errors import InputError
from fastpoem.paths import given_path


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
    say(f"the model is {model}")
    return str(model)


def model_of(run: Path, *, stopped: bool = False) -> Path:
    """RUN/model, or the newest whole checkpoint where there is none or the run was `stopped`, so that RUN/model is of an earlier end.
    Raises InputError where the run has neither."""
    model = run / "model"
    if not stopped and (model / "config.json").is_file():
        return model
    from fastpoem.run import checkpoint  # torch takes seconds to import

    found = checkpoint.newest_whole(run)
    if found is None:
        mend = "train it to its first checkpoint, with --resume"
        raise InputError(run, "holds no model and no whole checkpoint yet", mend)
    return found
