"""Cross-entropy on CUDA: one program a row, which reads its logits once and writes the gradient over them.

The row stays in registers in its own dtype and is widened where it is used, so 21,128 bfloat16 logits fit one program of 32
warps without spilling; the exponentials are computed twice, which is cheaper than keeping them. Vocabulary and row stride are
compile-time constants: Triton learns alignment only from those, or from multiples of 16, and 21,128 = 8 x 2,641 would otherwise
be moved two bytes at a time. A vocabulary beyond one block is walked twice, with a running maximum and sum.

Two kernels of a single program frame the rows: one counts the targets, because every row's gradient needs 1 / valid, the other
adds the rows' losses in a fixed order. Nothing is asked of the device, and no row leaves an output unwritten.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE_ROW = 32768  # columns one program holds in registers
LOOP_BLOCK = 8192
TARGETS = 1024  # targets the framing kernels take at a time


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
    uncounted = ignore_index if accuracy_ignore_index is None else accuracy_ignore_index
    loss, weight = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    share = weight if scale is None else torch.empty_like(weight)  # what the gradient is multiplied by
    correct, valid, counted = (target.new_empty(()) for _ in range(3))
    losses = logits.new_empty(rows, dtype=torch.float32)
    hits = logits.new_empty(rows, dtype=torch.int32)
    with torch.cuda.device_of(logits):
        count_targets[(1,)](
            target, valid, counted, weight, weight if scale is None else scale, share,
            rows, ignore_index, uncounted, scale is not None, TARGETS, num_warps=4,
        )  # fmt: skip
        if rows:
            kernel, block, warps = row_plan(vocabulary)
            kernel[(rows,)](
                logits, target, share, losses, hits,
                logits.stride(0), vocabulary, block, ignore_index, uncounted, overwrite, num_warps=warps,
            )  # fmt: skip
        add_rows[(1,)](losses, hits, weight, loss, correct, rows, TARGETS, num_warps=4)
    return loss, correct, valid, counted


def scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient (N, V), rows contiguous, times factor, 0-D; programs that find the factor to be 1 end at once."""
    rows, vocabulary = gradient.shape
    if rows:
        with torch.cuda.device_of(gradient):
            scale_unless_one[(rows, triton.cdiv(vocabulary, LOOP_BLOCK))](
                gradient, factor, gradient.stride(0), vocabulary, LOOP_BLOCK, num_warps=8
            )


