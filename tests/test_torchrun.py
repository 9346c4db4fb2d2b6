"""Training on several processes, as torchrun starts them (gloo, on a CPU): the same run for any number, and an end for all when one ends.

It is torchrun's own main that starts them, answers for them and ends them, but in children of one process that has imported everything
(tests/run_server.py): to start five processes for each run would be nine tenths of the time. Two tests start them as a user does.
"""

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
from collections.abc import Callable
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
from tests.runs import ENVIRONMENT, LIMIT, ROOT, Server, rows, settings


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with contextlib.closing(Server(tmp_path_factory.mktemp("server"))) as made:
        yield made


def torchrun(*words: object, **environment: str) -> subprocess.CompletedProcess:
    """The command of that name, in processes of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=LIMIT)


def command(processes: int, *flags: object) -> list[object]:
    """torchrun's words for training in so many processes."""
    return ["--nproc-per-node", processes, "-m", "fastpoem.train", *flags]


def flags(base: Path, out: Path, **changes) -> list[object]:
    """The command line's flags for `settings`."""
    found: list[object] = []
    for name, value in settings(base, out=str(out), **changes).items():
        flag = "--" + name.replace("_", "-")
        found += ([flag] if value else []) if isinstance(value, bool) else [flag, value]
    return found


def train(server: Server, processes: int, base: Path, out: Path, **changes) -> str:
    """What the command says, with a run in `out` at the end. One process is this one, which is there already."""
    if processes == 1:
        return str(fastpoem.fit(**settings(base, out=str(out), **changes)))
    server.torchrun(*command(processes, *flags(base, out, **changes)))
    assert server.wait() == 0, server.said()
    return server.out.read_text(encoding="utf-8")


def script(tmp_path: Path, text: str) -> list[object]:
    """torchrun's words for this program in two processes."""
    (tmp_path / "program.py").write_text(text)
    return ["--nproc-per-node", 2, tmp_path / "program.py", tmp_path]


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
    done = torchrun(*command(2, *flags(base, tmp_path / "run", accumulate=2, log_every=1)))
    assert done.returncode == 0, done.stderr
    assert_same_numbers(alone, tmp_path / "run")
    assert done.stdout.count("the trained model is in") == 1 and "step 42/42" in done.stdout  # one of them speaks
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    assert fastpoem.Run(tmp_path / "run").generate("春", count=1)


def test_it_goes_on_with_another_number_of_processes(alone, base, server, tmp_path):
    """4, 2, 1 and 3, changed in the middle of an epoch."""
    out = tmp_path / "run"
    train(server, 4, base, out, max_steps=10, sample_every=0)
    for processes, steps in ((2, 19), (1, 27), (3, 42)):
        train(server, processes, base, out, max_steps=steps, sample_every=0, resume=True)
    every, whole = rows(out), rows(alone)
    cut = [
        row for row in every if row.get("event") != "epoch" or row["step"] % 14 == 0
    ]  # a run cut short has its epoch's row
    assert [row["step"] for row in cut] == [row["step"] for row in whole]
    for row, same in zip(cut, whole, strict=True):
        for name in ("loss", "mean_loss", "val_loss"):
            assert row.get(name) == (pytest.approx(same[name], rel=1e-6) if same.get(name) else None)


def test_exactly_the_same_for_any_number(base, server, tmp_path):
    """--exact: bit for bit, with dropout; 1, 3 and again 2 processes in the middle of an epoch or one that was never interrupted."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(server, 4, base, whole, exact=True, epochs=2)
    for processes, steps in ((1, 10), (3, 19), (2, 28)):
        train(server, processes, base, out, exact=True, epochs=2, max_steps=steps, sample_every=0, resume=steps > 10)
    assert load_file(out / "model/model.safetensors").keys() == load_file(whole / "model/model.safetensors").keys()
    for path in ("model/model.safetensors", "checkpoints/step-00000028/optimizer.safetensors"):
        for name, tensor in load_file(whole / path).items():
            assert torch.equal(tensor, load_file(out / path)[name]) or name.startswith("rng"), name
    numbers = [(row["step"], row["loss"], row["grad_norm"]) for row in rows(whole) if "event" not in row]
    assert numbers == [(row["step"], row["loss"], row["grad_norm"]) for row in rows(out) if "event" not in row]


def test_an_update_in_slices_is_the_whole(base, server, tmp_path):
    """--parallel sharded, with masters of its own (bf16): bit for bit data's, in a checkpoint that any number goes on with."""
    one, other = tmp_path / "data", tmp_path / "sharded"
    train(server, 3, base, one, precision="bf16", parallel="data", epochs=2)
    said = train(server, 3, base, other, precision="bf16", parallel="sharded", epochs=1, sample_every=0)
    assert "3 processes, which divide the poems and the update" in said
    train(server, 3, base, other, precision="bf16", parallel="sharded", epochs=2, resume=True)
    assert_same_numbers(one, other)
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    train(server, 1, base, other, precision="bf16", epochs=3, resume=True)


