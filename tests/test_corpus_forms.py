"""What a corpus may come as: encodings, archives, tables, nested JSON, folders, patterns; and what is said of how it was taken."""

import bz2
import csv
import io
import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.account import Account
from fastpoem.corpus.manifest import FORMAT
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.source import Source, source_files
from fastpoem.errors import InputError

POEMS = ["床前明月光，疑是地上霜。", "春眠不觉晓，处处闻啼鸟。", "白日依山尽，黄河入海流。"]
OLD = "秋風清，秋月明，落葉聚還散，寒鴉栖復驚。"


def taken(*paths: Path, piece: int = 1 << 21, **how: object) -> tuple[list[str], str]:
    """(the poems, what is said of how they were taken)."""
    source, account = Source(paths, **how), Account()  # type: ignore[arg-type]
    lines = [line for block in read_blocks(source, account, piece_bytes=piece) for line in block.lines]
    return lines, "\n".join(account.notes(source))


def refusal(*paths: Path, **how: object) -> str:
    with pytest.raises(InputError) as caught:
        taken(*paths, **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Encodings


@pytest.mark.parametrize("codec", ["gb18030", "gbk", "big5", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("piece", [1 << 21, 64])
def test_other_encodings_are_read_and_named(tmp_path: Path, codec: str, piece: int) -> None:
    lines = [OLD] * 9 if codec == "big5" else POEMS * 9
    said = {"gbk": "GB18030", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}.get(codec, codec.upper())
    text = "title in ASCII\n" + "\r\n".join(lines)
    for name, content in (("a.txt", text), ("a.json", json.dumps(lines, ensure_ascii=False, indent=1))):
        path = written(tmp_path / name, content.encode(codec))
        found, notes = taken(path, piece=piece)
        assert found[-len(lines) :] == lines
        assert f"read as {said}: {name}" in notes
    assert "read as" not in taken(written(tmp_path / "b.txt", text))[1]


def test_what_is_not_wholly_of_an_encoding_is_refused(tmp_path: Path) -> None:
    old = (POEMS[0] + "\n").encode("gb18030") * 9
    damaged = ("\n".join(POEMS) + "\n").encode()
    for name, content, says in (
        ("damaged.txt", damaged + b"\xff\n" + damaged, "damaged.txt, line 4: is not UTF-8"),
        ("mixed.txt", damaged + old, "mixed.txt, line 4: is not UTF-8 but looks like GB18030; convert it: iconv"),
        ("torn.txt", old + b"\x81\n" + old, "torn.txt, line 10: the file is not UTF-8, and from here on not GB18030 either"),
        ("cut.txt", old + b"\xb4", "from here on not GB18030 either"),
        ("half.txt", "\n".join(POEMS).encode()[:-1], "half.txt, line 3: ends inside a character, so it was cut"),
        ("wide.txt", "\n".join(POEMS).encode("utf-16")[:-1], "not UTF-16 either"),
        ("nul.txt", "春\n\0夏".encode("utf-16"), "nul.txt, line 2: holds a NUL byte"),
        ("latin.txt", "Été à la mer\n".encode("latin-1"), "latin.txt, line 1: is not UTF-8; convert"),
    ):  # fmt: skip
        assert says in refusal(written(tmp_path / name, content))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.text("春江花月夜明何时照我还，。不人一山风无日云\u3000 ab1", min_size=1, max_size=30), min_size=1, max_size=9
    ),
    st.sampled_from(["gb18030", "utf-16"]),
    st.integers(2, 50),
)
def test_an_encoding_gives_the_text_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], codec: str, piece: int
) -> None:
    path = written(tmp_path_factory.mktemp("codec") / "a.txt", "\n".join(lines).encode(codec))
    try:
        found, notes = taken(path, piece=piece)
    except InputError:
        return
    if "read as" in notes or "\n".join(lines).isascii():
        assert found == [line for line in map(str.strip, lines) if line]


# Archives


