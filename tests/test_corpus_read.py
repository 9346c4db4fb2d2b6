"""Reading: the lines a plain Python loop would give, from every form; and every bad file refused by name and line."""

import gzip
import io
import json
import lzma
import random
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.account import Account
from fastpoem.corpus.formats import LONGEST_CHARS
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.source import Source
from fastpoem.errors import InputError

POEMS = ["床前明月光，疑是地上霜。", "春眠不觉晓，处处闻啼鸟。", "白日依山尽，黄河入海流。"]
TRICKY = "春 \t\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\u3000\u00a0\ufeff。é𠀀a"


def poems(*paths: Path, piece: int = 1 << 21, account: Account | None = None, **how: object) -> list[str]:
    source = Source(paths, **how)  # type: ignore[arg-type]
    return [line for block in read_blocks(source, account, piece_bytes=piece) for line in block.lines]


def blanks(path: Path, piece: int = 1 << 21) -> int:
    return sum(block.blank for block in read_blocks(path, piece_bytes=piece))


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        poems(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


@settings(deadline=None, max_examples=400)
@given(st.text(st.sampled_from(TRICKY), max_size=60), st.integers(1, 9), st.booleans())
def test_the_lines_are_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece: int, bom: bool
) -> None:
    path = tmp_path_factory.mktemp("read") / "a.txt"
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    with open(path, encoding="utf-8-sig") as lines:
        rows = list(lines)
    wanted = [row.strip() for row in rows if row.strip()]
    if wanted:
        assert poems(path, piece=piece) == wanted
        assert blanks(path, piece=piece) == len(rows) - len(wanted)
    else:
        assert "holds no poem" in refusal(path, piece=piece)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, lzma.compress], ids=["txt", "gz", "xz"])
def test_newlines_and_compressions(tmp_path: Path, newline: str, pack: object) -> None:
    suffix = {"compress": {gzip.compress: ".gz", lzma.compress: ".xz"}.get(pack, "")}["compress"]  # type: ignore[call-overload]
    path = tmp_path / f"poems.txt{suffix}"
    path.write_bytes(pack(newline.join(["", *POEMS, " ", "尾"]).encode()))  # type: ignore[operator]
    assert poems(path) == [*POEMS, "尾"]
    assert blanks(path) == 2


def test_two_compressed_streams_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "two.txt.xz"
    path.write_bytes(lzma.compress("春\n".encode()) + lzma.compress("夏\n".encode()))
    assert poems(path) == ["春", "夏"]


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 21])
def test_json_in_every_shape(tmp_path: Path, piece: int) -> None:
    items = [
        POEMS[0],
        {"paragraphs": ["春眠不觉晓，", "处处闻啼鸟。"], "title": "春晓", "author": None},
        {"text": " 上\n下\r\n左 "},
        {"content": ["甲", "乙"]},
        {"paragraphs": []},
        "   ",
        {"text": '引号"和\\逗号,]}', "n": [1, -2.5e3, True, {"x": []}]},
    ]
    wanted = [POEMS[0], "春眠不觉晓，处处闻啼鸟。", "上下左", "甲乙", '引号"和\\逗号,]}']
    path = tmp_path / "a.json"
    for indent in (None, 2):
        for ascii_only in (True, False):
            path.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only), encoding="utf-8-sig")
            assert poems(path, piece=piece) == wanted
            assert blanks(path, piece=piece) == 2
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join([json.dumps(item) for item in items] + ["", " "]), encoding="utf-8")
    assert poems(lines, piece=piece) == wanted
    assert blanks(lines, piece=piece) == 4


def test_a_collection_folder(tmp_path: Path) -> None:
    folder = tmp_path / "chinese-poetry"
    (folder / "b").mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps([{"paragraphs": ["一。"]}, {"name": "李白", "desc": "…"}]))
    (folder / "b" / "c.json").write_text(json.dumps([{"paragraphs": ["二，", "三。"]}]))
    (folder / "authors.json").write_text(json.dumps([{"name": "杜甫"}]))
    (folder / "readme.txt").write_text("不读")
    assert poems(folder) == ["一。", "二，三。"]
    (folder / "b" / "d.json").write_text('[{"paragraphs": ["四。"]},\n{"paragraphs": [}]')
    with pytest.raises(InputError, match=r"d\.json, line 2: is malformed JSON"):
        poems(folder)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('["春",\n "夏"\n "秋"]', 3, "expected ','"),
        ('["春",\n\n{"text": 夏}]', 3, "Expecting value"),
        ('["春",\n"夏"', 2, "expected ','"),
        ('["春",\n', 2, "Expecting value"),
        ('["春"]\n x', 2, "something follows"),
        ('["春",\n"没完', 2, "Unterminated"),
        ('{"text": "春"}\n x', 2, "something follows"),
        ('{"text": "春"},\n{"text": "夏"}', 1, "something follows"),
        ("春", 1, "is not a JSON list"),
        ("[1]", 1, "is not a poem"),
        ("[" * 700 + '"春"' + "]" * 700, 1, "is not a poem"),
        ('{"text": [' * 300 + "]}" * 300, 1, "is not a poem"),
        ('[\n{"title": "春"}]', 2, "is not a poem"),
        ('[\n{"paragraphs": ["春", 1]}]', 2, "is not a poem"),
        ('[\n"\\ud800"]', 2, "half a character"),
        ("[" * 200_000, 1, "malformed"),
        ("[" + "9" * 5000 + "]", 1, "malformed"),
    ],
)
@pytest.mark.parametrize("piece", [3, 1 << 21])
def test_bad_json_is_refused_at_its_line(tmp_path: Path, text: str, line: int, reason: str, piece: int) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    message = refusal(path, piece=piece)
    assert f"line {line}:" in message
    assert reason in message


