"""Where a library is not installed: one line that names all that is missing, before anything is made; and fastpoem itself need not be."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastpoem
from fastpoem.missing import WHEELS, missing
from fastpoem.model.hub import BUNDLED
from tests.runs import tiny_data, tiny_model

ROOT = Path(__file__).parents[1]
WITHOUT = """
import importlib.metadata, runpy, sys
without, module, *sys.argv[1:] = sys.argv[1:]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in without.split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
version = importlib.metadata.version
def of_others(name):
    if name == "fastpoem":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = of_others
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
TYRO, RICH = ["tyro", "docstring_parser", "typeguard"], ["rich", "markdown_it", "mdurl", "pygments"]


def run(without: list[str], module: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """A command, uninstalled, in a Python without these modules."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(without), f"fastpoem.{module}", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["train", "prepare", "generate", "doctor"])
def test_what_help_needs_and_what_a_command_needs(module, tmp_path):
    """A line that names each wheel that is missing, exit code 2, and nothing made."""
    given = {
        "prepare": ["--data", BUNDLED / "poems.txt", "--model", BUNDLED / "model", "--out", "store"],
        "generate": ["--model", "model", "--prompt", "春"],
    }.get(module, [])
    for argv, without, first in (
        (["--help"], TYRO, {"tyro"}),
        (["--help"], ["docstring_parser"], {"docstring-parser"}),
        (given, ["numpy", "torch", *TYRO], {"numpy", "torch"}),
        (given, RICH, {"rich"}),
    ):
        if module == "generate" and without == RICH:
            continue  # it prints poems and nothing else
        done = run(without, module, *argv, cwd=tmp_path)
        assert done.returncode == 2 and not done.stdout, done.stderr
        said = re.fullmatch(r"fastpoem: (\S+): is not installed[^;]*; pip install ([a-z -]+); .*\n", done.stderr)
        assert said[1] in first and {*said[2].split()} == {
            WHEELS[one] for one in WHEELS if one in without or not find_spec(one)
        }
    assert not [*tmp_path.iterdir()]


def test_commands_run_uninstalled_and_without_tyro(tmp_path):
    """With tyro missing, and fastpoem found on PYTHONPATH alone."""
    model, data = (
        tiny_model(tmp_path / "model", BUNDLED / "model"),
        tiny_data(tmp_path / "p.txt", BUNDLED / "poems.txt"),
    )
    for argv in (
        ["prepare", "--data", data, "--model", model, "--out", "store", "--max-length", "64"],
        ["train", "--data", "store", "--model", model, "--from-scratch", "--device", "cpu", "--max-steps", "1", "--out", "run"],
        ["generate", "--model", "run", "--prompt", "春", "--seed", "1"],
    ):  # fmt: skip
        done = run(TYRO, *argv, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["versions"]["fastpoem"] == fastpoem.__version__ and all(config["versions"].values())


def test_where_the_kernels_are(tmp_path):
    done = run(["fastpoem_kernels"], "train", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and "PYTHONPATH=.:kernels" in done.stderr and len(done.stderr.splitlines()) == 1


def test_other_modules_are_bugs():
    assert missing(None) is missing("fastpoem.no_such") is missing("json.none") is None


def test_the_list_is_what_the_packages_say():
    """All that pyproject.toml asks for, but what commands can do without; and what rich and tyro ask for, as installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {_name(line) for line in project["dependencies"]} - {"transformers", "triton"}
    found, rest = set(), ["rich", "tyro"]
    while rest:
        found.add(name := rest.pop())
        try:
            asked = requires(name) or []
        except PackageNotFoundError:  # for another Python or system
            continue
        rest += {_name(line) for line in asked if ";" not in line} - found
    assert named | found - {"commonmark"} <= {
        *WHEELS.values()
    }  # which the first of rich 13 had in place of markdown-it-py
    assert not {*WHEELS.values()} - named - {"markdown-it-py", "mdurl", "pygments", "docstring-parser", "typeguard", "typing-extensions"}  # fmt: skip


def _name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()
