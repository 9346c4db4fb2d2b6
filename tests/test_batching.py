"""What --batching auto comes to: packed batches where attention inside them is fast, bucketed ones elsewhere, and in both what was begun."""

import json

import numpy as np
import pytest
import torch
from fastpoem_kernels import native

import fastpoem
from fastpoem.config import TrainConfig, from_kwargs
from fastpoem.corpus.feed import Feed
from fastpoem.corpus.plan import BucketOrder, TextOrder
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine import batching
from fastpoem.engine.batching import choose_batching
from fastpoem.errors import InputError
from fastpoem.model.hub import BUNDLED
from fastpoem.run.given import order_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """(why there is no C, the variable-length kernel)."""

    def make(no_c=None, varlen=None):
        monkeypatch.setattr(native, "_loaded", lambda *_: no_c if no_c else object())
        monkeypatch.setattr(batching, "find_varlen", lambda *_: (varlen, "words on the kernel"))

    return make


@pytest.mark.parametrize(
    ("there", "settings", "device", "dtype", "found", "words"),
    [
        ({}, {}, CPU, FP32, "pack", "attention in C"),
        ({}, {"shuffle": False}, CPU, FP32, "pack", "attention in C"),
        ({"no_c": "gcc is not installed"}, {}, CPU, FP32, "bucket", "gcc is not installed"),
        ({}, {}, CPU, BF16, "pack", "attention in C"),
        ({}, {}, CPU, torch.float16, "bucket", "not made for float16"),
        ({}, {"compile": "on"}, CPU, FP32, "bucket", "compiled"),
        ({}, {"loss_on_padding": True}, CPU, FP32, "bucket", "no padding"),
        ({}, {"recipe": "notebook"}, CPU, FP32, "pad", "asked for"),
        ({}, {"batching": "bucket"}, CPU, FP32, "bucket", "asked for"),
        ({"no_c": "gcc is not installed"}, {"batching": "pack"}, CPU, FP32, "pack", "asked for"),
        ({"varlen": print}, {}, CUDA, BF16, "pack", "words on the kernel"),
        ({"varlen": print}, {"attention": "sdpa"}, CUDA, BF16, "bucket", "--attention sdpa"),
        ({"varlen": print}, {"loss_on_padding": True}, CUDA, BF16, "bucket", "no padding"),
        ({}, {}, CUDA, FP32, "bucket", "words on the kernel"),
        ({}, {}, torch.device("meta"), FP32, "bucket", "on meta"),
    ],
)
def test_auto_is_packed_where_that_is_fast(machine, there, settings, device, dtype, found, words):
    machine(**there)
    chosen, why = choose_batching(from_kwargs(data="x", **settings), device, dtype, 64)
    assert chosen == found and words in why
    kept, why = choose_batching(from_kwargs(data="x", **settings), device, dtype, 64, before="pad")
    assert (kept, why) == (("pad", "as the run began") if "asked" not in words else (found, "asked for"))


def config_of(folder):
    """(as asked for, what it came to)."""
    content = json.loads((folder / "config.json").read_text())
    return content["settings"]["batching"], content["batching"]


@pytest.mark.parametrize("no_c", [None, "gcc is not installed"])
def test_a_run_says_what_it_is_and_goes_on_so(small_model, tmp_path, monkeypatch, capsys, no_c):
    """Begun with the C or without, it goes on in its own way where the other is."""
    if no_c is None and native.why_not() is not None:
        pytest.skip(f"the C is not there: {native.why_not()}")
    loaded = native._loaded
    came_to, words = ("pack", "packed (attention in C)") if no_c is None else ("bucket", "of like length (no attention")
    common = dict(model=str(small_model), data=str(BUNDLED / "poems.txt"), out=str(tmp_path / "run"), device="cpu")
    monkeypatch.setattr(native, "_loaded", (lambda *_: no_c) if no_c else loaded)
    fastpoem.fit(**common, max_steps=2)
    assert words in capsys.readouterr().out and config_of(tmp_path / "run") == ("auto", came_to)
    monkeypatch.setattr(native, "_loaded", (lambda *_: "another machine") if no_c is None else loaded)
    fastpoem.fit(out=common["out"], max_steps=4, resume=True)
    assert "as the run began" in capsys.readouterr().out and config_of(tmp_path / "run") == ("auto", came_to)
    other = "pack" if came_to == "bucket" else "bucket"
    with pytest.raises(InputError, match=f"batching was {came_to}, is {other}"):
        fastpoem.fit(**common, max_steps=6, resume=True, batching=other)
    fastpoem.fit(**common, max_steps=6, resume=True, batching=came_to)


def test_copies_of_a_line_fill_no_batch(small_model, tmp_path):
    """A text that repeats each of its lines: batches of like length would be copies of one line."""
    text = (BUNDLED / "poems.txt").read_text(encoding="utf-8").replace("\n", "")
    lines = [text[40 * at : 41 * at + 10] for at in range(40)]
    (tmp_path / "copies.txt").write_text("\n".join(lines * 10), encoding="utf-8")
    store = prepare_store(tmp_path / "copies.txt", PoemTokenizer.load(small_model), tmp_path / "store")

    def most_alike(config):
        order = order_of(config, store, np.empty(0, np.int64))
        feed, most = Feed(store, config.batching), 0
        for step in range(order.steps):
            rows = feed(order(0, step))
            poems = rows.source.view(16, -1)
            most = max(most, int(poems.unique(dim=0, return_counts=True)[1].max()))
        return type(order), most

    assert most_alike(TrainConfig(batching="bucket", buckets=255))[1] >= 8
    for config, kind in ((TrainConfig(batching="bucket"), BucketOrder), (TrainConfig(batching="pack"), TextOrder)):
        of, most = most_alike(config)
        assert of is kind and most <= 5


def test_groups_of_buckets_are_part_of_what_a_run_is(small_model, tmp_path):
    common = dict(model=str(small_model), data=str(BUNDLED / "poems.txt"), out=str(tmp_path / "run"), device="cpu")
    common |= dict(batching="bucket")
    fastpoem.fit(**common, max_steps=2)
    with pytest.raises(InputError, match="groups of buckets was 3, is None"):
        fastpoem.fit(**common, max_steps=4, resume=True, buckets=32)
    fastpoem.fit(**common, max_steps=4, resume=True)
