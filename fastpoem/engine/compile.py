"""torch.compile for the pieces of the step: the model, and the small arithmetic around it.

One form serves every length, but for alignment: on CUDA another is made for lengths divisible by 8. The length is declared dynamic from
the start, because PyTorch would otherwise specialise on each of the first eight and then give up. What is compiled is kept on disk between runs, by PyTorch, in a folder of ours that nobody sweeps.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from fastpoem_kernels import native
from torch import Tensor

from fastpoem.corpus.feed import Shape
from fastpoem.engine.batch import assemble
from fastpoem.engine.step import Pieces, account
from fastpoem.model.attention import Packing
from fastpoem.model.dropout import draw_seeds
from fastpoem.model.gpt2 import GPT2
from fastpoem.paths import keep_caches, user_cache


def why_not_compile(device: torch.device) -> str | None:
    """What is missing here for torch.compile, None where nothing is: asked at the start, not found at the first step."""
    if device.type not in ("cpu", "cuda"):
        return f"it is not done on {device}"
    names = (
        (os.environ.get("CC"), "gcc", "clang", "cc")
        if device.type == "cuda"
        else (os.environ.get("CXX"), "g++", "clang++")
    )
    if not any(shutil.which(name) for name in names if name):
        return "there is no C compiler" if device.type == "cuda" else "there is no C++ compiler"
    headers = _python_headers()
    if not (headers / "Python.h").is_file():
        return f"there is no Python.h in {headers} (Debian: apt-get install python3-dev)"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
    return None


def _python_headers() -> Path:
    """Where Triton and Inductor look for them."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


def keep_caches_in(folder: str | None) -> None:
    """Have the verdicts, and all that compilers make, kept in `folder` (--cache-dir), None: in the user's cache."""
    keep_caches(folder)
    native.keep_in(None if folder is None else user_cache() / "native")


def compiled_pieces(model: GPT2, backend: str = "inductor", combined: bool = True) -> Pieces:
    """The pieces, to be compiled when they are first called. A graph break raises there. combined: small kernels share launches where
    PyTorch can do that. Dropout draws by seeds, so that the compiler may draw a mask wherever it likes (fastpoem.model.dropout)."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "inductor"))
    options = COMBINED if combined and backend == "inductor" and combines() else None
    compiled = torch.compile(model, fullgraph=True, backend=backend, options=options)

    def call(inputs: Tensor, packing: Packing | None) -> Tensor:
        _declare_dynamic(inputs, 1)
        if packing is not None:
            _declare_dynamic(packing.positions, 0)
            _declare_dynamic(packing.fold, 0)
            _declare_dynamic(packing.unfold, 1)
        return compiled(inputs, packing, draw_seeds(model.dropouts, inputs.device))

    whole: Any = {"fullgraph": True, "dynamic": True, "backend": backend, "options": options}
    return Pieces(call, torch.compile(assemble, **whole), torch.compile(account, **whole), autograd=True)


# Independent small kernels (the second halves of 50 column sums) in one launch: 198 graph nodes a step instead of 253. Each keeps block
# sizes of its own: where they must share, the larger ones spill kilobytes a thread.
COMBINED = {"combo_kernels": True, "combo_kernel_per_subkernel_blocks": True}


def combines() -> bool:
    """Can this PyTorch combine kernels so?"""
    from torch._inductor import config

    return all(hasattr(config, option) for option in COMBINED)


def _declare_dynamic(tensor: Tensor, dim: int) -> None:
    if tensor.shape[dim] > 1:  # 0 and 1 are always forms of their own
        torch._dynamo.mark_dynamic(tensor, dim)


def one_of_each_form(shapes: Iterable[Shape]) -> list[Shape]:
    """Shapes that between them have everything compiled that `shapes` need."""
    return list({(bool(shape.packed), (shape.longest - 1) % 8 == 0): shape for shape in shapes}.values())


def forms() -> int:
    """Graphs compiled so far in this process: one that appears after the warm-up is a step that waited for the compiler."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
