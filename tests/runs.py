"""What the tests of runs share: one small enough to be done hundreds of times, and what makes two runs the same."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# Of a process: it finds the checkout without an install, and leaves cores to others.
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
TIMINGS = {"tokens_per_s", "poems_per_s", "seconds"}


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
