"""A run that was interrupted and resumed is the run that was not: every row, every weight, wherever it was cut."""

import itertools
import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import fastpoem
from fastpoem import disk, prepare
from fastpoem.config import RECIPES, from_kwargs
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.step import NOTED, Totals, TrainStep
from fastpoem.errors import InputError
from fastpoem.model.hub import BUNDLED
from fastpoem.run import checkpoint, saving
from fastpoem.run import fit as fit_module
from fastpoem.run import validate as validate_module
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from fastpoem.run.fit import fit as run_fit
from fastpoem.run.loop import Loop, check_state
from fastpoem.run.saving import Diverged, NotSaved
from fastpoem.run.trained import trained_model
from tests.runs import assert_same, assert_tidy, rows, settings, tiny_data, tiny_model


@pytest.fixture(scope="module")
def untouched(base):
    """The folder of an uninterrupted run under these changes, made once for each."""
    made = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = base / f"untouched-{len(made)}"
            fastpoem.fit(**settings(base, out=str(made[key]), **changes))
        return made[key]

    make()  # now, while no test has changed anything that it would be made with
    return make


def told_at(monkeypatch, *steps):
    """Have SIGTERM come in the middle of these steps."""
    one_step = Loop.one_step

    def step_and_signal(self):
        one_step(self)
        if self.done in steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "one_step", step_and_signal)


@pytest.mark.parametrize("save_every", [None, 5])
@pytest.mark.parametrize("cuts", [(1,), (9, 10), (14, 28), (17, 29, 41)])  # 14 steps an epoch
def test_stopped_and_resumed_is_untouched(base, untouched, tmp_path, monkeypatch, cuts, save_every):
    whole = untouched(save_every=save_every)
    with monkeypatch.context() as patch:
        told_at(patch, *cuts)
        for number in range(len(cuts) + 1):
            run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), resume=number > 0, save_every=save_every))
            assert run.stopped_by == (signal.SIGTERM if number < len(cuts) else None)
            assert rows(run.folder)[-1]["step"] == (42 if number == len(cuts) else cuts[number])
    assert_same(whole, run.folder)
    assert_tidy(run.folder)


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_went_on_is_not_the_model_it_once_left(base, tmp_path, monkeypatch, best):
    """RUN/model is of an earlier end; with --best it is of an earlier step as well, and the run's model as long as that is the best."""
    common = settings(base, out=str(tmp_path / "run"), save_every=5, lr=0.0, val_poems=3, best=best)
    run, heard = fastpoem.fit(**common | {"epochs": 2}), []
    model = run.folder / "model"
    assert fastpoem.Run(run.folder).model == model == run.model
    told_at(monkeypatch, 32)
    assert fastpoem.fit(**common, resume=True).stopped_by == signal.SIGTERM
    newest = run.folder / "checkpoints/step-00000032"
    copy = shutil.copytree(run.folder, tmp_path / "copy", copy_function=shutil.copyfile)  # with times of its own
    for folder in (run.folder, copy):
        assert fastpoem.Run(folder).model == (folder / "model" if best else folder / newest.relative_to(run.folder))
    assert trained_model(str(run.folder), heard.append) == str(model if best else newest)
    assert best or heard == [f"the model is {newest}: the run went on after {model} was written"]
    (newest / "state.json").write_text("")  # then the newest whole one is
    assert fastpoem.Run(run.folder).model == (model if best else newest.with_name("step-00000030"))
    shutil.rmtree(run.folder / "checkpoints")
    assert fastpoem.Run(run.folder).model == model
    monkeypatch.undo()
    fastpoem.fit(out=str(copy), resume=True)
    assert fastpoem.Run(copy).model == copy / "model"


def test_training_goes_on_from_the_model_of_a_run(base, untouched, tmp_path, monkeypatch, capsys):
    """Named by its folder, as generate takes it: RUN/model, or the newest checkpoint while there is none."""
    run = shutil.copytree(untouched(), tmp_path / "run")
    by_model = fastpoem.fit(
        **settings(base, out=str(tmp_path / "a"), model=str(run / "model"), from_scratch=False, max_steps=3)
    )
    capsys.readouterr()
    by_run = fastpoem.fit(**settings(base, out=str(tmp_path / "b"), model=str(run), from_scratch=False, max_steps=3))
    assert f"the model is {run / 'model'}" in capsys.readouterr().out
    assert rows(by_run.folder) == rows(by_model.folder)
    fastpoem.fit(out=str(by_run.folder), resume=True, max_steps=5)
    shutil.rmtree(run / "model")
    store = tmp_path / "store"
    prepare.main(["--data", str(base / "poems.txt"), "--model", str(run), "--out", str(store)])
    assert f"the model is {run / 'checkpoints'}" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="holds no model and no whole checkpoint yet"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "c"), model=str(run)))


