"""From decoded text to poems: one a line, one an item of JSON or JSON Lines, one a row of CSV or TSV.

Each form is read in pieces, so that memory does not grow with the file, and refused at the line where it is broken. An item may be a
string, a list of lines, or an object that has either under a known key; objects in such a list are looked into in turn, as the
chinese-poetry collection nests its chapters.
"""

import ast
import csv
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastpoem.corpus.account import Account
from fastpoem.corpus.source import Source, TextFile
from fastpoem.errors import InputError, brief

LONGEST_CHARS = 1 << 24  # of one line or one JSON value: beyond it the file is not poems, and memory must stay bounded
KEYS = (
    *("paragraphs", "text", "content", "para", "内容", "正文", "诗文", "诗句", "诗词", "歌词", "poem", "poems"),
    *("poetry", "lyrics", "body"),
)  # that hold poems, the first of them that is there; "poems" may be the list of all
DEEPEST = 16  # that values stand in one another
AROUND = 16  # characters before and behind a fault
_SPACE = re.compile(r"[ \t\r\n]*")
_SENTENCE = re.compile("[，。！？；,!?;]")


@dataclass(frozen=True, slots=True)
class Block:
    """Some poems in a row: `lines` stripped and none empty, `blank` how many blank lines stood among them."""

    lines: list[str]
    blank: int


class Place(NamedTuple):
    """Where a value stands: its line, from 1, and which item of the file it is."""

    file: TextFile
    line: int
    item: int


@dataclass(frozen=True)
class Taker:
    """How values become poems: by which settings, told to whom, and whether what is no poem is passed over."""

    source: Source
    account: Account
    lenient: bool

    def poems(self, value: Any, place: Place, depth: int = 0) -> Iterator[str]:
        """The texts in one value (`depth` others around it), each on one line, "" where it is blank. Raises InputError for what is no poem."""
        if isinstance(value, dict):
            key = self._key(value, depth > 0)
            if key is None:
                if self.lenient:
                    self.account.pass_by(place.file, value)
                    return
                raise _no_poem(place, value, self.source.field)
            value = value[key]
            if isinstance(value, dict) and depth < DEEPEST:  # {"data": {"content": …}}
                yield from self.poems(value, place, depth + 1)
                return
            if value is None:
                value = ""
        if isinstance(value, str):
            yield self.one_line(value, place)
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            yield self.one_line("\n".join(value), place)
        elif depth < DEEPEST and isinstance(value, list) and all(isinstance(part, str | list | dict) for part in value):
            for part in value:
                yield from self.poems(part, place, depth + 1)
        elif self.lenient:
            self.account.pass_by(place.file, value)
        else:
            raise _no_poem(place, value, self.source.field)

    def _key(self, value: dict[str, Any], inside: bool) -> str | None:
        """The key of the poem in an object, or of the only list of objects in it, which are then looked into."""
        wanted = self.source.field
        if wanted is not None and wanted in value:
            self.account.named = True
            return wanted
        if (wanted is None or inside) and (known := next((key for key in KEYS if key in value), None)) is not None:
            return known
        lists = [key for key, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)]
        return lists[0] if len(lists) == 1 else None

    def one_line(self, text: str, place: Place) -> str:
        """A poem as one line, its line breaks kept as the token or joined."""
        text = text.strip()
        if not text.isascii():
            try:
                text.encode()  # JSON can spell half a surrogate pair, which is no character
            except UnicodeEncodeError:
                reason = "spells half a character (\\ud800 to \\udfff)"
                raise InputError(f"{place.file}, line {place.line}", reason, "mend it") from None
        if "\n" not in text and "\r" not in text:
            return text
        lines = [line.strip() for line in _split(text)]
        if (token := self.source.line_break) is not None:
            self.account.broken += 1
            return re.sub(
                f"(?:{re.escape(token)}){{3,}}", 2 * token, token.join(lines)
            )  # stanzas are an empty line apart
        self.account.joined += 1
        joined = [lines[0]]
        for line in filter(None, lines[1:]):
            # Nothing beside Chinese, a space between words.
            joined += [" ", line] if joined[-1][-1] < "\u2e80" and line[0] < "\u2e80" else [line]
        return "".join(joined)


