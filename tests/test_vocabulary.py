"""--vocab corpus: the same arithmetic over fewer ids, and every row back in what leaves the run."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import fastpoem
from fastpoem.config import from_kwargs
from fastpoem.corpus.feed import Feed
from fastpoem.corpus.plan import Step
from fastpoem.corpus.store import TokenStore, prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.vocabulary import ROUND, kept_ids, numbering
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.model.hub import BUNDLED
from fastpoem.model.vocabulary import EMBEDDING, GENERATION, never_written
from fastpoem.run.console import Voice
from fastpoem.run.fit import assembled
from tests.runs import assert_same, settings, tiny_data, tiny_model
from tests.test_resume import told_at

SPECIAL = (0, 1, 2, 3)
BATCHINGS = [
    dict(), dict(batching="pack"), dict(batching="pad"), dict(recipe="notebook"), dict(precision="bf16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """60 poems, and a model with weights whose vocabulary has three times the ids they use."""
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny_data(folder / "poems.txt", BUNDLED / "poems.txt")
    tiny_model(folder / "shape", BUNDLED / "model")
    config, raw = hub.read_config(folder / "shape")
    weights = GPT2(config)
    weights.initialise(3)
    hub.save_folder(
        folder / "model",
        weights.state_dict(),
        raw,
        [folder / "shape" / n for n in ("vocab.txt", "tokenizer_config.json")],
    )
    return folder


@pytest.fixture(scope="module")
def store(base) -> TokenStore:
    return prepare_store(base / "poems.txt", PoemTokenizer.load(base / "model"), base / "store", max_length=64)


def by_hand(store: TokenStore) -> set[int]:
    return {*SPECIAL} | {int(one) for row in range(store.rows) for one in store[row]}


def test_ids_kept_are_those_that_occur_rounded_up(store):
    occurring = by_hand(store)
    ids, count = kept_ids(store, SPECIAL, store.vocab_size)
    assert count == len(occurring) < store.vocab_size // 2
    assert len(ids) % ROUND == 0 and len(ids) - count < ROUND and (np.diff(ids) > 0).all()
    assert occurring <= set(ids.tolist())
    table = numbering(ids, store)
    assert table.dtype == store.dtype and (ids[table[ids]] == ids).all()
    everything, _ = kept_ids(store, range(store.vocab_size - 3), store.vocab_size)
    assert (everything == np.arange(store.vocab_size)).all()  # there is nothing more to round up with
    with_room, _ = kept_ids(store, SPECIAL, store.vocab_size + 1000)  # an embedding larger than the tokenizer
    assert (numbering(with_room, store)[ids] == table[ids]).all()


@pytest.mark.parametrize("batching", ["bucket", "pad", "pack"])
def test_sent_or_resident_the_poems_are_the_same(store, batching):
    """A GPU keeps the whole corpus; elsewhere a step's ids are sent."""
    ids, _ = kept_ids(store, SPECIAL, store.vocab_size)
    sent, resident = (Feed(store, batching, table=numbering(ids, store)) for _ in range(2))
    corpus = resident.corpus()
    where, index = store.locate(np.arange(store.rows))
    step = Step(store.buckets[-1].length, where, index)
    for one, source in ((sent(step), None), (resident(step), corpus)):
        source = one.source if source is None else source
        assert source is not None
        for row, (start, length) in enumerate(one.where.tolist()):
            assert (ids[source[start : start + length].numpy()] == store[row]).all()


@pytest.mark.parametrize("changes", BATCHINGS, ids=repr)
def test_all_ids_kept_is_the_plain_run(base, tmp_path, changes):
    characters = sorted(set((base / "poems.txt").read_text(encoding="utf-8")) - {"\n"})
    tiny_model(tmp_path / "model", BUNDLED / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    (tmp_path / "model/vocab.txt").write_text("\n".join(words), encoding="utf-8")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"vocab_size": len(words)}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    common = settings(base, model=str(tmp_path / "model"), epochs=1, **changes)
    for vocab in ("all", "corpus"):
        fastpoem.fit(**common, vocab=vocab, out=str(tmp_path / vocab))
    assert_same(tmp_path / "all", tmp_path / "corpus", settings=False)


@pytest.mark.parametrize("changes", BATCHINGS, ids=repr)
def test_first_loss_is_the_whole_model_s_over_the_ids_kept(base, store, tmp_path, changes):
    """Against the whole model in float64, its logits taken where an id is kept."""
    changes = dict(from_scratch=False, dropout=0.0, vocab="corpus", epochs=1, val_poems=0) | changes
    config = from_kwargs(**settings(base, out=str(tmp_path / "run"), **changes))
    model = GPT2(hub.read_config(base / "model")[0])
    hub.load_weights(model, base / "model")
    ids = torch.from_numpy(kept_ids(store, SPECIAL, store.vocab_size)[0])
    with assembled(config, Voice(quiet=True)) as (loop, _):
        step = loop.order(0, 0)
        poems = [
            torch.from_numpy(store.buckets[b].tokens[i, : store.buckets[b].lengths[i]].astype(np.int64))
            for b, i in zip(step.bucket.tolist(), step.index.tolist(), strict=True)
        ]
        padded = torch.nn.utils.rnn.pad_sequence(poems, batch_first=True, padding_value=store.pad_id)  # (B, L)
        targets = torch.nn.utils.rnn.pad_sequence(
            poems, batch_first=True, padding_value=store.pad_id if config.loss_on_padding else -100
        )[:, 1:].flatten()
        model.double().eval()
        logits = model(padded[:, :-1])[:, ids]  # (B * T, K)
        numbers = torch.where(targets < 0, targets, torch.searchsorted(ids, targets.clamp(min=0)))
        loop.model.train()
        loop.one_step()
        assert loop.model(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, len(ids))
        expected = F.cross_entropy(logits, numbers).item()
        assert loop.step.result().loss == pytest.approx(expected, rel=2e-3 if config.precision == "bf16" else 1e-5)


