"""--recipe fast: what it sets, that a flag beside it wins, and that the run it makes is resumed like any other."""

import json
import math
import signal

import pytest

import fastpoem
from fastpoem.cli import parse
from fastpoem.config import EMBEDDED, RATE_BY_WIDTH, RECIPES, TrainConfig, from_kwargs, with_defaults
from tests.runs import assert_same, rows, settings
from tests.test_resume import told_at


def fast(base, out, **changes):
    """The settings that the recipe leaves open."""
    given = {name: value for name, value in settings(base).items() if name not in ("lr", "dropout")}
    return given | dict(recipe="fast", out=str(out), epochs=3) | changes


def read(argv):
    return parse(TrainConfig, argv, default=with_defaults(parse(TrainConfig, argv))).check()


def test_what_it_sets_and_that_a_flag_wins():
    config = read(["--recipe", "fast", "--data", "x"])
    assert (config.lr, config.schedule, config.warmup_steps, config.dropout) == (None, "cosine", None, 0.0)
    assert config == from_kwargs(recipe="fast", data="x")
    plain = from_kwargs(data="x")
    differ = {name for name, value in vars(config).items() if value != getattr(plain, name)}
    assert differ == {"recipe", *RECIPES["fast"]}  # batches, clipping, weight decay and all else as without it
    config = read(["--recipe", "fast", "--data", "x", "--lr", "3e-5", "--dropout", "0.1", "--schedule", "constant"])
    assert (config.lr, config.schedule, config.warmup_steps, config.dropout) == (3e-5, "constant", None, 0.1)
    assert read(["--lr", "None", "--data", "x"]).lr is None
    assert read(["--recipe", "notebook"]).warmup_steps == 0 != EMBEDDED["warmup_steps"]  # the notebook warms nothing up
    verses = read(["--recipe", "fast"])  # over what the bundled verses are trained with
    assert (verses.lr, verses.epochs, verses.sample) == (None, EMBEDDED["epochs"], EMBEDDED["sample"])


def test_the_rate_rises_to_that_of_the_width_and_falls_to_zero(base, tmp_path, capsys):
    run = fastpoem.fit(**fast(base, tmp_path / "run"))
    peak, last, warmup = RATE_BY_WIDTH / 16, 3 * 14, 2  # the model is 16 wide; a twentieth of the steps
    found = [row["lr"] for row in rows(run.folder) if "event" not in row]
    expected = [peak * (step + 1) / (warmup + 1) for step in range(warmup)]
    fall = last - warmup
    expected += [peak * (1 + math.cos(math.pi * step / fall)) / 2 for step in range(fall)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert max(found) == pytest.approx(peak) and found[-1] < peak / 50
    assert "peak learning rate 0.013 for a model 16 wide" in capsys.readouterr().out
    written = json.loads((run.folder / "config.json").read_text())
    assert written["settings"]["lr"] == peak and written["model"]["resid_pdrop"] == 0.0
    assert found != [
        row["lr"] for row in rows(fastpoem.fit(**fast(base, tmp_path / "given", lr=1e-3)).folder) if "lr" in row
    ]


@pytest.mark.parametrize("changes", [dict(), dict(vocab="corpus", batching="pack")], ids=repr)
def test_resumed_is_untouched(base, tmp_path, monkeypatch, changes):
    fastpoem.fit(**fast(base, tmp_path / "whole", **changes))
    with monkeypatch.context() as patch:
        told_at(patch, 31)
        assert fastpoem.fit(**fast(base, tmp_path / "run", **changes)).stopped_by == signal.SIGTERM
    fastpoem.fit(**fast(base, tmp_path / "run", resume=True, **changes))
    assert_same(tmp_path / "whole", tmp_path / "run")
