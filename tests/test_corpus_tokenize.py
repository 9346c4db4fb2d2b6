"""Ids: identical to transformers' BertTokenizer, for all real poems and for everything a line can hold."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.pipeline import line_break_of
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError

SHARED = Path(os.environ.get("FASTPOEM_SHARED", Path(__file__).parents[2] / "shared"))
REAL = SHARED / "models" / "gpt2-distil-chinese"
needs_shared = pytest.mark.skipif(not REAL.is_dir(), reason="the shared vocabulary is not here (see FASTPOEM_SHARED)")

HAN = "春江花月夜明何时照我还一二三"
SMALL_VOCAB = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *HAN,
    *"，。！？□《》「」abcdeio019[]().,#-",
    *("##a", "##b", "##i", "##1", "##9", "##□", "ab", "ban", "##ana", "ⅸ", "ss", "σ", "##σ", "か", "##゙", "가", "豈"),
]
CONFIG: dict[str, Any] = {"tokenizer_class": "BertTokenizer"}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "cased": ({"do_lower_case": False}, {}),
    "accents": ({"strip_accents": False}, {}),
    "cased, no accents": ({"do_lower_case": False, "strip_accents": True}, {}),
    "no cjk": ({"tokenize_chinese_chars": False}, {}),
    "left": ({"truncation_side": "left"}, {}),
    "split": ({"split_special_tokens": True}, {}),
    "renamed": ({"cls_token": "一", "sep_token": "。", "pad_token": "[]"}, {}),
    "extra": ({"extra_special_tokens": ["春江", "a", ",", "。，", "[S]", "É", "𠀀", "月 夜"]}, {}),
    "named": ({"image_token": "[img]", "extra_special_tokens": {"poem_token": "夜"}}, {}),
    "decoder": (
        {
            "added_tokens_decoder": {
                "0": {"content": "[PAD]", "special": True, "normalized": False},
                "900": {"content": "花月", "normalized": True, "special": False},
                "901": {"content": "É", "normalized": True, "single_word": True},
                "902": {"content": "b,", "normalized": True, "lstrip": True, "rstrip": True},
                "903": {"content": "夜", "normalized": False, "lstrip": True, "rstrip": True},
            }
        },
        {},
    ),
    "legacy": (
        {},
        {
            "added_tokens.json": {"明月": 900, "[foo]": 901},
            "special_tokens_map.json": {"mask_token": {"content": "[MASK]", "lstrip": True}, "bos_token": "何时"},
        },
    ),
    "space": ({"added_tokens_decoder": {"900": {"content": " ", "normalized": True, "special": False}}}, {}),
}
SPECIALS = [
    "[SEP]",
    "[MASK]",
    "[CLS]",
    "[UNK]",
    "[PAD]",
    "[S]",
    "[img]",
    "[foo]",
    "春江",
    "花月",
    "明月",
    "b,",
    "夜",
    "何时",
    "[sep]",
]
MARKS = "\u0301\u0302\u0308\u0323\u3099\u309a\u302a\u302e\u302f\u20e3\ufe0f\u1d165\U0001d165"
ODD = "éÉñçåØİıſßςΣσǅﬁⅨ½²①ＡＢ１２，．［］かがガ가각ᄀ\u1161①"
RARE = "豈兀𠀀𪛖𪜀𫠟𫠠𫢰𬺡丽𰬸𱍐𲎰㐀䶵〇々〆□○◎●△"
VOID = " \t\u3000\u00a0\u1680\u2003\u200b\u200c\u200d\u2060\ufeff\u0085\u2028\u2029\x00\x01\x0b\x1f\x7f\u00ad\ufdd0\ufdd1\ufffd\uffff"
EMOJI = "😀👨🏽\u200d👩\U0001f1e8\U0001f1f3❤"
LATIN = "abcXYZio019.,[]()#-_/{}'\"~`$"

piece = st.one_of(
    st.sampled_from(HAN + "，。！？"),
    st.sampled_from(HAN + "，。！？"),
    st.sampled_from(LATIN),
    st.sampled_from(MARKS + ODD),
    st.sampled_from(RARE + EMOJI),
    st.sampled_from(VOID),
    st.sampled_from(SPECIALS),
    st.characters(exclude_categories=["Cs"]),
)
# Mostly provable with something odd inside, and odd throughout.
line = st.one_of(
    st.lists(piece, max_size=24).map("".join),
    st.builds(
        lambda a, odd, b: a + odd + b,
        st.text(HAN + "，。", max_size=6),
        piece,
        st.text(HAN + "，。", max_size=6),
    ),
)


def folder_of(tmp: Path, name: str, vocab: Sequence[str] = SMALL_VOCAB) -> Path:
    """A model folder with the tokenizer of a variant."""
    config, files = VARIANTS[name]
    folder = tmp / name.replace(" ", "_").replace(",", "")
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


def reference(folder: Path) -> Any:
    from transformers import BertTokenizer, __version__

    silent = "do_lower_case" not in json.loads((folder / "tokenizer_config.json").read_text())
    older = tuple(map(int, __version__.split(".")[:2])) < (
        5,
        4,
    )  # which take silence for False, as neither 4 nor later ones do
    return BertTokenizer.from_pretrained(folder, **({"do_lower_case": True} if silent and older else {}))


def assert_same(ours: PoemTokenizer, theirs: Any, lines: list[str], max_length: int) -> None:
    ids, lengths, stats = ours.encode(lines, max_length)
    wanted = theirs(lines, truncation=True, max_length=max_length)["input_ids"]
    assert ids.dtype == ours.dtype
    assert lengths.tolist() == [len(row) for row in wanted]
    assert ids.tolist() == [index for row in wanted for index in row]
    whole = theirs(lines)["input_ids"]
    assert stats.truncated == sum(len(row) > max_length for row in whole)
    assert stats.unknown_tokens == sum(row.count(theirs.unk_token_id) for row in wanted) == stats.unknown.total()


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PoemTokenizer, Any]:
    folder = folder_of(tmp_path_factory.mktemp("variant"), request.param)
    return PoemTokenizer.load(folder), reference(folder)


@settings(deadline=None, max_examples=150)
@given(st.lists(line, min_size=1, max_size=8), st.sampled_from([2, 3, 9, 512]))
def test_any_line_gives_the_librarys_ids(pair: tuple[PoemTokenizer, Any], lines: list[str], max_length: int) -> None:
    assert_same(*pair, lines, max_length)


def test_every_code_point_among_others(pair: tuple[PoemTokenizer, Any]) -> None:
    points = [
        chr(point)
        for point in [*range(0x3400), *range(0x9F00, 0xD800), *range(0xF900, 0x10400), *range(0x1F000, 0x20010)]
    ]
    ours, theirs = pair
    for pattern in ("春{}江", "a{}b", "{}"):
        lines = [pattern.format(char) for char in points[:: 5 if pattern == "春{}江" else 23]]
        ids, lengths, _ = ours.encode(lines, 512)
        wanted = theirs(lines, truncation=True, max_length=512)["input_ids"]
        assert lengths.tolist() == list(map(len, wanted))
        assert ids.tolist() == [index for row in wanted for index in row]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_tokenizer_saved_by_transformers_is_the_same(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, name)
    theirs = reference(folder)
    theirs.save_pretrained(tmp_path / "saved")
    ours, again = PoemTokenizer.load(folder), PoemTokenizer.load(tmp_path / "saved")
    lines = ["春江花月夜，É b, a[SEP]b 明月[foo][img]。", "何时[MASK] 夜 x", "月 夜一。"]
    assert_same(again, reference(tmp_path / "saved"), lines, 9)
    for tokenizer in (ours, again):
        assert tokenizer.cls_id == theirs.cls_token_id
        assert tokenizer.sep_id == theirs.sep_token_id
        assert tokenizer.pad_id == theirs.pad_token_id
        assert tokenizer.unk_id == theirs.unk_token_id
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
    assert [*again.files] == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("added", ["<abcdefghijk>", ",.;:!?", "[abcdefghijk,.;:!?]"])
def test_an_added_token_of_all_the_guards(tmp_path: Path, added: str) -> None:
    """No character is left to ask beside: the library does it all."""
    folder = folder_of(tmp_path, next(iter(VARIANTS)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": [added]}))
    assert_same(PoemTokenizer.load(folder), reference(folder), [f"春{added}a,b", "江月，", "abc ,."], 12)


def test_the_table_does_the_work_where_it_can(tmp_path: Path) -> None:
    tokenizer = PoemTokenizer.load(folder_of(tmp_path, "plain"))
    proven = [
        "ab",
        "春12",
        "□□",
        "a\u200b",
        "banana 101",
        "春江，花月。",
        "春 江\u3000花",
        "《a》1，□。",
        "春\u200b江",
        "龘龘。",
        "豈",
        "[",
        "[春]",
    ]
    assert tokenizer.encode(proven, 512)[2].by_library == 0
    unproven = ["春\u0301", "[SEP]", "春[MASK]江", "か\u3099", "e\u0301", "ab[UNK]", "\U000e0fff"]
    assert tokenizer.encode(unproven, 512)[2].by_library == len(unproven)
    assert tokenizer.encode(proven + unproven, 512)[2].by_library == len(unproven)


def test_what_became_unknown_is_counted(tmp_path: Path) -> None:
    tokenizer = PoemTokenizer.load(folder_of(tmp_path, "plain"))
    stats = tokenizer.encode(["龘春龘，齉。", "zzz 春", "龘" * 20], 12)[2]
    assert stats.unknown == {"龘": 12, "齉": 1, "z": 1}
    assert stats.unknown_tokens == 14
    assert stats.truncated == 1


def test_long_words_and_long_lines(pair: tuple[PoemTokenizer, Any]) -> None:
    lines = ["a" * 100, "a" * 101, "b" * 5000 + "春", "春" * 5000, "春a" * 3000, "１" * 300, "", " ", "\u200b"]
    for max_length in (2, 512, 65535):
        assert_same(*pair, lines, max_length)


def test_a_million_characters(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "plain")
    ours, theirs = PoemTokenizer.load(folder), reference(folder)
    for long in ("春，江" * 333_333 + "。", "ab 春" * 250_000):
        ids, lengths, stats = ours.encode(["短", long, "春"], 512)
        assert lengths.tolist() == [3, 512, 3]
        assert stats.truncated == 1
        assert ids[3:515].tolist() == theirs(long[:2000], truncation=True, max_length=512)["input_ids"]


def test_no_lines_at_all(tmp_path: Path) -> None:
    ids, lengths, stats = PoemTokenizer.load(folder_of(tmp_path, "plain")).encode([], 512)
    assert (len(ids), len(lengths), stats.by_library) == (0, 0, 0)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        PoemTokenizer.load(folder_of(tmp_path, "plain")).encode(["春\ud800江"], 512)


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    prints = {PoemTokenizer.load(folder_of(tmp_path, name)).fingerprint for name in VARIANTS}
    assert len(prints) == len(VARIANTS)
    swapped = [*SMALL_VOCAB[:5], SMALL_VOCAB[6], SMALL_VOCAB[5], *SMALL_VOCAB[7:]]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert PoemTokenizer.load(folder_of(tmp_path / "a", "plain", swapped)).fingerprint not in prints
    assert PoemTokenizer.load(folder_of(tmp_path / "b", "plain")).fingerprint in prints


def test_another_pipeline_goes_to_the_library_whole(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "春": 4, "江": 5}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs.backend_tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))  # a poem ends
    ours = PoemTokenizer.load(tmp_path)
    assert (ours.pad_id, ours.cls_id, ours.sep_id) == (0, 1, 2)
    assert_same(ours, theirs, ["春 江 花", "江</s>江", "春 " * 40], 10)
    assert ours.encode(["春 江"], 10)[2].by_library == 1


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no tokenizer; add the vocab.txt"),
        ({"vocab.json": "{}", "merges.txt": ""}, "holds no tokenizer; load it with transformers"),
        ({"spiece.model": b"\0"}, "holds no tokenizer; load it with transformers"),
        ({"vocab.txt": ""}, "has no [UNK]"),
        ({"vocab.txt": "[PAD]\n[CLS]\n[SEP]\n春\n"}, "has no [UNK]"),
        ({"vocab.txt": b"\xff\xfe\x00"}, "cannot be loaded"),
        ({"tokenizer.json": "{"}, "is not JSON"),
        ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": "{"}, "is not JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}, "cannot be loaded"),
        ({"tokenizer.json": "{}"}, "cannot be loaded"),
        ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": "[]"}, "is not a JSON object"),
        ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": '{"truncation_side": "up"}'}, "truncation_side"),
        (
            {"vocab.txt": "[UNK]\n", "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
            "no tokenizer.json",
        ),
        ({"vocab.txt": "[UNK]\n", "tokenizer_config.json": '{"added_tokens_decoder": {"x": 1}}'}, "cannot be loaded"),
    ],
)
def test_folders_without_a_usable_tokenizer_are_refused(
    tmp_path: Path, files: dict[str, str | bytes], reason: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        PoemTokenizer.load(tmp_path)
    assert reason in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        PoemTokenizer.load(tmp_path / "none")


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "plain")
    code = (
        "import sys; from pathlib import Path; from fastpoem.corpus.tokenize import PoemTokenizer;"
        f"PoemTokenizer.load(Path({str(folder)!r})).encode(['春江'], 9);"
        "sys.exit(bool({'transformers', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


BREAKS = {"[unused1]": ["[unused1]"], "/": ["/"], "[lb]": [], "春": []}


@pytest.mark.parametrize("token", BREAKS)
@pytest.mark.parametrize("name", ["plain", "extra", "decoder", "legacy"])
def test_a_token_for_line_breaks(tmp_path: Path, token: str, name: str) -> None:
    """Named by a flag or by the folder, in the vocabulary or new, it is the one that transformers makes of the folder's key."""
    folder = folder_of(tmp_path, name, [*SMALL_VOCAB, *BREAKS[token]])
    ours = PoemTokenizer.load(folder, token)
    saved = tmp_path / "saved"
    saved.mkdir()
    for file, content in ours.files.items():
        (saved / file).write_bytes(content)
    theirs, again = reference(saved), PoemTokenizer.load(saved)
    assert ours.line_break == again.line_break == line_break_of(saved) == token
    assert ours.fingerprint == again.fingerprint != PoemTokenizer.load(folder).fingerprint
    lines = [
        f"江花，{token}月夜。{token}{token}明",
        f"{token}江{token}",
        f"ab{token}ab 江{token}É",
        f"江{token}[SEP]b,{token}花月",
    ]
    for max_length in (2, 5, 64):
        assert_same(ours, theirs, lines, max_length)
        assert_same(again, theirs, [line + "\ufdd2" for line in lines], max_length)
    if name == "plain" and token != "春":
        assert ours.encode(lines[:2], 64)[2].by_library == 0  # a corpus of such poems stays as fast as any


