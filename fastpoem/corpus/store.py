"""The token store: a corpus as ids on disk, in one rectangle a bucket, that is whole and unaltered or refused.

A folder of
    manifest.json            what the store is: written last, with a checksum of itself and size and hash of every file
    rows.bucket              uint8 (rows,): the bucket of each row, in the order of the text
    bucket-007.tokens        uint16 or uint32 little-endian (rows of bucket 7, its length), right-padded
    bucket-007.lengths       uint16 little-endian (rows of bucket 7,): real lengths, [CLS] and [SEP] counted
Rows keep the order of the text inside a bucket, so a row's place there is the number of earlier rows in the same bucket:
one byte a row and a checkpoint every RANK_STRIDE rows find any row in constant time. `open` checks the manifest and all
sizes in milliseconds, `verify` reads and hashes every file.
"""

import contextlib
import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastpoem.corpus.buckets import padded_positions
from fastpoem.corpus.look import SAYS, in_words
from fastpoem.corpus.make import check_goal, check_settings, make_store, source_digest, writable
from fastpoem.corpus.manifest import MEND, ROW_MAP, VERSION, bucket_files, file_hash, identity, is_store, read_manifest
from fastpoem.corpus.source import Source
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.paths import user_cache

__all__ = ["Bucket", "TokenStore", "cached_store", "is_store", "odd_in_short", "prepare_store", "summarise"]

RANK_STRIDE = 256
SLICE_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Bucket:
    """The poems padded to one length. `tokens` (rows, length) and `lengths` (rows,) are read-only memory maps."""

    length: int
    rows: int
    tokens: np.ndarray
    lengths: np.ndarray


