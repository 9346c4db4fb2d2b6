"""The C of this folder, compiled for this processor when it is first wanted and kept: what a step on a CPU uses where it can.

There is a library for float32 tensors and one for bfloat16, of the same source. gcc is needed once for each and takes some seconds; without
it, or off Linux, PyTorch's own operators do the same work more slowly. The libraries share PyTorch's OpenMP threads: with a pool of their
own the two would wait for the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HALF = {torch.float32: False, torch.bfloat16: True}  # what the C calls dtypes
SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
COMPILE = "-std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -fPIC -shared"
LINK = "-nodefaultlibs -lm -lc"  # or -fopenmp would bring an OpenMP of its own


_folder: Path | None = None  # where it is kept, if not in the user's cache


def keep_in(folder: Path | None) -> None:
    """Have the library kept in `folder`, None: in the user's cache. What is loaded already stays."""
    global _folder
    _folder = folder


def why_not(dtype: torch.dtype = torch.float32) -> str | None:
    """What keeps this machine from the C for tensors of `dtype`, None where it is loaded."""
    if dtype not in HALF:
        return f"it is not made for {str(dtype)[6:]}"
    loaded = _loaded(HALF[dtype])
    return loaded if isinstance(loaded, str) else None


def usable(*tensors: Tensor) -> bool:
    """Are these in the CPU's memory, all float32 or all bfloat16, without gaps, will products of them be so too, and is the C for them there?"""
    dtype = tensors[0].dtype
    suit = all(_suits(t) and t.dtype == dtype for t in tensors)
    return suit and not torch.is_autocast_enabled("cpu") and why_not(dtype) is None


def _suits(t: Tensor) -> bool:
    real = type(t) in (Tensor, torch.nn.Parameter)  # others, such as a FakeTensor, need not have memory of their own
    return real and t.is_cpu and t.is_contiguous()


def run(name: str, *arguments: Tensor | float, dtype: torch.dtype | None = None) -> int:
    """Call a function of the C with tensors (their memory), numbers (int as int64, float as float32) and PyTorch's number of threads.
    It is the one for bfloat16 where `dtype` or any of the tensors is."""
    half = any(a.dtype == torch.bfloat16 for a in arguments if isinstance(a, Tensor)) or dtype == torch.bfloat16
    function = getattr(_loaded(half), name)
    function.restype = ctypes.c_int64  # ctypes takes a result for an int, and a size need not fit one
    result: int = function(*map(_as_c, arguments), torch.get_num_threads())
    return result


def _as_c(argument: Tensor | float) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


@cache
def _loaded(half: bool) -> ctypes.CDLL | str:
    """The library for bfloat16, or for float32, or why there is none."""
    if sys.platform != "linux":
        return "it is made for Linux"
    try:
        compiler, openmp = shutil.which("gcc"), _openmp_in_use()
        if compiler is None or openmp is None:
            return "gcc is not installed" if compiler is None else "PyTorch has no OpenMP here"
        command = [
            compiler,
            *COMPILE.split(),
            f"-DHALF={int(half)}",
            *(str(file) for file in SOURCES if file.suffix == ".c"),
            openmp,
            *LINK.split(),
        ]
        library = _kept_at(command)
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder) / library.name
                command += ["-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=60)
                with made.open("rb") as file:
                    os.fsync(file.fileno())  # or a power failure may leave it empty under the name that is kept
                made.replace(library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"gcc failed: {(error.stderr.strip().splitlines() or [f'exit code {error.returncode}'])[-1]}"
    except subprocess.TimeoutExpired:
        return "gcc took more than a minute"
    except (OSError, RuntimeError) as error:
        return str(error)


def _openmp_in_use() -> str | None:
    """The file of the OpenMP library that PyTorch has loaded."""
    files = (line.split(maxsplit=5)[-1] for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines())
    return next((file for file in files if re.fullmatch(r"/.*/lib(g|i|)omp[^/]*\.so[^/]*", file)), None)


def _kept_at(command: list[str]) -> Path:
    """Where the library of this source, compiler and processor is kept: a home folder may be shared by machines of several kinds."""
    processor = {
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if re.match("flags|Features|model", line)
    }
    key = repr([[file.read_bytes() for file in SOURCES], command, os.stat(command[0]).st_mtime_ns, sorted(processor)])
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = _folder or Path(home) / "fastpoem" / "native"
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
