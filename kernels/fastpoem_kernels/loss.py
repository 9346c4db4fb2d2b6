"""Cross-entropy with accuracy: what a caller sees, and how it meets autograd and torch.compile.

The gradient of the mean loss, (softmax(logits) - onehot(target)) / valid, needs nothing that comes later than the logits, so
the forward pass writes it over them: no second `[N, V]` tensor ever exists. The backward pass has only the upstream gradient
left to apply, and for a plain `loss.backward()` that is 1. The overwrite goes through custom operators that declare it, so the
version counter moves, autograd refuses stale uses of the logits, and `torch.compile(fullgraph=True)` traces through.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpoem_kernels import loss_cpu
from fastpoem_kernels.dispatch import runs_triton
from fastpoem_kernels.operators import fake, operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CrossEntropy(NamedTuple):
    """`loss`: 0-D float32. `correct`, `valid`, `counted`: 0-D int64. All on the device of the logits; see `cross_entropy`."""

    loss: Tensor
    correct: Tensor
    valid: Tensor
    counted: Tensor


def cross_entropy(
    logits: Tensor,  # (N, V) float32, bfloat16 or float16
    target: Tensor,  # (N,) int64
    ignore_index: int = -100,
    accuracy_ignore_index: int | None = None,
    scale: Tensor | None = None,  # () float32
) -> CrossEntropy:
    """Mean cross-entropy of the rows whose target is not `ignore_index`, and how many of them the model gets right.

    `loss` is 0.0 where no row counts. `valid`: rows that count in the loss. `counted`: those whose target is not
    `accuracy_ignore_index` either. `correct`: rows of `counted` whose *first* largest logit is the target.

    With gradients on, the logits hold their gradient afterwards, so read them before; a leaf, or a tensor that autograd does
    not let anyone overwrite, is copied first. Without gradients they are left alone. Arithmetic is float32 whatever the dtype.
    `scale` multiplies the gradient, not the loss: float16 rounds a gradient of 1e-8 to zero, and 65,536 times it not. It is in there
    when the gradient is formed, in float32; whoever uses the gradient divides by it.
    A target outside the vocabulary raises IndexError on the CPU; on CUDA, where asking would stop the device, the loss is NaN.
    """
    if logits.ndim != 2 or target.shape != logits.shape[:1]:
        raise ValueError(f"logits [N, V] and target [N] expected, got {[*logits.shape]} and {[*target.shape]}")
    if logits.dtype not in DTYPES or target.dtype != torch.int64:
        raise TypeError(
            f"float32, bfloat16 or float16 logits and int64 target expected, got {logits.dtype}, {target.dtype}"
        )
    if scale is not None and (scale.shape != () or scale.dtype != torch.float32):
        raise TypeError(f"a 0-D float32 scale expected, got {[*scale.shape]} {scale.dtype}")
    if logits.shape[1] == 0:
        raise ValueError("the vocabulary is empty")
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        logits = logits.contiguous()
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return CrossEntropy(*_evaluate(logits, target, ignore_index, accuracy_ignore_index))
    if logits.is_leaf or _views_a_leaf(logits):
        logits = logits.clone()
    return CrossEntropy(*_InPlace.apply(logits, target, ignore_index, accuracy_ignore_index, scale))


def _views_a_leaf(logits: Tensor) -> bool:
    base = None if torch.compiler.is_compiling() else logits._base
    return base is not None and base.is_leaf and base.requires_grad


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index, accuracy_ignore_index, scale):
        loss, *counts = _overwrite(logits, target, ignore_index, accuracy_ignore_index, scale)
        ctx.save_for_backward(logits.detach())
        ctx.mark_non_differentiable(*counts)
        ctx.set_materialize_grads(False)  # or autograd makes three zeros for the counts, each a launch
        return loss, *counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream, *_):
        (gradient,) = ctx.saved_tensors
        # A graph that is kept will be asked again, and must find the gradient as the forward pass left it.
        if not torch.compiler.is_compiling() and torch._C._autograd._get_current_graph_task_keep_graph():
            return gradient * upstream, None, None, None, None
        _scale(gradient, upstream)
        return gradient, None, None, None, None


@operator("cross_entropy_overwrite", overwrites=("logits",))
def _overwrite(
    logits: Tensor, target: Tensor, ignore_index: int, accuracy_ignore_index: int | None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(logits, target, ignore_index, accuracy_ignore_index, True, scale)


@operator("cross_entropy_evaluate")
def _evaluate(
    logits: Tensor, target: Tensor, ignore_index: int, accuracy_ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(logits, target, ignore_index, accuracy_ignore_index, False)


@operator("scale_unless_one", overwrites=("gradient",))
def _scale(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, costing next to nothing where the factor is 1 (asked on the device, never of it)."""
    if runs_triton(gradient):
        from fastpoem_kernels import loss_triton  # only here: the CPU needs no Triton

        loss_triton.scale(gradient, factor)
    elif factor.item() != 1:
        gradient.mul_(factor)


def _run(logits, target, ignore_index, accuracy_ignore_index, overwrite, scale=None):
    if runs_triton(logits):
        from fastpoem_kernels import loss_triton

        return loss_triton.cross_entropy(logits, target, ignore_index, accuracy_ignore_index, overwrite, scale)
    return loss_cpu.cross_entropy(logits, target, ignore_index, accuracy_ignore_index, overwrite, scale)


@fake("cross_entropy_overwrite")
@fake("cross_entropy_evaluate")
def _(logits, target, ignore_index, accuracy_ignore_index, scale=None):
    counts = [target.new_empty(()) for _ in range(3)]
    return logits.new_empty((), dtype=torch.float32), *counts


@fake("scale_unless_one")
def _(gradient, factor):
    return None
