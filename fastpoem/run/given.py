"""What the user gave, opened and found to fit together: text, model folder, tokenizer, token store; and the order of training.

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
from fastpoem.corpus.buckets import MANY, different, merged
from fastpoem.corpus.plan import BucketOrder, Order, TextOrder, held_out_rows, whole_steps
from fastpoem.corpus.read import source_files
from fastpoem.corpus.store import TokenStore, cached_store, is_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.vocabulary import kept_ids
from fastpoem.errors import InputError
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
    ids: np.ndarray | None  # those that --vocab corpus trains, (K,) ascending; None: all


def take(config: TrainConfig, voice: Voice) -> Given:
    """Open everything that `config` names. Raises InputError."""
    source = Path(config.data[0]).expanduser() if config.data else hub.BUNDLED / "poems.txt"
    if not is_store(source):
        source_files(source)  # raises for what is not there
    name = config.model or (HUB_MODEL if config.data else str(hub.BUNDLED / "model"))
    model_folder = resolve_folder(name)
    shape, raw_config = hub.read_config(model_folder)
    if config.dropout is not None:
        shape = dataclasses.replace(
            shape, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout
        )
    tokenizer = PoemTokenizer.load(model_folder)
    if tokenizer.vocab_size > shape.vocab_size:
        reason = f"its tokenizer has {tokenizer.vocab_size} ids, its embedding {shape.vocab_size}"
        raise InputError(model_folder, reason, "use a tokenizer and a model that belong together")

    if config.sample is not None:
        tokens = 1 + len(
            tokenizer.library.encode(config.sample, add_special_tokens=False).ids
        )  # as generate counts them
        if tokens >= min(128, shape.n_positions):
            raise InputError("--sample", f"{tokens} tokens leave no room for a poem", "give its first characters")
    store = _open_store(config, source, tokenizer, shape, voice)
    for line in _lost(store):
        voice.say(line)
    held = held_out_rows(store.rows, config.val_poems, config.seed)
    try:
        whole_steps(store.rows - len(held), config.batch_size)
    except InputError as error:
        raise InputError(source, f"{error.thing}, {error.reason}", error.mend) from None
    ids = _ids(config, store, tokenizer, shape.vocab_size, voice) if config.vocab == "corpus" else None
    return Given(model_folder, shape, raw_config, tokenizer, store, held, ids)


def _lost(store: TokenStore) -> Iterator[str]:
    """What of the text is not trained on, a line each: poems that were cut, and [UNK] where it is more than a token in a hundred."""
    counts = store.manifest["counts"]
    if counts["truncated"]:
        yield f"poems that were cut to {store.max_length} tokens: {counts['truncated']:,}"
    if counts["unknown"] > 0.01 * counts["tokens"]:
        often = " ".join(text for text, _ in store.manifest["unknown"][:8])
        yield f"{counts['unknown'] / counts['tokens']:.1%} of the tokens are [UNK], characters that the vocabulary lacks: {often} …"


def _open_store(
    config: TrainConfig, source: Path, tokenizer: PoemTokenizer, shape: GPT2Config, voice: Voice
) -> TokenStore:
    """The token store of the run's text, made if need be."""
    longest = shape.n_positions
    if config.max_length is not None and config.max_length > longest:
        raise InputError(
            f"--max-length {config.max_length}", f"the model has {longest} positions", f"use at most {longest}"
        )
    if is_store(source):
        store = TokenStore.open(source)
        if (store.fingerprint, store.vocab_size) != (tokenizer.fingerprint, tokenizer.vocab_size):
            raise InputError(source, "was made with another tokenizer", "prepare the text again with this --model")
        made = {"max_length": store.max_length, "convert": store.manifest["source"].get("convert") or "none"}
        for name, wanted in (("max_length", config.max_length), ("convert", config.convert)):
            if wanted not in (None, "none", made[name]):
                flag = f"--{name.replace('_', '-')} {wanted}"
                raise InputError(
                    flag, f"the store was prepared with {made[name]}", "prepare the text again, or drop the flag"
                )
        if store.buckets[-1].length > longest:
            reason = f"holds poems of {store.buckets[-1].length} tokens, the model has {longest} positions"
            raise InputError(source, reason, f"prepare the text again with --max-length {longest}")
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
        buckets=config.buckets or 32,
        convert=None if config.convert == "none" else config.convert,
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


def order_of(config: TrainConfig, store: TokenStore, held: np.ndarray) -> Order:
    """The order of training under `config`, whose batching is not auto any more. held: rows that are not trained on, sorted int64."""
    lengths = [bucket.length for bucket in store.buckets]
    if config.batching == "bucket" and config.shuffle:
        where, index = store.locate(held)
        held_by_bucket = [np.sort(index[where == bucket]) for bucket in range(len(lengths))]
        rows = [bucket.rows for bucket in store.buckets]
        ends = None
        if config.buckets is None:
            enough = MANY * config.batch_size * len(rows)
            ends = merged(
                lengths, rows, [different(bucket.tokens, enough) for bucket in store.buckets], config.batch_size
            )
        return BucketOrder(lengths, rows, held_by_bucket, config.batch_size, config.seed, ends)
    seed = config.seed if config.shuffle else None
    return TextOrder(lengths, store.rows, store.locate, held, config.batch_size, seed)
