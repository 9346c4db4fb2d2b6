"""Which device, and which number format on it: on a CPU by measurement, because bf16 is several times as fast as fp32 on some and slower on others."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from fastpoem_kernels import product
from torch import Tensor

from fastpoem.engine import cards
from fastpoem.errors import InputError
from fastpoem.model.gpt2 import GPT2Config

MARGIN = 1.2  # times as fast as fp32 bf16 has to multiply, as a step gains less and noise must not decide
WORTH = 20e9  # FLOPs of a step's products below which there are only milliseconds to win, and noise decides
ROUNDS, SECONDS = 9, 0.5


def choose_device(wanted: str, say: Callable[[str], None] = lambda line: None) -> torch.device:
    """auto: the GPU with the most free memory, else the CPU; `say` hears which of several, and why not one that is there. Raises InputError
    for a device that cannot be had, with the reason.

    Sets for the process how CUDA devices compute. What is called fp32 is fp32: no TF32 products, and no 16-bit partial sums in bf16 and
    fp16 ones. cuDNN's attention is off: PyTorch prefers it on Hopper wherever nothing is dropped (validation, --dropout 0), and it builds a
    plan for every shape anew, where the flash kernel serves all of them.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    kind, _, index = wanted.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (":" in wanted and not (kind == "cuda" and index.isdecimal())):
        raise InputError(f"--device {wanted}", "no such kind of device", "use auto, cpu, cuda, cuda:N or mps")
    if wanted == "cpu":
        return torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old: `cards` says it in a line
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            why = (
                "there is no such device here" if torch.backends.mps.is_built() else "this PyTorch is built without it"
            )
            raise InputError("--device mps", why, f"this machine has {there}")
        return torch.device("mps")
    if not count:
        if wanted == "auto":
            if idle := cards.idle():
                say(idle)
            return torch.device("cpu")
        reason, mend = cards.why_no_cuda()
        raise InputError(f"--device {wanted}", reason, f"{mend}, or use --device cpu")
    if wanted == "auto":
        return _current(cards.most_free(count, say))
    if int(index or 0) >= count:
        raise InputError(f"--device {wanted}", "there is no such device here", f"this machine has {there}")
    return _current(int(index or 0))


def _current(index: int) -> torch.device:
    """Streams and graphs are made on the process' current device, whatever their tensors are on: so it is the one that trains."""
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_dtype(wanted: str, device: torch.device, shape: GPT2Config, tokens: int) -> tuple[torch.dtype, str]:
    """(dtype, the reason in a few words) for steps of about `tokens` tokens. Raises InputError for what the device has not."""
    if device.type not in ("cpu", "cuda"):
        if wanted not in ("auto", "fp32"):
            raise InputError(f"--precision {wanted}", f"on {device} training is in fp32 only", "use --precision fp32")
        return torch.float32, "asked for" if wanted == "fp32" else f"all there is on {device}"
    if wanted == "auto" and device.type == "cpu":
        return _measured(shape, tokens)
    if wanted == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise InputError(
            "--precision bf16", f"{torch.cuda.get_device_name(device)} has no bf16", "use --precision fp16"
        )
    if wanted == "fp16" and device.type == "cpu":
        return torch.float16, "asked for; slow on a CPU, --precision auto is faster"
    if wanted != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted], "asked for"
    if has_bf16(device):
        return torch.bfloat16, "the GPU has it"
    if torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16, "the GPU has no bf16, and computes fp16 faster than fp32"
    return torch.float32, "the GPU has no matrix units"


def has_bf16(device: torch.device) -> bool:
    """A CPU computes it, however slowly; PyTorch does so on an old GPU too, which is not meant here."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


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
            product(one, other)
        return time.thread_time() - begin

    full, half = operands(torch.float32), operands(torch.bfloat16)
    threads, ratios = torch.get_num_threads(), list[float]()
    torch.set_num_threads(1)
    try:
        seconds(*full), seconds(*half)  # which compiles and loads code, and touches memory
        begin = time.perf_counter()
        for _ in range(ROUNDS):
            ratios.append(seconds(*full) / seconds(*half))
            if time.perf_counter() - begin > SECONDS:
                break
    finally:
        torch.set_num_threads(threads)
    return ratios
