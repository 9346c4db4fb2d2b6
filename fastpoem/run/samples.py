"""Poems on the way, from the weights as they are: whether it learns to write is read there long before a loss says so.

They begin with the same few prompts and are drawn with the same numbers every time, so what differs between two of them is what was learned
in between. Training does not feel it: nothing is taken from the generators that dropout draws from, the module is back in training mode
afterwards, and what is written is a function of the weights alone, so that a resumed run writes the same. Where it goes wrong nothing is
written, and training goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import first_line
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.prompt import read
from fastpoem.generation.spell import Speller
from fastpoem.generation.write import write
from fastpoem.model.gpt2 import GPT2
from fastpoem.poetry.verdict import Shares, shares

PROMPTS = ("", "春", "明月")
LONGEST = 68  # tokens: a poem of eight lines of seven characters, with its marks and both ends
SHORT = 100  # steps: where epochs are shorter, not every one ends with poems
MEASURED = 32  # poems, of which the share in form is told


class Writer:
    """Writes a poem for each of its prompts with `model`, in whose numbering of ids `ids` (K,) has the tokenizer's; None: it has them all.
    never: ids of the tokenizer that are not written. Prompts with a character that is not in the vocabulary are left out."""

    def __init__(
        self,
        model: GPT2,
        tokenizer: PoemTokenizer,
        prompt: str | None,
        never: Sequence[int],
        ids: np.ndarray | None,
        seed: int,
    ) -> None:
        library = tokenizer.library
        self.model, self.seed = model, seed
        mark = tokenizer.line_break
        self.speller = Speller(library, None if mark is None else library.token_to_id(mark))
        self.ids = np.arange(model.config.vocab_size) if ids is None else ids
        self.place = {one: place for place, one in enumerate(self.ids.tolist())}
        self.never = sorted(self.place[one] for one in {*never} if one in self.place)
        self.end = self.place[tokenizer.sep_id]
        self.longest = min(LONGEST, model.config.n_positions)
        begun = [(text, read(tokenizer, text)) for text in dict.fromkeys(PROMPTS if prompt is None else (prompt, ""))]
        known = self.place.keys() - {tokenizer.unk_id}
        self.begun = [(text, ids) for text, ids in begun if known.issuperset(ids) and len(ids) < self.longest]

    def __call__(self) -> list[tuple[str, str]]:
        """(prompt, poem) of each. Raises Stopped where a signal came meanwhile, RuntimeError or MemoryError."""
        return self._written(self.begun, 1)

    def shares(self, count: int = MEASURED) -> Shares:
        """Of `count` poems that begin with nothing: how many are in a form, and rhyme. Raises as calling it does."""
        return shares(poem for _, poem in self._written([one for one in self.begun if not one[0]], count))

    def _written(self, begun: Sequence[tuple[str, list[int]]], count: int) -> list[tuple[str, str]]:
        """(prompt, poem), `count` of each."""
        config = GenerateConfig("", count=count, max_length=self.longest)
        was_training = self.model.training
        self.model.eval()
        try:
            ids = [[self.place[one] for one in start] for _, start in begun]
            written = write(self.model, ids, self.seed, config, end=self.end, never=self.never, longest=self.longest)
            return [
                (
                    begun[at // count][0],
                    self.speller.poem(begun[at // count][0], begun[at // count][1][1:], self.ids[new].tolist()),
                )
                for at, new in enumerate(written)
            ]
        finally:
            self.model.train(was_training)


class Samples:
    """RUN/samples.jsonl: an object a poem, {"step", "epoch" (steps done / steps an epoch), "prompt", "poem"}."""

    def __init__(self, folder: Path, writer: Writer, hold: Callable[[], None], say: Callable[..., None]) -> None:
        """hold: raises where the folder is another run's by now."""
        self.path, self.writer, self.hold, self.say = folder / "samples.jsonl", writer, hold, say
        self.rows: list[dict[str, Any]] = []
        self.broken = not writer.begun

    def begin(self, keep: Callable[[int], bool]) -> None:
        """Go on with the rows of an existing file that are of steps to `keep`; the others are of steps that will be done again."""
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                row = json.loads(line)
                if type(row["step"]) is int and keep(row["step"]):
                    self.rows.append(row)
            except (ValueError, KeyError, TypeError, RecursionError):
                break
        if len(self.rows) < len(lines):
            try:
                self.path.unlink()
                self._append(self.rows)
            except OSError as error:
                self._refused(error)

    def has(self, step: int) -> bool:
        return any(row["step"] == step for row in self.rows[-16:])

    def take(self, step: int, epoch: float) -> list[str]:
        """Write the poems of a step, and return them. Raises Stopped, and what `hold` raises."""
        try:
            found = self.writer()
        except (RuntimeError, MemoryError, IndexError) as error:  # the last: an id that is none
            self.broken = True
            self.say(f"no poems are written on the way: {first_line(error)}")
            return []
        rows = [{"step": step, "epoch": round(epoch, 4), "prompt": text, "poem": poem} for text, poem in found]
        self.rows += rows
        try:
            self.hold()
            self._append(rows if self.path.exists() else self.rows)
        except OSError as error:
            self._refused(error)
        return [poem for _, poem in found]

    def shares(self) -> dict[str, Any]:
        """`in_form` and `rhyming`, the shares of 32 poems, as the epoch's row has them; nothing where they cannot be written. Raises
        Stopped."""
        try:
            found = self.writer.shares()
        except (RuntimeError, MemoryError, IndexError):
            return {}
        return {"in_form": found.in_form, "rhyming": found.rhyming} if found.poems else {}

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        if content:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)

    def _refused(self, error: OSError) -> None:
        self.say(f"{self.path} could not be written: {error}; training goes on without")


def due(step: int, steps: int, every: int | None) -> bool:
    """Whether poems are written after `step`, whose epochs have `steps`. every: as --sample-every."""
    if every is not None:
        return every > 0 and step % every == 0
    return step % steps == 0 and step // SHORT > (step - steps) // SHORT


def is_finite(flat: torch.Tensor) -> bool:
    """Whether weights can be written with: of others, what is drawn is no id."""
    return bool(torch.isfinite(flat).all())
