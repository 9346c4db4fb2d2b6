"""Faults: killed at any moment, told to stop, a disk that fills up or vanishes, bits that flip. Nothing is lost that was saved.

The longer forms (`-m slow`) print what the log of the project records: kills survived, steps lost, flips caught.
"""

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import fastpoem
from fastpoem.config import from_kwargs
from fastpoem.corpus.store import TokenStore
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.run import checkpoint
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from fastpoem.run.folder import Claim, Taken
from fastpoem.signals import StopRequest
from tests.runs import ENVIRONMENT, Server, assert_same, assert_tidy, rows, settings


@pytest.fixture
def scratch(tmp_path):
    """A folder in memory where there is one, for tests that flush thousands of files."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with contextlib.closing(Server(tmp_path_factory.mktemp("server"))) as made:
        yield made


@pytest.fixture(scope="module")
def untouched(base, server):
    made = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = base / f"untouched-{len(made)}"
            assert server.run(settings(base, out=str(made[key]), **changes)) == 0, server.said()
        return made[key]

    return make


def last_step(run: Path) -> int:
    """The last whole row's step, in a file that a kill may have torn."""
    if not (run / "metrics.jsonl").exists():
        return 0
    steps = re.findall(rb'^\{(?:"event": "epoch", )?"step": (\d+),.*\}$', (run / "metrics.jsonl").read_bytes(), re.M)
    return int(steps[-1]) if steps else 0


def resumed_at(said: str) -> int | None:
    """The step that a resumed run went on from; None where it was killed before it could tell."""
    found = re.search(r"step (\d+) of \d+ is done|starting from the beginning", said)
    return int(found[1] or 0) if found else None


def killed_at_random(base, server, out, untouched, kills, seed, **changes):
    """Kill a run again and again until it has been killed so often, then let it end. Returns the steps that were done twice."""
    rng, lost, count, before, number = random.Random(seed), 0, 0, 0, 0
    while True:
        job = settings(base, out=str(out), resume=number > 0, **changes)
        number += 1
        pid = server.start(job, {"slow": 0.01})
        if count < kills:
            # the steps are slow ones, so that the run is killed several times on any machine
            time.sleep(rng.uniform(0.02, 0.35))
            os.kill(pid, signal.SIGKILL)
        status = server.wait()
        if (start := resumed_at(server.said())) is not None:
            lost += max(0, before - start)
        assert "passed over" not in server.said(), server.said()
        if status == 0:
            break
        assert status == -signal.SIGKILL, server.said()
        count += 1
        before = last_step(out)
    assert_same(untouched, out)
    assert_tidy(out)
    return count, lost


def test_killed_at_random_moments(base, server, untouched, scratch):
    changes = dict(epochs=12, save_every=3, keep=2)
    kills, lost = killed_at_random(base, server, scratch / "run", untouched(**changes), kills=8, seed=0, **changes)
    assert kills >= 3 and lost < 10 * kills


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_a_hundred_times(base, server, untouched, scratch, capsys):
    changes = dict(epochs=150, save_every=3, keep=2)
    kills, lost = killed_at_random(base, server, scratch / "run", untouched(**changes), kills=100, seed=1, **changes)
    with capsys.disabled():
        print(f"\n{kills} SIGKILLs at random moments of a run of {14 * 150} steps survived, {lost} steps done twice")
    assert kills == 100


SHORT = dict(epochs=1, save_every=4, keep=1)  # checkpoints at 4, 8, 12, 14


def operations(base, server, tmp_path) -> int:
    assert (
        server.run(settings(base, out=str(tmp_path / "first"), **SHORT)) == 0
    )  # which tokenizes, and no later one does
    assert server.run(settings(base, out=str(tmp_path / "counted"), **SHORT), {"count": str(tmp_path / "count")}) == 0
    return int((tmp_path / "count").read_text())


def killed_in(base, server, tmp_path, untouched, places):
    whole, lost = untouched(**SHORT), 0
    for place in places:
        out = tmp_path / f"run-{place}"
        assert server.run(settings(base, out=str(out), **SHORT), {"kill_at": place}) == -signal.SIGKILL
        newest = checkpoint.listed(out)
        reached = last_step(out)
        assert server.run(settings(base, out=str(out), resume=True, **SHORT)) == 0, (place, server.said())
        assert "passed over" not in server.said(), (place, server.said())
        assert resumed_at(server.said()) == (newest[0][0] if newest else 0)
        lost += max(0, reached - (newest[0][0] if newest else 0))
        assert_same(whole, out)
        assert_tidy(out)
        shutil.rmtree(out)
    return lost


