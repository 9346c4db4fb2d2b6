"""Training on several processes, as torchrun starts them (gloo, on a CPU): the same run for any number, and an end for all when one ends."""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import fastpoem
from fastpoem.engine import world
from fastpoem.engine.world import World
from fastpoem.errors import Ended
from fastpoem.run import checkpoint
from tests.runs import ENVIRONMENT, ROOT, rows, settings

LIMIT = 240  # seconds, on busy cores


def command(processes: int, *flags: object) -> list[str]:
    alone = [sys.executable, "-m"]
    several = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    return [*(alone if processes == 1 else several), "fastpoem.train", *map(str, flags)]


def flags(base: Path, out: Path, **changes) -> list[object]:
    """The command line's flags for `settings`."""
    found: list[object] = []
    for name, value in settings(base, out=str(out), **changes).items():
        flag = "--" + name.replace("_", "-")
        found += ([flag] if value else []) if isinstance(value, bool) else [flag, value]
    return found


def train(processes: int, base: Path, out: Path, **changes) -> str:
    """What the command says, with a run in `out` at the end. One process is this one, which is there already."""
    if processes == 1:
        return str(fastpoem.fit(**settings(base, out=str(out), **changes)))
    done = subprocess.run(
        command(processes, *flags(base, out, **changes)), env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_numbers(one: Path, other: Path) -> None:
    """Every row of both runs: counts equal, losses within rounding."""
    mine, theirs = rows(one), rows(other)
    assert len(mine) == len(theirs)
    for row, same in zip(mine, theirs, strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            if name == "grad_norm":
                assert same[name] == pytest.approx(value, rel=1e-4)
            else:
                assert same[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (
                    name,
                    row,
                )


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """One process, dropout on."""
    return fastpoem.fit(**settings(base, out=str(tmp_path_factory.mktemp("alone") / "run"))).folder


def test_two_processes_are_one(alone, base, tmp_path):
    said = train(2, base, tmp_path / "run", accumulate=2, log_every=1)
    assert_same_numbers(alone, tmp_path / "run")
    assert said.count("the trained model is in") == 1 and "step 42/42" in said  # one of them speaks
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    assert fastpoem.Run(tmp_path / "run").generate("春", count=1)


def test_it_goes_on_with_another_number_of_processes(alone, base, tmp_path):
    """4, 2, 1 and 3, changed in the middle of an epoch."""
    out = tmp_path / "run"
    train(4, base, out, max_steps=10, sample_every=0)
    for processes, steps in ((2, 19), (1, 27), (3, 42)):
        train(processes, base, out, max_steps=steps, sample_every=0, resume=True)
    every, whole = rows(out), rows(alone)
    cut = [
        row for row in every if row.get("event") != "epoch" or row["step"] % 14 == 0
    ]  # a run cut short has its epoch's row
    assert [row["step"] for row in cut] == [row["step"] for row in whole]
    for row, same in zip(cut, whole, strict=True):
        for name in ("loss", "mean_loss", "val_loss"):
            assert row.get(name) == (pytest.approx(same[name], rel=1e-6) if same.get(name) else None)


def test_exactly_the_same_for_any_number(base, tmp_path):
    """--exact: bit for bit, with dropout; 1, 3 and again 2 processes in the middle of an epoch or one that was never interrupted."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(4, base, whole, exact=True, epochs=2)
    for processes, steps in ((1, 10), (3, 19), (2, 28)):
        train(processes, base, out, exact=True, epochs=2, max_steps=steps, sample_every=0, resume=steps > 10)
    assert load_file(out / "model/model.safetensors").keys() == load_file(whole / "model/model.safetensors").keys()
    for path in ("model/model.safetensors", "checkpoints/step-00000028/optimizer.safetensors"):
        for name, tensor in load_file(whole / path).items():
            assert torch.equal(tensor, load_file(out / path)[name]) or name.startswith("rng"), name
    numbers = [(row["step"], row["loss"], row["grad_norm"]) for row in rows(whole) if "event" not in row]
    assert numbers == [(row["step"], row["loss"], row["grad_norm"]) for row in rows(out) if "event" not in row]


def test_an_update_in_slices_is_the_whole(base, tmp_path):
    """--parallel sharded, with masters of its own (bf16): bit for bit data's, in a checkpoint that any number goes on with."""
    one, other = tmp_path / "data", tmp_path / "sharded"
    train(3, base, one, precision="bf16", parallel="data", epochs=2)
    said = train(3, base, other, precision="bf16", parallel="sharded", epochs=1, sample_every=0)
    assert "3 processes, which divide the poems and the update" in said
    train(3, base, other, precision="bf16", parallel="sharded", epochs=2, resume=True)
    assert_same_numbers(one, other)
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    train(1, base, other, precision="bf16", epochs=3, resume=True)


def test_weights_in_shards_are_the_whole(base, tmp_path):
    """--parallel fsdp: the losses of one process, and checkpoints that any number goes on with in any way."""
    alone, out = tmp_path / "alone", tmp_path / "run"
    train(1, base, alone, dropout=0.0, epochs=2, sample_every=0)
    said = train(3, base, out, dropout=0.0, epochs=1, parallel="fsdp")
    assert "3 processes, which divide the poems, the weights and the update" in said
    train(1, base, out, dropout=0.0, epochs=2, max_steps=20, sample_every=0, resume=True)
    train(2, base, out, dropout=0.0, epochs=2, parallel="fsdp", accumulate=2, resume=True)
    of = lambda run: [row for row in rows(run) if row.get("event") != "epoch" or row["step"] % 14 == 0]
    for mine, theirs in zip(of(alone), of(out), strict=True):
        for name in ("loss", "mean_loss", "val_loss", "grad_norm"):
            assert theirs.get(name) == (pytest.approx(mine[name], rel=1e-6) if mine.get(name) else None), (name, mine)
    whole, shards = (load_file(run / "model/model.safetensors") for run in (alone, out))
    assert whole.keys() == shards.keys()
    assert all((whole[name] - shards[name]).abs().max() < 1e-3 for name in whole)
    assert fastpoem.Run(out).generate("春", count=1)


@pytest.mark.parametrize(
    "page, number", [("README.md", 0), ("README.zh-CN.md", 0), ("docs/devices.md", 0), ("docs/devices.md", 1)]
)
def test_the_docs_command_runs(base, tmp_path, page, number):
    """With two processes, two steps and a small model."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    line = [line for line in lines if line.startswith("torchrun ")][number]
    line = re.sub(r"--nproc-per-node \d", "--nproc-per-node 2", line).replace(" --shape gpt2-xl", "")
    words = shlex.split(line.partition("  #")[0])
    more = ["--device", "cpu", "--max-steps", "2", "--model"]
    more = more if "--from-scratch" in words else ["--from-scratch", *more]
    process = [sys.executable, "-m", "torch.distributed.run", *words[1:], *more, str(base / "model")]
    (tmp_path / "poems.txt").write_bytes((base / "poems.txt").read_bytes())
    subprocess.run(process, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, check=True, timeout=LIMIT)
    assert fastpoem.Run(tmp_path / words[-1]).metrics


@pytest.mark.parametrize("changes, message", [
    (dict(device="cuda:7"), "--device cuda:7: cannot be shared by 2 processes; use --device cuda, with CUDA_VISIBLE_DEVICES"),
    (dict(accumulate=3), "--batch-size 4: fewer poems than the 6 parts of a step (2 processes, 3 micro-batches each); raise it"),
    (dict(parallel="fsdp", exact=True), "--parallel fsdp: does not go together with --exact; leave out one of them"),
    (dict(accumulate=2, exact=True), "--exact: has micro-batches of its own; leave out --accumulate"),
    (dict(batch_size=1, exact=True), "--exact: takes --batch-size 2 or more for 2 processes, not 1; raise it, or start fewer processes"),
])  # fmt: skip
def test_what_is_refused_is_said_once(base, tmp_path, changes, message):
    done = subprocess.run(
        command(2, *flags(base, tmp_path / "run", **changes)),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode != 0 and done.stderr.count("fastpoem: ") == 1 and message in done.stderr
    assert not (tmp_path / "run").exists()


def of_rank(rank: int, out: Path) -> int:
    """The process with this rank of those that train in `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
            if str(out).encode() in line and b"RANK=%d" % rank in variables:
                return int(folder.name)
    raise AssertionError(f"no process {rank} in {out}")


def killed(rank: int, out: Path) -> bool:
    with contextlib.suppress(AssertionError, ProcessLookupError):
        os.kill(of_rank(rank, out), signal.SIGKILL)
        return True
    return False


@contextlib.contextmanager
def training(processes: int, base: Path, out: Path, *options: str, after: int = 1, **changes):
    """A run that would never end, with `after` checkpoints."""
    log = out.with_name("log")
    words = command(processes, *flags(base, out, epochs=10**6, log_every=100, save_every=20, sample_every=0, **changes))
    words[3:3] = options
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, env={**ENVIRONMENT, "FASTPOEM_COLLECTIVE_SECONDS": "20"}, stderr=file, stdout=file
        )
    try:
        wait(lambda: len(checkpoint.listed(out)) >= after, process)
        yield process, lambda: log.read_text(encoding="utf-8")
    finally:
        process.kill()
        for rank in range(processes):
            with contextlib.suppress(AssertionError, ProcessLookupError):
                os.kill(of_rank(rank, out), signal.SIGKILL)
        process.wait()


def wait(over, process: subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not over():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("to", ["torchrun", 1])
def test_a_signal_to_one_stops_all_after_one_step(base, tmp_path, to):
    out = tmp_path / "run"
    with training(2, base, out) as (process, said):
        os.kill(process.pid if to == "torchrun" else of_rank(to, out), signal.SIGTERM)
        assert process.wait(LIMIT) != 0
    (step, newest), *_ = checkpoint.listed(out)
    assert step >= 14 and newest == checkpoint.newest_whole(out)
    assert (
        said().count("stopped after a complete checkpoint; go on with: torchrun --nproc-per-node 2 -m fastpoem.train")
        == 1
    )
    train(1, base, out, epochs=1, max_steps=step, log_every=100, sample_every=0, resume=True)  # whole


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all(base, tmp_path, rank):
    out = tmp_path / "run"
    with training(3, base, out) as (process, said):
        os.kill(of_rank(rank, out), signal.SIGKILL)
        assert process.wait(LIMIT) != 0
    assert "another of the 3 processes is gone; --resume goes on from the newest checkpoint" in said()
    assert checkpoint.newest_whole(out) is not None and "Traceback" not in said().split("torch/distributed")[0]


@pytest.mark.slow
def test_one_that_hangs_ends_all(base, tmp_path):
    """Within the limit of a collective; torchrun then gives the one that hangs 30 s."""
    out = tmp_path / "run"
    with training(3, base, out) as (process, said):
        os.kill(of_rank(1, out), signal.SIGSTOP)
        assert process.wait(LIMIT) != 0
    assert "another of the 3 processes did not answer for 20 s" in said()


def test_torchrun_begins_again_by_itself(base, tmp_path):
    """--max-restarts goes on from the newest checkpoint, without --resume."""
    out = tmp_path / "run"
    with training(2, base, out, "--max-restarts", "1") as (process, said):
        os.kill(of_rank(1, out), signal.SIGKILL)
        before = len(checkpoint.listed(out))
        wait(lambda: re.search(r"step [0-9]+ of [0-9]+ is done: going on", said()), process)
        newest = checkpoint.listed(out)[0]
        wait(lambda: checkpoint.listed(out)[0] > newest, process)
        assert before and process.poll() is None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_restart_leaves_alone_what_it_did_not_begin(alone, base, tmp_path, processes):
    """A run that stood there is refused again, not gone on with."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", "1"]
    words += ["-m", "fastpoem.train", *map(str, flags(base, out, epochs=4))]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0 and done.stderr.count("holds a run already") == 2
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_one_script_trains_twice(base, tmp_path):
    """The second run reads nothing that the first left with torchrun."""
    script = tmp_path / "twice.py"
    changes = settings(base, out=str(tmp_path / "run"), sample_every=0)
    more = changes | {"resume": True, "epochs": 3}
    script.write_text(
        f"import fastpoem\nfastpoem.fit(**{changes | {'epochs': 1}!r})\nrun = fastpoem.fit(**{more!r})\nassert run.model.exists()\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=True, timeout=LIMIT)
    assert fastpoem.Run(tmp_path / "run").metrics[-1]["step"] == 42


def script(tmp_path: Path, text: str) -> list[str]:
    """The command that runs this program in two processes."""
    (tmp_path / "program.py").write_text(text)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*words, str(tmp_path / "program.py"), str(tmp_path)]


def test_a_callback_that_raises_ends_all_after_a_checkpoint(base, tmp_path):
    """As with one process; and it may take longer than a collective waits."""
    changes = settings(base, out=str(tmp_path / "run"), sample_every=0, log_every=5)
    words = script(
        tmp_path,
        "import time, fastpoem\n"
        "def hear(row):\n"
        "    time.sleep(7 if row['step'] == 5 else 0)\n"
        "    1 / (row['step'] - 10)\n"
        f"fastpoem.fit(**{changes!r}, on_log=hear)\n",
    )
    environment = ENVIRONMENT | {"FASTPOEM_COLLECTIVE_SECONDS": "5"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert "Step 11 is saved: fastpoem.fit(out=" in done.stderr
    assert checkpoint.newest_whole(tmp_path / "run") == checkpoint.listed(tmp_path / "run")[0][1]
    assert checkpoint.listed(tmp_path / "run")[0][0] == 11
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 5, 10]
    assert fastpoem.fit(out=str(tmp_path / "run"), resume=True, quiet=True, max_steps=12).metrics[-1]["step"] == 12


def test_a_signal_to_one_in_a_validation_stops_all(base, tmp_path):
    """At once: torchrun kills 30 s after its own."""
    changes = settings(base, out=str(tmp_path / "run"), sample_every=0, val_data=str(base / "poems.txt"), batch_size=2)
    words = script(
        tmp_path,
        "import os, pathlib, signal, sys, time, fastpoem\n"
        "from fastpoem.run import validate\n"
        "steps, here = validate.validation_steps, pathlib.Path(sys.argv[1])\n"
        "def slow(*given):\n"
        "    for step in steps(*given):\n"
        "        yield step\n"
        "        (here / f'in-{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
        "        time.sleep(1.5)\n"  # 45 s in all
        "validate.validation_steps = slow\n"
        f"fastpoem.fit(**{changes!r})\n",
    )
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: (tmp_path / "in-0").exists() and (tmp_path / "in-1").exists(), process)
        os.kill(int((tmp_path / "in-1").read_text()), signal.SIGTERM)
        begin = time.monotonic()
        process.wait(LIMIT)
        assert time.monotonic() - begin < 25
    finally:
        process.kill()
    _, newest = checkpoint.listed(tmp_path / "run")[0]
    assert (
        newest == checkpoint.newest_whole(tmp_path / "run")
        and json.loads((newest / "state.json").read_text())["state"]["epoch_due"]
    )


def test_the_first_that_shows_no_life_is_not_waited_for(monkeypatch):
    """While it has something to do alone it is, however long that takes."""
    monkeypatch.setattr(world, "SECONDS", 0.6)
    store = dist.HashStore()
    first, other = (World(rank, 2, is_training=True, _store=store) for rank in range(2))
    beating = threading.Thread(target=first._beat, daemon=True)
    beating.start()
    end = time.monotonic() + 2
    other._wait(lambda: time.monotonic() > end)
    first._has_left.set()  # as if it were stopped
    beating.join()
    with pytest.raises(Ended, match="another of the 2 processes did not answer for 1 s; --resume"):
        other._wait(lambda: False)


def test_a_signal_is_passed_on_to_a_process_that_does_something_alone():
    store = dist.HashStore()
    first, other = (World(rank, 2, is_training=True, _store=store) for rank in range(2))
    assert not first.is_asked_to_stop()
    other.signalled = lambda: signal.SIGTERM
    other._wait(lambda: store.check(["stop"]))
    assert first.is_asked_to_stop() and other.is_asked_to_stop()


@pytest.mark.slow
def test_fifty_kills_at_random_moments(base, tmp_path):
    """Of a random process, before training too: all end, none hangs, and the newest checkpoint is whole."""
    generator = random.Random(0)
    for number in range(50):
        out = tmp_path / f"run-{number}"
        with training(2, base, out, after=0) as (process, _):
            time.sleep(generator.uniform(1.0, 8.0))
            rank = generator.randrange(2)
            wait(lambda rank=rank, out=out: killed(rank, out), process)  # it may not have begun yet
            assert process.wait(LIMIT) != 0
        assert bool(checkpoint.listed(out)) is (checkpoint.newest_whole(out) is not None)
