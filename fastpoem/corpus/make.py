"""From a text to a token store, in two passes and in memory that does not grow with the corpus.

Pass 1 tokenizes block after block into a ragged spill on disk and counts lengths; then the buckets are chosen; pass 2
scatters the spill into one rectangle a bucket. Everything happens in a hidden folder beside the goal, is flushed to
disk, and takes the goal's name by one rename: under that name there is a whole store or none.
"""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastpoem.corpus.account import Account
from fastpoem.corpus.buckets import choose_buckets
from fastpoem.corpus.formats import Block
from fastpoem.corpus.manifest import (
    FORMAT,
    MANIFEST,
    MAX_BUCKETS,
    MAX_LENGTH,
    ROW_MAP,
    VERSION,
    bucket_files,
    expected_sizes,
    file_hash,
    is_store,
    sealed,
)
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.source import Source, source_files
from fastpoem.corpus.tokenize import EncodeStats, PoemTokenizer
from fastpoem.disk import NoLocks, discard, exchange, flush, lock, make_folder
from fastpoem.errors import InputError
from fastpoem.signals import ask

CHUNK_TOKENS = 1 << 20  # of the spill, at a time
KEPT_UNKNOWN = 50
TEMPORARY, OLD = ".fastpoem-making-", ".fastpoem-old-"
LOCK = "lock"
GRACE_SECONDS = 60


def make_store(
    source: Source,
    tokenizer: PoemTokenizer,
    out: Path,
    max_length: int,
    buckets: int,
    progress: Callable[[int], None] | None,
    flag: str = "--out",
) -> None:
    """Write the store of `source` at `out`, which `flag` named; `fastpoem.corpus.store.prepare_store` says what the rest means."""
    with _making(out, flag) as folder:
        before = _stamps(source)
        digest = source_digest(source)
        manifest = _make(source, tokenizer, folder, max_length, buckets, progress)
        if _stamps(source) != before:
            raise InputError(source.shown, "changed while it was read", "prepare again when nothing writes to it")
        manifest["source"] |= digest
        with open(folder / MANIFEST, "wb") as stream:
            stream.write(sealed(manifest))
            _flush(stream)
        flush(folder)
        _publish(folder, out.resolve())


