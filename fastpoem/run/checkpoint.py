"""Checkpoints: a folder that is complete or absent, and is believed only when its hashes say so.

`checkpoints/step-00001234/` holds safetensors files and `state.json`, which names the size and sha256 of each; the folder is written under
another name, flushed to disk and renamed. Reading takes the newest that verifies, and says which it passed over and why.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint of `step` into `folder` and drop all but the newest `keep`. Returns its folder.

    tensors: file name -> tensor name -> tensor on any device. state: what JSON can hold. Raises OSError where the disk refuses;
    nothing is left of the attempt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    goal, made = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        files = {}
        for name, group in tensors.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}, made / name)
            files[name] = {"size": (made / name).stat().st_size, "sha256": _hash(made / name)}
            _flush(made / name)
        content = {"format": FORMAT, "step": step, "files": files, **state}
        (made / STATE).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        _flush(made / STATE)
        _flush(made)
        if goal.exists():  # of an earlier attempt at the same step, complete or not
            shutil.rmtree(goal)
        os.rename(made, goal)
        _flush(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    for _, old in listed(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return goal


def listed(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints there, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def load_newest(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """(state, tensors by file) of the newest checkpoint that is whole and unaltered, or None. `say` hears of each one passed over."""
    for _, path in listed(folder):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state["format"] != FORMAT:
                raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
            for name, entry in state["files"].items():
                if Path(name).name != name:
                    raise ValueError(f"{name!r} is outside the folder")
                if (path / name).stat().st_size != entry["size"] or _hash(path / name) != entry["sha256"]:
                    raise ValueError(f"{name} is damaged")
            return state, {name: load_file(path / name) for name in state["files"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            say(f"checkpoint {path.name} passed over: {error}")
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
