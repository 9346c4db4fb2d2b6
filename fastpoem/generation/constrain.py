"""Poems in a form: at each position of the poem the tokens that the form allows there, and no others.

Where a form has a mark there is one token, where it has a character every token that is one Chinese character alone, and behind the last mark
the end. So no line is too short or cut, and nothing unknown is written, whatever the model has learned; among what is allowed the model's own
distribution decides. An acrostic fixes the first characters of lines. With a book of rhymes the first rhyme is drawn from the level groups
that have enough characters, and each further one from the groups that all before it share, so that the poem can always be ended.

What is allowed follows from the tokens before alone. `Constraint` is for our own writer, `FormProcessor` for `generate` of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpoem.errors import InputError, brief
from fastpoem.poetry.forms import COMMA, HAN, INNER, LAST, STOP, Form, form_named
from fastpoem.poetry.rhyme import Book, book, book_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE = re.compile(f"(?![\uf900-\ufaff])[{HAN}]")  # compatibility forms are twins of others


class Constraint:
    """What `form` allows, in the ids of one vocabulary. `length`: tokens of a whole poem, without a token that begins it or ends it.

    vocabulary: ids by token. end: the id that ends a poem. never: ids that are not written unless an acrostic or a prompt asks for them.
    acrostic: one character for each line, or for each couplet of a poem of eight lines. rhymes: the book that the ends of the couplets are
    to rhyme by. Raises InputError for a vocabulary that lacks what is needed, and an acrostic that does not fit.
    """

    def __init__(
        self,
        form: Form,
        vocabulary: Mapping[str, int],
        end: int,
        never: Iterable[int] = (),
        acrostic: str | None = None,
        rhymes: Book | None = None,
    ) -> None:
        self.form, self.length, self.end = form, form.length, end
        step = form.width + 1
        self._character = {index: one for one, index in vocabulary.items() if _ONE.fullmatch(one)}  # by id
        unwritten = {*never}
        self._written = sorted({*self._character} - unwritten)
        if not self._written:
            raise _lacks("tokens that are one Chinese character", form)
        for mark in (COMMA, STOP):
            if vocabulary.get(mark) is None or vocabulary[mark] in unwritten:
                raise _lacks(f"the mark {mark}", form)
        self._marks = [{vocabulary[mark] for mark in marks if mark in vocabulary} for marks in (INNER, LAST)]
        # Of each place the one id that is written there, None where it is any character
        self._due: list[int | None] = [None] * self.length
        for line in range(form.lines):
            self._due[line * step + form.width] = vocabulary[STOP if line % 2 else COMMA]
        for line, one in _heads(form, acrostic):
            if vocabulary.get(one) not in self._character:
                raise InputError(
                    f"--acrostic {acrostic}", f"the model's vocabulary lacks {one}", "use a character that it has"
                )
            self._due[line * step] = vocabulary[one]
        self._first_end = form.width - 1
        self._ends = [line * step + form.width - 1 for line in range(1, form.lines, 2)]
        self._book = rhymes
        self._rhymes: dict[int, set[int]] = {}  # numbers of groups by id
        if rhymes is not None:
            self._rhymes, self._level = self._groups(rhymes)
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = None

    def _groups(self, rhymes: Book) -> tuple[dict[int, set[int]], set[int]]:
        """The groups of each character's id, those alone that have characters enough for a poem, and which of them are level."""
        needed = len(self._ends) + 1  # the first line's end is not to come again
        of = {index: rhymes.of.get(one, frozenset()) for index, one in self._character.items()}
        size = [0] * len(rhymes.groups)
        for index in self._written:
            for number in of[index]:
                size[number] += 1
        enough = {number for number, count in enumerate(size) if count >= needed}
        level = {number for number in enough if rhymes.groups[number].level}
        if not level:
            reason = f"the model's vocabulary has no {needed} characters that rhyme by it"
            raise InputError(f"--rhyme {rhymes.name}", reason, "use a model with a larger vocabulary")
        return {index: {*numbers} & enough for index, numbers in of.items()}, level

    def check(self, ids: Sequence[int], prompt: str) -> None:
        """Raises InputError where no poem of the form can begin with `ids`, which `prompt` was read as."""
        shown, form = f"--prompt {brief(prompt, 40)}", self.form
        bare = "".join(prompt.split())  # up to what is refused, a character for each id
        for place, index in enumerate(ids):
            line, at = divmod(place, form.width + 1)
            due = self._due[min(place, self.length - 1)]
            if place >= self.length:
                reason = f"is longer than a {form.name}"
            elif at == form.width and index not in self._marks[line % 2]:
                reason = f"cannot begin a {form.name}: {STOP if line % 2 else COMMA} is due where it has {bare[place]}"
            elif at < form.width and index in self._marks[0] | self._marks[1]:
                reason = f"cannot begin a {form.name}: its line {line + 1} is not {form.width} characters long"
            elif at < form.width and index not in self._character:
                reason = f"cannot begin a {form.name}: {bare[place]} is no Chinese character that the model knows"
            elif at < form.width and due not in (None, index):
                reason = f"has {bare[place]} where the acrostic has {self._character[due or 0]}"
            else:
                continue
            raise InputError(shown, reason, "change it")
        if self._book is not None:
            self._check_rhymes(ids, shown)

    def _check_rhymes(self, ids: Sequence[int], shown: str) -> None:
        assert self._book is not None
        given = [ids[place] for place in (self._first_end, *self._ends) if place < len(ids)][1:]
        shared = set.intersection(*(self._rhymes[index] for index in given)) if given else {0}
        ends = " ".join(self._character[index] for index in given)
        if not shared:
            reason = f"its {ends} does not rhyme, or with too few characters of the vocabulary, by {self._book.name}"
            raise InputError(shown, reason, "change it, or drop --rhyme")
        if given and len({ids[self._first_end], *given}) <= len(given):
            raise InputError(shown, f"a character ends two of its lines, {ends}", "change one, or drop --rhyme")

    def __call__(self, text: Tensor, logits: Tensor) -> Tensor:
        """`logits` (B, V) of what follows `text`, with -inf at all that the form does not allow.

        text: (B, P) int64, the poems so far, without the token that begins them.
        """
        place, rows = text.shape[1], logits.shape[1]
        due = self._due[place] if place < self.length else self.end
        if due is not None:  # whatever the model, or another processor, thinks of it
            return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([due], device=logits.device), 0.0)
        written, groups, level = self._on(logits.device, rows)
        allowed = written  # (V,), with rhymes (B, V)
        if self._book is not None and place in self._ends:
            before = [one for one in self._ends if one < place]
            shared = level.expand(len(text), -1)  # (B, G)
            if not before:  # a first line that ends level rhymes along
                first = groups[text[:, self._first_end]] * level
                shared = torch.where(first.any(1, keepdim=True), first, shared)
            else:
                shared = groups[text[:, before]].amin(1)
                at_level = shared * level
                shared = torch.where(at_level.any(1, keepdim=True), at_level, shared)
            fits = shared @ groups.T > 0  # (B, V)
            fits = fits.scatter(1, text[:, [self._first_end, *before]], False) & written
            allowed = torch.where(fits.any(1, keepdim=True), fits, written)  # none: a text that was not checked
        return logits.masked_fill(~allowed, -torch.inf)

    def _on(self, device: torch.device, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """(written (V,) bool, groups (V, G) float32 of 0 and 1, level (G,) float32): what may be written, and the rhymes."""
        if self._tensors is None or self._tensors[0].device != device or len(self._tensors[0]) != rows:
            count = 0 if self._book is None else len(self._book.groups)
            written, groups, level = torch.zeros(rows, dtype=torch.bool), torch.zeros(rows, count), torch.zeros(count)
            written[self._written] = True
            for index, numbers in self._rhymes.items():
                groups[index, [*numbers]] = 1.0
            if self._book is not None:
                level[[*self._level]] = 1.0
            self._tensors = written.to(device), groups.to(device), level.to(device)
        return self._tensors


def _lacks(what: str, form: Form) -> InputError:
    return InputError(
        f"--form {form.name}", f"the model's vocabulary lacks {what}", "use a model trained on such poems"
    )


def _heads(form: Form, acrostic: str | None) -> list[tuple[int, str]]:
    """(line, its first character) as an acrostic has them. Raises InputError."""
    if acrostic is None:
        return []
    heads = "".join(acrostic.split())
    odd = next((one for one in heads if not _ONE.fullmatch(one)), None)
    if odd is not None:
        raise InputError(f"--acrostic {brief(acrostic, 40)}", f"{odd} is no Chinese character", "leave it out")
    couplets = form.lines // 2 if form.lines == 8 else None
    if len(heads) not in (form.lines, couplets):
        fit = f"{form.lines} lines" + (f" or {couplets} couplets" if couplets else "")
        reason = f"has {len(heads)} characters, and a {form.name} has {fit}"
        raise InputError(f"--acrostic {brief(acrostic, 40)}", reason, "give one for each, or use another --form")
    each = form.lines // len(heads)
    return [(number * each, one) for number, one in enumerate(heads)]


class FormProcessor:
    """A logits processor for `generate` of transformers that keeps poems in a form.

        form = FormProcessor(tokenizer, "七绝", acrostic="春夏秋冬", rhyme="平水韵")
        model.generate(**tokenizer("", return_tensors="pt"), logits_processor=[form], max_new_tokens=form.new_tokens, do_sample=True)

    tokenizer: of a model folder of fastpoem, or any that has one token for a Chinese character and a token before each text. never: ids not to
    write, such as `suppress_tokens` of the model's generation_config. Raises InputError as `Constraint` does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: str,
        *,
        acrostic: str | None = None,
        rhyme: str | None = None,
        never: Collection[int] | None = None,
    ) -> None:
        special: Any = tokenizer
        self._first = special.cls_token_id if special.cls_token_id is not None else special.bos_token_id
        end = special.sep_token_id if special.sep_token_id is not None else special.eos_token_id
        rhymes = None if rhyme is None else book(book_named(rhyme))
        self._constraint = Constraint(form_named(form), special.get_vocab(), end, never or (), acrostic, rhymes)
        self.new_tokens = self._constraint.length + 1  # the end is one

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) of what follows input_ids (B, T). Poems may begin at different places, padding before them."""
        found = input_ids == self._first
        begins = torch.where(found.any(1), found.int().argmax(1) + 1, 0)  # (B,)
        out = torch.empty_like(scores)
        for begin in begins.unique().tolist():
            rows = (begins == begin).nonzero().squeeze(1)
            out[rows] = self._constraint(input_ids[rows, begin:], scores[rows])
        return out
