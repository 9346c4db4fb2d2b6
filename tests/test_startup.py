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
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Trains one step of a tiny model on a store that is ready."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    model, data = (
        tiny_model(tmp_path / "model", BUNDLED / "model"),
        tiny_data(tmp_path / "poems.txt", BUNDLED / "poems.txt"),
    )
    run("-m", "fastpoem.prepare", "--data", data, "--model", model, "--out", tmp_path / "store", "--max-length", 64)
    settings = ["--data", tmp_path / "store", "--model", model, "--from-scratch", "--device", "cpu", "--max-steps", 1]
    return lambda out: run("-c", TRAIN, *settings, "--batch-size", 4, "--out", tmp_path / out)


def test_what_is_slow_to_import_is_not_imported(command):
    _, said = command("run")
    assert "step 1/1" in said
    modules = {*json.loads(said.splitlines()[-1])}
    assert "torch" in modules and not modules & SLOW


def test_the_first_step_is_within_two_seconds_of_importing_torch(command):
    """In processor time, the shorter of two, which other processes do not lengthen as they do the clock's."""
    torch = min(run("-c", "import torch")[0] for _ in range(2))
    first = min(command(f"run-{number}")[0] for number in range(2))
    assert first - torch < 2
