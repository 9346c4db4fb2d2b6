"""Bytes to text: compression undone, the encoding found, in pieces as they come.

UTF-8 is what is expected. A file in GB18030, Big5 or UTF-16, as most Chinese texts of some age are, is decoded too if all of it reads
cleanly as that, and the caller hears which it was: never silently, and never a file of which some bytes are only damaged.
"""

import bz2
import codecs
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fastpoem.corpus.source import TextFile
from fastpoem.errors import InputError

PIECE_BYTES = 1 << 21
XZ_BYTES = 1 << 28  # to decompress with: xz -9 takes a quarter of it
COMMON = (("GB18030", "，。不人一山风无日云"), ("BIG5", "，。不人一山風無日雲"))  # what tells the two apart
SURE = 0.02  # of the Chinese characters in a text are one of these at least; in one misread hardly any


def pieces(file: TextFile, piece_bytes: int, heard: Callable[[str], None]) -> Iterator[str]:
    """The decoded text of a file as it comes, without a byte order mark; any size above 0 until the end.

    `heard` is told the encoding where it is not UTF-8. Raises InputError, naming file and line.
    """
    decoder: codecs.IncrementalDecoder = codecs.getincrementaldecoder("utf-8-sig")()
    encoding = "UTF-8"
    first, number, ascii_only = (
        True,
        1,
        True,
    )  # line of the first byte not yet decoded; whether nothing but ASCII came before it
    try:
        with _open(file) as stream:
            while True:
                data = stream.read(piece_bytes)
                if first and (wide := _wide(data)):
                    encoding, decoder = wide, codecs.getincrementaldecoder(wide)()
                    heard("UTF-16")
                first, narrow = False, not encoding.startswith("UTF-16")
                if narrow and (at := data.find(b"\0")) >= 0:
                    raise _binary(file, number + _newlines(data[:at]))
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    line = number + _newlines(error.object[: error.start]) if narrow else number
                    if encoding != "UTF-8":
                        raise _unclean(file, line, encoding) from None
                    if not data:  # two bytes of a character that was cut would pass for GB18030
                        reason = "ends inside a character, so it was cut or is not UTF-8"
                        raise InputError(f"{file}, line {line}", reason, "get the whole file, or convert it") from None
                    guess, sure = _guess(error.object, error.start)
                    if not (sure and ascii_only and _plain(error.object[: error.start])):
                        raise _foreign(file, line, guess) from None
                    assert guess is not None
                    encoding, decoder = guess, codecs.getincrementaldecoder(guess)()
                    heard(encoding)
                    try:
                        text = decoder.decode(error.object, final=not data)
                    except UnicodeDecodeError as again:
                        raise _unclean(file, number + _newlines(again.object[: again.start]), encoding) from None
                if not narrow and "\0" in text:
                    raise _binary(file, number + _newlines(text[: text.index("\0")]))
                if text:
                    yield text
                if not data:
                    return
                number += _newlines(data) if narrow else _newlines(text)
                ascii_only = ascii_only and text.isascii()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        mend = "compress it with xz -9 or less" if "Memory" in reason else "check that the file is whole and readable"
        raise InputError(file, f"cannot be read ({reason})", mend) from None


def _open(file: TextFile) -> IO[bytes]:
    if file.member is not None:
        return zipfile.ZipFile(file.path).open(file.member)
    suffix = file.path.suffix.lower()
    if suffix == ".xz":
        return _Xz(file.path)  # type: ignore[return-value]
    if suffix == ".gz":
        return gzip.open(file.path)  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(file.path)
    return open(file.path, "rb")


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


def _plain(before: bytes) -> bool:
    """Whether what reads as UTF-8 before the first byte that does not can do so by chance: GB18030's pairs do now and then."""
    return sum(char >= "\u2e80" for char in before.decode("utf-8", "replace")) < 2


def _guess(data: bytes, start: int) -> tuple[str | None, bool]:
    """GB18030 or Big5 if the bytes read well as either, by how many of the most common characters appear; and whether that is sure."""
    begin = max(data.rfind(b"\n", 0, start) + 1, start - 4096)
    sample = data[begin : begin + (1 << 16)]
    scores = {}
    for encoding, common in COMMON:
        text = codecs.getincrementaldecoder(encoding)("replace").decode(sample)
        torn, chinese = text.count("\ufffd"), sum("一" <= char <= "鿿" for char in text)
        if chinese * 2 >= len(text.strip()) > 0 and 50 * torn <= len(text):
            score = sum(map(text.count, common)) / chinese
            if not torn or score >= SURE:
                scores[encoding] = score
    best = max(scores, key=scores.__getitem__) if scores else None
    return best, best is not None and scores[best] >= SURE


def _wide(data: bytes) -> str | None:
    """The UTF-16 codec that a file beginning so needs, None where it is none."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if b"\0" not in data[: 1 << 16]:
        return None
    for encoding in ("UTF-16-LE", "UTF-16-BE"):
        text = data[: min(len(data) & ~1, 1 << 16)].decode(encoding, "replace")
        usual = sum("一" <= char <= "鿿" or char in "\r\n\t，。" or " " <= char <= "~" for char in text)
        if text and usual >= 0.9 * len(text) and 50 * sum(map(str.isascii, text)) >= len(text):
            return encoding
    return None


def _foreign(file: TextFile, line: int, encoding: str | None) -> InputError:
    where = f"{file}, line {line}"
    if encoding is None:
        return InputError(where, "is not UTF-8", "convert the file to UTF-8 (iconv -f ITS-ENCODING -t UTF-8)")
    mend = f"convert it: iconv -f {encoding} -t UTF-8 {file.name} > utf8.txt"
    return InputError(where, f"is not UTF-8 but looks like {encoding}", mend)


def _unclean(file: TextFile, line: int, encoding: str) -> InputError:
    reason = f"the file is not UTF-8, and from here on not {encoding.removesuffix('-LE').removesuffix('-BE')} either"
    return InputError(f"{file}, line {line}", reason, "get the whole file, or convert it to UTF-8")


def _binary(file: TextFile, line: int) -> InputError:
    return InputError(
        f"{file}, line {line}", "holds a NUL byte, so it is binary, not text", "name a text file in UTF-8"
    )
