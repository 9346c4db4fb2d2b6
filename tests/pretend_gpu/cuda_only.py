"""Which lines are for CUDA alone, and what share of them has run: `python cuda_only.py DATA`, DATA being coverage's.

A line is for CUDA alone where the code itself says so:
* in the branch that a condition on CUDA takes (`device.type == "cuda"`, `x.is_cuda`, `runs_triton(x)`, or their opposites and the branch
  that is left, a return before the rest of the block included);
* in a function that cannot be called without a GPU: one whose signature or decorator names torch.cuda, one called from such lines only, or
  the host code of a module of Triton kernels (the kernels' own bodies are compiled, not run by Python, and are not counted);
* a statement that names torch.cuda or torch.backends.cuda.
Functions called from such lines only are found within a module, by name.
"""

import ast
import sys
from pathlib import Path

import coverage

ROOT = Path(__file__).parents[2]
SHARE = 0.95
# Conditions on CUDA that do not say so themselves: the one under which their body is for CUDA, or their else is.
CONDITIONS = {"self._pool is None": "else", "graph is not None": "cuda"}


def main(data: str) -> int:
    measured = coverage.CoverageData(data)
    measured.read()
    ran = {Path(file): set(measured.lines(file) or ()) for file in measured.measured_files()}
    total = missed = 0
    for file in sorted([*(ROOT / "fastpoem").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        lines, here = cuda_only(file), ran.get(file, set())
        left = sorted(first for first, last in lines if here.isdisjoint(range(first, last + 1)))
        total, missed = total + len(lines), missed + len(left)
        if lines:
            print(
                f"{file.relative_to(ROOT)!s:45} {len(lines):4} lines for CUDA alone, {len(left):3} not run {left or ''}"
            )
    share = 1 - missed / max(1, total)
    print(f"{share:.1%} of the {total} lines for CUDA alone have run; {SHARE:.0%} are asked for")
    return 0 if share >= SHARE else 1


def cuda_only(file: Path) -> set[tuple[int, int]]:
    """(first, last) line of each statement in `file` that only a run on CUDA executes; of a compound one, its head."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    kernels = [node for node in functions.values() if any("jit" in ast.unparse(one) for one in node.decorator_list)]
    hidden = {id(inner) for kernel in kernels for inner in ast.walk(kernel)}
    found: set[ast.stmt] = set()
    if file.name.endswith("_triton.py"):
        found = {one for node in functions.values() if node not in kernels for one in _statements(node.body)}
    for node in functions.values():
        if "torch.cuda." in ast.unparse(node.args) or (node.returns and "torch.cuda." in ast.unparse(node.returns)):
            found |= _statements(node.body)
    for node in ast.walk(tree):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                found |= _in_block(block)
    while (
        more := {
            one for node in functions.values() if _called_only_from(node, tree, found) for one in _statements(node.body)
        }
        - found
    ):
        found |= more
    return {_lines(one) for one in found if id(one) not in hidden and not _is_docstring(one)}


def _lines(one: ast.stmt) -> tuple[int, int]:
    body = getattr(one, "body", None)
    return one.lineno, max(one.lineno, body[0].lineno - 1) if body else one.end_lineno or one.lineno


def _in_block(block: list[ast.stmt]) -> set[ast.stmt]:
    found: set[ast.stmt] = set()
    for place, one in enumerate(block):
        if isinstance(one, ast.If):
            side = _side(one.test)
            if side == "cuda":
                found |= _statements(one.body)
            elif side == "else":
                found |= _statements(one.orelse)
                if isinstance(one.body[-1], ast.Return | ast.Raise | ast.Continue):
                    found |= _statements(block[place + 1 :])
        elif not isinstance(
            one, ast.FunctionDef | ast.ClassDef | ast.With | ast.For | ast.Try | ast.While | ast.Import | ast.ImportFrom
        ):
            text = ast.unparse(one)
            if (
                ("torch.cuda." in text or "torch.backends.cuda." in text)
                and " if " not in text
                and "is_available" not in text
            ):
                found.add(one)
        elif isinstance(one, ast.With) and any("torch.cuda." in ast.unparse(item) for item in one.items):
            found |= {one, *_statements(one.body)}
    return found


def _side(test: ast.expr) -> str | None:
    """Which way a condition on CUDA goes: its body is for "cuda", or its "else" is. None: it is no such condition."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return "cuda" if "cuda" in map(_side, test.values) else None
    match ast.unparse(test):
        case text if text in CONDITIONS:
            return CONDITIONS[text]
        case text if text.endswith(("device.type == 'cuda'", "on_gpu", ".is_cuda")) or text.startswith("runs_triton("):
            return "cuda"
        case text if text.endswith(("device.type == 'cpu'", "device.type != 'cuda'", ".is_cpu")):
            return "else"
    return None


def _called_only_from(function: ast.FunctionDef, tree: ast.Module, found: set[ast.stmt]) -> bool:
    """Is a private function named in statements of `found` and nowhere else?"""
    if not function.name.startswith("_") or function.name.startswith("__"):
        return False
    inside = {id(node) for one in found for node in ast.walk(one)}
    own = {id(node) for node in ast.walk(function)}
    uses = [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == function.name)
        or (isinstance(node, ast.Attribute) and node.attr == function.name)
    ]
    uses = [node for node in uses if id(node) not in own]
    return bool(uses) and all(id(node) in inside for node in uses)


def _statements(block: list[ast.stmt]) -> set[ast.stmt]:
    return {node for one in block for node in ast.walk(one) if isinstance(node, ast.stmt)}


def _is_docstring(one: ast.stmt) -> bool:
    return isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
