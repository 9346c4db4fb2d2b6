"""The check of attention: the model's own, by the kernel that training takes on the device, against its formula in float64."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from fastpoem_kernels.check import Record
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpoem.corpus.feed import SLOT, SLOT_LONGEST, Rows, Shape
from fastpoem.engine.batch import assemble
from fastpoem.model.attention import causal_attention
from fastpoem.model.dropout import Masks, Poems
from fastpoem.model.flash import find_varlen, why_not_flash


def attention(device: torch.device, dtype: torch.dtype, packed: Rows | None = None, heads: int = 12) -> list[Record]:
    """The model's own attention, by the kernel that training takes, against the formula in float64: outputs and gradients, inside every
    poem and across none. Then with dropout, see `_dropped`. packed: the batch whose poems are packed, cut to 64 inputs and one to 1, with
    padding behind them; None for 16 poems of 64. Heads are 64 wide.

    In 16 bits the kernel may be twice as far from the truth as the formula computed in them.
    """
    packing, borders = None, [(at, at + 64) for at in range(0, 16 * 64, 64)]
    shape = (16, 64)
    if packed is not None:
        lengths = (packed.where[:, 1] - 1).clamp(max=64)
        lengths[1] = 1
        where = torch.stack([packed.where[:, 0], lengths + 1], 1)
        total = -(-int(lengths.sum()) // SLOT) * SLOT
        size = Shape(len(packed.where), SLOT_LONGEST + 1, total)
        assert packed.source is not None
        packing = assemble(packed.source.to(device), where.to(device), size, 0).packing
        ends = lengths.cumsum(0).tolist()
        borders, shape = list(zip([0, *ends[:-1]], ends, strict=True)), (1, total)
    starts = torch.tensor([0, *(end for _, end in borders)], dtype=torch.int32)
    varlen = find_varlen(device, dtype, 64)[0] if packed is not None else None
    flash = why_not_flash(device, dtype) is None

    def attend(qkv: Tensor, dropout: float) -> Tensor:  # (rows, 3 * D) -> (rows, D)
        draw = Poems.of_each(1, starts, Masks.drawn())[0] if device.type == "cpu" else None
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext():
            out = causal_attention(qkv.view(*shape, -1), heads, 0.125, dropout, packing, varlen, draw)
        return out.flatten(0, 1)

    width = heads * 64
    draw = torch.Generator().manual_seed(2)
    qkv = torch.randn(shape[0] * shape[1], 3 * width, generator=draw).to(device, dtype)
    upstream = torch.zeros(len(qkv), width)
    upstream[: borders[-1][1]] = torch.randn(borders[-1][1], width, generator=draw)
    upstream = upstream.to(device, dtype)
    return [_plain(attend, qkv, upstream, borders, heads), _dropped(attend, qkv, upstream, borders, heads)]


Attend = Callable[[Tensor, float], Tensor]
Borders = list[tuple[int, int]]


def _plain(attend: Attend, qkv: Tensor, upstream: Tensor, borders: Borders, heads: int) -> Record:
    mine = _with_gradient(lambda x: attend(x, 0.0), qkv, upstream)
    exact = _with_gradient(lambda x: _formula(x, borders, heads), qkv.double(), upstream.double())
    rounded = _with_gradient(lambda x: _formula(x, borders, heads), qkv, upstream)
    if not all(bool(torch.isfinite(part).all()) for part in mine):
        return _wrong("", "outputs or gradients are not finite")
    real = slice(0, borders[-1][1])
    found = [Record("", True, error=0.0, tolerance=1.0)]
    for what, a, b, c in zip(("output", "gradient"), mine, exact, rounded, strict=True):
        allowed = max(_least(qkv.dtype), 2 * farthest(c[real], b[real]))
        error = farthest(a[real], b[real])
        found.append(Record("", error <= allowed, error=error, tolerance=allowed, note=f"farthest in the {what}"))
    return worst(found)


def _dropped(attend: Attend, qkv: Tensor, upstream: Tensor, borders: Borders, heads: int, p: float = 0.25) -> Record:
    """With values that are the unit vectors, the output *is* the matrix of weights: which were dropped can be seen, how many (within five
    deviations), that the others were divided by 1 - p, and that the gradients belong to the same choice."""
    qkv = qkv.clone()
    values = qkv.view(len(qkv), 3, heads, 64)[:, 2]
    for start, end in borders:
        values[start:end] = torch.eye(64, device=qkv.device, dtype=qkv.dtype)[: end - start, None]
    seen, gradient = _with_gradient(lambda x: attend(x, p), qkv, upstream)  # (rows, D), (rows, 3 * D)
    other, _ = _with_gradient(lambda x: attend(x, p), qkv, upstream)
    kept = seen.view(len(qkv), heads, 64) != 0
    past = torch.zeros(len(qkv), 64, dtype=torch.bool, device=qkv.device)
    for start, end in borders:
        past[start:end] = torch.ones(64, 64, device=qkv.device).tril()[: end - start].bool()
    chances = int(past.sum()) * heads
    share = 1 - int((kept & past[:, None]).sum()) / chances
    if abs(share - p) > 5 * math.sqrt(p * (1 - p) / chances) + 2**-16:
        return _wrong("dropout", f"{share:.2%} of the weights were dropped, not {p:.0%}")
    real = slice(0, borders[-1][1])
    if bool((kept & ~past[:, None])[real].any()):
        return _wrong("dropout", "a token sees the future, or another poem")
    if torch.equal(other[real], seen[real]):
        return _wrong("dropout", "the same weights are dropped every time")
    formula = lambda x: _formula(x, borders, heads, kept / (1 - p))
    exact = _with_gradient(formula, qkv.double(), upstream.double())
    rounded = _with_gradient(formula, qkv, upstream)
    found = [Record("dropout", True, error=0.0, tolerance=1.0)]
    for what, a, b, c in zip(("output", "gradient"), (seen, gradient), exact, rounded, strict=True):
        allowed = max(_least(qkv.dtype), 2 * farthest(c[real], b[real]))
        error = farthest(a[real], b[real])
        found.append(
            Record("dropout", error <= allowed, error=error, tolerance=allowed, note=f"farthest in the {what}")
        )
    return worst(found)


def _wrong(name: str, note: str) -> Record:
    """Numbers so wrong that there is no error to measure; it has one all the same, by which it is told from what could not be computed."""
    return Record(name, False, error=1.0, tolerance=0.0, note=note)


def _least(dtype: torch.dtype) -> float:
    """What a sound kernel may be off by: where p is rounded to 1/65536 or the formula happens to round well."""
    return {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]


def _formula(qkv: Tensor, borders: Borders, heads: int, factors: Tensor | None = None) -> Tensor:
    """softmax(q k^T / 8) v inside each poem, causal. factors (rows, H, 64): what dropout multiplies each weight by."""
    out = torch.zeros(len(qkv), heads * 64, device=qkv.device, dtype=qkv.dtype)
    for start, end in borders:
        q, k, v = qkv[start:end].view(end - start, 3, heads, 64).permute(1, 2, 0, 3)  # (H, T, 64)
        future = torch.ones(end - start, end - start, device=qkv.device).triu(1).bool()
        weights = torch.softmax((q @ k.transpose(1, 2) / 8).masked_fill(future, -math.inf), -1)  # (H, T, T)
        if factors is not None:
            weights = weights * factors[start:end, :, : end - start].transpose(0, 1).to(weights.dtype)
        out[start:end] = (weights @ v).transpose(0, 1).flatten(1)
    return out


def _with_gradient(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = function(x)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    return out.detach(), gradient


def farthest(mine: Tensor, exact: Tensor) -> float:
    """Largest difference, over the largest magnitude."""
    error = ((mine.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-300)).item()
    return error if error == error else math.inf


def worst(records: Sequence[Record]) -> Record:
    """The farthest from what is allowed."""
    return max(records, key=_ratio)


def _ratio(record: Record) -> float:
    """Error over what is allowed; infinite where either is missing or no number."""
    ratio = math.inf if record.error is None or not record.tolerance else record.error / record.tolerance
    return ratio if ratio == ratio else math.inf
