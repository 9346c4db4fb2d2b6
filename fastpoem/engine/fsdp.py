"""Weights in shards, for models that do not fit one device: `--parallel fsdp`, on PyTorch's FSDP2.

Each process keeps a share of the rows of every parameter in float32, with its gradient and moments. A block's weights are put together, in the
precision that is computed in, when its turn comes, and dropped after it; its gradient is summed in float32 into the shards as soon as it is there.
Embedding, head (its transpose) and last norm are one group, the root's. The update is ours, over the flat buffer of this process's shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastpoem.engine.optim import FlatAdamW, Layout
from fastpoem.engine.world import World
from fastpoem.model.gpt2 import GPT2


class FullySharded(FlatAdamW):
    """Clipped AdamW over this process's shards of a model's parameters. Tensors as FlatAdamW's, of the shards; their dtype is float32, `computed`
    the one that the model computes in. `whole`: in the first process, the weights that the model came with, on the CPU."""

    def __init__(self, model: GPT2, device: torch.device, computed: torch.dtype, world: World, **settings: Any) -> None:
        whole_layout = Layout.of(dict(model.named_parameters()))
        whole = None
        if world.is_first:
            whole = torch.zeros(whole_layout.size)
            for name, parameter in model.named_parameters():
                whole_layout.view(whole, name).copy_(parameter.detach())
        self._model, self._world = model, world
        self._shards = _shard(model, device, computed, world)
        super().__init__(model, device, torch.float32, divided=True, **settings)
        self.whole_layout, self.whole = whole_layout, whole

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, shard.to_local().detach()) for name, shard in self._shards.items())

    def _adopt(self, name: str, parameter: Tensor) -> None:
        """FSDP's shards keep memory of their own, which `reload` writes."""

    def collect(self) -> None:
        here = {name: shard.grad.to_local() for name, shard in self._shards.items() if shard.grad is not None}
        self.grad.zero_()
        torch._foreach_copy_([self.view(self.grad, name) for name in here], list(here.values()))
        for shard in self._shards.values():
            shard.grad = None

    def step(
        self, loss: Tensor, gradient: Tensor | None = None, norm: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        told = super().step(loss, gradient, norm)
        self.reload()
        return told

    @torch.no_grad()
    def reload(self) -> None:
        """Write the masters into FSDP's shards, and have no process keep weights that were put together before."""
        for module in (*self._model.transformer.h, self._model):
            module.reshard()
        torch._foreach_copy_([local for _, local in self._parameters()], [view for _, view in self.named(self.master)])

    def to_first(self, flat: Tensor, whole: Tensor | None) -> None:
        """All processes' shards out of `flat` (P of this one,) in `whole`, which the first has, on the CPU."""
        for name, (rows, shape) in self._places():
            full = torch.zeros(shape, device=flat.device)
            full[rows] = self.view(flat, name)
            self._world.add_up(full)  # the others have zeros there
            if whole is not None:
                self.whole_layout.view(whole, name).copy_(full)

    def from_first(self, flat: Tensor, whole: Tensor | None) -> None:
        """This process's shards into `flat`, out of the first's `whole`."""
        for name, (rows, shape) in self._places():
            full = torch.empty(shape, device=flat.device)
            if whole is not None:
                full.copy_(self.whole_layout.view(whole, name))
            self._world.broadcast(full)
            self.view(flat, name).copy_(full[rows])

    def _places(self) -> Iterator[tuple[str, tuple[slice, torch.Size]]]:
        """By name: which rows of the whole parameter are here, and its shape. FSDP cuts as torch.chunk does."""
        for name, shape in self.whole_layout.shapes.items():
            each = -(-shape[0] // self._world.size)
            begin = min(self._world.rank * each, shape[0])
            yield name, (slice(begin, begin + self.layout.shapes[name][0]), shape)


def _shard(model: GPT2, device: torch.device, computed: torch.dtype, world: World) -> dict[str, Any]:
    """Have FSDP shard `model`. Returns the shards (DTensor) by the parameters' names."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    narrow = None if computed == torch.float32 else computed
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
    modules: list[nn.Module] = [*model.transformer.h, model]  # the root last
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # each share's gradient has its weight in the whole step's already
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return dict(model.named_parameters())
