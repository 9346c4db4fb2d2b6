"""What the tests of runs share: one small enough to be done hundreds of times, and what makes two runs the same."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# Of a process: it finds the checkout without an install, and leaves cores to others.
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
LIMIT = 600  # seconds, on busy cores
TIMINGS = {"tokens_per_s", "poems_per_s", "seconds"}


class Server:
    """Runs in forked children, one at a time, see tests/run_server.py. What they say is in `log` and, by torchrun on stdout, `out`."""

    def __init__(self, folder: Path) -> None:
        self.log, self.out, self._processes = folder / "log", folder / "out", folder / "processes"
        self._processes.mkdir()
        command = [sys.executable, str(ROOT / "tests" / "run_server.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        self._answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._status: int | None = None

    def _listen(self) -> None:
        for line in self.process.stdout:
            self._answers.put(int(line))

    def _begin(self, job: dict) -> int:
        for file in (self.log, self.out):
            file.write_bytes(b"")
        self._status = None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self._answers.get(timeout=LIMIT)

    def start(self, settings: dict, fault: dict | None = None) -> int:
        """Begin a run; its process id."""
        return self._begin({"settings": settings, "log": str(self.log), "fault": fault})

    def torchrun(self, *words: object, cwd: Path = ROOT, seconds: float = 60.0) -> int:
        """Begin what `torchrun` does with these words; its process id, which is that of its group."""
        for file in self._processes.iterdir():
            file.unlink()
        places = {"cwd": cwd, "out": self.out, "log": self.log, "processes": self._processes}
        job = {name: str(place) for name, place in places.items()} | {"seconds": seconds}
        return self._begin(job | {"torchrun": [str(word) for word in words]})

    def of_rank(self, rank: int) -> int | None:
        """The process that has this rank under torchrun, None where it has not begun."""
        with contextlib.suppress(OSError, ValueError):
            return int((self._processes / str(rank)).read_text())
        return None

    def poll(self) -> int | None:
        """The exit status of what was begun, None where it goes on."""
        if self._status is None:
            with contextlib.suppress(queue.Empty):
                self._status = self._answers.get_nowait()
        return self._status

    def wait(self) -> int:
        """The exit status of what was begun, once it has ended."""
        if self._status is None:
            self._status = self._answers.get(timeout=LIMIT)
        return self._status

    def run(self, settings: dict, fault: dict | None = None) -> int:
        self.start(settings, fault)
        return self.wait()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(LIMIT)


def tiny_model(folder: Path, source: Path) -> Path:
    """A model folder of one layer, 16 wide, without weights, with the tokenizer of `source`."""
    folder.mkdir(parents=True)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_data(path: Path, source: Path, poems: int = 60) -> Path:
    """Some of the poems of `source`, of several lengths."""
    path.write_text("\n".join(source.read_text(encoding="utf-8").splitlines()[::7][:poems]), encoding="utf-8")
    return path


def settings(folder: Path, **changes) -> dict:
    """57 poems to train on in 14 steps an epoch, three epochs, everything logged, dropout on."""
    base = dict(
        data=str(folder / "poems.txt"), model=str(folder / "model"), from_scratch=True, device="cpu", batch_size=4,
        epochs=3, lr=1e-2, log_every=1, dropout=0.2,
    )  # fmt: skip
    return base | changes


def rows(run: Path) -> list[dict]:
    """The rows on disk, timings aside. Fails on a torn line."""
    content = (run / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n") or not content
    found = [json.loads(line) for line in content.splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in found]


def assert_same(one: Path, other: Path, *, settings: bool = True) -> None:
    """Rows, the model's folder and the state in the newest checkpoints are the same, bit for bit; without `settings` but for what tells of
    them."""
    assert rows(one) == rows(other)
    telling = set() if settings else {"README.md", "generation_config.json"}
    beside = [{path.name for path in (run / "model").iterdir()} - telling for run in (one, other)]
    assert beside[0] == beside[1] and {"model.safetensors", "config.json", "tokenizer_config.json"} <= beside[0]
    for name in beside[0]:
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name
    newest = [max((run / "checkpoints").iterdir()) for run in (one, other)]
    assert newest[0].name == newest[1].name
    states = [load_file(path / "optimizer.safetensors") for path in newest]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.nan_to_num(), states[1][name].nan_to_num()), name


def assert_tidy(run: Path) -> None:
    """Nothing but what a run's folder is said to hold, and every checkpoint in it whole."""
    assert {path.name for path in run.iterdir()} <= {
        ".lock",
        "metrics.jsonl",
        "config.json",
        "checkpoints",
        "model",
        "samples.jsonl",
    }
    for path in (run / "checkpoints").iterdir():
        assert (path / "state.json").is_file(), path


def assert_trained_alike(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """The same weights within 1e-5, but for one in 500 of a tensor, which may be 1e-3 apart: where a gradient is next to nothing AdamW makes its
    rounding as large as any, and the rounding is that of a release of PyTorch. A key's bias has no other gradient at all."""
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("c_attn.bias"):
            apart = ~torch.isclose(mine, theirs, rtol=1e-4, atol=1e-5)
            furthest = (mine - theirs).abs().max()
            assert apart.sum() <= apart.numel() // 500 and furthest < 1e-3, (
                f"{name}: {apart.sum()} apart, by {furthest} at most"
            )
