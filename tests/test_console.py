"""What a person sees of a run: the summaries, the live display, poems on the way, two languages; and that training does not feel any of it."""

import ast
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import string
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

import fastpoem
from fastpoem.config import from_kwargs
from fastpoem.model.hub import BUNDLED
from fastpoem.poetry.verdict import shares
from fastpoem.run import samples, words
from fastpoem.run.console import Figures, Voice
from fastpoem.run.given import order_of
from fastpoem.run.samples import Writer, due
from tests import runs
from tests.runs import ROOT, assert_same, assert_tidy, settings
from tests.test_resume import told_at

ENVIRONMENT = {**runs.ENVIRONMENT, "TERM": "xterm-256color"}


def terminal(width, lang="en"):
    """A voice on a terminal of so many columns, and what draws its display now."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, _environ={})
    voice = Voice(lang=lang, console=console)

    def drawn():
        console.file.seek(0)
        console.file.truncate()
        console.print(voice._drawn())
        return console.file.getvalue().rstrip("\n").split("\n")

    return voice, drawn


FIGURES = Figures(loss=3.41234, accuracy=0.351, tokens_per_s=41_234.0, seconds_a_step=0.42, memory=1300 << 20)


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_display_fits_and_says_what_is_known(width, lang):
    voice, drawn = terminal(width, lang)
    voice._training, voice.done, voice.total, voice.steps, voice.epochs = True, 13_500, 67_830, 13_566, 5
    voice.figures = FIGURES
    rows = drawn()
    assert len(rows) == 2 and all(cell_len(row) <= width for row in rows)
    if width >= 80:
        left = "left 6h20" if lang == "en" else "剩余 6h20"
        for part in ("1/5", "13500/67830", "20%", left):
            assert part in rows[0]
        assert "━━━" in rows[0]
        for part in ("3.412", "35.1%", "41.2k", "1.3 GiB", "loss" if lang == "en" else "损失"):
            assert part in rows[1]
    with voice.phase("validating on {0:,} poems", 512) as at:
        at(128, 512)
        rows = drawn()
        assert len(rows) == 2 and all(cell_len(row) <= width for row in rows)
        assert (
            "128/512" in rows[1] and ("validating on 512 poems" if lang == "en" else "正在 512 首诗上验证") in rows[1]
        )
    assert "3.412" in drawn()[1]


def test_before_anything_is_known_and_beyond_the_end():
    voice, drawn = terminal(80)
    voice.start(0, 100, 10, 3)
    voice.stop()
    voice._training = True
    assert "the first step" in drawn()[1]
    voice.done, voice.figures = 100, FIGURES._replace(loss=float("nan"), seconds_a_step=None)
    rows = drawn()
    assert "epoch 3/3" in rows[0] and "100%" in rows[0] and "left" not in rows[0] and "nan" in rows[1]


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("width", [50, 80])
def test_a_summary_is_wrapped_on_a_terminal(width, lang):
    voice, _ = terminal(width, lang)
    voice.table([("data", "217,561 poems from poems.txt.xz, " * 4), ("checkpoints", "RUN")])
    rows = voice.console.file.getvalue().splitlines()
    assert all(cell_len(row) <= width for row in rows) and len(rows) >= 3
    assert {row[:12].strip() for row in rows[1:-1]} == {""}  # under the text, not under its label


def test_each_sentence_in_chinese_is_said_somewhere_with_the_same_values():
    said = set()
    for path in (ROOT / "fastpoem").rglob("*.py"):
        if path.name != "words.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    said.add(node.value)
    holes = lambda text: sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)
    for english, chinese in words.ZH.items():
        assert holes(english) == holes(chinese), english
        parts = [english, english.rpartition(" is done: ")[0] + " is done: ", english.rpartition(", and ")[0]]
        assert any(part in said for part in parts), f"nobody says: {english}"


@pytest.mark.parametrize("variables, on_a_terminal, lang", [
    ({"LANG": "zh_CN.UTF-8"}, True, "zh"), ({"LANG": "zh_CN.UTF-8"}, False, "en"), ({"LANG": "en_US.UTF-8"}, True, "en"),
    ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, True, "zh"), ({"LC_ALL": "C", "LANG": "zh_CN"}, True, "en"), ({}, True, "en"),
])  # fmt: skip
def test_the_language_of_the_locale(monkeypatch, variables, on_a_terminal, lang):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words.language("auto", on_a_terminal) == lang
    assert words.language("zh", False) == "zh" and words.language("en", on_a_terminal) == "en"


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_what_a_pipe_gets(base, tmp_path, capsys, monkeypatch, lang):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=2, lang="auto" if lang == "en" else "zh"))
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert "\x1b" not in said
    logged = [line for line in lines if "tok/s  left" in line or "token/秒  剩余" in line or "mean loss" in line]
    assert len(logged) > 10 and all(cell_len(line) <= 80 for line in logged)
    if lang == "zh":
        for part in ("数据", "4 首", "每轮 14 步", "第 1/2 轮", "验证损失", "最好", f"训练好的模型在 {run.model}"):
            assert part in said, part
        return
    for label, text in (
        ("data", "60 poems from poems.txt, 3 held out for validation, "), ("batches", "4 poems, packed (attention in C), no padding"),
        ("model", "1 layers × 16 wide, "), ("device", "cpu ("), ("training", "2 epochs, 28 steps, learning rate 0.01, epoch-cosine"),
        ("checkpoints", str(run.folder)), ("trained", "28 steps in "), ("best", f"validation loss {run.metrics[-1]['val_loss']:.4f} after step 28"),
        ("write", f"fastpoem.Run({str(run.folder)!r}).generate('春', count=3)"),
    ):  # fmt: skip
        assert any(line.startswith(f"{label} ") and text in line for line in lines), (label, lines)
    assert lines[-1] == f"the trained model is in {run.model}"


@pytest.mark.parametrize("batching, padding", [("bucket", "like length"), ("pad", "padded")])
def test_the_share_of_padding_is_that_of_the_batches(base, tmp_path, capsys, batching, padding):
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=1, batching=batching, val_poems=0))
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("batches"))
    store = fastpoem.TokenStore.open(Path(json.loads((run.folder / "config.json").read_text())["store"]["path"]))
    config = from_kwargs(**settings(base, batching=batching))
    order = order_of(config, store, np.empty(0, np.int64))
    positions = tokens = 0
    for step in range(order.steps):
        one = order(0, step)
        lengths = [int(store.buckets[b].lengths[i]) - 1 for b, i in zip(one.bucket, one.index, strict=True)]
        positions, tokens = positions + len(lengths) * max(lengths), tokens + sum(lengths)
    assert padding in said and f"{1 - tokens / positions:.1%} padding" in said


def test_quiet_says_nothing_and_does_the_same(base, tmp_path, capsys):
    common = settings(base, epochs=1)
    loud = fastpoem.fit(**common, out=str(tmp_path / "loud"))
    capsys.readouterr()
    quiet = fastpoem.fit(**common, out=str(tmp_path / "quiet"), quiet=True, sample="春")
    assert capsys.readouterr() == ("", "")
    assert_same(loud.folder, quiet.folder)


def poems(run):
    path = run / "samples.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.mark.parametrize("changes", [dict(), dict(vocab="corpus", batching="bucket"), dict(precision="bf16")], ids=repr)
def test_poems_on_the_way_change_nothing(base, tmp_path, changes):
    """Training is the same bit for bit, with dropout on: generators, weights, moments, rows."""
    common = settings(base, epochs=2, **changes)
    without = fastpoem.fit(**common, out=str(tmp_path / "without"), sample_every=0)
    often = fastpoem.fit(**common, out=str(tmp_path / "often"), sample_every=5)
    assert_same(without.folder, often.folder)
    assert_tidy(often.folder)
    assert not poems(without.folder)
    found = poems(often.folder)
    assert [row["step"] for row in found] == [step for step in (5, 10, 15, 20, 25, 28) for _ in range(3)]
    assert {row["prompt"] for row in found} == {"", "春", "明月"}
    for row in found:
        assert {*row} == {"step", "epoch", "prompt", "poem"} and row["epoch"] == round(row["step"] / 14, 4)
        assert row["poem"].startswith(row["prompt"]) and "[" not in row["poem"]


def test_an_epoch_says_how_many_poems_are_in_form(base, tmp_path, monkeypatch, capsys):
    """As its metrics have it, from the weights alone: a run that is stopped as it looks has the same."""
    monkeypatch.setattr(samples, "SHORT", 14)
    monkeypatch.setattr(samples, "shares", lambda poems: shares([*poems][:-3] + [line] * 3))
    line = (BUNDLED / "poems.txt").read_text(encoding="utf-8").splitlines()[0]
    common = settings(base, epochs=2)
    whole = fastpoem.fit(**common, out=str(tmp_path / "whole"))
    found = [row for row in whole.metrics if row.get("event") == "epoch"]
    assert [row["in_form"] for row in found] == [3 / samples.MEASURED] * 2
    assert f"of {samples.MEASURED} poems 9% are in a form" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        told_at(patch, 14)
        fastpoem.fit(**common, out=str(tmp_path / "run"))
    assert_same(whole.folder, fastpoem.fit(**common, out=str(tmp_path / "run"), resume=True).folder)
    assert "in_form" not in fastpoem.fit(**common, out=str(tmp_path / "none"), sample_every=0).metrics[-1]


@pytest.mark.parametrize("cuts", [(5,), (3, 14), (10, 21)])
def test_resumed_runs_have_the_same_poems(base, tmp_path, monkeypatch, cuts):
    common = settings(base, epochs=2, sample_every=5, save_every=4)
    whole = fastpoem.fit(**common, out=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        told_at(patch, *cuts)
        for number in range(len(cuts) + 1):
            run = fastpoem.fit(**common, out=str(tmp_path / "run"), resume=number > 0)
    assert_same(whole.folder, run.folder)
    assert poems(whole.folder) == poems(run.folder)


def test_a_signal_while_poems_are_written(base, tmp_path, monkeypatch):
    common = settings(base, epochs=2, sample_every=5)
    whole = fastpoem.fit(**common, out=str(tmp_path / "whole"))
    write = Writer.__call__

    def told(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(self)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "__call__", told)
        run = fastpoem.fit(**common, out=str(tmp_path / "run"))
    assert run.stopped_by == signal.SIGTERM and not poems(run.folder)
    fastpoem.fit(**common, out=str(run.folder), resume=True)
    assert_same(whole.folder, run.folder)
    assert poems(whole.folder) == poems(run.folder)


def test_a_longer_run_forgets_the_poems_of_an_early_end(base, tmp_path):
    common = settings(base, epochs=2, sample_every=10)
    cut = fastpoem.fit(**common, out=str(tmp_path / "run"), max_steps=13)
    assert [row["step"] for row in poems(cut.folder)][::3] == [10, 13]
    (cut.folder / "samples.jsonl").open("a").write('{"step": 12, "prom')  # torn
    fastpoem.fit(**common, out=str(cut.folder), resume=True)
    assert poems(cut.folder) == poems(fastpoem.fit(**common, out=str(tmp_path / "whole")).folder)


def test_poems_that_cannot_be_written_do_not_end_a_run(base, tmp_path, monkeypatch, capsys):
    def fails(self):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Writer, "__call__", fails)
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=1, sample_every=5))
    assert run.stopped_by is None and not poems(run.folder)
    assert capsys.readouterr().out.count("no poems are written on the way: CUDA out of memory") == 1
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/samples.jsonl").mkdir()
    fastpoem.fit(**settings(base, out=str(tmp_path / "other"), epochs=1, sample_every=5))
    assert "samples.jsonl could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("steps, every, expected", [
    (14, None, [112, 210, 308]), (250, None, [250]), (14, 100, [100, 200, 300]), (14, 0, []),
])  # fmt: skip
def test_when_poems_are_written(steps, every, expected):
    assert [step for step in range(1, 310) if due(step, steps, every)] == expected


def on_a_terminal(columns, *arguments, cwd, **environment):
    """(exit code, everything that a command wrote to a terminal of so many columns)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        cwd=cwd, env={**ENVIRONMENT, **environment}, stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    said = b""
    while True:
        ready, _, _ = select.select([master], [], [], 120)
        try:
            got = os.read(master, 65536) if ready else b""
        except OSError:  # nobody has the other end any more
            got = b""
        if not got:
            break
        said += got
    os.close(master)
    return process.wait(), said.decode()


