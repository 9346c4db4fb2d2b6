"""Imports run downwards: each room knows those below it, none above, and no two files know each other."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

import fastpoem

ROOT = Path(fastpoem.__file__).parent
# From the lowest up. A file may import from its own line and from those above it here.
FLOORS = (
    "errors version",
    "disk paths missing",
    "signals",
    "config poetry",
    "corpus",
    "model",
    "engine",
    "generation",
    "doctor",
    "reporting",
    "run",
    "cli settings config_file",
    "api",
    "__init__ train prepare generate evaluate report demo doctor.__main__",
    "__main__",
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def floor(module: str) -> int:
    return FLOOR.get(module, FLOOR.get(module.split(".")[0], -1))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The modules of fastpoem that a file imports, at its top or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    ours = {name.removeprefix("fastpoem.") for name in found if name.startswith("fastpoem.")}
    ours |= {"__init__"} & {"__init__" for name in found if name == "fastpoem" and not any_submodule(tree)}
    return frozenset(ours & set(MODULES))


def any_submodule(tree: ast.AST) -> bool:
    """Whether each `from fastpoem import x` names modules only."""
    taken = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "fastpoem"]
    plain = [n for n in ast.walk(tree) if isinstance(n, ast.Import) and any(a.name == "fastpoem" for a in n.names)]
    return not plain and all(alias.name in MODULES or alias.name in FLOOR for n in taken for alias in n.names)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_downwards_only(module):
    assert floor(module) >= 0, f"{module} has no floor: give it one in FLOORS"
    upwards = sorted(other for other in imports(MODULES[module]) if floor(other) > floor(module))
    assert not upwards, f"{module} imports from above: {upwards}"


def test_no_two_files_know_each_other():
    graphlib.TopologicalSorter({name: imports(path) - {name} for name, path in MODULES.items()}).prepare()


def test_training_asks_the_doctor_one_thing():
    known = {other for name, path in MODULES.items() if name.startswith("run") for other in imports(path)}
    assert {other for other in known if other.split(".")[0] == "doctor"} <= {"doctor", "doctor.trust"}


def test_the_kernels_know_nothing_of_the_rest():
    for path in (ROOT.parent / "kernels" / "fastpoem_kernels").glob("*.py"):
        assert "fastpoem." not in "".join(
            line for line in path.read_text(encoding="utf-8").splitlines() if "import" in line
        )