@pytest.mark.parametrize(
    "changes", [dict(batching="pack"), dict(batching="pad", shuffle=False), dict(recipe="notebook", epochs=2),
                dict(schedule="cosine", warmup_steps=9, log_every=4, keep=1), dict(precision="bf16")], ids=repr
)  # fmt: skip
def test_with_every_batching_and_schedule(base, untouched, tmp_path, monkeypatch, changes):
    whole = untouched(**changes)
    told_at(monkeypatch, 3, 14, 25)
    for number in range(4):
        run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), resume=number > 0, **changes))
    assert_same(whole, run.folder)


def test_a_signal_while_validating_saving_or_exporting(base, untouched, tmp_path, monkeypatch):
    whole = untouched()
    places = iter([(validate_module, "evaluate"), (checkpoint, "write"), (checkpoint, "_drop_old")])
    from fastpoem.run import fit as fit_module

    for number, (module, name) in enumerate([*places, (fit_module.hub, "write_folder")]):
        with monkeypatch.context() as patch:
            inner, calls = getattr(module, name), []

            def outer(*given, inner=inner, calls=calls):
                calls.append(given)
                if len(calls) == 1:  # a second signal would end the process
                    os.kill(os.getpid(), signal.SIGINT)
                return inner(*given)

            patch.setattr(module, name, outer)
            run = run_fit(from_kwargs(**settings(base, out=str(tmp_path / "run"), resume=number > 0)))
        assert run.stopped_by == signal.SIGINT
    assert run.model.is_dir()  # an export that has begun is finished
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), resume=True))
    assert_same(whole, tmp_path / "run")


def test_a_finished_run_has_nothing_left_to_do(base, untouched, tmp_path, capsys):
    for changes in (dict(), dict(max_steps=17, log_every=5)):
        out = tmp_path / str(len(changes))
        first = fastpoem.fit(**settings(base, out=str(out), **changes))
        before = (out / "metrics.jsonl").read_bytes()
        again = fastpoem.fit(**settings(base, out=str(out), resume=True, **changes))
        assert "nothing is left to do" in capsys.readouterr().out
        assert (out / "metrics.jsonl").read_bytes() == before and again.metrics == first.metrics


def test_a_finished_run_may_go_on(base, untouched, tmp_path, capsys):
    """Under a constant rate, to what a longer run would have been; under another, saying that the schedule is now another."""
    common = dict(schedule="constant", out=str(tmp_path / "run"))
    fastpoem.fit(**settings(base, **common | dict(epochs=1, max_steps=9, log_every=4)))
    fastpoem.fit(**settings(base, **common | dict(epochs=2, log_every=4, resume=True)))
    fastpoem.fit(**settings(base, **common | dict(epochs=3, log_every=4, resume=True)))
    assert_same(untouched(schedule="constant", log_every=4), tmp_path / "run")
    assert "learning rate falls" not in capsys.readouterr().out
    common = dict(schedule="epoch-cosine", out=str(tmp_path / "cosine"))
    fastpoem.fit(**settings(base, **common | dict(epochs=1)))
    run = fastpoem.fit(**settings(base, **common | dict(epochs=2, resume=True)))
    assert "falls over 2 epochs from here on, where it fell over 1 epochs" in capsys.readouterr().out
    assert run.metrics[-1]["step"] == 28


