"""A run as Python has it: its folder and what it holds. Without torch, so that looking at a run of last week takes no time."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpoem.errors import InputError
from fastpoem.paths import given_path
from fastpoem.run.trained import model_of


class Run:
    """A finished or stopped run: its folder, the rows of metrics.jsonl, and the signal that stopped it, where one did.

    `Run("runs/x")` opens one that was trained before. Raises InputError where there is none.
    """

    def __init__(
        self, folder: str | Path, metrics: list[dict[str, Any]] | None = None, stopped_by: int | None = None
    ) -> None:
        self.folder = given_path("Run", str(folder))
        self.metrics = [*_rows(self.folder)] if metrics is None else metrics
        self.stopped_by = stopped_by

    @property
    def model(self) -> Path:
        """The model's folder: RUN/model, or the newest checkpoint of a run that has not come to its end. Raises InputError where there is
        neither."""
        return model_of(self.folder, stopped=self.stopped_by is not None)

    def generate(self, prompt: str | Sequence[str] = "", **options: Any) -> list[str]:
        """Poems that begin with `prompt`, or with each of several; options as of `fastpoem.generation.poems.sample`: count, top_k, top_p,
        temperature, seed … Raises InputError."""
        from fastpoem.generation.poems import sample

        return sample(self.model, prompt, **options)

    def frame(self, event: str | None = None) -> Any:
        """The rows of the logged steps as a pandas frame, or those of an event ("epoch"), with the step as its index. Raises InputError
        without pandas."""
        try:
            import pandas
        except ImportError:
            raise InputError("run.frame()", "pandas is not installed", "pip install 'fastpoem[frame]'") from None
        rows = [row for row in self.metrics if row.get("event") == event]
        frame = pandas.DataFrame(rows, columns=[*dict.fromkeys(name for row in rows for name in row)])
        return frame.drop(columns="event", errors="ignore").set_index("step") if rows else frame

    def plot(self, *others: Run) -> Any:
        """The run's curves, those of `others` beside them, as a matplotlib figure, which a notebook shows: `run.plot().savefig("curves.png")`.
        Raises InputError without matplotlib."""
        from fastpoem.reporting.png import panels
        from fastpoem.reporting.told import names, told

        runs = [self, *others]
        found = zip(runs, names([run.folder for run in runs]), strict=True)
        return panels([told(run.folder, name, run.metrics) for run, name in found])

    def _repr_html_(self) -> str:
        from fastpoem.reporting.page import summary
        from fastpoem.reporting.told import told
        from fastpoem.reporting.words import speaker

        run = told(self.folder, self.folder.name, self.metrics)
        return summary(run, speaker(str(run.settings.get("lang", "auto"))))

    def __repr__(self) -> str:
        steps = [row for row in self.metrics if "event" not in row and "loss" in row]
        said = [repr(str(self.folder)), f"{self.metrics[-1]['step'] if self.metrics else 0} steps"]
        if steps and isinstance(steps[-1]["loss"], float):
            said.append(f"loss {steps[-1]['loss']:.4f}")
        if self.stopped_by is not None:
            said.append(f"stopped by {signal.Signals(self.stopped_by).name}")
        return f"Run({', '.join(said)})"


def _rows(run: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl. One that is being written, or was torn, is the last that is looked at. Raises InputError."""
    file = run / "metrics.jsonl"
    mend = "give the folder of a run, as --out named it"
    if not run.is_dir():
        raise InputError(run, "no such folder", mend)
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise InputError(run, "holds no run: it has no metrics.jsonl", mend) from None
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror})", "check its permissions") from None
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not line.endswith(b"\n") or not isinstance(row, dict) or type(row.get("step")) is not int:
            return
        yield row