def blocks(file: TextFile, texts: Iterator[str], piece_bytes: int, taker: Taker) -> Iterator[Block]:
    """The poems of one file, of its decoded text in pieces."""
    if file.kind == ".json":
        yield from _gather(_json_values(file, texts), piece_bytes, taker)
    elif file.kind in (".jsonl", ".ndjson"):
        yield from _gather(_jsonl_values(file, texts), piece_bytes, taker)
    elif file.kind in (".csv", ".tsv"):
        yield from _gather(_csv_values(file, texts, taker), piece_bytes, taker)
    else:
        look, begun, apart = taker.account.look, False, False
        for _, rows in _rows(file, texts):
            lines = [line for line in map(str.strip, rows) if line]
            if len(rows) > len(lines):
                for row in rows:
                    if not row or row.isspace():
                        apart = begun
                    else:
                        look.gaps += apart
                        begun, apart = True, False
            elif lines:
                look.gaps += apart
                begun, apart = True, False
            yield Block(lines, len(rows) - len(lines))


def _gather(values: Iterator[tuple[Place, Any]], piece_bytes: int, taker: Taker) -> Iterator[Block]:
    """The poems of values in blocks of some size."""
    lines: list[str] = []
    blank = chars = 0
    for place, value in values:
        if value is None:
            blank += 1
            continue
        for text in taker.poems(value, place):
            if not text:
                blank += 1
                continue
            lines.append(text)
            chars += len(text)
        if chars >= piece_bytes // 2:
            yield Block(lines, blank)
            lines, blank, chars = [], 0, 0
    yield Block(lines, blank)


