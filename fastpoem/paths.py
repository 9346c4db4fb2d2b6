"""Paths as users give them: `~` resolved, and what no file can be called refused before anything depends on it."""

import errno
import os
from pathlib import Path

from fastpoem.errors import InputError


def given_path(flag: str, text: str) -> Path:
    """The path that `text`, given as `flag`, names, whether or not it exists. Raises InputError."""
    reason = "is empty" if not text else "holds a NUL" if "\0" in text else None
    try:
        path = Path(text).expanduser()
        if reason is None:
            os.lstat(path)
    except RuntimeError:
        reason = "names a home folder that is not known"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = f"cannot be a path ({error.strerror})"
    if reason is not None:
        raise InputError(f"{flag} {text[:80]!r}", reason, "give the path of a file or folder, or drop the flag")
    return path


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/fastpoem` or `~/.cache/fastpoem`. Raises InputError where there is no home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise InputError("~/.cache", "this user has no home folder", "set HOME, or name a folder with --cache-dir")
    return Path(home) / "fastpoem"
