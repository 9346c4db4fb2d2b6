"""Which batches a run takes where the user leaves it open: packed ones of random poems wherever attention inside packs is as fast as rows.

Packed batches hold no padding and are drawn at random, which teaches a little more than batches of like length do (docs/log.md). Everything
but attention is indifferent to them. Attention has C for them on a CPU, and the variable-length flash kernel on a GPU; elsewhere
it would unfold them to rows as long as the longest of 16, and batches of like length are faster.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from fastpoem_kernels import native

from fastpoem.config import TrainConfig
from fastpoem.model.flash import find_varlen

Batching = Literal["bucket", "pack", "pad"]  # what auto comes to


def choose_batching(
    config: TrainConfig, device: torch.device, dtype: torch.dtype, head_width: int, before: str | None = None
) -> tuple[Batching, str]:
    """(how poems are batched, the reason in a few words). before: what a run that goes on began with. A GPU's kernel may still fail its
    check (`fastpoem.doctor.trust`)."""
    if config.batching != "auto":
        return config.batching, "asked for"
    if before is not None:
        return cast(Batching, before), "as the run began"
    if config.loss_on_padding:
        return "bucket", "packed batches have no padding"
    if device.type == "cuda":
        if config.attention == "sdpa":
            return "bucket", "--attention sdpa takes rows"
        varlen, what = find_varlen(device, dtype, head_width)
        return ("bucket" if varlen is None else "pack"), what
    if config.compile == "on":
        return "bucket", "the C for packed attention is not compiled into the model"
    if device.type != "cpu":
        return "bucket", f"there is no packed attention on {device.type}"
    reason = native.why_not(dtype)
    if reason is None and config.parallel == "fsdp":
        return "pack", "as without FSDP"  # whose processes have no use for the C
    return ("pack", "attention in C") if reason is None else ("bucket", f"no attention in C: {reason}")