def test_nothing_to_resume_is_a_fresh_start(base, untouched, tmp_path, capsys):
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), resume=True))
    assert "starting from the beginning" in capsys.readouterr().out
    assert_same(untouched(), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(batch_size=5), "batch_size was 4, is 5"),
        (dict(seed=1), "seed was 0, is 1"),
        (dict(lr=0.5), "lr was 0.01, is 0.5"),
        (dict(dropout=0.0), "attn_pdrop was 0.2, is 0.0"),
        (dict(batching="pad"), ", is pad"),
        (dict(recipe="notebook"), "recipe was default, is notebook"),
        (dict(val_poems=1), "val_poems was None, is 1"),
        (dict(vocab="corpus"), "vocab was all, is corpus"),
        (dict(max_length=20), "max_length was 64, is 20"),
        (dict(buckets=1), "buckets was"),
        (dict(data="{}/other.txt"), "poems was 60 of poems.txt"),
        (dict(model="{}/wider"), "n_embd was 16, is 32"),
        (dict(model="{}/speaks"), "tokenizer was"),
    ],
    ids=repr,
)  # fmt: skip
def test_another_run_is_refused_by_the_difference(base, untouched, tmp_path, changes, says):
    out = untouched()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    tiny_data(tmp_path / "other.txt", BUNDLED / "poems.txt", poems=61)
    for name in ("wider", "speaks"):
        tiny_model(tmp_path / name, base / "model")
    config = json.loads((tmp_path / "wider/config.json").read_text())
    (tmp_path / "wider/config.json").write_text(json.dumps(config | {"n_embd": 32}))
    words = (base / "model/vocab.txt").read_text().splitlines()
    (tmp_path / "speaks/vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    changes = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(InputError, match="cannot be resumed") as refusal:
        fastpoem.fit(**settings(base, out=str(out), resume=True) | changes)
    assert says in str(refusal.value)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_what_may_change_on_resume(base, untouched, tmp_path, monkeypatch):
    """How it is logged and kept, and where things lie. The weights do not depend on it."""
    told_at(monkeypatch, 17)
    fastpoem.fit(**settings(base, out=str(tmp_path / "run")))
    data = tiny_data(tmp_path / "moved.txt", BUNDLED / "poems.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere/run")
    run = fastpoem.fit(
        **settings(base, out=str(tmp_path / "elsewhere/run"), resume=True)
        | dict(log_every=7, save_every=3, keep=5, data=str(data), cache_dir=str(tmp_path / "cache"), compile="off")
    )
    assert (run.model / "model.safetensors").read_bytes() == (untouched() / "model/model.safetensors").read_bytes()
    assert len(list((run.folder / "checkpoints").iterdir())) in (5, 6)  # the best may be one more


def test_a_recipe_may_be_spelled_out_on_resume(base, tmp_path):
    out = str(tmp_path / "run")
    fastpoem.fit(**settings(base, out=out, recipe="notebook", max_steps=3))
    run = fastpoem.fit(**settings(base, out=out, **RECIPES["notebook"], max_steps=5, resume=True))
    assert [row["step"] for row in run.metrics if "event" not in row] == [1, 2, 3, 4, 5]
    with pytest.raises(InputError, match="batching was pad, is bucket"):
        fastpoem.fit(**settings(base, out=out, max_steps=6, batching="bucket", resume=True))


def test_resuming_needs_no_weights_of_the_first_model(base, tmp_path, monkeypatch):
    """They are in the checkpoint."""
    model = fastpoem.fit(**settings(base, out=str(tmp_path / "first"), max_steps=1)).model
    told_at(monkeypatch, 5)
    common = settings(base, out=str(tmp_path / "run"), from_scratch=False, max_steps=8) | dict(model=str(model))
    fastpoem.fit(**common)
    (model / "model.safetensors").unlink()
    assert fastpoem.fit(**common, resume=True).metrics[-1]["step"] == 8


def test_resuming_at_step_a_million_is_as_fast_as_at_step_one(base, tmp_path):
    """No batch is replayed: the order of a late step is asked for directly, and costs what that of the first costs."""
    took = {}
    for name, done in (("one", 1), ("million", 1_000_000)):
        out = tmp_path / name
        with assembled(
            fastpoem.config.from_kwargs(**settings(base, out=str(out), epochs=100_000)), Voice(quiet=True)
        ) as (
            loop,
            _,
        ):
            loop.done = done
            loop.save()
            loop.saver.wait()
        config = fastpoem.config.from_kwargs(**settings(base, out=str(out), epochs=100_000, resume=True))
        begin = time.process_time()  # busy cores would count on the clock
        with assembled(config, Voice(quiet=True)) as (loop, _):
            loop.one_step()
            took[name] = time.process_time() - begin
            assert loop.done == done + 1
    assert took["million"] < 3 * took["one"] + 0.5


class TestMetricsFile:
    """metrics.jsonl after a resume: no torn line, no step twice, and what was lost is said."""

    @pytest.fixture
    def cut(self, base, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            told_at(patch, 17)
            fastpoem.fit(**settings(base, out=str(tmp_path / "run")))
        return tmp_path / "run"

    def resume(self, base, cut):
        fastpoem.fit(**settings(base, out=str(cut), resume=True))

    @pytest.mark.parametrize(
        "tail", [b'{"step": 18, "los', b'{"step": 18}\n{"step": 19}\n', b"\0" * 4096, b'{"step": 17}\n'], ids=repr
    )
    def test_what_came_after_the_checkpoint_is_cut_off(self, base, untouched, cut, tail):
        with (cut / "metrics.jsonl").open("ab") as stream:
            stream.write(tail)
        self.resume(base, cut)
        assert_same(untouched(), cut)

    @pytest.mark.parametrize("damage", ["gone", "torn", "edited", "doubled", "zeros"])
    def test_what_is_lost_of_it_is_said(self, base, untouched, cut, capsys, damage):
        file = cut / "metrics.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        whole, kept = rows(untouched()), 18  # 17 steps and an epoch
        if damage == "gone":
            file.unlink()
            kept = 0
        elif damage == "torn":
            file.write_bytes(b"".join(lines[:9]) + lines[9][:20])
            kept = 9
        elif damage == "edited":
            file.write_bytes(b"".join(lines).replace(b'"step": 3,', b'"step": 3 ,'))
        elif damage == "doubled":
            file.write_bytes(b"".join(lines[:9] + lines[5:]))
            kept = 9
        else:
            file.write_bytes(b"".join(lines[:6]) + b"\0" * 100)
            kept = 6
        self.resume(base, cut)
        said = capsys.readouterr().out
        assert f"not as it was when the checkpoint was written: {kept} rows" in said
        assert rows(cut) == whole[:kept] + whole[18:]
        assert (cut / "model/model.safetensors").read_bytes() == (untouched() / "model/model.safetensors").read_bytes()


class TestCheckpoints:
    @pytest.fixture
    def run(self, base, tmp_path):
        out = tmp_path / "run"
        fastpoem.fit(**settings(base, out=str(out), save_every=5, max_steps=20, schedule="constant", keep=2))
        return out

    def test_newest_and_best_are_kept(self, base, tmp_path, monkeypatch):
        losses = iter([5.0, 4.0, 4.5, 6.0, 5.5, 7.0])
        monkeypatch.setattr(validate_module, "evaluate", lambda *given: Totals(next(losses), 1, 0, 1, 0))
        run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=6, keep=2))
        kept = sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").iterdir())
        assert kept == [2 * 14, 5 * 14, 6 * 14]

    def test_a_checkpoint_is_a_model_folder(self, run):
        from transformers import BertTokenizer, GPT2LMHeadModel

        newest = max((run / "checkpoints").iterdir())
        model = GPT2LMHeadModel.from_pretrained(newest)
        assert len(BertTokenizer.from_pretrained(newest)) == model.config.vocab_size
        exported = GPT2LMHeadModel.from_pretrained(run / "model").state_dict()
        assert all(torch.equal(value, exported[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("file", ["state.json", "model.safetensors", "optimizer.safetensors", "vocab.txt"])
    @pytest.mark.parametrize("damage", ["flip", "cut", "gone", "link"])
    def test_a_damaged_one_is_passed_over_and_said(self, base, untouched, run, tmp_path, capsys, file, damage):
        path = run / "checkpoints/step-00000020" / file
        content = bytearray(path.read_bytes())
        path.unlink()
        if damage == "flip":
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
        elif damage == "cut":
            path.write_bytes(content[:-1])
        elif damage == "link":
            (tmp_path / "foreign").write_bytes(content)
            path.symlink_to(tmp_path / "foreign")
        if file == "state.json" and damage == "link":
            return  # a link to the very same description changes nothing
        fastpoem.fit(**settings(base, out=str(run), schedule="constant", resume=True))
        said = capsys.readouterr().out
        assert "checkpoint step-00000020 is passed over: " + ("" if damage == "gone" else file) in said
        assert "step 15 of 42 is done" in said
        assert_same(untouched(schedule="constant"), run)

    def test_where_none_is_whole_nothing_is_begun(self, base, run):
        for path in (run / "checkpoints").iterdir():
            (path / "optimizer.safetensors").write_bytes(b"")
        before = (run / "metrics.jsonl").read_bytes()
        with pytest.raises(InputError, match="none of its 3 checkpoints is whole"):
            fastpoem.fit(**settings(base, out=str(run), schedule="constant", resume=True))
        assert (run / "metrics.jsonl").read_bytes() == before


def logits_of_nan(monkeypatch, steps):
    """Have the model's output be NaN at these steps."""
    one_step = Loop.one_step

    def poisoned(self):
        pieces = self.step.pieces
        if self.done + 1 in steps:
            self.step.pieces = pieces._replace(
                model=lambda *given, **masks: pieces.model(*given, **masks) * float("nan")
            )
        try:
            one_step(self)
        finally:
            self.step.pieces = pieces

    monkeypatch.setattr(Loop, "one_step", poisoned)


def test_a_step_that_is_not_finite_changes_nothing_and_is_told(base, tmp_path, monkeypatch, capsys):
    logits_of_nan(monkeypatch, {6, 7, 12})
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=1, log_every=5, save_every=1, keep=99))
    told = {row["step"]: row.get("skipped") for row in run.metrics if "event" not in row}
    assert told == {1: None, 5: None, 10: 2, 14: 1}
    assert run.metrics[-1]["skipped"] == 3
    assert "skipped 2 (loss or gradient not finite)" in capsys.readouterr().out

    def weights(step):
        return (run.folder / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()

    assert weights(5) == weights(6) == weights(7) != weights(8)
    assert weights(11) == weights(12) != weights(13)


def test_skipped_steps_and_windows_survive_a_resume(base, tmp_path, monkeypatch):
    logits_of_nan(monkeypatch, {6, 7, 12, 27})
    common = settings(base, log_every=10)
    whole = fastpoem.fit(**common, out=str(tmp_path / "whole"))
    told_at(monkeypatch, 7, 26)
    for number in range(3):
        fastpoem.fit(**common, out=str(tmp_path / "cut"), resume=number > 0)
    assert_same(whole.folder, tmp_path / "cut")


def test_five_in_a_row_end_the_run_with_the_last_good_checkpoint(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        logits_of_nan(patch, set(range(9, 99)))
        with pytest.raises(Diverged, match=r"step 13: .* 5 times in a row; .*/checkpoints/step-00000013"):
            fastpoem.fit(**settings(base, out=str(tmp_path / "run"), save_every=8))
    saved = {path.name: (path / "model.safetensors").read_bytes() for path in (tmp_path / "run/checkpoints").iterdir()}
    assert saved["step-00000008"] == saved["step-00000013"]
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), save_every=8, resume=True))
    assert run.metrics[-1]["step"] == 42 and np.isfinite(run.metrics[-1]["mean_loss"])


