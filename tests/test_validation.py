"""What is validated on is never trained on, and what the validation loss decides: the best checkpoint, and when to stop."""

import json
import os
import re
import shutil
import signal
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fastpoem
from fastpoem.config import from_kwargs
from fastpoem.corpus.copies import copies_of, how_many_in, repeats
from fastpoem.corpus.hold_out import hold_out, one_of_each
from fastpoem.corpus.plan import held_out_rows
from fastpoem.corpus.store import Bucket, TokenStore
from fastpoem.engine.step import Totals
from fastpoem.errors import InputError
from fastpoem.model.hub import BUNDLED
from fastpoem.run import console as console_module
from fastpoem.run import fit as fit_module
from fastpoem.run import saving
from fastpoem.run import validate as validate_module
from fastpoem.run.console import Voice, step_line
from fastpoem.run.fit import assembled
from fastpoem.run.loop import Loop
from tests.runs import assert_same, rows, settings


def store_of(poems, edges=(4, 6, 9), pad=0) -> TokenStore:
    """A store in memory: poems as lists of ids."""
    which = np.searchsorted(edges, [len(poem) for poem in poems]).astype(np.uint8)
    buckets = []
    for number, edge in enumerate(edges):
        mine = [poem for poem, bucket in zip(poems, which, strict=True) if bucket == number]
        tokens = np.full((len(mine), edge), pad, np.uint16)
        for row, poem in zip(tokens, mine, strict=True):
            row[: len(poem)] = poem
        buckets.append(Bucket(edge, len(mine), tokens, np.array([len(poem) for poem in mine], np.uint16)))
    tokenizer = {"fingerprint": "", "vocab_size": 99, "pad": pad}
    manifest = {"counts": {"rows": len(poems)}, "max_length": 9, "tokenizer": tokenizer, "dtype": "<u2"}
    names = ("version", "buckets", "files")
    return TokenStore(None, manifest | dict.fromkeys(names), tuple(buckets), which)


poems_with_copies = st.lists(
    st.lists(st.integers(0, 5), min_size=2, max_size=9), min_size=1, max_size=60
).flatmap(lambda some: st.lists(st.sampled_from(some), min_size=1, max_size=400))  # fmt: skip


@hypothesis_settings(deadline=None, max_examples=40)
@given(poems=poems_with_copies, pad=st.integers(0, 5))
def test_copies_are_the_rows_with_the_same_ids(poems, pad):
    store = store_of(poems, pad=pad)
    for row, found in enumerate(copies_of(store, np.arange(len(poems)))):
        assert found.tolist() == [other for other, poem in enumerate(poems) if poem == poems[row]]
    again = [row for row, poem in enumerate(poems) if poem in poems[:row]]
    assert repeats(store).tolist() == again
    assert one_of_each(store).tolist() == sorted({*range(len(poems))} - {*again})
    half = poems[: len(poems) // 2] or poems
    other = store_of(half, edges=(3, 9), pad=pad)  # the same poems in other buckets
    assert how_many_in(other, store, np.arange(len(poems))) == sum(poem in half for poem in poems)


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    poems=poems_with_copies,
    count=st.one_of(st.none(), st.integers(0, 30)),
    seed=st.integers(0, 99),
    dedup=st.booleans(),
)
def test_held_out_poems_are_never_trained_on(poems, count, seed, dedup):
    held = hold_out(store_of(poems), count, seed, dedup=dedup)
    validated = [tuple(poems[row]) for row in held.validation]
    trained = [tuple(poem) for row, poem in enumerate(poems) if row not in {*held.left_out.tolist()}]
    assert len(validated) == len({*validated}) and not {*validated} & {*trained}
    assert len(held.validation) <= (512 if count is None else count)
    assert len(held.left_out) == len(validated) + held.copies + held.repeats
    distinct = len({*map(tuple, poems)})
    assert held.copies + len(validated) <= (distinct if dedup else len(poems)) // 20
    if dedup:
        assert held.copies == 0 and len(trained) == len({*trained}) == distinct - len(validated)
    else:
        assert held.repeats == 0
    assert hold_out(store_of(poems), count, seed, dedup=dedup).left_out.tolist() == held.left_out.tolist()


