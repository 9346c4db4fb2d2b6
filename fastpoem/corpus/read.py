"""Poems out of files: one stripped line a poem, whatever the file's form, in memory that does not grow with the corpus.

The reference is `[line.strip() for line in open(path, encoding="utf-8") if line.strip()]`: a line ends at \\n, \\r\\n or
\\r and nowhere else (str.splitlines would also cut at U+0085 and U+2028). Everything is read in pieces and decoded as it
comes, so a damaged file is refused at the line where the damage is, before anything depends on it.
"""

import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastpoem.errors import InputError

PIECE_BYTES = 1 << 21
XZ_BYTES = 1 << 28  # to decompress with: xz -9 takes a quarter of it
LONGEST_CHARS = 1 << 24  # of one line or one JSON value: beyond it the file is not poems, and memory must stay bounded
TEXT_KEYS = ("paragraphs", "text", "content")
_SPACE = re.compile(r"[ \t\r\n]*")
_NEWLINES = re.compile(r"[\r\n]+")


@dataclass(frozen=True, slots=True)
class Block:
    """Some poems in a row: `lines` stripped and none empty, `blank` how many blank lines stood among them."""

    lines: list[str]
    blank: int


def read_blocks(source: Path, *, convert: str | None = None, piece_bytes: int = PIECE_BYTES) -> Iterator[Block]:
    """The poems of a text, JSON Lines or JSON file (plain, .gz or .xz), or of a folder of the chinese-poetry collection.

    `convert` names an OpenCC conversion such as "t2s" (traditional to simplified). `piece_bytes` is read at a time.
    Raises InputError, naming file and line, for what is missing, empty, binary, wrongly encoded or malformed.
    """
    source = Path(source)
    translate = _converter(convert) if convert else None
    found = False
    for block in _blocks(source, piece_bytes):
        found = found or bool(block.lines)
        yield _translated(block, translate) if translate and block.lines else block
    if not found:
        raise InputError(source, "holds no poem: it is empty or blank", "give a text with one poem a line")


def source_files(source: Path) -> list[Path]:
    """The files that `read_blocks` reads for `source`, in its order: the file itself, or a folder's *.json files."""
    source = Path(source)
    try:
        if source.is_dir():
            files = sorted(path for path in source.rglob("*.json") if path.is_file())
            if not files:
                raise InputError(source, "is a folder without *.json files", "name a text file or a poem collection")
            return files
        if not source.exists():
            raise InputError(source, "does not exist", "check the path")
        if not source.is_file():
            raise InputError(source, "is not a regular file", "name a text file, a JSON file or a folder of them")
    except OSError as error:
        raise InputError(source, f"cannot be read ({error.strerror})", "check its name and permissions") from None
    return [source]


def _blocks(source: Path, piece_bytes: int) -> Iterator[Block]:
    files = source_files(source)
    if source.is_dir():
        for path in files:
            yield from _json_blocks(path, piece_bytes, collection=True)
        return
    name = source.name.lower().removesuffix(".xz").removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from _jsonl_blocks(source, piece_bytes)
    elif name.endswith(".json"):
        yield from _json_blocks(source, piece_bytes, collection=False)
    else:
        for _, rows in _rows(source, piece_bytes):
            lines = [line for line in map(str.strip, rows) if line]
            yield Block(lines, len(rows) - len(lines))


