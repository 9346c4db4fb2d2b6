"""`python -m fastpoem.generate`: poems from a trained model, through Hugging Face's `generate`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpoem import signals
from fastpoem.cli import parse, run_command
from fastpoem.config import NO_POEM
from fastpoem.errors import InputError


@dataclass(frozen=True)
class GenerateConfig:
    """Write poems with a trained model."""

    model: str
    """Folder of the model (RUN/model), or a Hugging Face name."""
    prompt: str = ""
    """How the poem begins."""
    count: int = 1
    """Poems to write."""
    max_length: int = 128
    """Longest poem in tokens, the prompt included."""
    temperature: float = 1.0
    """Below 1 is safer, above 1 bolder; 0 always takes the likeliest character."""
    top_k: int = 50
    """Choose among the k likeliest characters; 0 among all."""
    top_p: float = 1.0
    """Choose among the likeliest characters that together have this probability."""
    seed: int | None = None
    """Same seed, same poems."""
    device: str = "cpu"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> GenerateConfig:
        rules = (
            ("count", 1 <= self.count <= 10_000, "use 1 to 10000"),
            ("max_length", self.max_length >= 3, "use 3 or more"),
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature < float("inf"),
                "use 0, or 0.001 and more",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "use 0 to 9223372036854775807"),
            ("prompt", not NO_POEM.search(self.prompt), "use characters of UTF-8 on one line"),
            ("top_k", self.top_k >= 0, "use 0 or more"),
            ("top_p", 0 < self.top_p <= 1, "use more than 0, at most 1"),
        )
        for name, fine, mend in rules:
            if not fine:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}", "out of range", mend)
        return self


def sample(model: str | Path, prompt: str = "", **options: object) -> list[str]:
    """`count` poems that begin with `prompt`. options: the other fields of GenerateConfig. Raises InputError."""
    config = GenerateConfig(model=str(model), prompt=prompt, **options).check()  # type: ignore[arg-type]

    from fastpoem.corpus.tokenize import PoemTokenizer
    from fastpoem.engine.precision import choose_device
    from fastpoem.model import hub
    from fastpoem.model.find import resolve_folder
    from fastpoem.model.gpt2 import GPT2
    from fastpoem.model.vocabulary import never_written

    folder = resolve_folder(config.model)
    shape, raw = hub.read_config(folder)
    hub.refuse_too_large(shape, folder, 8, "to load")
    ours = GPT2(shape)
    hub.load_weights(ours, folder)
    never = never_written(folder, shape.vocab_size)
    tokenizer = PoemTokenizer.load(folder)  # training's own, of whatever kind: the ids are those that were learned
    if tokenizer.vocab_size > shape.vocab_size:
        raise InputError(
            folder, "its tokenizer has more ids than its embedding", "name the model folder of a finished run"
        )
    device = choose_device(config.device)

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signals.imported("torch", "transformers")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        # Given both, transformers reads neither config.json nor weights: it would make up what is missing, and follow what steers it.
        special = {"bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id, "pad_token_id": tokenizer.pad_id}
        plain = GPT2Config(**hub.saved_config(raw, shape, special), attn_implementation="sdpa")
        network = GPT2LMHeadModel.from_pretrained(None, config=plain, state_dict=ours.state_dict())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(folder, f"cannot be loaded ({error})", "name the model folder of a finished run") from error
    library, unknown = tokenizer.library, [tokenizer.unk_id]
    ids = library.encode(prompt, add_special_tokens=False).ids
    lacking = [one for one in dict.fromkeys(prompt) if library.encode(one, add_special_tokens=False).ids == unknown]
    if lacking:
        print(f"fastpoem: {prompt}: no poem shows {' '.join(lacking)}, which the vocabulary lacks", file=sys.stderr)
    start = torch.tensor([[tokenizer.cls_id, *ids]], device=device)  # (1, T)
    longest = min(config.max_length, network.config.n_positions)
    if start.shape[1] >= longest:
        raise InputError(
            f"--prompt of {len(ids)} tokens", f"leaves no room within {longest}", "shorten it or raise --max-length"
        )
    choose = {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    if config.seed is not None:
        torch.manual_seed(config.seed)
    out = network.to(device).generate(  # (count, T)
        start,
        attention_mask=torch.ones_like(start),
        max_length=longest,
        num_return_sequences=config.count if config.temperature > 0 else 1,
        suppress_tokens=never or None,
        **(choose if config.temperature > 0 else {"do_sample": False}),
    )
    poems = [_without_gaps(text) for text in library.decode_batch(out.tolist(), skip_special_tokens=True)]
    return poems if config.temperature > 0 else poems * config.count  # without chance, all are the same


def _without_gaps(text: str) -> str:
    """The decoder joins tokens with spaces; between characters that are not both Latin they do not belong."""
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(GenerateConfig, argv, prog="python -m fastpoem.generate").check()
    options = {name: value for name, value in vars(config).items() if name not in ("model", "prompt")}
    for poem in sample(config.model, config.prompt, **options):
        print(poem)
    return 0


if __name__ == "__main__":
    run_command(main)
