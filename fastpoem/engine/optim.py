"""Parameters, gradients and moments in flat buffers, and the learning rate's schedules.

With every parameter a view of one buffer there is one norm, one clip, one update (and one all-reduce) instead of one a tensor. Processes that
train together may divide the update among them (ZeRO-1: Rajbhandari et al., 2020): each has the masters and moments of an equal slice of the
buffer, and the weights that it computes with whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpoem.engine.kernels import OURS, Kernels

ALIGN = 64  # elements: every view starts on a 128-byte boundary even in bf16, so that kernels may use wide accesses


SCALE, LEAST_SCALE, GOOD_STEPS = (
    65536.0,
    1.0,
    2000,
)  # of a float16 loss: at the beginning, at the least, and until it is doubled


class Layout(NamedTuple):
    """Where each of some tensors lies in a flat buffer of `size`: one after the other, each beginning on a boundary."""

    shapes: dict[str, torch.Size]
    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        ends = [0, *itertools.accumulate(-(-shape.numel() // ALIGN) * ALIGN for shape in shapes.values())]
        return cls(shapes, dict(zip(shapes, ends, strict=False)), ends[-1])

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A tensor's part of a flat buffer, in its own shape."""
        start, shape = self.offsets[name], self.shapes[name]
        return flat[start : start + shape.numel()].view(shape)

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.view(flat, name)) for name in self.shapes)


class LossScale(NamedTuple):
    """What a float16 gradient is multiplied by so that the small is not lost, found by trying, as torch.amp.GradScaler does: halved where a
    gradient is too large for it, doubled after 2,000 steps in which none was. On the device, which is not asked for it."""

    value: Tensor  # 0-D float32, a power of two
    good: Tensor  # 0-D int32: steps since it last changed

    @classmethod
    def first(cls, device: torch.device) -> LossScale:
        return cls(torch.full((), SCALE, device=device), torch.zeros((), dtype=torch.int32, device=device))

    def update(self, loss: Tensor, norm: Tensor) -> Tensor:
        """After a step with this loss and gradient norm. Returns whether the step was lost to the scale alone (0-D bool): its gradient is not
        finite, its loss is, and the scale was not yet as small as it may be."""
        too_large = loss.isfinite() & ~norm.isfinite()
        excused = too_large & (self.value > LEAST_SCALE)
        torch._amp_update_scale_(self.value, self.good, too_large.float(), 2.0, 0.5, GOOD_STEPS)
        self.value.clamp_(min=LEAST_SCALE)
        return excused


