"""A device in Python with what Apple's has not: no float64, no operator between its memory and the host's, none of a list of others.

Its tensors hold CPU tensors and compute by them. It shows which operators a step asks of such a device and that the numbers come out the
same; what Apple's own kernels make of them it cannot show. `python -m tests.apple` trains on it and on the CPU and prints both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
MISSING = {"take", "searchsorted", "_pin_memory", "_fused_adamw_", "bucketize"}
CROSSES = {"_to_copy", "copy_"}


class Held(Tensor):
    """A tensor of the device, `inner` on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Held:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device="apple:0"
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Held) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, dict(kwargs)))
    name = func.__name__.split(".")[0]
    here = any(isinstance(x, Held) for x in flat)
    goal = kwargs.get("device")
    goes = goal is not None and torch.device(goal).type == "apple"
    if not here and not goes:
        return func(*args, **kwargs)
    asked.add(name)
    assert name not in MISSING and func.namespace == "aten", f"{func} is not there"
    assert not any(isinstance(x, Tensor) and not isinstance(x, Held) and x.dim() for x in flat) or name in CROSSES, (
        f"{func} of tensors of two devices"
    )
    known = {id(x.inner): x for x in flat if isinstance(x, Held)}
    plain, named = tree_unflatten([x.inner if isinstance(x, Held) else x for x in flat], spec)
    if goes:
        named["device"] = torch.device("cpu")
    out = func(*plain, **named)
    if name == "_to_copy" and here and goal is not None and not goes:
        asked.add(f"to the host {out.dtype}")
        assert out.dtype == args[0].dtype, "a copy between devices that changes the dtype too"
        return out
    if name == "copy_" and not isinstance(args[0], Held):
        return args[0]
    if name == "copy_" and not isinstance(args[1], Held):
        assert args[1].dtype in (args[0].dtype, torch.uint8), "a copy between devices that changes the dtype too"

    def wrapped(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        assert x.dtype != torch.float64, f"{func} makes float64"
        return known[id(x)] if id(x) in known else Held(x)

    result = tree_map(wrapped, out)
    return return_and_correct_aliasing(func, args, kwargs, result)


asked: set[str] = set()


class Factories(TorchDispatchMode):
    """For what makes tensors of the device from none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextmanager
def apple() -> Iterator[torch.device]:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("apple")
    with Factories():
        yield torch.device("apple", 0)


def trained(device: torch.device, packed: bool, steps: int = 6) -> dict[str, Any]:
    """Losses, norms and totals of a few steps on `device` and of a validation after them."""
    from fastpoem.config import TrainConfig
    from fastpoem.corpus.feed import Rows, Shape
    from fastpoem.doctor.trust import decide
    from fastpoem.engine.optim import FlatAdamW
    from fastpoem.engine.step import Pieces, TrainStep, evaluate, home
    from fastpoem.model.gpt2 import GPT2, GPT2Config

    model = GPT2(GPT2Config(101, 24, 16, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    model.initialise(0)
    kernels = decide(TrainConfig(), device, torch.float32, 101, print).kernels
    model.to(device).train()
    optimizer = FlatAdamW(model, device, torch.float32, weight_decay=0.01, max_norm=0.5, kernels=kernels)
    source = torch.zeros(52, dtype=torch.int16, device=home(device))
    step = TrainStep(Pieces.plain(model, device), optimizer, source, poems=4, pad_id=0)
    draw, found, rows = torch.Generator().manual_seed(0), [], []
    for _ in range(steps):
        ids = torch.randint(1, 101, (52,), generator=draw).short()
        shape = Shape(4, 13, 48) if packed else Shape(4, 13)
        rows.append(Rows(ids, torch.tensor([[0, 6], [13, 13], [26, 13], [39, 13]]), shape, 41))
        step(rows[-1], 1e-2)
        found.append([*step.result()])
    held = evaluate(model, rows[:2], device, 0, kernels)
    weights = {name: part.cpu().double().norm().item() for name, part in optimizer.named(optimizer.master)}
    return {"steps": found, "totals": [*step.totals()], "held out": [*held], "weights": weights}


if __name__ == "__main__":
    with apple() as device:  # known to autograd before its first backward pass
        results = [[trained(one, packed) for packed in (False, True)] for one in (torch.device("cpu"), device)]
    print(json.dumps({"cpu": results[0], "apple": results[1], "asked": sorted(asked)}))
