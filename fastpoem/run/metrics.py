"""What a run tells: metrics.jsonl for programs, lines and a progress bar for a person, TensorBoard curves where asked for."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Metrics:
    """The rows of a run: kept in `rows`, appended to `metrics.jsonl` a whole line at a time, mirrored to TensorBoard."""

    def __init__(self, folder: Path, *, keep_bytes: int = 0, tensorboard: bool = False) -> None:
        """keep_bytes: what of an existing file still holds; the rest belongs to steps that a resumed run will do again."""
        self.path = folder / "metrics.jsonl"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, keep_bytes)
        with self.path.open(encoding="utf-8") as stream:
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in stream]
        self.last_row_at = keep_bytes  # where the last row written begins
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    @property
    def bytes(self) -> int:
        return os.fstat(self._file).st_size

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.last_row_at = self.bytes
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        os.write(self._file, (json.dumps(plain) + "\n").encode())
        if self._writer is not None:
            group = "epoch" if row.get("event") == "epoch" else "train"
            for name, value in row.items():
                if isinstance(value, float) and name not in ("seconds",):
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def close(self) -> None:
        os.close(self._file)
        if self._writer is not None:
            self._writer.close()


class Voice:
    """Lines on the console, with a bar below them where there is a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(highlight=False, quiet=quiet, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def start(self, done: int, total: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task("training", completed=done, total=total)

    def advance(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def stop(self) -> None:
        self._progress.stop()
        self._task = None


def step_line(row: dict[str, Any], epochs: int, last_step: int, seconds_left: float) -> str:
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"epoch {row['epoch']}/{epochs}  step {row['step']}/{last_step}  lr {row['lr']:.2e}  loss {row['loss']:.4f}  "
        f"accuracy {row['accuracy']:6.2%}  {row['tokens_per_s']:,.0f} tokens/s  left {hours}:{minutes:02d}:{seconds:02d}"
    )


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    line = f"epoch {row['epoch']}/{epochs}  mean loss {row['mean_loss']:.4f}  accuracy {row['mean_accuracy']:.2%}"
    if row["val_loss"] is not None:
        line += f"  validation loss {row['val_loss']:.4f}  accuracy {row['val_accuracy']:.2%}"
    return line