# Validation and the writing of checkpoints take long enough to be seen.
SLOWLY = """
import time
from fastpoem.run import checkpoint, validate
def late(inner):
    def waits(*given, **named):
        time.sleep(1)
        return inner(*given, **named)
    return waits
validate.evaluate, checkpoint.write = late(validate.evaluate), late(checkpoint.write)
from fastpoem.__main__ import main
main()
"""


def test_a_run_on_a_terminal(base, tmp_path):
    """The display is there to the end, says what is done when no step is, leaves nothing behind but the lines, and the cursor."""
    code, said = on_a_terminal(
        80, "train", "--data", str(base / "poems.txt"), "--model", str(base / "model"), "--from-scratch", "--device", "cpu", "--batch-size", "4",
        "--epochs", "2", "--out", "run", cwd=tmp_path, LANG="zh_CN.UTF-8", LC_ALL="",
    )  # fmt: skip
    assert code == 0, said
    assert "━" in said and "正在 3 首诗上验证" in said and "正在写入最后的检查点" in said
    assert "fastpoem generate --model run --prompt 春" in said and "训练好的模型在 run/model" in said
    shown, hidden = said.rfind("\x1b[?25h"), said.rfind("\x1b[?25l")
    assert shown > hidden
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said)
    assert all(cell_len(part) <= 80 for line in plain.splitlines() for part in line.split("\r") if "第 " in part)