def test_weights_that_are_not_finite_are_never_a_checkpoint(base, tmp_path, monkeypatch, capsys):
    one_step = Loop.one_step

    def broken(self):
        one_step(self)
        if self.done == 9:
            self.step.optimizer.master[3] = float("inf")

    monkeypatch.setattr(Loop, "one_step", broken)
    with pytest.raises(Diverged, match=r"last good checkpoint is .*/step-00000008"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), save_every=4))
    assert "step 12 could not be written" in capsys.readouterr().out


def test_a_run_that_ends_with_weights_that_are_not_finite_has_diverged(base, tmp_path, monkeypatch):
    one_step = Loop.one_step

    def broken(self):
        one_step(self)
        if self.done == 14:
            self.step.optimizer.master[3] = float("nan")

    monkeypatch.setattr(Loop, "one_step", broken)
    with pytest.raises(Diverged, match=r"step 14 could not be written: .* NaN .*newest checkpoint is .*/step-00000010"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), save_every=5, epochs=1))
    assert not (tmp_path / "run/model").exists()


def test_a_spike_is_reported_and_not_acted_on(base, untouched, tmp_path, monkeypatch, capsys):
    losses = torch.full((40,), 3.0) + torch.linspace(0, 0.1, 40)
    losses[34] = 9.0
    fed = itertools.count()
    one_step = TrainStep.parts

    def fake(self, *given):
        one_step(self, *given)
        self.account.losses[-1] = losses[next(fed) % 40]

    monkeypatch.setattr(TrainStep, "parts", fake)
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), log_every=10))
    assert "step 35: loss 9.0000 is" in capsys.readouterr().out
    found = [row for row in run.metrics if "spike_step" in row]
    assert [(row["step"], row["spike_step"]) for row in found] == [(40, 35)] and found[0]["spike_z"] > 100
    assert (run.model / "model.safetensors").read_bytes() == (untouched() / "model/model.safetensors").read_bytes()
    fed = itertools.count()
    told_at(monkeypatch, 36)
    for number in range(2):
        cut = fastpoem.fit(**settings(base, out=str(tmp_path / "cut"), log_every=10, resume=number > 0))
    assert_same(run.folder, cut.folder)