def test_weights_in_shards_are_the_whole(base, server, tmp_path):
    """--parallel fsdp: the losses of one process, and checkpoints that any number goes on with in any way."""
    alone, out = tmp_path / "alone", tmp_path / "run"
    train(server, 1, base, alone, dropout=0.0, epochs=2, sample_every=0)
    said = train(server, 3, base, out, dropout=0.0, epochs=1, parallel="fsdp")
    assert "3 processes, which divide the poems, the weights and the update" in said
    train(server, 1, base, out, dropout=0.0, epochs=2, max_steps=20, sample_every=0, resume=True)
    train(server, 2, base, out, dropout=0.0, epochs=2, parallel="fsdp", accumulate=2, resume=True)
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
def test_the_docs_command_runs(base, server, tmp_path, page, number):
    """With two processes, two steps and a small model."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    line = [line for line in lines if line.startswith("torchrun ")][number]
    line = re.sub(r"--nproc-per-node \d", "--nproc-per-node 2", line).replace(" --shape gpt2-xl", "")
    words = shlex.split(line.partition("  #")[0])
    more = ["--device", "cpu", "--max-steps", "2", "--model"]
    more = more if "--from-scratch" in words else ["--from-scratch", *more]
    (tmp_path / "poems.txt").write_bytes((base / "poems.txt").read_bytes())
    server.torchrun(*words[1:], *more, base / "model", cwd=tmp_path)
    assert server.wait() == 0, server.said()
    assert fastpoem.Run(tmp_path / words[-1]).metrics


@pytest.mark.parametrize("changes, message", [
    (dict(device="cuda:7"), "--device cuda:7: cannot be shared by 2 processes; use --device cuda, with CUDA_VISIBLE_DEVICES"),
    (dict(accumulate=3), "--batch-size 4: fewer poems than the 6 parts of a step (2 processes, 3 micro-batches each); raise it"),
    (dict(parallel="fsdp", exact=True), "--parallel fsdp: does not go together with --exact; leave out one of them"),
    (dict(accumulate=2, exact=True), "--exact: has micro-batches of its own; leave out --accumulate"),
    (dict(batch_size=1, exact=True), "--exact: takes --batch-size 2 or more for 2 processes, not 1; raise it, or start fewer processes"),
])  # fmt: skip
def test_what_is_refused_is_said_once(base, server, tmp_path, changes, message):
    words = script(
        tmp_path,
        "import os, sys, time\n"
        "from fastpoem.cli import run_command\n"
        "from fastpoem.train import main\n"
        "sys.argv.pop(1)\n"
        "time.sleep(1.0 * (os.environ['RANK'] == '0'))\n"  # torchrun ends all when one has ended
        "run_command(main)\n",
    )
    server.torchrun(*words, *flags(base, tmp_path / "run", **changes))
    assert server.wait() != 0 and server.said().count("fastpoem: ") == 1 and message in server.said()
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def training(server: Server, processes: int, base: Path, out: Path, *options: object, after: int = 1, **changes):
    """torchrun's process id, of a run that would never end, with `after` checkpoints."""
    endless = flags(base, out, epochs=10**6, log_every=100, save_every=20, sample_every=0, **changes)
    pid = server.torchrun(*options, *command(processes, *endless), seconds=20.0)
    try:
        wait(lambda: len(checkpoint.listed(out)) >= after, server)
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        server.wait()


def wait(over: Callable[[], bool], process: Server | subprocess.Popen) -> None:
    end = time.monotonic() + LIMIT
    while not over():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("to", ["torchrun", 1])
