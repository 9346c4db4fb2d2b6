"""The benchmarks measure what they say: the Trainer's loop, the race, the counted work, and the report of made-up measurements; and where bf16
pays, in bf16."""

import contextlib
import dataclasses
import itertools
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpoem
from benchmarks import arithmetic, order, peers, products, race, report, scene, test_share, test_stages, worker, written
from benchmarks.precision import dtype_on
from fastpoem.config import from_kwargs
from fastpoem.corpus.plan import held_out_rows
from fastpoem.doctor.machine import units
from fastpoem.engine import precision
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.hub import BUNDLED
from fastpoem.poetry.forms import form_of
from fastpoem.poetry.rhyme import rhymes
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from tests.runs import assert_trained_alike, tiny_model

TINY = dataclasses.replace(scene.FULL, vocab_size=1901, n_positions=512, n_embd=32, n_layer=2, n_head=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return scene.make_scene(tmp_path_factory.mktemp("scene"), real=False, poems=2000)


@pytest.fixture(scope="module")
def programme(place):
    return race.Programme(place.store(), val_poems=64, dtype=torch.float32)


@pytest.fixture
def cpu_alone(monkeypatch):
    """No GPU, and nobody has asked yet what the CPU computes in."""
    monkeypatch.delenv("FASTPOEM_BENCH_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dtype_on.cache_clear()
    yield
    dtype_on.cache_clear()


def test_made_up_poems_have_the_lengths_of_real_ones(programme):
    assert len(programme.lengths) == 2000
    assert abs(programme.lengths.mean() - 64.4) < 4  # of the 217,561, [CLS] and [SEP] counted
    assert np.isin(programme.lengths, [34, 50, 66]).mean() == pytest.approx(0.68, abs=0.04)
    random, ours = (programme.figures(programme.evenly(16)[name]) for name in ("notebook", "fastpoem"))
    assert random["tokens"] / random["padded"] < 0.5 < 0.85 < ours["tokens"] / ours["padded"]


def flat(batches):
    return [row for batch in batches for row in batch]


def test_who_trains_on_what(programme):
    chosen = programme.evenly(8)
    assert chosen["notebook"].rows == chosen["trainer, plain"].rows
    assert sorted(flat(chosen["fastpoem"].rows)) == sorted(flat(chosen["trainer, sorted"].rows))
    by_length = [programme.lengths[row] for row in flat(chosen["trainer, sorted"].rows)]
    assert by_length == sorted(by_length)
    held = set(held_out_rows(2000, 64, 0).tolist())
    assert not any(held & set(flat(one.rows)) for one in chosen.values())
    hands = race.dealt(16, 4)
    assert sorted(flat(hands)) == list(range(16)) and all(len(hand) == 4 for hand in hands)
    assert max(map(sum, hands)) == min(map(sum, hands))  # short and long alike


FP32 = {"notebook": "fp32", "trainer, plain": "fp32", "trainer, sorted": "fp32", "fastpoem": "fp32"}


def test_the_trainer_in_bf16_where_fastpoem_is(place):
    assert race.contenders(torch.float32) == FP32
    assert race.contenders(torch.float16) == FP32 | {"fastpoem": "fp16"}
    programme = race.Programme(place.store(), dtype=torch.bfloat16)
    assert programme.contenders == FP32 | {"fastpoem": "bf16", race.BF16: "bf16"}
    for batches in (programme.evenly(8), programme.epoch(8)):
        assert [*batches] == [*programme.contenders]
        assert batches[race.BF16].rows == batches["trainer, sorted"].rows != batches["notebook"].rows


@pytest.mark.parametrize(("ratio", "dtype"), [(4.0, torch.bfloat16), (0.6, torch.float32)])
def test_the_suite_measures_once_what_pays(cpu_alone, place, monkeypatch, ratio, dtype):
    asked = []
    monkeypatch.setattr(precision, "_probe", lambda *sizes: asked.append(sizes) or [ratio])
    names = race.everyone()
    assert race.Programme(place.store()).dtype == dtype and names == [*race.contenders(dtype)] == race.everyone()
    assert len(asked) == 1


def test_a_precision_is_set_for_a_trial(cpu_alone, monkeypatch):
    monkeypatch.setattr(precision, "_probe", lambda *sizes: pytest.fail("measured"))
    monkeypatch.setenv("FASTPOEM_BENCH_PRECISION", "bf16")
    assert race.BF16 in race.everyone()


class NoTurns:
    """Of a race that is over at once."""

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_workers_compute_in_what_they_are_told(place, tmp_path, monkeypatch, asked):
    job = {
        "data": str(place.data),
        "model": str(place.model(TINY)),
        "folder": str(tmp_path),
        "cache": str(tmp_path),
        "device": "cpu",
    }
    job |= {"precision": asked, "lr": 1e-3, "val_poems": 16, "batch": 16}
    seen = []

    @contextlib.contextmanager
    def assembled(config, voice):
        seen.append(config.precision)
        yield SimpleNamespace(model=torch.nn.Linear(1, 1)), None

    monkeypatch.setattr("fastpoem.run.fit.assembled", assembled)
    worker.run_fastpoem(job | {"contender": "fastpoem"}, NoTurns())
    assert seen == [asked]
    monkeypatch.setattr(peers, "train", lambda *given, **settings: seen.append(settings.get("bf16", False)))
    for name in ("trainer, plain", "trainer, sorted", race.BF16):
        worker.run_transformers(job | {"contender": name}, NoTurns())
    assert seen[1:] == [False, False, True]


def test_copies_of_poems_held_out_are_nobodys(place, tmp_path):
    """As in the real corpus: fastpoem's worker refuses poems that are not those of its own epoch."""
    lines = place.data.read_text(encoding="utf-8").splitlines()[:400]
    (tmp_path / "poems.txt").write_text("\n".join([*lines, *lines]), encoding="utf-8")
    twice = dataclasses.replace(place, folder=tmp_path, data=tmp_path / "poems.txt")
    programme = race.Programme(twice.store(), val_poems=16, dtype=torch.float32)
    config = from_kwargs(data=str(twice.data), model=str(twice.model(TINY)), out=str(tmp_path / "run"), val_poems=16, precision="fp32",
                         device="cpu", quiet=True)  # fmt: skip
    with assembled(config, Voice(quiet=True)) as (loop, _):
        assert len(loop.validation.rows) == 16 and loop.order.steps == programme.order.steps == (800 - 32) // 16
        for number in (0, 7, 47):
            ours, theirs = loop.order(0, number), programme.order(0, number)
            assert ours.bucket.tolist() == theirs.bucket.tolist() and ours.index.tolist() == theirs.index.tolist()


def test_contenders_train_in_turn_and_one_that_dies_is_out(place, programme):
    """Each is a process that imports all of PyTorch: so all is asked of the same three, one after another."""
    batches = programme.epoch(40)
    names = ["notebook", "trainer, sorted", "fastpoem"]
    with race.start(place, TINY, names, lr=1e-2, val_poems=64) as contenders:
        assert_alike(contenders, batches)
        assert all(one.written(3)["written"] == 3 for one in contenders.values())
        assert_out(contenders, batches)


def assert_alike(contenders, batches):
    """They train in turn and are judged alike."""
    before = {name: one.loss() for name, one in contenders.items()}
    assert max(before.values()) - min(before.values()) < 1e-6  # the same weights, the same poems
    for name, one in contenders.items():
        assert one.turn(batches[name].part(range(3)))["steps"] == 3
        took = one.turn(batches[name].part(range(3, 40)), seconds=0.02)
        assert took["seconds"] >= 0.02 and 1 <= took["steps"] <= 37
        one.turn(batches[name].part(range(3, 13)))
        after = one.loss()
        if name == "notebook":  # it learns padding
            assert abs(after - before[name]) > 0.1
        else:
            assert after < before[name] - 0.3


def assert_out(contenders, batches):
    """One is killed as it trains, one as it waits, one fails: each is out, with the cause, and the others go on."""
    notebook, trainer, ours = contenders.values()
    threading.Timer(0.3, trainer._process.kill).start()
    endless = dataclasses.replace(batches["trainer, sorted"], rows=batches["trainer, sorted"].rows * 100)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"killed by SIGKILL: out of memory\? \(resident .* \d+ kB\)") as found:
            trainer.turn(endless)
        assert str(found.value).startswith("trainer, sorted was killed") and "\n" not in str(found.value)
    assert ours.turn(batches["fastpoem"].part([13]))["steps"] == 1
    notebook._process.kill()
    notebook._process.wait()
    with pytest.raises(RuntimeError, match=r"^notebook was killed by SIGKILL"):
        notebook.turn(batches["notebook"].part([1]))
    wrong = dataclasses.replace(batches["fastpoem"].part([0]), steps=[5])
    for again in (wrong, batches["fastpoem"].part([0])):
        with pytest.raises(RuntimeError, match=r"^fastpoem failed with exit status 1; .*step 5 is not of the poems"):
            ours.turn(again)


def test_a_contender_that_is_dead_before_its_first_turn(place):
    with race.start(place, TINY, ["fastpoem"], device="abacus", precision="bf16", val_poems=64) as contenders:
        told = json.loads((contenders["fastpoem"].log.parent / "job.json").read_text())
        assert told["precision"] == "bf16"
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^fastpoem failed with exit status 1; .*abacus"):
                contenders["fastpoem"].loss()


def test_poems_in_a_form_and_rhymes_are_counted_alike(tmp_path, verses):
    """By what a run of fastpoem says of itself at an epoch's end; a model that has learned four poems by heart writes them."""
    lines = [line for line in verses.read_text(encoding="utf-8").splitlines() if form_of(line) == "五绝"]
    mine = [line for line in lines if rhymes(line)][:2] + [line for line in lines if rhymes(line) is False][:1]
    (tmp_path / "poems.txt").write_text("\n".join([*mine, "春眠不觉晓，处处闻啼。"] * 2), encoding="utf-8")
    model = tiny_model(tmp_path / "model", BUNDLED / "model")
    run = fastpoem.fit(tmp_path / "poems.txt", model=str(model), from_scratch=True, out=str(tmp_path / "run"), epochs=150, batch_size=4,
                       lr=2e-2, dropout=0.0, val_poems=0, save_every=500, device="cpu", quiet=True)  # fmt: skip
    weights = GPT2(hub.read_config(run.model)[0]).eval()
    hub.load_weights(weights, run.model)
    found, last = written.written(weights, run.model, 32), run.metrics[-1]
    assert (found["written"], found["in_form"], found["rhyming"]) == (32, last["in_form"], last["rhyming"])
    assert 0.4 < found["in_form"] < 1 and 0.2 < found["rhyming"] < found["in_form"]
    more = written.written(weights, run.model)
    assert more["written"] == written.POEMS and more["in_form"] == pytest.approx(0.75, abs=0.15)


def test_the_trainer_is_masked_loss_clip_and_adamw(small_model, tmp_path):
    from transformers import BertTokenizer, GPT2LMHeadModel

    tokenizer = BertTokenizer.from_pretrained(small_model)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    theirs, ours = (GPT2LMHeadModel.from_pretrained(small_model, **off) for _ in range(2))
    lines = ["白日依山尽，黄河入海流。", "春江", "欲穷千里目", "更上一层楼，更上一层楼。"]
    batches = [peers.tokenized(tokenizer, lines[at : at + 2]) for at in (0, 2)] * 2
    trainer = peers.train(
        theirs, tokenizer, batches, folder=tmp_path / "trainer", batch_size=2, lr=1e-3, max_steps=4,
        lr_scheduler_type="constant",
    )  # fmt: skip
    assert trainer.state.global_step == 4
    assert not (tmp_path / "trainer").exists() or not any((tmp_path / "trainer").iterdir())
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in batches:
        padded = tokenizer.pad(batch, return_tensors="pt")
        ids = padded["input_ids"]
        labels = ids.masked_fill(padded["attention_mask"] == 0, -100)
        ours(input_ids=ids, attention_mask=padded["attention_mask"], labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_trained_alike(theirs, ours)


@pytest.mark.parametrize(("flags", "dtype"), [({}, torch.float32), ({"bf16": True}, torch.bfloat16)])
def test_the_trainer_multiplies_in_bf16_where_its_flag_is_set(small_model, tmp_path, flags, dtype):
    from transformers import BertTokenizer, GPT2LMHeadModel

    model, tokenizer, seen = (
        GPT2LMHeadModel.from_pretrained(small_model),
        BertTokenizer.from_pretrained(small_model),
        [],
    )
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    batches = [peers.tokenized(tokenizer, ["白日依山尽，黄河入海流。", "春江"])] * 2
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    peers.train(model, tokenizer, batches, folder=tmp_path, batch_size=2, lr=1e-3, max_steps=2, **flags)
    assert seen == [dtype] * 2
    for name, tensor in model.named_parameters():
        assert tensor.dtype == torch.float32 and (
            name == "transformer.wpe.weight" or not torch.equal(tensor, before[name])
        )


def test_counted_work():
    model = GPT2(TINY)
    model.initialise(0)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(TINY.vocab_size, (3, 10))).sum().backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in counted.items() if op in ("aten.mm", "aten.addmm"))
    assert products == 6 * arithmetic.matrix_weights(TINY) * 30
    attention = arithmetic.model_flops(TINY, [10] * 3) - products
    assert attention == 3 * 12 * 2 * 32 * 55  # 3 poems, 12 L D, 1 + … + 10 keys
    assert arithmetic.matrix_weights(scene.FULL) == 58_693_632
    assert arithmetic.best_product(arithmetic.products(TINY, 64), torch.float32, "cpu") > 1e6


