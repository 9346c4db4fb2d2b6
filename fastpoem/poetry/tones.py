"""Level and oblique tones (平仄): those of a text's characters, and whether they go as regulated verse has them.

A line of five goes by one of four patterns, a line of seven puts two characters before it. Which line has which follows from how the poem
begins (平起, 仄起) and from whether its first line rhymes (首句入韵): four schemes. What the rules let go either way is 中, and so is a character
that the book knows in both tones. Told are the characters that are off under the scheme that fits best. Of the exceptions known as 拗救, the
common one within a line is let pass (平平仄平仄); those across two lines are not, nor is the first line of a poem held to its couplet's 粘 alone.
A first line that ends level must rhyme, with a neighbouring group (邻韵) at least: 词林正韵 says which are neighbours.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

from fastpoem.poetry.forms import FORMS, form_of, lines_of
from fastpoem.poetry.rhyme import PINGSHUI, book, ends

LEVEL, OBLIQUE, EITHER, UNKNOWN = "平", "仄", "中", "？"
OTHER = {LEVEL: OBLIQUE, OBLIQUE: LEVEL}
# Lines of five by the tone of their second character and of their last
_PATTERNS = {
    (OBLIQUE, OBLIQUE): ("中仄中平仄",),
    (LEVEL, OBLIQUE): ("中平中仄仄", "中平仄平仄"),
    (LEVEL, LEVEL): ("平平中仄平", "中平平仄平"),  # one level tone alone before the last would be 孤平
    (OBLIQUE, LEVEL): ("中仄仄平平",),
}
_NEIGHBOURS = ("东冬", "江阳", "支微齐灰", "鱼虞", "佳灰", "真文元", "寒删先元", "萧肴豪", "佳麻", "庚青蒸", "覃盐咸")


class Fault(NamedTuple):
    """A character whose tone is off, or not known. line, place: from 1."""

    line: int
    place: int
    character: str


class Tones(NamedTuple):
    """lines: 平, 仄, 中 (either) or ？ (not in the book) of each character. scheme: the one that fits best, None for a text in no form."""

    lines: tuple[str, ...]
    scheme: str | None
    faults: tuple[Fault, ...]
    unknown: tuple[Fault, ...] = ()  # characters of a poem in a form that are not in the book

    @property
    def regulated(self) -> bool | None:
        """Whether no tone is off; None for a text in no form, and where that hangs on a character that is not in the book."""
        return False if self.faults else None if self.scheme is None or self.unknown else True


@functools.cache
def tone_of(character: str, by: str = PINGSHUI) -> str:
    """平, 仄, 中 or ？."""
    table = book(by)
    levels = {table.groups[number].level for number in table.of.get(character, ())}
    return EITHER if len(levels) > 1 else UNKNOWN if not levels else LEVEL if levels.pop() else OBLIQUE


def tones(poem: str, by: str = PINGSHUI) -> Tones:
    """The tones of every line, and for a poem in a form what is off by the rules of regulated verse."""
    text = lines_of(poem)
    lines = tuple("".join(tone_of(one, by) for one in line) for line in text)
    if (form := form_of(poem)) is None:
        return Tones(lines, None, ())
    fitting = {name: _off(lines, kinds) for name, kinds in _schemes(form)}
    first, *last = (book(by).of.get(one, frozenset()) for one in (text[0][-1], *ends(poem)))
    likely = "首句入韵" if first.intersection(*last) else "首句不入韵"  # between schemes that fit as well
    scheme = min(fitting, key=lambda name: (len(fitting[name]), likely not in name))
    off = fitting[scheme]
    if lines[0][-1] == LEVEL and last and not any(_near(first, one, by) for one in last):
        off = sorted({*off, (0, len(lines[0]) - 1)})
    strange = [(line, at) for line, kinds in enumerate(lines) for at, kind in enumerate(kinds) if kind == UNKNOWN]
    named = lambda places: tuple(Fault(line + 1, at + 1, text[line][at]) for line, at in places)
    return Tones(lines, scheme, named(off), named(strange))


def _near(some: frozenset[int], others: frozenset[int], by: str) -> bool:
    """Whether two characters rhyme, by their groups: in one group, or in two that are neighbours. One that is in no group may."""
    if not some or not others or some & others:
        return True
    names = [{str(book(by).groups[number])[-1] for number in numbers} for numbers in (some, others)]
    return any(names[0] & {*group} and names[1] & {*group} for group in _NEIGHBOURS)


@functools.cache
def _schemes(name: str) -> list[tuple[str, tuple[tuple[str, ...], ...]]]:
    """(name, patterns of each line) of each scheme of a form."""
    form, found = FORMS[name], []
    for begins, first_rhymes in itertools.product((OBLIQUE, LEVEL), (False, True)):
        kinds = []
        for line in range(form.lines):
            second = begins if line % 4 in (0, 3) else OTHER[begins]
            last = LEVEL if line % 2 or (line == 0 and first_rhymes) else OBLIQUE
            fourth = second if form.width == 5 else OTHER[second]  # the second of the last five
            before = "" if form.width == 5 else EITHER + second
            kinds.append(tuple(before + pattern for pattern in _PATTERNS[fourth, last]))
        found.append((f"{begins}起首句{'入韵' if first_rhymes else '不入韵'}", tuple(kinds)))
    return found


def _off(lines: tuple[str, ...], kinds: tuple[tuple[str, ...], ...]) -> list[tuple[int, int]]:
    """(line, place) of what is off, each line by the pattern that fits it best."""
    found = []
    for number, (line, patterns) in enumerate(zip(lines, kinds, strict=True)):
        off = (
            [at for at, (tone, due) in enumerate(zip(line, pattern, strict=True)) if tone == OTHER.get(due)]
            for pattern in patterns
        )
        found += [(number, at) for at in min(off, key=len)]
    return found