def test_archives(tmp_path: Path) -> None:
    text = "\n".join(POEMS).encode()
    assert taken(written(tmp_path / "a.txt.bz2", bz2.compress(text)))[0] == POEMS
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("诗/b.txt", text)
        archive.writestr("诗/a.json", json.dumps(["一。"]))
        archive.writestr("__MACOSX/._b.txt", b"\0\1")
        archive.writestr("cover.png", b"\x89PNG")
    found, notes = taken(written(tmp_path / "a.zip", packed.getvalue()))
    assert found == ["一。", *POEMS] and "not read: 1 .png" in notes
    assert "cannot be read" in refusal(written(tmp_path / "cut.zip", packed.getvalue()[:-30]))
    broken = io.BytesIO()
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("a.json", '["春", 夏]')
    assert "broken.zip/a.json, line 1: is malformed JSON" in refusal(
        written(tmp_path / "broken.zip", broken.getvalue())
    )


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("a.tar.gz", "unpack it with tar xf"),
        ("a.tgz", "unpack it with tar xf"),
        ("a.txt.zst", "decompress it with zstd -d"),
        ("a.parquet", "as .jsonl"),
        ("a.xlsx", "save it as CSV"),
        ("a.docx", "save it as plain text"),
    ],
)
def test_what_is_not_read_is_named_with_a_mend(tmp_path: Path, name: str, mend: str) -> None:
    message = refusal(written(tmp_path / name, b"PK\3\4"))
    assert f"{name}: is a" in message and mend in message


# Tables


def table(path: Path, rows: list[list[str]], **how: str) -> Path:
    text = io.StringIO()
    csv.writer(text, **how).writerows(rows)  # type: ignore[arg-type]
    return written(path, text.getvalue())


