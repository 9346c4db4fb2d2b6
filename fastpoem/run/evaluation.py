"""What a model makes of poems it is shown, poem by poem, and what the poems are like that it writes itself.

The loss is Hugging Face's: the mean over all tokens after the first, the closing one among them, padding left out. A model that knows only
the ids of its corpus (--vocab corpus) was never taught that the others are unlikely; for one, the loss among the ids it may write stands
beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastpoem.corpus.copied import longest_copied
from fastpoem.corpus.feed import Feed, validation_steps
from fastpoem.corpus.store import TokenStore
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.batch import IGNORE, assemble
from fastpoem.model.gpt2 import GPT2
from fastpoem.poetry.forms import FORMS, form_of
from fastpoem.poetry.verdict import shares
from fastpoem.signals import ask

CHARACTERS = (
    24,
    32,
    48,
    64,
)  # edges of the lengths that are told apart: those of 五绝, 七绝, 五律, 七律, marks included


class Scores(NamedTuple):
    """Of n poems, in the order of their rows: sums over a poem's targets. `loss` in nats, `narrow` among the ids that may be written."""

    loss: np.ndarray  # (n,) float64
    narrow: np.ndarray  # (n,) float64
    correct: np.ndarray  # (n,) int64
    targets: np.ndarray  # (n,) int64
    unknown: np.ndarray  # (n,) int64: targets that are [UNK]
    unknown_loss: np.ndarray  # (n,) float64: the part of `loss` that is theirs
    outside: np.ndarray  # (n,) int64: targets that may not be written; `narrow` is without them
    breaks: np.ndarray  # (n,) int64: targets that are line breaks

    @property
    def characters(self) -> np.ndarray:
        """(n,) int64: the targets less the closing token and line breaks."""
        return self.targets - 1 - self.breaks


def score(
    model: GPT2,
    store: TokenStore,
    rows: np.ndarray,
    tokenizer: PoemTokenizer,
    device: torch.device,
    untrained: Iterable[int] = (),
    batch: int = 32,
    progress: Callable[[int], None] = lambda poems: None,
) -> Scores:
    """The scores of `rows` (n,) of `store`, in fp32 without dropout. untrained: ids that the model was never taught. progress hears how
    many poems are done. Raises Stopped between two batches."""
    bucket, _ = store.locate(rows)
    order = np.argsort(bucket, kind="stable")  # in which validation_steps takes them
    columns: list[list[Tensor]] = []
    feed, closed = Feed(store, "bucket"), torch.tensor([*untrained], dtype=torch.int64, device=device)
    unknown = IGNORE - 1 if tokenizer.unk_id is None else tokenizer.unk_id
    mark = None if tokenizer.line_break is None else tokenizer.library.token_to_id(tokenizer.line_break)
    done = 0
    for step in validation_steps(store, rows, batch):
        ask()
        sent = feed(step)
        assert sent.source is not None
        made = assemble(sent.source, sent.where, sent.shape, store.pad_id).to(device)
        with torch.no_grad():
            logits = model(made.inputs).float()  # (B * T, V)
        columns.append([part.cpu() for part in _poem_by_poem(logits, made.targets, unknown, closed, mark)])
        done += len(step.index)
        progress(done)
    summed = [torch.cat(parts).numpy()[np.argsort(order)] for parts in zip(*columns, strict=True)]
    return Scores(*summed)


def _poem_by_poem(logits: Tensor, targets: Tensor, unknown: int, closed: Tensor, mark: int | None) -> list[Tensor]:
    """The columns of Scores for a batch: logits (B * T, V) float32, targets (B, T) int64."""
    real = targets != IGNORE  # (B, T)
    flat = targets.flatten()
    lost = functional.cross_entropy(logits, flat, ignore_index=IGNORE, reduction="none").view_as(targets).double()
    right = (logits.argmax(1).view_as(targets) == targets) & real
    strange = targets == unknown
    narrow, outside = lost, torch.zeros_like(real)
    if len(closed):
        outside = torch.isin(targets, closed) & real
        shut = logits.index_fill(1, closed, -torch.inf)
        kept = targets.masked_fill(outside, IGNORE)
        narrow = functional.cross_entropy(shut, kept.flatten(), ignore_index=IGNORE, reduction="none")
        narrow = narrow.view_as(targets).double()
    counted = (right, real, strange)
    per_poem = [lost.sum(1), narrow.sum(1), *(mask.sum(1) for mask in counted)]
    breaks = (targets == (IGNORE - 1 if mark is None else mark)).sum(1)
    return [*per_poem, (lost * strange).sum(1), outside.sum(1), breaks]


