"""Which device, and which number format on it."""

from __future__ import annotations

import torch

from fastpoem.errors import InputError


def choose_device(wanted: str) -> torch.device:
    """auto: the first GPU, else the CPU. Raises InputError for a device that is not there, listing those that are.

    Turns cuDNN's attention off: PyTorch prefers it on Hopper wherever nothing is dropped (validation, --dropout 0), and it builds a plan
    for every shape anew, where the flash kernel serves all of them.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{i}" for i in range(count))]
    if wanted == "auto":
        return torch.device(there[1] if count else "cpu")
    kind, _, index = wanted.partition(":")
    if wanted == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (":" in wanted and not index.isdecimal()):
        raise InputError(f"--device {wanted}", "no such kind of device", "use auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        raise InputError(f"--device {wanted}", "there is no such device here", f"this machine has {', '.join(there)}")
    return torch.device("cuda", int(index or 0))


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, the reason in a few words). Raises InputError for bf16 on a GPU without it."""
    # What is called fp32 is fp32: no TF32 products, and no 16-bit partial sums in bf16 ones.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if wanted == "fp32":
        return torch.float32, "asked for"
    if device.type == "cpu":
        # bf16 without matrix units for it is emulated or slower than fp32
        return (torch.bfloat16, "asked for") if wanted == "bf16" else (torch.float32, "the CPU's default")
    has_it = torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "bf16" and not has_it:
        raise InputError(
            "--precision bf16", f"{torch.cuda.get_device_name(device)} has no bf16", "use --precision fp32"
        )
    if has_it:
        return torch.bfloat16, "asked for" if wanted == "bf16" else "the GPU has it"
    return torch.float32, "the GPU has no bf16"
