"""fastpoem.generation: every way of writing goes on with memorised poems, draws what Hugging Face's generate draws, and spells what it drew."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2LMHeadModel, TextGenerationPipeline, pipeline
from transformers.generation.logits_process import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fastpoem
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.tokenizer_files import for_prompts, never_ids
from fastpoem.errors import InputError
from fastpoem.generate import main
from fastpoem.generation import write as batches
from fastpoem.generation.choose import candidates, draw
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.poems import poems, sample
from fastpoem.generation.spell import Speller
from fastpoem.model import cached, hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.model.hub import BUNDLED
from fastpoem.model.vocabulary import GENERATION
from tests.runs import tiny_model

POEMS = [
    "犁开昨夜雨，垄软没牛蹄。老父分秧立，儿童数燕栖。",
    "小艇收罾晚，腥风上柳枝。妻儿灯下候，秤罢换盐时。",
    "don't worry, be happy",
    "天增岁月人增寿[unused1]春满乾坤福满门",
    "月落,乌啼",
]  # a half-width comma in the last, as that text has it
WORDS = [*"',.()-龍龙", "don", "t", "worry", "be", "happy", "[unused1]", "[unused2]"]
ROWS = 7  # of the embedding that no token has


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model folder without weights: 2 layers, 64 wide, 64 positions, the words of POEMS, [unused1] a special token of the user's own."""
    folder = tiny_model(tmp_path_factory.mktemp("generate") / "model", BUNDLED / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += sorted(set("".join(one for one in POEMS if "'" not in one)) - set("[]unsed1,") | set("，。？！；：、"))
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    change(folder / "config.json", n_embd=64, n_layer=2, n_head=4, vocab_size=len(words) + ROWS)
    change(folder / "tokenizer_config.json", additional_special_tokens=["[unused1]"])
    (folder.parent / "poems.txt").write_text("\n".join(POEMS * 120), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(base) -> fastpoem.Run:
    """A run that knows POEMS by heart."""
    return fastpoem.fit(**learned(base))


def learned(base: Path, **changes) -> dict:
    """Random batches: those of a bucket would hold one poem only."""
    return dict(
        data=str(base.parent / "poems.txt"), model=str(base), from_scratch=True, out=str(base.parent / "run"), device="cpu", lr=1e-2,
        batch_size=5, batching="pad", schedule="cosine", warmup_steps=5, dropout=0.0, val_poems=0, log_every=1000,
    ) | changes  # fmt: skip


@pytest.fixture(scope="module")
def drawn(base) -> Path:
    """A model folder with weights at random, as large as they come, so that every id is likely somewhere."""
    config, raw = hub.read_config(base)
    model = GPT2(config)
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    files = [base / name for name in ("vocab.txt", "tokenizer_config.json")]
    hub.save_folder(base.parent / "drawn", model.state_dict(), raw, files)
    return base.parent / "drawn"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def loaded(folder: Path) -> tuple[GPT2, PoemTokenizer]:
    model = GPT2(hub.read_config(folder)[0]).eval()
    hub.load_weights(model, folder)
    return model, PoemTokenizer.load(folder)


# What is memorised goes on


@pytest.mark.parametrize(
    "way", ["command", "generate", "sample", "pipeline", "TextGenerationPipeline", "BertTokenizer"]
)
def test_a_memorised_poem_goes_on(run, base, capsys, way):
    for prompt, poem in [(one[:5], one) for one in POEMS[:2]]:
        if way == "command":
            assert main(["--model", str(run.model), "--prompt", prompt, "--temperature", "0"]) == 0
            said = capsys.readouterr().out.removesuffix("\n")
        elif way == "generate":
            said = run.generate(prompt, temperature=0)[0]
        elif way == "sample":
            fastpoem.fit(**learned(base, resume=True, sample=poem[:18]))  # nothing else is left to do
            said = capsys.readouterr().out.splitlines()[-1]
        elif way == "pipeline":
            said = pipeline("text-generation", model=str(run.model))(prompt, do_sample=False)[0]["generated_text"]
        else:
            model = GPT2LMHeadModel.from_pretrained(run.model)
            if way == "BertTokenizer":  # frames whatever its folder says
                more = dict(add_special_tokens=False)
                writer = TextGenerationPipeline(model, BertTokenizer.from_pretrained(run.model))
                said = writer("[CLS]" + prompt, do_sample=False, **more)[0]["generated_text"]
                said = said.replace(" ", "").removeprefix("[CLS]")
            else:
                writer = TextGenerationPipeline(model, AutoTokenizer.from_pretrained(run.model))
                said = writer(prompt, do_sample=False)[0]["generated_text"]
        assert said == poem


@pytest.mark.parametrize("given, poem", [
    ("[CLS]犁开", POEMS[0]), ("[CLS] 犁 开", POEMS[0]), ("[CLS][CLS]犁开[SEP]", POEMS[0]), ("\u3000犁开\u200d", POEMS[0]),
    ("don't", POEMS[2]), ("don'", POEMS[2]), ("天增岁月人增寿[unused1]", POEMS[3]), ("天增岁", POEMS[3]),
    ("犁开昨夜雨,", POEMS[0]), ("犁开昨夜雨,垄软没牛蹄.老父", POEMS[0]), ("月落,", POEMS[4]),
])  # fmt: skip
def test_prompts_as_people_write_them(run, capsys, given, poem):
    """A frame that stands there already; spaces; marks of the other width, which the poems have or have not."""
    assert run.generate(given, temperature=0) == [poem]
    said = capsys.readouterr().err
    assert ("read as" in said) == (given.startswith("犁开昨夜雨,")), said


def test_a_sample_may_stand_in_its_frame(run, base, capsys):
    fastpoem.fit(**learned(base, resume=True, sample="[CLS]" + POEMS[0][:18]))
    assert capsys.readouterr().out.splitlines()[-1] == POEMS[0]


def test_several_prompts_of_any_length_are_several_poems(run, capsys):
    begun = ["犁开", POEMS[1][:17], "don't", "小艇收罾晚，"]
    flags = [part for one in begun for part in ("--prompt", one)]
    assert main(["--model", str(run.model), *flags, "--count", "2", "--temperature", "0"]) == 0
    expected = [POEMS[number] for number in (0, 0, 1, 1, 2, 2, 1, 1)]
    assert capsys.readouterr().out.splitlines() == expected
    assert main(["--model", str(run.model), "--prompt", *begun, "--temperature", "0"]) == 0
    assert capsys.readouterr().out.splitlines() == expected[::2]


def test_trained_again_the_frame_is_the_same(run, base, tmp_path):
    changes = dict(model=str(run.model), from_scratch=False, out=str(tmp_path / "run"), lr=1e-4, max_steps=3)
    again = fastpoem.fit(**learned(base, **changes))
    for prompt in ("犁开", "小艇"):
        assert again.generate(prompt, temperature=0) == [next(one for one in POEMS if one.startswith(prompt))]
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", GENERATION):
        assert (again.model / name).read_bytes() == (run.model / name).read_bytes(), name
    assert again.metrics[0]["loss"] < 0.5


# Which tokens


@pytest.mark.parametrize("who", ["run", "checkpoint", "older folder", "transformers", "transformers on a checkpoint"])
def test_what_no_text_is_made_of_is_never_written(run, drawn, tmp_path, who):
    """From the flattest distribution, with weights at random."""
    source = run.model if "checkpoint" not in who else max((run.folder / "checkpoints").iterdir())
    folder = shutil.copytree(source, tmp_path / "model")
    shutil.copy(drawn / "model.safetensors", folder)
    if who == "older folder":
        (folder / GENERATION).unlink()
    tokenizer = PoemTokenizer.load(folder)
    if who.startswith("transformers"):
        theirs = GPT2LMHeadModel.from_pretrained(folder)
        torch.manual_seed(0)
        options = dict(max_new_tokens=40, num_return_sequences=64, do_sample=True, top_k=0, temperature=3.0)
        written = theirs.generate(torch.tensor([[2]]), **options)[:, 1:].tolist()
        ids = {one for row in written for one in itertools.takewhile(lambda one: one != 3, row)}
        assert any(3 in row for row in written)
    else:
        seen: list[str] = [
            *poems(GenerateConfig(str(folder), count=64, top_k=0, temperature=3.0, seed=0, max_length=40))
        ]
        assert len({len(one) for one in seen}) > 5  # they end
        library = tokenizer.library
        ids = {one for text in seen for one in library.encode(text, add_special_tokens=False).ids} - {1}
        assert not any(word in text for text in seen for word in ("[UNK]", "[PAD]", "[CLS]", "[MASK]", "[SEP]"))
    assert ids and not ids & {0, 1, 2, 3, 4} and max(ids) < tokenizer.vocab_size
    assert len(ids) > tokenizer.vocab_size // 2  # so the test can fail


def test_a_token_that_ends_poems_may_be_anything_else_too(tmp_path):
    """GPT-2's own tokenizer has one special token for all: first, last, padding, unknown."""
    tokenizer = PoemTokenizer.load(bytes_of_pairs(tmp_path))
    assert never_ids(tokenizer, tokenizer.vocab_size + 2) == {tokenizer.vocab_size, tokenizer.vocab_size + 1}


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000), st.sampled_from([0.001, 0.5, 1.0, 3.0]), st.sampled_from([0, 1, 2, 10, 59, 60, 500]),
    st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]), st.sampled_from([0.1, 1.0, 20.0]),
)  # fmt: skip
def test_probabilities_are_those_of_transformers(seed, temperature, top_k, top_p, spread):
    torch.manual_seed(seed)
    logits, never = torch.randn(5, 60) * spread, torch.randperm(60)[:8]
    theirs = LogitsProcessorList([SuppressTokensLogitsProcessor(never.tolist()), TemperatureLogitsWarper(temperature)])
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = theirs(torch.zeros(5, 1, dtype=torch.int64), logits.clone()).softmax(-1)
    config = GenerateConfig("", temperature=temperature, top_k=top_k, top_p=top_p).check()
    scores, ids = candidates(logits, config, never)
    ours = scores.softmax(-1) if ids is None else torch.zeros(5, 60).scatter(1, ids, scores.softmax(-1))
    torch.testing.assert_close(ours, expected)
    assert ((ours > 0) == (expected > 0)).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([1, 5, 40]))