def summary(scores: Scores, closed: bool) -> dict[str, Any]:
    """The figures of a set of poems. closed: some ids may not be written."""
    loss, targets, poems = float(scores.loss.sum()), int(scores.targets.sum()), len(scores.loss)
    strange, known = int(scores.unknown.sum()), targets - int(scores.unknown.sum())
    characters = int(scores.characters.sum())
    found: dict[str, Any] = {
        "poems": poems,
        "tokens": targets,
        "loss": loss / targets,
        "perplexity": _exp(loss / targets),
        "accuracy": int(scores.correct.sum()) / targets,
        "loss_per_poem": loss / poems,
        "perplexity_per_character": _exp(loss / characters) if characters else None,
        "unknown_share": strange / targets,
        "loss_without_unknown": (loss - float(scores.unknown_loss.sum())) / known if known else None,
    }
    if closed:
        inside = targets - int(scores.outside.sum())
        found["loss_among_trained"] = float(scores.narrow.sum()) / inside if inside else None
        found["untrained_share"] = 1 - inside / targets
    return found


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None


def by_length(scores: Scores) -> list[dict[str, Any]]:
    """Loss and accuracy of poems of like length, in characters."""
    characters = scores.characters
    edges = [0, *CHARACTERS, int(max(characters.max(), CHARACTERS[-1] + 1))]
    groups = []
    for low, high in itertools.pairwise(edges):
        name = f"{low + 1} to {high}" if low else f"up to {high}"
        groups.append((name if high != edges[-1] else f"over {low}", (characters > low) & (characters <= high)))
    return _groups(scores, groups)


def by_form(scores: Scores, poems: Iterable[str]) -> list[dict[str, Any]]:
    """The same of poems in each form, and of the others. poems: their texts, in the order of the scores."""
    forms = np.array([form_of(poem) or "other" for poem in poems])
    return _groups(scores, [(name, forms == name) for name in (*FORMS, "other")])


def _groups(scores: Scores, groups: Iterable[tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
    found = []
    for name, mine in groups:
        if mine.any():
            targets = int(scores.targets[mine].sum())
            loss, right = float(scores.loss[mine].sum()) / targets, int(scores.correct[mine].sum()) / targets
            found.append({"name": name, "poems": int(mine.sum()), "loss": loss, "accuracy": right})
    return found


def frequencies_only(store: TokenStore, rows: np.ndarray) -> float:
    """The least loss that a model could have which knows how often each id comes, and nothing else: their entropy, in nats a token."""
    counts: np.ndarray = np.zeros(store.vocab_size, np.int64)
    where, index = store.locate(rows)
    for one in np.unique(where).tolist():
        bucket, mine = store.buckets[one], index[where == one]
        for begin in range(0, len(mine), 4096):
            part = mine[begin : begin + 4096]
            real = np.arange(1, bucket.length) < bucket.lengths[part][:, None]
            counts += np.bincount(bucket.tokens[part][:, 1:][real], minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def written(poems: list[str], tokenizer: PoemTokenizer, known: TokenStore) -> dict[str, Any]:
    """What poems of the model's own are like: forms, rhymes, repetition, and how much of them stands in `known`."""
    told = shares(poems)
    mark = tokenizer.line_break or ""
    texts = [poem.replace("\n", mark) for poem in poems]
    ids = [np.array(tokenizer.library.encode(text, add_special_tokens=False).ids) for text in texts]
    copied = longest_copied(known, ids)
    whole = copied == np.array([len(one) for one in ids])
    return {
        "poems": told.poems,
        "in_form": told.in_form,
        "forms": told.forms,
        "rhyming": told.rhyming,
        "regulated": told.regulated,
        "repeating": sum(map(_repeats, poems)) / max(len(poems), 1),
        "distinct": len({*poems}) / max(len(poems), 1),
        "copied_whole": int((whole & (copied > 0)).sum()),
        "longest_copied": int(copied.max(initial=0)),
        "median_copied": float(np.median(copied)) if len(copied) else 0.0,
    }


def _repeats(poem: str) -> bool:
    """Does a run of four characters come twice in it?"""
    bare = "".join(poem.split())
    runs = [bare[at : at + 4] for at in range(len(bare) - 3)]
    return len({*runs}) < len(runs)
