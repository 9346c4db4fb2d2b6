"""The same two functions from PyTorch's own operators: what training falls back to where a kernel fails its check on a device.

Slower (three tensors of the logits' size, several sweeps over the weights) but with nothing of ours in it; no host synchronisation on CPU
and CUDA. Also what other devices use, which no kernel of ours knows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from fastpoem_kernels.loss import CrossEntropy


def cross_entropy(
    logits: Tensor,  # (N, V) float32, bfloat16 or float16
    target: Tensor,  # (N,) int64
    ignore_index: int = -100,
    accuracy_ignore_index: int | None = None,
    scale: Tensor | None = None,  # () float32
) -> CrossEntropy:
    """As `fastpoem_kernels.cross_entropy`, but the logits are left alone."""
    valid = target != ignore_index  # (N,)
    counted = valid if accuracy_ignore_index is None else valid & (target != accuracy_ignore_index)
    correct = (logits.detach().argmax(1) == target) & counted
    total = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="sum")
    loss = total / valid.sum().clamp(min=1)
    loss = loss if scale is None else _Scaled.apply(loss, scale)
    return CrossEntropy(loss, correct.sum(), valid.sum(), counted.sum())


class _Scaled(torch.autograd.Function):
    """The loss itself, whose gradient is `scale` times its own from the start, while it is float32."""

    @staticmethod
    def forward(ctx, loss, scale):
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.scale, None


@torch.no_grad()
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
    """As `fastpoem_kernels.clipped_adamw_`, on `torch._fused_adamw_`, which can scale and skip by device tensors."""
    norm = torch.linalg.vector_norm(grad, dtype=torch.float32) if norm is None else norm.clone()
    norm = norm if grad_scale is None else norm / grad_scale
    skipped = ~(norm.isfinite() & lr.isfinite())
    if loss is not None:
        skipped |= ~loss.isfinite()
    step.add_(~skipped)
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    divisor = divisor if grad_scale is None else divisor * grad_scale
    if not (
        param.is_cpu or param.is_cuda
    ):  # whose fused form takes no tensors for scale and flag; there nothing is recorded
        if not skipped:
            adamw(
                [param], [grad.float() / divisor], [exp_avg], [exp_avg_sq], [], [step.sub_(1)], foreach=False,
                lr=lr.item(), beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
        if low_precision is not None:
            low_precision.copy_(param)
        return norm, skipped
    torch._fused_adamw_(
        [param], [grad.float()], [exp_avg], [exp_avg_sq], [], [step],
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        grad_scale=divisor, found_inf=skipped.float(),
    )  # fmt: skip
    if low_precision is not None:
        low_precision.copy_(param)
    return norm, skipped
