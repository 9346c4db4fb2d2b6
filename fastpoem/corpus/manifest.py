"""The manifest of a token store: what it says, and that nothing in it is believed before it is checked.

File names are derived from the bucket table, never read; every size follows from that table too, and `TokenStore.open`
compares it with the size on disk before a byte is mapped. A checksum over the manifest's own content makes any change
in it known.
"""

import bisect
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastpoem.errors import InputError

FORMAT = "fastpoem token store"
VERSION = 2  # 1 had no account of what does not look like poems
MANIFEST, ROW_MAP = "manifest.json", "rows.bucket"
MANIFEST_BYTES = 1 << 23
MAX_BUCKETS, MAX_LENGTH = 255, 65535
COUNTS = ("rows", "tokens", "blank", "truncated", "unknown", "duplicates")
MEND = "prepare the store again"


def is_store(path: Path) -> bool:
    """Whether `path` is meant to be a store: a folder with a manifest.json, whole or not."""
    try:
        return (Path(path) / MANIFEST).is_file()
    except OSError:  # a name too long, a folder that may not be searched: whoever opens it will say so
        return False


def bucket_files(index: int) -> tuple[str, str]:
    """Names of a bucket's files: tokens, lengths."""
    return f"bucket-{index:03}.tokens", f"bucket-{index:03}.lengths"


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex. Raises InputError."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check its permissions") from None


def sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as written: JSON with a checksum of everything else in it."""
    return json.dumps(manifest | {"checksum": _checksum(manifest)}, indent=1).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, every field of it checked. Raises InputError."""
    file = path / MANIFEST
    try:
        if not path.exists():
            raise InputError(path, "does not exist", "check the path")
        if not file.is_file():
            raise InputError(path, f"is no token store: it holds no {MANIFEST}", "make one with fastpoem.prepare")
        if file.stat().st_size > MANIFEST_BYTES:
            raise InputError(file, f"is larger than {MANIFEST_BYTES:,} bytes, so it is none of ours", MEND)
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(file, f"cannot be read ({error.strerror})", "check its permissions") from None
    except (ValueError, RecursionError):
        raise InputError(file, "is damaged: it is not JSON", MEND) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(file, "is not the manifest of a token store", "make one with fastpoem.prepare")
    version = manifest.get("version")
    if not _whole(version, 1, VERSION):
        raise InputError(
            file, f"has version {version!r:.20} and this fastpoem reads {VERSION}", "update fastpoem or " + MEND
        )
    if fault := _fault(manifest):
        raise InputError(file, f"is damaged: {fault}", MEND)
    return manifest


def _fault(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest of our version, or None. Types and ranges first: the rest relies on them."""
    text = lambda value: isinstance(value, str)
    tokenizer, counts, buckets, files = (manifest.get(key) for key in ("tokenizer", "counts", "buckets", "files"))
    if manifest.get("dtype") not in ("<u2", "<u4"):
        return "its dtype is neither <u2 nor <u4"
    if not isinstance(tokenizer, dict) or not text(tokenizer.get("fingerprint")):
        return "it names no tokenizer"
    if not _whole(tokenizer.get("vocab_size"), 1, 1 << 32):
        return "its vocabulary size is impossible"
    ids = [tokenizer.get(name) for name in ("pad", "cls", "sep")]
    if not all(_whole(index, 0, tokenizer["vocab_size"] - 1) for index in ids):
        return "a special id is outside the vocabulary"
    if not _whole(manifest.get("max_length"), 2, MAX_LENGTH):
        return "its max_length is impossible"
    if not isinstance(counts, dict) or not all(_whole(counts.get(name), 0, 1 << 62) for name in COUNTS):
        return "its counts are impossible"
    if not isinstance(buckets, list) or not 1 <= len(buckets) <= MAX_BUCKETS:
        return "it has no bucket table"
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in buckets):
        return "its bucket table is malformed"
    lengths = [pair[0] for pair in buckets]
    if not all(_whole(length, 1, manifest["max_length"]) and _whole(rows, 1, 1 << 48) for length, rows in buckets):
        return "its bucket table is impossible"
    if lengths != sorted(set(lengths)) or sum(rows for _, rows in buckets) != counts.get("rows"):
        return "its bucket table does not add up"
    if not isinstance(files, dict) or files.keys() != (sizes := expected_sizes(manifest)).keys():
        return "its list of files is not that of its buckets"
    for name, entry in files.items():
        if not isinstance(entry, dict) or entry.get("size") != sizes[name] or not text(entry.get("sha256")):
            return f"the record of {name} does not follow from the bucket table"
    if not isinstance(manifest.get("source"), dict) or not _pairs(manifest.get("unknown"), text):
        return "its account of the text is malformed"
    if any(not isinstance(manifest["source"].get(key), str | None) for key in ("convert", "field", "line_break")):
        return "its account of how the text was read is malformed"
    if manifest["version"] > 1 and not _look(manifest.get("look"), text):
        return "its account of what does not look like poems is malformed"
    if not _pairs(manifest.get("histogram"), _whole) or _tallies(manifest["histogram"], lengths) != [
        counts["tokens"],
        *(rows for _, rows in buckets),
    ]:
        return "its histogram does not agree with its buckets"
    return None if manifest.get("checksum") == _checksum(manifest) else "its checksum does not agree"


def _pairs(value: object, is_first: Callable[[object], bool]) -> bool:
    """Whether `value` is a list of [something, how many]."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and is_first(pair[0]) and _whole(pair[1], 1) for pair in value
    )


def _look(look: object, text: Callable[[object], bool]) -> bool:
    """Whether `look` is {"odd": [[kind, poems, example]], "special": [[token, times]], "notes": [line]}."""
    if not isinstance(look, dict) or not _pairs(look.get("special"), text):
        return False
    notes, odd = look.get("notes"), look.get("odd")
    if not isinstance(notes, list) or not isinstance(odd, list) or not all(map(text, notes)):
        return False
    return all(
        isinstance(one, list) and len(one) == 3 and text(one[0]) and _whole(one[1]) and text(one[2]) for one in odd
    )


def _tallies(histogram: list[list[int]], edges: list[int]) -> list[int] | None:
    """Tokens, and the rows of each bucket, by a histogram of [length, poems]; None where a length fits no bucket."""
    tallies = [0] * (1 + len(edges))
    for length, poems in histogram:
        index = bisect.bisect_left(edges, length)
        if not length >= 2 or index == len(edges):
            return None
        tallies[0] += length * poems
        tallies[1 + index] += poems
    return tallies


def expected_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of each file, from the bucket table alone."""
    width = np.dtype(manifest["dtype"]).itemsize
    sizes = {ROW_MAP: manifest["counts"]["rows"]}
    for index, (length, rows) in enumerate(manifest["buckets"]):
        tokens_name, lengths_name = bucket_files(index)
        sizes |= {tokens_name: rows * length * width, lengths_name: rows * 2}
    return sizes


def _whole(value: object, least: int = 1, most: int | None = None) -> bool:
    return type(value) is int and value >= least and (most is None or value <= most)


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def identity(manifest: dict[str, Any]) -> str:
    """A hash that names what a store holds, wherever it lies and whatever its text was called."""
    content = {key: manifest[key] for key in ("dtype", "tokenizer", "max_length", "buckets", "files")}
    return _checksum(content | {"version": 1})  # rows mean what they did then, and runs of that time go on
