"""`python -m fastpoem.prepare --data SRC --model M --out STORE`: a text to a token store, and what is in it."""

from dataclasses import dataclass

from rich.console import Console

from fastpoem.cli import parse, run_command
from fastpoem.corpus.make import check_goal, check_settings
from fastpoem.corpus.read import source_files
from fastpoem.corpus.store import is_store, prepare_store, summarise
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.model.find import resolve_folder
from fastpoem.paths import given_path


@dataclass(frozen=True)
class PrepareConfig:
    """Tokenize poems into a store that training reads without further work."""

    data: str
    """A text with one poem a line (.txt, .txt.xz, .txt.gz), a .jsonl or .json file, or a chinese-poetry folder."""
    model: str
    """The model whose tokenizer to use: a folder or a Hugging Face name."""
    out: str
    """The folder to make. A store that is there is replaced, anything else is left alone."""
    max_length: int = 512
    """Tokens a poem, [CLS] and [SEP] included; longer ones are cut."""
    buckets: int = 32
    """Into how many lengths the poems are sorted; more buckets, less padding."""
    convert: str = "none"
    """An OpenCC conversion, such as t2s: traditional to simplified characters."""


def main(argv: list[str] | None = None) -> None:
    """Parse, prepare, print the summary."""
    config = parse(PrepareConfig, argv, prog="python -m fastpoem.prepare")
    check_settings(config.max_length, config.buckets)
    source, out = given_path("--data", config.data), given_path("--out", config.out)
    if is_store(source):
        raise InputError(source, "is a token store already", "give it to fastpoem.train as it is")
    source_files(source)
    check_goal(out)
    tokenizer = PoemTokenizer.load(resolve_folder(config.model, weights=False))
    with Console(stderr=True).status("reading") as status:
        store = prepare_store(
            source,
            tokenizer,
            out,
            max_length=config.max_length,
            buckets=config.buckets,
            convert=None if config.convert == "none" else config.convert,
            progress=lambda poems: status.update(f"{poems:,} poems"),
        )
    print(f"store      {out}", *summarise(store), sep="\n")


if __name__ == "__main__":
    run_command(main)