def test_a_signal_to_one_stops_all_after_one_step(base, server, tmp_path, to):
    """In an epoch of so many steps that its end, where all ask one another, is far away."""
    out, long = tmp_path / "run", tmp_path / "long.txt"
    long.write_text("\n".join([(base / "poems.txt").read_text(encoding="utf-8")] * 100), encoding="utf-8")
    with training(server, 2, base, out, data=str(long)) as pid:
        os.kill(pid if to == "torchrun" else server.of_rank(to), signal.SIGTERM)
        assert server.wait() != 0
    (step, newest), *_ = checkpoint.listed(out)
    assert 20 <= step < 1000 and newest == checkpoint.newest_whole(out)
    again = "stopped after a complete checkpoint; go on with: torchrun --nproc-per-node 2 -m fastpoem.train"
    assert server.out.read_text(encoding="utf-8").count(again) == 1
    whole = dict(data=str(long), epochs=1, max_steps=step, log_every=100, sample_every=0, resume=True)
    train(server, 1, base, out, **whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all(base, server, tmp_path, rank):
    out = tmp_path / "run"
    with training(server, 3, base, out):
        os.kill(server.of_rank(rank), signal.SIGKILL)
        assert server.wait() != 0
    said = server.said()
    assert "another of the 3 processes is gone; --resume goes on from the newest checkpoint" in said
    assert checkpoint.newest_whole(out) is not None and "Traceback" not in said.split("torch/distributed")[0]


@pytest.mark.slow
def test_one_that_hangs_ends_all(base, server, tmp_path):
    """Within the limit of a collective; torchrun then gives the one that hangs 30 s."""
    out = tmp_path / "run"
    with training(server, 3, base, out):
        os.kill(server.of_rank(1), signal.SIGSTOP)
        assert server.wait() != 0
    assert "another of the 3 processes did not answer for 20 s" in server.said()


def test_torchrun_begins_again_by_itself(base, server, tmp_path):
    """--max-restarts goes on from the newest checkpoint, without --resume."""
    out = tmp_path / "run"
    with training(server, 2, base, out, "--max-restarts", 1):
        os.kill(server.of_rank(1), signal.SIGKILL)
        before = len(checkpoint.listed(out))
        wait(
            lambda: re.search(r"step [0-9]+ of [0-9]+ is done: going on", server.out.read_text(encoding="utf-8")),
            server,
        )
        newest = checkpoint.listed(out)[0]
        wait(lambda: checkpoint.listed(out)[0] > newest, server)
        assert before and server.poll() is None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_restart_leaves_alone_what_it_did_not_begin(alone, base, server, tmp_path, processes):
    """A run that stood there is refused again, not gone on with."""
    out = tmp_path / "run"
    shutil.copytree(alone, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    server.torchrun("--max-restarts", 1, *command(processes, *flags(base, out, epochs=4)))
    assert server.wait() != 0 and server.said().count("holds a run already") == 2
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_one_script_trains_twice(base, server, tmp_path):
    """The second run reads nothing that the first left with torchrun."""
    changes = settings(base, out=str(tmp_path / "run"), sample_every=0)
    more = changes | {"resume": True, "epochs": 3}
    text = f"import fastpoem\nfastpoem.fit(**{changes | {'epochs': 1}!r})\nrun = fastpoem.fit(**{more!r})\nassert run.model.exists()\n"
    server.torchrun(*script(tmp_path, text))
    assert server.wait() == 0, server.said()
    assert fastpoem.Run(tmp_path / "run").metrics[-1]["step"] == 42


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
    done = torchrun(*words, FASTPOEM_COLLECTIVE_SECONDS="5")
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert "Step 11 is saved: fastpoem.fit(out=" in done.stderr
    assert checkpoint.newest_whole(tmp_path / "run") == checkpoint.listed(tmp_path / "run")[0][1]
    assert checkpoint.listed(tmp_path / "run")[0][0] == 11
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 5, 10]
    assert fastpoem.fit(out=str(tmp_path / "run"), resume=True, quiet=True, max_steps=12).metrics[-1]["step"] == 12


def test_a_signal_to_one_in_a_validation_stops_all(base, server, tmp_path):
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
        "        (here / f'in-{os.environ[\"RANK\"]}').touch()\n"
        "        time.sleep(1.5)\n"  # 45 s in all
        "validate.validation_steps = slow\n"
        f"fastpoem.fit(**{changes!r})\n",
    )
    pid = server.torchrun(*words)
    try:
        wait(lambda: (tmp_path / "in-0").exists() and (tmp_path / "in-1").exists(), server)
        os.kill(server.of_rank(1), signal.SIGTERM)
        begin = time.monotonic()
        server.wait()
        assert time.monotonic() - begin < 25
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        server.wait()
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
def test_fifty_kills_at_random_moments(base, server, tmp_path):
    """Of a random process, before training too: all end, none hangs, and the newest checkpoint is whole."""
    generator = random.Random(0)
    for number in range(50):
        out, rank = tmp_path / f"run-{number}", generator.randrange(2)
        with training(server, 2, base, out, after=0):
            wait(lambda rank=rank: server.of_rank(rank) is not None, server)
            time.sleep(generator.uniform(0.0, 4.0))
            os.kill(server.of_rank(rank), signal.SIGKILL)
            assert server.wait() != 0
        assert bool(checkpoint.listed(out)) is (checkpoint.newest_whole(out) is not None)