@pytest.mark.parametrize("named", ["内容", "content", "Text", "paragraphs", "诗文"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.bz2"])
def test_the_column_of_poems_is_found(tmp_path: Path, named: str, suffix: str) -> None:
    rows = [["title", named, "author"], *(["题，", poem, "某"] for poem in POEMS), ["", "", ""], ["x", "a\nb", ""]]
    how = {"delimiter": "\t"} if suffix == "tsv" else {}
    path = table(tmp_path / f"a.{suffix}", rows, **how)
    if suffix.endswith("bz2"):
        path.write_bytes(bz2.compress(path.read_bytes()))
    found, notes = taken(path, piece=7)
    assert found == [*POEMS, "a b"]
    assert f"taken from '{named}' of a.{suffix}" in notes
    assert taken(path, field="author")[0] == ["某"] * 3


def test_tables_of_other_manners(tmp_path: Path) -> None:
    assert taken(table(tmp_path / "semi.csv", [["id", "text"], ["1", POEMS[0]]], delimiter=";"))[0] == POEMS[:1]
    assert taken(written(tmp_path / "bare.csv", "\n".join(POEMS)))[0] == POEMS  # no names, one column
    assert taken(written(tmp_path / "one.csv", "诗\n" + "\n".join(POEMS)))[0] == POEMS
    assert taken(table(tmp_path / "list.csv", [["paragraphs"], ["['甲。', '乙。']"], ['["丙。", "丁。"]']]))[0] == ["甲。乙。", "丙。丁。"]  # fmt: skip
    assert taken(written(tmp_path / "bom.csv", "\ufefftext,a\r\n春,1\r\n"))[0] == ["春"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("title,author,verse\na,b,c\n", "has the columns title, author, verse, none of a known name; name the one"),
        ("text,author\n春,李\n春,夏,秋\n", "line 3: has 3 columns, the first line has 2"),
        ('text,author\n"春\n夏,李\n', "line 2: is malformed CSV"),
        ('text,author\n春,李\n"春"x,李\n', "line 3: is malformed CSV"),
        ("text,author\n", "holds no poem"),
        ("", "holds no poem: it is empty"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str, says: str) -> None:
    assert says in refusal(written(tmp_path / "a.csv", content))


def test_a_field_that_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "text,author\n春,李\n")
    assert f"--field verse: is no column of {path}, which has text, author" in refusal(path, field="verse")
    lines = written(tmp_path / "a.jsonl", '{"text": "春"}')
    assert "item 1 is not a poem: it has 'text', not --field verse" in refusal(lines, field="verse")
    nested = written(tmp_path / "b.jsonl", '{"data": {"content": ["春。", "夏。"]}}\n{"data": {"data": "秋"}}')
    assert taken(nested, field="data")[0] == ["春。夏。", "秋"]
    deep = written(tmp_path / "deep.json", '{"data": ' * 40 + '"春"' + "}" * 40)
    assert "is not a poem" in refusal(deep, field="data")
    assert "--field text was not used" in taken(written(tmp_path / "a.txt", "春"), field="text")[1]


# JSON


@pytest.mark.parametrize("piece", [5, 1 << 21])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"title": "x", "paragraphs": ["甲。", "乙。"]}', ["甲。乙。"]),
        ('{"text": "甲"}\n{"text": "乙"}\n', ["甲", "乙"]),  # JSON Lines by another name
        ('"甲"\n"乙"', ["甲", "乙"]),
        ('{"title": "x", "content": [{"type": "五绝", "content": [{"chapter": "c", "paragraphs": ["甲，", "乙。"]}]}]}', ["甲，乙。"]),
        ('[{"para": ["甲"]}, {"内容": "乙"}, null, "丙"]', ["甲", "乙", "丙"]),
        ('{"version": 1, "data": [{"content": "甲"}, {"content": "乙"}]}', ["甲", "乙"]),
    ],
)  # fmt: skip
def test_json_in_other_shapes(tmp_path: Path, content: str, wanted: list[str], piece: int) -> None:
    assert taken(written(tmp_path / "a.json", content), piece=piece)[0] == wanted


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_of_one_long_line_says_where_in_it(tmp_path: Path, name: str) -> None:
    items = [json.dumps({"text": poem}, ensure_ascii=False) for poem in POEMS * 50]
    items[120] = '{"text": 床前}'
    text = "[" + ", ".join(items) + "]"
    message = refusal(written(tmp_path / name, text), piece=100)
    column = text.index("床前}") + 1
    assert f"column {column:,}" in message and "床前}" in message
    assert "item 121" in message if name == "a.json" else "item 1" in message
    message = refusal(written(tmp_path / "keys.json", json.dumps([{"text": "春"}, {"a" * 500: "春", "b": 1}])))
    assert "line 1: item 2 is not a poem: it has 'aaaa" in message and "name the key" in message


# Line breaks


def test_line_breaks_are_kept_or_said_to_be_joined(tmp_path: Path) -> None:
    poem = "甲。\r\n 乙。\n\n\n\n丙。"
    paths = [
        written(tmp_path / "a.json", json.dumps([{"text": poem}, {"text": "one\ntwo"}, {"text": "丁"}])),
        table(tmp_path / "a.csv", [["text", "n"], [poem, "1"]]),
        written(tmp_path / "b.jsonl", json.dumps(["甲。", "乙。", "", "", "", "丙。"])),
    ]
    joined, notes = taken(*paths)
    assert joined == ["甲。乙。丙。", "one two", "丁", "甲。乙。丙。", "甲。乙。丙。"]
    assert "the lines of 4 poems were joined (--line-break TOKEN keeps" in notes
    kept, notes = taken(*paths, line_break="[B]")
    assert kept == ["甲。[B]乙。[B][B]丙。", "one[B]two", "丁", "甲。[B]乙。[B][B]丙。", "甲。[B]乙。[B][B]丙。"]
    assert "line breaks kept as [B] in 4 poems" in notes
    assert "[B] in 0 poems" in taken(written(tmp_path / "a.txt", "甲\n乙"), line_break="[B]")[1]


# Folders and patterns


