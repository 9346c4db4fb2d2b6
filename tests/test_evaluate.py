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
from fastpoem.config import TrainConfig
from fastpoem.corpus.copied import longest_copied
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.evaluate import main
from fastpoem.generation.poems import sample
from fastpoem.model import hub
from fastpoem.model.hub import BUNDLED
from fastpoem.model.vocabulary import GENERATION
from fastpoem.run import evaluated, evaluation
from tests.runs import settings, tiny_data
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


def text_with_copies(base, path):
    """Sixty poems, of which some come twice and three times, once with a space inside."""
    lines = (base / "poems.txt").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, *lines[:30], *lines[:9], *(f"{one[:3]} {one[3:]}" for one in lines[20:40])]))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        dict(), dict(seed=7, val_poems=3), dict(dedup=True, clean=True), dict(vocab="corpus"), dict(grow_vocab=True),
        dict(max_length=20, whole=True, buckets=3), dict(val_data="own.txt"), dict(convert="t2s"),
    ],
    ids=repr,
)  # fmt: skip
def test_of_a_run_it_is_the_runs_own_validation(base, tmp_path, monkeypatch, capsys, changes):
    """Its loss and accuracy, without a word on where the text is and how it was read; another run's model on the same poems likewise."""
    if "convert" in changes:
        pytest.importorskip("opencc")
    monkeypatch.chdir(tmp_path)
    text_with_copies(base, tmp_path / "poems.txt")
    (tmp_path / "own.txt").write_text(
        "龘龘，龘。\n" + "\n".join((BUNDLED / "poems.txt").read_text().splitlines()[1::40])
    )
    common = settings(base, data="poems.txt", batch_size=4, epochs=1, cache_dir="cache", quiet=True) | changes
    run, other = (fastpoem.fit(**common | more) for more in (dict(out="run"), dict(out="other", lr=3e-3)))
    monkeypatch.chdir("/")
    found = report(capsys, "--model", tmp_path / "run", "--count", 0, "--batch-size", 3)
    theirs = report(capsys, "--model", tmp_path / "other/model", "--data", tmp_path / "run", "--count", 0)
    for one, trained in ((found, run), (theirs, other)):
        loss = "loss_among_trained" if "vocab" in changes else "loss"
        assert one[loss] == pytest.approx(trained.metrics[-1]["val_loss"], rel=1e-6)
        assert one["accuracy"] == pytest.approx(trained.metrics[-1]["val_accuracy"]) or "vocab" in changes
        assert not one["trained_on"] and one["held_out"] == ("val_data" not in changes)
    assert found["loss"] != theirs["loss"] and found["poems"] == changes.get("val_poems", found["poems"])


def test_poems_are_held_out_of_a_text_as_training_does(base, small_model, tmp_path, capsys):
    """The loss of a model that was not trained on it is that of a run that learns nothing."""
    data = text_with_copies(base, tmp_path / "poems.txt")
    run = fastpoem.fit(data, model=str(small_model), out=str(tmp_path / "run"), lr=0.0, max_steps=1, val_poems=4, seed=5,
                       batch_size=4, device="cpu", quiet=True)  # fmt: skip
    asked = ["--data", data, "--val-poems", 4, "--count", 0]
    found = report(capsys, "--model", small_model, *asked, "--seed", 5)
    assert found["loss"] == pytest.approx(run.metrics[-1]["val_loss"], rel=1e-6)
    assert 0 < found["poems"] <= 4 and found["held_out"] and not found["trained_on"]
    assert found == report(capsys, "--model", small_model, "--data", tmp_path / "run", "--count", 0)
    mine = report(capsys, "--model", tmp_path / "run", *asked, "--seed", 5)
    assert mine["loss"] == pytest.approx(found["loss"]) and not mine["trained_on"]
    assert report(capsys, "--model", tmp_path / "run", *asked, "--seed", 6)["trained_on"]  # the run held out others
    assert main(["--model", str(small_model), *map(str, asked), "--lang", "en"]) == 0
    assert f"held out of {data}" in capsys.readouterr().out


def test_for_a_model_of_fewer_characters_they_are_the_same_poems(base, tmp_path):
    """To which more of them look like copies."""
    data = text_with_copies(base, tmp_path / "poems.txt")
    fastpoem.fit(**settings(base, data=str(data), out=str(tmp_path / "run"), max_steps=1, quiet=True))
    few = tmp_path / "few"
    few.mkdir()
    for file in (base / "model").iterdir():
        (few / file.name).write_bytes(file.read_bytes())
    (few / "vocab.txt").write_text("\n".join((few / "vocab.txt").read_text().splitlines()[:9]))
    readers = [
        evaluated.Reader(PoemTokenizer.load(folder), hub.read_config(folder)[0], None)
        for folder in (base / "model", few)
    ]
    own, theirs = (evaluated.of_run(tmp_path / "run", reader) for reader in readers)
    assert own.rows.tolist() == theirs.rows.tolist() and own.store.identity != theirs.store.identity
    assert theirs.store.manifest["counts"]["unknown"] > own.store.manifest["counts"]["unknown"]
    config = TrainConfig(data=(str(data),), val_poems=5)
    assert evaluated.of_text(config, readers[0]).rows.tolist() != evaluated.of_text(config, readers[1]).rows.tolist()


def test_what_has_no_validation_poems_is_named(base, small_model, tmp_path):
    data = text_with_copies(base, tmp_path / "poems.txt")
    (tmp_path / "few.txt").write_text("\n".join(data.read_text().splitlines()[:10]))
    for out, changes in (("run", {}), ("none", dict(val_poems=0))):
        fastpoem.fit(**settings(base, data=str(data), out=str(tmp_path / out), max_steps=1, quiet=True, **changes))
    run, none = str(tmp_path / "run"), str(tmp_path / "none")
    for model, arguments, said in (
        (small_model, [], "--data: must be given: .*small is no run; name poems"),
        (small_model, ["--data", run, str(data)], "run: is a run, which stands alone"),
        (run, ["--val-poems", "3"], "--val-poems 3: .*run has its own; drop it"),
        (small_model, ["--data", none], "none: held no poems out; name poems with --data"),
        (small_model, ["--data", str(data), "--val-poems", "0"], "--val-poems 0: out of range"),
        (small_model, ["--data", str(tmp_path / "few.txt"), "--val-poems", "2"], "nothing out of 10 poems: 5%"),
    ):
        with pytest.raises(InputError, match=said):
            main(["--model", str(model), *arguments])
    data.write_text(data.read_text() + "\n春眠不觉晓，处处闻啼鸟。")
    with pytest.raises(InputError, match=r"poems\.txt: is not as it was when .*run was trained on it; bring it back"):
        main(["--model", run])
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(InputError, match=r"run: holds no config\.json"):
        main(["--model", run])


@pytest.mark.parametrize(
    "options, said",
    [(dict(form=7), "form=7|form: 7"), (dict(seed=1.5), "seed"), (dict(tones=True), "tones.*no such setting")],
)
def test_options_of_generate_are_held_to_their_kinds(small_model, options, said):
    with pytest.raises(InputError, match=said):
        sample(small_model, "", **options)
