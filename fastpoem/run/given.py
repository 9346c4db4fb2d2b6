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
from fastpoem.corpus.copies import how_many_in
from fastpoem.corpus.given_poems import called
from fastpoem.corpus.grow import grown, lacking
from fastpoem.corpus.hold_out import HeldOut, hold_out, one_of_each
from fastpoem.corpus.plan import BucketOrder, Order, TextOrder, whole_steps
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.source import Source, source_files
from fastpoem.corpus.store import TokenStore, cached_store, is_store, odd_in_short
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.vocabulary import kept_ids
from fastpoem.errors import InputError, brief
from fastpoem.generation.prompt import read
from fastpoem.model import hub
from fastpoem.model.find import resolve_folder
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.paths import given_path, user_cache
from fastpoem.run import checkpoint
from fastpoem.run.console import Voice
from fastpoem.run.trained import trained_model
from fastpoem.run.validate import Validation

UNKNOWN = "{0:.1%} of the tokens are [UNK], characters that the vocabulary lacks: {1} …; --grow-vocab adds them"
NO_VALIDATION = "name a validation set with --val-data, or hold some poems out with --val-poems"


class Given(NamedTuple):
    model_folder: Path
    hub_name: str | None  # None: a folder of the user's
    shape: GPT2Config  # with the dropout that was asked for
    raw_config: dict[str, Any]  # the model's config.json
    rows: int  # of the embedding in the model's weights
    fresh: range  # ids that the model's weights have no rows for: they are drawn
    tokenizer: PoemTokenizer
    store: TokenStore
    held: np.ndarray  # rows that are not trained on, sorted int64: held out, their copies, and with --dedup all copies
    validation: Validation
    ids: np.ndarray | None  # those that --vocab corpus trains, (K,) ascending; None: all


def take(config: TrainConfig, voice: Voice, scratch: Path | None = None) -> Given:
    """Open everything that `config` names. scratch: where to prepare a text that was not prepared before; None: where it is kept. Raises InputError."""
    source = named(config, config.data or (str(hub.BUNDLED / "poems.txt"),), "--data")
    ready = TokenStore.open(source.paths[0]) if is_store(source.paths[0]) else None
    name = config.model or (HUB_MODEL if config.data else str(hub.BUNDLED / "model"))
    name = trained_model(name, lambda line: voice.say("{0}", line))
    model_folder = resolve_folder(name, weights=not config.from_scratch)
    hub_name = None if model_folder == given_path("--model", name) else name
    shape, raw_config = hub.read_config(model_folder)
    if config.shape is not None:
        if not config.from_scratch:
            raise InputError(f"--shape {config.shape}", "is for new weights", "add --from-scratch")
        shape, raw_config = hub.with_shape(config.shape, shape, raw_config)
    if config.dropout is not None:
        shape = dataclasses.replace(
            shape, embd_pdrop=config.dropout, attn_pdrop=config.dropout, resid_pdrop=config.dropout
        )
    kept = config.line_break or (ready.manifest["source"].get("line_break") if ready else None)
    tokenizer, rows = PoemTokenizer.load(model_folder, kept), shape.vocab_size
    source = dataclasses.replace(source, line_break=tokenizer.line_break)
    _refuse_new_line_break(config, tokenizer, shape)
    if tokenizer.vocab_size > rows and not config.from_scratch and not config.grow_vocab:
        reason = f"its tokenizer has {tokenizer.vocab_size} ids, its embedding {rows}"
        mend = "use a tokenizer and a model that belong together, or draw rows for the others with --grow-vocab"
        raise InputError(model_folder, reason, mend)
    goes_on = config.resume and config.out is not None and bool(checkpoint.listed(Path(config.out).expanduser()))
    # Before the text is read, which may take minutes. 4 bytes each: weights, gradient, two moments, and a checkpoint's copies of all but
    # the gradient.
    hub.refuse_too_large(shape, model_folder, 28, "to train")
    if not config.from_scratch and not goes_on:
        hub.check_weights(shape, model_folder)
    known = min(rows, tokenizer.vocab_size)
    if config.grow_vocab:
        tokenizer = _grown(source, ready, tokenizer, voice)
    fresh = range(known, tokenizer.vocab_size)
    shape = dataclasses.replace(shape, vocab_size=max(rows, tokenizer.vocab_size))

    if config.sample is not None:
        tokens = len(read(tokenizer, config.sample))  # as generate counts them
        if tokens >= min(128, shape.n_positions):
            raise InputError("--sample", f"{tokens} tokens leave no room for a poem", "give its first characters")
    store = _open_store(config, source, ready, tokenizer, shape, voice, scratch)
    for said in _lost(store):
        voice.say(*said)
    own = None
    if config.val_data:
        apart = dataclasses.replace(named(config, config.val_data, "--val-data"), line_break=tokenizer.line_break)
        ready = TokenStore.open(apart.paths[0]) if is_store(apart.paths[0]) else None
        own = _open_store(config, apart, ready, tokenizer, shape, voice, scratch)
    with voice.phase("looking for copies of poems"):
        held = hold_out(store, 0 if own else config.val_poems, config.seed, dedup=config.dedup)
        validation = Validation(store, held.validation) if own is None else Validation(own, one_of_each(own), own=True)
    for said in _sides(config, store, held, validation):
        voice.say(*said)
    for flag, asked in (("--best", config.best), ("--patience", config.patience)):
        if asked and not len(validation.rows):
            raise InputError(flag, "it goes by the validation loss, and nothing is held out", NO_VALIDATION)
    try:
        whole_steps(store.rows - len(held.left_out), config.batch_size)
    except InputError as error:
        raise InputError(called(source.paths[0], source.shown), f"{error.thing}, {error.reason}", error.mend) from None
    ids = _ids(config, store, own, tokenizer, shape.vocab_size, voice) if config.vocab == "corpus" else None
    return Given(
        model_folder, hub_name, shape, raw_config, rows, fresh, tokenizer, store, held.left_out, validation, ids
    )


