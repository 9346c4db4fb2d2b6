"""The number format on a CPU: measured, the same whenever asked in one run, and kept by a run that goes on."""

import json
import time

import pytest
import torch

import fastpoem
from fastpoem.engine import optim, precision
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.run.loop import Loop
from tests.runs import assert_same, settings, tiny_data, tiny_model

FULL = GPT2Config(vocab_size=21128, n_positions=1024, n_embd=768, n_layer=6, n_head=12)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ratios", "dtype"),
    [
        ([4.0, 5.0, 4.5], torch.bfloat16),
        ([1.25, 1.3, 1.2], torch.bfloat16),
        ([1.1, 1.15, 1.19], torch.float32),  # within what noise and the rest of a step take
        ([3.0, 0.9, 3.0], torch.float32),  # not sure enough
        ([0.6], torch.float32),
    ],
)
def test_bf16_only_where_it_is_clearly_faster(monkeypatch, ratios, dtype):
    monkeypatch.setattr(precision, "_probe", lambda *sizes: ratios)
    chosen, why = precision.choose_dtype("auto", CPU, FULL, 1040)
    assert chosen == dtype
    assert why.startswith("measured: bf16 multiplies at ") and why.endswith(" times fp32's speed here")
    assert precision.choose_dtype("fp32", CPU, FULL, 1040) == (torch.float32, "asked for")
    assert precision.choose_dtype("bf16", CPU, FULL, 1040) == (torch.bfloat16, "asked for")


def test_a_small_step_is_not_worth_a_probe(monkeypatch):
    monkeypatch.setattr(precision, "_probe", lambda *sizes: pytest.fail("probed"))
    small, _ = hub.read_config(hub.BUNDLED / "model")
    assert precision.choose_dtype("auto", CPU, small, 16 * 64)[0] == torch.float32


def test_the_probe_is_short_and_leaves_no_trace():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    begin = time.thread_time()
    ratios = precision._probe(128, 768, 3072)
    # Half a second of it is measuring; the rest is what it began before, which shared cores make twice as long.
    assert time.thread_time() - begin < 6
    assert 1 <= len(ratios) <= precision.ROUNDS and all(0.01 < ratio < 100 for ratio in ratios)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("faster", [True, False])
def test_a_run_keeps_its_precision(tmp_path, verses, monkeypatch, capsys, faster):
    tiny_model(tmp_path / "model", hub.BUNDLED / "model")
    tiny_data(tmp_path / "poems.txt", verses)
    monkeypatch.setattr(precision, "WORTH", 0)

    def train(out, ratio, **changes):
        monkeypatch.setattr(precision, "_probe", lambda *sizes: [ratio])
        return fastpoem.fit(**settings(tmp_path, out=str(tmp_path / out), epochs=1, save_every=4, **changes))

    before, after = (5.0, 0.5) if faster else (0.5, 5.0)
    short = "bf16" if faster else "fp32"
    whole = train("whole", before)
    one_step = Loop.one_step

    def cut(self):
        if self.done == 6:
            raise KeyboardInterrupt
        one_step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "one_step", cut)
        train("cut", before)
    capsys.readouterr()
    run = train("cut", after, resume=True)
    assert "(as the run began)" in capsys.readouterr().out
    assert_same(whole.folder, run.folder)
    train("cut", after, resume=True, precision=short)  # the same, named
    other = "fp32" if faster else "bf16"
    with pytest.raises(InputError, match=f"precision was {short}, is {other}"):
        train("cut", after, resume=True, precision=other)


def test_a_float16_run_goes_on_with_its_loss_scale(tmp_path, verses, monkeypatch, capsys):
    """Begun at a scale that is too large, cut and resumed: rows, weights and state are those of a run that was never interrupted."""
    tiny_model(tmp_path / "model", hub.BUNDLED / "model")
    tiny_data(tmp_path / "poems.txt", verses)
    monkeypatch.setattr(optim, "SCALE", 2.0**24)
    given = dict(epochs=1, save_every=4, precision="fp16")
    whole = fastpoem.fit(**settings(tmp_path, out=str(tmp_path / "whole"), **given))
    one_step = Loop.one_step

    def cut(self):
        if self.done == 6:
            raise KeyboardInterrupt
        one_step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "one_step", cut)
        fastpoem.fit(**settings(tmp_path, out=str(tmp_path / "cut"), **given))
    monkeypatch.setattr(optim, "SCALE", 2.0)
    given["precision"] = "auto"  # as the run began
    resumed = fastpoem.fit(**settings(tmp_path, out=str(tmp_path / "cut"), resume=True, **given))
    assert_same(whole.folder, resumed.folder)
    steps = [row for row in whole.metrics if "event" not in row]
    assert steps[0]["skipped"] == 1 and 2.0**10 < steps[-1]["loss_scale"] < 2.0**24
    assert "skipped 1 (too large for fp16; the loss scale is now 8,388,608)" in capsys.readouterr().out
    assert json.loads((whole.folder / "config.json").read_text())["settings"]["precision"] == "fp16"


@pytest.mark.parametrize(
    ("capability", "wanted", "dtype"),
    [
        ((9, 0), "auto", torch.bfloat16), ((8, 6), "fp16", torch.float16), ((7, 5), "auto", torch.float16),
        ((7, 0), "auto", torch.float16), ((7, 5), "fp32", torch.float32), ((6, 1), "auto", torch.float32),
    ],
)  # fmt: skip
def test_the_format_of_a_card(monkeypatch, capability, wanted, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert precision.choose_dtype(wanted, torch.device("cuda"), FULL, 1040)[0] == dtype
    if capability < (8, 0):
        with pytest.raises(InputError, match="Tesla T4 has no bf16; use --precision fp16"):
            precision.choose_dtype("bf16", torch.device("cuda"), FULL, 1040)


def test_fp16_on_a_cpu_is_for_who_asks():
    dtype, why = precision.choose_dtype("fp16", CPU, FULL, 1040)
    assert dtype == torch.float16 and why.startswith("asked for; slow on a CPU")
    with pytest.raises(InputError, match="in fp32 only"):
        precision.choose_dtype("fp16", torch.device("mps"), FULL, 1040)