def test_bad_jsonl_is_refused_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('"春"\n\n{"text": "夏",}\n', encoding="utf-8")
    assert "line 3: is malformed JSON" in refusal(path)


def test_other_bad_files(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    assert "does not exist" in refusal(tmp_path / "missing.txt")
    assert "holds no poem" in refusal(file("empty.txt", b""))
    assert "holds no poem" in refusal(file("bom.txt", b"\xef\xbb\xbf"))
    assert "holds no poem" in refusal(file("blank.txt", b"\n \r\n\t\xe3\x80\x80\n"))
    assert "line 3: holds a NUL byte" in refusal(file("nul.txt", "春\n夏\n秋\0冬\n".encode() * 9))
    assert "binary" in refusal(file("weights.txt", bytes(range(1, 127)) * 3 + b"\0\0\0\1" * 20))
    assert "line 2: is not UTF-8" in refusal(file("latin.txt", "ok\nÉté à la mer\n".encode("latin-1")))
    assert "cannot be read" in refusal(file("cut.txt.gz", gzip.compress("春\n".encode() * 999)[:-9]))
    assert "cannot be read" in refusal(file("cut.txt.xz", lzma.compress("春\n".encode() * 999)[:-9]))
    assert "cannot be read" in refusal(file("not.txt.xz", "春".encode()))
    assert "cannot be read" in refusal(file("not.txt.gz", "春".encode()))
    assert "not UTF-8" in refusal(file("half.txt", "春\n夏".encode()[:-1]))
    assert "longer than" in refusal(file("endless.txt", b"a" * (LONGEST_CHARS + (1 << 22))))


def test_an_error_far_into_a_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "far.txt"
    path.write_bytes("春眠不觉晓\r\n".encode() * 500_000 + b"\xff\r\n")
    assert "line 500001:" in refusal(path)


def test_poems_of_one_character_and_of_a_million(tmp_path: Path) -> None:
    path = tmp_path / "sizes.txt"
    path.write_text("春\n" + "江" * 1_000_000 + "\n夏", encoding="utf-8")
    assert [len(poem) for poem in poems(path)] == [1, 1_000_000, 1]


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from(["a.txt", "a.json", "a.jsonl", "a.txt.gz", "a.txt.xz", "a.json.gz"]))
def test_no_bytes_bring_anything_but_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / name
    for content in (data, b"[" + data, gzip.compress(data)):
        path.write_bytes(content)
        try:
            assert all(poem == poem.strip() != "" for poem in poems(path, piece=16))
        except InputError as error:
            assert name in str(error)


def test_traditional_to_simplified(tmp_path: Path) -> None:
    pytest.importorskip("opencc")
    path = tmp_path / "t.txt"
    path.write_text("舉頭望明月，低頭思故鄉。\n\n雲想衣裳花想容\n", encoding="utf-8")
    assert poems(path, convert="t2s") == ["举头望明月，低头思故乡。", "云想衣裳花想容"]
    for name in ("nonsense", "../t2s", "t2s.json", "a/b"):
        with pytest.raises(InputError, match="is no OpenCC conversion"):
            poems(path, convert=name)


def test_conversion_without_opencc_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opencc", None)
    path = tmp_path / "t.txt"
    path.write_text("春", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape("pip install 'fastpoem[convert]'")):
        poems(path, convert="t2s")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(path: Path) -> int:
        tracemalloc.start()
        try:
            for _ in read_blocks(path, piece_bytes=1 << 16):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    rng = random.Random(0)
    line = "".join(rng.choice("春江花月夜") for _ in range(50))
    for suffix, text in (
        ("txt", f"{line}\n"),
        ("json", json.dumps({"paragraphs": [line]}, ensure_ascii=False) + ",\n"),
    ):
        peaks = []
        for count in (4000, 48_000):
            path = tmp_path / f"{count}.{suffix}"
            whole = io.StringIO()
            whole.write(text * count if suffix == "txt" else "[" + text * count + '"尾"]')
            path.write_text(whole.getvalue(), encoding="utf-8")
            peaks.append(peak(path))
        assert peaks[1] < 1.5 * peaks[0] + 100_000
