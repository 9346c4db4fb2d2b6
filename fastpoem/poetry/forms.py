"""The four forms of regulated verse: how many lines of how many characters, and where the marks stand.

A poem is in a form if every line has the form's length and ends with a mark, the second of each couplet with one that ends a sentence. That
is all a form says here: rhymes and tones are told apart (`rhymes`, `tones`), since many poems in the anthologies have the one without the
other.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fastpoem.errors import InputError, brief

HAN = "〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # for regular expressions
COMMA, STOP = "，", "。"
INNER, LAST = "，。？！；：、", "。？！；"  # marks that may end a couplet's first line, and its second
_LINE = re.compile(f"[{HAN}]+")
_QUOTES = re.compile("[“”‘’「」『』﹁﹂﹃﹄\"']")
# Before the poem: 《静夜思》 李白：, or what stands alone before a blank.
_TITLE = re.compile(rf"\A\s*(?:《[^》]*》\s*|[^{INNER}\s]+(?:[：:]\s*|\s+)){{1,3}}")


class Form(NamedTuple):
    """`lines` of `width` characters, each with a mark behind it."""

    name: str
    lines: int
    width: int

    @property
    def length(self) -> int:
        """Characters of a whole poem, marks included."""
        return self.lines * (self.width + 1)


FORMS = {form.name: form for form in (Form("五绝", 4, 5), Form("七绝", 4, 7), Form("五律", 8, 5), Form("七律", 8, 7))}
_NAMES = {
    "五绝": "五绝 五言绝句 五絕 五言絕句 wujue", "七绝": "七绝 七言绝句 七絕 七言絕句 qijue",
    "五律": "五律 五言律诗 五言律詩 wulv wulu wulü", "七律": "七律 七言律诗 七言律詩 qilv qilu qilü",
}  # fmt: skip
_BY_NAME = {name: FORMS[form] for form, names in _NAMES.items() for name in names.split()}
_SHAPES = {
    name: re.compile(f"(?:[{HAN}]{{{width}}}[{INNER}][{HAN}]{{{width}}}[{LAST}]){{{lines // 2}}}")
    for name, lines, width in FORMS.values()
}


def form_named(text: str) -> Form:
    """The form of this name: 五绝, 五言绝句, wujue and the like. Raises InputError."""
    if (form := _BY_NAME.get(text.strip().lower())) is None:
        raise InputError(f"--form {brief(text, 40)}", "no such form", "use 五绝, 七绝, 五律 or 七律")
    return form


def form_of(poem: str) -> str | None:
    """五绝, 七绝, 五律 or 七律, whichever the text is in, or None. Spaces, line breaks, quotation marks and a title before it do not count."""
    return _read(poem)[0]


def lines_of(poem: str) -> list[str]:
    """The lines of a poem of any form, without marks. A title counts as a line where the text is in no form without it."""
    return _LINE.findall(_read(poem)[1])


def _read(poem: str) -> tuple[str | None, str]:
    """(the form, the text that is in it: without a title and quotation marks, or all but these where it is in none)."""
    plain = _QUOTES.sub("", poem)
    for text in (plain, _TITLE.sub("", plain)):
        bare = "".join(text.split())
        if (form := next((name for name, shape in _SHAPES.items() if shape.fullmatch(bare)), None)) is not None:
            return form, bare
    return None, plain
