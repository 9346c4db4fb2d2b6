"""Paths as users give them: `~` resolved, and what no file can be called refused before anything depends on it."""

import contextlib
import errno
import os
from collections.abc import Iterator
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
        if flag in ("--data", "--val-data") and not path.suffix and any(mark in text for mark in "\n。，"):
            raise InputError(f"{flag} {text[:80]!r}", "is no path", "a text is given as a list: data=[…]") from None
    if reason is not None:
        raise InputError(f"{flag} {text[:80]!r}", reason, "give the path of a file or folder, or drop the flag")
    return path


@contextlib.contextmanager
def spelled(path: Path) -> Iterator[str]:
    """A name of a file or folder for libraries that take only UTF-8: its own, or where that is none, one by an open handle. Raises OSError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        handle = os.open(path, os.O_RDONLY)
        try:
            yield f"/dev/fd/{handle}"
        finally:
            os.close(handle)
    else:
        yield str(path)


_chosen: Path | None = None
_ours: dict[str, str] = {}  # what `keep_caches` put into the environment


def keep_caches(folder: str | None) -> None:
    """Have everything that is kept between runs kept in `folder` (--cache-dir) from here on in this process, None: where it is without that.
    What the user's environment says about the compilers' folders goes before."""
    global _chosen
    _chosen = None if folder is None else Path(folder).expanduser().absolute()
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        if name in _ours and os.environ.get(name) == _ours.pop(name):
            del os.environ[name]
        if _chosen is not None and name not in os.environ:
            _ours[name] = os.environ[name] = str(_chosen / part)


def user_cache() -> Path:
    """What `keep_caches` chose, else `$XDG_CACHE_HOME/fastpoem` or `~/.cache/fastpoem`. Raises InputError where there is no home folder."""
    if _chosen is not None:
        return _chosen
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise InputError("~/.cache", "this user has no home folder", "set HOME, or name a folder with --cache-dir")
    return Path(home) / "fastpoem"