@pytest.mark.parametrize("token", ["", " ", "a b", "[SEP]", "[CLS]", "[UNK]", "[PAD]", "[MASK]"])
def test_what_cannot_stand_for_a_line_break(tmp_path: Path, token: str) -> None:
    with pytest.raises(InputError, match="--line-break"):
        PoemTokenizer.load(folder_of(tmp_path, "plain"), token or " ")


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.text("春江花月ab，。！；」”/éx\u0301", min_size=1, max_size=40), min_size=1, max_size=5),
    st.sampled_from([2, 3, 5, 9, 20]),
)
def test_whole_sentences(whole_pair: tuple[PoemTokenizer, PoemTokenizer], lines: list[str], max_length: int) -> None:
    """What is cut ends where a sentence or a line does, if one fits; the table and the library agree where that is."""
    fast, slow = whole_pair
    assert slow._table is None
    ids, lengths, stats = fast.encode(lines, max_length, whole=True)
    other = slow.encode(lines, max_length, whole=True)
    assert ids.tolist() == other[0].tolist() and stats.truncated == other[2].truncated
    cut, full = fast.encode(lines, max_length), fast.encode(lines, 65535)
    for mine, plain, all_of_it in zip(
        *(np.split(x[0], np.cumsum(x[1])[:-1]) for x in ((ids, lengths), cut, full)), strict=True
    ):
        assert mine[-1] == fast.sep_id and mine[:-1].tolist() == plain[: len(mine) - 1].tolist()
        if len(all_of_it) <= max_length:
            assert mine.tolist() == all_of_it.tolist()
            continue
        names = [fast.library.id_to_token(int(one)) for one in all_of_it]
        ends = [
            place for place in range(2, len(plain)) if names[place] == "/" or names[place - 1] in ("。", "！", "；")
        ]
        if not ends:
            assert mine.tolist() == plain.tolist()
        else:
            assert names[len(mine) - 1] == "/" or names[len(mine) - 2] in ("。", "！", "；", "」", "”")


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[PoemTokenizer, PoemTokenizer]:
    folder = folder_of(tmp_path_factory.mktemp("whole"), "plain", [*SMALL_VOCAB, "；", "”", "/"])
    fast, slow = PoemTokenizer.load(folder, "/"), PoemTokenizer.load(folder, "/")
    slow._table = None
    return fast, slow


