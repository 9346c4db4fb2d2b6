"""Other eyes on a run: TensorBoard, Weights & Biases, SwanLab, MLflow, each only where it is installed and asked for with --log-to.

They are mirrors of metrics.jsonl and get its numbers in its order; nothing that one of them does, or fails at, changes or ends the training.
One that cannot be started is an error before the first step, since whoever asked for it would otherwise miss it in the end. A resumed run goes
on under the name that it had there (RUN/trackers.json).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastpoem.errors import InputError, first_line

PROJECT = "fastpoem"
KEPT = "trackers.json"
LONGEST = 500  # characters of a setting: what MLflow of any version takes


class Kind(NamedTuple):
    title: str
    extra: str
    elsewhere: str  # how to do without its server


KINDS = {
    "tensorboard": Kind("TensorBoard", "curves", ""),
    "wandb": Kind("Weights & Biases", "wandb", "log in with `wandb login`, set WANDB_MODE=offline, or "),
    "swanlab": Kind("SwanLab", "swanlab", "log in with `swanlab login`, set SWANLAB_MODE=offline, or "),
    "mlflow": Kind("MLflow", "mlflow", "set MLFLOW_TRACKING_URI, or "),
}


class Tracker(NamedTuple):
    """`log(step, values)` takes one row's numbers, `close()` is called once. `ident`: what the run is called there."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]
    ident: str | None = None


class Trackers:
    """Those of one run, fed row by row."""

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], *, done: int, say: Callable[..., None]
    ) -> None:
        """done: the steps that a resumed run goes on from, 0 for a new one. Raises InputError for one that does not start."""
        self._say, self._open = say, dict[str, Tracker]()
        kept = _kept(folder) if done else {}
        before = {path.name for path in folder.iterdir()}
        for name in names:
            try:
                self._open[name] = open_tracker(name, folder, settings, done=done, ident=kept.get(name))
            except Exception as error:  # of a library that we do not know
                self.close()
                for path in folder.iterdir():
                    if path.name not in before:
                        shutil.rmtree(path, ignore_errors=True)
                kind = KINDS[name]
                mend = f"{kind.elsewhere}leave it out"
                raise InputError(
                    f"--log-to {name}", f"{kind.title} does not start ({first_line(error)})", mend
                ) from error
        idents = {name: tracker.ident for name, tracker in self._open.items() if tracker.ident is not None}
        if idents and idents != kept:
            with suppress(OSError):
                (folder / KEPT).write_text(json.dumps({**kept, **idents}) + "\n", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        group = "epoch" if row.get("event") == "epoch" else "train"
        values = {
            f"{group}/{name}": value for name, value in row.items() if isinstance(value, float) and name != "seconds"
        }
        for name, tracker in [*self._open.items()]:
            try:
                tracker.log(row["step"], values)
            except Exception as error:
                self._ends(name, error)

    def close(self) -> None:
        for name, tracker in [*self._open.items()]:
            try:
                tracker.close()
            except Exception as error:
                self._ends(name, error)
        self._open.clear()

    def _ends(self, name: str, error: Exception) -> None:
        del self._open[name]
        self._say("{0}'s curves end here, they could not be written: {1}", KINDS[name].title, first_line(error))


def check_installed(names: Sequence[str]) -> None:
    """Raises InputError naming the extra that brings what is missing."""
    for name in names:
        if name in sys.modules:
            continue
        found = importlib.util.find_spec(name)
        if (
            found is None or getattr(found, "origin", "") is None
        ):  # a folder of that name, as these programs make them, is none
            kind = KINDS[name]
            raise InputError(
                f"--log-to {name}", f"{kind.title} is not installed", f"pip install 'fastpoem[{kind.extra}]'"
            )


def open_tracker(
    name: str, folder: Path, settings: Mapping[str, Any], *, done: int = 0, ident: str | None = None
) -> Tracker:
    """Start one of `KINDS` for the run in `folder`. ident: what a resumed run was called there. Raises whatever the library raises."""
    return {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab, "mlflow": _mlflow}[name](
        folder, settings, done, ident
    )


def _tensorboard(folder: Path, settings: Mapping[str, Any], done: int, ident: str | None) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(folder: Path, settings: Mapping[str, Any], done: int, ident: str | None) -> Tracker:
    import wandb

    ident = ident or _fresh()
    run = wandb.init(
        project=PROJECT, name=folder.name, dir=str(folder.absolute()), config=dict(settings), id=ident, resume="allow"
    )
    for group in ("train/*", "epoch/*"):  # its own steps only rise, and a resumed run does some again
        run.define_metric(group, step_metric="step")
    return Tracker(lambda step, values: run.log({**values, "step": step}), run.finish, ident)


def _swanlab(folder: Path, settings: Mapping[str, Any], done: int, ident: str | None) -> Tracker:
    import swanlab

    ident = ident or _fresh()
    logs = folder.absolute() / "swanlab"
    logs.mkdir(exist_ok=True)
    swanlab.init(
        project=PROJECT,
        experiment_name=folder.name,
        logdir=str(logs),
        config=dict(settings),
        id=ident,
        resume="allow",
    )
    return Tracker(lambda step, values: swanlab.log(values, step=step), swanlab.finish, ident)


def _mlflow(folder: Path, settings: Mapping[str, Any], done: int, ident: str | None) -> Tracker:
    import mlflow

    mlflow.set_experiment(PROJECT)
    run = mlflow.start_run(run_id=ident) if ident else mlflow.start_run(run_name=folder.name)
    ours = run.info.run_id
    if ident is None:  # it refuses to have a parameter changed, as a longer --epochs would
        mlflow.log_params({name: str(value)[:LONGEST] for name, value in settings.items()})

    def log(step: int, values: dict[str, float]) -> None:  # or each row would wait for a server
        mlflow.log_metrics(values, step=step, synchronous=False, run_id=ours)

    return Tracker(log, mlflow.end_run, ours)


def _fresh() -> str:
    """A name that no run has had: 21 letters and digits, as SwanLab wants them."""
    return uuid.uuid4().hex[:21]


def _kept(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / KEPT).read_text(encoding="utf-8"))
        return {name: ident for name, ident in found.items() if name in KINDS and isinstance(ident, str)}
    except (OSError, ValueError, AttributeError):
        return {}
