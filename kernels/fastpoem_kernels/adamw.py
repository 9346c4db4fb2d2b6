"""Clipped AdamW over one flat buffer: gradient norm, clip factor, update and low-precision copy, with no host synchronisation.

With every parameter a view of one buffer, the optimizer is two sweeps over memory: one for the norm, one for the update. Step,
learning rate and clip limit are device tensors, so the whole of it can be captured in a graph and replayed with other values.
A step whose norm, loss or learning rate is not finite leaves weights, moments and step count as they are and raises a flag on the device.

Formulae: `torch.nn.utils.clip_grad_norm_` (factor = min(1, limit / (norm + 1e-6))) and AdamW with decoupled weight decay
(Loshchilov & Hutter, 2019) as in `torch.optim.AdamW`.
"""

import torch
from torch import Tensor

from fastpoem_kernels import native
from fastpoem_kernels.dispatch import runs_triton
from fastpoem_kernels.operators import fake, operator

BLOCK = 4096  # elements a partial sum covers: short enough for float32, a whole number of vectors
PIECE = 256 * BLOCK


def clipped_adamw_(
    param: Tensor,  # (P,) float32
    grad: Tensor,  # (P,) float32, bfloat16 or float16
    exp_avg: Tensor,  # (P,) float32
    exp_avg_sq: Tensor,  # (P,) float32
    *,
    step: Tensor,  # () float32
    lr: Tensor,  # () float32
    max_norm: Tensor,  # () float32
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    loss: Tensor | None = None,  # ()
    low_precision: Tensor | None = None,  # (P,) bfloat16 or float16
    grad_scale: Tensor | None = None,  # () float32
    norm: Tensor | None = None,  # () float32
) -> tuple[Tensor, Tensor]:
    """One optimizer step in place; returns the gradient's L2 norm before clipping (0-D float32) and `skipped` (0-D bool).

    `step` counts the steps applied and is advanced here. `skipped`: the norm, `loss` or `lr` was not finite and nothing changed.
    `grad_scale`: what the gradient was multiplied by (`cross_entropy`'s scale); the norm, the clip and the update are those of the
    gradient without it. `norm`: that of the gradient of which `grad`, as it is, is only a part.
    `low_precision` receives the rounded weights. On the CPU a float32 `grad` may be left clipped; its content is spent.
    """
    flat = [param, grad, exp_avg, exp_avg_sq, *([] if low_precision is None else [low_precision])]
    if any(t.shape != (param.numel(),) or not t.is_contiguous() for t in flat):
        raise ValueError(f"flat contiguous tensors of one length expected, got {[[*t.shape] for t in flat]}")
    given = [number for number in (grad_scale, norm) if number is not None]
    if any(t.dtype != torch.float32 for t in (param, exp_avg, exp_avg_sq, step, lr, max_norm, *given)):
        raise TypeError("weights, moments, step, lr, max_norm, grad_scale and norm must be float32")
    if any(t.shape != () for t in (step, lr, max_norm, *given, *([] if loss is None else [loss]))):
        raise ValueError("step, lr, max_norm, grad_scale, norm and loss must be 0-D tensors")
    if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"float32, bfloat16 or float16 gradient expected, got {grad.dtype}")
    flats, numbers = (param, grad, exp_avg, exp_avg_sq), (step, lr, max_norm, loss, low_precision)
    return _clipped_adamw(*flats, *numbers, beta1, beta2, eps, weight_decay, grad_scale, norm)


def gradient_norm(grad: Tensor) -> Tensor:
    """L2 norm (0-D float32) of a gradient (P,), as `clipped_adamw_` takes it on the CPU: the same bits for any number of threads."""
    return _norm(grad) if grad.is_cpu else torch.linalg.vector_norm(grad, dtype=torch.float32)


@operator("clipped_adamw_", overwrites=("param", "grad", "exp_avg", "exp_avg_sq", "step", "low_precision"))
def _clipped_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    max_norm: Tensor,
    loss: Tensor | None,
    low_precision: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if runs_triton(param):
        from fastpoem_kernels import adamw_triton  # only here: the CPU needs no Triton

        flats, numbers = (param, grad, exp_avg, exp_avg_sq), (step, lr, max_norm, loss, low_precision)
        return adamw_triton.clipped_adamw(*flats, *numbers, beta1, beta2, eps, weight_decay, grad_scale, norm)
    norm = _norm(grad) if norm is None else norm.clone()
    norm = norm if grad_scale is None else norm / grad_scale
    finite = norm.isfinite() & lr.isfinite()
    if loss is not None:
        finite &= loss.isfinite()
    step.add_(finite)
    if finite:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        factor = factor if grad_scale is None else factor / grad_scale
        t, rate = step.item(), lr.item()
        copied = grad.dtype == torch.bfloat16 and low_precision is not None and low_precision.dtype == grad.dtype
        alike = (grad, low_precision) if copied else (param, grad)  # what the C wants of one dtype
        if native.usable(param, exp_avg, exp_avg_sq) and native.usable(*alike):
            decay, rise, root = 1 - rate * weight_decay, 1 - beta1**t, (1 - beta2**t) ** -0.5
            rates = factor.item(), decay, 1 - beta1, 1 - beta2, rate / rise, root, eps
            copy = low_precision if copied else param
            native.run("adamw", param, grad, exp_avg, exp_avg_sq, copy, len(param), *rates)
            if copied:
                return norm, ~finite
        else:
            for p, g, m, v in zip(*(x.split(_piece(grad)) for x in (param, grad, exp_avg, exp_avg_sq)), strict=True):
                torch._fused_adamw_(
                    [p], [g.float()], [m], [v], [], [step],
                    lr=rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
                    grad_scale=factor.reciprocal() if factor != 1 else None,
                )  # fmt: skip
    if low_precision is not None:
        low_precision.copy_(param)
    return norm, ~finite


def _norm(grad: Tensor) -> Tensor:
    """L2 norm from sums over fixed blocks, added in float64: the same for any number of threads, and exact to float32."""
    if native.usable(grad):
        squares = torch.empty(-(-len(grad) // BLOCK), dtype=torch.float64)
        native.run("squares", grad, len(grad), squares, BLOCK)
        return squares.sqrt_().norm().float()
    return torch.cat([_block_norms(piece.float()) for piece in grad.split(_piece(grad))]).norm().float()


def _block_norms(grad: Tensor) -> Tensor:
    """(ceil(P / BLOCK),) float64, of a float32 gradient."""
    whole = len(grad) // BLOCK * BLOCK
    norms = torch.linalg.vector_norm(grad[:whole].view(-1, BLOCK), dim=1)
    return torch.cat([norms, torch.linalg.vector_norm(grad[whole:])[None]]).double()


def _piece(grad: Tensor) -> int:
    """Elements to take at a time: all of a float32 gradient, no more of another than is cheap to widen."""
    return max(1, len(grad)) if grad.dtype == torch.float32 else PIECE


@fake("clipped_adamw_")
def _(param, *_):
    return param.new_empty(()), param.new_empty((), dtype=torch.bool)
