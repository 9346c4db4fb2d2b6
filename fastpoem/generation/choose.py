"""Which token comes next: the distribution of Hugging Face's `generate` for temperature, top-k, top-p and suppressed tokens, drawn from
with one number a token.

A poem's numbers are a function of the seed and of which poem it is, and not of who is in its batch: the same seed writes the same poems
in batches of any size (up to the rounding of products of other shapes).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastpoem.generation.config import GenerateConfig


def candidates(logits: Tensor, config: GenerateConfig, never: Tensor) -> tuple[Tensor, Tensor | None]:
    """(scores (B, K), ids (B, K) int64) of the tokens to draw from softmax(scores), -inf at those that top-p leaves out; without ids, all
    tokens in their order.

    logits: (B, V) float32. never: ids that are not written, (N,) int64. The temperature is above 0.
    """
    scores, ids = logits.index_fill(1, never, -torch.inf) / config.temperature, None
    if 0 < config.top_k < scores.shape[1]:
        scores, ids = scores.topk(config.top_k)
    if config.top_p < 1:
        if ids is None:
            scores, ids = scores.sort(descending=True)
        tail = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # the probability of each and all less likely ones
        left_out = tail <= 1 - config.top_p
        left_out[:, 0] = False  # something must be left
        scores = scores.masked_fill(left_out, -torch.inf)
    return scores, ids


def likeliest(logits: Tensor, never: Tensor) -> Tensor:
    """(B,) int64: what is written without chance."""
    return logits.index_fill(1, never, -torch.inf).argmax(-1)


def penalised(logits: Tensor, text: Tensor, penalty: float) -> Tensor:
    """`logits` (B, V), lower by the factor `penalty` for each token that `text` (B, P) int64 holds, as in transformers."""
    seen = logits.gather(1, text)
    return logits.scatter(1, text, torch.where(seen < 0, seen * penalty, seen / penalty))


def draw(scores: Tensor, ids: Tensor | None, numbers: Tensor) -> Tensor:
    """(B,) int64: of each row's candidates the one that its number in [0, 1), (B,) float64, falls on."""
    sums = scores.double().softmax(-1).cumsum(-1)  # (B, K)
    total = sums[:, -1]
    number = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))  # on nobody's zero
    chosen = torch.searchsorted(sums, number[:, None], right=True)  # (B, 1)
    return (chosen if ids is None else ids.gather(1, chosen)).squeeze(1)


def numbers_of(seed: int, poem: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1): what decides the tokens of the poem of this number."""
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, poem])).random(count))
