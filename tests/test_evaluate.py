"""fastpoem.evaluate: Hugging Face's masked loss, poem by poem, and what the model's own poems are like."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertTokenizer, GPT2LMHeadModel

import fastpoem
from fastpoem.corpus.copied import longest_copied
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.evaluate import main
from fastpoem.generation.poems import sample
from fastpoem.model.hub import BUNDLED
from fastpoem.model.vocabulary import GENERATION
from fastpoem.run import evaluation
from tests.runs import tiny_data
from tests.test_validation import store_of


def report(capsys, *arguments) -> dict:
    assert main([*map(str, arguments), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def poems(tmp_path_factory, verses):
    path = tiny_data(tmp_path_factory.mktemp("evaluate") / "poems.txt", verses)
    path.write_text(path.read_text(encoding="utf-8") + "\n龘龘，龘。", encoding="utf-8")  # which the vocabulary lacks
    return path


@pytest.fixture(scope="module")
def by_transformers(small_model, poems):
    """(sum of losses, targets, correct, targets that are [UNK], their losses) of each poem."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(small_model).eval(), BertTokenizer.from_pretrained(small_model)
    found = []
    for line in poems.read_text(encoding="utf-8").splitlines():
        ids = torch.tensor([tokenizer(line).input_ids[:96]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double()
        strange = ids[0, 1:] == tokenizer.unk_token_id
        right = (logits.argmax(1) == ids[0, 1:]).sum()
        found.append((lost.sum(), lost.numel(), right, strange.sum(), lost[strange].sum()))
    return np.array(found, dtype=np.float64)


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_loss_is_transformers_masked_loss(batch, small_model, poems, by_transformers, capsys):
    found = report(capsys, "--model", small_model, "--data", poems, "--batch-size", batch, "--count", 0)
    loss, targets, right, strange, strange_loss = by_transformers.sum(0)
    assert found["loss"] == pytest.approx(loss / targets, rel=1e-5)
    assert (found["tokens"], found["poems"]) == (targets, len(by_transformers))
    assert found["accuracy"] == pytest.approx(right / targets)
    assert found["loss_per_poem"] == pytest.approx(loss / len(by_transformers), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / targets), rel=1e-4)
    assert strange == 3 and found["unknown_share"] == pytest.approx(strange / targets)
    assert found["loss_without_unknown"] == pytest.approx((loss - strange_loss) / (targets - strange), rel=1e-5)
    assert found["written"] is None


def test_groups_add_up_to_the_whole(small_model, poems, by_transformers, capsys):
    found = report(capsys, "--model", small_model, "--data", poems, "--count", 0)
    for key in ("by_length", "by_form"):
        assert sum(group["poems"] for group in found[key]) == found["poems"]
    short = by_transformers[by_transformers[:, 1] - 1 <= 24]
    assert found["by_length"][0]["name"] == "up to 24" and found["by_length"][0]["poems"] == len(short)
    assert found["by_length"][0]["loss"] == pytest.approx(short[:, 0].sum() / short[:, 1].sum(), rel=1e-5)
    assert {group["name"] for group in found["by_form"]} >= {"五绝", "other"}


def test_some_of_the_poems_are_the_same_ones_each_time(small_model, poems, capsys):
    one, again, other = (
        report(capsys, "--model", small_model, "--data", poems, "--poems", 9, "--count", 0, "--seed", seed)
        for seed in (1, 1, 2)
    )
    assert one == again and one["poems"] == 9 and one["loss"] != other["loss"]


def test_ids_that_were_never_trained_are_told_apart(small_model, poems, by_transformers, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in small_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = PoemTokenizer.load(small_model)
    used = {
        id for line in poems.read_text(encoding="utf-8").splitlines()[:-5] for id in tokenizer.library.encode(line).ids
    }
    closed = sorted({*range(tokenizer.vocab_size)} - used - {0, 1, 2, 3, 4})
    (folder / GENERATION).write_text(json.dumps({"suppress_tokens": [0, 1, 2, 4, *closed]}))
    found = report(capsys, "--model", folder, "--data", poems, "--count", 0)
    assert found["loss"] == pytest.approx(by_transformers[:, 0].sum() / by_transformers[:, 1].sum(), rel=1e-5)
    assert found["loss_among_trained"] < found["loss"] and 0 < found["untrained_share"] < 0.1
    assert "loss_among_trained" not in report(capsys, "--model", small_model, "--data", poems, "--count", 0)


def test_what_it_writes_is_looked_at(small_model, poems, capsys):
    found = report(capsys, "--model", small_model, "--data", poems, "--count", 5, "--poems", 3)["written"]
    assert found["poems"] == 5 and 0 <= found["in_form"] <= 1 and found["longest_copied"] >= found["median_copied"]
    assert (
        main(["--model", str(small_model), "--data", str(poems), "--count", "3", "--poems", "3", "--device", "cpu"])
        == 0
    )
    said = capsys.readouterr().out
    assert "loss" in said and "in a form" in said and "longest run copied" in said


def test_it_says_it_in_chinese(small_model, poems, capsys):
    asked = ["--model", str(small_model), "--data", str(poems), "--count", "2", "--device", "cpu", "--lang", "zh"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    for words in ("首诗，", "损失   ", "困惑度（每字）", "至 32", "体裁", "其他", "模型自己写的 2 首诗", "整首相同"):
        assert words in said, words
    left = re.sub(r"\[UNK\]|token|\bid\b", "", said)
    assert not re.search("[A-Za-z]{2}", left), left


def test_copies_are_seen():
    tokenizer = PoemTokenizer.load(BUNDLED / "model")
    texts = (BUNDLED / "poems.txt").read_text(encoding="utf-8").splitlines()[:3]
    ids = [tokenizer.library.encode(text).ids for text in texts]
    store = store_of(ids, edges=(40, 60, 80))
    found = evaluation.written([texts[0], texts[1][:9] + "一一一一一", "一一一一一一一"], tokenizer, store)
    assert found["copied_whole"] == 1 and found["longest_copied"] == len(ids[0]) - 2 and found["median_copied"] == 9
    assert found["repeating"] == pytest.approx(2 / 3) and found["distinct"] == 1


words = st.lists(st.integers(1, 3), max_size=9)


@given(st.lists(words, min_size=1, max_size=6), st.lists(words, max_size=4))
def test_the_longest_run_is_the_longest(corpus, texts):
    def longest(text):
        runs = [text[a:b] for a in range(len(text)) for b in range(a + 4, len(text) + 1)]
        inside = [
            run for run in runs if any(run == poem[at : at + len(run)] for poem in corpus for at in range(len(poem)))
        ]
        return max(map(len, inside), default=0)

    store = store_of([poem for poem in corpus if poem] or [[1]], edges=(4, 6, 9))
    found = longest_copied(store, [np.array(text, np.int64) for text in texts])
    assert found.tolist() == [longest(text) for text in texts]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--data", "none.txt"], "none.txt"), (["--poems", "0"], "--poems 0.*out of range"),
        (["--count", "-1"], "--count -1.*out of range"), (["--temperature", "-1"], "--temperature.*out of range"), (["--model", "nowhere/at/all"], "no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_named(arguments, said, small_model, poems):
    given = {"--model": str(small_model), "--data": str(poems)} | dict(
        zip(arguments[::2], arguments[1::2], strict=True)
    )
    with pytest.raises(InputError, match=said):
        main([word for pair in given.items() for word in pair])


def test_line_breaks_are_no_characters(tmp_path, verses, small_model, capsys):
    """They are printed as such, copies of poems with them are seen, and forms and lengths are told without them."""
    lines = [line for line in verses.read_text(encoding="utf-8").splitlines() if len(line) == 24][:8]
    data = tmp_path / "poems.json"
    data.write_text(json.dumps([{"content": line.replace("。", "。\n", 1)} for line in lines]), encoding="utf-8")
    model = tmp_path / "run" / "model"
    fastpoem.fit(
        data,
        model=str(small_model),
        out=str(model.parent),
        max_steps=1,
        batch_size=4,
        val_poems=0,
        from_scratch=True,
        quiet=True,
        line_break="[unused1]",
        device="cpu",
    )
    found = report(capsys, "--model", model.parent, "--data", data, "--count", 0)
    assert found["by_form"] == [{**found["by_form"][0], "name": "五绝", "poems": 8}]
    assert [group["name"] for group in found["by_length"]] == ["up to 24"] and found["trained_on"]
    tokenizer = PoemTokenizer.load(model)
    ids = [tokenizer.library.encode(line.replace("。", "。[unused1]", 1)).ids for line in lines]
    own = evaluation.written([lines[0].replace("。", "。\n", 1)], tokenizer, store_of(ids, edges=(40,)))
    assert own["copied_whole"] == 1 and own["longest_copied"] == 25


@pytest.mark.parametrize(
    "options, said",
    [(dict(form=7), "form=7|form: 7"), (dict(seed=1.5), "seed"), (dict(tones=True), "tones.*no such setting")],
)
def test_options_of_generate_are_held_to_their_kinds(small_model, options, said):
    with pytest.raises(InputError, match=said):
        sample(small_model, "", **options)