def _grown(source: Source, ready: TokenStore | None, tokenizer: PoemTokenizer, voice: Voice) -> PoemTokenizer:
    """`tokenizer` with ids for the characters of the text that it lacks: the same ones whenever it is asked about the same text."""
    if ready is not None:
        if ready.manifest["counts"]["unknown"]:
            reason = f"{ready.path} holds ids and no text any more"
            raise InputError("--grow-vocab", reason, "give the text itself as --data")
        return tokenizer
    with voice.phase("looking for characters that the vocabulary lacks"):
        chars = lacking(tokenizer, read_blocks(source))
    if not chars:
        voice.say("--grow-vocab: the vocabulary lacks no character of the text")
        return tokenizer
    found = grown(tokenizer, chars)
    shown = f"{' '.join(chars[:12])}{' …' if len(chars) > 12 else ''}"
    added = found.vocab_size - tokenizer.vocab_size
    voice.say(f"--grow-vocab: {len(chars):,} characters that the vocabulary lacks get {added:,} ids and rows: {shown}")
    return found


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
        found = {one: tokenizer.library.token_to_id(one) for one in (f"[unused{n}]" for n in range(1, 100))}
        free = next((one for one, at in found.items() if at is not None and at < shape.vocab_size), None)
        mend = (f"use {free}, or " if free else "") + "add --grow-vocab"
        raise InputError(f"--line-break {brief(token, 40)}", "is no token of this model", mend)


def _lost(store: TokenStore) -> Iterator[tuple[Any, ...]]:
    """What a person should know of the text, a template with its values each: how it was read, what does not look like poems, poems that were cut, and [UNK]
    where it is more than a token in a hundred."""
    counts = store.manifest["counts"]
    for note in store.manifest.get("look", {}).get("notes", ()):
        yield (note,)
    if odd := odd_in_short(store):
        yield (odd,)
    if counts["truncated"]:
        yield "poems that were cut to {0} tokens: {1:,}", store.max_length, counts["truncated"]
    if counts["unknown"] > 0.01 * counts["tokens"]:
        often = " ".join(text for text, _ in store.manifest["unknown"][:8])
        share = counts["unknown"] / counts["tokens"]
        yield UNKNOWN, share, often


def _sides(config: TrainConfig, store: TokenStore, held: HeldOut, validation: Validation) -> Iterator[tuple[Any, ...]]:
    """What is trained on once, twice and not at all, and what is validated on: templates with their values."""
    duplicates = store.manifest["counts"]["duplicates"]
    if config.dedup:
        yield "copies of other poems, not trained on: {0:,}", held.repeats
    elif duplicates:
        yield "copies of other poems: {0:,} (--dedup trains on one of each)", duplicates
    count = len(validation.rows)
    if validation.own:
        names = ", ".join(called(Path(one), one) for one in config.val_data)
        yield "validation on {0:,} poems of {1}", count, names
        if known := how_many_in(store, validation.store, validation.rows):
            yield "of these, {0:,} are in the training text too: on them the loss says nothing of new poems", known
    elif count:
        yield (
            "held out for validation: {0:,} poems" + ", and {1:,} copies of them left out" * bool(held.copies),
            count,
            held.copies,
        )
    elif config.val_poems != 0 and store.rows - held.repeats >= 20:
        yield ("nothing is held out: with its copies, every poem drawn for it is more than 5% of the text",)


def _open_store(
    config: TrainConfig,
    source: Source,
    ready: TokenStore | None,
    tokenizer: PoemTokenizer,
    shape: GPT2Config,
    voice: Voice,
    scratch: Path | None,
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
        with voice.phase("checking {0}", store.path):
            store.verify()
        return store
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else None
    if not config.data and cache is None:  # not beside the package's own files
        cache = user_cache()
    begin = time.perf_counter()
    with voice.phase("reading {0}", called(source.paths[0], source.name)):
        store = cached_store(
            source,
            tokenizer,
            cache_dir=cache,
            make_in=scratch,
            max_length=config.max_length or min(512, longest),
            buckets=config.buckets or 32,
        )
    voice.say(
        "{0:,} poems from {1} (cached in {2}, {3:.1f} s)",
        store.rows,
        called(source.paths[0], source.name),
        store.path,
        time.perf_counter() - begin,
    )
    return store


def _ids(
    config: TrainConfig,
    store: TokenStore,
    own: TokenStore | None,
    tokenizer: PoemTokenizer,
    vocabulary: int,
    voice: Voice,
) -> np.ndarray:
    """The ids that --vocab corpus trains, (K,) ascending."""
    special = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.unk_id]
    others = [own] if own else []
    ids, occurring = kept_ids(store, (one for one in special if one is not None), vocabulary, *others)
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
