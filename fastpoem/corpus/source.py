"""What a corpus is read from: files, folders and patterns as the user gave them, and how their text is to be taken.

A folder is every file in it that is text, in the order of their names, read as each would be alone. Hidden folders, token stores, runs
and models are never data, wherever they lie: what a command of ours has written must not become its input.
"""

import glob
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastpoem.corpus.manifest import is_store
from fastpoem.errors import InputError
from fastpoem.paths import given_path

TEXT = (".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv")
PACKED = (".gz", ".xz", ".bz2")
_TO_JSONL = "write its column of poems as .jsonl, .csv or .txt first"
UNREAD = {  # what people have poems in, and how they get them out
    ".tar": "unpack it with tar xf, and name the folder",
    ".tgz": "unpack it with tar xf, and name the folder",
    ".zst": "decompress it with zstd -d",
    ".7z": "unpack it, and name the folder",
    ".rar": "unpack it, and name the folder",
    ".parquet": _TO_JSONL,
    ".arrow": _TO_JSONL,
    ".xlsx": "save it as CSV in UTF-8",
    ".xls": "save it as CSV in UTF-8",
    ".docx": "save it as plain text in UTF-8",
    ".doc": "save it as plain text in UTF-8",
    ".pdf": "save it as plain text in UTF-8",
    ".epub": "save it as plain text in UTF-8",
}
NO_POEMS = ("readme", "license", "licence", "copying", "changelog", "requirements", "vocab")  # .txt by such a name
MODEL_FILES = ("vocab.txt", "tokenizer.json", "model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class TextFile:
    """A file of text, or one inside a .zip. As a string: what messages call it."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    @property
    def name(self) -> str:
        return self.path.name if self.member is None else Path(self.member).name

    @property
    def kind(self) -> str:
        """Its suffix in small letters, that of its compression left out."""
        return _suffix(_unpacked(self.name.lower()))


@dataclass(frozen=True)
class Source:
    """Where a corpus comes from and how it is taken: all that decides which poems a store holds, its tokenizer and sizes aside."""

    paths: tuple[Path, ...]
    field: str | None = None
    """The column or key that holds the poem. None: known names are tried."""
    line_break: str | None = None
    """The token that stands for a line break inside a poem. None: lines are joined."""
    convert: str | None = None
    """An OpenCC conversion such as "t2s"."""
    clean: bool = False
    whole: bool = False

    @classmethod
    def of(cls, source: "Source | Path | str") -> "Source":
        return source if isinstance(source, Source) else cls((Path(source),))

    @classmethod
    def given(cls, data: Iterable[str], flag: str = "--data", **how: object) -> "Source":
        """Of paths and patterns (`poems/*.txt`) as the user wrote them. Raises InputError for a pattern that matches nothing."""
        paths: list[Path] = []
        for text in data:
            path = given_path(flag, text)
            if os.path.lexists(path) or not glob.has_magic(text):
                paths.append(path)
            elif found := sorted(glob.glob(str(path), recursive=True)):
                paths += map(Path, found)
            else:
                raise InputError(f"{flag} {text[:80]}", "matches nothing", "check the pattern")
        return cls(tuple(dict.fromkeys(paths)), **how)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """What it is called, where a folder's own name is enough."""
        first = self.paths[0].name or self.paths[0].resolve().name
        return first if len(self.paths) == 1 else f"{first} and {len(self.paths) - 1} more"

    @property
    def shown(self) -> str:
        """What messages call it: the path, or the first and how many more."""
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} and {len(self.paths) - 1} more"

    def settings(self) -> dict[str, str | bool]:
        """Those that are not as they are by default, by name."""
        every = {name: getattr(self, name) for name in ("convert", "field", "line_break", "clean", "whole")}
        return {name: value for name, value in every.items() if value}


@dataclass
class Found:
    """The files of one path, in the order they are read, and what was passed over there: how many by name."""

    files: list[TextFile]
    passed: Counter[str] = field(default_factory=Counter)
    folder: bool = False  # whether the path holds several: what is no poem in one of them is passed over


def source_files(source: Source | Path) -> list[TextFile]:
    """All files that are read for `source`, in their order. Raises InputError for what cannot be read."""
    return [file for path in Source.of(source).paths for file in look_up(path).files]