def row_plan(vocabulary: int):
    """The kernel for rows of this length, its block and its warps."""
    if vocabulary > WHOLE_ROW:
        return looped_row, LOOP_BLOCK, 16
    block = triton.next_power_of_2(vocabulary)
    return whole_row, block, max(1, min(32, block // 1024))


@triton.jit(do_not_specialize=["N"])
def count_targets(
    target, valid, counted, weight, scale, share, N,
    IGNORE: tl.constexpr, UNCOUNTED: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    valid_sum = tl.zeros([BLOCK], tl.int64)
    counted_sum = tl.zeros([BLOCK], tl.int64)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        ids = tl.load(target + rows, mask=rows < N, other=IGNORE)
        valid_sum += (ids != IGNORE).to(tl.int64)
        counted_sum += ((ids != IGNORE) & (ids != UNCOUNTED)).to(tl.int64)
    total = tl.sum(valid_sum, 0)
    tl.store(valid, total)
    tl.store(counted, tl.sum(counted_sum, 0))
    each = 1.0 / tl.maximum(total, 1).to(tl.float32)
    tl.store(weight, each)
    if HAS_SCALE:
        tl.store(share, each * tl.load(scale))


@triton.jit(do_not_specialize=["N"])
def add_rows(losses, hits, weight, loss, correct, N, BLOCK: tl.constexpr):
    loss_sum = tl.zeros([BLOCK], tl.float32)
    hit_sum = tl.zeros([BLOCK], tl.int64)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        loss_sum += tl.load(losses + rows, mask=rows < N, other=0.0)
        hit_sum += tl.load(hits + rows, mask=rows < N, other=0)
    tl.store(loss, tl.sum(loss_sum, 0) * tl.load(weight))
    tl.store(correct, tl.sum(hit_sum, 0))


@triton.jit
def whole_row(
    logits, target, share, losses, hits,
    STRIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    IGNORE: tl.constexpr, UNCOUNTED: tl.constexpr, OVERWRITE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    wanted = tl.load(target + row)
    inside = (wanted >= 0) & (wanted < V)
    at_target = tl.load(logits + tl.where(inside, wanted, 0)).to(tl.float32)  # before anyone writes
    columns = tl.arange(0, BLOCK)
    x = tl.load(logits + columns, mask=columns < V, other=-float("inf"))  # (BLOCK,) in its own dtype
    largest = tl.max(x.to(tl.float32), 0)
    first = tl.min(tl.where(x.to(tl.float32) == largest, columns, V), 0)
    total = tl.sum(tl.exp(x.to(tl.float32) - largest), 0)
    _write_row(row, wanted, inside, at_target, largest, first, total, losses, hits, IGNORE, UNCOUNTED)
    if OVERWRITE:
        by = _share(wanted, inside, share)
        tl.debug_barrier()  # every warp has read the target's logit before one of them replaces it
        p = tl.exp(x.to(tl.float32) - largest) / total
        gradient = tl.where(wanted == IGNORE, 0.0, (p - tl.where(columns == wanted, 1.0, 0.0)) * by)
        tl.store(logits + columns, gradient.to(x.dtype), mask=columns < V)


@triton.jit
def looped_row(
    logits, target, share, losses, hits,
    STRIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
    IGNORE: tl.constexpr, UNCOUNTED: tl.constexpr, OVERWRITE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * STRIDE
    wanted = tl.load(target + row)
    inside = (wanted >= 0) & (wanted < V)
    at_target = tl.load(logits + tl.where(inside, wanted, 0)).to(tl.float32)  # before anyone writes
    largest = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    first = tl.zeros([], tl.int32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < V, other=-float("inf")).to(tl.float32)  # (BLOCK,)
        block_largest = tl.max(x, 0)
        block_first = tl.min(tl.where(x == block_largest, columns, V), 0)
        first = tl.where(block_largest > largest, block_first, first)
        larger = tl.maximum(largest, block_largest)
        shift = tl.where(larger == -float("inf"), 0.0, larger)  # a block of -inf adds nothing, not NaN
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = larger
    _write_row(row, wanted, inside, at_target, largest, first, total, losses, hits, IGNORE, UNCOUNTED)
    if OVERWRITE:
        by = _share(wanted, inside, share)
        tl.debug_barrier()  # every warp has read the target's logit before one of them replaces it
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(logits + columns, mask=columns < V, other=-float("inf"))
            p = tl.exp(x.to(tl.float32) - largest) / total
            gradient = tl.where(wanted == IGNORE, 0.0, (p - tl.where(columns == wanted, 1.0, 0.0)) * by)
            tl.store(logits + columns, gradient.to(x.dtype), mask=columns < V)


@triton.jit
def _write_row(
    row, wanted, inside, at_target, largest, first, total, losses, hits, IGNORE: tl.constexpr, UNCOUNTED: tl.constexpr
):
    # The difference first: two huge logits would swallow the logarithm one by one.
    loss = tl.where(inside, (largest - at_target) + tl.log(total), float("nan"))
    tl.store(losses + row, tl.where(wanted == IGNORE, 0.0, loss))
    tl.store(hits + row, ((first == wanted) & (wanted != IGNORE) & (wanted != UNCOUNTED)).to(tl.int32))


@triton.jit
def _share(wanted, inside, share):
    """1 / valid (times the scale), or NaN for a target outside the vocabulary, so that no optimizer takes the step."""
    return tl.where(inside, tl.load(share), float("nan"))


@triton.jit
def scale_unless_one(gradient, factor, STRIDE: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor)
    if by != 1.0:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = gradient + tl.program_id(0).to(tl.int64) * STRIDE + columns
        x = tl.load(at, mask=columns < V)
        tl.store(at, (x.to(tl.float32) * by).to(x.dtype), mask=columns < V)
