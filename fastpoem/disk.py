"""Folders that are whole or absent: written beside their place, flushed to disk, and put there in one step.

Checkpoints and models both go this way. Tensors are written as safetensors piece by piece, hashed on the way, from the memory they lie in:
the library's own writer copies every tensor and keeps the interpreter to itself until the disk is done, and training would wait.
Nothing here imports torch: preparing a text needs none.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 23  # bytes hashed and written at a time, while they are in the cache
DTYPES = {
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.uint8": "U8",
}
REPLACED = ".replaced"
_SWAP, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD


class NoLocks(OSError):
    """The file system gives none, as some network drives and shared folders do."""

    def __str__(self) -> str:
        return f"its file system has no file locks ({self.strerror}), which keep two processes from writing into one folder"


def lock(file: IO[Any], *, wait: bool = False) -> None:
    """Hold the lock on an open file until it is closed; it is the kernel's, so a process that dies holds none. Raises BlockingIOError
    where another has it and this one does not wait, NoLocks, or another OSError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
            raise NoLocks(error.errno, error.strerror) from None
        raise


def lock_shared(file: IO[Any]) -> None:
    """Hold a lock that others may hold too, to see whether a process has the one of `lock`. Raises BlockingIOError where one has, OSError."""
    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a new file and flush it to disk. Returns {"size": bytes, "sha256": hex}. Raises OSError."""
    return _write(path, [memoryview(content)])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a new safetensors file of tensors on the CPU and flush it to disk; returns as `write_bytes`. Raises OSError.

    Format: https://github.com/huggingface/safetensors#format
    """
    ordered = sorted(
        tensors.items(), key=lambda item: -item[1].element_size()
    )  # stable: wide types first keeps all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces, end = [], 0
    for name, tensor in ordered:
        flat = memoryview(tensor.detach().contiguous().view(-1).numpy()).cast("B")
        pieces.append(flat)
        header[name] = {
            "dtype": DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(flat)],
        }
        end += len(flat)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, [memoryview(len(text).to_bytes(8, "little")), memoryview(text), *pieces])


def _write(path: Path, pieces: Iterable[memoryview]) -> dict[str, Any]:
    size, digest = 0, hashlib.sha256()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for piece in pieces:
            for start in range(0, len(piece), PIECE):
                part = piece[start : start + PIECE]
                digest.update(part)
                size += len(part)
                while part:  # a disk that fills up takes less than it was given before it refuses
                    part = part[os.write(handle, part) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"size": size, "sha256": digest.hexdigest()}


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def put(made: Path, goal: Path) -> None:
    """Give the finished folder `made` the name `goal`, on the same disk. A folder that was there is gone afterwards. Raises OSError."""
    flush(made)
    make_folder(goal.parent)
    old = made
    if not goal.exists():
        os.rename(made, goal)
    elif not exchange(made, goal):  # an old kernel or a foreign file system: for a moment there is no `goal`
        old = aside(made, goal)
        discard(old)
        os.rename(goal, old)
        os.rename(made, goal)
    flush(goal.parent)
    flush(made.parent)
    discard(old)


def aside(made: Path, goal: Path) -> Path:
    """Where `put(made, goal)` keeps the folder that makes way: its name tells whose it was."""
    return made.with_name(f".{goal.name}{REPLACED}")


def recover(made: Path, goal: Path) -> None:
    """Undo what a process that died has left of `put(made, goal)` or of its preparation. Only for who holds the folder above."""
    old = aside(made, goal)
    if old.exists() and not goal.exists():
        make_folder(goal.parent)
        os.rename(old, goal)
        flush(goal.parent)
    discard(old)
    discard(made)


def discard(path: Path) -> None:
    """Remove a folder, or a file that has its name, as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each known to the disk. Raises OSError."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def flush(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2  # Linux, glibc 2.28
    except (AttributeError, OSError, TypeError):
        return False
    return swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _SWAP) == 0
