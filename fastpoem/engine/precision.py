"""Which device, and which number format on it: on a CPU by measurement, because bf16 is several times as fast as fp32 on some and slower on others."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from fastpoem.errors import InputError
from fastpoem.model.gpt2 import GPT2Config

MARGIN = 1.2  # times as fast as fp32 bf16 has to be: beside the products it loses (elementwise work, loss), and noise must not decide
WORTH = 20e9  # FLOPs of a step's products below which there are only milliseconds to win, and noise decides
ROUNDS, SECONDS = 9, 0.5


def choose_device(wanted: str) -> torch.device:
    """auto: the first GPU, else the CPU. Raises InputError for a device that is not there, listing those that are.

    Sets for the process how CUDA devices compute. What is called fp32 is fp32: no TF32 products, and no 16-bit partial sums in bf16 ones.
    cuDNN's attention is off: PyTorch prefers it on Hopper wherever nothing is dropped (validation, --dropout 0), and it builds a plan for
    every shape anew, where the flash kernel serves all of them.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{i}" for i in range(count))]
    if wanted == "auto":
        return _current(0) if count else torch.device("cpu")
    kind, _, index = wanted.partition(":")
    if wanted == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (":" in wanted and not index.isdecimal()):
        raise InputError(f"--device {wanted}", "no such kind of device", "use auto, cpu, cuda or cuda:N")
    if int(index or 0) >= count:
        raise InputError(f"--device {wanted}", "there is no such device here", f"this machine has {', '.join(there)}")
    return _current(int(index or 0))


def _current(index: int) -> torch.device:
    """Streams and graphs are made on the process' current device, whatever their tensors are on: so it is the one that trains."""
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(wanted: str, device: torch.device, shape: GPT2Config, tokens: int) -> tuple[torch.dtype, str]:
    """(dtype, the reason in a few words) for steps of about `tokens` tokens. Raises InputError for bf16 on a GPU without it."""
    if wanted == "fp32":
        return torch.float32, "asked for"
    if device.type == "cpu":
        return (torch.bfloat16, "asked for") if wanted == "bf16" else _measured(shape, tokens)
    has_it = torch.cuda.get_device_capability(device) >= (8, 0)
    if wanted == "bf16" and not has_it:
        raise InputError(
            "--precision bf16", f"{torch.cuda.get_device_name(device)} has no bf16", "use --precision fp32"
        )
    if has_it:
        return torch.bfloat16, "asked for" if wanted == "bf16" else "the GPU has it"
    return torch.float32, "the GPU has no bf16"


def _measured(shape: GPT2Config, tokens: int) -> tuple[torch.dtype, str]:
    """bf16 where it is clearly the faster on this CPU, in less than a second."""
    wide, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    weights = shape.n_layer * (4 * wide**2 + 2 * wide * inner) + shape.vocab_size * wide
    if 6 * weights * tokens < WORTH:
        return torch.float32, "too small a step for bf16 to pay"
    ratios = _probe(min(tokens, 128), min(wide, 1024), min(inner, 4096))
    faster = statistics.median(ratios) >= MARGIN and min(ratios) >= 1
    said = f"measured: bf16 multiplies at {statistics.median(ratios):.2f} times fp32's speed here"
    return (torch.bfloat16 if faster else torch.float32), said


def _probe(rows: int, wide: int, inner: int) -> list[float]:
    """Speed of bf16 over fp32 in the products of an MLP, forward and backward, in turn: a ratio a round, no more than SECONDS of them.

    One thread, by the processor time that it gets: threads that wait for one another on busy cores would measure the others' work.
    """

    def operands(dtype: torch.dtype) -> list[Tensor]:
        return [torch.full(size, 0.01, dtype=dtype) for size in ((rows, wide), (wide, inner), (rows, inner))]

    def seconds(x: Tensor, weight: Tensor, dy: Tensor) -> float:
        begin = time.thread_time()
        for one, other in ((x, weight), (dy, weight.t()), (x.t(), dy)):
            torch.mm(one, other)
        return time.thread_time() - begin

    full, half = operands(torch.float32), operands(torch.bfloat16)
    threads, begin, ratios = torch.get_num_threads(), time.perf_counter(), []
    torch.set_num_threads(1)
    try:
        for number in range(ROUNDS + 1):
            ratio = seconds(*full) / seconds(*half)
            if number:  # the first loads code and touches memory
                ratios.append(ratio)
            if ratios and time.perf_counter() - begin > SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return ratios