def test_a_folder_reads_what_its_files_read_alone(tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    files = {
        "全唐诗/poet.json": json.dumps([{"paragraphs": ["一。"]}, {"paragraphs": ["二，", "三。"]}]),
        "诗经/shijing.json": json.dumps([{"title": "关雎", "content": ["关关雎鸠，", "在河之洲。"]}]),
        "纳兰性德/a.json": json.dumps([{"para": ["四。"], "author": "x"}]),
        "蒙学/sanzijing.json": json.dumps({"title": "三字经", "paragraphs": ["人之初，", "性本善。"]}),
        "mine/own.txt": "五。\n六。",
        "table.csv": "text,n\n七。,1\n",
    }
    for name, content in files.items():
        written(folder / name, content)
    alone = [line for name in sorted(files, key=lambda name: folder / name) for line in taken(folder / name)[0]]
    for name, content in {
        "全唐诗/authors.json": json.dumps([{"name": "李白", "desc": "…"}, {"name": "杜甫"}]),
        "README.md": "# x", "readme.txt": "不读", "images/a.png": "png", "images/b.png": "png",
        ".git/config.json": '["不"]', ".hidden.txt": "不", "package.json": '{"name": "x"}',
        "old/manifest.json": json.dumps({"format": FORMAT}), "old/a.txt": "不", "runs/a/metrics.jsonl": '{"text": "不"}',
        "runs/a/config.json": "{}", "runs/a/model/vocab.txt": "不", "model/config.json": "{}", "model/vocab.txt": "不",
    }.items():  # fmt: skip
        written(folder / name, content)
    found, notes = taken(folder)
    assert found == alone and len(alone) == 8
    for part in (
        "2 .png",
        "1 .md",
        "1 readme.txt",
        "1 hidden folder",
        "1 token store",
        "1 run",
        "1 model",
        "1 hidden file",
    ):
        assert part in notes
    assert "3 items without a poem were passed over: package.json, authors.json" in notes
    for name, why in (("old", "token store"), ("runs/a", "run"), ("model", "model")):
        assert f"is a {why}, not poems" in refusal(folder / name)


def test_empty_is_said_of_what_is_empty_only(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: is an empty folder" in refusal(tmp_path / "empty")
    written(tmp_path / "pictures/a.png", "x")
    written(tmp_path / "pictures/.b.txt", "x")
    assert "holds no text, only 1 hidden file, 1 .png" in refusal(tmp_path / "pictures")
    written(tmp_path / "authors/a.json", json.dumps([{"name": "李白", "desc": "x"}] * 3))
    assert "authors: holds no poem: its 3 items have name, desc; name the key" in refusal(tmp_path / "authors")
    written(tmp_path / "blank/a.txt", " \n")
    assert "blank: holds no poem: it is empty or blank" in refusal(tmp_path / "blank")
    written(tmp_path / "blank/b.txt", "春")
    assert taken(tmp_path / "blank")[0] == ["春"]  # one blank file among others is no fault
    assert "a.txt: holds no poem" in refusal(tmp_path / "blank/b.txt", tmp_path / "blank/a.txt")


def test_patterns_and_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a", "c"):
        written(tmp_path / "poems" / f"{name}.txt", name)
    written(tmp_path / "odd[1].txt", "奇")

    def read(*data: str) -> list[str]:
        return taken(*Source.given(data).paths)[0]

    assert read("poems/*.txt") == ["a", "b", "c"]
    assert read("poems/c.txt", "poems/[ab].txt", "poems") == ["c", "a", "b", "a", "b", "c"]
    assert read("**/c.txt") == ["c"]
    assert read("odd[1].txt", "poems/a.txt", "poems/a.txt") == ["奇", "a"]  # a name that is there is no pattern
    with pytest.raises(InputError, match=r"--data poems/\*.json: matches nothing; check the pattern"):
        Source.given(["poems/*.json"])
    assert Source.given(["poems/*.txt"]).name == "a.txt and 2 more"
    assert len(source_files(Source.given(["poems", "odd[1].txt"]))) == 4