def test_losses_are_watched_where_they_are_read_seldom():
    from fastpoem.run.watch import Watch

    noted = torch.zeros(64)
    often, seldom = Watch(noted), Watch(noted)
    losses = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 5
    losses[[77, 200, 333]] = torch.tensor([50.0, 60.0, float("nan")])
    spikes = ([], [])
    for step, loss in enumerate(losses, 1):
        noted.copy_(torch.cat([noted[1:], loss[None]]))
        for watch, found in zip((often, seldom), spikes, strict=True):
            watch.count += 1
            if watch is often or watch.is_full:
                found += watch.look(step)
    assert spikes[0] == spikes[1] and [spike.step for spike in spikes[0]] == [78, 201]
    assert seldom.count == 400 % 64  # the last of them are still unread


def test_what_was_passed_over_does_not_push_out_what_comes_after(base, tmp_path):
    """A damaged newest checkpoint, `--keep 1`: the run goes on from the one before, and what it writes then stays."""
    run = tmp_path / "run"
    fastpoem.fit(**settings(base, out=str(run), save_every=5, max_steps=20, keep=4))
    newest = max((run / "checkpoints").iterdir())
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    fastpoem.fit(**settings(base, out=str(run), save_every=1, max_steps=17, keep=1, resume=True))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names[-1] == "step-00000017" and newest.name not in names


