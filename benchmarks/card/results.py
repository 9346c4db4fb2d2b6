"""DIR/card.json: what was measured on one card, an entry at a time, rewritten whole after each so that whatever ends a call costs one entry.

`schema` 1; `about`: the machine, the versions and the sizes (`small`) that everything in the file was measured with; `entries`: by name,
each with its `part`, `seconds` and `code` (a hash of the source that it ran), and one of `result`, `error` (a line) and `missing` (what it
needs is not here); `left_out`: by name, why what is not there was not tried.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from fastpoem.doctor.machine import Peak
from fastpoem.errors import InputError

SAME = (
    "name",
    "torch",
    "triton",
    "small",
    "poems",
)  # of `about`: figures that differ in one of these are not of one card


class Results:
    """The file's content, and the folder that it is in. Raises InputError for a file that is none of ours, or another card's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "card.json"
        self.content: dict[str, Any] = {"schema": 1, "about": {}, "entries": {}, "left_out": {}}
        try:
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            if self.content["schema"] != 1 or not all(
                isinstance(self.content[key], dict) for key in ("about", "entries", "left_out")
            ):
                raise ValueError
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(self.path, "is no file of benchmarks.card", "name another folder with --out") from error

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return self.content["entries"]

    def begin(self, about: dict[str, Any]) -> None:
        known = self.content["about"]
        for key in SAME if known else ():
            if known.get(key) != about.get(key):
                reason = f"was measured with {key} {known.get(key)}, and here it is {about.get(key)}"
                raise InputError(self.path, reason, "name another folder with --out")
        self.content["about"] = about
        self.write()

    def is_done(self, name: str) -> bool:
        """What was right, by whatever version of the source, and what this machine has not. What was wrong is tried again, as what failed."""
        entry = self.entries.get(name, {})
        return "missing" in entry or ("result" in entry and entry["result"].get("ok") is not False)

    def result(self, name: str) -> dict[str, Any] | None:
        return self.entries.get(name, {}).get("result")

    def batches(self) -> list[int]:
        """The batch sizes that something was measured at, ascending."""
        found = (re.search(r"batch (\d+)", name) for name, entry in self.entries.items() if "result" in entry)
        return sorted({int(match[1]) for match in found if match})

    def peak(self) -> Peak | None:
        """The card's published rates, where what was measured can be held against them."""
        about = self.content["about"]
        return Peak(**about["peak"]) if about.get("peak") and not about["small"] else None

    def keep(self, name: str, entry: dict[str, Any]) -> None:
        self.entries[name] = finite(entry)
        self.content["left_out"].pop(name, None)
        self.write()

    def leave_out(self, name: str, reason: str) -> None:
        self.content["left_out"][name] = reason
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file with this content, or as it was."""
    made = path.with_name(f".{path.name}.partial")
    made.write_text(text, encoding="utf-8")
    os.replace(made, path)


def finite(value: Any) -> Any:
    """The same for JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
