"""Which form of the loss and of the update a run uses: on a GPU, a kernel of ours only after it has proved itself on that very card."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fastpoem_kernels import clipped_adamw_, cross_entropy, plain
from fastpoem_kernels.check import check


class Kernels(NamedTuple):
    """`cross_entropy` and `clipped_adamw_` of fastpoem_kernels, or the plain forms of either."""

    cross_entropy: Callable[..., Any] = cross_entropy
    clipped_adamw_: Callable[..., Any] = clipped_adamw_


OURS = Kernels()


def choose_kernels(device: torch.device, vocabulary: int, say: Callable[[str], None]) -> Kernels:
    """Check each kernel on `device`, some seconds, and take PyTorch's own operators for one that fails, saying so.

    The CPU forms are made of those operators and need no check. FASTPOEM_ASSUME_CHECKED=1 spares it (a pretend GPU computes nothing).
    """
    if device.type == "cpu" or os.environ.get("FASTPOEM_ASSUME_CHECKED") == "1":
        return OURS
    failed = [
        record for record in check(device, rows=256, vocabulary=vocabulary, parameters=4_000_000) if not record.ok
    ]
    for record in failed:
        say(f"kernel {record.name} failed its check ({record.note or f'error {record.error}'}): PyTorch's own is used")
    names = {record.name.split(" ")[0] for record in failed}
    return Kernels(
        plain.cross_entropy if any(name.startswith("cross_entropy") for name in names) else cross_entropy,
        plain.clipped_adamw_ if "clipped_adamw" in names else clipped_adamw_,
    )