def test_a_folder_that_is_no_run_is_left_alone(base, tmp_path):
    shutil.copytree(base / "model", tmp_path / "model")
    before = (tmp_path / "model/config.json").read_bytes()
    for out in (tmp_path / "model", tmp_path):
        with pytest.raises(InputError, match="no run, and would be written over"):
            fastpoem.fit(**settings(base, out=str(out)))
    assert (tmp_path / "model/config.json").read_bytes() == before and not (tmp_path / ".lock").exists()


def test_a_lock_that_is_a_link_is_refused(base, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run")))
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("changes, says", [(dict(max_length=20), "prepared with 64"), (dict(convert="t2s"), "prepared without it"),
                                           (dict(sample="春" * 70), "--sample")], ids=repr)  # fmt: skip
def test_settings_that_a_ready_store_cannot_follow_are_refused(base, tmp_path, changes, says):
    prepare_store(base / "poems.txt", PoemTokenizer.load(base / "model"), tmp_path / "store", max_length=64)
    with pytest.raises(InputError, match=says):
        run_fit(from_kwargs(**settings(base, data=str(tmp_path / "store"), out=str(tmp_path / "run"), **changes)))
    assert not (tmp_path / "run").exists()


def test_what_a_cut_runs_last_row_told_is_told_again_when_it_goes_on(base, untouched, tmp_path, monkeypatch, capsys):
    """The row of a step that only --max-steps had logged goes; the skipped steps and the spike in it do not."""
    one_step = TrainStep.parts

    def spiking(self, *given):
        one_step(self, *given)
        count.append(0)
        if len(count) == 36:
            self.account.losses[-1] = 99.0

    monkeypatch.setattr(TrainStep, "parts", spiking)
    logits_of_nan(monkeypatch, {32, 34})
    common = settings(base, log_every=10, schedule="constant")
    count: list[int] = []
    whole = fastpoem.fit(**common, out=str(tmp_path / "whole"))
    count.clear()
    cut = fastpoem.fit(**common, out=str(tmp_path / "cut"), max_steps=36)
    row = next(row for row in cut.metrics if row["step"] == 36)
    assert row["skipped"] == 2 and row["spike_step"] == 36
    fastpoem.fit(**common, out=str(tmp_path / "cut"), resume=True)
    assert_same(whole.folder, tmp_path / "cut")


def test_a_run_that_is_past_what_is_asked_for_says_so(base, tmp_path, capsys):
    out = tmp_path / "run"
    first = fastpoem.fit(**settings(base, out=str(out), epochs=2))
    again = fastpoem.fit(**settings(base, out=str(out), epochs=2, max_steps=5, resume=True))
    said = capsys.readouterr().out
    assert "step 28 (past the 5 asked for) is done: nothing is left to do" in said and "falls over" not in said
    assert again.metrics == first.metrics


def test_checkpoints_that_vanish_while_a_command_begins(base, tmp_path, monkeypatch):
    """A model without its weights is never trained on."""
    source = fastpoem.fit(**settings(base, out=str(tmp_path / "source"), max_steps=1)).model
    common = settings(base, out=str(tmp_path / "run"), max_steps=3) | dict(model=str(source), from_scratch=False)
    fastpoem.fit(**common)
    resume = fit_module._resume

    def late(*given):
        shutil.rmtree(tmp_path / "run/checkpoints")
        return resume(*given)

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_resume", late)
        with pytest.raises(InputError, match="its checkpoints vanished while this command began"):
            fastpoem.fit(**common, resume=True)
    before = rows(fastpoem.fit(**common | dict(out=str(tmp_path / "fresh"))).folder)
    assert rows(fastpoem.fit(**common, resume=True).folder) == before  # now it begins, with the model's weights


def test_the_newest_checkpoint_that_is_named_is_whole(base, tmp_path, monkeypatch):
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), save_every=4, max_steps=8))
    newest = tmp_path / "run/checkpoints/step-00000008/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    monkeypatch.setattr(checkpoint, "write", lambda *given: (_ for _ in ()).throw(OSError(28, "full")))
    monkeypatch.setattr(saving, "PATIENCE", 0)
    with pytest.raises(NotSaved, match=r"the newest checkpoint is .*/step-00000004: make room"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=10, resume=True))


