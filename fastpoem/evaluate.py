"""`python -m fastpoem.evaluate --model DIR --data SRC`: what a model makes of poems, and what its own are like.

`--json` prints one object: `model`, `data`, `held_out` (whether the poems are those that training holds out of `data`), `poems`, `tokens`,
`loss` (nats a token, Hugging Face's masked loss), `perplexity`, `accuracy`, `loss_per_poem`, `perplexity_per_character`, `unknown_share`, `loss_without_unknown`, `frequencies_only`, `trained_on`, `by_length` and `by_form` (lists of
`name`, `poems`, `loss`, `accuracy`), `written` (null with --count 0).
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastpoem import signals
from fastpoem.cli import parse, prog, run_command
from fastpoem.config import TrainConfig
from fastpoem.errors import InputError, say
from fastpoem.generation.config import GenerateConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Loss and accuracy of a trained model on poems, and how many of its own poems are in form, rhyme, repeat or copy."""

    model: str
    """A run's folder, the folder of a model, or a Hugging Face name."""
    data: tuple[str, ...] = ()
    """Poems, in any form that training takes; several are one set. Or a run's folder: the poems that it was validated on. Without it: those of
    the run that --model is."""
    field: str | None = None
    """Column (or key) that holds the poem in .csv, .tsv and JSON. None: content, text, paragraphs and the like are tried."""
    val_poems: int | None = None
    """Only the poems that training on --data with this --val-poems and --seed holds out for validation. None: all."""
    poems: int | None = None
    """At most so many poems, drawn by --seed. None: all."""
    count: int = 100
    """Poems to write and to look at: forms, rhymes, repetition, and what is copied from --data. 0: none."""
    temperature: float = 1.0
    """Of the poems that are written."""
    top_k: int = 50
    """Of the poems that are written: the likeliest characters to choose among."""
    batch_size: int = 32
    """Poems at a time."""
    seed: int = 0
    """Draws --val-poems as training does, --poems, and the poems that are written."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    cache_dir: str | None = None
    """Where the prepared token store is kept. None: .fastpoem/ beside the text."""
    json: bool = False
    """Print one JSON object and nothing else."""
    lang: Literal["auto", "en", "zh"] = "auto"
    """Language of what is printed. auto: on a terminal that of the locale, in a pipe English."""

    def check(self) -> EvaluateConfig:
        for name, low in (("val_poems", 1), ("poems", 1), ("count", 0), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')} {value}", "out of range", f"use {low} or more")
        GenerateConfig(self.model, count=max(1, self.count), temperature=self.temperature, top_k=self.top_k).check()
        return self


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(EvaluateConfig, argv, prog=prog("evaluate")).check()
    signals.imported("numpy", "torch", "tokenizers", "fastpoem.run.evaluation")  # which take seconds
    report = evaluate(config, say)
    if config.json:
        print(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        show(report, config.lang)
    return 0


def evaluate(config: EvaluateConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """The report, as `--json` has it. Raises InputError."""
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from fastpoem.corpus.source import Source
    from fastpoem.corpus.tokenize import PoemTokenizer
    from fastpoem.corpus.tokenizer_files import never_ids
    from fastpoem.engine.compile import keep_caches_in
    from fastpoem.engine.precision import choose_device
    from fastpoem.generation.poems import sample
    from fastpoem.generation.spell import Speller
    from fastpoem.model import hub
    from fastpoem.model.find import resolve_folder
    from fastpoem.model.gpt2 import GPT2
    from fastpoem.model.vocabulary import never_written
    from fastpoem.run import evaluated, evaluation
    from fastpoem.run.given import named
    from fastpoem.run.trained import trained_model

    keep_caches_in(config.cache_dir)
    mine = evaluated.run_of(config.model)
    data = config.data or ((str(mine),) if mine is not None else ())
    if not data:
        raise InputError("--data", f"must be given: {config.model} is no run", "name poems, or the folder of a run")
    run = evaluated.run_in(data, {"--field": config.field, "--val-poems": config.val_poems})
    text = TrainConfig(data=data, field=config.field, val_poems=config.val_poems, seed=config.seed)
    if run is None:
        named(text, data, "--data")  # raises for what is not there
    folder = resolve_folder(trained_model(config.model, say))
    shape, _ = hub.read_config(folder)
    hub.refuse_too_large(shape, folder, 8, "to load")
    tokenizer = PoemTokenizer.load(folder)
    reader = evaluated.Reader(tokenizer, shape, config.cache_dir, say)
    asked = evaluated.of_text(text, reader) if run is None else evaluated.of_run(run, reader)
    store, rows = asked.store, asked.rows
    device = choose_device(config.device, say)
    model = GPT2(shape).eval()
    hub.load_weights(model, folder)
    model.to(device)
    if config.poems is not None and config.poems < len(rows):
        rows = np.sort(np.random.default_rng(config.seed).choice(rows, config.poems, replace=False))
    untrained = {*never_written(folder, shape.vocab_size)} - never_ids(tokenizer, shape.vocab_size)
    with Progress(transient=True, console=Console(stderr=True, force_jupyter=False)) as progress:
        task = progress.add_task("evaluating", total=len(rows))
        scores = evaluation.score(
            model, store, rows, tokenizer, device, untrained, config.batch_size,
            lambda poems: progress.update(task, completed=poems),
        )  # fmt: skip
    del model
    line_break = None if tokenizer.line_break is None else tokenizer.library.token_to_id(tokenizer.line_break)
    speller = Speller(tokenizer.library, line_break)
    frame = {tokenizer.cls_id, tokenizer.sep_id}
    texts = (speller.text([one for one in store[row].tolist() if one not in frame]) for row in rows.tolist())
    report: dict[str, Any] = {"model": str(folder), "data": [*map(str, Source.given(asked.data).paths)]}
    report["held_out"] = asked.held_out
    report |= evaluation.summary(scores, bool(untrained))
    report |= {
        "frequencies_only": evaluation.frequencies_only(store, rows),
        "by_length": evaluation.by_length(scores),
        "by_form": evaluation.by_form(scores, texts),
        "trained_on": evaluated.seen(mine, asked._replace(rows=rows)),
        "written": None,
    }
    if config.count:
        own = sample(
            folder,
            count=config.count,
            seed=config.seed,
            temperature=config.temperature,
            top_k=config.top_k,
            device=str(device),
        )
        report["written"] = evaluation.written(own, tokenizer, store)
    return report


def show(report: dict[str, Any], lang: str = "en") -> None:
    """The report for a person."""
    from rich.cells import set_cell_size
    from rich.console import Console
    from rich.table import Table

    from fastpoem.run.words import language, put

    console = Console(highlight=False)
    word = functools.partial(put, language(lang, sys.stdout.isatty()))
    line = lambda name, value: f"{set_cell_size(word(name), 24)} {value}"
    console.print(word("{0:,} poems, {1:,} tokens", report["poems"], report["tokens"]), markup=False)
    if report["held_out"]:
        console.print(word("held out of {0}", " ".join(report["data"])), markup=False, soft_wrap=True)
    if report["trained_on"]:
        console.print(word("the model was trained on this text: on new poems its loss is higher"), markup=False)
    console.print()
    console.print(line("loss", f"{report['loss']:.4f}"), style="bold", markup=False)
    lines = [
        ("perplexity per token", f"{report['perplexity']:.1f}"),
        ("perplexity per character", _number(report["perplexity_per_character"], 1)),
        ("accuracy", f"{report['accuracy']:.1%}"),
        ("loss per poem", f"{report['loss_per_poem']:.1f}"),
        ("[UNK] among the tokens", f"{report['unknown_share']:.2%}"),
        ("loss without [UNK]", _number(report["loss_without_unknown"])),
        ("frequencies alone", f"{report['frequencies_only']:.4f}"),
    ]
    if "loss_among_trained" in report:
        lines.append(("loss among trained ids", _number(report["loss_among_trained"])))
    for name, value in lines:
        console.print(line(name, value), markup=False)
    for title, key in (("characters", "by_length"), ("form", "by_form")):
        table = Table(box=None, pad_edge=False, title_justify="left")
        for name in (title, "poems", "loss", "accuracy"):
            table.add_column(word(name), justify="left" if name == title else "right", min_width=10)
        for row in report[key]:
            table.add_row(
                _group(row["name"], word), f"{row['poems']:,}", f"{row['loss']:.4f}", f"{row['accuracy']:.1%}"
            )
        console.print("", table)
    if (own := report["written"]) is not None:
        said = [
            ("in a form", f"{own['in_form']:.0%}  {' '.join(f'{k} {n}' for k, n in own['forms'].items())}"),
            ("rhyming", f"{own['rhyming']:.0%}"),
            ("tones right, in a form", f"{own['regulated']:.0%}"),
            ("with a run of 4 twice", f"{own['repeating']:.0%}"),
            ("different poems", f"{own['distinct']:.0%}"),
            (
                "longest run copied",
                word(
                    "{0} tokens, {1:.0f} in the median; {2} poems whole",
                    own["longest_copied"],
                    own["median_copied"],
                    own["copied_whole"],
                ),
            ),
        ]
        console.print("\n" + word("of {0} poems written by the model", own["poems"]), markup=False)
        for name, value in said:
            console.print(line(name, value), markup=False)


def _group(name: str, word: Callable[..., str]) -> str:
    """The name of a group of by_length or by_form, such as "25 to 32" and "other", in the language of `word`."""
    numbers = [int(part) for part in name.split() if part.isdigit()]
    for template in ("{0} to {1}", "up to {0}", "over {0}"):
        if numbers and template.count("{") == len(numbers) and template.format(*numbers) == name:
            return word(template, *numbers)
    return word(name)


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    run_command(main)
