"""From the command to the first step: little beside importing torch."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastpoem.model.hub import BUNDLED
from tests.runs import tiny_data, tiny_model

ROOT = Path(__file__).parents[1]
TRAIN = "import json, sys; from fastpoem.train import main; main(sys.argv[1:]); print(json.dumps([*sys.modules]))"
SLOW = {
    "transformers",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "triton",
    "huggingface_hub",
    "opencc",
    "tensorboard",
    "matplotlib",
}


def run(*command):
    """(seconds of processor time, what was printed) of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Trains one step of a tiny model on a store that is ready."""
    tmp_path = tmp_path_factory.mktemp("startup")
    model, data = (
        tiny_model(tmp_path / "model", BUNDLED / "model"),
        tiny_data(tmp_path / "poems.txt", BUNDLED / "poems.txt"),
    )
    run("-m", "fastpoem.prepare", "--data", data, "--model", model, "--out", tmp_path / "store", "--max-length", 64)
    settings = ["--data", tmp_path / "store", "--model", model, "--from-scratch", "--device", "cpu", "--max-steps", 1]
    return lambda out: run("-c", TRAIN, *settings, "--batch-size", 4, "--out", tmp_path / out)


@pytest.fixture(scope="module")
def first(command):
    return command("first")


def test_what_is_slow_to_import_is_not_imported(first):
    _, said = first
    assert "step 1/1" in said
    modules = {*json.loads(said.splitlines()[-1])}
    assert "torch" in modules and not modules & SLOW


def test_the_first_step_is_within_two_seconds_of_importing_torch(command, first):
    """In processor time, the shorter of two, which other processes do not lengthen as they do the clock's."""
    torch = min(run("-c", "import torch")[0] for _ in range(2))
    step = min(first[0], command("again")[0])
    assert step - torch < 2
