"""What the tests on the pretend GPU share: a run of the real command with its launch log, and this process' own log.

pytest itself runs under the pretend GPU (`pretend.py test` sees to that), so tests may use CUDA tensors in process; commands that need
another card, or to be on their own, run as processes.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pretend import Log, Tape, environment, parse

from fastpoem.model.hub import BUNDLED
from tests.runs import tiny_data, tiny_model

ROOT = Path(__file__).parents[2]
TRAIN = "fastpoem.train"
CHANGES_NOTHING = {  # CUDA functions that are answered with a stub because nothing depends on what they do
    "cublasSetMathMode", "cublasSetWorkspace_v2", "cublasLtMatmulDescSetAttribute", "cublasLtMatmulPreferenceSetAttribute",
    "cudaFuncSetAttribute", "cudaGraphDestroy", "cudaStreamDestroy",
    "cudaDeviceGetDefaultMemPool", "cudaGraphDebugDotPrint",
}  # fmt: skip


UNCOVERED = {
    "COVERAGE_PROCESS_CONFIG": ""
}  # for commands that compile much: coverage takes a quarter of their time, and others cover them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with them."""
    longest = ["test_compiled.py", "test_commands.py", "test_step.py", "test_tool.py"]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def assert_sound(outcome, code=0):
    """It ended with `code`, no call was refused that a card would refuse, and nothing was used that is not modelled."""
    assert outcome.code == code, outcome.said
    assert not outcome.log.refused, [str(entry) for entry in outcome.log.refused]
    assert outcome.log.unmodelled <= CHANGES_NOTHING
    assert "Traceback" not in outcome.said


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where compiled kernels are kept, for the tests that look at them."""
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent


@dataclass
class Outcome:
    """A command that has ended."""

    code: int
    said: str
    log: Log


class Command:
    """Runs `python -m fastpoem.…` under a card of its own."""

    def __init__(self, cache: Path, folder: Path) -> None:
        self.cache, self.folder, self.count = cache, folder, 0
        self.running: list[subprocess.Popen] = []

    def start(self, module: str, *arguments: object, extra: dict[str, str] | None = None, **card: int) -> tuple:
        self.count += 1
        log = self.folder / f"log-{self.count}"
        variables = {**os.environ, **environment(self.cache, log=log, **card), **(extra or {})}
        command = [sys.executable, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.running.append(process)
        return process, log

    def __call__(self, module: str, *arguments: object, **options) -> Outcome:
        process, log = self.start(module, *arguments, **options)
        said, _ = process.communicate(timeout=600)
        return Outcome(process.returncode, said, parse(log.read_text().splitlines()) if log.exists() else Log(()))

    def stopped(
        self, module: str, *arguments: object, after: str, number: int = signal.SIGTERM, **card: int
    ) -> Outcome:
        """The same, told to stop by a signal once it has printed `after`."""
        process, log = self.start(module, *arguments, extra={"PYTHONUNBUFFERED": "1"}, **card)
        said = ""
        for line in process.stdout:
            said += line
            if after in line:
                process.send_signal(number)
                break
        rest, _ = process.communicate(timeout=120)
        return Outcome(process.returncode, said + rest, parse(log.read_text().splitlines()))


@pytest.fixture
def command(cache, tmp_path):
    command = Command(cache, tmp_path)
    yield command
    for process in command.running:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """Flags for a model of one layer, 16 wide, and 57 poems in 14 steps an epoch."""
    folder = tmp_path_factory.mktemp("tiny")
    data = tiny_data(folder / "poems.txt", BUNDLED / "poems.txt")
    model = tiny_model(folder / "model", BUNDLED / "model")
    return ["--data", str(data), "--model", str(model), "--from-scratch", "--batch-size", "4", "--device", "cuda:0"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> list[str]:
    """Flags for the full model's width and vocabulary, by which its kernels are compiled, at two layers; the bundled verses."""
    folder = tiny_model(tmp_path_factory.mktemp("wide") / "model", BUNDLED / "model")
    file = folder / "config.json"
    shape = json.loads(file.read_text()) | {
        "n_embd": 768,
        "n_layer": 2,
        "n_head": 12,
        "n_positions": 512,
        "vocab_size": 21128,
    }
    file.write_text(json.dumps(shape))
    return ["--data", str(BUNDLED / "poems.txt"), "--model", str(folder), "--from-scratch", "--device", "cuda:0"]


@pytest.fixture
def tape() -> Tape:
    """This process' launch log, empty, and none of an earlier test's memory left to be freed within."""
    gc.collect()
    torch.cuda.synchronize()
    tape = Tape()
    tape.take()
    return tape


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
