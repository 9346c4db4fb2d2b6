"""Checkpoints: a folder that is complete or absent, and is believed only when its hashes say so.

`checkpoints/step-00001234/` is a model folder that transformers loads (weights, configuration, tokenizer) with the rest of a run's state
beside it: optimizer.safetensors, and state.json, which names size and sha256 of every file and holds a checksum of itself. It is written
as `.checkpoint.partial` in the run's folder, flushed to disk and renamed. The newest `keep` stay, and the one with the lowest validation
loss. Those written by the clock or on a signal are only passing: they stay until one that was due anyway is newer, and push none of these
out.

What is read is hostile until it has been checked: sizes before hashes, hashes before headers, headers before a byte of state is changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastpoem import disk
from fastpoem.errors import InputError
from fastpoem.model.hub import WEIGHTS
from fastpoem.paths import spelled

FORMAT = 2
FOLDER = "checkpoints"
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
LARGEST_STATE = 1 << 22
PARTIAL, DROPPED = (
    ".checkpoint.partial",
    ".checkpoint.dropped",
)  # in the run's folder: checkpoints/ holds complete ones only
_NAME = re.compile(r"step-(\d{8,15})")
Tensors = Mapping[str, Mapping[str, Tensor]]  # file -> name -> tensor


class Damaged(Exception):
    """A checkpoint that is not what was written."""


def write(
    run: Path,
    step: int,
    tensors: Tensors,
    beside: Mapping[str, bytes],
    state: Mapping[str, Any],
    keep: int,
    hold: Callable[[], object] = lambda: None,
) -> Path:
    """Write the checkpoint of `step` and drop those that `keep` does not cover. Returns its folder.

    tensors: on the CPU. beside: the model folder's other files. state: what JSON can hold; `val_loss` in it ranks the checkpoint,
    `passing` says that the next one that is not takes its place.
    hold: raises where `run` is not to be written to any more; asked before each change in it that is not the attempt's own.
    Raises OSError where the disk refuses: nothing is left of the attempt, and nothing was dropped for it.
    """
    made, goal = run / PARTIAL, folder_of(run, step)
    hold()
    disk.recover(made, goal)
    made.mkdir(parents=True)
    try:
        files = {name: disk.write_bytes(made / name, content) for name, content in beside.items()}
        files |= {name: disk.write_tensors(made / name, group) for name, group in tensors.items()}
        content = {"format": FORMAT, "step": step, "files": files, "state": dict(state)}
        content["checksum"] = _checksum(content)
        disk.write_bytes(made / STATE, json.dumps(content, indent=1).encode())
        hold()
        disk.put(made, goal)
    except BaseException:
        with suppress(OSError):
            hold()
            disk.recover(made, goal)
        raise
    _drop_old(run, step, keep)
    return goal


def listed(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, newest first, whole or not."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def folder_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, on the CPU. Raises Damaged, or OSError where it is not there."""
    files = _described(path)["files"]
    _compare(path, {name: entry for name, entry in files.items() if name != OPTIMIZER})
    try:
        with spelled(path / WEIGHTS) as called, safe_open(called, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise Damaged(str(error)) from error


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is what was written, every byte of it read."""
    for _, path in listed(run):
        with suppress(Damaged, OSError):
            _compare(path, _described(path)["files"])
            return path
    return None


def best_step(path: Path) -> int | None:
    """The step with the lowest validation loss so far, by a checkpoint. None where it does not tell."""
    with suppress(Damaged, OSError, KeyError, TypeError, IndexError):
        step: int = _described(path)["state"]["best"][0]
        return step
    return None


def clean(run: Path) -> None:
    """Remove what a killed run left half-done, and put back what it had only set aside. Only for who holds the run's lock."""
    for old in run.glob(f".step-*{disk.REPLACED}"):
        disk.recover(run / PARTIAL, run / FOLDER / old.name[1:].removesuffix(disk.REPLACED))
    for name in (PARTIAL, DROPPED):
        disk.discard(run / name)


def read_newest(
    run: Path, into: Tensors, check: Callable[[Mapping[str, Any]], None], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Copy the newest whole checkpoint's tensors into those of `into` (of the same names, shapes and dtypes) and return its state,
    with `step` in it. None where there is no checkpoint. `say` hears of each one passed over and why.

    check: called with the state before a tensor is read; may raise to refuse it. Raises InputError where none of several is whole.
    Names that begin with "rng." may be there or not, as they differ between devices.
    """
    found = listed(run)
    for _, path in found:
        try:
            content = _described(path)
            check(content["state"])
            _compare(path, content["files"])
            _load(path, into)
        except (Damaged, OSError, SafetensorError) as error:
            say(f"checkpoint {path.name} is passed over: {error}")
        else:
            return {**content["state"], "step": content["step"]}
    if found:
        mend = "start again in another folder (--out), or restore one of them from a copy"
        raise InputError(run / FOLDER, f"none of its {len(found)} checkpoints is whole", mend)
    return None


def precision(run: Path) -> str | None:
    """ "fp32", "bf16" or "fp16": what the newest checkpoint that tells was computed in. None where none does."""
    return setting(run, "precision", ("fp32", "bf16", "fp16"))


def setting(run: Path, name: str, values: Collection[str]) -> str | None:
    """Which of `values` a setting that may be left open came to, by the newest checkpoint that tells. None where none does."""
    for _, path in listed(run):
        with suppress(Damaged, OSError, KeyError, TypeError):
            found = _described(path)["state"]["identity"]["settings"][name]
            if found in values:
                return found
    return None


def _described(path: Path) -> dict[str, Any]:
    """The content of state.json, every part of it checked that does not need another file."""
    file = path / STATE
    if file.stat().st_size > LARGEST_STATE:
        raise Damaged(f"{STATE} is larger than {LARGEST_STATE:,} bytes")
    try:
        content = json.loads(file.read_bytes())
        if content["format"] != FORMAT:
            raise Damaged(f"its format is {content['format']!r:.20}, this version reads {FORMAT}")
        whole = content["checksum"] == _checksum(content) and path.name == f"step-{content['step']:08d}"
        names = content["files"]
        fits = (
            whole
            and isinstance(content["state"], dict)
            and isinstance(names, dict)
            and {WEIGHTS, OPTIMIZER} <= {*names}
        )
        plain = fits and all(Path(name).name == name and not name.startswith(".") for name in names)
        sized = plain and all(isinstance(entry, dict) and {"size", "sha256"} <= {*entry} for entry in names.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        sized = False
    if not sized:
        raise Damaged(f"{STATE} is damaged")
    return content


def _compare(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, entry in files.items():
        if (path / name).is_symlink() or not (path / name).is_file():
            raise Damaged(f"{name} is missing")
        if (path / name).stat().st_size != entry["size"]:
            raise Damaged(f"{name} is truncated or foreign")
    for name, entry in files.items():
        if disk.file_hash(path / name) != entry["sha256"]:
            raise Damaged(f"{name} is damaged")


def _load(path: Path, into: Tensors) -> None:
    """Copy tensors; before the first is copied, all are known to be there, of the right kind, and no others."""
    for file, tensors in into.items():
        with spelled(path / file) as called, safe_open(called, framework="pt") as stream:
            names = {name for name in stream.keys() if not name.startswith("rng.")}  # noqa: SIM118  (no mapping)
            if odd := names ^ {name for name in tensors if not name.startswith("rng.")}:
                raise Damaged(f"{file} and the model differ by {sorted(odd)[0]}")
            for name in {*stream.keys()} & {*tensors}:
                part, goal = stream.get_slice(name), tensors[name]
                if part.get_shape() != [*goal.shape] or part.get_dtype() != disk.DTYPES[str(goal.dtype)]:
                    raise Damaged(f"{name} is {part.get_dtype()} {part.get_shape()}, not {goal.dtype} {[*goal.shape]}")
    with torch.no_grad():
        for file, tensors in into.items():
            with spelled(path / file) as called, safe_open(called, framework="pt") as stream:
                for name in {*stream.keys()} & {*tensors}:
                    tensors[name].copy_(stream.get_tensor(name))


def _drop_old(run: Path, written: int, keep: int) -> None:
    """Remove all but the newest `keep`, the best, and of the passing ones the newest two since the newest of these; each by a rename first:
    whatever is in checkpoints/ is complete.

    Those of later steps than the one just written were passed over when the run went on from an earlier one: they go too.
    """
    states = {path: _state(path) for step, path in listed(run) if step <= written}  # newest first
    due = [path for path, state in states.items() if not state.get("passing")]
    passing = [path for path in states if path not in due and (not due or path.name > due[0].name)]
    losses = {path: state["val_loss"] for path, state in states.items() if _is_loss(state.get("val_loss"))}
    best = min(reversed(losses), key=losses.__getitem__, default=None)  # the earliest of the lowest
    for _, path in listed(run):
        if path not in (best, *due[:keep], *passing[: min(2, keep)]):
            with suppress(OSError):
                disk.discard(run / DROPPED)
                os.rename(path, run / DROPPED)
                disk.discard(run / DROPPED)


def _state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, nothing where it is damaged."""
    try:
        state: dict[str, Any] = _described(path)["state"]
    except (Damaged, OSError):
        return {}
    return state


def _is_loss(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
