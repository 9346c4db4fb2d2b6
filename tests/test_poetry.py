"""fastpoem.poetry: forms, rhymes and tones of poems that everybody knows, and laws that hold of all."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.errors import InputError
from fastpoem.model.hub import BUNDLED
from fastpoem.poetry.forms import FORMS, INNER, LAST, form_named, form_of
from fastpoem.poetry.rhyme import PINGSHUI, XINYUN, book, book_named, rhyme_of, rhymes
from fastpoem.poetry.tones import Fault, tone_of, tones
from fastpoem.poetry.verdict import shares, shown, verdict

TOWER = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
DAWN = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
RIVER = "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。"
SPRING = "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。"
HEIGHTS = (
    "风急天高猿啸哀，渚清沙白鸟飞回。无边落木萧萧下，不尽长江滚滚来。"
    "万里悲秋常作客，百年多病独登台。艰难苦恨繁霜鬓，潦倒新停浊酒杯。"
)
SNOW = "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。"


@pytest.mark.parametrize("poem, form", [
    (TOWER, "五绝"), (RIVER, "七绝"), (SPRING, "五律"), (HEIGHTS, "七律"), (" 白日依山尽，\n黄河入海流。 欲穷千里目，\n更上一层楼。\n", "五绝"),
    ("何如肆辙迹？万里赏瑶池！何如肆辙迹；万里赏瑶池？", "五绝"), ("", None), (TOWER[:-1], None), (TOWER[1:], None), (TOWER + RIVER, None),
    (TOWER.replace("。", "，"), None), (TOWER[:12], None), (TOWER.replace("依", "a"), None), (TOWER.replace("依", "[UNK]"), None),
    ("「白日依山尽，黄河入海流。」“欲穷千里目，更上‘一层’楼。”", "五绝"), ("登鹳雀楼\n" + TOWER, "五绝"), ("登鹳雀楼 王之涣　" + TOWER, "五绝"),
    ("《登鹳雀楼》 王之涣：" + TOWER, "五绝"), ("登鹳雀楼：" + TOWER, "五绝"), ("登鹳雀楼" + TOWER, None), ("登鹳雀楼，" + TOWER, None), ("《登鹳雀楼》", None),
    # Only what stands before a poem is its title, and looking for one takes no time.
    (TOWER[:12] + "静夜思 " + TOWER[12:], None), (TOWER[:6] + "李白：" + TOWER[6:], None), ("山" * 300_000, None),
    (TOWER.replace("，", ","), None), (TOWER + "春", None), (TOWER.replace("依", "𬮱"), "五绝"), (TOWER.replace("依", "〇"), "五绝"),
])  # fmt: skip
def test_form(poem, form):
    assert form_of(poem) == form


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([*FORMS.values()]))
def test_a_poem_is_in_a_form_until_anything_is_missing_or_too_much(data, form):
    one, marks = st.sampled_from("春江花月夜"), (st.sampled_from(INNER), st.sampled_from(LAST))
    lines = [
        "".join(data.draw(one) for _ in range(form.width)) + data.draw(marks[line % 2]) for line in range(form.lines)
    ]
    poem = "".join(lines)
    assert form_of(poem) == form.name and len(poem) == form.length
    at = data.draw(st.integers(0, len(poem) - 1))
    assert form_of(poem[:at] + poem[at + 1 :]) is None and form_of(poem[:at] + "春，" + poem[at:]) is None


@pytest.mark.parametrize("name, form", [
    ("五绝", "五绝"), ("五言绝句", "五绝"), ("QIJUE", "七绝"), (" 七言律詩 ", "七律"), ("wulv", "五律"), ("qilü", "七律"),
])  # fmt: skip
def test_names_of_forms_and_books(name, form):
    assert form_named(name).name == form
    assert [book_named(one) for one in ("平水韻", "pingshui", "新韵", "XinYun")] == [PINGSHUI] * 2 + [XINYUN] * 2
    with pytest.raises(InputError, match="--form 'x': no such form; use 五绝, 七绝, 五律 or 七律"):
        form_named("x")
    with pytest.raises(InputError, match="--rhyme 'x': no such book of rhymes; use 平水韵 or 中华新韵"):
        book_named("x")


def test_the_books_are_whole():
    assert [sum(group.tone == tone for group in book().groups) for tone in ("上平", "下平", "上声", "去声", "入声")] == [
        15, 15, 29, 30, 17,
    ]  # fmt: skip
    assert sum(group.level for group in book().groups) == 30
    assert [group.level for group in book(XINYUN).groups] == [True] * 14 + [False] * 14
    for name in (PINGSHUI, XINYUN):
        of = book(name).of
        assert {number for numbers in of.values() for number in numbers} == {*range(len(book(name).groups))}
        text = "".join((BUNDLED / "poems.txt").read_text(encoding="utf-8").split())
        missing = [one for one in text if one not in of and one not in INNER]
        assert len(missing) < 0.005 * len(text), missing


@pytest.mark.parametrize("poem, by_pingshui, by_xinyun", [
    (TOWER, "下平十一尤", "平声七尤"), (DAWN, "上声十七筱", "仄声六豪"), (RIVER, "上平十五删", "平声八寒"),
    (SPRING, "下平十二侵", None), (HEIGHTS, "上平十灰", None), (SNOW, "入声九屑", "仄声三皆"),
    ("春来，秋风。春去，秋声。", None, "平声十一庚"),  # 东 and 庚 are one today
    ("春来，秋花。春去，秋花。", None, None),  # a character does not rhyme with itself
])  # fmt: skip
def test_rhymes(poem, by_pingshui, by_xinyun):
    for by, group in ((PINGSHUI, by_pingshui), (XINYUN, by_xinyun)):
        found = rhyme_of(poem, by)
        assert (found if found is None else str(found)) == group
        assert rhymes(poem, by) is (group is not None)


@pytest.mark.parametrize(
    "poem", ["", "春", TOWER[:12], TOWER[:18], "春来，秋龘龘。春去，秋。春来，秋\U0002f800。春去，秋天。"]
)
def test_rhymes_that_cannot_be_told(poem):
    assert rhymes(poem) is None and rhyme_of(poem) is None


@pytest.mark.parametrize("poem, scheme", [
    (TOWER, "仄起首句不入韵"), (RIVER, "平起首句入韵"), (SPRING, "仄起首句不入韵"), (HEIGHTS, "仄起首句入韵"),
])  # fmt: skip
def test_tones_of_regulated_verse(poem, scheme):
    report = tones(poem)
    assert report.scheme == scheme and [len(line) for line in report.lines] == [len(poem.split("，")[0])] * len(
        report.lines
    )
    assert report.regulated, report.faults


def test_a_tone_that_is_off_is_named():
    report = tones(TOWER.replace("河", "水"))
    assert report.faults == (Fault(2, 2, "水"),) and report.regulated is False
    assert (
        tones("渭城朝雨浥轻尘，客舍青青柳色新。劝君更尽一杯酒，西出阳关无故人。").regulated is False
    )  # 失粘, as it is known for
    report = tones(
        "春雨清风过夜黄，夏头如照一斜人。秋来不说三成少，冬子人看已旧珍。"
    )  # the first line ends level, and elsewhere
    assert report.faults == (Fault(1, 7, "黄"),)
    for text in (f"《登鹳雀楼》{TOWER}", f"登鹳雀楼 {TOWER}", TOWER.replace("更上一", "更“上一”")):
        assert tones(text) == tones(TOWER) and rhymes(text) is True
    assert tones("春来").regulated is None and tones("春来").lines == ("平平",)
    assert [tone_of(one) for one in "春水看𪚥"] == ["平", "仄", "中", "？"]
    assert [tone_of(one, XINYUN) for one in "白国"] == ["平", "平"] and tone_of("白") == "仄"


def test_a_character_that_is_not_in_the_book_is_not_called_right():
    strange = HEIGHTS.replace("滚滚", "滾滾")
    report = tones(strange)
    assert not report.faults and report.unknown == (Fault(4, 5, "滾"), Fault(4, 6, "滾")) and report.regulated is None
    assert tones(strange.replace("万里", "万悲")).regulated is False
    said = shown(strange)
    assert "every tone right" not in said and said.endswith("not in the book: 滾 (line 4, 5) 滾 (line 4, 6)")
    assert (
        verdict(strange)["unknown"][0] == {"line": 4, "place": 5, "character": "滾"}
        and shares([strange]).regulated == 0
    )


def test_verdicts_and_shares():
    told = verdict(TOWER)
    assert json.loads(json.dumps(told, ensure_ascii=False)) == told == {
        "form": "五绝", "rhymes": True, "rhyme": "下平十一尤", "tones": ["仄仄平平仄", "平平仄仄平", "中平平仄仄", "仄仄仄平平"],
        "scheme": "仄起首句不入韵", "regulated": True, "off": [], "unknown": [],
    } | {"tones": [*tones(TOWER).lines]}  # fmt: skip
    assert verdict("春")["form"] is None and "in no form" in shown("春") and "every tone right" in shown(TOWER)
    assert "水 (line 2, 2)" in shown(TOWER.replace("河", "水"))
    found = shares([TOWER, RIVER, DAWN[:-1], "春"])
    assert (found.poems, found.in_form, found.rhyming, found.regulated) == (4, 0.5, 0.75, 1.0)
    assert found.forms == {"五绝": 1, "七绝": 1} and shares([TOWER, RIVER], "七绝").in_form == 0.5
    assert shares([]) == (0, 0.0, 0.0, 0.0, {})


def test_what_people_wrote_is_mostly_in_form_and_rhymes():
    """The bundled verses are new, and their rhymes are today's or the old ones."""
    poems = (BUNDLED / "poems.txt").read_text(encoding="utf-8").splitlines()
    found = shares(poems)
    assert found.in_form > 0.9 and max(found.rhyming, shares(poems, by=XINYUN).rhyming) > 0.8


def test_it_needs_neither_torch_nor_numpy():
    code = "import sys; import fastpoem.poetry.verdict; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
