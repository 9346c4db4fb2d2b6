"""Cross-entropy on the CPU: few passes over the logits, in their own memory: native.c's where it is there, else in plain vectorised PyTorch.

Without it: `F.cross_entropy`, `argmax` and backward allocate three tensors of the logits' size, much of their time page faults, and `argmax`
does not vectorise: a single maximum is ten times faster, and only rows whose target reaches it need a second look. Float32
logits are overwritten whole; what needs a float32 copy (another dtype, or logits to be left alone) is copied a slice at a time.

Slices that fit the caches would be a fifth faster on an idle machine, and are the wrong choice: every operator ends at a barrier,
and where other processes want the cores a hundred barriers cost seconds. So: few operators, each over as much as there is.
"""

import torch
from torch import Tensor

from fastpoem_kernels import native

SLICE = 24 << 20  # bytes of float32 logits copied at a time; the C allocator keeps what is below 32 MiB between calls


def cross_entropy(
    logits: Tensor,  # (N, V), rows contiguous
    target: Tensor,  # (N,)
    ignore_index: int,
    accuracy_ignore_index: int | None,
    overwrite: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, correct, valid, counted as 0-D tensors; with `overwrite` the logits end as the gradient of the loss, times `scale`."""
    rows, vocabulary = logits.shape
    ignored = target == ignore_index  # (N,)
    index = target.masked_fill(ignored, 0)
    if rows and (index.min() < 0 or index.max() >= vocabulary):
        raise IndexError(f"a target lies outside the vocabulary of {vocabulary}")
    valid = rows - ignored.sum()
    weight = valid.clamp(min=1).float().reciprocal()
    share = weight if scale is None else weight * scale  # what the gradient is multiplied by
    if native.usable(logits):
        losses, hits = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.bool)
        native.run(
            "cross_entropy",
            logits,
            target.contiguous(),
            losses,
            hits,
            rows,
            vocabulary,
            ignore_index,
            share,
            overwrite,
        )
    else:
        losses, hits = _in_pytorch(logits, index, share, overwrite)
        if overwrite:
            logits.index_fill_(0, ignored.nonzero().flatten(), 0)  # a fill, not a product: NaN times 0 is NaN
    loss = losses.masked_fill_(ignored, 0).sum(dtype=torch.float64) * weight.double()
    counts = ~ignored if accuracy_ignore_index is None else ~ignored & (target != accuracy_ignore_index)
    return loss.float(), (hits & counts).sum(), valid, counts.sum()


def _in_pytorch(logits: Tensor, index: Tensor, share: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """Each row's loss (N,) float32, and whether its first largest logit is the one at `index` (N,) bool."""
    rows, vocabulary = logits.shape
    losses = torch.zeros(rows, dtype=torch.float32)
    hits, columns = [False] * rows, index.tolist()
    in_place = overwrite and logits.dtype == torch.float32 and logits.is_contiguous()
    step = max(1, rows if in_place else SLICE // (4 * vocabulary))
    scratch = None if in_place else torch.empty(min(step, rows), vocabulary, dtype=torch.float32)
    for start in range(0, rows, step):
        part, wanted = logits[start : start + step], index[start : start + step, None]  # (n, V), (n, 1)
        work = part if scratch is None else scratch[: len(part)].copy_(part)  # (n, V) float32
        largest = work.amax(1, keepdim=True)  # (n, 1)
        logit = work.gather(1, wanted)  # (n, 1)
        for row in (logit == largest).flatten().nonzero().flatten().tolist():
            before = work[row, : columns[start + row]]
            hits[start + row] = len(before) == 0 or before.max().item() < largest[row].item()
        torch.softmax(work, 1, out=work)
        total = work.sum(1, keepdim=True)  # (n, 1): 1, but for softmax's own sum, which is good to 5e-6 only
        # The largest probability is 1 / sum(exp(logit - largest)), never small: no logarithm of an underflowed target.
        losses[start : start + step] = (largest - logit - (work.amax(1, keepdim=True) / total).log()).flatten()
        if overwrite:
            work.mul_(share / total).scatter_add_(1, wanted, -share.expand_as(wanted))
            if work is not part:
                part.copy_(work)
    return losses, torch.tensor(hits, dtype=torch.bool)