@hypothesis_settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 300), seed=st.integers(0, 99), dedup=st.booleans())
def test_without_copies_it_is_what_was_drawn(size, seed, dedup):
    poems = [[1, 2 + number // 90, 2 + number % 90] for number in range(size)]
    held = hold_out(store_of(poems), None, seed, dedup=dedup)
    assert held.validation.tolist() == held.left_out.tolist() == held_out_rows(size, None, seed).tolist()


def test_a_text_of_few_poems_many_times_holds_some_out_where_it_can():
    assert (
        len(hold_out(store_of([[1, 2 + n // 10 % 90, n // 10 // 90] for n in range(2000)]), None, 0).validation) == 10
    )
    none = hold_out(store_of([[1, n % 3] for n in range(200)]), None, 0)
    assert not len(none.validation) and not len(none.left_out)


def trained_on(config) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(poems of the first epoch's steps, poems validated on)."""
    with assembled(from_kwargs(**config), Voice(quiet=True)) as (loop, _):
        store, seen = loop.feed.store, []
        for number in range(loop.order.steps):
            step = loop.order(0, number)
            for bucket, row in zip(step.bucket.tolist(), step.index.tolist(), strict=True):
                length = store.buckets[bucket].lengths[row]
                seen.append(tuple(store.buckets[bucket].tokens[row, :length].tolist()))
        return seen, [tuple(loop.validation.store[row].tolist()) for row in loop.validation.rows]


@pytest.mark.parametrize("changes", [dict(), dict(batching="pad"), dict(shuffle=False), dict(dedup=True)], ids=repr)
def test_a_text_that_repeats_itself(base, tmp_path, capsys, changes):
    lines = (base / "poems.txt").read_text().splitlines()
    (tmp_path / "poems.txt").write_text("\n".join([*lines, *lines[:30], *lines[:3]]))
    seen, validated = trained_on(settings(base, out=str(tmp_path / "run"), data=str(tmp_path / "poems.txt"), **changes))
    assert validated and not {*seen} & {*validated}
    if "dedup" in changes:
        assert len({*seen}) == len(seen)
    fastpoem.fit(**settings(base, out=str(tmp_path / "say"), data=str(tmp_path / "poems.txt"), max_steps=1, **changes))
    said = capsys.readouterr().out
    assert (
        "copies of other poems, not trained on: 33" if "dedup" in changes else "copies of other poems: 33 (--dedup"
    ) in said
    assert f"held out for validation: {len(validated)} poems" in said


class TestOnesOwn:
    @pytest.fixture
    def own(self, base, tmp_path):
        """Some verses that are not trained on, and two that are; one of them twice."""
        others = (BUNDLED / "poems.txt").read_text().splitlines()[1::7][:12]
        lines = [*others, *(base / "poems.txt").read_text().splitlines()[:2]]
        (tmp_path / "own.txt").write_text("\n".join([*lines, lines[0]]))
        return tmp_path / "own.txt"

    def test_it_is_measured_on_each_of_them_once(self, base, tmp_path, own, capsys):
        still = dict(lr=0.0, dropout=0.0, epochs=1, device="cpu")
        alone = settings(base, out=str(tmp_path / "alone"), batch_size=1, val_poems=0, dedup=True) | still
        (*_, expected) = fastpoem.fit(**alone | dict(data=str(own))).metrics
        assert expected["step"] == 14
        capsys.readouterr()
        for name, changes in (("all", {}), ("few", dict(vocab="corpus"))):
            run = fastpoem.fit(**settings(base, out=str(tmp_path / name), val_data=str(own), **changes) | still)
            if not changes:
                assert run.metrics[-1]["val_loss"] == pytest.approx(expected["mean_loss"], rel=1e-4)
                assert run.metrics[-1]["val_accuracy"] == pytest.approx(expected["mean_accuracy"], rel=1e-4)
                assert run.metrics[-1]["step"] == 15  # nothing is held out: 60 poems in steps of four
            assert np.isfinite(run.metrics[-1]["val_loss"])
            said = capsys.readouterr().out
            assert f"validation on 14 poems of {own}" in said and "of these, 2 are in the training text too" in said
            assert "--lr 0: nothing will be learned" in said

    def test_its_ids_are_kept(self, base, tmp_path, own):
        with assembled(
            from_kwargs(**settings(base, out=str(tmp_path / "run"), val_data=str(own), vocab="corpus")), Voice(True)
        ) as (loop, _):
            ids = {*loop.narrowed.ids.tolist()}
            assert {one for row in range(15) for one in loop.validation.store[row].tolist()} <= ids

    def test_on_resume_it_is_the_same_or_the_difference_is_named(self, base, tmp_path, own):
        common = settings(base, out=str(tmp_path / "run"), max_steps=3)
        fastpoem.fit(**common, val_data=str(own))
        moved = own.rename(tmp_path / "moved.txt")
        assert fastpoem.fit(**common | dict(max_steps=4), val_data=str(moved), resume=True).metrics[-1]["step"] == 4
        moved.write_text(moved.read_text() + "\n春眠不觉晓")
        with pytest.raises(InputError, match=r"val_data was 15 poems \(\w+\), is 16 poems"):
            fastpoem.fit(**common, val_data=str(moved), resume=True)
        with pytest.raises(InputError, match=r"val_data was 15 poems \(\w+\), is None"):
            fastpoem.fit(**common, val_data=None, resume=True)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(best=True, val_poems=0), "^best=True: it goes by the validation loss"),
        (dict(patience=2, recipe="notebook"), "^patience: it goes by the validation loss"),
        (dict(val_data="{}/poems.txt", val_poems=3), "^val_poems: val_data says"),
        (dict(val_data="{}/none.txt"), "none.txt"),
    ],
    ids=repr,
)
def test_what_cannot_be_measured_is_refused_by_name(base, tmp_path, changes, says):
    changes = {name: value.format(base) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(InputError, match=says):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def losses_of(monkeypatch, *losses):
    """Have the validation after each of the epochs, of 14 steps, find these."""
    real = Loop._end_epoch

    def end_epoch(self):
        loss = losses[min(-(-self.done // self.order.steps), len(losses)) - 1]
        monkeypatch.setattr(validate_module, "evaluate", lambda *given: Totals(loss, 1, 0, 1, 0))
        return real(self)

    monkeypatch.setattr(Loop, "_end_epoch", end_epoch)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


class TestBest:
    @pytest.mark.parametrize("resumed", [False, True])
    def test_it_is_named_and_left_in_the_model(self, base, tmp_path, monkeypatch, capsys, resumed):
        losses_of(monkeypatch, 5.0, 4.0, 4.0, 6.0)
        out = tmp_path / "run"
        common = settings(base, out=str(out), epochs=4, keep=1)
        fastpoem.fit(**common, best=not resumed, max_steps=60 if not resumed else 31)
        if resumed:  # cut short, then ended without --best, then asked for it
            fastpoem.fit(**common, resume=True)
            path = out / "checkpoints/step-00000028"
            said = capsys.readouterr().out
            assert (
                "lowest validation loss was 4.0000, after step 28 (6.0000 at the end); the model is of the last" in said
            )
            assert f"python -m fastpoem.generate --model {path} --prompt" in said
            assert weights(out / "model") == weights(out / "checkpoints/step-00000056") != weights(path)
            fastpoem.fit(**common, best=True, resume=True)
        assert "after step 28 (6.0000 at the end): the model is of that step" in capsys.readouterr().out
        best = load_file(out / "checkpoints/step-00000028/model.safetensors")
        model = load_file(out / "model/model.safetensors")
        assert best.keys() == model.keys() and all((best[name] == model[name]).all() for name in best)

    @pytest.mark.parametrize("damage", ["flip", "gone"])
    def test_where_it_is_damaged_the_last_is_taken_and_that_is_said(self, base, tmp_path, monkeypatch, capsys, damage):
        losses_of(monkeypatch, 4.0, 5.0)
        common = settings(base, out=str(tmp_path / "run"), epochs=2)
        fastpoem.fit(**common)
        file = tmp_path / "run/checkpoints/step-00000014/model.safetensors"
        if damage == "flip":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        else:
            for path in file.parent.iterdir():
                path.unlink()
            file.parent.rmdir()
        fastpoem.fit(**common, best=True, resume=True)
        said = capsys.readouterr().out
        assert f"{file.parent} cannot be used" in said and "the model is of the last step" in said
        assert weights(tmp_path / "run/model") == weights(tmp_path / "run/checkpoints/step-00000028")

    def test_where_the_last_is_the_best_nothing_is_said(self, base, tmp_path, monkeypatch, capsys):
        losses_of(monkeypatch, 4.0, 3.0)
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=2, best=True, max_steps=20))
        assert "lowest validation loss" not in capsys.readouterr().out

    @pytest.mark.parametrize("losses, end", [((5.0, 4.0, 4.0, 6.0), 56), ((3.0, float("nan"), 4.0, 1.0), 42)])
    def test_patience_ends_the_run_and_a_resumed_one_at_the_same_step(
        self, base, tmp_path, monkeypatch, capsys, losses, end
    ):
        losses_of(monkeypatch, *losses)
        common = settings(base, epochs=6, patience=2, schedule="constant")
        whole = fastpoem.fit(**common, out=str(tmp_path / "whole"))
        assert whole.metrics[-1]["step"] == end
        assert "stopped after 2 epochs without a lower validation loss" in capsys.readouterr().out
        for cut in (30, 42, 6 * 14):
            fastpoem.fit(**common, out=str(tmp_path / "cut"), max_steps=cut, resume=True)
        assert_same(whole.folder, tmp_path / "cut")
        before = rows(whole.folder)
        fastpoem.fit(**common, out=str(tmp_path / "whole"), resume=True)
        assert "nothing is left to do" in capsys.readouterr().out and rows(whole.folder) == before
        longer = fastpoem.fit(**common | dict(patience=3), out=str(tmp_path / "whole"), resume=True)
        assert longer.metrics[-1]["step"] > end


class TestByTheClock:
    def test_a_run_is_the_same_whenever_it_was_saved(self, base, tmp_path, monkeypatch):
        whole = fastpoem.fit(**settings(base, out=str(tmp_path / "whole"))).folder
        saved, save, one_step = [], Loop.save, Loop.one_step

        def noted(self, **how):
            saved.append((self.done, how.get("passing", False)))
            save(self, **how)
            self.saver.wait()  # or how many are written would depend on the disk

        def step(self):
            one_step(self)
            if self.done in (5, 20):
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Loop, "save", noted)
        monkeypatch.setattr(saving, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(Loop, "one_step", step)
        kept = []
        for number in range(3):
            fastpoem.fit(**settings(base, out=str(tmp_path / "run"), keep=2), resume=number > 0)
            kept.append(sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").iterdir()))
        assert [step for step, _ in saved if step not in (5, 20)] == [n for n in range(1, 43) if n not in (5, 20)]
        assert {step for step, passing in saved if not passing} == {14, 28, 42}
        assert kept[0] == [4, 5] and kept[1] == [14, 19, 20]
        assert {28, 42} <= {*kept[2]} <= {14, 28, 42}  # the best is one of these
        assert_same(whole, tmp_path / "run")

    def test_save_every_is_obeyed_and_ten_minutes_are_long(self, base, tmp_path, monkeypatch):
        names = lambda run: sorted(path.name for path in (run.folder / "checkpoints").iterdir())
        assert len(names(fastpoem.fit(**settings(base, out=str(tmp_path / "one"), epochs=1)))) == 1
        monkeypatch.setattr(saving, "SAVE_SECONDS", 0.0)
        run = fastpoem.fit(**settings(base, out=str(tmp_path / "two"), epochs=1, save_every=10))
        assert names(run) == ["step-00000010", "step-00000014"]


def test_a_mean_is_that_of_the_tokens_since_the_last_row(base, tmp_path):
    common = settings(base, epochs=2)
    each = {
        row["step"]: row for row in fastpoem.fit(**common, out=str(tmp_path / "each")).metrics if "event" not in row
    }
    seldom = fastpoem.fit(**common | dict(log_every=5), out=str(tmp_path / "seldom")).metrics
    before = 0
    for row in (row for row in seldom if "event" not in row):
        some = [each[step] for step in range(before + 1, row["step"] + 1)]
        loss = sum(one["loss"] * one["tokens"] for one in some) / sum(one["tokens"] for one in some)
        assert row["loss_mean"] == pytest.approx(loss, rel=1e-6)
        assert row["loss"] == each[row["step"]]["loss"]
        before = row["step"]
    assert before == 28
    assert json.loads((tmp_path / "seldom/metrics.jsonl").read_text().splitlines()[0])["loss_mean"] == each[1]["loss"]


@given(
    step=st.integers(1, 2_000_000), epochs=st.integers(1, 100), speed=st.floats(1, 2e7), loss=st.floats(0, 99),
    accuracy=st.floats(0, 1), left=st.one_of(st.none(), st.floats(0, 35_000)),
)  # fmt: skip
def test_a_line_of_the_log_fits_a_console(step, epochs, speed, loss, accuracy, left):
    row = {
        "epoch": epochs,
        "step": step,
        "lr": 2e-5,
        "loss_mean": loss,
        "accuracy_mean": accuracy,
        "tokens_per_s": speed,
    }
    line = step_line(row, epochs, step, left)
    assert len(line) <= 80 and f"mean loss {loss:.3f}" in line and ("left" in line) <= (left is not None)
    if left is not None and step < 100_000 and epochs == 1:
        assert line.endswith("s") or re.search(r"  left \d+[mhd]\d\d", line)
    told = re.search(r"([\d.]+)([kM]?) tok/s", line)
    assert float(told[1]) * {"": 1, "k": 1e3, "M": 1e6}[told[2]] == pytest.approx(speed, rel=0.006, abs=0.5)


def test_how_long_is_left_is_said_once_it_can_be_known(base, tmp_path, capsys):
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=1))
    lines = [line for line in capsys.readouterr().out.splitlines() if "  step " in line]
    assert ["  left " in line for line in lines] == [False] * 9 + [True] * 5


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(lr=0.0), "--lr 0: nothing will be learned"),
        (dict(lr=2e-5), "--lr 2e-05 is for going on from trained weights: from scratch, about 0.01 learns more"),
        (dict(lr=1e-2), None),
    ],
    ids=repr,
)
def test_a_rate_that_learns_little_is_said(base, tmp_path, capsys, changes, says):
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1, **changes))
    hints = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--lr")]
    assert hints == ([says] if says else [])


def test_silence_that_lasts_is_explained(base, tmp_path, monkeypatch, capsys):
    slow, told = {}, threading.Condition()
    say = Voice.say

    def heard(self, line, *values):
        say(self, line, *values)
        if line.endswith(" …"):
            with told:
                slow.setdefault(line, True)
                told.notify_all()

    def slowly(function, line):
        """The function, not before it was said that it lasts."""

        def waits(*given, **named):
            with told:
                assert told.wait_for(lambda: line in slow, 60)
            return function(*given, **named)

        return waits

    monkeypatch.setattr(Voice, "say", heard)
    monkeypatch.setattr(console_module, "NOTICED", 1000.0)
    fastpoem.fit(**settings(base, out=str(tmp_path / "quick"), max_steps=1))
    assert not slow  # what is over at once says nothing
    monkeypatch.setattr(console_module, "NOTICED", 0.01)
    for place, name, line in (
        (validate_module, "evaluate", "validating on 3 poems …"),
        (fit_module, "build_step", "getting the step ready …"),
        (fit_module.hub, "write_folder", "writing the model …"),
    ):
        monkeypatch.setattr(place, name, slowly(getattr(place, name), line))
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=1))