class FlatAdamW:
    """Clipped AdamW over a module's parameters, which become views of flat buffers; each has its gradient's view as `main_grad`.

    The masters are float32; with dtype bfloat16 or float16 the module computes on a copy that the update rewrites. No method
    synchronises with the device. Tensors: `master`, `exp_avg`, `exp_avg_sq` (P,) float32; `grad`, `working` (P,) in dtype;
    `applied`, `lr`, `max_norm` 0-D float32. `scale`: with float16, what `grad` is multiplied by.

    slices: (the number of this process's slice of the buffers, how many there are). divided: the update is, so that `master` and the moments
    are (P / slices,), those of `mine`; `whole` (P,) on the CPU, in the first process, then has the masters that the module came with, until it is taken.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        *,
        weight_decay: float,
        max_norm: float,
        kernels: Kernels = OURS,
        slices: tuple[int, int] = (0, 1),
        divided: bool = False,
    ) -> None:
        self.module, self.weight_decay, self.kernels = module, weight_decay, kernels
        self.layout = self.whole_layout = Layout.of(
            dict(self._parameters())
        )  # of the buffers here, of those of all processes
        self.used, (number, count) = self.layout.size, slices  # elements with a parameter's
        each = -(-self.used // (count * ALIGN)) * ALIGN
        self.mine = slice(number * each, (number + 1) * each) if divided else slice(0, count * each)
        self.is_divided = divided
        self.whole: Tensor | None
        self.exp_avg, self.exp_avg_sq = (torch.zeros(self.mine.stop - self.mine.start, device=device) for _ in range(2))
        whole = torch.zeros(each * count, device=device)
        # With room behind it for what is summed over processes together with the gradient.
        self.grad_and_tail = torch.zeros(len(whole) + ALIGN, device=device, dtype=dtype)
        self.grad = self.grad_and_tail[:-ALIGN]
        self.applied, self.lr = torch.zeros((), device=device), torch.zeros((), device=device)
        self.max_norm = torch.full((), max_norm, dtype=torch.float32, device=device)
        self.scale = LossScale.first(device) if dtype == torch.float16 else None
        self.working = whole if dtype == torch.float32 else torch.empty_like(self.grad)
        with torch.no_grad():
            for name, parameter in self._parameters():
                self.view(whole, name).copy_(parameter)
                self._adopt(name, parameter)
            self.working.copy_(whole)
        self.is_copied = dtype != torch.float32  # is `working` another than the masters?
        self.master, self.whole = whole, None
        if self.is_divided:
            self.master = whole[self.mine].clone() if self.is_copied else whole[self.mine]
            self.whole = whole.to("cpu", copy=True) if number == 0 else None

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.module.named_parameters()

    def _adopt(self, name: str, parameter: Tensor) -> None:
        parameter.data = self.view(self.working, name)
        parameter.main_grad = self.view(self.grad, name)  # where fastpoem.model.ops writes

    def collect(self) -> None:
        """Move the gradients that autograd left in `.grad` into `grad`: for a model that does not write `main_grad` itself
        (fastpoem.model.ops). A few launches, where letting autograd add to `main_grad` takes one a parameter."""
        parameters = list(self.module.parameters())
        torch._foreach_copy_([p.main_grad for p in parameters], [p.grad for p in parameters])
        for parameter in parameters:
            parameter.grad = None

    def view(self, flat: Tensor, name: str) -> Tensor:
        """A parameter's part of one of the flat buffers, in its own shape."""
        return self.layout.view(flat, name)

    def named(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        return self.layout.named(flat)

    def step(
        self, loss: Tensor, gradient: Tensor | None = None, norm: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clip and update from `gradient` (P,), None: `grad`, at the learning rate in `lr`. norm: the gradient's (0-D float32), which a divided
        update cannot know. Returns (norm before clipping 0-D float32, skipped 0-D bool, excused): a step whose norm or `loss` is not finite is
        skipped and changes nothing. excused: as `LossScale.update`, with float16."""
        norm, skipped = self.kernels.clipped_adamw_(
            self.master,
            (self.grad if gradient is None else gradient)[self.mine],
            self.exp_avg,
            self.exp_avg_sq,
            step=self.applied,
            lr=self.lr,
            max_norm=self.max_norm,
            weight_decay=self.weight_decay,
            loss=loss,
            low_precision=self.working[self.mine] if self.is_copied else None,
            grad_scale=None if self.scale is None else self.scale.value,
            norm=norm,
        )
        return norm, skipped, None if self.scale is None else self.scale.update(loss, norm)

    def reload(self) -> None:
        """Renew the working copy (of a divided update its own slice) after the masters were written from outside."""
        if self.is_copied:
            self.working[self.mine].copy_(self.master)


def learning_rate(
    schedule: str, peak: float, step: int, *, steps_per_epoch: int, epochs: int, last_step: int, warmup: int
) -> float:
    """Learning rate of the optimizer step after `step` others.

    epoch-cosine: `CosineAnnealingLR(T_max=epochs)` stepped once an epoch. cosine: from peak at the end of the warm-up to zero at
    `last_step`. constant: peak. All rise linearly over `warmup` steps.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "epoch-cosine":
        fall = (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs)) / 2
    elif schedule == "cosine":
        fall = (1 + math.cos(math.pi * max(0, step - warmup) / max(1, last_step - warmup))) / 2
    else:
        fall = 1.0
    return peak * rise * fall
