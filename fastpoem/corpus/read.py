"""Poems out of files: one stripped line a poem, whatever the file's form, in memory that does not grow with the corpus.

The reference is `[line.strip() for line in open(path, encoding="utf-8") if line.strip()]`: a line ends at \\n, \\r\\n or
\\r and nowhere else (str.splitlines would also cut at U+0085 and U+2028). Everything is read in pieces and decoded as it
comes, so a damaged file is refused at the line where the damage is, before anything depends on it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from fastpoem.corpus.account import Account
from fastpoem.corpus.decode import PIECE_BYTES, pieces
from fastpoem.corpus.formats import Block, Taker, blocks
from fastpoem.corpus.source import Found, Source, TextFile, look_up
from fastpoem.errors import InputError


def read_blocks(
    source: Source | Path, account: Account | None = None, *, piece_bytes: int = PIECE_BYTES
) -> Iterator[Block]:
    """The poems of `source` in the order of its files. `piece_bytes` is read at a time; `account` takes down what was met with.

    Raises InputError, naming file and line, for what is missing, empty, binary, wrongly encoded or malformed.
    """
    source = Source.of(source)
    account = Account() if account is None else account
    account.look.line_break = source.line_break
    translate = _converter(source.convert) if source.convert else None
    for path in source.paths:
        empty, before = True, dict(account.poemless)
        found = look_up(path)
        account.passed.update(found.passed)
        for block in _blocks(found, source, account, piece_bytes):
            if source.clean and block.lines:
                cleaned = account.look.cleaned(block.lines)
                block = Block(cleaned, block.blank + len(block.lines) - len(cleaned))
            empty = empty and not block.lines
            yield _translated(block, translate) if translate and block.lines else block
        if empty:
            mine = Account(
                poemless={k: n for k, n in account.poemless.items() if before.get(k) != n}, keys=account.keys
            )
            raise InputError(path, *mine.why_none())


def _blocks(found: Found, source: Source, account: Account, piece_bytes: int) -> Iterator[Block]:
    taker = Taker(source, account, lenient=found.folder)
    for file in found.files:

        def heard(encoding: str, file: TextFile = file) -> None:
            account.encodings.setdefault(encoding, []).append(file.name)

        yield from blocks(file, pieces(file, piece_bytes, heard), piece_bytes, taker)


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
