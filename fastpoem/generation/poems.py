"""From a folder and a prompt to poems. transformers is not needed for it, whose import alone takes longer than a poem."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastpoem import signals
from fastpoem.errors import InputError
from fastpoem.generation.config import GenerateConfig


def sample(model: str | Path, prompt: str | Sequence[str] = "", **options: object) -> list[str]:
    """`count` poems that begin with `prompt`, or with each of several. options: the other fields of GenerateConfig. Raises InputError."""
    prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    config = GenerateConfig(model=str(model), prompt=prompts, **options)  # type: ignore[arg-type]
    return [*poems(config.check())]


def poems(config: GenerateConfig, say: Callable[[str], None] | None = None) -> Iterator[str]:
    """The poems that `config` (checked) asks for, as they are written. say: hears what was done to a prompt; by default, stderr.
    Raises InputError."""
    signals.imported("torch")
    import torch

    from fastpoem.corpus.tokenize import PoemTokenizer
    from fastpoem.corpus.tokenizer_files import conversion_of, never_ids
    from fastpoem.engine.precision import choose_device
    from fastpoem.generation.prompt import Reader
    from fastpoem.generation.spell import Speller
    from fastpoem.generation.write import ran_out, write
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
    device = choose_device(config.device, say or _say)
    try:
        model = GPT2(shape).eval()
        hub.load_weights(model, folder)
        model.to(device)
        speller = Speller(tokenizer.library, line_break)
        reader = Reader(model, tokenizer, speller, [*silent], conversion_of(folder), say or _say)
        prompts = [reader(text) for text in config.prompt or ("",)]
        longest = min(config.max_length, shape.n_positions)
        for prompt in prompts:
            if len(prompt.ids) >= longest:
                reason = f"leaves no room within {longest}"
                mend = "shorten it" if longest == shape.n_positions else "shorten it or raise --max-length"
                raise InputError(f"--prompt of {len(prompt.ids) - 1} tokens", reason, mend)
        seed = int(torch.randint(2**62, ())) if config.seed is None else config.seed
        begun = [prompt.ids for prompt in prompts]
        written = write(model, begun, seed, config, end=tokenizer.sep_id, never=sorted(silent), longest=longest)
        for number, ids in enumerate(written):
            prompt = prompts[number // config.count]
            yield speller.poem(prompt.text, prompt.ids[1:], ids)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        mend = "use a smaller model or --max-length" + (", or --device cpu" if device.type != "cpu" else "")
        raise InputError(str(device), "has too little memory left for this model", mend) from None


def _say(line: str) -> None:
    print(f"fastpoem: {line}", file=sys.stderr)
