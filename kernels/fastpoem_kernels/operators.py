"""How a Python function becomes an operator: opaque to torch.compile, honest about what it overwrites.

`torch.library.custom_op` does the same and, at the first call, imports torch._dynamo: more than a second before the first step of a program that
compiles nothing. So the operator is declared by `torch.library.define` and `impl`, and moves the version counters of what it overwrites
itself. It has no formula for autograd: it is called where gradients are off, inside a `torch.autograd.Function` or `no_grad`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version


def operator(name: str, overwrites: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function `torch.ops.fastpoem.<name>`; its annotations are the schema, `overwrites` names the tensors it writes to."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=overwrites)
        torch.library.define(f"fastpoem::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        written = [at for at, argument in enumerate(names) if argument in overwrites]

        def implementation(*args: Any) -> Any:
            result = function(*args)
            for at in written:
                if args[at] is not None:
                    increment_version(args[at])  # a Triton kernel writes behind PyTorch's back
            return result

        torch.library.impl(f"fastpoem::{name}", "default", implementation)
        return getattr(torch.ops.fastpoem, name).default

    return make


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as what the operator's results look like."""
    return torch.library.register_fake(f"fastpoem::{name}")