def test_killed_inside_operations_on_the_disk(base, server, untouched, scratch):
    count = operations(base, server, scratch)
    assert count > 100
    killed_in(base, server, scratch, untouched, random.Random(0).sample(range(1, count), 10))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_inside_every_operation_on_the_disk(base, server, untouched, scratch, capsys):
    count = operations(base, server, scratch)
    lost = killed_in(base, server, scratch, untouched, range(1, count + 1))
    with capsys.disabled():
        print(
            f"\nSIGKILL inside each of {count} operations on the disk (open, write, fsync, rename …): all survived, {lost} steps twice"
        )


def write_small(run: Path, step: int, tensors) -> None:
    checkpoint.write(run, step, tensors, {"config.json": b"{}"}, {"val_loss": 1.0 / step}, keep=1)


def small_tensors(value: float):
    import torch

    return {
        "model.safetensors": {"a": torch.full((50,), value), "b": torch.full((3, 2), value)},
        "optimizer.safetensors": {"c": torch.full((), value), "rng.cpu": torch.zeros(9, dtype=torch.uint8)},
    }


def read_small(run: Path):
    into, passed = small_tensors(0.0), []
    state = checkpoint.read_newest(run, into, lambda state: None, passed.append)
    values = {
        float(value)
        for group in into.values()
        for name, tensor in group.items()
        if name != "rng.cpu"
        for value in tensor.view(-1)
    }
    return state, values, passed


@pytest.mark.parametrize("same_step", [False, True])
def test_each_operation_of_writing_a_checkpoint(scratch, same_step):
    """Killed in it, or refused by the disk: there is the old checkpoint or the new one, and it is whole."""
    sys.path.insert(0, str(Path(__file__).parent))
    import run_server

    ends, place = set(), 0
    while True:
        place += 1
        for fault in (
            {"kill_at": place},
            {"refuse": [place, place], "errno": "ENOSPC"},
            {"refuse": [place, 10**6], "errno": "EIO"},
        ):
            run = scratch / "run"
            shutil.rmtree(run, ignore_errors=True)
            write_small(run, 1, small_tensors(1.0))
            pid = os.fork()
            if pid == 0:
                status = 0
                try:
                    run_server.arm(fault)
                    write_small(run, 1 if same_step else 2, small_tensors(2.0))
                    status = 3
                except OSError:
                    status = 4
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status in (-signal.SIGKILL, 3, 4), fault
            for path in (run / "checkpoints").iterdir():
                assert (path / "state.json").is_file()  # only complete ones are ever there
            if status == 4:  # refused: what is left of the attempt is gone without a restart, where the disk lets
                assert fault["refuse"][1] > place or not [
                    path for path in run.iterdir() if path.name.startswith(".checkpoint")
                ]
            checkpoint.clean(run)
            _, values, passed = read_small(run)
            assert passed == [] and values in ({1.0}, {2.0}), (fault, passed, values)
            assert values == {2.0} or status != 3
            assert [path.name for path in run.iterdir()] == ["checkpoints"]
            ends.add(status)
        if status == 3 and place > 60:
            break
    assert ends == {-signal.SIGKILL, 3, 4}


def test_each_operation_of_exporting_the_model(scratch):
    """The trained model is never without a name, whichever moment the process dies at."""
    sys.path.insert(0, str(Path(__file__).parent))
    import run_server

    folder = scratch / "model"
    beside = {"config.json": b"{}"}
    contents = {}
    for value in (1.0, 2.0):
        hub.write_folder(folder, small_tensors(value)["model.safetensors"], beside)
        contents[(folder / "model.safetensors").read_bytes()] = value
    place, status = 0, None
    while status != 3:
        place += 1
        hub.write_folder(folder, small_tensors(1.0)["model.safetensors"], beside)
        pid = os.fork()
        if pid == 0:
            try:
                run_server.arm({"kill_at": place})
                hub.write_folder(folder, small_tensors(2.0)["model.safetensors"], beside)
            finally:
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert contents[(folder / "model.safetensors").read_bytes()] in (1.0, 2.0)
    assert place > 10


