"""What the driver says of the NVIDIA GPUs of this machine, and why PyTorch has none where it has none.

Free memory is asked of nvidia-smi, not of CUDA: to ask CUDA is to leave a context of some hundred megabytes on every card of a machine that
others may be using.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastpoem.errors import first_line

SMI = ("nvidia-smi", "--query-gpu=uuid,memory.free,memory.total", "--format=csv,noheader,nounits")
GET_CUDA = "install a PyTorch with CUDA (https://pytorch.org/get-started/locally has the command)"
NONE_WANTED = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES


class Card(NamedTuple):
    """free, total: MiB."""

    uuid: str
    free: int
    total: int


def cards() -> list[Card]:
    """In no order of CUDA's. None where there is no driver, or it does not answer."""
    try:
        return [Card(uuid.removeprefix("GPU-"), int(free), int(total)) for uuid, free, total in _asked()]
    except ValueError:  # a card that shares the machine's memory has none of its own: [N/A]
        return []


def _asked() -> list[list[str]]:
    """The fields of each line that nvidia-smi says; none where it is not there, or fails."""
    try:
        told = subprocess.run(SMI, capture_output=True, text=True, errors="replace", timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[part.strip() for part in line.split(",")] for line in told.splitlines() if line.strip()]


def most_free(count: int, say: Callable[[str], None]) -> int:
    """Which of CUDA's `count` devices has the most free memory, the first of equals; of several, `say` hears which. The first where the
    driver does not tell."""
    if count == 1:
        return 0
    known = {card.uuid: card for card in cards()}
    mine = [known.get(str(getattr(torch.cuda.get_device_properties(i), "uuid", ""))) for i in range(count)]
    told = {i: card for i, card in enumerate(mine) if card is not None}
    if len(told) < count:
        say(f"cuda:0 is the first of {count} GPUs; --device cuda:N takes another")
        return 0
    best = max(told, key=lambda i: told[i].free)
    amount = f"{told[best].free / 1024:.1f} of {told[best].total / 1024:.1f} GiB"
    say(f"cuda:{best} has the most free memory of {count} GPUs, {amount}; --device cuda:N takes another")
    return best


def idle() -> str | None:
    """Why a GPU that is in this machine, and that nobody told CUDA to leave alone, is not used; None where there is none such. Asked where
    PyTorch has no CUDA device."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in NONE_WANTED or not _is_there():
        return None
    return f"there is a GPU, but it is not used: {'; '.join(why_no_cuda())}"


def why_no_cuda() -> tuple[str, str]:
    """(why PyTorch has no CUDA device here, the mend), where it has none."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) is a CPU build", GET_CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in NONE_WANTED:
        return f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs", "unset it"
    if not _is_there():
        return "there is no such device here; this machine has cpu", "see that nvidia-smi finds a GPU"
    try:
        torch.cuda.init()
        reason = "it finds none"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    reason += f"; CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
    reason = f"PyTorch {torch.__version__}, made for CUDA {torch.version.cuda}, cannot use the GPU here ({reason})"
    return reason, "update the driver, or install a PyTorch for an older CUDA"


def _is_there() -> bool:
    return Path("/dev/nvidia0").exists() or bool(_asked())
