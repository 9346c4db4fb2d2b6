"""What checks found on a card, kept on disk: a card is checked once, with that driver, PyTorch and source.

A verdict holds for all that it depends on (`card`); a file that is missing or damaged is no verdict.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fastpoem_kernels
import torch
from fastpoem_kernels.check import Record

from fastpoem.doctor.checks import separate
from fastpoem.doctor.machine import driver, version
from fastpoem.errors import InputError
from fastpoem.paths import user_cache
from fastpoem.version import __version__

COMPILERS = (
    "InductorError",
    "BackendCompilerFailed",
    "CompilationError",
    "PTXASError",
)  # how their errors begin in a record
Failures = dict[str, str]  # record's name -> reason; empty where a check has passed


def failures(records: Sequence[Record]) -> Failures:
    """The reasons of those that are not ok."""
    return {
        record.name: record.note
        if record.error is None
        else f"error {record.error:.2g}, {record.tolerance or 0:.2g} allowed"
        + (f", {record.note}" if record.note else "")
        for record in records
        if not record.ok
    }


def place() -> Path:
    return user_cache() / "checked.json"


def card(device: torch.device) -> str:
    """All that a verdict depends on, in a line."""
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    properties = torch.cuda.get_device_properties(device)
    parts = [
        f"{properties.name} {getattr(properties, 'uuid', '')}",
        f"sm {capability}",
        f"driver {driver()}",
        f"torch {torch.__version__}",
    ]
    parts += [f"{name} {version(name) or 'none'}" for name in ("triton", "flash-attn")]
    return ", ".join([*parts, f"fastpoem {__version__} {source_hash()}"])


@functools.cache
def source_hash() -> str:
    """Of every source file that runs on the device or checks it."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    rooms = [here, here.parent / "engine", here.parent / "model"]
    for room in [*rooms, Path(fastpoem_kernels.__file__).parent]:
        for file in sorted(room.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def remembered(key: str) -> dict[str, Failures]:
    """What is known of a card; nothing where the file is missing or damaged."""
    found = _read().get(key)
    if not isinstance(found, dict):
        return {}
    return {
        name: reasons
        for name, reasons in found.items()
        if isinstance(reasons, dict) and all(isinstance(reason, str) for reason in reasons.values())
    }


def remember(key: str, found: Mapping[str, Sequence[Record]]) -> None:
    """Keep what checks found, as well as the disk allows: passes, and wrong numbers. What could not begin or end, ran out of memory or found
    no compiler may be another's fault, and is tried again; but what the compiler raised, and does not without combined kernels, is theirs."""
    new = {
        name: failures(records)
        for name, records in found.items()
        if all(record.ok or record.error is not None for record in records) or _blames_combined(name, found)
    }
    if not new:
        return
    everything = _read()
    everything[key] = {**remembered(key), **new}
    with contextlib.suppress(OSError, InputError):
        path = place()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(everything, file, indent=1)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def keep(key: str) -> Callable[[str, Sequence[Record]], None]:
    """Remembers each check by itself, as it ends: nobody knows whether the others will."""
    return lambda name, records: remember(key, {name: records})


def _blames_combined(name: str, found: Mapping[str, Sequence[Record]]) -> bool:
    """Did the compiler raise in check `name`, and did the same pass without combined kernels?"""
    other = found.get(separate(name), ()) if name != separate(name) else ()
    raised = all(record.ok or record.note.startswith(COMPILERS) for record in found[name])
    return raised and bool(other) and all(record.ok for record in other)


def _read() -> dict[str, Any]:
    try:
        found = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, InputError):
        return {}
    return found if isinstance(found, dict) else {}