class TokenStore:
    """An open store. `manifest` is its checked description, `fingerprint` the tokenizer's, `identity` names its content."""

    def __init__(self, path: Path, manifest: dict[str, Any], buckets: tuple[Bucket, ...], row_map: np.ndarray) -> None:
        self.path, self.manifest, self.buckets = path, manifest, buckets
        self._row_map = row_map  # (rows,) uint8
        self.rows: int = manifest["counts"]["rows"]
        self.max_length: int = manifest["max_length"]
        self.fingerprint: str = manifest["tokenizer"]["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.pad_id: int = manifest["tokenizer"]["pad"]
        self.dtype = np.dtype(manifest["dtype"])
        self.identity = identity(manifest)

    @classmethod
    def open(cls, path: Path) -> "TokenStore":
        """Check version, manifest and sizes, map the files. Raises InputError that names the file."""
        path = Path(path)
        manifest = read_manifest(path)
        dtype = np.dtype(manifest["dtype"])
        for name, entry in manifest["files"].items():
            _check_size(path / name, entry["size"])
        buckets = []
        for index, (length, rows) in enumerate(manifest["buckets"]):
            tokens_name, lengths_name = bucket_files(index)
            tokens = _map(path / tokens_name, dtype, (rows, length))
            buckets.append(Bucket(length, rows, tokens, _map(path / lengths_name, np.dtype("<u2"), (rows,))))
        row_map = _map(path / ROW_MAP, np.dtype(np.uint8), (manifest["counts"]["rows"],))
        return cls(path, manifest, tuple(buckets), row_map)

    def __len__(self) -> int:
        return self.rows

    def tokens(self, row: int) -> np.ndarray:
        """Ids of one row, in the order of the text, without padding. Raises IndexError."""
        if not -self.rows <= row < self.rows:
            raise IndexError(f"row {row} of a store of {self.rows}")
        (which,), (place,) = self.locate(np.array([row % self.rows]))
        bucket = self.buckets[which]
        return np.array(bucket.tokens[place, : bucket.lengths[place]])

    __getitem__ = tokens

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, place in it) of each of `rows` (n,) counted in the order of the text, as two int64 arrays (n,)."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"a row outside 0..{self.rows - 1}")
        which: np.ndarray = np.empty(len(rows), np.int64)
        place: np.ndarray = np.empty(len(rows), np.int64)
        for begin in range(0, len(rows), 4096):  # bounded memory: RANK_STRIDE bytes a row while counting
            part = slice(begin, begin + 4096)
            which[part], place[part] = self._locate(rows[part])
        return which, place

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which = self._row_map[rows].astype(np.int64)
        stride, inside = np.divmod(rows, RANK_STRIDE)
        window = stride[:, None] * RANK_STRIDE + np.arange(RANK_STRIDE)  # (n, RANK_STRIDE)
        same = self._row_map[np.minimum(window, self.rows - 1)] == which[:, None]
        before = (same & (np.arange(RANK_STRIDE) < inside[:, None])).sum(axis=1)
        return which, self._ranks[stride, which] + before

    def rows_at(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """The rows of the text, int64, that stand at the ascending `places` (n,) of a bucket: what `locate` began with."""
        found, before = [np.empty(0, np.int64)], 0
        for begin in range(0, self.rows if len(places) else 0, SLICE_BYTES):
            here = np.flatnonzero(self._row_map[begin : begin + SLICE_BYTES] == bucket)
            first, end = np.searchsorted(places, [before, before + len(here)])
            found.append(begin + here[places[first:end] - before])
            before += len(here)
        return np.concatenate(found)

    @cached_property
    def _ranks(self) -> np.ndarray:
        """(strides, buckets) int64: how many rows of each bucket stand before each stride."""
        strides = -(-self.rows // RANK_STRIDE)
        counts: np.ndarray = np.zeros((strides + 1, len(self.buckets)), np.int64)
        for index in range(strides):
            part = self._row_map[index * RANK_STRIDE : (index + 1) * RANK_STRIDE]
            found = np.bincount(part, minlength=len(self.buckets))
            if len(found) > len(self.buckets):
                raise InputError(self.path / ROW_MAP, "names a bucket that is not there", MEND)
            counts[index + 1] = found
        ranks = np.cumsum(counts, axis=0)
        if ranks[-1].tolist() != [bucket.rows for bucket in self.buckets]:
            raise InputError(self.path / ROW_MAP, "does not agree with the bucket table", MEND)
        return ranks[:-1]

    def verify(self) -> None:
        """Read every file: hashes as recorded, lengths within their bucket, ids within the vocabulary. Raises InputError."""
        for name, entry in self.manifest["files"].items():
            if file_hash(self.path / name) != entry["sha256"]:
                raise InputError(self.path / name, "is damaged: its hash is not the recorded one", MEND)
        for index, bucket in enumerate(self.buckets):
            tokens_name, lengths_name = bucket_files(index)
            if bucket.lengths.min() < 2 or bucket.lengths.max() > bucket.length:
                raise InputError(self.path / lengths_name, f"holds a length outside 2..{bucket.length}", MEND)
            step = max(1, SLICE_BYTES // (bucket.length * self.dtype.itemsize))
            for begin in range(0, bucket.rows, step):
                if int(bucket.tokens[begin : begin + step].max()) >= self.vocab_size:
                    raise InputError(self.path / tokens_name, "holds an id outside the vocabulary", MEND)
        _ = self._ranks  # checks the row map


def prepare_store(
    source: Source | Path,
    tokenizer: PoemTokenizer,
    out: Path,
    *,
    max_length: int = 512,
    buckets: int = 32,
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """Tokenize `source` into a store at `out`, replacing a store that is there. Raises InputError.

    `max_length` counts [CLS] and [SEP]; longer poems are cut as the library cuts them, or with `source.whole` after
    their last whole sentence. `progress(poems so far)` is called now and then. Safe to kill at any moment.
    """
    check_settings(max_length, buckets)
    check_goal(Path(out))
    make_store(Source.of(source), tokenizer, Path(out), max_length, buckets, progress)
    return TokenStore.open(out)


def cached_store(
    source: Source | Path,
    tokenizer: PoemTokenizer,
    *,
    cache_dir: Path | None = None,
    make_in: Path | None = None,
    max_length: int = 512,
    buckets: int = 32,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TokenStore:
    """The store of `source` under these settings from the cache, prepared now where the cache has none or a damaged one.

    The cache is `cache_dir`, else `.fastpoem` beside the text, else (where that cannot be written)
    `$XDG_CACHE_HOME/fastpoem` or `~/.cache/fastpoem`. `make_in`: a folder for what is prepared now, instead of the cache. `say` hears in a line what was reused, prepared or found damaged.
    """
    source = Source.of(source)
    check_settings(max_length, buckets)
    digest = source_digest(source)["sha256"]
    how = sorted(source.settings().items())
    key = repr((VERSION, digest, tokenizer.fingerprint, max_length, buckets, how)).encode()
    name = f"{source.name.split('.')[0][:40] or 'text'}-{hashlib.sha256(key).hexdigest()[:16]}"
    folders = [Path(cache_dir)] if cache_dir is not None else _cache_folders(source.paths[0])
    for folder in folders:
        if is_store(folder / name):
            try:
                store = TokenStore.open(folder / name)
                # It may have been made of a text that changed after its digest was taken.
                if store.manifest["source"].get("sha256") != digest:
                    raise InputError(folder / name, "holds another text", MEND)
                store.verify()
            except InputError as error:
                say(f"the prepared store is damaged and made again ({error.thing} {error.reason})")
            else:
                say(f"prepared before: {folder / name}")
                return store
    folders = folders if make_in is None else [make_in]
    goal = next((folder for folder in folders if writable(folder)), None)
    if goal is None:
        raise InputError(folders[-1], "cannot be written", "name a writable folder with --cache-dir")
    # A name of the cache's own: whatever is there makes way.
    make_store(source, tokenizer, goal / name, max_length, buckets, progress, "--cache-dir")
    return TokenStore.open(goal / name)


def summarise(store: TokenStore) -> list[str]:
    """What a person wants to know of a store, a line each."""
    manifest, counts = store.manifest, store.manifest["counts"]
    histogram: np.ndarray = np.zeros(store.max_length + 1, np.int64)
    for length, poems in manifest["histogram"]:
        histogram[length] = poems
    tokens = counts["tokens"]
    positions = padded_positions(histogram, [bucket.length for bucket in store.buckets])
    ranked = np.argsort(-histogram, kind="stable")[:8]
    common = ", ".join(f"{length} ({histogram[length] / store.rows:.1%})" for length in ranked if histogram[length])
    cumulated = np.cumsum(histogram)
    marks = [int(np.searchsorted(cumulated, share * store.rows)) for share in (0.5, 0.9, 0.99)]
    lines = [
        f"poems      {store.rows:,} ({counts['duplicates']:,} duplicates, {counts['blank']:,} blank lines skipped,"
        f" {counts['truncated']:,} cut to {store.max_length} tokens)",
        f"tokens     {tokens:,} ({tokens / store.rows:.1f} a poem, [CLS] and [SEP] counted)",
        f"lengths    {int(np.flatnonzero(histogram)[0])} to {store.buckets[-1].length}; half are up to {marks[0]},"
        f" 90% up to {marks[1]}, 99% up to {marks[2]}; most frequent: {common}",
        f"buckets    {len(store.buckets)}, {(positions - tokens) / positions:.1%} of their positions are padding",
    ]
    most = max(bucket.rows for bucket in store.buckets)
    for bucket in store.buckets:
        bar = "█" * max(1, round(30 * bucket.rows / most))
        lines.append(f"  up to {bucket.length:>5} {bucket.rows:>11,} poems {bucket.rows / store.rows:>6.1%} {bar}")
    unknown = f"[UNK]      {counts['unknown']:,} ({counts['unknown'] / tokens:.2%} of tokens)"
    if manifest["unknown"]:
        unknown += "; most frequent: " + ", ".join(f"{text} {count:,}" for text, count in manifest["unknown"][:12])
    return [*lines, unknown, *_account(store)]


def _account(store: TokenStore) -> list[str]:
    """How the text was taken and what of it does not look like poems, a line each."""
    look = store.manifest.get("look") or {"odd": [], "special": [], "notes": []}
    odd = [in_words(kind, poems, store.rows, example) for kind, poems, example in look["odd"]]
    if look["special"]:
        odd.append(
            "special tokens in the text: " + ", ".join(f"{token} {number:,}" for token, number in look["special"])
        )
    lines = [f"{'look' if index == 0 else '':<10} {line}" for index, line in enumerate(odd)]
    return lines + [f"{'text' if index == 0 else '':<10} {line}" for index, line in enumerate(look["notes"])]


def odd_in_short(store: TokenStore) -> str | None:
    """One line on what of a store does not look like poems, of what is in one poem of two hundred or more; None for nothing."""
    look = store.manifest.get("look") or {"odd": [], "special": []}
    odd = [f"{poems:,} {SAYS.get(kind, kind)}" for kind, poems, _ in look["odd"] if 200 * poems >= store.rows]
    odd += [f"{token} stands in the text {number:,} times" for token, number in look["special"]]
    return f"of {store.rows:,} poems " + "; ".join(odd) if odd else None


def _cache_folders(source: Path) -> list[Path]:
    folders = [source.resolve().parent / ".fastpoem"]
    with contextlib.suppress(InputError):  # no home
        folders.append(user_cache())
    return folders


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise InputError(path, "is missing", MEND) from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check its permissions") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(path, "is not a regular file", MEND)
    if found.st_size != size:
        raise InputError(path, f"is truncated or foreign: {found.st_size:,} bytes where {size:,} belong", MEND)


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.memmap(path, dtype, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise InputError(path, f"cannot be mapped ({error})", "check its permissions") from None
