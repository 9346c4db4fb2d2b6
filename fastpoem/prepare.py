"""`python -m fastpoem.prepare --data SRC --model M --out STORE`: a text to a token store, and what is in it."""

from dataclasses import dataclass, replace
from typing import Literal

from fastpoem import signals
from fastpoem.cli import parse, prog, run_command
from fastpoem.errors import InputError, say
from fastpoem.paths import given_path


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize poems into a store that training reads without further work."""

    data: tuple[str, ...]
    """Poems: text files with one poem a line, .jsonl, .json, .csv or .tsv files (plain, .gz, .xz, .bz2 or .zip), or folders of them.
    Several are one corpus."""
    model: str
    """The model whose tokenizer to use: a folder, a run's folder, or a Hugging Face name."""
    out: str
    """The folder to make. A store that is there is replaced, anything else is left alone."""
    max_length: int = 512
    """Tokens a poem, [CLS] and [SEP] included; longer ones are cut."""
    buckets: int = 32
    """Into how many lengths the poems are sorted; more buckets, less padding."""
    field: str | None = None
    """Column (or key) that holds the poem in .csv, .tsv and JSON. None: content, text, paragraphs and the like are tried."""
    line_break: str | None = None
    """Token that stands for a line break inside a poem, such as [unused1]. None: the model's own, if it has one; otherwise the lines
    of a poem are joined."""
    convert: Literal["none", "t2s", "s2t"] = "none"
    """t2s converts traditional to simplified characters, s2t the other way (needs OpenCC)."""
    clean: bool = False
    """Remove what is not part of a poem where that is safe: spaces inside, HTML entities, notes in brackets."""
    whole: bool = False
    """A poem longer than --max-length is cut after its last whole sentence."""


def main(argv: list[str] | None = None) -> None:
    """Parse, prepare, print the summary."""
    config = parse(PrepareConfig, argv, prog=prog("prepare"))
    signals.imported("rich.console", "numpy", "tokenizers", "fastpoem.corpus.store")
    from rich.console import Console

    from fastpoem.corpus.make import check_goal, check_settings
    from fastpoem.corpus.source import Source, source_files
    from fastpoem.corpus.store import is_store, prepare_store, summarise
    from fastpoem.corpus.tokenize import PoemTokenizer
    from fastpoem.model.find import resolve_folder
    from fastpoem.run.trained import trained_model

    check_settings(config.max_length, config.buckets)
    if not config.data:
        raise InputError("--data", "names no text", "give a path, or several")
    out = given_path("--out", config.out)
    check_goal(out)
    source = Source.given(config.data)
    for path in source.paths:
        if is_store(path):
            raise InputError(path, "is a token store already", "give it to fastpoem.train as it is")
    source_files(source)
    model = trained_model(config.model, say)
    tokenizer = PoemTokenizer.load(resolve_folder(model, weights=False), config.line_break)
    source = replace(
        source,
        field=config.field,
        line_break=tokenizer.line_break,
        convert=None if config.convert == "none" else config.convert,
        clean=config.clean,
        whole=config.whole,
    )
    with Console(stderr=True, force_jupyter=False).status("reading") as status:
        store = prepare_store(
            source,
            tokenizer,
            out,
            max_length=config.max_length,
            buckets=config.buckets,
            progress=lambda poems: status.update(f"{poems:,} poems"),
        )
    print(f"store      {out}", *summarise(store), sep="\n")


if __name__ == "__main__":
    run_command(main)
