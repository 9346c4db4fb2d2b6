"""`python -m fastpoem.generate`: poems from a trained model, printed as they are written.

Few poems on a terminal appear character by character; into a pipe, and where they are many, they come in batches, which takes less time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import operator
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fastpoem import signals
from fastpoem.cli import parse, prog, run_command
from fastpoem.errors import say
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.poems import growing, poems
from fastpoem.generation.poems import sample as sample
from fastpoem.poetry.forms import HAN, INNER, form_named
from fastpoem.poetry.rhyme import PINGSHUI, book_named
from fastpoem.poetry.verdict import shown, verdict

FEW = 8  # poems that a person waits for one by one
_SURE = re.compile(
    f".*[{HAN}{INNER}]", re.DOTALL
)  # what of a growing poem stays as it is: spaces and Latin words may change yet


@dataclass(frozen=True)
class GenerateCommand(GenerateConfig):
    """Write poems with a trained model."""

    prompts: str | None = None
    """A text file with a prompt a line, behind those of --prompt."""
    json: bool = False
    """An object a line: the prompt, the poem, its form, rhyme and tones."""
    tones: bool = False
    """Below each poem its tones (平仄), its rhyme, and what is off by the rules of regulated verse."""
    lang: Literal["auto", "en", "zh"] = "auto"
    """Language of what --tones says. auto: on a terminal that of the locale, in a pipe English."""


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(GenerateCommand, argv, prog=prog("generate"))
    if config.prompts is not None:
        config = dataclasses.replace(config, prompt=(*config.prompt, *_lines(config.prompts)))
    config.check()

    signals.imported("torch")  # which takes seconds
    from fastpoem.run.trained import trained_model

    model = trained_model(config.model, say)
    config = dataclasses.replace(config, model=model)
    prompts = config.prompt or ("",)
    if config.json:
        _print_json(config, prompts)
    elif sys.stdout.isatty() and config.count * len(prompts) <= FEW:
        for poem in _appearing(growing(config)):
            _print_behind(config, poem)
    else:
        for poem in poems(config):
            print(poem, end="")
            _print_behind(config, poem)
    return 0


def _lines(path: str) -> list[str]:
    """The prompts that a file holds. Raises InputError."""
    signals.imported("numpy")
    from fastpoem.corpus.read import read_blocks
    from fastpoem.corpus.source import Source

    return [line for block in read_blocks(Source.given([path], flag="--prompts")) for line in block.lines]


def _print_json(config: GenerateConfig, prompts: Sequence[str]) -> None:
    asked = None if config.form is None else form_named(config.form).name
    for number, poem in enumerate(poems(config)):
        told = {"prompt": prompts[number // config.count], "poem": poem, **verdict(poem, _book(config))}
        if asked is not None:
            told |= {"asked": asked, "in_form": told["form"] == asked}
        print(json.dumps(told, ensure_ascii=False), flush=True)


def _appearing(coming: Iterable[tuple[int, str]]) -> Iterator[str]:
    """Print each poem as it grows; when it is whole, it is what is yielded."""
    for _, states in itertools.groupby(coming, key=operator.itemgetter(0)):
        there = poem = ""
        for _, poem in states:
            sure = _SURE.match(poem)
            if sure is not None and sure[0].startswith(there):
                print(sure[0][len(there) :], end="", flush=True)
                there = sure[0]
        print(poem[len(there) :] if poem.startswith(there) else "\n" + poem, end="")
        yield poem


def _print_behind(config: GenerateCommand, poem: str) -> None:
    """What stands between a poem that was printed and the next."""
    if config.tones:
        from fastpoem.run.words import language, put

        word = functools.partial(put, language(config.lang, sys.stdout.isatty()))
        print("\n" + shown(poem, _book(config), word), end="")
    print(end="\n\n" if config.tones or "\n" in poem else "\n", flush=True)


def _book(config: GenerateConfig) -> str:
    return PINGSHUI if config.rhyme is None else book_named(config.rhyme)


if __name__ == "__main__":
    run_command(main)
