"""Settings from a file: TOML, whose keys are the settings' names with dashes or underscores, or the config.json of a run.

A file says what flags say, and is read as strictly. What is given beside it as a flag wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpoem.config import OTHER_NAMES, PATHS, RECIPES, TrainConfig, coerce, found_from, saved_settings
from fastpoem.errors import InputError, brief
from fastpoem.paths import given_path


def with_file(name: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the file `name`, with what `flags` say over it: themselves, and what a recipe among them sets. Raises InputError."""
    path = given_path("--config", name)
    given = _of_a_run(path) if path.suffix == ".json" else _of_toml(path)
    if flags.get("val_data"):  # one of the two says what is validated on
        given.pop("val_poems", None)
    elif flags.get("val_poems"):
        given.pop("val_data", None)
    return {**given, **(RECIPES[flags["recipe"]] if "recipe" in flags else {}), **flags}


def _of_a_run(path: Path) -> dict[str, Any]:
    if (found := saved_settings(path.parent, path.name)) is None:
        raise InputError(path, "no such file", "name a .toml file, or the config.json of a run, with --config")
    return found


def _of_toml(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        mend = "name a .toml file, or the config.json of a run, with --config"
        raise InputError(path, "no such file", mend) from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check its name and its permissions") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are
        raise InputError(path, f"is no TOML ({error})", 'write lines like lr = 1e-4 and data = "poems.txt"') from None
    known = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    given: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *OTHER_NAMES], n=1, cutoff=0.6)
            reason = f"has {brief(key, 40)}, which is no setting" + (" but a table" if isinstance(value, dict) else "")
            mend = f"did you mean {OTHER_NAMES.get(near[0], near[0])}?" if near else "see --help for the settings"
            raise InputError(path, reason, mend)
        if name in given:
            raise InputError(path, f"has {name} twice", "keep one of the two")
        if value == "None" and "None" in known[name]:  # TOML has no null
            value = None
        elif isinstance(value, str) and known[name].startswith("float"):
            with contextlib.suppress(ValueError):
                value = float(value)
        try:
            given[name] = coerce(name, value, known[name])
        except InputError as error:
            raise InputError(f"{path}: {error.thing}", error.reason, error.mend) from None
    for name in PATHS:  # beside the file, where there is nothing of that name here
        if value := given.get(name):
            where = str(path.parent)
            several = isinstance(value, tuple)
            given[name] = tuple(found_from(one, where) for one in value) if several else found_from(value, where)
    return given