def look_up(path: Path) -> Found:
    """What is read for one path. Raises InputError."""
    try:
        if path.is_dir():
            return _folder(path)
        if not path.exists():
            raise InputError(path, "does not exist", "check the path")
        if not path.is_file():
            raise InputError(path, "is not a regular file", "name a text file, a JSON file or a folder of them")
        name = _unpacked(path.name.lower())
        for suffix in (_suffix(path.name.lower()), _suffix(name)):
            if suffix in UNREAD:
                raise InputError(path, f"is {_a(suffix)} file, which is not read", UNREAD[suffix])
        return _zip(path) if name.endswith(".zip") else Found([TextFile(path)])
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check its name and permissions") from None


def _folder(root: Path) -> Found:
    if why := ours(root):
        raise InputError(root, f"is a {why}, not poems", "name the text that it was made from")
    found = Found([], folder=True)
    for path in sorted(_walk(root, found.passed)):
        name = path.name.lower()
        kind = _suffix(_unpacked(name))
        if kind == ".txt" and name.startswith(NO_POEMS):
            found.passed[path.name] += 1
        elif kind in TEXT and path.is_file():
            found.files.append(TextFile(path))
        elif name.endswith(".zip"):
            inside = _zip(path)
            found.files += inside.files
            found.passed.update(inside.passed)
        else:
            found.passed[_suffix(name) or path.name] += 1
    if not found.files:
        reason = f"holds no text, only {spelled_out(found.passed)}" if found.passed else "is an empty folder"
        raise InputError(root, reason, "name a text file, or a folder of .txt, .json, .jsonl or .csv files")
    return found


def _walk(root: Path, passed: Counter[str]) -> Iterator[Path]:
    for above, folders, names in os.walk(root, onerror=_refuse):
        here = Path(above)
        kept = []
        for name in folders:
            if name.startswith("."):
                passed["hidden folder"] += 1
            elif why := ours(here / name):
                passed[why] += 1
            elif (here / name).is_symlink():
                passed["link to a folder"] += 1
            else:
                kept.append(name)
        folders[:] = kept
        for name in names:
            if name.startswith("."):
                passed["hidden file"] += 1
            else:
                yield here / name


def _refuse(error: OSError) -> None:
    raise InputError(error.filename, f"cannot be read ({error.strerror})", "check its permissions") from None


def ours(folder: Path) -> str | None:
    """What a folder is that no poems are read from: a token store, a run or a model; None for any other."""
    if is_store(folder):
        return "token store"
    if (folder / "metrics.jsonl").is_file() and any(
        (folder / name).exists() for name in ("config.json", "checkpoints")
    ):
        return "run"
    if (folder / "config.json").is_file() and any((folder / name).is_file() for name in MODEL_FILES):
        return "model"
    return None


def _zip(path: Path) -> Found:
    """The text files inside a .zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputError(path, f"cannot be read ({error})", "check that the file is whole and readable") from None
    found = Found([], folder=True)
    for entry in entries:
        parts = Path(entry.filename).parts
        if entry.is_dir() or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        if entry.flag_bits & 1:
            raise InputError(f"{path}/{entry.filename}", "is encrypted", "unpack it, and name the folder")
        name = parts[-1].lower() if parts else ""
        if _suffix(name) in TEXT and not name.startswith(NO_POEMS):
            found.files.append(TextFile(path, entry.filename))
        else:
            found.passed[_suffix(name) or entry.filename] += 1
    if not found.files:
        reason = f"holds no text, only {spelled_out(found.passed)}" if found.passed else "is an empty archive"
        raise InputError(path, reason, "name an archive of .txt, .json, .jsonl or .csv files")
    found.folder = len(found.files) > 1
    return found


def spelled_out(passed: Counter[str]) -> str:
    """`12 .md, 3 .png, token store`, the most frequent first."""
    parts = [f"{count:,} {name}" for name, count in passed.most_common(8)]
    return ", ".join(parts) + (" …" if len(passed) > 8 else "")


def _unpacked(name: str) -> str:
    """A name without the suffix of its compression."""
    return next((name.removesuffix(suffix) for suffix in PACKED if name.endswith(suffix)), name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1]


def _a(suffix: str) -> str:
    return f"an {suffix}" if suffix[1] in "ax7" and suffix != ".7z" else f"a {suffix}"
