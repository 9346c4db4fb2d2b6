"""What the user gave, opened and found to fit together: text, model folder, tokenizer, token store, and the order of training.

Nothing here makes or changes the run's folder: what is wrong is said before there is one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastpoem.config import HUB_MODEL, TrainConfig
from fastpoem.corpus.plan import BucketOrder, Order, TextOrder, held_out_rows
from fastpoem.corpus.source import Source, source_files
from fastpoem.corpus.store import TokenStore, cached_store, is_store, odd_in_short
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.vocabulary import kept_ids
from fastpoem.errors import InputError, brief
from fastpoem.model import hub
from fastpoem.model.find import resolve_folder
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.paths import user_cache
from fastpoem.run.metrics import Voice


class Given(NamedTuple):
    model_folder: Path
    shape: GPT2Config  # with the dropout that was asked for
    raw_config: dict[str, Any]  # the model's config.json
    tokenizer: PoemTokenizer
    store: TokenStore
    held: np.ndarray  # rows held out for validation, sorted int64
    order: Order
    ids: np.ndarray | None  # those that --vocab corpus trains, (K,) ascending; None: all


def take(config: TrainConfig, voice: Voice) -> Given:
    """Open everything that `config` names. Raises InputError."""
    source = named(config, config.data or (str(hub.BUNDLED / "poems.txt"),), "--data")
    ready = TokenStore.open(source.paths[0]) if is_store(source.paths[0]) else None
    name = config.model or (HUB_MODEL if config.data else str(hub.BUNDLED / "model"))
    model_folder = resolve_folder(name)
    shape, raw_config = hub.read_config(model_folder)
    if config.dropout is not None:
        shape = dataclasses.replace(
            shape, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout
        )
    kept = config.line_break or (ready.manifest["source"].get("line_break") if ready else None)
    tokenizer = PoemTokenizer.load(model_folder, kept)
    source = dataclasses.replace(source, line_break=tokenizer.line_break)
    _refuse_new_line_break(config, tokenizer, shape)
    if tokenizer.vocab_size > shape.vocab_size:
        reason = f"its tokenizer has {tokenizer.vocab_size} ids, its embedding {shape.vocab_size}"
        raise InputError(model_folder, reason, "use a tokenizer and a model that belong together")

    if config.sample is not None:
        tokens = 1 + len(
            tokenizer.library.encode(config.sample, add_special_tokens=False).ids
        )  # as generate counts them
        if tokens >= min(128, shape.n_positions):
            raise InputError("--sample", f"{tokens} tokens leave no room for a poem", "give its first characters")
    store = _open_store(config, source, ready, tokenizer, shape, voice)
    for line in _lost(store):
        voice.say(line)
    held = held_out_rows(store.rows, config.val_poems, config.seed)
    try:
        order = _order(config, store, held)
    except InputError as error:
        raise InputError(source.shown, f"{error.thing}, {error.reason}", error.mend) from None
    ids = _ids(config, store, tokenizer, shape.vocab_size, voice) if config.vocab == "corpus" else None
    return Given(model_folder, shape, raw_config, tokenizer, store, held, order, ids)


def named(config: TrainConfig, data: tuple[str, ...], flag: str) -> Source:
    """What `data` names, read as `config` says: files, folders and patterns, or one token store. Raises InputError."""
    convert = None if config.convert == "none" else config.convert
    source = Source.given(
        data,
        flag,
        field=config.field,
        line_break=config.line_break,
        convert=convert,
        clean=config.clean,
        whole=config.whole,
    )
    stores = [path for path in source.paths if is_store(path)]
    if stores and len(source.paths) > 1:
        raise InputError(stores[0], "is a token store, which stands alone", f"give {flag} all texts, or one store")
    if not stores:
        source_files(source)  # raises for what is not there
    return source


def _refuse_new_line_break(config: TrainConfig, tokenizer: PoemTokenizer, shape: GPT2Config) -> None:
    """Raises InputError where the token for line breaks is new, and nothing makes room for it in the embedding."""
    token = tokenizer.line_break
    index = None if token is None else tokenizer.library.token_to_id(token)
    if index is not None and index >= shape.vocab_size and not (config.from_scratch or config.grow_vocab):
        free = next((f"[unused{n}]" for n in range(1, 100) if tokenizer.library.token_to_id(f"[unused{n}]")), None)
        mend = (f"use {free}, or " if free else "") + "add --grow-vocab"
        raise InputError(f"--line-break {brief(token, 40)}", "is no token of this model", mend)


def _lost(store: TokenStore) -> Iterator[str]:
    """What a person should know of the text, a line each: how it was read, what does not look like poems, poems that were cut, and [UNK]
    where it is more than a token in a hundred."""
    counts = store.manifest["counts"]
    yield from store.manifest.get("look", {}).get("notes", ())
    if odd := odd_in_short(store):
        yield odd
    if counts["truncated"]:
        yield f"poems that were cut to {store.max_length} tokens: {counts['truncated']:,}"
    if counts["unknown"] > 0.01 * counts["tokens"]:
        often = " ".join(text for text, _ in store.manifest["unknown"][:8])
        yield f"{counts['unknown'] / counts['tokens']:.1%} of the tokens are [UNK], characters that the vocabulary lacks: {often} …"


def _open_store(
    config: TrainConfig,
    source: Source,
    ready: TokenStore | None,
    tokenizer: PoemTokenizer,
    shape: GPT2Config,
    voice: Voice,
) -> TokenStore:
    """The token store of the run's text, made if need be."""
    longest = shape.n_positions
    if config.max_length is not None and config.max_length > longest:
        raise InputError(
            f"--max-length {config.max_length}", f"the model has {longest} positions", f"use at most {longest}"
        )
    if (store := ready) is not None:
        made = {"max_length": store.max_length, **store.manifest["source"]}
        for name in ("max_length", "convert", "field", "line_break", "clean", "whole"):
            wanted, was = getattr(config, name), made.get(name)
            if wanted not in (None, False, "none", was):
                flag = f"--{name.replace('_', '-')} {'' if wanted is True else wanted}".strip()
                how = "without it" if was in (None, False) else f"with {was}"
                raise InputError(flag, f"the store was prepared {how}", "prepare the text again, or drop the flag")
        if (store.fingerprint, store.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
            raise InputError(store.path, "was made with another tokenizer", "prepare the text again with this --model")
        if store.buckets[-1].length > longest:
            reason = f"holds poems of {store.buckets[-1].length} tokens, the model has {longest} positions"
            raise InputError(store.path, reason, f"prepare the text again with --max-length {longest}")
        store.verify()
        return store
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else None
    if not config.data and cache is None:  # not beside the package's own files
        cache = user_cache()
    begin = time.perf_counter()
    store = cached_store(
        source,
        tokenizer,
        cache_dir=cache,
        max_length=config.max_length or min(512, longest),
        buckets=config.buckets,
    )
    voice.say(f"{store.rows:,} poems of {source.name} in {store.path} ({time.perf_counter() - begin:.1f} s)")
    return store


def _ids(config: TrainConfig, store: TokenStore, tokenizer: PoemTokenizer, vocabulary: int, voice: Voice) -> np.ndarray:
    """The ids that --vocab corpus trains, (K,) ascending."""
    special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id]
    ids, occurring = kept_ids(store, (one for one in special if one is not None), vocabulary)
    voice.say(f"{occurring:,} of {vocabulary:,} ids occur: {len(ids):,} are trained, the others keep their weights")
    if config.sample is not None and not np.isin(tokenizer.encode([config.sample], 65535)[0], ids).all():
        voice.say("--sample has characters that no poem has: they are not trained")
    return ids


def _order(config: TrainConfig, store: TokenStore, held: np.ndarray) -> Order:
    lengths = [bucket.length for bucket in store.buckets]
    if config.batching == "bucket" and config.shuffle:
        where, index = store.locate(held)
        held_by_bucket = [np.sort(index[where == bucket]) for bucket in range(len(lengths))]
        rows = [bucket.rows for bucket in store.buckets]
        return BucketOrder(lengths, rows, held_by_bucket, config.batch_size, config.seed)
    seed = config.seed if config.shuffle else None
    return TextOrder(lengths, store.rows, store.locate, held, config.batch_size, seed)