def test_operands_of_16_bits_are_tried_in_every_layout_that_a_step_may_give_them():
    given = [*arithmetic.operands(5, 3, 7, torch.bfloat16, "cpu")]
    assert sorted((*a.shape, b.shape[1]) for a, b in given) == [(3, 5, 7), (5, 3, 7), (5, 3, 7), (5, 7, 3), (7, 5, 3)]
    assert all(a.is_contiguous() and {a.dtype, b.dtype} == {torch.bfloat16} for a, b in given)
    assert sorted(b.is_contiguous() for _, b in given) == [False, False, True, True, True]
    assert len([*arithmetic.operands(5, 3, 7, torch.float32, "cpu")]) == 1


@pytest.mark.parametrize("fastest", ["weight's gradient", "transposed", "our own"])
def test_the_best_product_is_the_fastest_of_all(monkeypatch, fastest):
    """All others take five milliseconds more than they need."""
    multiply = torch.mm

    def slow(a, b, *, out):
        if not {"weight's gradient": a.shape == (96, 64), "transposed": not b.is_contiguous(), "our own": False}[
            fastest
        ]:
            time.sleep(0.005)
        return multiply(a, b, out=out)

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(arithmetic, "uses_tiles", lambda t: fastest == "our own")
    monkeypatch.setattr(arithmetic, "product", multiply)
    assert arithmetic.best_product([(64, 32, 96)], torch.bfloat16, "cpu", rounds=5) > 2 * 64 * 32 * 96 / 0.005


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_share_is_of_the_best_product_in_the_same_precision(cpu_alone, place, monkeypatch, name):
    monkeypatch.setenv("FASTPOEM_BENCH_PRECISION", name)
    monkeypatch.setattr(test_share, "FULL", TINY)
    monkeypatch.setattr(test_share, "STEPS", 1)
    made, computed = [], []

    def make_step(*given, **settings):
        made.append(scene.make_step(*given, **settings))
        return made[0]

    def pedantic(train, setup, rounds):
        setup()
        train()

    monkeypatch.setattr(test_share, "make_step", make_step)
    monkeypatch.setattr(test_share, "best_product", lambda shapes, dtype, device: computed.append(dtype) or 1e9)
    stats = SimpleNamespace(stats=SimpleNamespace(median=2.0))
    benchmark = SimpleNamespace(pedantic=pedantic, stats=stats, extra_info={})
    test_share.test_share_of_the_best_product(benchmark, place, "cpu")
    assert computed == [made[0].optimizer.working.dtype] == [{"fp32": torch.float32, "bf16": torch.bfloat16}[name]]
    assert made[0].optimizer.applied.item() == 2
    found = benchmark.extra_info
    assert found["precision"] == name and found["share"] == pytest.approx(found["flops"] / 2 / 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_of_a_tiny_step(dtype):
    step, rows = scene.make_step(TINY, "cpu", poems=2, longest=9, dtype=dtype), scene.made_up_rows(TINY, 2, 9)
    assert step.optimizer.working.dtype == dtype
    before = step.optimizer.master.clone()
    for given, run in test_stages.stages(step, rows).values():
        run(*given())
    assert not torch.equal(before, step.optimizer.master)
    assert step.optimizer.applied.item() == 2  # "update" and "step"


def test_orders_are_compared_on_the_same_poems(place, tmp_path, capsys, monkeypatch):
    more = ["--data", str(place.data), "--tokenizer", str(place.tokenizer), "--out", str(tmp_path)]
    texts = {
        name: text._replace(poems=48 // text.copies, epochs=1, held=text.held // 20)
        for name, text in order.TEXTS.items()
    }
    monkeypatch.setattr(order, "TEXTS", texts)
    monkeypatch.setattr(order, "BEFORE", 48)
    order.main([*more, "--seeds", "1", "--rate", "1e-3", "--layers", "1", "--wide", "32"])
    runs = json.loads((tmp_path / "order.json").read_text())
    assert len(runs) == 3 * 2 * 3 and all(0 < run["loss"] < 10 for run in runs.values())
    for text, start in itertools.product(texts, ("scratch", "trained")):
        losses = {runs[f"{text}/{start}/0.001/{name}/0"]["loss"] for name in order.ORDERS}
        assert (
            len(losses) > 1 and max(losses) - min(losses) < 0.5
        )  # other orders, and near one another after three steps
    held = {*(tmp_path / "lyrics-held.txt").read_text(encoding="utf-8").split("\n")}
    assert len(held) == 15 and not held & {*(tmp_path / "lyrics.txt").read_text(encoding="utf-8").split("\n")}
    assert "| lyrics | trained | 0.001 |" in capsys.readouterr().out
    order.main([*more, "--seeds", "1", "--rate", "1e-3"])  # done before
    order.main([*more, "--speed", str(tmp_path / "model"), "--steps", "2"])
    assert len(json.loads((tmp_path / "speed.json").read_text())["seconds"]["pack"]) == 2


def measured(tmp_path, bf16=None):
    """JSON as pytest-benchmark writes it: fastpoem 6 times the notebook in turn 0 and 3 times in turn 1. bf16: the seconds of a turn of the Trainer in
    bf16, where that pays."""
    rows, names = [], race.contenders(torch.float32 if bf16 is None else torch.bfloat16)
    ours = names["fastpoem"]

    def row(median, /, **extra):
        rows.append({"name": "test", "stats": {"median": median}, "extra_info": extra})

    for turn in (0, 1):
        for name, seconds in (
            ("notebook", 30.0 - 12 * turn),
            ("trainer, plain", 20.0),
            ("trainer, sorted", 8.0),
            *[(race.BF16, bf16)] * (bf16 is not None),
            ("fastpoem", 5.0 + turn),
        ):
            row(seconds, kind="throughput", contender=name, precision=names[name], contenders=[*names], turn=turn, device="cpu",
                corpus="real poems", seconds=seconds, steps=4, poems=64, tokens=4000, padded=8000)  # fmt: skip
            curve = [(0.0, 10.0), (5.0 * (turn + 1), 8.0 - turn)]
            told = dict(written=128, in_form=0.25, rhyming=0.125) if turn else {}
            row(5.0, kind="curve", contender=name, precision=names[name], turn=turn, device="cpu", curve=curve,
                steps=10 * (turn + 1), **told)  # fmt: skip
    for stage, seconds in (
        ("feed", 0.0002),
        ("forward", 0.5),
        ("loss", 0.03),
        ("backward", 0.9),
        ("update", 0.05),
        ("step", 1.5),
    ):
        row(seconds, kind="stage", stage=stage, device="cpu", **({"precision": ours} if stage != "feed" else {}))
    row(10.0, kind="share", device="cpu", precision=ours, flops_per_s=240e9, best_product=300e9, share=0.8)
    row(1.5, kind="scaling", axis="length", at=66, device="cpu", precision=ours, tokens_per_s=700, flops_per_s=250e9)
    row(1.0, some="other benchmark")
    flags = ["sse", "avx2", "avx512f", *["avx512_bf16", "amx_bf16"] * (bf16 is not None)]
    info = {"cpu": {"brand_raw": "A Processor", "count": 2, "flags": flags}, "python_version": "3.11.7"}
    path = tmp_path / "measured.json"
    path.write_text(
        json.dumps({"machine_info": {**info, "torch": "2.13.0", "threads": 2, "gpu": None}, "benchmarks": rows})
    )
    return path


def test_report(tmp_path, capsys):
    assert report.main([str(measured(tmp_path)), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    assert "A Processor, 2 cores, AVX-512, 2 threads, torch 2.13.0, Python 3.11.7" in said
    lines = cells(said)
    assert [
        "notebook, fp32",
        "2.67",
        "167",
        "50%",
        "**4.36**",
        "3.00 to 6.00",
    ] in lines  # 128 poems in 48 s; 48 s against 11
    assert ["trainer, sorted, fp32", "8.00", "500", "50%", "**1.45**", "1.33 to 1.60"] in lines
    assert ["fastpoem, fp32", "11.64", "727", "50%", "", ""] in lines
    assert (
        "fastpoem in fp32: **4.36 times** as many as the notebook, **1.45 times** as many as the best Trainer (trainer, sorted, fp32)."
        in said
    )
    assert "bf16" not in said and "No turns of" not in said
    assert "### Where a step's time goes, fp32\n" in said and "### Scaling, fp32\n" in said
    assert ["backward", "900 ms", "60.0%"] in lines
    assert ["fastpoem, fp32", "20", "7.000", "10.000", "25%", "12%"] in lines
    assert "Forms and rhymes of 128 poems" in said
    assert "**80%** of the best fp32 product" in said
    made = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert made == ["loss.png", "stages.png", "throughput.png"]
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000


def cells(said):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()]


def test_report_where_bf16_pays(tmp_path, capsys, monkeypatch):
    """The Trainer to beat is the faster one, in whichever precision; the chart names the processor's units and everybody's precision."""
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_yticks", lambda axes, at, names: drawn.extend(names))
    monkeypatch.setattr("matplotlib.figure.FigureBase.supxlabel", lambda figure, text, **look: drawn.append(text))
    assert report.main([str(measured(tmp_path, bf16=6.0)), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    best = "**1.09 times** as many as the best Trainer (trainer, sorted, bf16)"
    assert f"fastpoem in bf16: **4.36 times** as many as the notebook, {best}." in said
    rates = [line[:2] for line in cells(said)]
    assert ["trainer, sorted, fp32", "8.00"] in rates and ["trainer, sorted, bf16", "10.67"] in rates
    assert "**80%** of the best bf16 product" in said and "### Scaling, bf16\n" in said
    assert "A Processor, 2 cores, AVX-512, AMX bf16, 2 threads" in said and "AVX-512, AMX bf16" in drawn[0]
    everyone = ["fastpoem, bf16", "trainer, sorted, bf16", "trainer, sorted, fp32", "trainer, plain, fp32"]
    assert drawn[1:6] == [*everyone, "notebook, fp32"]
    rows = report.read(measured(tmp_path, bf16=9.0))[1]["throughput"]
    assert "**1.45 times** as many as the best Trainer (trainer, sorted, fp32)" in report.throughput(rows)
    without = report.throughput(row for row in rows if row["contender"] != race.BF16)
    assert "No turns of: trainer, sorted, bf16." in without


@pytest.mark.parametrize(
    ("flags", "named"),
    [("sse avx", []), ("avx2", ["AVX2"]), ("avx2 avx512f avx512_vnni", ["AVX-512"]), ("avx2 avx512f avx512_bf16", ["AVX-512", "AVX-512 bf16"]),
     ("avx2 avx512f avx512_bf16 amx_tile amx_bf16", ["AVX-512", "AMX bf16"])],
)  # fmt: skip
def test_units_of_a_processor(flags, named):
    assert units(flags.split()) == named


def test_report_of_a_part(tmp_path, capsys):
    path = measured(tmp_path)
    content = json.loads(path.read_text())
    content["benchmarks"] = [row for row in content["benchmarks"] if row["extra_info"].get("kind") == "share"]
    path.write_text(json.dumps(content))
    assert report.main([str(path), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    assert "80%" in said and "Throughput" not in said and not list((tmp_path / "figures").iterdir())


def test_report_where_turns_are_missing(tmp_path, capsys):
    path = measured(tmp_path)
    content = json.loads(path.read_text())
    lost = {("notebook", 1), ("trainer, plain", 0), ("trainer, plain", 1)}
    content["benchmarks"] = [
        row for row in content["benchmarks"] if (row["extra_info"].get("contender"), row["extra_info"].get("turn")) not in lost
    ]  # fmt: skip
    path.write_text(json.dumps(content))
    assert report.main([str(path), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    lines = cells(said)
    name = "notebook, fp32 (of 2 turns only 0)"
    assert [name, "2.13", "133", "50%", "**6.00**", "6.00 to 6.00"] in lines  # 64 poems in 30 s; 30 s against 5
    assert [name, "10", "8.000", "5.000", "", ""] in lines  # it did not come to the end
    assert ["trainer, sorted, fp32", "8.00", "500", "50%", "**1.45**", "1.33 to 1.60"] in lines
    assert "on cpu. No turns of: trainer, plain." in said
    assert (tmp_path / "figures/throughput.png").exists()
    content["benchmarks"] = [row for row in content["benchmarks"] if row["extra_info"].get("contender") != "fastpoem"]
    path.write_text(json.dumps(content))
    assert report.main([str(path), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    assert "| notebook, fp32 (of 2 turns only 0) | 2.13 | 133 | 50% |  |  |" in said and "as many as" not in said


def test_report_of_measurements_without_a_precision(tmp_path, capsys):
    """As they were made before contenders had one."""
    path = measured(tmp_path)
    path.write_text(path.read_text().replace('"precision"', '"accuracy"'))
    assert report.main([str(path), "--out", str(tmp_path / "figures")]) == 2
    assert "KeyError: 'precision'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": [{}], "machine_info": {}}'])
def test_report_of_something_else(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_products_of_a_step_in_every_way():
    shape = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=3, n_head=2)
    rows = products.measured(shape, 10, torch.float32, rounds=1)
    assert sum(times * flops for _, times, flops, _ in rows) == 6 * arithmetic.matrix_weights(shape) * 10
    assert all(seconds.keys() == {"PyTorch", "copied beforehand"} for what, *_, seconds in rows if "ᵀ " in what)
    made = products.table(
        [("a", 3, 6 * 10**9, {"PyTorch": 2.0}), ("b", 1, 10**9, {"PyTorch": 1.0, "fastpoem": 0.5})], torch.bfloat16
    )
    assert made.splitlines() == [
        "| bfloat16, GFLOP/s | PyTorch | fastpoem |", "| --- | --- | --- |", "| a | 3 |  |", "| b | 1 | 2 |",
        "| a step's, ms | 7,000 | 6,500 |",
    ]  # fmt: skip
