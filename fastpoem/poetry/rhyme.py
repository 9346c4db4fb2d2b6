"""Which characters rhyme, by a book: 平水韵, which the poems of a thousand years keep to, or 中华新韵, which goes by today's Mandarin.

The table is fastpoem/assets/rhymes.txt, where its sources stand. A character with several readings is in several groups, and two characters
rhyme if they share one: a text does not say which reading it means, so what is told is lenient.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from fastpoem.errors import InputError, brief
from fastpoem.poetry.forms import lines_of

PINGSHUI, XINYUN = "平水韵", "中华新韵"
_NAMES = {PINGSHUI: "平水韵 平水韻 pingshui", XINYUN: "中华新韵 中華新韻 新韵 新韻 xinyun"}
_BY_NAME = {name: book for book, names in _NAMES.items() for name in names.split()}
_TABLE = Path(__file__).parents[1] / "assets" / "rhymes.txt"


class Group(NamedTuple):
    """A group of characters that rhyme. tone: 上平 and 下平 or 平声 are level (平), all others oblique (仄)."""

    tone: str
    name: str

    @property
    def level(self) -> bool:
        return "平" in self.tone

    def __str__(self) -> str:
        return f"{self.tone}{self.name}"


class Book(NamedTuple):
    """groups: in the order of the book. of: the numbers of the groups that each character is in."""

    name: str
    groups: tuple[Group, ...]
    of: dict[str, frozenset[int]]


def book_named(text: str) -> str:
    """平水韵 or 中华新韵, by whichever of its names. Raises InputError."""
    if (name := _BY_NAME.get(text.strip().lower())) is None:
        raise InputError(f"--rhyme {brief(text, 40)}", "no such book of rhymes", f"use {PINGSHUI} or {XINYUN}")
    return name


@functools.cache
def book(name: str = PINGSHUI) -> Book:
    """The book of this name."""
    lines = [line for line in _TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    begin = lines.index(name) + 1
    groups: list[Group] = []
    of = defaultdict[str, set[int]](set)
    for line in lines[begin:]:
        tone, _, rest = line.partition(" ")
        if not rest:
            break  # the next book
        group, characters = rest.split(" ")
        for one in characters:
            of[one].add(len(groups))
        groups.append(Group(tone, group))
    return Book(name, tuple(groups), {one: frozenset(numbers) for one, numbers in of.items()})


def ends(poem: str) -> list[str]:
    """The characters that are to rhyme: the last of every second line. None for a poem whose lines do not pair."""
    lines = lines_of(poem)
    return [] if len(lines) % 2 else [line[-1] for line in lines[1::2]]


def rhyme_of(poem: str, by: str = PINGSHUI) -> Group | None:
    """The group that the second lines of all couplets rhyme in, a level one before an oblique one; None where they do not rhyme, or one
    character rhymes with itself."""
    table, last = book(by), ends(poem)
    if len(last) < 2 or len({*last}) < len(last):
        return None
    shared = frozenset.intersection(*(table.of.get(one, frozenset()) for one in last))
    return min((table.groups[number] for number in sorted(shared)), key=lambda group: not group.level, default=None)


def rhymes(poem: str, by: str = PINGSHUI) -> bool | None:
    """Whether the second lines of all couplets rhyme. None where that cannot be told: with fewer than two couplets, or an end that is not in
    the book."""
    last = ends(poem)
    if len(last) < 2 or any(one not in book(by).of for one in last):
        return None
    return rhyme_of(poem, by) is not None
