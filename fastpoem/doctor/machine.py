"""What a device is and what it can do: its name and limits, the versions around it, and its rates as measured, beside the published ones."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpoem.engine import cards
from fastpoem.version import __version__


class Peak(NamedTuple):
    """Published, dense: TFLOP/s of 16-bit products (the same for bf16 and fp16, where there are both) and of fp32 ones outside the matrix
    units, TB/s of memory."""

    half: float
    fp32: float
    memory: float


# By a part of the name that the driver gives; the first that fits. From NVIDIA's data sheets.
PEAKS = {
    "H200": Peak(989, 67, 4.8),
    "H100 NVL": Peak(835, 60, 3.9),
    "H100 PCIe": Peak(756, 51, 2.0),
    "H100": Peak(989, 67, 3.35),
    "A100-SXM4-80GB": Peak(312, 19.5, 2.04),
    "A100 80GB PCIe": Peak(312, 19.5, 1.94),
    "A100": Peak(312, 19.5, 1.56),
    "L40S": Peak(362, 91.6, 0.864),
    "A10": Peak(125, 31.2, 0.6),
    "RTX 4090": Peak(165, 82.6, 1.01),
    "RTX 3090": Peak(71, 35.6, 0.936),
    "V100-SXM2": Peak(125, 15.7, 0.9),
    "V100-PCIE": Peak(112, 14.0, 0.9),
    "Tesla T4": Peak(65, 8.1, 0.32),
}
ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
)  # of /proc/cpuinfo, what products profit by
UNITS = ({"avx512f": "AVX-512", "avx2": "AVX2"}, {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX-512 bf16"})


def peak(name: str) -> Peak | None:
    return next((figures for part, figures in PEAKS.items() if part in name), None)


def units(flags: Collection[str]) -> list[str]:
    """The processor's widest units for fp32 and for bf16 products, by name; none that `flags`, in the words of /proc/cpuinfo, do not tell."""
    found = ([name for flag, name in kind.items() if flag in flags] for kind in UNITS)
    return [names[0] for names in found if names]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str:
    """The driver's own version where Linux tells it, else the CUDA version that it is made for."""
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    number = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return f"CUDA {number.value // 1000}.{number.value % 1000 // 10}"


def describe(device: torch.device) -> dict[str, Any]:
    """The device and the machine around it."""
    cpu = _cpuinfo()
    found: dict[str, Any] = {
        "device": str(device),
        "name": cpu.get("model name", platform.processor() or platform.machine()),
        "capability": None,
        "processors": None,  # streaming multiprocessors
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_threads": torch.get_num_threads(),
        "cpu_instructions": [one for one in ISA if one in cpu.get("flags", "").split()],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else [],
        "unused_gpu": None if torch.cuda.is_available() else cards.idle(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "processors": properties.multi_processor_count,
        }
    return found


def versions(device: torch.device) -> dict[str, str | None]:
    """None: not there."""
    names = ("triton", "transformers", "flash-attn", "numpy", "tokenizers")
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastpoem": __version__,
    }
    found |= {name.replace("-", "_"): version(name) for name in names}
    found |= {"cuda": torch.version.cuda, "driver": driver() if device.type == "cuda" else None}
    return found


def memory(device: torch.device) -> dict[str, int]:
    """Bytes free and in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"free": free, "total": total}
    page = os.sysconf("SC_PAGE_SIZE")
    return {"free": page * os.sysconf("SC_AVPHYS_PAGES"), "total": page * os.sysconf("SC_PHYS_PAGES")}


def allocator(device: torch.device) -> dict[str, Any]:
    """expandable_segments: whether PyTorch's allocator maps pages into segments that grow (None: none of CUDA's); what the environment asks
    of it, in the name that PyTorch reads first."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    asked = next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), None)
    grows = None
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError, AttributeError, KeyError):
            torch.cuda.init()
            grows = bool(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
    return {"expandable_segments": grows, "allocator": asked}


def rates(device: torch.device) -> dict[str, float]:
    """GB/s of a copy (read and written), TFLOP/s of products: the best square ones, and the logits' of a step of 16 x 65 tokens."""
    gpu = device.type == "cuda"
    count = (1 << 28) if gpu else (1 << 25)
    source = torch.zeros(count, device=device)
    sink = torch.empty_like(source)
    found = {"copy_gb_s": 8 * count / seconds(device, partial(sink.copy_, source)) / 1e9}
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for name, dtype in {**kinds, "fp16": torch.float16}.items() if gpu else kinds.items():
        side = 8192 if gpu else 1536
        a = torch.randn(side, side, device=device).to(dtype)
        found[f"{name}_tflop_s"] = 2 * side**3 / seconds(device, partial(torch.mm, a, a)) / 1e12
        x = torch.randn(1040, 768, device=device).to(dtype)
        w = torch.randn(21128, 768, device=device).to(dtype)
        flops = 2 * 1040 * 768 * 21128
        found[f"{name}_logits_tflop_s"] = flops / seconds(device, partial(torch.mm, x, w.t())) / 1e12
    return found


def seconds(device: torch.device, run: Callable[[], Any], rounds: int = 5) -> float:
    """Median of `rounds` after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - begin)
    return max(statistics.median(times[1:]), 1e-9)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; nothing where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
