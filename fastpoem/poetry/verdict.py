"""What can be said of a poem and of many: form, rhyme and tones as plain data, and the shares of poems that have them.

The shares are a measure of a model: they show at once when sampling or the frame of the training text is wrong, which the loss does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fastpoem.poetry.forms import form_of
from fastpoem.poetry.rhyme import PINGSHUI, rhyme_of, rhymes
from fastpoem.poetry.tones import Tones, tones


def verdict(poem: str, by: str = PINGSHUI) -> dict[str, Any]:
    """Form, rhymes and tones of a poem as JSON has them. `regulated` and `scheme` are None for a poem in no form, `regulated` also where it
    hangs on a character that is not in the book (`unknown`)."""
    group, report = rhyme_of(poem, by), tones(poem, by)
    return {
        "form": form_of(poem),
        "rhymes": rhymes(poem, by),
        "rhyme": None if group is None else str(group),
        "tones": [*report.lines],
        "scheme": report.scheme,
        "regulated": report.regulated,
        "off": [fault._asdict() for fault in report.faults],
        "unknown": [fault._asdict() for fault in report.unknown],
    }


def _english(line: str, *values: Any) -> str:
    return line.format(*values) if values else line


def shown(poem: str, by: str = PINGSHUI, put: Callable[..., str] = _english) -> str:
    """The same for a person, on two lines: the tones, and what is said of them. put: has an English template and its values in another
    language."""
    report: Tones = tones(poem, by)
    group = rhyme_of(poem, by)
    said = [
        form_of(poem) or put("in no form"),
        put("rhymes in {0} {1}", by, group) if group else put("no rhyme by {0}", by),
    ]
    named = lambda some: " ".join(put("{0} (line {1}, {2})", one.character, one.line, one.place) for one in some)
    if report.faults:
        said.append(put("{0}, off: {1}", report.scheme, named(report.faults)))
    elif report.scheme is not None:
        right = "{0}, no tone known to be off" if report.unknown else "{0}, every tone right"
        said.append(put(right, report.scheme))
    if report.unknown:
        said.append(put("not in the book: {0}", named(report.unknown)))
    return f"    {' '.join(report.lines)}\n    {put('; ').join(said)}"


class Shares(NamedTuple):
    """Of `poems`: the share in a form, the share that rhymes, and of those in a form the share with every tone right. Each 0 to 1, 0 for no
    poems. forms: poems in each form."""

    poems: int
    in_form: float
    rhyming: float
    regulated: float
    forms: dict[str, int]


def shares(poems: Iterable[str], form: str | None = None, by: str = PINGSHUI) -> Shares:
    """The shares of `poems` in `form`, or in any form where none is named. A poem in no form that rhymes counts as rhyming."""
    count = rhyming = regulated = 0
    forms = Counter[str]()
    for poem in poems:
        count += 1
        rhyming += rhymes(poem, by) is True
        if (found := form_of(poem)) is not None:
            forms[found] += 1
            regulated += bool(tones(poem, by).regulated)
    inside = forms[form] if form is not None else forms.total()
    return Shares(count, inside / max(count, 1), rhyming / max(count, 1), regulated / max(forms.total(), 1), {**forms})