def test_as_many_numbers_fall_on_a_token_as_it_is_likely(seed, width):
    torch.manual_seed(seed)
    scores = torch.randn(1, width).masked_fill(torch.rand(1, width) < 0.3, -torch.inf)
    scores[0, seed % width] = 0
    count = 1000
    numbers = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count, torch.tensor([0.0, 1 - 2**-53])])
    chosen = draw(scores.expand(len(numbers), -1), None, numbers)
    assert (scores[0, chosen] > -torch.inf).all()
    counts = torch.bincount(chosen[:count], minlength=width)
    assert ((counts - count * scores[0].softmax(-1)).abs() <= 1).all()


def test_without_chance_it_writes_what_transformers_writes(drawn):
    model, tokenizer = loaded(drawn)
    theirs = GPT2LMHeadModel.from_pretrained(drawn)
    never = sorted(never_ids(tokenizer, model.config.vocab_size))
    for ids in ([2], [2, 30, 31], [2, *range(20, 40)]):
        options = dict(do_sample=False, max_length=64, suppress_tokens=never, eos_token_id=3, pad_token_id=0)
        expected = theirs.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        (ours,) = batches.write(model, [ids], 0, GenerateConfig("", temperature=0), end=3, never=never, longest=64)
        assert ours == [*itertools.takewhile(lambda one: one != 3, expected)]
        assert (len(ours) == 64 - len(ids)) or 3 in expected


