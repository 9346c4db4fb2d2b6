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
from fastpoem.corpus.grow import grown, lacking
from fastpoem.corpus.plan import BucketOrder, Order, TextOrder, held_out_rows
from fastpoem.corpus.read import read_blocks, source_files
from fastpoem.corpus.store import TokenStore, cached_store, is_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.vocabulary import kept_ids
from fastpoem.errors import InputError
from fastpoem.generation.prompt import read
from fastpoem.model import hub
from fastpoem.model.find import resolve_folder
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.paths import given_path, user_cache
from fastpoem.run import checkpoint
from fastpoem.run.metrics import Voice


class Given(NamedTuple):
    model_folder: Path
    hub_name: str | None  # None: a folder of the user's
    shape: GPT2Config  # with the dropout that was asked for
    raw_config: dict[str, Any]  # the model's config.json
    rows: int  # of the embedding in the model's weights
    fresh: range  # ids that the model's weights have no rows for: they are drawn
    tokenizer: PoemTokenizer
    store: TokenStore
    held: np.ndarray  # rows held out for validation, sorted int64
    order: Order
    ids: np.ndarray | None  # those that --vocab corpus trains, (K,) ascending; None: all


def take(config: TrainConfig, voice: Voice) -> Given:
    """Open everything that `config` names. Raises InputError."""
    source = Path(config.data[0]).expanduser() if config.data else hub.BUNDLED / "poems.txt"
    if not is_store(source):
        source_files(source)  # raises for what is not there
    name = config.model or (HUB_MODEL if config.data else str(hub.BUNDLED / "model"))
    model_folder = resolve_folder(name, weights=not config.from_scratch)
    hub_name = None if model_folder == given_path("--model", name) else name
    shape, raw_config = hub.read_config(model_folder)
    if config.dropout is not None:
        shape = dataclasses.replace(
            shape, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout
        )
    tokenizer, rows = PoemTokenizer.load(model_folder), shape.vocab_size
    if tokenizer.vocab_size > rows and not config.from_scratch and not config.grow_vocab:
        reason = f"its tokenizer has {tokenizer.vocab_size} ids, its embedding {rows}"
        mend = "use a tokenizer and a model that belong together, or draw rows for the others with --grow-vocab"
        raise InputError(model_folder, reason, mend)
    goes_on = config.resume and config.out is not None and bool(checkpoint.listed(Path(config.out).expanduser()))
    if not config.from_scratch and not goes_on:  # before the text is read, which may take minutes
        hub.refuse_too_large(shape, model_folder, 28, "to train")
        hub.check_weights(shape, model_folder)
    known = min(rows, tokenizer.vocab_size)
    if config.grow_vocab:
        tokenizer = _grown(config, source, tokenizer, voice)
    fresh = range(known, tokenizer.vocab_size)
    shape = dataclasses.replace(shape, vocab_size=max(rows, tokenizer.vocab_size))

    if config.sample is not None:
        tokens = len(read(tokenizer, config.sample))  # as generate counts them
        if tokens >= min(128, shape.n_positions):
            raise InputError("--sample", f"{tokens} tokens leave no room for a poem", "give its first characters")
    store = _open_store(config, source, tokenizer, shape, voice)
    for line in _lost(store):
        voice.say(line)
    held = held_out_rows(store.rows, config.val_poems, config.seed)
    try:
        order = _order(config, store, held)
    except InputError as error:
        raise InputError(source, f"{error.thing}, {error.reason}", error.mend) from None
    ids = _ids(config, store, tokenizer, shape.vocab_size, voice) if config.vocab == "corpus" else None
    return Given(model_folder, hub_name, shape, raw_config, rows, fresh, tokenizer, store, held, order, ids)


def _grown(config: TrainConfig, source: Path, tokenizer: PoemTokenizer, voice: Voice) -> PoemTokenizer:
    """`tokenizer` with ids for the characters of the text that it lacks: the same ones whenever it is asked about the same text."""
    if is_store(source):
        if TokenStore.open(source).manifest["counts"]["unknown"]:
            raise InputError(
                "--grow-vocab", f"{source} holds ids and no text any more", "give the text itself as --data"
            )
        return tokenizer
    chars = lacking(tokenizer, read_blocks(source, convert=None if config.convert == "none" else config.convert))
    if not chars:
        voice.say("--grow-vocab: the vocabulary lacks no character of the text")
        return tokenizer
    found = grown(tokenizer, chars)
    shown = f"{' '.join(chars[:12])}{' …' if len(chars) > 12 else ''}"
    added = found.vocab_size - tokenizer.vocab_size
    voice.say(f"--grow-vocab: {added:,} characters that the vocabulary lacks get ids and rows: {shown}")
    return found


def _lost(store: TokenStore) -> Iterator[str]:
    """What of the text is not trained on, a line each: poems that were cut, and [UNK] where it is more than a token in a hundred."""
    counts = store.manifest["counts"]
    if counts["truncated"]:
        yield f"poems that were cut to {store.max_length} tokens: {counts['truncated']:,}"
    if counts["unknown"] > 0.01 * counts["tokens"]:
        often = " ".join(text for text, _ in store.manifest["unknown"][:8])
        share = f"{counts['unknown'] / counts['tokens']:.1%} of the tokens are [UNK]"
        yield f"{share}, characters that the vocabulary lacks: {often} …; --grow-vocab adds them"


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
        buckets=config.buckets,
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


def _order(config: TrainConfig, store: TokenStore, held: np.ndarray) -> Order:
    lengths = [bucket.length for bucket in store.buckets]
    if config.batching == "bucket" and config.shuffle:
        where, index = store.locate(held)
        held_by_bucket = [np.sort(index[where == bucket]) for bucket in range(len(lengths))]
        rows = [bucket.rows for bucket in store.buckets]
        return BucketOrder(lengths, rows, held_by_bucket, config.batch_size, config.seed)
    seed = config.seed if config.shuffle else None
    return TextOrder(lengths, store.rows, store.locate, held, config.batch_size, seed)