def _rows(path: Path, piece_bytes: int) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines without their ends) in pieces of whole lines."""
    number, carry = 1, ""
    for piece in _pieces(path, piece_bytes):
        text = carry + piece
        cut = max(text.rfind("\n"), text.rfind("\r", 0, len(text) - 1)) + 1  # a last \r may be half of \r\n
        text, carry = text[:cut], text[cut:]
        if len(carry) > LONGEST_CHARS:
            raise InputError(
                f"{path}, line {number + _newlines(text)}",
                f"is longer than {LONGEST_CHARS:,} characters",
                "give one poem a line",
            )
        if text:
            rows = _split(text)
            rows.pop()  # the text ends a line, so the last is empty
            yield number, rows
            number += len(rows)
    if carry:
        rows = _split(carry)
        if not rows[-1]:
            rows.pop()
        yield number, rows


def _split(text: str) -> list[str]:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def _jsonl_blocks(path: Path, piece_bytes: int) -> Iterator[Block]:
    for first, rows in _rows(path, piece_bytes):
        lines, blank = [], 0
        for number, row in enumerate(rows, first):
            if not row.strip():
                blank += 1
                continue
            try:
                value = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise _malformed(path, number, error) from None
            if text := _poem(value, path, number):
                lines.append(text)
            else:
                blank += 1
        yield Block(lines, blank)


def _json_blocks(path: Path, piece_bytes: int, *, collection: bool) -> Iterator[Block]:
    """A JSON list in blocks. In a `collection`, what is no list or has no `paragraphs` (authors, prefaces) is passed by."""
    lines: list[str] = []
    blank = chars = 0
    for number, value in _json_items(path, piece_bytes, collection):
        if collection and not (isinstance(value, dict) and "paragraphs" in value):
            continue
        text = _poem(value, path, number)
        if not text:
            blank += 1
            continue
        lines.append(text)
        chars += len(text)
        if chars >= piece_bytes // 2:
            yield Block(lines, blank)
            lines, blank, chars = [], 0, 0
    yield Block(lines, blank)


def _json_items(path: Path, piece_bytes: int, collection: bool) -> Iterator[tuple[int, Any]]:
    """(line, value) of each item of the list that the file holds, decoding one value at a time."""
    pieces = _pieces(path, piece_bytes)
    scan = json.JSONDecoder().raw_decode
    text, at, number = "", 0, 1  # `text[at:]` is still to be parsed; `number` is the line of text[at]

    def more() -> bool:
        nonlocal text, at
        # As much again as there is: a value longer than many pieces is then scanned O(log) times, not O(pieces).
        fresh: list[str] = []
        while sum(map(len, fresh)) <= len(text) - at and (piece := next(pieces, None)) is not None:
            fresh.append(piece)
        if fresh:
            text, at = text[at:] + "".join(fresh), 0
        return bool(fresh)

    def peek() -> str:
        nonlocal at, number
        while True:
            end = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string
            number += text.count("\n", at, end)
            at = end
            if at < len(text):
                return text[at]
            if not more():
                return ""

    opening = peek()
    if opening != "[":
        if opening == "" or (collection and opening in '{"'):
            return
        raise InputError(f"{path}, line {number}", "is not a JSON list", "give a list of strings or of poem objects")
    at += 1
    if peek() == "]":
        at += 1
    else:
        while True:
            peek()
            while True:
                try:
                    value, end = scan(text, at)
                    if end < len(text) or not more():  # a number at the very end may go on in the next piece
                        break
                except (ValueError, RecursionError) as error:
                    if len(text) - at > LONGEST_CHARS or isinstance(error, RecursionError) or not more():
                        position = getattr(error, "pos", at)
                        raise _malformed(path, number + text.count("\n", at, position), error) from None
            yield number, value
            number += text.count("\n", at, end)
            at = end
            mark = peek()
            if mark not in (",", "]"):
                raise _malformed(path, number, ValueError("expected ',' or ']' after a value"))
            at += 1
            if mark == "]":
                break
    if peek():
        raise _malformed(path, number, ValueError("something follows the list"))


def _poem(value: object, path: Path, number: int) -> str:
    """The text of one JSON value, on one line; "" where it is blank."""
    if isinstance(value, dict):
        value = next((value[key] for key in TEXT_KEYS if key in value), None)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "".join(value)
    if not isinstance(value, str):
        keys = ", ".join(f'"{key}"' for key in TEXT_KEYS)
        raise InputError(
            f"{path}, line {number}",
            "is not a poem",
            f"give a string or an object with {keys} (text or a list of lines)",
        )
    try:
        value.encode()  # JSON can spell half a surrogate pair, which is no character
    except UnicodeEncodeError:
        raise InputError(f"{path}, line {number}", "spells half a character (\\ud800 to \\udfff)", "mend it") from None
    return _NEWLINES.sub(" ", value.strip())


def _malformed(path: Path, number: int, error: Exception) -> InputError:
    reason = getattr(error, "msg", None) or str(error) or type(error).__name__
    return InputError(f"{path}, line {number}", f"is malformed JSON ({reason})", "mend or remove it")


def _pieces(path: Path, piece_bytes: int) -> Iterator[str]:
    """The decoded text of a file as it comes, without a byte order mark; any size above 0 until the end."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 1  # line of the first byte not yet decoded
    try:
        with _open(path) as stream:
            while True:
                data = stream.read(piece_bytes)
                if number == 1 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise _foreign(path, 1, "UTF-16")
                if (at := data.find(b"\0")) >= 0:
                    raise _nul(path, number + _newlines(data[:at]), data)
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    line = number + _newlines(error.object[: error.start])
                    if not data:  # two bytes of a character that was cut would pass for GB18030
                        reason = "ends inside a character, so it was cut or is not UTF-8"
                        raise InputError(f"{path}, line {line}", reason, "get the whole file, or convert it") from None
                    raise _foreign(path, line, _guess_encoding(error.object, error.start)) from None
                if text:
                    yield text
                if not data:
                    return
                number += _newlines(data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        mend = "compress it with xz -9 or less" if "Memory" in reason else "check that the file is whole and readable"
        raise InputError(path, f"cannot be read ({reason})", mend) from None


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return _Xz(path)  # type: ignore[return-value]
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    return open(path, "rb")


class _Xz:
    """`lzma.open`, in bounded memory: a file may ask for a dictionary of 4 GiB."""

    def __init__(self, path: Path) -> None:
        self._file, self._left, self._stream = open(path, "rb"), b"", self._begin()  # noqa: SIM115

    def __enter__(self) -> "_Xz":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises LZMAError, EOFError."""
        while True:
            if self._stream.eof:  # another stream may follow, after zeros that align it
                self._left = self._stream.unused_data.lstrip(b"\0") or self._file.read(PIECE_BYTES).lstrip(b"\0")
                if not self._left:
                    return b""
                self._stream = self._begin()
            if self._stream.needs_input and not self._left:
                self._left = self._file.read(PIECE_BYTES)
                if not self._left:
                    raise EOFError("it ends in the middle")
            data, self._left = self._stream.decompress(self._left, size), b""
            if data:
                return data

    @staticmethod
    def _begin() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=XZ_BYTES)


def _newlines(data: bytes | str) -> int:
    if isinstance(data, str):
        data = data.encode("utf-8", "replace")
    return data.count(b"\n") + (data.count(b"\r") - data.count(b"\r\n") if b"\r" in data else 0)


def _guess_encoding(data: bytes, start: int) -> str | None:
    """GB18030 or Big5 if the bytes read well as either, by how many of the most common characters appear."""
    begin = max(data.rfind(b"\n", 0, start) + 1, start - 4096)
    sample = data[begin : begin + (1 << 16)]
    scores = {}
    for encoding, common in (("GB18030", "，。不人一山风无日云"), ("BIG5", "，。不人一山風無日雲")):
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeDecodeError:
            continue
        if sum("一" <= char <= "鿿" for char in text) * 2 >= len(text.strip()) > 0:
            scores[encoding] = sum(map(text.count, common))
    return max(scores, key=scores.__getitem__) if scores else None


def _foreign(path: Path, line: int, encoding: str | None) -> InputError:
    where = f"{path}, line {line}"
    if encoding is None:
        return InputError(where, "is not UTF-8", "convert the file to UTF-8 (iconv -f ITS-ENCODING -t UTF-8)")
    mend = f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > utf8.txt"
    return InputError(where, f"is not UTF-8 but looks like {encoding}", mend)


def _nul(path: Path, line: int, data: bytes) -> InputError:
    if _looks_wide(data[: 1 << 16]):
        return _foreign(path, line, "UTF-16")
    return InputError(
        f"{path}, line {line}", "holds a NUL byte, so it is binary, not text", "name a text file in UTF-8"
    )


def _looks_wide(sample: bytes) -> bool:
    """Whether bytes with NULs read as UTF-16 without its mark: nearly all characters usual, some of them ASCII."""
    for encoding in ("utf-16-le", "utf-16-be"):
        text = sample[: len(sample) & ~1].decode(encoding, "replace")
        usual = sum("一" <= char <= "鿿" or char in "\r\n\t，。" or " " <= char <= "~" for char in text)
        if text and usual >= 0.9 * len(text) and 50 * sum(map(str.isascii, text)) >= len(text):
            return True
    return False


def _converter(name: str) -> Callable[[str], str]:
    try:
        from opencc import OpenCC
    except ImportError:
        mend = "pip install 'fastpoem[convert]'"
        raise InputError(f"--convert {name}", "needs OpenCC, which is not installed", mend) from None
    if not re.fullmatch(r"[a-z0-9]+", name):
        raise InputError(f"--convert {name}", "is no OpenCC conversion", "use t2s (traditional to simplified) or s2t")
    try:
        return OpenCC(name).convert
    except Exception:  # the extension raises bare RuntimeError or FileNotFoundError, by version
        mend = "use t2s (traditional to simplified) or s2t"
        raise InputError(f"--convert {name}", "is no OpenCC conversion", mend) from None


def _translated(block: Block, translate: Callable[[str], str]) -> Block:
    lines = translate("\n".join(block.lines)).split("\n")
    if len(lines) != len(block.lines):
        raise RuntimeError("the conversion changed the number of lines")
    return Block(lines, block.blank)
