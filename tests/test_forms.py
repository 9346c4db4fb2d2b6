"""Poems asked for in a form are in it, whatever the model has learned; and what is printed of them, and how."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

import fastpoem
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.corpus.tokenizer_files import for_prompts, never_ids
from fastpoem.errors import InputError
from fastpoem.generate import main
from fastpoem.generation import write as batches
from fastpoem.generation.choose import penalised
from fastpoem.generation.config import GenerateConfig
from fastpoem.generation.constrain import Constraint, FormProcessor
from fastpoem.generation.poems import _refuse_longer, growing, poems, sample
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.model.hub import BUNDLED
from fastpoem.model.vocabulary import GENERATION
from fastpoem.poetry.forms import FORMS, form_of
from fastpoem.poetry.rhyme import PINGSHUI, XINYUN, book, ends, rhymes
from tests.runs import tiny_model

MORE = ["##春", "hello", "##lo", "a", ",", ".", "！", "；", "豈", "[unused1]", "鱻"]  # 豈 is of the compatibility forms


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A model folder that has learned nothing: 2 layers, 64 wide, 66 positions, large weights at random, the bundled vocabulary and more."""
    folder = tiny_model(tmp_path_factory.mktemp("forms") / "base", BUNDLED / "model")
    with open(folder / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("".join(f"\n{word}" for word in MORE))
    tokenizer = PoemTokenizer.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(n_embd=64, n_layer=2, n_head=4, n_positions=66, vocab_size=tokenizer.vocab_size + 3)
    (folder / "config.json").write_text(json.dumps(config))
    shape, raw = hub.read_config(folder)
    model = GPT2(shape)
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    out = folder.parent / "whole"
    hub.save_folder(out, model.state_dict(), raw, [folder / "vocab.txt", folder / "tokenizer_config.json"])
    for name, content in for_prompts({**tokenizer.files}, tokenizer).items():
        (out / name).write_bytes(content)
    return out


@pytest.fixture(scope="module")
def corpus(whole) -> Path:
    """The same, trained with --vocab corpus on a text that has every second character."""
    folder = shutil.copytree(whole, whole.parent / "corpus")
    vocabulary = PoemTokenizer.load(folder).library.get_vocab(True)
    untrained = [index for token, index in vocabulary.items() if index % 2 and index > 5 and token not in "，。春夏"]
    (folder / GENERATION).write_text(json.dumps({"suppress_tokens": untrained}))
    return folder


def head(poem: str, each: int) -> str:
    return "".join(line[0] for line in poem.replace("。", "，").split("，")[:-1:each])


# Five hundred of five hundred


@pytest.mark.parametrize("form, vocabulary", [*itertools.product(FORMS, ["corpus"]), ("五绝", "whole")])
def test_all_of_500_poems_are_in_the_form(whole, corpus, monkeypatch, form, vocabulary):
    folder = whole if vocabulary == "whole" else corpus
    monkeypatch.setattr(batches, "MOST_AT_ONCE", 125)
    written = sample(folder, count=500, form=form, seed=1, rhyme=PINGSHUI, top_k=0, temperature=2.0)
    assert [form_of(poem) for poem in written] == [form] * 500
    assert len({*written}) == 500 and not any("[UNK]" in poem for poem in written)
    assert all(rhymes(poem) for poem in written)
    assert {mark for poem in written for mark in poem if mark in "，。！；"} == {*"，。"}
    used = {one for poem in written for one in poem}
    assert len(used) > (600 if vocabulary == "corpus" else 1200) and not used & {"\uf900"}
    if vocabulary == "corpus":
        never = {*json.loads((folder / GENERATION).read_text())["suppress_tokens"]}
        assert not {PoemTokenizer.load(folder).library.token_to_id(one) for one in used} & never


@pytest.mark.parametrize("form, options", [
    ("五绝", dict(temperature=0)), ("七律", dict(temperature=0, repetition_penalty=1.5, rhyme=XINYUN)), ("七绝", dict(rhyme=XINYUN, top_p=0.3)),
    ("五律", dict(top_k=1, rhyme=PINGSHUI)), ("七绝", dict(temperature=0.001, rhyme=PINGSHUI)),
    ("七律", dict(repetition_penalty=5.0, rhyme=PINGSHUI, top_k=0)),
], ids=str)  # fmt: skip
def test_everything_together(corpus, form, options):
    """A prompt, an acrostic of the lines or the couplets, with characters that training had not, and rhymes."""
    lines = FORMS[form].lines
    width = FORMS[form].width
    for prompt, acrostic in (
        ("", "春夏秋冬"),
        ("春江", "春夏秋冬" * (lines // 4)),
        ("春" * width, None),
        ("春" * width + "，" + "天" * width, "春天秋冬" * (lines // 4)),
        ("春" * width + "？", None),
    ):
        (poem, *_) = written = sample(corpus, prompt, form=form, acrostic=acrostic, count=3, seed=5, **options)
        for poem in written:
            assert form_of(poem) == form and poem.startswith(prompt), poem
            assert acrostic is None or head(poem, lines // len(acrostic)) == acrostic
            if (by := options.get("rhyme")) is not None:
                assert rhymes(poem, by) and poem[width - 1] not in ends(poem)


def test_a_run_writes_it_too(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run" / "model")
    run = fastpoem.Run(tmp_path / "run", [])
    (poem,) = run.generate("", form="七绝", acrostic="春夏秋冬")
    assert form_of(poem) == "七绝" and head(poem, 1) == "春夏秋冬"
    prompts = [poem, poem[:9], "春", ""]  # a whole poem is one already
    written = run.generate(prompts, form="qijue", count=2)
    assert [form_of(one) for one in written] == ["七绝"] * 8 and written[:2] == [poem] * 2
    assert all(one.startswith(prompts[number // 2]) for number, one in enumerate(written))


def test_half_width_marks_of_a_prompt_are_the_form_s(whole):
    assert sample(whole, "春" * 5 + "," + "江" * 5 + ".", form="五绝")[0].startswith("春春春春春，江江江江江。")


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([*FORMS.values()]), st.sampled_from([PINGSHUI, XINYUN]))
def test_a_vocabulary_of_few_rhymes_is_enough_or_is_refused(data, form, by):
    """Whatever is drawn from what is allowed, the poem can be ended, and rhymes."""
    size = data.draw(st.integers(1, 40))
    some = data.draw(
        st.permutations(
            [*"东中风空红同江双支枝时知诗微飞归鱼书初无湖西低开来人春真门天年前山间关寒看花家光香长明声清流秋心林"]
        )
    )[:size]
    vocabulary = {one: number for number, one in enumerate(["[SEP]", "，", "。", *some])}
    needed = form.lines // 2 + 1
    groups = [group for one in some for group in book(by).of[one]]
    try:
        allowed = Constraint(form, vocabulary, 0, rhymes=book(by))
    except InputError as error:
        assert f"no {needed} characters that rhyme by it" in str(error)
        assert not any(book(by).groups[one].level and groups.count(one) >= needed for one in groups)
        return
    tokens = [*vocabulary]
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    text = torch.zeros(4, 0, dtype=torch.int64)
    for _ in range(form.length):
        scores = allowed(text, torch.randn(4, len(vocabulary), generator=seed))
        text = torch.cat([text, torch.multinomial(scores.softmax(-1), 1, generator=seed)], 1)
    assert (allowed(text, torch.randn(4, len(vocabulary))).argmax(-1) == 0).all()  # then it ends
    for row in text.tolist():
        poem = "".join(tokens[one] for one in row)
        assert form_of(poem) == form.name and rhymes(poem, by), poem


# What is refused


@pytest.mark.parametrize("options, says", [
    (dict(form="五言"), "--form '五言': no such form; use 五绝, 七绝, 五律 or 七律"),
    (dict(acrostic="春夏秋冬"), "--acrostic '春夏秋冬': needs a form; add --form"), (dict(rhyme=PINGSHUI), "--rhyme '平水韵': needs a form; add --form"),
    (dict(form="五绝", rhyme="韵"), "no such book of rhymes; use 平水韵 or 中华新韵"),
    (dict(form="五绝", acrostic="春夏"), "'春夏': has 2 characters, and a 五绝 has 4 lines; give one for each"),
    (dict(form="七律", acrostic="春夏秋"), "'春夏秋': has 3 characters, and a 七律 has 8 lines or 4 couplets"),
    (dict(form="五绝", acrostic=""), "has 0 characters"), (dict(form="五绝", acrostic="春夏，冬"), "， is no Chinese character; leave it out"),
    (dict(form="五绝", acrostic="春夏秋驫"), "--acrostic 春夏秋驫: the model's vocabulary lacks 驫"),
    (dict(form="五绝", prompt="春江潮水，"), "'春江潮水，': cannot begin a 五绝: its line 1 is not 5 characters long"),
    (dict(form="五绝", prompt="春江潮水连海"), "cannot begin a 五绝: ， is due where it has 海"),
    (dict(form="五绝", prompt="春春春春春，春春春春春，"), "cannot begin a 五绝: 。 is due where it has ，"),
    (dict(form="五绝", prompt="春hello"), "cannot begin a 五绝: h is no Chinese character that the model knows"),
    (dict(form="五绝", prompt="春驫"), "cannot begin a 五绝: 驫 is no Chinese character that the model knows"),
    (dict(form="五绝", prompt=["春", "春春春春春，春春春春春。" * 3]), "is longer than a 五绝"),
    (dict(form="五绝", prompt="夏", acrostic="春夏秋冬"), "'夏': has 夏 where the acrostic has 春; change it"),
    (dict(form="五绝", rhyme=PINGSHUI, prompt="春春春春春，春春春春鱻。春春春春春，春春春春江"), "its 鱻 江 does not rhyme, or with too few"),
    (dict(form="五绝", rhyme=PINGSHUI, prompt="春春春春江，春春春春江"), "a character ends two of its lines, 江"),
    (dict(form="七律", max_length=64), "--form 七律: has 65 tokens, and --max-length allows 64; raise it"),
    (dict(repetition_penalty=0.0), "--repetition-penalty 0.0: out of range; use more than 0"),
    (dict(repetition_penalty=float("nan")), "--repetition-penalty nan: out of range"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(whole, capsys, options, says):
    with pytest.raises(InputError) as refusal:
        sample(whole, **options)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
    assert capsys.readouterr().err == ""


def test_models_that_cannot_write_it():
    """Tokens of bytes, no marks, marks that were not trained, too few positions."""
    form = FORMS["五绝"]
    for vocabulary, never, says in (
        ({"a": 0, "##春": 1, "，": 2, "。": 3}, (), "lacks tokens that are one Chinese character"),
        ({"春": 0, ",": 1, "。": 2}, (), "--form 五绝: the model's vocabulary lacks the mark ，"),
        ({"春": 0, "，": 1, "。": 2}, (2,), "lacks the mark 。"),
        ({"春": 0, "，": 1, "。": 2}, (0,), "lacks tokens that are one Chinese character"),
    ):
        with pytest.raises(InputError, match=says):
            Constraint(form, vocabulary, 9, never)
    with pytest.raises(InputError, match="--form 七律: has 65 tokens, and the model allows 41; use a shorter form"):
        _refuse_longer(FORMS["七律"], 41)


# transformers


def test_generate_of_transformers_keeps_the_form(whole):
    tokenizer = AutoTokenizer.from_pretrained(whole, padding_side="left")
    model = GPT2LMHeadModel.from_pretrained(whole)
    never = sorted(never_ids(PoemTokenizer.load(whole), model.config.vocab_size))
    torch.manual_seed(0)
    prompts = ["", "春江", "春江潮水连，春江"]
    for options in (
        dict(do_sample=True, top_k=0, temperature=2.0, num_return_sequences=3),
        dict(num_beams=2, do_sample=False),
    ):
        form = FormProcessor(tokenizer, "五律", acrostic="春夏秋冬", rhyme="平水韵", never=never)
        given = tokenizer(prompts, return_tensors="pt", padding=True)
        out = model.generate(
            **given, logits_processor=[form], max_new_tokens=form.new_tokens, pad_token_id=0, eos_token_id=3, **options
        )
        for number, text in enumerate(tokenizer.batch_decode(out, skip_special_tokens=True)):
            text = "".join(text.split())
            assert form_of(text) == "五律" and rhymes(text), text
            prompt = prompts[number // options.get("num_return_sequences", 1)]
            assert head(text, 2) == "春夏秋冬" and text.startswith(prompt)


@pytest.mark.parametrize("form", ["五绝", "七律"])
def test_without_chance_it_is_what_transformers_writes(whole, form):
    tokenizer, model = AutoTokenizer.from_pretrained(whole), GPT2LMHeadModel.from_pretrained(whole)
    options = dict(acrostic="春夏秋冬", rhyme="中华新韵")
    never = sorted(never_ids(PoemTokenizer.load(whole), model.config.vocab_size))
    processor = FormProcessor(tokenizer, form, never=never, **options)
    out = model.generate(
        **tokenizer("春江", return_tensors="pt"), logits_processor=[processor], max_length=1 + FORMS[form].length, do_sample=False,
        repetition_penalty=1.3, pad_token_id=0, eos_token_id=3,
    )  # fmt: skip
    expected = "".join(tokenizer.decode(out[0], skip_special_tokens=True).split())
    assert sample(whole, "春江", form=form, temperature=0, repetition_penalty=1.3, **options) == [expected]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.sampled_from([0.5, 1.1, 3.0]))
def test_the_penalty_is_that_of_transformers(seed, penalty):
    torch.manual_seed(seed)
    text, logits = torch.randint(0, 30, (4, 20)), torch.randn(4, 30) * 5
    expected = RepetitionPenaltyLogitsProcessor(penalty)(text, logits.clone())
    torch.testing.assert_close(penalised(logits, text, penalty), expected, rtol=0, atol=0)


def test_a_penalty_makes_repetition_rare(whole):
    def repeated(**options):
        return sum(
            len(one) - len({*one}) for one in sample(whole, count=50, seed=3, temperature=0.3, form="七绝", **options)
        )

    assert repeated(repetition_penalty=1.5) < repeated() / 2


# What is printed


class Terminal:
    """A stdout that is a terminal, and takes down each piece that is written."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "flags",
    [
        ["--form", "七绝"],
        ["--max-length", "30"],
        ["--prompt", "hello 春", "春", "--temperature", "0", "--max-length", "20"],
    ],
)
def test_on_a_terminal_a_poem_appears_as_it_is_written(whole, monkeypatch, capsys, flags):
    asked = ["--model", str(whole), "--seed", "3", "--count", "2", *flags]
    assert main(asked) == 0
    expected = capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(asked) == 0
    assert "".join(terminal.pieces) == expected
    assert sum(bool(one) for one in terminal.pieces) > 0.5 * len(expected.replace("hello", "")) / (1 + flags.count("0"))
    terminal.pieces.clear()
    assert main([*asked[:4], "--count", "9", "--form", "五绝"]) == 0  # many come in batches
    assert all(len(one) in (0, 1, 24) for one in terminal.pieces) and "".join(terminal.pieces).count("\n") == 9


def test_growing_poems_are_those_of_batches(whole):
    config = GenerateConfig(str(whole), ("春", "江月"), count=3, seed=4, form="五绝", rhyme=PINGSHUI).check()
    states: dict[int, list[str]] = {}
    for number, text in growing(config):
        states.setdefault(number, []).append(text)
    assert [texts[-1] for texts in states.values()] == [*poems(config)]
    assert all(after.startswith(before) for texts in states.values() for before, after in itertools.pairwise(texts))
    assert [len(one) for one in states[0]] == [*range(1, 25)]


def test_json_lines(whole, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeff春江\n\n  夏\r\n", encoding="utf-8")
    asked = [
        "--model",
        str(whole),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--prompt",
        "秋",
        "--count",
        "2",
        "--json",
    ]
    assert main([*asked, "--form", "qilv", "--rhyme", "xinyun"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["prompt"] for one in told] == ["秋", "秋", "春江", "春江", "夏", "夏"]
    for one in told:
        assert (
            one["poem"].startswith(one["prompt"]) and one["form"] == one["asked"] == "七律" and one["in_form"] is True
        )
        assert one["rhymes"] is True and one["rhyme"].startswith("平声") and len(one["tones"]) == 8
        assert one["scheme"] and one["regulated"] == (not one["off"])
    assert main([*asked, "--max-length", "9"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(one["form"] is None and "in_form" not in one for one in told)


def test_tones_are_printed_below_a_poem(whole, capsys):
    assert main(["--model", str(whole), "--form", "五绝", "--tones", "--count", "2", "--rhyme", "平水韵"]) == 0
    poem, tones, said, *rest = capsys.readouterr().out.split("\n")
    assert form_of(poem) == "五绝" and {*tones.strip()} <= {*"平仄中？ "} and len(tones.split()) == 4
    assert said.startswith("    五绝; rhymes in 平水韵 ") and "首句" in said and rest[0] == "" and len(rest) == 6


def test_tones_are_told_in_chinese(whole, capsys, monkeypatch):
    asked = ["--model", str(whole), "--form", "五绝", "--rhyme", "平水韵", "--tones", "--lang", "zh"]
    assert main(asked) == 0
    said = capsys.readouterr().out.split("\n")[2]
    assert said.startswith("    五绝；押平水韵") and "首句" in said and "rhymes" not in said


def test_too_short_for_a_form_is_said_before_the_model_is_looked_for():
    with pytest.raises(InputError, match="--form 五律: has 49 tokens, and --max-length allows 48; raise it"):
        main(["--model", "nowhere", "--form", "wulv", "--max-length", "48"])


@pytest.mark.parametrize(
    "content, says", [(None, "does not exist"), (b"\n \n", "holds no poem"), (b"\x00\xff\xfe\x01", "")]
)
def test_prompts_that_are_none(whole, tmp_path, content, says):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        main(["--model", str(whole), "--prompts", str(path)])
    assert says in str(refusal.value) and "prompts.txt" in str(refusal.value)
