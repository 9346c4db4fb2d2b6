"""Clipped AdamW on CUDA: one kernel for the partial norms, one program for the scalars, one sweep for the update.

The number of partial sums depends on the length alone and a single program adds them in order, so the norm is the same on every
run and card. That program also advances the step and computes the bias corrections, once and before anyone uses them; the sweep
then reads five scalars. The length is a compile-time constant: Triton needs it to move four floats at a time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIALS = 1024  # programs of the norm, at most
NORM_BLOCK = 4096
UPDATE_BLOCK = 1024
NORM_WARPS, SCALAR_WARPS, UPDATE_WARPS = 8, 4, 4


def clipped_adamw(
    param: Tensor,  # (P,)
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,  # ()
    lr: Tensor,
    max_norm: Tensor,
    loss: Tensor | None,
    low_precision: Tensor | None,  # (P,)
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    whole_norm: Tensor | None = None,  # (): of the gradient of which `grad` is a part
) -> tuple[Tensor, Tensor]:
    """Norm (0-D float32) and skipped (0-D bool)."""
    length = param.numel()
    programs = min(PARTIALS, triton.cdiv(length, NORM_BLOCK)) if whole_norm is None else 1
    partials = param.new_empty(programs) if whole_norm is None else whole_norm.square().view(1)
    scalars = param.new_empty(5)
    norm, skipped = param.new_empty(()), param.new_empty((), dtype=torch.bool)
    with torch.cuda.device_of(param):
        if length and whole_norm is None:
            partial_squares[(programs,)](grad, partials, length, programs, NORM_BLOCK, num_warps=NORM_WARPS)
        step_scalars[(1,)](
            partials, step, lr, max_norm, norm if loss is None else loss, lr if grad_scale is None else grad_scale,
            norm, skipped, scalars,
            programs, triton.next_power_of_2(max(programs, 1)), loss is not None, grad_scale is not None,
            math.log(beta1), math.log(beta2), weight_decay, num_warps=SCALAR_WARPS,
        )  # fmt: skip
        if length:
            update[(triton.cdiv(length, UPDATE_BLOCK),)](
                param, grad, exp_avg, exp_avg_sq, param if low_precision is None else low_precision, scalars,
                length, beta1, beta2, eps, low_precision is not None, UPDATE_BLOCK, num_warps=UPDATE_WARPS,
            )  # fmt: skip
    return norm, skipped


@triton.jit
def partial_squares(grad, partials, P: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(0, P, PROGRAMS * BLOCK):
        at = start + first + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < P, other=0.0).to(tl.float32)  # (BLOCK,)
        total += g * g
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def step_scalars(
    partials, step, lr, max_norm, loss, grad_scale, norm, skipped, scalars,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, HAS_LOSS: tl.constexpr, HAS_SCALE: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, WEIGHT_DECAY: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    length = tl.sqrt_rn(tl.sum(tl.load(partials + at, mask=at < PROGRAMS, other=0.0), 0))
    undo = 1.0
    if HAS_SCALE:
        undo = 1.0 / tl.load(grad_scale)
        length *= undo
    rate = tl.load(lr)
    finite = (tl.abs(length) < float("inf")) & (tl.abs(rate) < float("inf"))
    if HAS_LOSS:
        finite = finite & (tl.abs(tl.load(loss).to(tl.float32)) < float("inf"))
    count = tl.load(step) + tl.where(finite, 1.0, 0.0)
    tl.store(norm, length)
    tl.store(skipped, finite == 0)
    tl.store(step, count)
    tl.store(scalars, tl.minimum(tl.load(max_norm) / (length + 1e-6), 1.0) * undo)
    tl.store(scalars + 1, rate / _one_minus_exp(count * LOG_BETA1))
    tl.store(scalars + 2, tl.sqrt_rn(_one_minus_exp(count * LOG_BETA2)))
    tl.store(scalars + 3, 1.0 - rate * WEIGHT_DECAY)
    tl.store(scalars + 4, tl.where(finite, 1.0, 0.0))


@triton.jit
def _one_minus_exp(y):
    """1 - exp(y) for y <= 0. By its series near 0, where the difference would lose four of float32's seven digits."""
    series = y * 0.0
    for k in tl.static_range(10, 0, -1):
        series = (series + 1.0) * y / k
    return tl.where(y > -0.5, -series, 1.0 - tl.exp(y))


@triton.jit
def update(
    param, grad, exp_avg, exp_avg_sq, low_precision, scalars,
    P: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    HAS_LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < P
    p = tl.load(param + at, mask=mask)
    g = tl.load(grad + at, mask=mask).to(tl.float32)
    m = tl.load(exp_avg + at, mask=mask)
    v = tl.load(exp_avg_sq + at, mask=mask)
    g *= tl.load(scalars)
    step_size, correction, decay = tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    applied = tl.load(scalars + 4) != 0
    m_next = m + (g - m) * (1.0 - BETA1)
    v_next = v * BETA2 + g * g * (1.0 - BETA2)
    p_next = p * decay - step_size * m_next / (tl.sqrt(v_next) / correction + EPS)
    p = tl.where(applied, p_next, p)
    tl.store(param + at, p, mask=mask)
    tl.store(exp_avg + at, tl.where(applied, m_next, m), mask=mask)
    tl.store(exp_avg_sq + at, tl.where(applied, v_next, v), mask=mask)
    if HAS_LOW:
        tl.store(low_precision + at, p.to(low_precision.dtype.element_ty), mask=mask)
