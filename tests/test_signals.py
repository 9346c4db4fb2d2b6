"""Signals are noted and answered at places of our own: none is lost, none raises inside somebody's import, a second ends the process."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastpoem
from fastpoem import signals
from fastpoem.errors import InputError
from fastpoem.run.loop import Loop
from fastpoem.signals import Stopped, StopRequest
from tests.runs import ENVIRONMENT, settings

KINDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def python(script: str, *arguments: str, **options) -> subprocess.Popen:
    """A process in which SIGHUP is not ignored, as it is under nohup."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), **options,
    )  # fmt: skip


LISTENING = """
import os, signal, sys, time
from fastpoem import signals
from fastpoem.cli import run_command
SIGNAL = int(sys.argv[1])

def told():
    os.kill(os.getpid(), SIGNAL)
    time.sleep(0.01)
"""
PLACES = {
    "in a library's import": """
sys.path.insert(0, sys.argv[2])  # its module sends the signal, swallows whatever raises, and goes on
def main():
    __import__("swallows")
    signals.imported("never")
""",
    "in an import of ours, where nothing can be lost": """
sys.path.insert(0, sys.argv[2])
def main():
    signals.imported("slow")
""",
    "while a library blocks": """
def main():
    import threading
    threading.Timer(0.1, lambda: os.kill(os.getpid(), SIGNAL)).start()
    signals.waiting(lambda: time.sleep(60))
""",
    "after the last question": """
def main():
    print("done")
    told()
""",
    "and something else fails for it": """
def main():
    told()
    raise RuntimeError("a compiler that was ended as well")
""",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", KINDS)
def test_no_signal_is_lost(tmp_path, number, place):
    (tmp_path / "swallows.py").write_text(
        "import os, sys, time\n"
        "try:\n    os.kill(os.getpid(), int(sys.argv[1])); time.sleep(0.01)\n"
        "except BaseException:\n    print('raised inside an import')\n"
    )
    (tmp_path / "slow.py").write_text("import __main__, time; __main__.told(); time.sleep(60)")
    (tmp_path / "never.py").write_text("print('imported all the same')")
    out, err = (process := python(LISTENING + PLACES[place] + "run_command(main)", str(int(number)), str(tmp_path))).communicate(timeout=600)  # fmt: skip
    assert process.returncode == 128 + number, err
    assert err == f"fastpoem: stopped by {signal.Signals(number).name}\n"
    assert out == ("done\n" if place == "after the last question" else "")


@pytest.mark.parametrize("number", KINDS)
def test_a_signal_that_is_ignored_stays_so(number):
    """nohup's SIGHUP. The others are heeded whatever a script's background job inherits."""
    script = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n{LISTENING}\nrun_command(told)"
    process = python(script, str(int(number)))
    process.communicate(timeout=600)
    assert process.returncode == (0 if number == signal.SIGHUP else 128 + number)


@pytest.mark.parametrize("second", KINDS)
def test_a_second_one_ends_the_process_and_the_same_one_twice_is_one(second):
    script = f"{LISTENING}\nsignals.MOMENT = MOMENT\ndef main():\n told(); time.sleep(PAUSE); os.kill(os.getpid(), {int(second)}); time.sleep(PAUSE)"
    late, twin = (
        python(f"PAUSE, MOMENT = {pause}, {moment}\n{script}\nrun_command(main)", str(int(signal.SIGINT)))
        for pause, moment in ((0.3, 0.1), (0, 60))  # on busy cores much time may pass between two lines
    )
    late.communicate(timeout=600)
    _, err = twin.communicate(timeout=600)
    assert late.returncode == -second
    assert (twin.returncode, err) == (128 + signal.SIGINT, "fastpoem: stopped by SIGINT\n")


def test_a_terminal_is_answered_at_once():
    """On a terminal, and nowhere else: a script reads one line."""
    reader, writer = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENING + "\ndef main():\n told(); os.read(0, 1); signals.ask()\nrun_command(main)", "2"],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stderr=writer,
    )  # fmt: skip
    said = b""
    while b"again: stop now" not in said:  # while it still waits for us
        said += os.read(reader, 1000)
    process.communicate(b"x", timeout=600)
    assert process.returncode == 130
    os.close(writer)
    os.close(reader)