def _rows(file: TextFile, texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines without their ends) in pieces of whole lines. A line ends at \\n, \\r\\n or \\r and nowhere else."""
    number, carry = 1, ""
    for piece in texts:
        text = carry + piece
        cut = max(text.rfind("\n"), text.rfind("\r", 0, len(text) - 1)) + 1  # a last \r may be half of \r\n
        text, carry = text[:cut], text[cut:]
        rows = _split(text)
        if len(carry) > LONGEST_CHARS:
            where, reason = f"{file}, line {number + len(rows) - 1}", f"is longer than {LONGEST_CHARS:,} characters"
            raise InputError(where, reason, "give one poem a line")
        if text:
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


def _jsonl_values(file: TextFile, texts: Iterator[str]) -> Iterator[tuple[Place, Any]]:
    item = 0
    for first, rows in _rows(file, texts):
        for number, row in enumerate(rows, first):
            if not row.strip():
                yield Place(file, number, item), None
                continue
            item += 1
            try:
                value = json.loads(row)
            except (ValueError, RecursionError) as error:
                position = getattr(error, "pos", 0)
                raise _malformed(Place(file, number, item), error, row, position, position) from None
            yield Place(file, number, item), value


def _json_values(file: TextFile, texts: Iterator[str]) -> Iterator[tuple[Place, Any]]:
    """Each item of the list that the file holds, decoding one at a time; or the values that stand there one after another (one
    object alone, or JSON Lines by another name)."""
    scan = json.JSONDecoder().raw_decode
    text, at = "", 0  # `text[at:]` is still to be parsed
    number, before, item = 1, 0, 0  # the line of text[at], the characters before it on that line, and the item it is in

    def more() -> bool:
        nonlocal text, at
        # As much again as there is: a value longer than many pieces is then scanned O(log) times, not O(pieces).
        fresh: list[str] = []
        while sum(map(len, fresh)) <= len(text) - at and (piece := next(texts, None)) is not None:
            fresh.append(piece)
        if fresh:
            text, at = text[at:] + "".join(fresh), 0
        return bool(fresh)

    def go(end: int) -> None:
        nonlocal at, number, before
        if breaks := text.count("\n", at, end):
            number += breaks
            before = end - text.rindex("\n", at, end) - 1
        else:
            before += end - at
        at = end

    def peek() -> str:
        while True:
            go(_SPACE.match(text, at).end())  # type: ignore[union-attr]  # matches the empty string
            if at < len(text):
                return text[at]
            if not more():
                return ""

    def fault(error: Exception, position: int) -> InputError:
        go(position)
        return _malformed(Place(file, number, item), error, text, at, before)

    def take() -> Any:
        while True:
            try:
                value, end = scan(text, at)
                if end < len(text) or not more():  # a number at the very end may go on in the next piece
                    go(end)
                    return value
            except (ValueError, RecursionError) as error:
                if len(text) - at > LONGEST_CHARS or isinstance(error, RecursionError) or not more():
                    raise fault(error, getattr(error, "pos", at)) from None

    opening = peek()
    if opening == "[":
        go(at + 1)
        another = peek() != "]"
        while another:
            item += 1
            peek()
            place = Place(file, number, item)
            yield place, take()
            mark = peek()
            if mark not in (",", "]"):
                raise fault(ValueError("expected ',' or ']' after a value"), at)
            if another := mark == ",":
                go(at + 1)
        go(at + 1)
        if peek():
            raise fault(ValueError("something follows the list"), at)
        return
    while mark := peek():
        if mark not in '{"':
            if item:
                raise fault(ValueError("something follows that is no object"), at)
            reason = f"is not a JSON list: it begins with {brief(text[at : at + AROUND])}"
            mend = "give a list of strings or of poem objects, or name the file .txt if it has a poem a line"
            raise InputError(f"{file}, line {number}", reason, mend)
        item += 1
        place = Place(file, number, item)
        yield place, take()


def _csv_values(file: TextFile, texts: Iterator[str], taker: Taker) -> Iterator[tuple[Place, Any]]:
    """The cells of the column that holds the poems."""
    rows = (row + "\n" for _, some in _rows(file, texts) for row in some)
    skipped, first = 0, next(rows, "")
    while first and not first.strip():
        skipped, first = skipped + 1, next(rows, "")
    if not first:
        return
    mark = "\t" if file.kind == ".tsv" else max(",", "\t", ";", key=first.count)
    reader = csv.reader(itertools.chain([first], rows), delimiter=mark, strict=True)
    column: int | None = None
    width, item, line = 0, 0, 1 + skipped
    try:
        for cells in reader:
            line, began = reader.line_num + 1 + skipped, line
            if column is None:
                width, column = len(cells), _column(file, cells, taker)
                if column is not None:
                    continue
                column = 0
            item += 1
            place = Place(file, began, item)
            if not any(map(str.strip, cells)):
                yield place, None
                continue
            if len(cells) != width and (len(cells) <= column or any(map(str.strip, cells[width:]))):
                reason = f"has {len(cells)} columns, the first line has {width}"
                raise InputError(
                    f"{file}, line {began}", reason, f'put cells that hold "{mark}" in quotes'.replace("\t", "tab")
                )
            yield place, _listed(cells[column])
    except csv.Error as error:
        reason = f"is malformed CSV ({error})"
        raise InputError(f"{file}, line {line}", reason, "close its quotes, and write quotes inside as two") from None


def _column(file: TextFile, cells: list[str], taker: Taker) -> int | None:
    """Which column holds the poems; None where the first line is none of names but a poem. Raises InputError."""
    names = [cell.strip() for cell in cells]
    shown = ", ".join(name[:20] for name in names[:12])
    wanted = taker.source.field
    if wanted is not None:
        if wanted not in names:
            raise InputError(
                f"--field {wanted[:80]}", f"is no column of {file}, which has {shown}", "name one of those"
            )
        taker.account.named = True
        return names.index(wanted)
    small = [name.casefold() for name in names]
    for key in KEYS:
        if key in small:
            taker.account.columns.setdefault(names[small.index(key)], []).append(file.name)
            return small.index(key)
    if len(names) == 1:
        if _SENTENCE.search(names[0]) or len(names[0]) > 12:
            return None
        taker.account.columns.setdefault(names[0], []).append(file.name)
        return 0
    reason = f"has the columns {shown}, none of a known name" if shown.strip(", ") else "has columns without a name"
    raise InputError(file, reason, "name the one that holds the poems with --field, or put names into the first line")


def _listed(cell: str) -> str | list[str]:
    """A cell, or the list of lines that is written in it as JSON or Python spell one."""
    text = cell.strip()
    if text[:2] in ('["', "['") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                return value
    return cell


def _no_poem(place: Place, value: Any, wanted: str | None) -> InputError:
    where = f"{place.file}, line {place.line}"
    if isinstance(value, dict):
        keys = ", ".join(brief(key, 20) for key in list(value)[:12]) or "no keys"
        known = "--field " + wanted[:40] if wanted is not None else ", ".join(f'"{key}"' for key in KEYS[:3])
        reason = f"item {place.item:,} is not a poem: it has {keys}, not {known}"
        return InputError(where, reason, "name the key that holds the poem with --field")
    return InputError(
        where,
        f"item {place.item:,} is not a poem but {brief(value, 40)}",
        "give a string, a list of lines, or an object with either",
    )


def _malformed(place: Place, error: Exception, text: str, at: int, before: int) -> InputError:
    """`at` is the place of the fault in `text`, `before` how many characters stand before it on its line."""
    reason = getattr(error, "msg", None) or str(error) or type(error).__name__
    around = brief(text[max(0, at - AROUND) : at + AROUND], 2 * AROUND + 8)
    where = f"column {before + 1:,}, item {place.item:,}, near {around}"
    return InputError(f"{place.file}, line {place.line}", f"is malformed JSON ({reason}; {where})", "mend or remove it")
