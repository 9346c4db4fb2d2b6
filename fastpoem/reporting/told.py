"""What a run's folder tells a report, each part of which may be missing: a run that trains, that was stopped, or that a disk damaged.

Only metrics.jsonl makes a run (`fastpoem.run.opened` reads it). The rest, its settings, its poems and its text's lengths, is read here as
far as it is whole, and what is not is said in `notes`, in the place of the chart that it leaves empty.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastpoem import disk
from fastpoem.errors import InputError

Row = Mapping[str, Any]
LONGEST_POEM = 2000  # characters; what is longer is no poem


@dataclass
class Told:
    """One run. `rows` are those of metrics.jsonl; `samples` {"step", "epoch", "prompt", "poem"} in the order they were written; `manifest`
    that of its token store, None where there is none any more."""

    name: str
    folder: Path
    rows: Sequence[Row]
    config: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    trains: bool = False
    notes: list[str] = field(default_factory=list)

    @cached_property
    def steps(self) -> list[Row]:
        return [row for row in self.rows if "event" not in row]

    @cached_property
    def epochs(self) -> list[Row]:
        return [row for row in self.rows if row.get("event") == "epoch"]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return part(self.config, "settings")

    @property
    def done(self) -> int:
        """Optimizer steps, as far as they were logged."""
        return max((row["step"] for row in self.rows), default=0)

    @cached_property
    def steps_an_epoch(self) -> int | None:
        """None while that cannot be known: the last step of an epoch is always logged, but is the last one yet?"""
        first = [row["step"] for row in self.rows if row.get("epoch") == 1]
        ended = any(row.get("epoch") == 2 for row in self.rows)
        if not ended and any(row.get("epoch") == 1 for row in self.epochs):
            most = self.settings.get("max_steps")
            ended = not isinstance(most, int) or max(first) < most
        return max(first) if first and ended else None

    @property
    def planned(self) -> int | None:
        """The steps that were asked for. None where nobody knows."""
        most, epochs, an_epoch = self.settings.get("max_steps"), self.settings.get("epochs"), self.steps_an_epoch
        known = [most] if isinstance(most, int) else []
        known += [epochs * an_epoch] if isinstance(epochs, int) and an_epoch is not None else []
        return min(known, default=None)

    @property
    def state(self) -> str:
        """training, finished, or stopped."""
        if self.trains:
            return "training"
        has_model = (self.folder / "model" / "config.json").is_file()
        if self.planned is not None and self.done >= self.planned:
            return "finished"
        early = self.settings.get("patience") is not None or self.planned is None
        return "finished" if has_model and early else "stopped"

    @property
    def seconds(self) -> float | None:
        """Of training, setting up excluded."""
        return last(self.steps, "seconds")

    @property
    def best(self) -> Row | None:
        """The epoch's row with the lowest validation loss."""
        return min(
            (row for row in self.epochs if number(row.get("val_loss")) is not None),
            key=lambda row: row["val_loss"],
            default=None,
        )

    def mean_rate(self, name: str) -> float | None:
        """The mean over the run of a column that says how many a second; without its first row, which is of a process that has only begun."""
        rows = [
            (row[name], row["seconds"]) for row in self.steps if number(row.get(name)) and number(row.get("seconds"))
        ]
        spans = [(rate, now - then) for (rate, now), (_, then) in zip(rows[1:], rows, strict=False) if now > then]
        if not spans:
            return rows[-1][0] if rows else None
        return sum(rate * seconds for rate, seconds in spans) / sum(seconds for _, seconds in spans)


def told(folder: Path, name: str, rows: Sequence[Row]) -> Told:
    """Everything else that the folder of a run with these rows holds. Raises nothing for what is missing or damaged."""
    run = Told(name, folder, rows)
    written = _lines(folder / "metrics.jsonl")
    if len(rows) < len(written) - 1 or (len(rows) < len(written) and written[-1].endswith(b"\n")):
        run.notes.append(f"line {len(rows) + 1} of metrics.jsonl is damaged: what follows it is left out")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        run.config = config if isinstance(config, dict) else {}
    except (OSError, ValueError, RecursionError):
        run.notes.append("config.json is missing or damaged: the settings are not known")
    run.samples = [*_samples(folder / "samples.jsonl")]
    run.manifest = _manifest(run)
    run.trains = _is_locked(folder / ".lock")
    return run


def part(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object called `name` in another, empty where there is none."""
    value = content.get(name)
    return value if isinstance(value, dict) else {}


def number(value: object) -> float | None:
    """`value` where it is a finite number. JSON has null for what was none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def last(rows: Sequence[Row], name: str) -> float | None:
    return next((found for row in reversed(rows) if (found := number(row.get(name))) is not None), None)


def names(folders: Sequence[Path]) -> list[str]:
    """A name for each of several folders, as short as tells them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        found = ["/".join(one[-depth:]) for one in parts]
        if len({*found}) == len(found):
            return found
    return [str(folder) for folder in folders]


def _lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().splitlines(keepends=True)
    except OSError:
        return []


def _samples(file: Path) -> Iterator[dict[str, Any]]:
    """What is whole of the poems that were written while the run trained."""
    for line in _lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("poem"), str):
            prompt, epoch = row.get("prompt"), number(row.get("epoch"))
            yield {
                **row,
                "prompt": prompt if isinstance(prompt, str) else "",
                "epoch": epoch,
                "poem": row["poem"][:LONGEST_POEM],
            }


def _manifest(run: Told) -> dict[str, Any] | None:
    """The manifest of the token store that the run was trained on."""
    from fastpoem.corpus.manifest import identity, read_manifest

    store, cwd = part(run.config, "store"), run.config.get("cwd")
    if not isinstance(store.get("path"), str):
        return None
    path = Path(os.path.join(cwd if isinstance(cwd, str) else ".", store["path"]))
    try:
        manifest = read_manifest(path)
    except (InputError, OSError, ValueError):
        run.notes.append("its token store is gone: the lengths of its poems are not known")
        return None
    if identity(manifest) != store.get("identity"):
        run.notes.append("its token store has been made anew since: the lengths of its poems are not known")
        return None
    return manifest


def _is_locked(file: Path) -> bool:
    """Whether a process trains in the folder now."""
    try:
        with file.open("rb") as handle:
            disk.lock_shared(handle)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