def test_handlers_come_back(monkeypatch):
    before = [signal.getsignal(number) for number in KINDS]
    with StopRequest() as outer:
        with StopRequest() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner.signal == outer.signal == signal.SIGTERM
            with pytest.raises(Stopped, match="SIGTERM"):
                signals.ask()
        assert outer.signal == signal.SIGTERM  # one context's end is not the other's
    assert outer.signal == signal.SIGTERM and signals.noted() is None
    assert [signal.getsignal(number) for number in KINDS] == before
    found = []
    thread = threading.Thread(target=lambda: [found.append(stop.signal) for stop in [StopRequest().__enter__()]])
    thread.start()
    thread.join()
    assert found == [None] and [signal.getsignal(number) for number in KINDS] == before


STAGES = [
    "fastpoem.run.fit.take",
    "fastpoem.run.fit.decide",
    "fastpoem.run.fit.build_step",
    "fastpoem.corpus.make.choose_buckets",
]


@pytest.mark.parametrize("stage", STAGES)
def test_before_training_nothing_is_left_behind(base, tmp_path, monkeypatch, stage):
    """Ctrl-C at each stage before the first step: KeyboardInterrupt, and as if the call had not been made."""
    room, _, name = stage.rpartition(".")
    inner = getattr(importlib.import_module(room), name)

    def outer(*given, **more):
        signal.raise_signal(signal.SIGINT)
        return inner(*given, **more)

    monkeypatch.setattr(stage, outer)
    with pytest.raises(KeyboardInterrupt):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache")))
    assert [path for path in tmp_path.rglob("*") if path.name == "run" or path.name.startswith(".fastpoem")] == []


def test_ctrl_c_in_a_notebook(base, tmp_path, monkeypatch, capsys):
    """The step is finished, the checkpoint complete, said how to go on; then KeyboardInterrupt, and the run so far writes poems."""
    one_step = Loop.one_step

    def step(self):
        one_step(self)
        if self.done == 17:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "one_step", step)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fastpoem.fit(**settings(base, out=str(out)))
    said = capsys.readouterr().out
    assert said.count("stopping after this step (again: stop now)") == 1
    assert said.splitlines()[-1].endswith(f"go on with: fastpoem.fit(out={str(out)!r}, resume=True)")
    run = fastpoem.Run(out)
    assert run.metrics[-1]["step"] == 17 and run.model == out / "checkpoints/step-00000017"
    assert run.generate("春", seed=1)[0].startswith("春")
    finished = fastpoem.fit(out=str(out), resume=True)
    assert finished.metrics[-1]["step"] == 42 and finished.model == out / "model"


def test_what_a_process_of_checks_does_is_ended_too(monkeypatch):
    import torch

    from fastpoem.doctor import apart

    began = []
    real = subprocess.Popen

    def begin(command, **options):
        began.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return began[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    with StopRequest(), pytest.raises(Stopped):
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        list(apart.in_a_process(torch.device("cpu"), ["attention float32"]))
    assert began[0].poll() == -signal.SIGKILL


def test_an_error_of_what_is_waited_for_is_raised():
    def fails():
        raise InputError("thing", "reason", "mend")

    with pytest.raises(InputError, match="thing: reason; mend"):
        signals.waiting(fails)
    assert signals.waiting(lambda: 3) == 3


def at_a_random_moment(folder: Path, number: int, delay: float) -> str:
    """How a run of the bundled verses that would take hours ends when it is told to after `delay` seconds."""
    command = [sys.executable, "-m", "fastpoem.train", "--device", "cpu", "--epochs", "100000", "--out", str(folder)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    time.sleep(delay)
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return "lost"
    if process.returncode == -number or (process.returncode == 1 and "init_import_site" in err):
        return "before we listened"  # in the interpreter's own start
    if process.returncode != 128 + number or "Traceback" in err:
        return f"wrong: {process.returncode} {err[-300:]}"
    return "in training" if "stopped after a complete checkpoint" in out else "before training"


@pytest.mark.slow
@pytest.mark.timeout(20_000)
def test_a_thousand_signals_at_random_moments(tmp_path, capsys):
    """On busy cores: two runs at a time beside processes that take all that they get. SIGNALS=N for another count."""
    draw = random.Random(12)
    count = int(os.environ.get("SIGNALS", "1000"))
    jobs = [(tmp_path / str(i), draw.choice(KINDS), draw.uniform(0, 3)) for i in range(count)]
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            ends = Counter(pool.map(lambda job: at_a_random_moment(*job), jobs))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    with capsys.disabled():
        print(f"\n{count} signals: {json.dumps(ends)}")
    assert {*ends} <= {"before we listened", "before training", "in training"}