def test_rows_are_on_the_disk_before_the_checkpoint_that_names_them(base, tmp_path, monkeypatch):
    order = []
    flush, write = disk.flush, checkpoint.write
    monkeypatch.setattr(disk, "flush", lambda path: (order.append(path.name), flush(path)))
    monkeypatch.setattr(checkpoint, "write", lambda *given: (order.append("write"), write(*given)))
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))
    assert order[order.index("write") - 1] == "metrics.jsonl"


def test_a_disk_that_is_full_at_the_very_start(base, tmp_path, monkeypatch):
    """The command may simply be given again."""
    from fastpoem.run import folder

    with monkeypatch.context() as patch:

        def full(*given):
            raise OSError(28, "No space left on device")

        patch.setattr(folder.disk, "write_bytes", full)
        with pytest.raises(
            InputError, match=r"cannot be written \(No space left on device\); mend its permissions, make room"
        ):
            fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))
    assert_tidy(run.folder)
    with pytest.raises(InputError, match="holds a run already"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))


def test_tensorboards_disk_is_full(base, untouched, tmp_path, monkeypatch, capsys):
    """The curves end, training does not."""
    from torch.utils.tensorboard import SummaryWriter

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), tensorboard=True))
    assert capsys.readouterr().out.count("TensorBoard's curves end here, they could not be written: [Errno 28]") == 1
    assert rows(run.folder) == rows(untouched())


@pytest.mark.parametrize(
    "watch",
    [dict(count=NOTED), dict(count=-1), dict(window=[1.0] * 101), dict(window=[math.nan])],
    ids=repr,
)
def test_a_watch_that_nobody_wrote_is_damage(base, tmp_path, watch):
    with assembled(from_kwargs(**settings(base, out=str(tmp_path / "run"))), Voice(quiet=True)) as (loop, _):
        state = json.loads(json.dumps(loop.state()))
    check_state(state)
    with pytest.raises(checkpoint.Damaged):
        check_state(state | {"watch": state["watch"] | watch})


def test_a_poem_at_the_end_from_python_too(base, tmp_path, capsys):
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1, sample="春"))
    assert capsys.readouterr().out.splitlines()[-1].startswith("春")


def test_memory_that_is_not_there_is_refused_before_it_is_taken(base, tmp_path, monkeypatch):
    """Weights, gradient, two moments and three copies for the checkpoint: 28 bytes a parameter."""
    parameters = fit_module.hub.count_parameters(fit_module.hub.read_config(base / "model")[0])
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 28 * parameters - 1}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    with pytest.raises(InputError, match="GiB to train, this machine has"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))
    memory["SC_PHYS_PAGES"] += 1
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))