def test_without_exchange_a_killed_export_is_put_back(tmp_path, monkeypatch):
    from fastpoem import disk

    monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    folder = tmp_path / "model"
    for value in (1.0, 2.0):
        hub.write_folder(folder, small_tensors(value)["model.safetensors"], {})
    content = (folder / "model.safetensors").read_bytes()
    folder.rename(tmp_path / ".model.replaced")  # killed between its two renames
    disk.recover(hub.partial(folder), folder)
    assert (folder / "model.safetensors").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("errno", ["ENOSPC", "EROFS", "EACCES", "EIO"])
def test_a_disk_that_refuses_for_a_while(base, server, untouched, tmp_path, errno):
    """Training goes on; the next checkpoint is written; what was not written of the metrics is written later."""
    out = tmp_path / "run"
    fault = {"refuse": [60, 75], "errno": errno}
    assert server.run(settings(base, out=str(out), **SHORT), fault) == 0, server.said()
    assert "could not be written" in server.said() and "Traceback" not in server.said()
    assert_same(untouched(**SHORT), out)
    assert_tidy(out)


def test_a_disk_that_stays_full(base, server, untouched, tmp_path):
    """The run ends with exit code 1 naming the newest checkpoint, which is whole, and goes on from there when there is room."""
    out = tmp_path / "run"
    fault = {"refuse": [150, 10**9], "errno": "ENOSPC"}
    assert server.run(settings(base, out=str(out), **SHORT), fault) == 1
    newest, said = checkpoint.listed(out)[0], server.said()
    assert 0 < newest[0] < 14
    assert "trying again in" in said and f"the newest checkpoint is {newest[1]}: make room" in said
    assert "NotSaved: the checkpoint of step 14 could not be written: [Errno 28] No space left on device" in said
    assert_tidy(out)
    assert (out / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert server.run(settings(base, out=str(out), resume=True, **SHORT)) == 0, server.said()
    assert f"step {newest[0]} of 14 is done" in server.said()
    assert_same(untouched(**SHORT), out)


def test_a_limit_of_the_kernel(base, server, untouched, tmp_path):
    """Weights fit and moments do not: nothing of either is left, and the model is exported all the same."""
    out = tmp_path / "run"
    size = (untouched(**SHORT) / "model/model.safetensors").stat().st_size
    assert server.run(settings(base, out=str(out), **SHORT), {"no_larger_than": size + 100}) == 1
    assert "no checkpoint was ever written: make room and start again" in server.said()
    assert not (out / "checkpoints").exists() or not list((out / "checkpoints").iterdir())
    same = (out / "model/model.safetensors").read_bytes() == (
        untouched(**SHORT) / "model/model.safetensors"
    ).read_bytes()
    assert same and not [path for path in out.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("what", ["checkpoints", "."])
def test_a_folder_that_vanishes(base, server, untouched, tmp_path, what):
    out = tmp_path / "run"
    fault = {"vanish": str(out / what), "step": 9}
    assert server.run(settings(base, out=str(out), **SHORT), fault) == 0, server.said()
    assert ("metrics.jsonl had vanished and is written anew" in server.said()) == (what == ".")
    assert_same(untouched(**SHORT), out)


def test_a_second_signal_stops_at_once(base, server, untouched, tmp_path):
    out = tmp_path / "run"
    pid = server.start(settings(base, out=str(out), **SHORT), {"stall": 60})
    while "writing" not in server.said():
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    while "again: stop now" not in server.said():  # two that come within a moment are one
        time.sleep(0.02)
    time.sleep(0.3)
    begin = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert (
        server.wait() == -signal.SIGTERM and time.monotonic() - begin < 40
    )  # of the minute that it would have written for
    assert [path.name for path in out.iterdir() if path.name.endswith(".partial")]  # it was in the midst of it
    assert server.run(settings(base, out=str(out), resume=True, **SHORT)) == 0
    assert_same(untouched(**SHORT), out)
    assert_tidy(out)


def test_two_runs_into_one_folder(base, server, tmp_path):
    out = tmp_path / "run"
    pid = server.start(settings(base, out=str(out), epochs=10_000))
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.02)
    with pytest.raises(InputError, match=rf"another run is writing there \(process {pid}\)"):
        fastpoem.fit(**settings(base, out=str(out), epochs=10_000, resume=True))
    os.kill(pid, signal.SIGKILL)
    server.wait()
    fastpoem.fit(**settings(base, out=str(out), epochs=10_000, max_steps=1, resume=True))  # the dead hold nothing


def flipped(path: Path, rng: random.Random):
    """Flip one bit of one file below `path`; (file, content before)."""
    files = sorted(one for one in path.rglob("*") if one.is_file() and one.stat().st_size)
    file = rng.choice(files)
    before = file.read_bytes()
    content = bytearray(before)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return file, before


def flips(base, run: Path, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    store = next((base / ".fastpoem").iterdir())
    newest = checkpoint.listed(run)[0][1]
    found = {"store": 0, "checkpoint": 0}
    loop_tensors = _live_tensors(base)
    for number in range(count):
        kind = "store" if number % 2 else "checkpoint"
        file, before = flipped(store if kind == "store" else newest, rng)
        try:
            if kind == "store":
                with pytest.raises(InputError):
                    TokenStore.open(store).verify()
            else:
                said = []
                state = checkpoint.read_newest(run, loop_tensors, lambda state: None, said.append)
                assert state["step"] < int(newest.name[5:]) and len(said) == 1 and newest.name in said[0]
            found[kind] += 1
        finally:
            file.write_bytes(before)
    return found


def _live_tensors(base):
    out = base / f"tensors-{time.monotonic_ns()}"
    with assembled(from_kwargs(**settings(base, out=str(out))), Voice(quiet=True)) as (loop, _):
        return loop.train_state.tensors()


def test_flipped_bits(base, untouched):
    assert flips(base, untouched(), 60, seed=0) == {"store": 30, "checkpoint": 30}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_thousand_flipped_bits(base, untouched, capsys):
    found = flips(base, untouched(), 1000, seed=1)
    with capsys.disabled():
        print(f"\n1,000 flipped bits: {found} detected, none unnoticed")
    assert found == {"store": 500, "checkpoint": 500}


def listens(process) -> bool:
    """Whether a process catches SIGTERM, which Python by itself does not."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:  # no Linux
        time.sleep(0.5)
        return True
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def command(*arguments, cwd, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fastpoem.train", *arguments],
        cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), **options,  # under nohup it is rightly ignored
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_command_stops_and_says_how_to_go_on(base, tmp_path, number):
    where = "a run with spaces"
    arguments = ["--data", str(base / "poems.txt"), "--model", str(base / "model"), "--from-scratch", "--out", where]
    arguments += ["--device", "cpu", "--epochs", "100000", "--batch-size", "4", "--log-every", "5"]
    process = command(*arguments, cwd=tmp_path)
    for line in process.stdout:
        if "step 10/" in line:
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number and err == ""
    again = out.splitlines()[-1]
    assert "stopped after a complete checkpoint; go on with: python -m fastpoem.train" in again
    assert again.endswith("--log-every 5 --resume") and "'a run with spaces'" in again
    (step, _), *_ = checkpoint.listed(tmp_path / where)
    assert rows(tmp_path / where)[-1]["step"] in (step, step // 5 * 5, step // 14 * 14)
    assert_tidy(tmp_path / where)


@pytest.mark.parametrize("delay", [0, 0.5, 1.3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_before_training_too(tmp_path, number, delay):
    """Counted from where the command listens: what comes before, in the interpreter's own start, is not ours to answer."""
    process = command("--out", "run", "--device", "cpu", "--epochs", "100000", cwd=tmp_path)
    while not listens(process):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + number
    assert "Traceback" not in err and err.count("\n") <= 1


@pytest.mark.parametrize("other", ["began", "ended"])
def test_a_folder_that_is_another_runs_by_now(base, server, untouched, tmp_path, other):
    """Removed under a running run, and taken by another: the first writes nothing into it and says so."""
    out = tmp_path / "run"
    config = from_kwargs(**settings(base, out=str(out), **SHORT))
    with assembled(config, Voice(quiet=True)) as (loop, export), StopRequest() as stop:
        loop.one_step()
        shutil.rmtree(out)
        pid = server.start(settings(base, out=str(out), **SHORT), {"stall": 3} if other == "began" else None)
        if other == "began":
            while "writing" not in server.said():
                time.sleep(0.02)
        else:
            assert server.wait() == 0
        with pytest.raises(Taken, match=r"was removed while this run was writing there, and another run has it now"):
            loop.run(stop)
        with pytest.raises(Taken):
            export(out / "model")
        loop.save()
        with pytest.raises(Taken):
            loop.saver.wait()
    if other == "began":
        assert pid and server.wait() == 0, server.said()
    assert_same(untouched(**SHORT), out)
    assert_tidy(out)


def test_a_full_disk_does_not_make_a_run_its_own_thief(tmp_path, monkeypatch):
    """The folder vanishes, and comes again where not a byte can be written, or where for a while nothing can."""
    held = Claim(tmp_path / "run")
    before = (tmp_path / "run/.lock").read_text()
    refuse = lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    for what in ("os.write", "fastpoem.disk.make_folder"):
        shutil.rmtree(tmp_path / "run")
        with monkeypatch.context() as full:
            full.setattr(what, refuse)
            if what == "os.write":
                held.hold()
            else:
                with pytest.raises(OSError, match="No space left"):
                    held.hold()
        held.hold()
        with pytest.raises(InputError, match="another run is writing there"):
            Claim(tmp_path / "run")
    assert (tmp_path / "run/.lock").read_text() == before and before.splitlines()[0] == str(os.getpid())
    held.close()


@pytest.mark.parametrize(
    ("rank", "ends"), [("0", (128 + signal.SIGTERM, "fastpoem: stopped by SIGTERM\n")), ("1", (0, ""))]
)
def test_a_signal_when_all_is_done_with_stdout_closed(rank, ends):
    """As of `>&-`, where Python has no sys.stdout. Whoever sent it is told; but one of several processes does not make the others' run fail."""
    script = "import os, signal; from fastpoem.cli import run_command; run_command(lambda: os.kill(os.getpid(), signal.SIGTERM))"
    line = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(script)} >&-"
    environment = ENVIRONMENT | {"RANK": rank, "WORLD_SIZE": "2"}
    done = subprocess.run(["sh", "-c", line], env=environment, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr) == ends


def test_the_command_that_lost_its_folder_says_it_in_a_line(base, server, tmp_path):
    arguments = ["--data", str(base / "poems.txt"), "--model", str(base / "model"), "--from-scratch", "--out", "run"]
    arguments += ["--device", "cpu", "--epochs", "100000", "--batch-size", "4", "--log-every", "5"]
    process = command(*arguments, cwd=tmp_path)
    for line in process.stdout:
        if "step 10/" in line:
            break
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.lock").write_text("")
    (tmp_path / "run").rename(tmp_path / "gone")  # in its place, in a moment, another's
    (tmp_path / "other").rename(tmp_path / "run")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and err.count("\n") == 1, err
    assert err.startswith("fastpoem: run was removed while this run was writing there")


def test_without_exchange_a_killed_checkpoint_is_put_back(scratch, monkeypatch):
    """Killed at each operation of writing a step's checkpoint anew, where the file system renames twice."""
    sys.path.insert(0, str(Path(__file__).parent))
    import run_server

    monkeypatch.setattr("fastpoem.disk.exchange", lambda one, other: False)
    run, place, status, aside = scratch / "run", 0, None, 0
    while status != 3:
        place += 1
        shutil.rmtree(run, ignore_errors=True)
        write_small(run, 1, small_tensors(1.0))
        pid = os.fork()
        if pid == 0:
            try:
                run_server.arm({"kill_at": place})
                write_small(run, 1, small_tensors(2.0))
            finally:
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        aside += not checkpoint.listed(run)
        checkpoint.clean(run)
        _, values, passed = read_small(run)
        assert passed == [] and values in ({1.0}, {2.0}), place
        assert [path.name for path in run.iterdir()] == ["checkpoints"]
    assert aside  # there was a moment without any


@pytest.mark.parametrize("apart", [1, 3])
def test_two_signals_never_hang(apart):
    """As `timeout` sends them, to the process and to its group: whatever line of the waiting the first interrupts, and the second of that."""
    for place in range(1, 25):
        pid = os.fork()
        if pid == 0:
            lines = 0

            def trace(frame, event, arg, place=place):
                nonlocal lines
                if event == "line":
                    lines += 1
                    if lines == place:
                        signal.raise_signal(signal.SIGINT)
                    if lines == place + apart:
                        signal.raise_signal(signal.SIGTERM)
                return trace

            signal.setitimer(signal.ITIMER_REAL, 120)  # SIGALRM ends what hangs
            with StopRequest() as stop:
                sys.settrace(trace)
                stop.wait(0.2)
                sys.settrace(None)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, -signal.SIGTERM), place
