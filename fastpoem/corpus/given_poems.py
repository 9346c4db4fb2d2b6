"""Poems given to `fastpoem.fit` as they are: a list of strings or a `datasets.Dataset` becomes a file, and the file the corpus.

Written once by the hash of what is in it, into the user's cache: so a run that is resumed, and RUN/config.json, name a text as any other
run does, and the token store made of it is found again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from fastpoem.corpus.formats import KEYS
from fastpoem.corpus.source import PACKED, TEXT, UNREAD
from fastpoem.errors import InputError, brief
from fastpoem.paths import given_path, user_cache

FOLDER = "given"  # in the cache
ROWS = 1000  # of a dataset at a time
MEND = "give a path, several, a list of poems or a datasets.Dataset"


def as_paths(name: str, value: Any, field: str | None, cache_dir: str | None = None) -> tuple[str, ...]:
    """The paths that the setting `name` means: those it lists, or the one of a file written now with the poems it holds, in `cache_dir`,
    None: the user's cache. Raises InputError."""
    if hasattr(value, "column_names") and hasattr(value, "__getitem__"):
        return (_written(name, _rows(name, value, field), cache_dir),)
    if len(getattr(value, "shape", ())) == 1 and hasattr(value, "tolist"):  # of NumPy, or a pandas Series
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise InputError(name, f"{brief(value, 40)} is of the wrong kind", MEND)
    if not value and isinstance(value, list):
        raise InputError(name, "is an empty list", MEND)
    if any(isinstance(one, PurePath) for one in value) or all(isinstance(one, str) for one in value):
        for index, one in enumerate(value):
            if not isinstance(one, str | PurePath):
                raise InputError(f"{name}[{index}]", f"{brief(one, 40)} is no path", "give paths, or poems, not both")
        if any(isinstance(one, PurePath) or _looks_like_a_path(one) for one in value) or all(map(_exists, value)):
            return tuple(map(str, value))
    return (_written(name, iter(value), cache_dir),)


def _exists(text: str) -> bool:
    try:
        return os.path.lexists(os.path.expanduser(text))
    except ValueError:  # a NUL
        return False


def _looks_like_a_path(text: str) -> bool:
    """Whether a string names a file by its ending, there or not: no poem ends so."""
    known = (*TEXT, *PACKED, *UNREAD, ".zip")
    return "\n" not in text and (text.lower().endswith(known) or bool(glob.has_magic(text) and glob.glob(text)))


def _rows(name: str, dataset: Any, field: str | None) -> Iterator[Any]:
    """The cells of a dataset's column of poems."""
    columns = dataset.column_names
    if isinstance(columns, dict):
        parts = ", ".join(map(str, columns))
        raise InputError(
            name,
            f"is several datasets ({parts[:60]})",
            f"give one of them, such as {name}[{next(iter(columns), '')!r}]",
        )
    if columns is None or not hasattr(dataset, "__len__"):
        raise InputError(name, "is a dataset without a length", "give it as a list of poems")
    wanted = field if field is not None else next((key for key in KEYS if key in columns), None)
    if wanted is None or wanted not in columns:
        reason = f"has the columns {', '.join(map(str, columns))[:80]}" + (
            ", none of a known name" if field is None else ""
        )
        raise InputError(
            name if field is None else f"field {brief(field, 40)}",
            reason,
            "name the one that holds the poems with field=",
        )
    for begin in range(0, len(dataset), ROWS):
        for cell in dataset[begin : begin + ROWS][wanted]:
            yield cell if field is None else {field: cell}  # read as any text is whose poems have a name


def called(path: PurePath, name: str) -> str:
    """What messages call the text at a path: `name`, but for one that was written here, whose name is a hash."""
    ours = path.parent.name == FOLDER and re.fullmatch(r"[0-9a-f]{16}\.jsonl", path.name)
    return "the given poems" if ours else name


def _written(name: str, poems: Iterator[Any], cache_dir: str | None) -> str:
    """The path of a .jsonl of these poems in `cache_dir`, or the user's cache."""
    folder = (user_cache() if cache_dir is None else given_path("cache_dir", cache_dir).absolute()) / FOLDER
    made = folder / f".{secrets.token_hex(6)}.partial"
    digest = hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(made, "wb") as file:
            for index, poem in enumerate(poems):
                row = _row(f"{name}[{index}]", poem)
                digest.update(row)
                file.write(row)
        path = folder / f"{digest.hexdigest()[:16]}.jsonl"
        os.replace(made, path)
    except OSError as error:
        raise InputError(
            folder, f"cannot be written ({error.strerror or error})", "name another folder with cache_dir=…"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)
    return str(path)


def _row(what: str, poem: Any) -> bytes:
    if not isinstance(poem, str | dict) and not (
        isinstance(poem, list) and all(isinstance(line, str) for line in poem)
    ):
        raise InputError(what, f"{brief(poem, 40)} is no poem", "give a string, or a list of its lines")
    try:
        return json.dumps(poem, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise InputError(what, "holds half a character (\\ud800 to \\udfff)", "mend it") from None
    except (TypeError, ValueError) as error:
        raise InputError(what, f"cannot be written as JSON ({str(error)[:60]})", "give its text") from None
