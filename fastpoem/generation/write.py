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

from fastpoem.generation.choose import candidates, draw, likeliest, numbers_of
from fastpoem.generation.config import GenerateConfig
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
) -> Iterator[list[int]]:
    """`config.count` poems of each beginning, in order: the ids that follow it, without `end`.

    begun: ids that poems begin with, each shorter than `longest`. never: ids that are not written. Raises RuntimeError or MemoryError where
    memory is too short for a single poem.
    """
    each = config.count if config.temperature else 1
    rows, done, last = at_once(model.config, longest), 0, each * len(begun)
    while done < last:
        batch = range(done, min(done + rows, last))
        try:
            numbers = torch.stack([numbers_of(seed, poem, longest) for poem in batch])  # (B, longest)
            written = _go_on(model, [begun[poem // each] for poem in batch], numbers, config, end, never, longest)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not ran_out(error):
                raise
            rows //= 2
            continue
        done = batch.stop
        for poem in written:
            yield from itertools.repeat(poem, config.count // each)  # without chance, all are the same


def ran_out(error: BaseException) -> bool:
    """Whether this is memory that ran out, on a CPU or a GPU."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|ALLOC_FAILED|can't allocate", str(error)))


@torch.inference_mode()
def _go_on(
    model: GPT2,
    begun: Sequence[Sequence[int]],
    numbers: Tensor,
    config: GenerateConfig,
    end: int,
    never: Sequence[int],
    longest: int,
) -> list[list[int]]:
    """What follows each of `begun`, without `end`. numbers: (B, longest) float64, what is drawn with at each position."""
    device, shortest = model.transformer.wte.weight.device, min(map(len, begun))
    filled = [[*ids, *[-1] * (longest - len(ids))] for ids in begun]
    given = torch.tensor(filled, device=device)  # (B, longest), -1 where the model writes
    out, numbers, silent = given.clone(), numbers.to(device), torch.tensor([*never], dtype=torch.int64, device=device)
    cache = Cache(model, len(begun), longest)
    logits = cache.advance(given[:, :shortest])  # (B, V)
    here = torch.arange(len(begun), device=device)  # poems in the batch
    going = torch.ones(len(begun), dtype=torch.bool, device=device)  # those of them that have not ended
    for position in range(shortest, longest):
        ask()
        if config.temperature:
            chosen = draw(*candidates(logits, config, silent), numbers[here, position])
        else:
            chosen = likeliest(logits, silent)
        there = given[here, position]
        chosen = torch.where(there < 0, chosen, there)  # (B,)
        out[here, position] = torch.where(going, chosen, end)
        going &= (chosen != end) | (there >= 0)
        left = int(going.sum())
        if left == 0 or position + 1 == longest:
            break
        if left <= (1 - LEAVE) * len(here):
            stay = going.nonzero().squeeze(1)
            cache.keep(stay)
            here, going, chosen = here[stay], going[stay], chosen[stay]
        logits = cache.advance(chosen[:, None])
    return [_until(end, row[len(ids) :]) for row, ids in zip(out.tolist(), begun, strict=True)]


def _until(end: int, ids: list[int]) -> list[int]:
    stops = (place for place, one in enumerate(ids) if one in (end, -1))
    return ids[: next(stops, len(ids))]
