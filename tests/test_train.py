"""The main job: the notebook's numbers under its recipe, Hugging Face's masked loss under ours, and a folder that transformers loads."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, GPT2LMHeadModel, TextGenerationPipeline

import fastpoem
from benchmarks import notebook
from fastpoem.corpus.plan import held_out_rows
from fastpoem.errors import InputError
from fastpoem.model.hub import BUNDLED
from tests.runs import settings, tiny_data, tiny_model


def steps(rows):
    return [row for row in rows if "event" not in row]


def epochs(rows):
    return [row for row in rows if row.get("event") == "epoch"]


def assert_like_the_notebook(data, model, tmp_path, count, **changes):
    """Loss, accuracy and learning rate of every step, 1e-4 relative."""
    theirs = notebook.train(
        notebook.load_model(model, from_scratch=False, dropout=0.0, seed=0), BertTokenizer.from_pretrained(model),
        notebook.Poems(data), shuffle=False, max_steps=count, log_every=1, **changes,
    )  # fmt: skip
    run = fastpoem.fit(
        data=str(data), model=str(model), out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), recipe="notebook",
        shuffle=False, dropout=0.0, max_steps=count, log_every=1, device="cpu", **changes,
    )  # fmt: skip
    rows = steps(run.metrics)
    assert len(rows) == count
    for row, expected in itertools.zip_longest(rows, theirs):
        for name in ("step", "epoch", "lr", "loss", "accuracy"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-9), (row, expected)


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"lr": 3e-3, "epochs": 4, "batch_size": 32}])
def test_notebook_recipe_is_the_notebook(verses, small_model, tmp_path, changes):
    assert_like_the_notebook(verses, small_model, tmp_path, 50, **changes)


def test_notebook_recipe_at_the_full_shape(shared_poems, shared_model, tmp_path):
    """A few steps at the real shape, on poems short enough for the test's budget."""
    from fastpoem.model import hub
    from fastpoem.model.gpt2 import GPT2

    config, raw = hub.read_config(shared_model)
    weights = GPT2(config)
    weights.initialise(0)
    model = tmp_path / "model"
    hub.save_folder(
        model, weights.state_dict(), raw, [shared_model / "vocab.txt", shared_model / "tokenizer_config.json"]
    )
    lines = [line for line in notebook.Poems(shared_poems, 4000).lines if len(line) <= 32][:6]
    data = tmp_path / "short.txt"
    data.write_text("\n".join(lines), encoding="utf-8")
    assert_like_the_notebook(data, model, tmp_path, 3, batch_size=2)


