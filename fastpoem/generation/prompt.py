"""What the model reads of a prompt: the text as training's was, behind the token that begins a poem, once.

The text of a corpus was perhaps converted (--convert), and its marks are full-width: a prompt is treated likewise. A poem's frame may stand
in a prompt as somebody saw it elsewhere (`[CLS]秦川`, or a whole `[CLS]…[SEP]`); other special tokens are text. A [SEP] that stands alone is
one that the text has inside, as between the lines of a couplet, and is read as it is. A line break is read as the token that the model has
for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.tokenizer_files import WIDE
from fastpoem.errors import InputError, brief
from fastpoem.generation.config import LINE_END
from fastpoem.generation.spell import Speller, tidy, token, visible
from fastpoem.model.cached import Cache
from fastpoem.model.gpt2 import GPT2

FULL = {",": "，", ".": "。", "?": "？", "!": "！", ";": "；", ":": "："}
# A half-width mark behind CJK, with neither Latin nor another dot behind it
_HALF = re.compile(rf"(?<=[{WIDE}])(\.(?!\.)|[,?!;:])(?![A-Za-z0-9])")


class Prompt(NamedTuple):
    """text: as it is shown. ids: as the model reads it, the token that begins a poem before them."""

    text: str
    ids: list[int]


def unframed(tokenizer: PoemTokenizer, text: str) -> str:
    """`text` without the frame of a poem, if it has one."""
    first, last = (token(tokenizer.library, one) for one in (tokenizer.cls_id, tokenizer.sep_id))
    bare = text.strip()
    if not bare.startswith(first):
        return text
    while bare.startswith(first):
        bare = bare.removeprefix(first).lstrip()
    while bare.endswith(last):
        bare = bare.removesuffix(last).rstrip()
    return bare


def read(tokenizer: PoemTokenizer, text: str) -> list[int]:
    """The ids that `text` begins a poem with."""
    return [tokenizer.cls_id, *tokenizer.library.encode(unframed(tokenizer, text), add_special_tokens=False).ids]


class Reader:
    """Reads prompts for one model. never: ids that are not written. convert: the OpenCC conversion that the poems had, or None. say hears
    what was changed. full_marks: half-width marks behind CJK are full-width ones whatever the model finds."""

    def __init__(
        self,
        model: GPT2,
        tokenizer: PoemTokenizer,
        speller: Speller,
        never: Sequence[int],
        convert: str | None,
        say: Callable[[str], None],
        full_marks: bool = False,
    ) -> None:
        self.full_marks = full_marks
        self.model, self.tokenizer, self.speller, self.never, self.say = model, tokenizer, speller, {*never}, say
        self.convert = _conversion(convert, say)

    def __call__(self, text: str) -> Prompt:
        text = self._on_one_line(text)
        shown = self.convert(unframed(self.tokenizer, text))
        if not self.speller.exact:
            shown = self._with_its_marks(tidy(visible(shown)))
        self._name_unknown(text, shown)
        return Prompt(shown, read(self.tokenizer, shown))

    def _on_one_line(self, text: str) -> str:
        """`text` with the model's token for its line breaks, those before it left out. Raises InputError where the model has none."""
        text, mark = text.lstrip("\r\n"), self.tokenizer.line_break
        if mark is None and LINE_END.search(text):
            raise InputError(
                f"--prompt {brief(text, 40)}", "this model has no line breaks", "write the prompt on one line"
            )
        return text if mark is None else LINE_END.sub(lambda _: mark, text)

    def _name_unknown(self, text: str, shown: str) -> None:
        found = self.tokenizer.library.encode(shown, add_special_tokens=False)
        unknown = self.tokenizer.unk_id
        parts = [shown[slice(*span)] for span, one in zip(found.offsets, found.ids, strict=True) if one == unknown]
        name = "" if unknown is None else token(self.tokenizer.library, unknown)
        if lacking := " ".join(part for part in dict.fromkeys(parts) if part != name):
            self.say(f"{text}: the vocabulary lacks {lacking}, which the model reads as {name}")

    def _with_its_marks(self, text: str) -> str:
        """`text` with each half-width mark behind CJK as the poems have it: of its two forms the one that the model finds likelier."""
        said: dict[str, str] = {}
        begin = 0
        while (found := _HALF.search(text, begin)) is not None:
            half, begin = found[0], found.end()
            if self.full_marks or self._likelier(text[: found.start()], half, FULL[half]):
                text = text[: found.start()] + FULL[half] + text[begin:]
                said[half] = FULL[half]
        if said:
            self.say(f"{text}: {' '.join(said)} read as {' '.join(said.values())}, as the poems have it")
        return text

    def _likelier(self, before: str, half: str, full: str) -> bool:
        """Whether `full` follows `before` rather than `half`, both of one character."""
        this, other = (self.tokenizer.library.token_to_id(mark) for mark in (full, half))
        if this is None or this in self.never or other is None or other in self.never:
            return this is not None and this not in self.never
        ids = read(self.tokenizer, before)
        if len(ids) > self.model.config.n_positions:
            return False
        device = self.model.transformer.wte.weight.device
        logits = Cache(self.model, 1, len(ids)).advance(torch.tensor([ids], device=device))[0]  # (V,)
        return bool(logits[this] > logits[other])


def _conversion(name: str | None, say: Callable[[str], None]) -> Callable[[str], str]:
    """The OpenCC conversion of this name; where OpenCC is not installed, none."""
    if name is None:
        return lambda text: text
    try:
        from opencc import OpenCC
    except ImportError:
        say(
            f"the poems were converted by {name}, the prompt is not: OpenCC is not installed (pip install 'fastpoem[convert]')"
        )
        return lambda text: text
    return OpenCC(name).convert
