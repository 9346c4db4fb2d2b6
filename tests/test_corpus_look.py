"""What does not look like poems is counted; what can be removed safely is removed when that is asked for, and counted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.look import SIMPLIFIED, TRADITIONAL, Look, in_words

PLAIN = "床前明月光，疑是地上霜。"


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("spaces", ["春眠 不觉晓，", "春眠\u3000不觉晓。", "春\u00a0江。"]),
        ("digits", ["春江12。", "第１首。"]),
        ("latin", ["春a江。", "Ａ春。", "café。", "春[CLS]江。"]),
        ("holes", ["春□江。", "春■■。", "春\ufffd。"]),
        ("brackets", ["春（一作秋）江。", "春[1]江。", "【题】春江。", "春〔一〕。"]),
        ("entities", ["春&nbsp;江。", "春&#26376;。", "春<br>江。", "春<br/>江。"]),
        ("traditional", ["風來。", "一夜風。"]),
    ],
)
def test_what_does_not_look_like_a_poem_is_counted(kind: str, lines: list[str]) -> None:
    look = Look()
    look.at([PLAIN] * 3 + lines + ["风来。"] * 9)
    found = {one: (number, example) for one, number, example in look.report()}
    assert found[kind] == (len(lines), lines[0])
    assert in_words(kind, len(lines), look.poems, lines[0]).startswith(f"{len(lines):,} (")
    clean = Look()
    assert clean.at([PLAIN, "𠀀春江。"]) == [PLAIN, "𠀀春江。"] and clean.report() == []


def test_titles_stanzas_and_scripts_only_where_they_are_odd() -> None:
    look = Look()
    look.at(["静夜思", "李白", PLAIN, "举头望明月，低头思故乡。"])
    assert [kind for kind, *_ in look.report()] == ["titles"]
    look = Look()
    look.at(["春眠不觉晓", "处处闻啼鸟"] * 9 + [PLAIN])  # a text without marks has no titles for that
    assert look.report() == []
    for gaps, poems, odd in ((3, 16, True), (15, 16, False), (1, 900, False)):  # stanzas; doubled lines; a stray line
        look = Look(poems=poems, gaps=gaps)
        assert [kind for kind, *_ in look.report()] == ["stanzas"] * odd
    assert len(SIMPLIFIED) == len(TRADITIONAL) == len({*SIMPLIFIED, *TRADITIONAL}) / 2


def test_a_frame_in_the_text_is_not_set_twice_and_other_tokens_are_counted() -> None:
    look = Look()
    lines = [
        "[CLS]春江。[SEP]",
        "[CLS] 春江。 [SEP]",
        "春江。[SEP]",
        "[CLS]春江。",
        "[CLS][SEP]",
        PLAIN,
        "春[SEP]江[MASK]。[UNK]",
    ]
    special = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    assert look.at(lines, ("[CLS]", "[SEP]"), special) == ["春江。"] * 4 + [PLAIN, "春[SEP]江[MASK]。[UNK]"]
    assert look.found["framed"] == 5 and look.poems == 6
    assert look.special == {"[SEP]": 1, "[MASK]": 1, "[UNK]": 1}
    bare = Look()
    assert bare.at(lines, ("", ""), special) == lines  # a tokenizer that sets no frame needs the one in the text
    assert bare.special["[CLS]"] == 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("春眠 不觉晓，\u3000处处", "春眠不觉晓，处处"),
        ("don't worry, be   happy", "don't worry, be   happy"),
        ("春 a b 江", "春a b江"),
        ("春&nbsp;江&amp;月&#x6708;<br/>夜&zzz;", "春江&月月夜"),
        ("春（一作（秋））江【题】①。[12][unused1][CLS]", "春江。[unused1][CLS]"),
        ("春（江", "春（江"),
        ("（其一）", ""),
        ("春\u200b江\ufeff", "春江"),
        ("□春《离骚》", "□春《离骚》"),
    ],
)
def test_what_is_cleaned(before: str, after: str) -> None:
    look = Look()
    assert look.cleaned([PLAIN, before, PLAIN]) == [line for line in (PLAIN, after, PLAIN) if line]
    assert bool(+look.removed) == (before != after)


def test_the_token_for_line_breaks_is_no_oddity() -> None:
    for token in ("[unused1]", "<br>", "（行）"):
        look = Look(line_break=token)
        lines = [f"春江。{token}花月。{token}{token}夜。", PLAIN]
        assert look.cleaned(lines) == look.at(lines) == lines and look.report() == [] and not +look.removed


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.text("春江，。 \u3000ab（）()[]【】&<>;nbsp1□\u200b", min_size=1, max_size=20).map(str.strip).filter(bool),
        min_size=1,
        max_size=6,
    )
)
def test_cleaning_only_takes_away_and_what_is_clean_stays(lines: list[str]) -> None:  # fmt: skip
    look = Look()
    once = look.cleaned(lines)
    assert all(line == line.strip() != "" for line in once)
    if not {*"&<"} & {
        *"".join(lines)
    }:  # what an entity spells may spell another, and a tag between words leaves a space
        left = iter("".join(lines))
        assert all(char in left for char in "".join(once))
    twice = look.cleaned(once)
    assert look.cleaned(twice) == twice or "&" in "".join(lines)