def check_settings(max_length: int, buckets: int) -> None:
    """Refuse what cannot be (NaN, fractions and strings too). Raises InputError."""
    for flag, value, least, most in (
        ("--max-length", max_length, 2, MAX_LENGTH),
        ("--buckets", buckets, 1, MAX_BUCKETS),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InputError(f"{flag} {value}", f"is not a whole number from {least} to {most}", "choose one")


def check_goal(out: Path) -> None:
    """Refuse, before any work, a goal that is something else than a store or cannot be written. Raises InputError."""
    try:
        if os.path.lexists(out) and not _ours(out) and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(out, "exists and is not a token store", "choose another --out or remove it")
    except OSError as error:
        raise InputError(out, f"cannot be read ({error.strerror})", "choose another --out") from None
    parent = out.resolve().parent
    if not writable(parent):
        raise InputError(out, f"cannot be written: no permission to write in {parent}", "choose another --out")


def _ours(folder: Path) -> bool:
    """Whether `folder` is a store of ours, which may be replaced, and not somebody's folder with a manifest.json."""
    if not is_store(folder):
        return False
    with open(folder / MANIFEST, "rb") as stream:
        return FORMAT.encode() in stream.read(256)


def source_digest(source: Source | Path) -> dict[str, Any]:
    """{"name", "size", "sha256"} of the bytes of a text, or of all files of a corpus and their names."""
    source = Source.of(source)
    files = [(root, file.path) for root in source.paths for file in source_files(root)]
    size = sum({path: size for (_, path), (_, size, _) in zip(files, _stamps(source), strict=True)}.values())
    files = list(dict.fromkeys(files))  # an archive holds several
    if [(path, path) for path in source.paths] == files and len(files) == 1:
        return {"name": source.name, "size": size, "sha256": file_hash(files[0][1])}
    total = hashlib.sha256()
    for root, path in files:
        ask()
        name = path.relative_to(root) if root != path else path.name
        total.update(os.fsencode(f"{name}\0{file_hash(path)}\n"))
    return {"name": source.name, "size": size, "sha256": total.hexdigest()}


def _stamps(source: Source) -> list[tuple[int, int, int]]:
    """What changes when a file of the source does."""
    try:
        found = [os.stat(file.path) for file in source_files(source)]
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise InputError(source.shown, reason, "check its files and permissions") from None
    return [(one.st_ino, one.st_size, one.st_mtime_ns) for one in found]


def _looked_at(source: Source, tokenizer: PoemTokenizer, account: Account) -> Iterator[Block]:
    """The blocks of `source`, without a frame that the tokenizer will set itself, and taken account of."""
    special = [token for token in tokenizer.special if token != source.line_break]
    for block in read_blocks(source, account):
        lines = account.look.at(block.lines, tokenizer.frame, special)
        yield Block(lines, block.blank + len(block.lines) - len(lines))


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks, the next one being read (and decompressed) by another thread while one is tokenized."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


def _make(
    source: Source,
    tokenizer: PoemTokenizer,
    folder: Path,
    max_length: int,
    count: int,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Write all of a store but its manifest into `folder`, and return the manifest."""
    histogram: np.ndarray = np.zeros(max_length + 1, np.int64)
    stats, rows, blank, account = EncodeStats(), 0, 0, Account()
    names = [folder / f"spill.{part}" for part in ("tokens", "lengths", "hashes")]
    with open(names[0], "wb") as tokens, open(names[1], "wb") as lengths, open(names[2], "wb") as hashes:
        for block in _ahead(_looked_at(source, tokenizer, account)):
            ask()
            blank += block.blank
            if not block.lines:
                continue
            ids, sizes, found = tokenizer.encode(block.lines, max_length, whole=source.whole)
            tokens.write(ids.astype(tokenizer.dtype.newbyteorder("<"), copy=False).data)
            lengths.write(sizes.astype("<u2").data)
            # Siphash with this process's random key: as good as any 64 bits, and it costs nothing.
            hashes.write(np.fromiter(map(hash, block.lines), np.int64, len(block.lines)).data)
            histogram += np.bincount(sizes, minlength=max_length + 1)
            stats.add(found)
            rows += len(block.lines)
            if progress:
                progress(rows)
    if not rows:
        raise InputError(
            source.shown, "holds no poem, only the tokenizer's own frame", "give a text with one poem a line"
        )
    edges = choose_buckets(histogram, count)
    files = _scatter(names[0], names[1], folder, edges, tokenizer)
    duplicates = _duplicates(names[2], rows)
    for name in names:
        name.unlink()
    bucket_of = np.searchsorted(edges, np.arange(max_length + 1))
    table = [[edge, int(histogram[bucket_of == index].sum())] for index, edge in enumerate(edges)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": tokenizer.dtype.newbyteorder("<").str,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "pad": tokenizer.pad_id,
            "cls": tokenizer.cls_id,
            "sep": tokenizer.sep_id,
            "unk": tokenizer.unk_id,
        },
        "max_length": max_length,
        "source": {"convert": source.convert, **source.settings()},
        "counts": {
            "rows": rows,
            "tokens": int(histogram @ np.arange(max_length + 1)),
            "blank": blank,
            "truncated": stats.truncated,
            "unknown": stats.unknown_tokens,
            "duplicates": duplicates,
        },
        "histogram": [[int(length), int(histogram[length])] for length in np.flatnonzero(histogram)],
        "unknown": [[text, number] for text, number in stats.unknown.most_common(KEPT_UNKNOWN)],
        "look": {
            "odd": account.look.report(),
            "special": [[token, number] for token, number in account.look.special.most_common()],
            "notes": account.notes(source),
        },
        "buckets": table,
    }
    expected = expected_sizes(manifest)
    return manifest | {"files": {name: {"size": expected[name], "sha256": files[name]} for name in expected}}


def _scatter(
    tokens_path: Path, lengths_path: Path, folder: Path, edges: tuple[int, ...], tokenizer: PoemTokenizer
) -> dict[str, str]:
    """Deal the ragged rows of the spill out to the buckets' files; return each file's sha256."""
    little = tokenizer.dtype.newbyteorder("<")
    hashes: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        row_map = stack.enter_context(_Hashed(folder / ROW_MAP))
        files = [
            tuple(stack.enter_context(_Hashed(folder / name)) for name in bucket_files(index))
            for index in range(len(edges))
        ]
        tokens, lengths_file = (
            stack.enter_context(open(tokens_path, "rb")),
            stack.enter_context(open(lengths_path, "rb")),
        )
        for lengths in _row_chunks(lengths_file):
            ask()
            ragged = np.fromfile(tokens, little, int(lengths.sum(dtype=np.int64)))  # rows one after another
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            which: np.ndarray = np.searchsorted(edges, lengths).astype(np.uint8)  # (rows,)
            row_map.write(which)
            for index in np.unique(which).tolist():
                mine = np.flatnonzero(which == index)
                columns = np.arange(edges[index])
                step = max(1, CHUNK_TOKENS // edges[index])
                for begin in range(0, len(mine), step):
                    part = mine[begin : begin + step]
                    rectangle = ragged.take(starts[part, None] + columns, mode="clip")  # (rows, length)
                    rectangle[columns >= lengths[part, None]] = tokenizer.pad_id
                    files[index][0].write(rectangle)
                files[index][1].write(lengths[mine])
        for file in (row_map, *(file for pair in files for file in pair)):
            hashes[file.name] = file.close()
    return hashes


def _row_chunks(lengths_file: IO[bytes]) -> Iterator[np.ndarray]:
    """Lengths of the spilled rows, in chunks of about CHUNK_TOKENS tokens."""
    while len(lengths := np.fromfile(lengths_file, "<u2", CHUNK_TOKENS // 16)):
        cuts = np.searchsorted(
            np.cumsum(lengths, dtype=np.int64),
            np.arange(1, lengths.sum(dtype=np.int64) // CHUNK_TOKENS + 1) * CHUNK_TOKENS,
        )
        yield from (part for part in np.split(lengths, np.unique(cuts)) if len(part))


class _Hashed:
    """A file being written whose sha256 is known when it is closed."""

    def __init__(self, path: Path) -> None:
        self.name, self._digest, self._file = path.name, hashlib.sha256(), open(path, "wb")  # noqa: SIM115

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(values)).cast("B")
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> str:
        _flush(self._file)
        self._file.close()
        return self._digest.hexdigest()


def _duplicates(path: Path, rows: int) -> int:
    """How many rows repeat an earlier one, from 64-bit hashes of their texts, sorted on disk."""
    hashes: np.ndarray = np.memmap(path, np.int64, "r+", shape=(rows,))
    hashes.sort()
    step = 1 << 20
    return sum(
        int((hashes[begin + 1 : begin + step + 1] == hashes[begin : begin + step][: rows - begin - 1]).sum())
        for begin in range(0, rows - 1, step)
    )


@contextlib.contextmanager
def _making(out: Path, flag: str) -> Iterator[Path]:
    """A fresh hidden folder beside `out` that is gone afterwards, and the dead runs' like it now."""
    parent = out.resolve().parent
    try:
        make_folder(parent)
        _sweep(parent)
        folder = parent / f"{TEMPORARY}{out.name}-{secrets.token_hex(6)}"
        folder.mkdir()
        try:
            with open(folder / f"{LOCK}.new", "wb") as file:
                lock(file, wait=True)
                (folder / f"{LOCK}.new").rename(folder / LOCK)  # nobody sees it before it is locked
                yield folder
        finally:
            discard(folder)
    except NoLocks as error:
        mend = "have it on a local disk: --out of prepare, --cache-dir of training"
        raise InputError(out, str(error), mend) from None
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise InputError(out, reason, f"free some space, mend the permissions or choose another {flag}") from None


def _sweep(parent: Path) -> None:
    """Put back or remove the folders that runs which are no more have left in `parent`."""
    for old in parent.glob(f"{OLD}*"):
        with contextlib.suppress(OSError):  # onto a store that is not empty no folder can be renamed
            old.rename(parent / old.name.removeprefix(OLD).split("-", 1)[-1])
        discard(old)
    for folder in parent.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            try:
                with open(folder / LOCK, "rb") as file:
                    lock(file)
            except FileNotFoundError:  # just begun, or half removed: only its age tells
                if time.time() - folder.stat().st_mtime < GRACE_SECONDS:
                    continue
            shutil.rmtree(folder)


def _publish(folder: Path, goal: Path) -> None:
    """Give the finished `folder` the name `goal`, what is there making way. The lock goes along and is dropped last."""
    while not exchange(folder, goal):  # nothing is there, or the file system cannot: for a moment there is no `goal`
        old = goal.parent / f"{OLD}{secrets.token_hex(6)}-{goal.name}"
        with contextlib.suppress(FileNotFoundError):
            goal.rename(old)
        try:
            folder.rename(goal)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                with contextlib.suppress(OSError):
                    old.rename(goal)
                raise
            discard(old)  # another run has just put its own there
        else:
            discard(old)
            break
    flush(goal.parent)
    (goal / LOCK).unlink(missing_ok=True)


def _flush(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def writable(folder: Path) -> bool:
    """Whether `folder`, or the nearest folder above it that exists, can be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
