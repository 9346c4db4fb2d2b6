"""Does the backward pass drop what the forward pass dropped? The directional derivative of the loss against a finite difference of it.

A mask that is drawn again where it is needed again may come out another one: a compiler that uses two forms of a generator, a graph that
reads the generator's state too late. Comparing a compiled or replayed step with itself does not see it, and with dropout off there is
nothing to see. But with the generator put back before each evaluation the loss is a smooth function of the weights, and its gradient is the
step's if and only if both passes had the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from fastpoem_kernels.check import Record

from fastpoem.corpus.feed import Rows
from fastpoem.engine.step import TrainStep

SEEDS = (1, 2, 3)
# By how much the loss is to change, for which the weights are moved half as far either way, and the relative error allowed. Measured: 1e-4 in
# float32, and 0.008 in bfloat16, the loss's rounding. Masks that differ make 0.03 where it is one dropout of several, 0.13 where it is all.
CHANGE = {torch.float32: (0.01, 3e-3), torch.float16: (0.1, 0.03), torch.bfloat16: (0.1, 0.03)}
BETA1 = 0.9  # of the optimizer


def same_masks(step: TrainStep, rows: Sequence[Rows]) -> Record:
    """The gradient of `step`, however it is launched, along itself on each batch of `rows`. Weights and clipping are put back, the moments are not."""
    optimizer = step.optimizer
    change, allowed = CHANGE[optimizer.working.dtype]
    begin, clipped = optimizer.master.clone(), optimizer.max_norm.clone()
    optimizer.max_norm.fill_(math.inf)

    def evaluate(weights: torch.Tensor, batch: Rows, seed: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """(loss, gradient (P,), the weights that computed it (P,)). At a learning rate of 0 the moments tell the gradient: a graph's own is not kept."""
        optimizer.master.copy_(weights)
        for moment in (optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.applied):
            moment.zero_()
        optimizer.reload()
        used = optimizer.working.clone()
        torch.manual_seed(seed)
        step(batch, 0.0)
        return step.account.losses[-1].item(), optimizer.exp_avg / (1 - BETA1), used

    error, drawn = 0.0, True
    for batch in rows:
        claimed, measured, losses = 0.0, 0.0, set[float]()
        for seed in SEEDS:
            loss, gradient, _ = evaluate(begin, batch, seed)
            aside = change / 2 / gradient.square().sum() * gradient
            above, _, right = evaluate(begin + aside, batch, seed)
            below, _, left = evaluate(begin - aside, batch, seed)
            # by the weights as they were rounded
            claimed += gradient.double().dot(right.double() - left.double()).item()
            measured += above - below
            losses.add(loss)
        one = abs(measured / claimed - 1) if claimed else math.inf
        error, drawn = max(error, one if one == one else math.inf), drawn and len(losses) == len(SEEDS)
    optimizer.master.copy_(begin)
    optimizer.reload()
    optimizer.max_norm.copy_(clipped)
    if not drawn:
        return Record("", False, note="dropout drops nothing")
    note = "dropout's masks, by the loss's slope against the gradient"
    return Record("", error <= allowed, error=error, tolerance=allowed, note=note)
