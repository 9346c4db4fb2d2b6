"""Which form of the loss and of the update a run uses: on a GPU, a kernel of ours only after it has proved itself on that very card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastpoem_kernels import clipped_adamw_, cross_entropy, plain


class Kernels(NamedTuple):
    """`cross_entropy` and `clipped_adamw_` of fastpoem_kernels, or the plain forms of either."""

    cross_entropy: Callable[..., Any] = cross_entropy
    clipped_adamw_: Callable[..., Any] = clipped_adamw_


OURS = Kernels()


def choose_kernels(failed: Mapping[str, str], say: Callable[[str], None]) -> Kernels:
    """PyTorch's own operators for a kernel that failed its check (`failed`: record's name -> reason), saying so.

    The CPU forms are made of those operators and need no check."""
    for name, reason in failed.items():
        say(f"kernel {name} failed its check on this GPU ({reason}): PyTorch's own is used")
    names = {name.split(" ")[0] for name in failed}
    # a check that did not even end names no kernel
    unknown = any(not name.startswith(("cross_entropy", "clipped_adamw")) for name in names)
    return Kernels(
        plain.cross_entropy if unknown or any(name.startswith("cross_entropy") for name in names) else cross_entropy,
        plain.clipped_adamw_ if unknown or "clipped_adamw" in names else clipped_adamw_,
    )
