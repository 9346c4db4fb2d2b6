"""From a folder and a prompt to poems. transformers is not needed for it, whose import alone takes longer than a poem."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastpoem import signals
from fastpoem.config import coerce
from fastpoem.errors import InputError, say
from fastpoem.generation.config import GenerateConfig
from fastpoem.poetry.forms import Form, form_named
from fastpoem.poetry.rhyme import book, book_named

if TYPE_CHECKING:
    import torch

    from fastpoem.generation.prompt import Prompt
    from fastpoem.generation.spell import Speller
    from fastpoem.model.gpt2 import GPT2


def sample(model: str | Path, prompt: str | Sequence[str] = "", **options: object) -> list[str]:
    """`count` poems that begin with `prompt`, or with each of several. options: the other fields of GenerateConfig. Raises InputError."""
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    known = {field.name: str(field.type) for field in dataclasses.fields(GenerateConfig)}
    for name, value in options.items():
        if name not in known:
            raise InputError(name[:80], "no such setting", f"use {', '.join([*known][2:-1])} or {[*known][-1]}")
        options[name] = coerce(name, value, known[name])
    config = GenerateConfig(model=str(model), prompt=prompts, **options)  # type: ignore[arg-type]
    return [*poems(config.check())]


def poems(config: GenerateConfig, say: Callable[[str], None] = say) -> Iterator[str]:
    """The poems that `config` (checked) asks for, as they are written. say: hears what was done to a prompt; by default, stderr.
    Raises InputError."""
    signals.imported("torch")
    from fastpoem.engine.precision import choose_device
    from fastpoem.generation.write import write

    with _memory_named(device := choose_device(config.device, say)):
        ready = _ready(config, device, say)
        for number, ids in enumerate(write(ready.model, ready.begun, ready.seed, config, **ready.bounds)):
            yield ready.poem(number // config.count, ids)


def growing(config: GenerateConfig, say: Callable[[str], None] = say) -> Iterator[tuple[int, str]]:
    """The same poems one after another, to be shown as they grow: (the poem's number from 0, its text so far), again and again. The last of a
    number is the whole poem. Each is written alone, which takes longer than in batches. Raises InputError."""
    signals.imported("torch")
    from fastpoem.engine.precision import choose_device
    from fastpoem.generation.write import growing as written

    with _memory_named(device := choose_device(config.device, say)):
        ready = _ready(config, device, say)
        for number, ids in written(ready.model, ready.begun, ready.seed, config, **ready.bounds):
            yield number, ready.poem(number // config.count, ids)


class _Ready(NamedTuple):
    """bounds: what `write` is to keep within."""

    model: GPT2
    speller: Speller
    prompts: list[Prompt]
    seed: int
    bounds: dict[str, Any]

    @property
    def begun(self) -> list[list[int]]:
        return [prompt.ids for prompt in self.prompts]

    def poem(self, prompt: int, ids: Sequence[int]) -> str:
        begin = self.prompts[prompt]
        return self.speller.poem(begin.text, begin.ids[1:], ids)


def _ready(config: GenerateConfig, device: torch.device, say: Callable[[str], None]) -> _Ready:
    """All that is needed before the first token. Raises InputError."""
    import torch

    from fastpoem.corpus.tokenize import PoemTokenizer
    from fastpoem.corpus.tokenizer_files import conversion_of, never_ids
    from fastpoem.generation.constrain import Constraint
    from fastpoem.generation.prompt import Reader
    from fastpoem.generation.spell import Speller
    from fastpoem.model import hub
    from fastpoem.model.find import resolve_folder
    from fastpoem.model.gpt2 import GPT2
    from fastpoem.model.vocabulary import never_written

    folder = resolve_folder(config.model)
    shape, _ = hub.read_config(folder)
    hub.refuse_too_large(shape, folder, 8, "to load")
    tokenizer = PoemTokenizer.load(folder)  # training's own, of whatever kind: the ids are those that were learned
    if tokenizer.vocab_size > shape.vocab_size:
        raise InputError(
            folder, "its tokenizer has more ids than its embedding", "name the model folder of a finished run"
        )
    line_break = None if tokenizer.line_break is None else tokenizer.library.token_to_id(tokenizer.line_break)
    silent = ({*never_written(folder, shape.vocab_size)} | never_ids(tokenizer, shape.vocab_size)) - {line_break}
    if len(silent) == shape.vocab_size:
        raise InputError(folder, "has no token to write with", "use the tokenizer that belongs to the model")
    model = GPT2(shape).eval()
    hub.load_weights(model, folder)
    model.to(device)
    speller = Speller(tokenizer.library, line_break)
    heard: list[str] = []  # said where nothing is refused
    form = None if config.form is None else form_named(config.form)
    reader = Reader(
        model, tokenizer, speller, [*silent], conversion_of(folder), heard.append, full_marks=form is not None
    )
    constraint = None
    longest = min(config.max_length, shape.n_positions)
    if form is not None:
        acrostic = None if config.acrostic is None else reader.convert(config.acrostic)
        rhymes = None if config.rhyme is None else book(book_named(config.rhyme))
        constraint = Constraint(form, tokenizer.library.get_vocab(True), tokenizer.sep_id, silent, acrostic, rhymes)
        longest = 1 + form.length
        _refuse_longer(form, shape.n_positions + 1)  # the last token is not read
    prompts = [reader(text) for text in config.prompt or ("",)]
    for prompt in prompts:
        if constraint is not None:
            constraint.check(prompt.ids[1:], prompt.text)
        elif len(prompt.ids) >= longest:
            reason = f"leaves no room within {longest}"
            mend = "shorten it" if longest == shape.n_positions else "shorten it or raise --max-length"
            raise InputError(f"--prompt of {len(prompt.ids) - 1} tokens", reason, mend)
    for line in heard:
        say(line)
    seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
    bounds = {"end": tokenizer.sep_id, "never": sorted(silent), "longest": longest, "constraint": constraint}
    return _Ready(model, speller, prompts, seed, bounds)


def _refuse_longer(form: Form, most: int) -> None:
    """Raises InputError where a poem of the form, with the token that begins it, has more than `most` tokens."""
    if 1 + form.length > most:
        reason = f"has {1 + form.length} tokens, and the model allows {most}"
        raise InputError(f"--form {form.name}", reason, "use a shorter form")


@contextlib.contextmanager
def _memory_named(device: torch.device) -> Iterator[None]:
    """Raises InputError where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from fastpoem.generation.write import ran_out

        if not ran_out(error):
            raise
        mend = "use a smaller model or --max-length" + (", or --device cpu" if device.type != "cpu" else "")
        raise InputError(str(device), "has too little memory left for this model", mend) from None
