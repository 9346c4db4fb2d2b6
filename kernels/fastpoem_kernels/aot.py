"""Compile every Triton kernel for a GPU that is not there, and say what it costs: `python -m fastpoem_kernels.aot`.

The launchers themselves are run, on tensors without storage, and what they would have launched is recorded: the signatures, the
alignment hints and the constants are those a user gets. Each launch is compiled for each architecture to PTX, cubin and SASS.
`resources.json` then holds, a kernel and architecture: registers, spilled bytes and shared memory (from ptxas), the width of
every access to global memory (from the SASS), the count of float64 operands (from the PTX), and the bytes a program moves.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from fastpoem_kernels import adamw_triton, loss_triton
from fastpoem_kernels.arguments import Parser
from fastpoem_kernels.dispatch import INTERPRETED

ROWS, VOCABULARY, LARGE_VOCABULARY, PARAMETERS = (
    1030,
    21128,
    50257 + 47,
    59_541_504,
)  # one step of training; GPT-2's, padded
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
           torch.int32: "*i32", torch.bool: "*i1"}  # fmt: skip


class Launch(NamedTuple):
    """One recorded launch. `moves`: bytes it reads and writes a row, or a parameter; `least`: the fewest that would do."""

    name: str
    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    moves: int = 0
    least: int = 0


def record(launch: Callable[[], Any]) -> list[Launch]:
    """Every kernel launch that `launch()` makes, with what Triton specialises on; nothing is compiled or run."""
    launches: list[Launch] = []

    def run(fn, *args, grid, warmup, num_warps=4, **kwargs):
        bound = dict(zip(fn.arg_names, args, strict=False)) | kwargs
        signature, constants, aligned = {}, {}, []
        for parameter in fn.params:
            value = bound[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTER[value.dtype]
                aligned += [parameter.name] if value.data_ptr() % 16 == 0 else []
            else:
                signature[parameter.name] = "i32"
                aligned += [parameter.name] if value % 16 == 0 and not parameter.do_not_specialize else []
        launches.append(Launch(fn.__name__, fn, signature, constants, tuple(aligned), num_warps))

    with mock.patch.object(triton.runtime.JITFunction, "run", run):
        launch()
    return launches


def launches() -> list[Launch]:
    """Each kernel once for each form that training or a larger vocabulary gives it."""
    found: dict[str, Launch] = {}

    def keep(suffix: str, recorded: list[Launch], moves: dict[str, tuple[int, int]]) -> None:
        for launch in recorded:
            name = f"{launch.name}_{suffix}" if launch.name in moves else launch.name
            name += "_scaled" if launch.constants.get("HAS_SCALE") else ""
            moved, least = moves.get(launch.name, (0, 0))
            found.setdefault(name, launch._replace(name=name, moves=moved, least=least))

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    target = meta(ROWS, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scale = meta() if dtype == torch.float16 else None
        for vocabulary in (VOCABULARY, LARGE_VOCABULARY):
            logits, row, short = meta(ROWS, vocabulary, dtype=dtype), vocabulary * dtype.itemsize, POINTER[dtype][1:]
            train = record(partial(loss_triton.cross_entropy, logits, target, -100, 0, True, scale))
            keep(short, train, {"whole_row": (2 * row, 2 * row), "looped_row": (3 * row, 2 * row)})
            evaluate = record(partial(loss_triton.cross_entropy, logits, target, -100, 0, False))
            keep(f"{short}_evaluate", evaluate, {"whole_row": (row, row), "looped_row": (row, row)})
            keep(short, record(partial(loss_triton.scale, logits, meta())), {"scale_unless_one": (2 * row, 2 * row)})
    param, m, v = meta(PARAMETERS), meta(PARAMETERS), meta(PARAMETERS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = None if dtype == torch.float32 else meta(PARAMETERS, dtype=dtype)
        scale = meta() if dtype == torch.float16 else None
        grad, settings = meta(PARAMETERS, dtype=dtype), (0.9, 0.999, 1e-8, 0.01, scale)
        step = partial(adamw_triton.clipped_adamw, param, grad, m, v, meta(), meta(), meta(), meta(), low, *settings)
        moved = 6 * 4 + grad.itemsize + (low.itemsize if low is not None else 0)
        sizes = {"partial_squares": (grad.itemsize, grad.itemsize), "update": (moved, moved)}
        keep(POINTER[dtype][1:], record(step), sizes)
    return list(found.values())


def build(launch: Launch, arch: int, out: Path | None = None) -> dict[str, Any]:
    """Compile one launch for sm_`arch`; returns its resources and, given `out`, writes .ptx, .cubin and .sass there."""
    fn = launch.fn
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(fn=fn, signature=launch.signature, constexprs=launch.constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        stem = f"{launch.name}.sm_{arch}"
        ptx_file, cubin_file = folder / f"{stem}.ptx", folder / f"{stem}.cubin"
        ptx_file.write_text(ptx)
        cubin_file.write_bytes(cubin)
        machine = re.search(r"\.target (\w+)", ptx)[1]  # type: ignore[index]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={machine}", str(ptx_file), "-o", f"{scratch}/a.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassembler = triton.knobs.nvidia.nvdisasm.path
        sass = subprocess.run([disassembler, "-c", str(cubin_file)], capture_output=True, text=True, check=True).stdout
        (folder / f"{stem}.sass").write_text(sass)
    return {
        "kernel": launch.name,
        "arch": f"sm_{arch}",
        "warps": launch.warps,
        "registers": _number(r"Used (\d+) registers", report),
        "spill_bytes": _number(r"(\d+) bytes spill stores", report) + _number(r"(\d+) bytes spill loads", report),
        "shared_bytes": compiled.metadata.shared,
        "accesses": accesses(sass),
        "f64_instructions": len(re.findall(r"\.f64\b", ptx)),
        "bytes_moved": launch.moves,
        "share_of_least": round(launch.least / launch.moves, 3) if launch.moves else None,
    }


def accesses(sass: str) -> dict[str, int]:
    """Instructions that touch global memory, by kind and bits: {"LDG.128": 3, …}."""
    found = re.findall(r"\b(LDG|STG)\.E((?:\.\w+)*)", sass)
    widths = [
        next((w for w in ("128", "64", "U16", "S16", "U8", "S8") if f".{w}" in f"{rest}."), "32") for _, rest in found
    ]
    return dict(sorted(Counter(f"{kind}.{width}" for (kind, _), width in zip(found, widths, strict=True)).items()))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def table(records: list[dict[str, Any]]) -> str:
    """The records as aligned text, one line each."""
    head = ("kernel", "arch", "warps", "registers", "spilled", "shared", "accesses", "f64", "bytes", "of least")
    lines = [head]
    for r in records:
        widths = " ".join(f"{count}x{kind}" for kind, count in r["accesses"].items())
        share = f"{r['share_of_least']:.0%}" if r["share_of_least"] else ""
        lines.append((r["kernel"], r["arch"], *(str(r[k]) for k in ("warps", "registers", "spill_bytes", "shared_bytes")),
                      widths, str(r["f64_instructions"]), str(r["bytes_moved"] or ""), share))  # fmt: skip
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(line, columns, strict=True)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m fastpoem_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help="architectures, comma-separated")
    parser.add_argument("--out", type=Path, required=True, help="folder for .ptx, .cubin, .sass and resources.json")
    options = parser.parse_args(argv)
    names = options.arch.split(",")
    if not all(re.fullmatch(r"sm_\d{2,3}", name) for name in names):
        parser.error(f"--arch {options.arch}: not a list of architectures; write it as sm_80,sm_90,sm_100")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET: the interpreter replaces the compiler; unset it")
    options.out.mkdir(parents=True, exist_ok=True)
    records = [build(launch, int(name[3:]), options.out) for launch in launches() for name in names]
    (options.out / "resources.json").write_text(
        json.dumps({"triton": triton.__version__, "kernels": records}, indent=1)
    )
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
