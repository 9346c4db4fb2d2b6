"""The poems that a model is evaluated on: all of a text, those that training would hold out of it, or those that a run was validated on.

A run's are found with its own tokenizer, as copies are told by their ids, and are then the same poems for any model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastpoem.config import TrainConfig, saved_settings
from fastpoem.corpus.hold_out import hold_out, one_of_each
from fastpoem.corpus.source import ours
from fastpoem.corpus.store import TokenStore, cached_store, is_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError, say
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.paths import given_path, user_cache
from fastpoem.run.given import named
from fastpoem.run.trained import model_of


class Poems(NamedTuple):
    """`rows` (n,) sorted int64 of `store`, whose text is `data`. held_out: of the text, not all of it."""

    store: TokenStore
    rows: np.ndarray
    data: tuple[str, ...]
    held_out: bool


class Reader(NamedTuple):
    """Opens texts for a model, by its tokenizer and no longer than it is. cache: as --cache-dir. say: hears what was made or found."""

    tokenizer: PoemTokenizer
    shape: GPT2Config
    cache: str | None
    say: Any = say

    def store(self, config: TrainConfig, data: tuple[str, ...]) -> TokenStore:
        """The token store of `data`, read as `config` says. Raises InputError."""
        source, tokenizer, longest = named(config, data, "--data"), self.tokenizer, self.shape.n_positions
        if is_store(source.paths[0]):
            store = TokenStore.open(source.paths[0])
            store.verify()
        else:
            cache = self.cache or config.cache_dir
            folder = Path(cache).expanduser() if cache else None
            store = cached_store(
                dataclasses.replace(source, line_break=tokenizer.line_break),
                tokenizer,
                cache_dir=user_cache() if folder is None and data == BUNDLED else folder,
                max_length=min(config.max_length or 512, longest),
                buckets=config.buckets or 32,
                say=self.say,
            )
        if (store.fingerprint, store.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
            raise InputError(store.path, "was made with another tokenizer", "give the text itself as --data")
        if store.buckets[-1].length > longest or tokenizer.vocab_size > self.shape.vocab_size:
            mend = "give the text itself as --data, and the model's own folder"
            raise InputError(store.path, "does not fit the model", mend)
        return store


BUNDLED = (str(hub.BUNDLED / "poems.txt"),)  # what a run without --data was trained on


def run_in(data: tuple[str, ...], flags: Mapping[str, Any]) -> Path | None:
    """The run whose folder `data` is, None where it is a text. flags: of them a run knows better, and none may be given. Raises InputError."""
    runs = [path for path in (given_path("--data", one) for one in data) if _is_run(path)]
    if runs and len(data) > 1:
        raise InputError(runs[0], "is a run, which stands alone", "give --data texts, or one run")
    for flag, value in flags.items():
        if runs and value is not None:
            raise InputError(f"{flag} {value}", f"{runs[0]} has its own", "drop it, or name the text itself as --data")
    return runs[0] if runs else None


def of_text(config: TrainConfig, reader: Reader) -> Poems:
    """All of `config.data`; with `val_poems`, those that training as `config` says would hold out. Raises InputError."""
    store = reader.store(config, config.data)
    if config.val_poems is None:
        return Poems(store, np.arange(store.rows), config.data, held_out=False)
    rows = hold_out(store, config.val_poems, config.seed).validation
    if not len(rows):
        reason = f"training holds nothing out of {store.rows:,} poems: 5% with their copies are the most"
        raise InputError(f"--val-poems {config.val_poems}", reason, "drop it")
    return Poems(store, rows, config.data, held_out=True)


def of_run(run: Path, reader: Reader) -> Poems:
    """Those that the run was validated on, for the model of `reader`. Raises InputError."""
    config, identity = _told_by(run)
    if config is None:
        raise InputError(run, "holds no config.json that says what it was trained on", "name the text itself as --data")
    model = model_of(run)
    own = reader._replace(tokenizer=PoemTokenizer.load(model), shape=hub.read_config(model)[0], say=lambda line: None)
    data = config.data or BUNDLED
    store = own.store(config, data)
    if store.identity != identity:
        reason = f"is not as it was when {run} was trained on it"
        raise InputError(data[0], reason, "bring it back, or hold poems out of it as it is: --data TEXT --val-poems N")
    if config.val_data:
        data = config.val_data
        store = own.store(config, data)
        rows = one_of_each(store)
    else:
        rows = hold_out(store, config.val_poems, config.seed, dedup=config.dedup).validation
    if not len(rows):
        raise InputError(
            run, "held no poems out", "name poems with --data, or hold some out: --data TEXT --val-poems N"
        )
    theirs = reader.store(config, data)
    if theirs.rows != store.rows:
        raise InputError(
            data[0], f"is {theirs.rows:,} poems for this model and {store.rows:,} for {run}", "name a text"
        )
    return Poems(theirs, rows, data, held_out=not config.val_data)


def run_of(model: str) -> Path | None:
    """The run that `model` is, or is the model or a checkpoint of."""
    folder = Path(model).expanduser()
    return next((one for one in (folder, *folder.parents[:2]) if _is_run(one)), None) if folder.exists() else None


def seen(run: Path | None, poems: Poems) -> bool:
    """Whether `run` was trained on some of these poems."""
    with suppress(InputError):
        config, identity = _told_by(run) if run is not None else (None, None)
        if config is not None and identity == poems.store.identity:
            count = 0 if config.val_data else config.val_poems
            held = hold_out(poems.store, count, config.seed, dedup=config.dedup)
            return bool(len(np.setdiff1d(poems.rows, held.left_out)))
    return False


def _is_run(path: Path) -> bool:
    with suppress(OSError):  # of what may not be searched others say why
        return ours(path) == "run"
    return False


def _told_by(run: Path) -> tuple[TrainConfig | None, str | None]:
    """Settings and token store of a run, as its config.json has them. Raises InputError."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        identity = json.loads((run / "config.json").read_text(encoding="utf-8"))["store"]["identity"]
        if (settings := saved_settings(run)) is not None:
            return TrainConfig(**settings), identity
    return None, None