@needs_shared
@settings(deadline=None, max_examples=150)
@given(st.lists(line, min_size=1, max_size=8))
def test_any_line_under_the_real_vocabulary(lines: list[str]) -> None:
    assert_same(*real_pair(), lines, 64)


_REAL: list[tuple[PoemTokenizer, Any]] = []


def real_pair() -> tuple[PoemTokenizer, Any]:
    if not _REAL:
        _REAL.append((PoemTokenizer.load(REAL), reference(REAL)))
    return _REAL[0]


# Of what these releases of transformers and tokenizers make of all real poems: sha256 of lengths and ids, block by block. They take 30 s for it.
RECORDED = {("5.23.0", "0.23.3"): "27bb345b0862f808a55627dfa1b32ad86511302419b3d1587ec4954cf67ccaa7"}


@needs_shared
@pytest.mark.skipif(not (SHARED / "data" / "poems.txt.xz").is_file(), reason="the shared corpus is not here")
@pytest.mark.parametrize("asks", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_real_poems(asks: bool) -> None:
    """The library itself is asked where nothing is recorded of its release, and with `-m slow`."""
    ours, theirs = real_pair()
    first = next(read_blocks(SHARED / "data" / "poems.txt.xz", piece_bytes=1 << 18)).lines
    assert_same(ours, theirs, first, 512)
    library = theirs.backend_tokenizer  # as transformers built it, without the lists it wraps around each line
    library.enable_truncation(512)
    recorded, found = RECORDED.get((transformers.__version__, tokenizers.__version__)), hashlib.sha256()
    poems = by_library = 0
    for block in read_blocks(SHARED / "data" / "poems.txt.xz"):
        ids, lengths, stats = ours.encode(block.lines, 512)
        if asks or recorded is None:
            wanted = [encoding.ids for encoding in library.encode_batch_fast(block.lines)]
            assert lengths.tolist() == list(map(len, wanted))
            assert np.array_equal(ids, np.fromiter((index for row in wanted for index in row), ids.dtype, len(ids)))
        found.update(lengths.astype("<u4").tobytes() + ids.astype("<u4").tobytes())
        poems += len(block.lines)
        by_library += stats.by_library
    assert poems == 217_561
    assert by_library < 0.01 * poems
    assert recorded in (None, found.hexdigest()), "which line differs says `-m slow`"