def test_the_cache_gives_the_whole_model_s_logits(drawn, monkeypatch):
    monkeypatch.setattr(cached, "ROOM", 4)  # it grows on the way
    model, _ = loaded(drawn)
    ids = torch.randint(5, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    whole = model(ids).view(3, 20, -1)
    cache = cached.Cache(model, 3, 20)
    torch.testing.assert_close(cache.advance(ids[:, :7]), whole[:, 6])
    for place in range(7, 12):
        torch.testing.assert_close(cache.advance(ids[:, place, None]), whole[:, place])
    cache.keep(torch.tensor([2, 0]))
    for place in range(12, 20):
        torch.testing.assert_close(cache.advance(ids[[2, 0], place, None]), whole[[2, 0], place])


# Batches


@pytest.mark.parametrize("most", [1, 3, 32])
def test_a_seed_s_poems_do_not_depend_on_the_batch(drawn, monkeypatch, most):
    expected = sample(drawn, ["春", "犁开昨夜", ""], count=4, seed=5, max_length=30)
    assert len(set(expected)) == 12
    monkeypatch.setattr(batches, "MOST_AT_ONCE", most)
    assert sample(drawn, ["春", "犁开昨夜", ""], count=4, seed=5, max_length=30) == expected
    assert sample(drawn, "春", count=4, seed=5, max_length=30) == expected[:4]
    assert sample(drawn, "春", count=4, seed=6, max_length=30) != expected[:4]


def test_any_number_of_poems_comes_as_it_is_written(drawn, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_BYTES", 3 * cached.bytes_a_poem(hub.read_config(drawn)[0], 20))
    made = []
    monkeypatch.setattr(
        batches, "Cache", lambda model, poems, longest: made.append(poems) or cached.Cache(model, poems, longest)
    )
    coming = poems(GenerateConfig(str(drawn), count=10**6, max_length=20).check())
    assert len([*itertools.islice(coming, 4)]) == 4
    assert made == [3, 3]


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory", None]
)
def test_memory_that_runs_out(drawn, monkeypatch, words):
    """Smaller batches are tried; where one poem is too many, a line says so."""
    made = []

    def cache(model, poems, longest):
        made.append(poems)
        if poems > room:
            raise RuntimeError(words) if words else MemoryError
        return cached.Cache(model, poems, longest)

    monkeypatch.setattr(batches, "Cache", cache)
    room = 5
    assert len(sample(drawn, count=32, max_length=5)) == 32
    assert made == [32, 16, 8, *[4] * 8]
    room = 0
    with pytest.raises(
        InputError, match="cpu: has too little memory left for this model; use a smaller model or --max-length"
    ):
        sample(drawn, count=32, max_length=5)


def test_it_does_not_wait_for_transformers(drawn):
    code = (
        "import sys; from fastpoem.generate import main; main(sys.argv[1:]); assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", drawn, "--prompt", "春"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("春"), done.stderr


# Folders


def test_a_run_s_folder_is_its_model_or_its_newest_checkpoint(run, tmp_path, capsys):
    there = shutil.copytree(run.folder, tmp_path / "run")
    asked = ["--model", str(there), "--prompt", "犁开", "--temperature", "0"]
    assert main(asked) == 0
    assert capsys.readouterr() == (POEMS[0] + "\n", f"fastpoem: the model is {there / 'model'}\n")
    shutil.rmtree(there / "model")
    newest = max((there / "checkpoints").iterdir())
    assert main(asked) == 0
    assert capsys.readouterr() == (POEMS[0] + "\n", f"fastpoem: the model is {newest}\n")
    (newest / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="holds no model and no whole checkpoint yet"):
        main(asked)


def test_a_stopped_run_writes_with_its_newest_checkpoint(run, tmp_path):
    there = shutil.copytree(run.folder, tmp_path / "run")
    shutil.rmtree(there / "model")
    assert fastpoem.Run(there, [], stopped_by=15).generate("犁开", temperature=0) == [POEMS[0]]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.sampled_from([*"犁开昨夜雨，。 ,.'don龍ÉA\t", "[CLS]", "[SEP]", "[unused1]", "[UNK]", "don't", "ﷺ"]),
        max_size=12,
    ).map("".join)
)
@example("[CLS]犁开[SEP]")
def test_every_tokenizer_of_the_folder_gives_training_s_ids(run, base, text):
    """BertTokenizer with its frame, AutoTokenizer with the beginning of it: what a pipeline makes of a prompt is to go on."""
    if not hasattr(run, "theirs"):
        run.theirs = (
            BertTokenizer.from_pretrained(base),
            BertTokenizer.from_pretrained(run.model),
            AutoTokenizer.from_pretrained(run.model),
        )
        run.ours = PoemTokenizer.load(base), PoemTokenizer.load(run.model)
    (before, bert, auto), ours = run.theirs, run.ours
    expected = before(text)["input_ids"]
    assert (
        bert(text)["input_ids"]
        == expected
        == ours[0].encode([text], 512)[0].tolist()
        == ours[1].encode([text], 512)[0].tolist()
    )
    assert [*auto(text)["input_ids"], bert.sep_token_id] == expected
    assert auto(text, add_special_tokens=False)["input_ids"] == expected[1:-1]
    assert ours[0].fingerprint == ours[1].fingerprint  # a store serves both


