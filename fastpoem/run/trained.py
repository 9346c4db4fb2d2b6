"""The trained model of a run: RUN/model, or while there is none, its newest whole checkpoint, which is a model folder too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastpoem.errors import InputError
from fastpoem.paths import given_path
from fastpoem.run import checkpoint


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run, not of a model."""
    try:
        return (folder / "metrics.jsonl").is_file() or (folder / checkpoint.FOLDER).is_dir()
    except OSError:
        return False


def trained_model(name: str, say: Callable[[str], None]) -> str:
    """The folder of the model that `name` means: a run's, or `name` itself where it is none's. `say` hears which of a run's it is.
    Raises InputError for a run that has none."""
    folder = given_path("--model", name)
    if not is_run(folder):
        return name
    model = folder / "model"
    if not (model / "config.json").is_file():
        model = newest_checkpoint(folder)
    say(f"the model is {model}")
    return str(model)


def newest_checkpoint(run: Path) -> Path:
    """Raises InputError where the run has no whole one."""
    found = checkpoint.newest_whole(run)
    if found is None:
        raise InputError(
            run, "holds no model and no whole checkpoint yet", "train it to its first checkpoint, with --resume"
        )
    return found
