"""Which form of the loss and of the update a run uses: on a GPU, a kernel of ours only after it has proved itself on that very card."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from fastpoem_kernels import clipped_adamw_, cross_entropy, plain


class Kernels(NamedTuple):
    """`cross_entropy` and `clipped_adamw_` of fastpoem_kernels, or the plain forms of either."""

    cross_entropy: Callable[..., Any] = cross_entropy
    clipped_adamw_: Callable[..., Any] = clipped_adamw_


OURS = Kernels()
PLAIN = Kernels(plain.cross_entropy, plain.clipped_adamw_)


PLAIN_LOSS, PLAIN_UPDATE = "plain-loss", "plain-update"  # in the name of a check: what it does without


def done_without(failed: Iterable[str]) -> list[str]:
    """PLAIN_LOSS, PLAIN_UPDATE, both or neither: what the names of records that are not ok leave out."""
    names = {name.split(" ")[0] for name in failed}
    # a check that did not even end names no kernel
    unknown = any(not name.startswith(("cross_entropy", "clipped_adamw")) for name in names)
    loss = unknown or any(name.startswith("cross_entropy") for name in names)
    return [PLAIN_LOSS] * loss + [PLAIN_UPDATE] * (unknown or "clipped_adamw" in names)


def kernels_without(words: Collection[str]) -> Kernels:
    """PyTorch's own operators for PLAIN_LOSS and PLAIN_UPDATE, where they are among `words`, and ours."""
    return Kernels(
        plain.cross_entropy if PLAIN_LOSS in words else cross_entropy,
        plain.clipped_adamw_ if PLAIN_UPDATE in words else clipped_adamw_,
    )


def choose_kernels(failed: Mapping[str, str], say: Callable[[str], None]) -> Kernels:
    """PyTorch's own operators for a kernel that failed its check (`failed`: record's name -> reason), saying so.

    The CPU forms are made of those operators and need no check."""
    for name, reason in failed.items():
        say(f"kernel {name} failed its check on this GPU ({reason}): PyTorch's own is used")
    return kernels_without(done_without(failed))
