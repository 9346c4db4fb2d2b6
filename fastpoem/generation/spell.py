"""The text that ids spell. What BERT's tokenizer forgets of spaces is guessed; a decoder of bytes is taken at its word.

BERT's decoder sets a space between any two words, and each CJK character and mark is a word to it. A space stays between Latin words only:
beside CJK and full-width marks there is none, and half-width marks stand where English has them (`don't worry, be happy`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from tokenizers import Tokenizer

from fastpoem.corpus.tokenizer_files import GAPS

_TIDY = (
    *((re.compile(gap), "") for gap in GAPS),
    (re.compile(r" +(?=[,.!?;:%)\]}])"), ""),
    (re.compile(r"(?<=[(\[{]) +"), ""),
    (re.compile(r"(?<=[A-Za-z]) ?(['’-]) ?(?=[A-Za-z])"), r"\1"),
    (re.compile(r"(?<=\d) ?([.,:]) ?(?=\d)"), r"\1"),
)


def token(library: Tokenizer, one: int) -> str:
    """How a token of the vocabulary is written."""
    text = library.id_to_token(one)
    assert text, f"{one} has no token"
    return text


class Speller:
    """Spells for one tokenizer. line_break: the id that stands for a line break inside a poem, or None."""

    def __init__(self, library: Tokenizer, line_break: int | None) -> None:
        self.library, self.line_break = library, line_break
        decoder = json.loads(library.to_str())["decoder"]
        self.exact = decoder is not None and decoder["type"] != "WordPiece"  # spaces are tokens, or parts of some

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids without a frame: every token of it is shown, special ones too."""
        lines: list[list[int]] = [[]]
        for one in ids:
            if one == self.line_break:
                lines.append([])
            else:
                lines[-1].append(one)
        return "\n".join(self._line(line) for line in lines)

    def _line(self, ids: list[int]) -> str:
        text = self.library.decode(ids, skip_special_tokens=False)
        return text if self.exact else tidy(text)

    def poem(self, prompt: str, begun: Sequence[int], written: Sequence[int]) -> str:
        """A poem that the model went on with from `prompt`, which it read as `begun`: the prompt as it was given, not as it was read."""
        head, whole = self.text(begun), self.text([*begun, *written])
        shown = prompt
        if self.line_break is not None:
            shown = re.sub(rf" *{re.escape(token(self.library, self.line_break))} *", "\n", prompt)
        return shown + whole[len(head) :] if whole.startswith(head) else whole


def tidy(text: str) -> str:
    """`text` with the spaces that belong there. ASCII spaces only."""
    for gap, instead in _TIDY:
        text = gap.sub(instead, text)
    return text


def visible(text: str) -> str:
    """`text` without what is not seen: characters that control or join, and more than a space between words."""
    return " ".join(
        "".join(
            one for one in text if unicodedata.category(one) != "Cf" and (one.isspace() or one.isprintable())
        ).split()
    )