def test_transformers_folder_needs_no_argument(run):
    """A pipeline asks for 256 tokens more, and the model has 64 positions."""
    auto = AutoTokenizer.from_pretrained(run.model)
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 2, 3)
    assert auto.decode(auto("don't 犁开，happy be")["input_ids"], skip_special_tokens=True) == "don ' t犁开，happy be"
    written = pipeline("text-generation", model=str(run.model))(["月", "开开开开"], num_return_sequences=8)
    assert len(written) == 2 and all(one["generated_text"] for poems in written for one in poems)
    config = json.loads((run.model / GENERATION).read_text())
    assert config["max_length"] == 64 and (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        2,
        3,
        0,
    )


def test_transformers_spells_as_we_do(base, tmp_path):
    """Marks of two characters, □, and line breaks."""
    folder = shutil.copytree(base, tmp_path / "model")
    with open(folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("\n—\n□\n…\n")
    tokenizer = PoemTokenizer.load(folder, "[unused2]")
    files = {**tokenizer.files}
    for name, content in (files | for_prompts(files, tokenizer)).items():
        (folder / name).write_bytes(content)
    again, auto = PoemTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert (again.fingerprint, again.line_break) == (tokenizer.fingerprint, "[unused2]")
    text = "春□月——天……[unused2]开 happy be"
    ids = auto(text)["input_ids"][1:]
    assert ids == tokenizer.encode([text], 99)[0].tolist()[1:-1]
    assert ids == BertTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    expected = "春□月——天……\n开happy be"
    assert auto.decode(ids, skip_special_tokens=True) == auto.decode(ids) == expected  # as in a pipeline
    assert Speller(again.library, again.library.token_to_id("[unused2]")).text(ids) == expected
    for name, content in for_prompts(again.files, again).items():  # trained on
        assert content == (folder / name).read_bytes(), name


def bytes_of_pairs(folder: Path, frame: bool = True) -> Path:
    """A model folder without weights whose tokenizer is GPT-2's kind."""
    tiny_model(folder / "bytes", BUNDLED / "model")
    (folder / "bytes/vocab.txt").unlink()
    end = "<|endoftext|>"
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(POEMS, trainer)
    library.post_processor = processors.TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    library.save(str(folder / "bytes/tokenizer.json"))
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    (folder / "bytes/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    change(folder / "bytes/config.json", vocab_size=500)
    return folder / "bytes"


def test_a_tokenizer_of_bytes_keeps_its_spaces_and_begins_prompts_once(tmp_path):
    source = PoemTokenizer.load(bytes_of_pairs(tmp_path))
    files = {"tokenizer_config.json": (tmp_path / "bytes/tokenizer_config.json").read_bytes()}
    for name, content in for_prompts(files, source).items():
        (tmp_path / "bytes" / name).write_bytes(content)
    again, auto = PoemTokenizer.load(tmp_path / "bytes"), AutoTokenizer.from_pretrained(tmp_path / "bytes")
    assert again.fingerprint == source.fingerprint
    for text in ("犁开 昨夜，  雨 ,", "a  b ， c", "[CLS] ##x"):
        ids = source.library.encode(text, add_special_tokens=False).ids
        assert again.encode([text], 512)[0].tolist() == [0, *ids, 0] and auto(text)["input_ids"] == [0, *ids]
        assert Speller(again.library, None).text(ids) == text
        assert Speller(again.library, None).poem(text, ids, ids) == text * 2


# Text


@pytest.mark.parametrize("text", [
    "don't worry, be happy", "犁开昨夜雨，垄软没牛蹄。", "天增岁月人增寿[unused1]春满乾坤福满门", "犁don't开", "be (happy), don't.",
    "犁开，don happy，雨", "[unused1]don", "don-don", "犁。。。开",
])  # fmt: skip
def test_what_was_read_is_spelled_as_it_was_written(base, text):
    tokenizer = PoemTokenizer.load(base)
    ids = tokenizer.library.encode(text, add_special_tokens=False).ids
    assert 1 not in ids
    expected = text.replace("[unused1]don", "[unused1] don")
    assert Speller(tokenizer.library, None).text(ids) == expected


def test_a_line_break_is_printed_as_one(run, tmp_path, capsys):
    folder = shutil.copytree(run.model, tmp_path / "model")
    change(folder / "tokenizer_config.json", line_break_token="[unused1]")
    first, second = POEMS[3].split("[unused1]")
    for prompt in (first[:3], first + "[unused1]", first + " [unused1] " + second[:2], "\n" + first + " \r\n" + second):
        assert sample(folder, prompt, temperature=0) == [f"{first}\n{second}"]
    assert main(["--model", str(folder), "--prompt", first, first, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n\n" * 2


def test_a_prompt_is_converted_as_the_text_was(run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run.model, tmp_path / "model")
    note = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["fastpoem"]
    change(folder / "tokenizer_config.json", fastpoem=note | {"convert": "t2s"})
    assert sample(folder, "龍", seed=1)[0].startswith("龙") and sample(run.model, "龍", seed=1)[0].startswith("龍")
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "opencc", None)
    assert sample(folder, "龍", seed=1)[0].startswith("龍")
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "the poems were converted by t2s, the prompt is not: OpenCC is not installed" in said
    )


def test_what_the_vocabulary_lacks_is_shown_and_named(run, capsys):
    assert run.generate("犁鱻開鱻", seed=1)[0].startswith("犁鱻開鱻")
    assert capsys.readouterr().err == "fastpoem: 犁鱻開鱻: the vocabulary lacks 鱻 開, which the model reads as [UNK]\n"
    run.generate("[UNK]犁", seed=1)
    assert capsys.readouterr().err == ""


def test_prompts_without_room_and_odd_ones(run):
    for prompt, says in (
        ("犁" * 63, "--prompt of 63 tokens: leaves no room within 64; shorten it$"),
        ("a\nb", r"--prompt .*: this model has no line breaks; write the prompt on one line"),
        ("a\rb", "use characters of UTF-8"),
    ):
        with pytest.raises(InputError, match=says):
            run.generate(["犁", prompt], max_length=64)  # the model has no more positions
    with pytest.raises(InputError, match="within 9; shorten it or raise --max-length"):
        run.generate("犁" * 8, max_length=9)
    assert run.generate("犁" * 62)[0].startswith("犁" * 62)
    assert np.unique(run.generate("", count=3, temperature=0)).size == 1
