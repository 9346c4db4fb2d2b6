"""Cross-entropy on the CPU: the logits go through the cache once, a few rows at a time.

A whole-tensor `F.cross_entropy`, `argmax` and backward read or write 21,128 x 1,030 floats some ten times and allocate three
tensors of that size, most of it page faults. Here every pass over a block of rows but the first finds it in the cache, the
gradient takes the place of the logits, and float32 needs no other memory. Plain vectorised PyTorch operators reach about half
of what memory allows and need no compiler; the one that does not vectorise, argmax, is asked only where it can matter.
"""

import torch
from torch import Tensor

CACHE = 1024 * 1024  # bytes of float32 logits a thread works on at a time: within one core's L2


def cross_entropy(
    logits: Tensor,  # (N, V), rows contiguous
    target: Tensor,  # (N,)
    ignore_index: int,
    accuracy_ignore_index: int | None,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, valid, counted as 0-D tensors; with `overwrite` the logits end as the gradient of the loss."""
    rows, vocabulary = logits.shape
    ignored = target == ignore_index  # (N,)
    index = target.masked_fill(ignored, 0)
    if rows and (index.min() < 0 or index.max() >= vocabulary):
        raise IndexError(f"a target lies outside the vocabulary of {vocabulary}")
    valid = rows - ignored.sum()
    weight = valid.clamp(min=1).reciprocal()  # float32
    losses = torch.zeros(rows, dtype=torch.float32)
    hits, columns = [False] * rows, index.tolist()
    step = torch.get_num_threads() * max(1, CACHE // (4 * vocabulary))
    in_place = overwrite and logits.dtype == torch.float32 and logits.is_contiguous()
    scratch = None if in_place else torch.empty(min(step, rows), vocabulary)
    for start in range(0, rows, step):
        block, wanted = logits[start : start + step], index[start : start + step, None]  # (b, V), (b, 1)
        work = block if scratch is None else scratch[: len(block)].copy_(block)  # (b, V) float32
        largest = work.amax(1, keepdim=True)  # (b, 1)
        logit = work.gather(1, wanted)  # (b, 1)
        for row in (logit == largest).flatten().nonzero().flatten().tolist():
            before = work[row, : columns[start + row]]
            hits[start + row] = len(before) == 0 or before.max().item() < largest[row].item()
        torch.softmax(work, 1, out=work)
        # The largest probability is 1 / sum(exp(logit - largest)), never small: no logarithm of an underflowed target.
        losses[start : start + step] = (largest - logit - work.amax(1, keepdim=True).log()).flatten()
        if overwrite:
            work.mul_(weight).scatter_add_(1, wanted, -weight.expand_as(wanted))
            if work is not block:
                block.copy_(work)
    if overwrite:
        logits.index_fill_(0, ignored.nonzero().flatten(), 0)  # a fill, not a product: NaN times 0 is NaN
    loss = losses.masked_fill_(ignored, 0).sum(dtype=torch.float64) * weight.double()
    counts = ~ignored if accuracy_ignore_index is None else ~ignored & (target != accuracy_ignore_index)
    return loss.float(), (torch.tensor(hits, dtype=torch.bool) & counts).sum(), valid, counts.sum()
