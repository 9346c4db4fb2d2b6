"""--grow-vocab: every character of the text is one id, in training, in the folder and in what is written."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, GPT2LMHeadModel

import fastpoem
from fastpoem.corpus.grow import grown, lacking
from fastpoem.corpus.read import Block
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.model.grow import draw_rows
from tests import runs
from tests.runs import assert_same, tiny_data, tiny_model
from tests.test_corpus_tokenize import VARIANTS, folder_of, line
from tests.test_resume import told_at

EMBEDDING = "transformer.wte.weight"
RARE = ["龘䶮□□靐春。", "𰻝𰻝面，龘龘龘。", "〇〇年□，αβ。", "😀靐靐靐靐。"]
NEW = "靐龘〇𰻝□䶮αβ😀"  # the most frequent first, then in the order of Unicode


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """60 poems and four with characters that the bundled vocabulary lacks; a model with weights."""
    folder = tmp_path_factory.mktemp("grow")
    tiny_data(folder / "poems.txt", hub.BUNDLED / "poems.txt")
    text = (folder / "poems.txt").read_text(encoding="utf-8")
    (folder / "poems.txt").write_text("\n".join([text, *RARE * 3]), encoding="utf-8")
    tiny_model(folder / "shape", hub.BUNDLED / "model")
    config, raw = hub.read_config(folder / "shape")
    weights = GPT2(config)
    weights.initialise(3)
    files = [folder / "shape" / name for name in ("vocab.txt", "tokenizer_config.json")]
    hub.save_folder(folder / "model", weights.state_dict(), raw, files)
    return folder


def run_of(base: Path, out: Path, **changes):
    return fastpoem.fit(**runs.settings(base, out=str(out), grow_vocab=True, **changes))


def of(base: Path, lines: list[str]) -> tuple[PoemTokenizer, list[str]]:
    tokenizer = PoemTokenizer.load(base)
    return tokenizer, lacking(tokenizer, [Block(lines, 0)])


def saved(tokenizer: PoemTokenizer, folder: Path) -> Path:
    folder.mkdir()
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    shutil.copy(hub.BUNDLED / "model/config.json", folder)
    return folder


def test_the_characters_that_are_missing_by_how_often_they_come(base):
    tokenizer, chars = of(base / "model", RARE)
    unknown = [char for char in dict.fromkeys("".join(RARE)) if tokenizer.encode([char], 9)[0][1] == tokenizer.unk_id]
    counts = {char: "".join(RARE).count(char) for char in unknown}
    assert chars == sorted(unknown, key=lambda char: (-counts[char], char))
    assert {*"靐龘䶮𰻝😀"} <= {*chars} and not {*"春。"} & {*chars}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_character_is_one_id_for_us_and_for_transformers(tmp_path, variant):
    before, chars = of(folder_of(tmp_path, variant), RARE)
    tokenizer = grown(before, chars)
    folder = saved(tokenizer, tmp_path / "saved")
    assert PoemTokenizer.load(folder).fingerprint == tokenizer.fingerprint
    assert grown(before, chars).fingerprint == tokenizer.fingerprint != before.fingerprint
    new = range(before.vocab_size, tokenizer.vocab_size)
    inside = {index for token, index in tokenizer.library.get_vocab(True).items() if token.startswith("##")}
    new = [index for index in new if index not in inside]  # each letter is one inside a word too
    assert len(new) == len(chars) > 4
    beside = {tokenizer.library.token_to_id(" ")}  # of the variant where spaces are a token
    for char, index in zip(chars, new, strict=True):
        assert [i for i in tokenizer.library.encode(char, add_special_tokens=False).ids if i not in beside] == [index]
    for row in RARE:
        ids = tokenizer.encode([row], 99)[0].tolist()
        assert tokenizer.unk_id not in ids
        for kind in (AutoTokenizer, BertTokenizer):
            theirs = kind.from_pretrained(folder)
            assert theirs(row, add_special_tokens=False).input_ids == ids[1:-1]
            assert len(theirs) == max(theirs.get_vocab().values()) + 1 == tokenizer.vocab_size
    for token in before.library.get_vocab(True):  # and no id is another's now
        assert tokenizer.library.token_to_id(token) == before.library.token_to_id(token)


def test_words_of_letters_stay_words(tmp_path):
    text = ["don't worry 2024, Αλφα Привет", "春wor江 w, o"]
    tokenizer = grown(*of(folder_of(tmp_path, "plain"), text))
    assert not lacking(tokenizer, [Block(text, 0)])
    folder = saved(tokenizer, tmp_path / "saved")
    for row in text:
        ids = tokenizer.encode([row], 99)[0].tolist()
        assert tokenizer.unk_id not in ids and len(ids) == 2 + len(row.replace(" ", ""))
        for kind in (AutoTokenizer, BertTokenizer):
            theirs = kind.from_pretrained(folder)
            assert theirs(row, add_special_tokens=False).input_ids == ids[1:-1]
            assert theirs.decode(ids[1:-1], clean_up_tokenization_spaces=False).count(" ") < 12
            assert "worry" not in row or "worry 2024" in theirs.decode(ids[1:-1])


PIECES = ["<pad>", "<s>", "</s>", "<unk>", "春", "。", "面", "，"]
LIBRARIES = {
    "BPE": lambda: models.BPE({piece: index for index, piece in enumerate(PIECES)}, [], unk_token="<unk>"),
    "Unigram": lambda: models.Unigram([(piece, -1.0) for piece in PIECES], 3),
    "WordLevel": lambda: models.WordLevel({piece: index for index, piece in enumerate(PIECES)}, "<unk>"),
}


@pytest.mark.parametrize("made", LIBRARIES.values(), ids=LIBRARIES)
def test_tokenizers_of_other_kinds_grow_too(tmp_path, made):
    folder = tmp_path / "model"
    folder.mkdir()
    library = Tokenizer(made())
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names))
    before, chars = of(folder, RARE)
    tokenizer = grown(before, chars)
    assert tokenizer.vocab_size == len(PIECES) + len(chars) and len(chars) > 8
    theirs = AutoTokenizer.from_pretrained(saved(tokenizer, tmp_path / "saved"))
    for row in RARE:
        ids = tokenizer.encode([row], 99)[0].tolist()
        assert len(ids) == len(row) + 2 and tokenizer.unk_id not in ids
        assert theirs(row, add_special_tokens=False).input_ids == ids[1:-1]


@settings(deadline=None, max_examples=25)
@given(st.lists(line, min_size=1, max_size=4))
def test_whatever_a_text_holds_the_table_and_the_library_agree_and_old_ids_stay(lines):
    before = PoemTokenizer.load(hub.BUNDLED / "model")
    lines = [one.replace("\n", " ").replace("\r", " ").replace("\0", " ") for one in lines]
    tokenizer = grown(before, lacking(before, [Block(lines, 0)]))
    ids, lengths, _ = tokenizer.encode(lines, 512)
    wanted = [encoding.ids for encoding in tokenizer.library.encode_batch(lines)]
    assert lengths.tolist() == list(map(len, wanted)) and ids.tolist() == [one for row in wanted for one in row]
    assert not lacking(tokenizer, [Block(lines, 0)])


def test_new_rows_are_drawn_about_the_mean_of_the_old(base, tmp_path):
    run = run_of(base, tmp_path / "run", from_scratch=False, max_steps=1, lr=0.0)
    before, after = (load_file(folder / "model.safetensors")[EMBEDDING] for folder in (base / "model", run.model))
    assert torch.equal(after[: len(before)], before)
    new, (std, mean) = after[len(before) :], torch.std_mean(before, dim=0)
    assert len(new) == len(of(base / "model", RARE)[1]) + len("αβ")  # which are a beginning and a piece each
    assert ((new - mean).abs() < 0.5 * std).all() and len(new.unique(dim=0)) == len(new)
    again = torch.cat([before, torch.zeros_like(new)])
    draw_rows(again, range(len(before), len(again)), seed=0)
    assert torch.equal(again, after)


def test_the_model_says_of_old_characters_what_it_said(base, tmp_path):
    """k new ids among n take at most k / (n + k) of the probability, whatever was said before."""
    run = run_of(base, tmp_path / "run", from_scratch=False, max_steps=1, lr=0.0)
    models = [GPT2LMHeadModel.from_pretrained(folder).eval() for folder in (base / "model", run.model)]
    ids = torch.tensor([PoemTokenizer.load(base / "model").encode(["春江潮水连海平"], 64)[0].tolist()])
    with torch.no_grad():
        before, after = (model(ids).logits.softmax(-1) for model in models)
    rows = before.shape[-1]
    taken = after[..., rows:].sum(-1)
    assert (taken < 1.1 * (after.shape[-1] - rows) / after.shape[-1]).all()
    assert torch.allclose(after[..., :rows], before * (1 - taken[..., None]), rtol=1e-4)


@pytest.mark.parametrize("changes", [dict(from_scratch=False, vocab="corpus"), dict(from_scratch=True, batching="pack")],
                         ids=repr)  # fmt: skip
def test_resumed_is_untouched(base, tmp_path, monkeypatch, changes):
    run_of(base, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        told_at(patch, 17)
        assert run_of(base, tmp_path / "run", **changes).stopped_by == signal.SIGTERM
    again = tmp_path / "run/checkpoints"
    for name in (None, max(again.iterdir()).name):  # from the folder it began with; from one whose tokenizer is grown
        other = shutil.copytree(tmp_path / "run", tmp_path / f"resumed-{name}")
        model = {} if name is None else {"model": str(shutil.copytree(again / name, tmp_path / "grown"))}
        run_of(base, other, resume=True, **changes | model)
        assert_same(tmp_path / "whole", other)


def test_another_text_is_another_vocabulary(base, tmp_path):
    run_of(base, tmp_path / "run", max_steps=3)
    (tmp_path / "poems.txt").write_text(
        (base / "poems.txt").read_text(encoding="utf-8") + "\n鱻鱻，春。", encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"cannot be resumed: .*vocab_size was"):
        run_of(base, tmp_path / "run", resume=True, data=str(tmp_path / "poems.txt"))


def test_what_was_missing_can_be_written_and_the_run_says_which(base, tmp_path, capsys):
    (tmp_path / "poems.txt").write_text("龘靐，□□。\n" * 120, encoding="utf-8")
    run = run_of(base, tmp_path / "run", data=str(tmp_path / "poems.txt"), epochs=8, dropout=0.0, lr=2e-2)
    said = capsys.readouterr().out
    assert "--grow-vocab: 3 characters" in said and "□ 靐 龘" in said
    assert run.generate("龘", temperature=0) == ["龘靐，□□。"]
    assert json.loads((run.model / "config.json").read_text())["vocab_size"] == 1904
    assert (run.model / "vocab.txt").read_text(encoding="utf-8").split("\n")[1901:1904] == ["□", "靐", "龘"]


def test_nothing_missing_changes_nothing(base, tmp_path, capsys):
    data = str(tiny_data(tmp_path / "poems.txt", hub.BUNDLED / "poems.txt"))
    run = run_of(base, tmp_path / "run", data=data, max_steps=1)
    assert "lacks no character" in capsys.readouterr().out
    assert PoemTokenizer.load(run.model).fingerprint == PoemTokenizer.load(base / "model").fingerprint


def test_a_store_has_no_text_to_grow_from(base, tmp_path):
    prepare_store(base / "poems.txt", PoemTokenizer.load(base / "model"), tmp_path / "store", max_length=64)
    with pytest.raises(InputError, match=r"grow_vocab=True: .*no text any more; give the text itself"):
        run_of(base, tmp_path / "run", data=str(tmp_path / "store"))
    run = run_of(base, tmp_path / "run", max_steps=1)
    whole = prepare_store(base / "poems.txt", PoemTokenizer.load(run.model), tmp_path / "whole", max_length=64)
    run_of(base, tmp_path / "again", model=str(run.model), data=str(whole.path), max_steps=1)


@pytest.mark.parametrize("changes, rows", [(dict(from_scratch=True), 1901), (dict(grow_vocab=True), 1912), (dict(), 0)])
def test_more_ids_than_rows(base, tmp_path, changes, rows):
    """An embedding of 1,000 rows under a tokenizer of 1,901 ids."""
    model = shutil.copytree(base / "model", tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state[EMBEDDING] = state[EMBEDDING][:1000]
    raw = json.loads((model / "config.json").read_text()) | {"vocab_size": 1000}
    hub.save_folder(tmp_path / "cut", state, raw, [model / name for name in ("vocab.txt", "tokenizer_config.json")])
    given = runs.settings(base, model=str(tmp_path / "cut"), out=str(tmp_path / "run"), max_steps=1, lr=0.0)
    given |= {"from_scratch": False} | changes
    if rows:
        run = fastpoem.fit(**given)
        after = load_file(run.model / "model.safetensors")[EMBEDDING]
        assert len(after) == rows == GPT2LMHeadModel.from_pretrained(run.model).config.vocab_size
        if "grow_vocab" in changes:
            assert torch.equal(after[:1000], state[EMBEDDING])
    else:
        with pytest.raises(InputError, match=r"1901 ids, its embedding 1000; .*grow_vocab"):
            fastpoem.fit(**given)
