"""Poems, batch after batch: memory is bounded by the batch, and what is written can be read at once.

The poems of a batch are all at the same position. A prompt that is longer than others is not set before them: where it has a token, that
token is taken instead of a drawn one. So every token has the position that it would have alone, and nothing is masked. Poems that have
ended leave their batch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastpoem.generation.choose import candidates, draw, likeliest, numbers_of, penalised
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.constrain import Constraint
from fastpoem.model.cached import Cache, bytes_a_poem
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.signals import ask

BATCH_BYTES = 256 << 20
MOST_AT_ONCE = 32  # products of more rows are hardly faster, and the first poem would be longer in coming
LEAVE = 0.25  # of a batch that has ended, before the rest is copied together


def at_once(shape: GPT2Config, longest: int) -> int:
    """How many poems of at most `longest` tokens are written in one batch."""
    return max(1, min(MOST_AT_ONCE, BATCH_BYTES // bytes_a_poem(shape, longest)))


def write(
    model: GPT2,
    begun: Sequence[Sequence[int]],
    seed: int,
    config: GenerateConfig,
    *,
    end: int,
    never: Sequence[int],
    longest: int,
    constraint: Constraint | None = None,
) -> Iterator[list[int]]:
    """`config.count` poems of each beginning, in order: the ids that follow it, without `end`.

    begun: ids that poems begin with, each no longer than `longest`. never: ids that are not written. constraint: what a form allows, instead
    of `never`. Raises RuntimeError or MemoryError where memory is too short for a single poem.
    """
    each = config.count if config.temperature else 1
    rows, done, last = at_once(model.config, longest), 0, each * len(begun)
    while done < last:
        batch = range(done, min(done + rows, last))
        begins = [begun[poem // each] for poem in batch]
        try:
            numbers = _numbers(seed, batch, longest)
            *_, out = _go_on(model, begins, numbers, config, end, never, longest, constraint)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not ran_out(error):
                raise
            rows //= 2
            continue
        done = batch.stop
        for ids, row in zip(begins, out.tolist(), strict=True):
            yield from itertools.repeat(_until(end, row[len(ids) :]), config.count // each)  # without chance


def growing(
    model: GPT2,
    begun: Sequence[Sequence[int]],
    seed: int,
    config: GenerateConfig,
    *,
    end: int,
    never: Sequence[int],
    longest: int,
    constraint: Constraint | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """The poems of `write` one after another, each again with every token it gets: (its number, the ids so far)."""
    each = config.count if config.temperature else 1
    for poem, ids in enumerate(begun[poem // each] for poem in range(each * len(begun))):
        written: list[int] = []
        numbers = _numbers(seed, range(poem, poem + 1), longest)
        for out in _go_on(model, [ids], numbers, config, end, never, longest, constraint):
            written = _until(end, out[0, len(ids) :].tolist())
            yield poem * (config.count // each), written
        for again in range(1, config.count // each):
            yield poem * (config.count // each) + again, written


def ran_out(error: BaseException) -> bool:
    """Whether this is memory that ran out, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|ALLOC_FAILED|can't allocate", str(error)))


def _numbers(seed: int, poems: range, longest: int) -> Tensor:
    """(B, longest) float64: what the poems' tokens are drawn with at each position."""
    return torch.stack([numbers_of(seed, poem, longest) for poem in poems])


@torch.inference_mode()
def _go_on(
    model: GPT2,
    begun: Sequence[Sequence[int]],
    numbers: Tensor,
    config: GenerateConfig,
    end: int,
    never: Sequence[int],
    longest: int,
    constraint: Constraint | None,
) -> Iterator[Tensor]:
    """The poems that begin with `begun`, (B, longest) int64 and -1 where nothing is written: as they begin, then with each token more, the
    same tensor each time. What follows `end` has no meaning. numbers: (B, longest) float64, what is drawn with."""
    device, shortest = model.transformer.wte.weight.device, min(map(len, begun))
    filled = [[*ids, *[-1] * (longest - len(ids))] for ids in begun]
    given = torch.tensor(filled, device=device)  # (B, longest), -1 where the model writes
    out, numbers = given.clone(), numbers.to(device)
    silent = torch.tensor([*never] if constraint is None else [], dtype=torch.int64, device=device)
    yield out
    if shortest == longest:
        return
    cache = Cache(model, len(begun), longest)
    logits = cache.advance(given[:, :shortest])  # (B, V)
    here = torch.arange(len(begun), device=device)  # poems in the batch
    going = torch.ones(len(begun), dtype=torch.bool, device=device)  # those of them that have not ended
    for position in range(shortest, longest):
        ask()
        if config.repetition_penalty != 1:
            logits = penalised(logits, out[here, :position], config.repetition_penalty)
        if constraint is not None:
            logits = constraint(out[here, 1:position], logits)
        if config.temperature:
            chosen = draw(*candidates(logits, config, silent), numbers[here, position])
        else:
            chosen = likeliest(logits, silent)
        there = given[here, position]
        chosen = torch.where(there < 0, chosen, there)  # (B,)
        out[here, position] = torch.where(going, chosen, end)
        yield out
        going &= (chosen != end) | (there >= 0)
        left = int(going.sum())
        if left == 0 or position + 1 == longest:
            break
        if left <= (1 - LEAVE) * len(here):
            stay = going.nonzero().squeeze(1)
            cache.keep(stay)
            here, going, chosen = here[stay], going[stay], chosen[stay]
        logits = cache.advance(chosen[:, None])


def _until(end: int, ids: list[int]) -> list[int]:
    stops = (place for place, one in enumerate(ids) if one in (end, -1))
    return ids[: next(stops, len(ids))]