@pytest.fixture(scope="module")
def masked_loss(small_model):
    """Token-weighted loss and accuracy of Hugging Face's masked loss (labels -100 on padding) over poems."""
    tokenizer = BertTokenizer.from_pretrained(small_model)
    model = GPT2LMHeadModel.from_pretrained(small_model).eval()

    @torch.no_grad()
    def measure(poems):
        loss = correct = count = 0
        for start in range(0, len(poems), 16):
            batch = tokenizer(poems[start : start + 16], padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
            real = labels[:, 1:] != -100
            loss += out.loss.item() * real.sum().item()
            correct += (out.logits.argmax(-1)[:, :-1] == labels[:, 1:])[real].sum().item()
            count += real.sum().item()
        return loss / count, correct / count

    return measure


@pytest.mark.parametrize("batching", ["auto", "bucket", "pack", "pad"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_hugging_faces_masked_loss(verses, small_model, tmp_path, masked_loss, batching, shuffle):
    whole = 29 * 16  # 464 of the 470 verses: an order that leaves some out would leave out others
    data = tmp_path / "verses.txt"
    data.write_text("\n".join(notebook.Poems(verses).lines[:whole]), encoding="utf-8")
    run = fastpoem.fit(
        data=str(data), model=str(small_model), out=str(tmp_path / "run"), batching=batching, shuffle=shuffle, lr=0.0,
        dropout=0.0, val_poems=0, device="cpu",
    )  # fmt: skip
    (row,) = epochs(run.metrics)
    loss, accuracy = masked_loss(notebook.Poems(data).lines)
    assert row["mean_loss"] == pytest.approx(loss, rel=2e-4)
    assert row["mean_accuracy"] == pytest.approx(accuracy, rel=2e-4)
    assert row["step"] == 29


def test_validation_is_the_masked_loss_of_what_was_held_out(verses, small_model, tmp_path, masked_loss):
    run = fastpoem.fit(
        data=str(verses), model=str(small_model), out=str(tmp_path / "run"), lr=0.0, dropout=0.0, device="cpu"
    )
    (row,) = epochs(run.metrics)
    lines = notebook.Poems(verses).lines
    held = held_out_rows(len(lines), None, seed=0)
    assert len(held) == len(lines) // 20 and row["step"] == (len(lines) - len(held)) // 16
    loss, accuracy = masked_loss([lines[index] for index in held])
    assert row["val_loss"] == pytest.approx(loss, rel=2e-4)
    assert row["val_accuracy"] == pytest.approx(accuracy, rel=2e-4)


def test_learns_and_the_model_speaks_through_transformers(tmp_path):
    """The embedded default, shortened: the loss falls, the files are those promised, the pipeline writes verse."""
    run = fastpoem.fit(out=str(tmp_path / "run"), epochs=2, log_every=10, device="cpu")
    rows = steps(run.metrics)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == run.metrics
    expected = {
        "step",
        "epoch",
        "lr",
        "loss",
        "loss_mean",
        "accuracy",
        "accuracy_mean",
        "grad_norm",
        "poems",
        "tokens",
        "tokens_per_s",
        "poems_per_s",
        "seconds",
    }
    assert set(rows[0]) == expected
    assert [row["step"] for row in rows] == [1, 10, 20, 27, 30, 40, 50, 54]
    assert {"epoch", "mean_loss", "val_loss", "val_accuracy"} < set(epochs(run.metrics)[0])
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["settings"]["epochs"] == 2 and config["store"]["identity"] and config["versions"]["torch"]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000027", "step-00000054"]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "run/model")
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "run/model")
    assert TextGenerationPipeline(model, tokenizer)("春风", max_new_tokens=20)[0]["generated_text"].startswith("春")
    poems = run.generate("春江", count=3, seed=1)
    assert len(poems) == 3 and all(poem.startswith("春江") for poem in poems)
    assert poems == run.generate("春江", count=3, seed=1) != run.generate("春江", count=3, seed=2)
    assert len(set(run.generate("月", count=2, temperature=0))) == 1


@pytest.mark.parametrize("batching", ["bucket", "pack", "pad"])
def test_resumed_is_untouched(small_model, tmp_path, batching):
    """Stopped by max_steps in the middle of an epoch and resumed: same rows, same weights, bit for bit, dropout on."""
    common = dict(model=str(small_model), data=None, batching=batching, epochs=2, log_every=3, device="cpu", lr=1e-3)
    whole = fastpoem.fit(out=str(tmp_path / "whole"), **common)
    fastpoem.fit(out=str(tmp_path / "cut"), max_steps=37, **common)
    cut = fastpoem.fit(out=str(tmp_path / "cut"), resume=True, **common)
    timings = {"tokens_per_s", "poems_per_s", "seconds"}
    plain = [[{k: v for k, v in row.items() if k not in timings} for row in run.metrics] for run in (whole, cut)]
    assert plain[0] == plain[1]
    on_disk = [json.loads(line) for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert on_disk == cut.metrics
    weights = [GPT2LMHeadModel.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_schedules():
    from fastpoem.engine.optim import learning_rate

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    shape = dict(steps_per_epoch=3, epochs=4, last_step=12, warmup=0)
    for epoch in range(4):
        for within in range(3):
            assert learning_rate("epoch-cosine", 0.5, epoch * 3 + within, **shape) == pytest.approx(
                optimizer.param_groups[0]["lr"]
            )
        optimizer.step()
        reference.step()
    assert learning_rate("cosine", 0.5, 6, **shape) == pytest.approx(0.25)
    assert learning_rate("cosine", 0.5, 12, **shape) == pytest.approx(0)
    assert learning_rate("constant", 0.5, 11, **shape) == 0.5
    warm = [learning_rate("constant", 1.0, step, **{**shape, "warmup": 3}) for step in range(5)]
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_fp32_update_is_adamw_and_bf16_stays_near_it(small_model, tmp_path):
    common = dict(
        model=str(small_model),
        max_steps=27,
        log_every=1,
        device="cpu",
        lr=1e-3,
        dropout=0.0,
        val_poems=0,
        batching="bucket",
    )  # auto packs in fp32 only
    exact, rough = (
        np.array([row["loss"] for row in steps(fastpoem.fit(out=str(tmp_path / p), precision=p, **common).metrics)])
        for p in ("fp32", "bf16")
    )
    assert np.abs(rough / exact - 1).max() < 0.01
    assert np.abs(rough / exact - 1).max() > 0  # it really was another precision


@pytest.mark.parametrize("settings, says", [
    (dict(epochs=0), "epochs=0: out of range"),
    (dict(lr=math.nan), "lr=nan: out of range"),
    (dict(lr=-1.0), "lr=-1.0"),
    (dict(max_grad_norm=math.nan), "max_grad_norm=nan"),
    (dict(dropout=1.0), "dropout=1.0"),
    (dict(batch_size=100_000), "batch_size=100000"),
    (dict(batch_size=4000), "fewer than a batch"),
    (dict(max_length=4000), "the model has 128 positions"),
    (dict(device="cuda:70"), "there is no such device here; this machine has cpu" if torch.version.cuda else "is a CPU build"),
    (dict(device="tpu"), "no such kind of device"),
    (dict(model="/no/such/folder"), "no such folder"),
    (dict(data="/no/such/poems.txt"), "poems.txt"),
    (dict(nonsense=1), "no such setting"),
    (dict(batching="bag"), "is not one of them"),
    (dict(epochs=1.5), "wrong kind"),
    (dict(resume=True, out=None), "resume=True"),
    (dict(batching="pack", loss_on_padding=True), "loss_on_padding=True"),
])  # fmt: skip
def test_wrong_settings_are_named_and_nothing_is_made(tmp_path, settings, says):
    with pytest.raises(InputError, match=says):
        fastpoem.fit(**{"out": str(tmp_path / "run"), "device": "cpu", **settings})
    assert not (tmp_path / "run").exists()


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "fastpoem.train", *arguments], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("arguments, says", [
    (["--batchsize", "3"], "did you mean --batch-size?"),
    (["--epochs", "many"], "--epochs"),
    (["--batching", "bag"], "bucket"),
    (["--data"], "--data"),
    (["stray"], "stray"),
    (["--lr", "nan"], "--lr nan: out of range"),
])  # fmt: skip
def test_wrong_flags_are_one_line_and_exit_2(tmp_path, arguments, says):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_dash_or_underscore_and_a_flag_beats_its_recipe():
    from fastpoem.cli import parse
    from fastpoem.config import TrainConfig, with_defaults

    argv = ["--recipe", "notebook", "--batching", "bucket", "--val_poems", "7", "--data", "x"]
    config = parse(TrainConfig, argv, default=with_defaults(parse(TrainConfig, argv)))
    assert (config.batching, config.val_poems, config.loss_on_padding, config.precision) == ("bucket", 7, True, "fp32")


def test_a_second_run_does_not_write_over_the_first(tmp_path):
    common = dict(out=str(tmp_path / "run"), device="cpu", max_steps=2)
    fastpoem.fit(**common)
    with pytest.raises(InputError, match="holds a run already"):
        fastpoem.fit(**common)
    with pytest.raises(InputError, match="batch_size was 16, is 8"):
        fastpoem.fit(resume=True, batch_size=8, **common)


def test_importing_the_package_and_training_from_a_folder_spare_transformers():
    code = "import sys, fastpoem.run.fit, fastpoem.train; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    code = "import sys, fastpoem, fastpoem.train, fastpoem.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_tokenizer_that_is_not_berts_trains_and_writes(tmp_path):
    """Bytes and pairs of them: no vocab.txt, no [CLS], no [UNK]."""
    tiny_data(tmp_path / "poems.txt", BUNDLED / "poems.txt")
    folder = tiny_model(tmp_path / "model", BUNDLED / "model")
    (folder / "vocab.txt").unlink()
    end = "<|endoftext|>"
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train([str(tmp_path / "poems.txt")], trainer)
    library.post_processor = processors.TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    run = fastpoem.fit(**settings(tmp_path, out=str(tmp_path / "run"), max_steps=2, vocab="corpus"))
    for poem in run.generate("春江", count=4, seed=1, max_length=20):
        assert poem.startswith("春江") and len(poem) > 2
