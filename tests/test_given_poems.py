"""Poems given to `fit` as a list or a dataset, and what is a list of files instead."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastpoem.api import configured
from fastpoem.corpus.given_poems import as_paths, called
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.source import Source
from fastpoem.errors import InputError
from fastpoem.paths import keep_caches

POEMS = ["床前明月光，疑是地上霜。", "春眠不觉晓，处处闻啼鸟。", "a.b"]


class Dataset:
    """As much of `datasets.Dataset` as is asked of it."""

    def __init__(self, **columns: list) -> None:
        self.columns, self.column_names = columns, [*columns]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return {name: column[key] for name, column in self.columns.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def read(data: object, **settings: object) -> list[str]:
    config = configured(data=data, **settings)
    return [line for block in read_blocks(Source.given(config.data, field=config.field)) for line in block.lines]


def test_poems_become_a_file_by_their_content(cache: Path) -> None:
    assert read(POEMS) == read(tuple(POEMS)) == POEMS
    assert read([["甲。", "乙。"], {"text": "丙。"}]) == ["甲。乙。", "丙。"]
    assert read(["甲"], val_data=["乙"]) == ["甲"]
    big = Dataset(id=list(range(2500)), content=[f"第{n}首" for n in range(2500)])
    assert read(big) == big.columns["content"]
    assert read(Dataset(verse=POEMS, n=[1, 2, 3]), field="verse") == POEMS
    (path,) = as_paths("data", Dataset(verse=POEMS), "verse")
    assert json.loads(Path(path).read_text(encoding="utf-8").splitlines()[0]) == {"verse": POEMS[0]}  # so it is used
    assert read(np.array(POEMS)) == read(np.array(POEMS, object)) == POEMS
    assert len(list((cache / "fastpoem/given").iterdir())) == 6  # one a text (and field), and nothing half-made
    assert configured(val_data=POEMS).val_data == configured(data=POEMS).data


def test_they_are_kept_where_the_cache_is_asked_for(cache: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    (path,) = configured(data=POEMS, cache_dir=here).data
    assert Path(path).parent == here / "given" and not cache.exists()
    keep_caches(str(here))  # as the run of that call does
    assert Path(*configured(data=POEMS).data).parent == cache / "fastpoem/given"
    assert called(Path(path), "a name") == "the given poems" and called(Path("given/a.jsonl"), "a name") == "a name"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"given: cannot be written \(.*cache_dir="):
        configured(data=POEMS, cache_dir=str(tmp_path / "file"))
    with pytest.raises(InputError, match="cache_dir=7: is of the wrong kind"):
        configured(data=POEMS, cache_dir=7)


def test_files_are_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b", "静夜思"):
        (tmp_path / name).write_text(name)
    assert as_paths("data", ["a.txt", "b", "静夜思"], None) == ("a.txt", "b", "静夜思")
    assert as_paths("data", [Path("a.txt"), "none"], None) == ("a.txt", "none")
    assert as_paths("data", ["poems.jsonl.gz", "春"], None) == ("poems.jsonl.gz", "春")
    assert as_paths("data", ["*.txt"], None) == ("*.txt",)
    assert as_paths("data", (), None) == ()
    assert len(as_paths("data", ["静夜思", "春晓"], None)) == 1  # one of them is no file: they are poems
    with pytest.raises(InputError, match=r"missing.txt: does not exist"):
        read(["missing.txt"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "data: is an empty list"),
        ([None], r"data\[0\]: None is no poem"),
        (["春", 3.5], r"data\[1\]: 3.5 is no poem"),
        (["春", b"x" * 5000], r"data\[1\]: b'xxx"),
        ([Path("a"), 3], r"data\[1\]: 3 is no path"),
        (["春\ud800"], r"data\[0\]: holds half a character"),
        ({"text": POEMS * 900}, "data: {'text'"),
        (7, "data: 7 is of the wrong kind; give a path, several, a list of poems or a datasets.Dataset"),
        (Dataset(verse=POEMS, n=[1, 2, 3]), "has the columns verse, n, none of a known name; name the one"),
        (POEMS[0], "data '床前.*is no path; a text is given as a list: data="),
        ("春\n江" * 900, "is no path; a text is given as a list: data="),
        ([{"text": {1, 2}}], r"data\[0\]: cannot be written as JSON"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_neither(data: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read(data)
    assert len(str(caught.value)) < 300
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    parts = Dataset()
    parts.column_names = {"train": ["text"], "test": ["text"]}  # type: ignore[assignment]
    with pytest.raises(InputError, match="is several datasets"):
        read(parts)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", "x" * 9999), ("epochs", "春" * 9999), ("recipe", [1] * 9999), ("seed", 1.5)]
)
def test_no_message_prints_a_value_whole(name: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        configured(**{name: value})
    assert len(str(caught.value)) < 250
    assert json.dumps(str(caught.value))