def test_other_rows_keep_their_values_and_transformers_loads_them(base, store, tmp_path):
    run = fastpoem.fit(**settings(base, from_scratch=False, vocab="corpus", out=str(tmp_path / "run"), epochs=1))
    before = load_file(base / "model/model.safetensors")[EMBEDDING]
    ids, _ = kept_ids(store, SPECIAL, store.vocab_size)
    others = np.setdiff1d(np.arange(store.vocab_size), ids)
    newest = max((run.folder / "checkpoints").iterdir())
    for folder in (run.model, newest):
        model = GPT2LMHeadModel.from_pretrained(folder)
        assert model.config.vocab_size == len(before) == len(model.transformer.wte.weight)
        assert torch.equal(model.transformer.wte.weight[others], before[others])
        assert (model.transformer.wte.weight[ids] != before[ids]).any(1).all()
    assert torch.equal(*(load_file(path / "model.safetensors")[EMBEDDING] for path in (run.model, newest)))
    assert len(load_file(newest / "optimizer.safetensors")["exp_avg." + EMBEDDING]) == len(ids)


@pytest.mark.parametrize("changes", BATCHINGS, ids=repr)
def test_resumed_is_untouched_even_without_the_weights_it_began_with(base, tmp_path, monkeypatch, changes):
    common = dict(from_scratch=False, vocab="corpus", **changes)
    fastpoem.fit(**settings(base, **common, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        told_at(patch, 17)
        stopped = fastpoem.fit(**settings(base, **common, out=str(tmp_path / "run")))
        assert stopped.stopped_by == signal.SIGTERM
    again = settings(base, **common | dict(model=str(base / "shape")), out=str(tmp_path / "run"), resume=True)
    fastpoem.fit(**again)  # of that folder only shape and tokenizer are read
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_what_was_not_trained_is_not_written(base, store, tmp_path):
    """Sampled from the whole distribution, to which untrained rows would contribute most."""
    run = fastpoem.fit(**settings(base, vocab="corpus", out=str(tmp_path / "run"), max_steps=1))
    model = GPT2LMHeadModel.from_pretrained(run.model)
    ids, _ = kept_ids(store, SPECIAL, store.vocab_size)
    start = torch.tensor([[2]])
    torch.manual_seed(0)
    written = model.generate(start, max_new_tokens=40, num_return_sequences=8, do_sample=True, top_k=0, temperature=2.0)
    assert np.isin(written.numpy(), ids).all()
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (3, 0)
    model.generation_config.suppress_tokens = None
    written = model.generate(start, max_new_tokens=40, num_return_sequences=8, do_sample=True, top_k=0, temperature=2.0)
    assert not np.isin(written.numpy(), ids).all()  # so the test can fail
    options = dict(count=20, top_k=0, temperature=2.0, seed=1, max_length=40)
    tokenizer = PoemTokenizer.load(run.model)

    def ours() -> np.ndarray:
        return tokenizer.encode(run.generate("春", **options), 512)[0]

    assert np.isin(ours(), ids).all()
    (run.model / GENERATION).unlink()
    assert not np.isin(ours(), ids).all()


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"suppress_tokens": [1, 1.0]}', '{"suppress_tokens": [-1]}',
                                     '{"suppress_tokens": {"1": 2}}', '{"suppress_tokens": [99999999]}'])  # fmt: skip
def test_a_strange_list_of_what_is_never_written_is_refused(tmp_path, content):
    (tmp_path / GENERATION).write_text(content)
    with pytest.raises(InputError, match=GENERATION):
        never_written(tmp_path, 100)


def test_any_model_folder_says_what_is_never_written(tmp_path):
    assert never_written(tmp_path, 100) == []
    for content, expected in (
        ("{}", []),
        ("[]", []),
        ('{"suppress_tokens": null}', []),
        ('{"suppress_tokens": [0, 99]}', [0, 99]),
    ):
        (tmp_path / GENERATION).write_text(content)
        assert never_written(tmp_path, 100) == expected
    (tmp_path / GENERATION).write_text(json.dumps({"suppress_tokens": [*range(100)]}))
    with pytest.raises(InputError, match="no id to write"):
        never_written(tmp_path, 100)


def test_a_store_serves_both(base, store, tmp_path):
    """The store on disk is the same, whatever is trained of it."""
    one, other = (
        fastpoem.fit(**settings(base, data=data, vocab="corpus", out=str(tmp_path / name), epochs=1))
        for data, name in ((str(base / "poems.txt"), "text"), (str(store.path), "store"))
    )
    assert_same(one.folder, other.folder)
    store.verify()


def test_it_says_how_many_and_what_the_sample_lacks(base, tmp_path, capsys):
    fastpoem.fit(**settings(base, vocab="corpus", out=str(tmp_path / "run"), max_steps=1, sample="龜"))
    said = capsys.readouterr().out
    assert " ids occur: " in said and "are trained, the others keep their weights" in said
    words, text = ((base / name).read_text(encoding="utf-8") for name in ("model/vocab.txt", "poems.txt"))
    rare = next(word for word in words.splitlines()[::-1] if len(word) == 1 and word not in text)
    fastpoem.fit(**settings(base, vocab="corpus", out=str(tmp_path / "rare"), max_steps=1, sample=rare))
    assert "--sample has characters that no poem has" in capsys.readouterr().out