def test_what_a_resumed_run_computes_otherwise_is_said(base, tmp_path, monkeypatch, capsys):
    common = settings(base, out=str(tmp_path / "run"), schedule="constant", warmup_steps=None)
    fastpoem.fit(**common | dict(max_steps=2, epochs=100))
    capsys.readouterr()
    monkeypatch.setattr(Loop, "arithmetic", "PyTorch's operators on the CPU, today")
    fastpoem.fit(**common | dict(max_steps=60, epochs=100), resume=True, save_every=1000)
    said = capsys.readouterr().out
    assert "the learning rate rises over 3 steps, where it rose over 0" in said
    assert "computed by PyTorch's operators on the CPU, today from here on, where it was by" in said


def test_a_folder_that_comes_back_has_its_config_again(base, tmp_path, monkeypatch):
    one_step, out = Loop.one_step, tmp_path / "run"

    def vanishing(self):
        one_step(self)
        if self.done == 5:
            content.append((out / "config.json").read_bytes())
            shutil.rmtree(out)

    content = []
    monkeypatch.setattr(Loop, "one_step", vanishing)
    fastpoem.fit(**settings(base, out=str(out), epochs=1))
    assert (out / "config.json").read_bytes() == content[0]


def test_at_the_very_end_training_is_not_said_to_go_on(base, tmp_path, monkeypatch, capsys):
    write, refused = saving.checkpoint.write, []

    def full(run, step, *given):
        if (step == 28 and len(refused) < 2) or step == 14:
            refused.append(step)
            raise OSError(28, "No space left on device")
        return write(run, step, *given)

    monkeypatch.setattr(saving.checkpoint, "write", full)
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.01)
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be written" in line]
    assert ["training goes on" in line for line in lines] == [True, False]


def test_a_cache_that_cannot_be_written_is_called_by_its_flag(base, tmp_path, monkeypatch):
    from fastpoem.corpus import make

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make, "_scatter", full)
    with pytest.raises(InputError, match="choose another cache_dir"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache")))
