"""The token store: what goes in comes out; damage, foreign files and hostile manifests are refused; kills leave nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fastpoem.corpus import make
from fastpoem.corpus.manifest import FORMAT, MANIFEST, ROW_MAP, VERSION, sealed
from fastpoem.corpus.source import Source
from fastpoem.corpus.store import TokenStore, cached_store, is_store, odd_in_short, prepare_store, summarise
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("FASTPOEM_SHARED", ROOT.parent / "shared"))
HAN = "春江花月夜明何时照我还一二三四五六七八九十"
PREPARE = """
import sys
from pathlib import Path
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
source, folder, out = map(Path, sys.argv[1:])
tokenizer = PoemTokenizer.load(folder)
print("begun", flush=True)
store = prepare_store(source, tokenizer, out, progress=lambda poems: print(poems, flush=True))
print(store.rows, flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *HAN, "，", "。", "a", "##a"]
    (path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PoemTokenizer:
    return PoemTokenizer.load(folder)


def verses(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice(HAN) for _ in range(rng.choice([1, 5, 5, 5, 7, 7, 20, 40, rng.randrange(1, 90)])))
        for _ in range(count)
    ]


def text(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: PoemTokenizer) -> TokenStore:
    path = tmp_path_factory.mktemp("small")
    return prepare_store(text(path / "poems.txt", verses(300)), tokenizer, path / "store", max_length=64, buckets=5)


def test_rows_come_back_in_the_order_of_the_text(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    lines = verses(3000)
    source = text(tmp_path / "poems.txt", [lines[0], "", *lines[1:], "  ", lines[7], lines[7]])
    store = prepare_store(source, tokenizer, tmp_path / "store", max_length=64, buckets=7)
    lines += [lines[7]] * 2
    ids, lengths, _ = tokenizer.encode(lines, 64)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    assert store.rows == len(store) == len(lines)
    for row in [*range(0, len(lines), 7), len(lines) - 1]:
        assert np.array_equal(store[row], rows[row])
        assert store.tokens(row).dtype == np.uint16
    assert np.array_equal(store[-1], rows[-1])
    for row in (len(lines), -len(lines) - 1):
        with pytest.raises(IndexError):
            store[row]

    which, place = store.locate(np.arange(len(lines)))
    for index, bucket in enumerate(store.buckets):
        mine = np.flatnonzero(which == index)
        assert place[mine].tolist() == list(range(bucket.rows))  # the text's order inside a bucket
        assert np.array_equal(bucket.lengths, lengths[mine])
        assert bucket.tokens.shape == (bucket.rows, bucket.length)
        padded = np.arange(bucket.length) >= bucket.lengths[:, None]
        assert (bucket.tokens[padded] == tokenizer.pad_id).all()
        assert np.array_equal(bucket.tokens[~padded], np.concatenate([rows[row] for row in mine]))
    shuffled = np.random.default_rng(0).permutation(len(lines))
    again = store.locate(shuffled)
    assert np.array_equal(again[0], which[shuffled])
    assert np.array_equal(again[1], place[shuffled])

    counts = store.manifest["counts"]
    assert counts["blank"] == 2
    assert counts["tokens"] == lengths.sum()
    assert counts["duplicates"] == sum(count - 1 for count in Counter(lines).values())
    assert counts["truncated"] == sum(len(line) > 62 for line in lines)
    assert [bucket.length for bucket in store.buckets][-1] == 64
    store.verify()


@pytest.mark.parametrize("chunk", [64, 1000])
def test_chunks_make_no_difference(
    tmp_path: Path, tokenizer: PoemTokenizer, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    source = text(tmp_path / "poems.txt", verses(500))
    whole = prepare_store(source, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(make, "CHUNK_TOKENS", chunk)
    assert prepare_store(source, tokenizer, tmp_path / "parts").identity == whole.identity


def test_one_poem_and_poems_that_are_nothing(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    store = prepare_store(text(tmp_path / "one.txt", ["春"]), tokenizer, tmp_path / "one")
    assert store[0].tolist() == [2, 5, 3]
    assert [bucket.length for bucket in store.buckets] == [3]
    store = prepare_store(text(tmp_path / "void.txt", ["\u200b", "春" * 1_000_000]), tokenizer, tmp_path / "void")
    assert store[0].tolist() == [2, 3]
    assert len(store[1]) == 512
    assert "1 cut to 512" in "\n".join(summarise(store))


def test_ids_beyond_16_bits(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(70_000)), "春"])
    )
    tokenizer = PoemTokenizer.load(tmp_path)
    store = prepare_store(text(tmp_path / "a.txt", ["春w9。", "春，春"]), tokenizer, tmp_path / "store")
    assert store[0].dtype == store[1].dtype == np.uint32
    assert store[0].tolist() == [2, 70_005, 14, 1, 3]
    assert store[1].tolist() == [2, 70_005, 1, 70_005, 3]


def test_the_summary_tells_what_matters(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    source = text(tmp_path / "a.txt", ["春江龘龘。", "春江龘龘。", "", "花" * 80])
    summary = "\n".join(summarise(prepare_store(source, tokenizer, tmp_path / "store", max_length=50)))
    for part in ("3 (1 duplicates, 1 blank lines skipped, 1 cut to 50 tokens)", "龘 4", "[UNK]      4", "up to    50"):
        assert part in summary


def test_the_summary_tells_what_does_not_look_like_poems(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    lines = ["春江 花月。", "春1。", "春江。", "[CLS]花月。[SEP]", "花[SEP]月。"]
    store = prepare_store(text(tmp_path / "a.txt", lines), tokenizer, tmp_path / "store")
    summary = "\n".join(summarise(store))
    for part in (
        "look       1 (20.0%) came with the tokenizer's own frame, which was not set twice, such as [CLS]花月。[SEP]",
        "1 (20.0%) have spaces inside, such as 春江 花月。",
        "1 (20.0%) have digits, such as 春1。",
        "special tokens in the text: [SEP] 1",
    ):
        assert part in summary
    assert store[3].tolist() == tokenizer.encode(["花月。"], 9)[0].tolist()
    short = odd_in_short(store)
    assert short is not None and short.startswith("of 5 poems ") and "[SEP] stands in the text 1 times" in short
    (tmp_path / "b.json").write_text(json.dumps([{"text": "春\n江"}, {"text": "花"}]))
    said = "\n".join(summarise(prepare_store(tmp_path / "b.json", tokenizer, tmp_path / "json")))
    assert "text       the lines of 1 poems were joined" in said
    with pytest.raises(InputError, match="holds no poem, only the tokenizer's own frame"):
        prepare_store(text(tmp_path / "c.txt", ["[CLS][SEP]", "[CLS]"]), tokenizer, tmp_path / "none")


def test_framed_text_gives_the_store_of_the_poems(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    lines = [line for line in verses(200) if len(line) > 1]
    plain = prepare_store(text(tmp_path / "a.txt", lines), tokenizer, tmp_path / "a")
    framed = prepare_store(text(tmp_path / "b.txt", [f"[CLS]{line}[SEP]" for line in lines]), tokenizer, tmp_path / "b")
    assert framed.identity == plain.identity


def test_long_poems_are_cut_whole(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    source = text(
        tmp_path / "a.txt", ["春江花月。明何时照我还一。二三四五。", "春江花月明何时照我还一二三四五", "春。"]
    )
    store = prepare_store(Source((source,), whole=True), tokenizer, tmp_path / "store", max_length=10)
    assert store[0].tolist() == tokenizer.encode(["春江花月。"], 10)[0].tolist()
    assert store[1].tolist() == tokenizer.encode(["春江花月明何时照"], 10)[0].tolist()
    assert store.manifest["counts"]["truncated"] == 2 and store.manifest["source"]["whole"] is True
    plain = prepare_store(source, tokenizer, tmp_path / "plain", max_length=10)
    assert len(plain[0]) == 10 and plain.identity != store.identity


def test_a_store_of_the_version_before(tmp_path: Path, small: TokenStore) -> None:
    older = copied(small, tmp_path / "older")
    manifest = json.loads((older / MANIFEST).read_text())
    for key in ("look", "checksum"):
        del manifest[key]
    (older / MANIFEST).write_bytes(sealed(manifest | {"version": 1}))
    store = TokenStore.open(older)
    store.verify()
    assert store.identity == small.identity  # so a run of that time goes on
    assert len(summarise(store)) >= 6 and odd_in_short(store) is None


def test_the_real_corpus_is_padded_little(tmp_path: Path) -> None:
    source, model = SHARED / "data" / "poems.txt.xz", SHARED / "models" / "gpt2-distil-chinese"
    if not source.is_file():
        pytest.skip("the shared corpus is not here (see FASTPOEM_SHARED)")
    store = prepare_store(source, PoemTokenizer.load(model), tmp_path / "store")
    store.verify()
    positions = sum(bucket.length * bucket.rows for bucket in store.buckets)
    assert store.rows == 217_561
    assert len(store.buckets) == 32
    assert 1 - store.manifest["counts"]["tokens"] / positions <= 0.05


# What is refused


def copied(store: TokenStore, path: Path) -> Path:
    shutil.copytree(store.path, path)
    return path


def refusal(path: Path, name: str) -> str:
    with pytest.raises(InputError) as caught:
        TokenStore.open(path).verify()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damage_is_named(tmp_path: Path, small: TokenStore) -> None:
    names = sorted(path.name for path in small.path.iterdir())
    assert len(names) == 2 + 2 * len(small.buckets)
    for name in names:
        for damage in ("missing", "cut", "longer", "link", "folder", "empty"):
            path = copied(small, tmp_path / f"{name}-{damage}")
            file = path / name
            data = file.read_bytes()
            file.unlink()
            if damage == "link":
                (tmp_path / f"{name}-target").write_bytes(data)
                if name == MANIFEST:
                    continue
                file.symlink_to(tmp_path / f"{name}-target")
            elif damage == "folder":
                file.mkdir()
            elif damage != "missing":
                file.write_bytes({"cut": data[:-1], "longer": data + b"\0", "empty": b""}[damage])
            refusal(path, name)


def test_what_is_no_store(tmp_path: Path, small: TokenStore) -> None:
    assert "does not exist" in refusal(tmp_path / "none", "none")
    (tmp_path / "empty").mkdir()
    assert "is no token store" in refusal(tmp_path / "empty", "empty")
    text(tmp_path / "file", ["春"])
    assert "is no token store" in refusal(tmp_path / "file", "file")
    newer = copied(small, tmp_path / "newer")
    manifest = json.loads((newer / MANIFEST).read_text())
    (newer / MANIFEST).write_bytes(sealed(manifest | {"version": VERSION + 1}))
    assert f"reads {VERSION}" in refusal(newer, MANIFEST)
    huge = copied(small, tmp_path / "huge")
    os.truncate(huge / MANIFEST, 1 << 40)  # sparse: nothing may be read of it
    assert "larger than" in refusal(huge, MANIFEST)


def test_flipped_bits_are_detected_or_harmless(tmp_path: Path, small: TokenStore) -> None:
    rng = random.Random(1)
    path = copied(small, tmp_path / "store")
    files = sorted(path.iterdir())
    detected = harmless = 0
    for flip in range(400):
        file = files[flip % len(files)]
        data = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        whole = file.read_bytes()
        file.write_bytes(data)
        try:
            store = TokenStore.open(path)
            store.verify()
        except InputError as error:
            assert file.name in str(error)
            detected += 1
        else:  # only where the flip changed nothing that is read: between two tokens of JSON
            assert file.name == MANIFEST
            assert store.manifest == small.manifest
            assert store.identity == small.identity
            harmless += 1
        file.write_bytes(whole)
    assert detected + harmless == 400
    assert harmless <= 10
    TokenStore.open(path).verify()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_a_hostile_manifest_is_refused(
    small: TokenStore, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any value anywhere, with a right checksum: a refusal or a store that can be read, never another error."""
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        copied(small, folder)
    manifest = json.loads(json.dumps(small.manifest))
    del manifest["checksum"]
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(places(manifest)[1:]))
        holder = manifest
        for key in above:
            holder = holder[key]
        if data.draw(st.booleans()):
            number = st.sampled_from([0, -1, 1, 2, 255, 256, 2**16, 2**31, 2**63, float("nan"), float("inf"), True])
            holder[last] = data.draw(json_values | number)
        elif isinstance(holder, dict):
            del holder[last]
        break_path = data.draw(st.booleans())
        if break_path and isinstance(manifest.get("files"), dict):
            manifest["files"]["../../escape"] = {"size": 1, "sha256": "0"}
    (folder / MANIFEST).write_bytes(sealed(manifest))
    try:
        store = TokenStore.open(folder)
        store.verify()
        store.tokens(store.rows - 1)
        assert len(summarise(store)) >= 6
    except InputError:
        pass


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_for_a_manifest(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "bytes"
    folder.mkdir(exist_ok=True)
    for data in (content, b'{"format": "%s", "version": 1, ' % FORMAT.encode() + content.lstrip(b"{"), b"[" * 100_000):
        (folder / MANIFEST).write_bytes(data)
        with pytest.raises(InputError, match=MANIFEST):
            TokenStore.open(folder)


def test_hostile_contents_with_right_hashes(tmp_path: Path, small: TokenStore) -> None:
    """A store made by someone else may have right hashes over wrong ids, lengths and bucket numbers."""
    for name, value in (
        ("bucket-000.tokens", b"\xff\xff"),
        ("bucket-000.lengths", b"\xff\xff"),
        ("bucket-001.lengths", b"\0\0"),
        (ROW_MAP, b"\xfe"),
        (ROW_MAP, b"\0\0\0\0\0\0\0\0\0\0\0\0"),
    ):
        path = copied(small, tmp_path / f"{name}{value[0]}")
        data = (path / name).read_bytes()
        (path / name).write_bytes(value + data[len(value) :])
        manifest = json.loads((path / MANIFEST).read_text())
        del manifest["checksum"]
        manifest["files"][name]["sha256"] = make.file_hash(path / name)
        (path / MANIFEST).write_bytes(sealed(manifest))
        refusal(path, name)


# Goals, settings, faults


def test_goals_that_cannot_be(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    source = text(tmp_path / "poems.txt", ["春"])
    (tmp_path / "mine").mkdir()
    text(tmp_path / "mine" / "thesis.txt", ["precious"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"name": "a web page"}')
    for name in ("mine", "other", "poems.txt"):
        with pytest.raises(InputError, match="exists and is not a token store"):
            prepare_store(source, tokenizer, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert (tmp_path / "other" / MANIFEST).exists()
    (tmp_path / "empty").mkdir()
    assert prepare_store(source, tokenizer, tmp_path / "empty").rows == 1
    assert prepare_store(source, tokenizer, tmp_path / "a" / "b" / "new").rows == 1
    text(source, ["春", "江"])
    assert prepare_store(source, tokenizer, tmp_path / "empty").rows == 2  # a store makes way for a store
    assert not list(tmp_path.glob(".fastpoem-making-*"))


@pytest.mark.parametrize("setting", ["max_length", "buckets"])
@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), float("inf"), True, "8", None, 65536])
def test_settings_that_cannot_be(tmp_path: Path, tokenizer: PoemTokenizer, setting: str, value: Any) -> None:
    with pytest.raises(InputError, match="is not a whole number from"):
        prepare_store(text(tmp_path / "poems.txt", ["春"]), tokenizer, tmp_path / "store", **{setting: value})
    assert not (tmp_path / "store").exists()


def test_a_bad_source_leaves_nothing(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    for name, data in (("bad.txt", "春\n".encode() * 500_000 + b"\xff"), ("empty.txt", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            prepare_store(tmp_path / name, tokenizer, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "empty.txt"]


def test_a_source_that_changes_meanwhile(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    source = text(tmp_path / "poems.txt", ["春", "江"])
    with pytest.raises(InputError, match="changed while it was read"):
        prepare_store(source, tokenizer, tmp_path / "store", progress=lambda _: text(source, ["春", "江", "花"]))
    assert not (tmp_path / "store").exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    source = text(tmp_path / "poems.txt", verses(20_000))
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n{PREPARE}"
    run = subprocess.run(
        [sys.executable, "-c", code, source, folder, tmp_path / "store"], cwd=ROOT, capture_output=True, text=True
    )
    assert "InputError" in run.stderr
    assert "cannot be written (File too large)" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["poems.txt"]


def test_no_permission(tmp_path: Path, tokenizer: PoemTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = text(tmp_path / "poems.txt", ["春"])
    monkeypatch.setattr(make.os, "access", lambda path, mode: False)  # tests may run as root, whom no mode stops
    with pytest.raises(InputError, match="no permission to write"):
        prepare_store(source, tokenizer, tmp_path / "store")
    with pytest.raises(InputError, match="--cache-dir"):
        cached_store(source, tokenizer)


def test_killed_at_any_moment(
    tmp_path: Path, folder: Path, tokenizer: PoemTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at random moments, over an old store and over none: the old one, the new one or none, and no litter."""
    source = text(tmp_path / "poems.txt", verses(12_000))
    command = [sys.executable, "-c", PREPARE, source, folder, tmp_path / "store"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    started = time.perf_counter()
    process.wait()
    lasts = time.perf_counter() - started
    rng = random.Random(3)
    outcomes: Counter[str] = Counter()
    for attempt in range(99):
        if attempt >= 9 and outcomes["False->False"]:
            break
        if attempt % 3 == 0:
            shutil.rmtree(tmp_path / "store", ignore_errors=True)
        before = is_store(tmp_path / "store")
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 1.1) * lasts)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "store").exists():
            store = TokenStore.open(tmp_path / "store")
            store.verify()
            assert store.rows == 12_000
        outcomes[f"{before}->{is_store(tmp_path / 'store')}"] += 1
    assert outcomes["False->False"] >= 1  # killed on the way
    prepare_store(source, tokenizer, tmp_path / "store")
    monkeypatch.setattr(make, "GRACE_SECONDS", 0)
    prepare_store(source, tokenizer, tmp_path / "store")
    assert {path.name for path in tmp_path.iterdir()} == {"poems.txt", "store"}  # the dead runs' litter is swept


def test_a_living_runs_folder_is_left_alone(tmp_path: Path, tokenizer: PoemTokenizer) -> None:
    source = text(tmp_path / "poems.txt", ["春", "江"])

    def other(_: int) -> None:
        prepare_store(source, tokenizer, tmp_path / "second")

    assert prepare_store(source, tokenizer, tmp_path / "first", progress=other).rows == 2
    assert TokenStore.open(tmp_path / "second").rows == 2


@pytest.mark.parametrize("exchanges", [True, False])
def test_killed_while_a_store_is_replaced(
    tmp_path: Path, tokenizer: PoemTokenizer, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    """At every rename and removal: the old store or the new one, if need be once another preparation has begun."""
    monkeypatch.setattr(make, "GRACE_SECONDS", -1)
    if not exchanges:
        monkeypatch.setattr(make, "exchange", lambda one, other: False)
    old, new = text(tmp_path / "old.txt", ["春"]), text(tmp_path / "new.txt", ["春", "江"])
    found, place, status = set(), 0, None
    while status != 3:
        place += 1
        shutil.rmtree(tmp_path / "stores", ignore_errors=True)
        prepare_store(old, tokenizer, tmp_path / "stores/store")
        pid = os.fork()
        if pid == 0:
            killed_at(place)
            try:
                prepare_store(new, tokenizer, tmp_path / "stores/store")
            finally:
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        there = is_store(tmp_path / "stores/store")
        prepare_store(old, tokenizer, tmp_path / "stores/other")  # which sweeps
        store = TokenStore.open(tmp_path / "stores/store")
        store.verify()
        found.add((there, store.rows))
        assert {path.name for path in (tmp_path / "stores").iterdir()} == {"store", "other"}
    assert found == {(True, 1), (True, 2)} | (set() if exchanges else {(False, 1)})


def killed_at(place: int) -> None:
    """Have this process die before its so-many-th rename, unlink or fsync."""
    done = 0

    def wrap(inner: Any) -> Any:
        def outer(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)

        return outer

    for name in ("rename", "unlink", "fsync"):
        setattr(os, name, wrap(getattr(os, name)))


def test_a_poem_of_one_character_has_something_to_predict(tmp_path: Path, folder: Path) -> None:
    """With a tokenizer that frames no poem by itself too."""
    model = tmp_path / "model"
    model.mkdir()
    library = PoemTokenizer.load(folder).library
    library.post_processor = processors.Sequence([])
    library.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}'
    )
    bare = PoemTokenizer.load(model)  # which gets the frame that its folder names
    assert [
        row.tolist() for row in prepare_store(text(tmp_path / "poems.txt", ["春江", "春"]), bare, tmp_path / "store")
    ] == [PoemTokenizer.load(folder).encode([line], 8)[0].tolist() for line in ("春江", "春")]


# The command


@pytest.mark.parametrize("command", ["prepare", "train", "generate"])
def test_help_and_refusals_do_not_wait_for_torch(tmp_path: Path, folder: Path, command: str) -> None:
    code = (
        "import sys, runpy\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "finally:\n    assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    flags = {
        "prepare": ["--data", str(text(tmp_path / "poems.txt", ["春江"])), "--model", str(folder), "--out", "store"],
        "train": ["--lr", "nan"],
        "generate": ["--model", "m", "--count", "0"],
    }[command]
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for arguments, status in ((["--help"], 0), (flags, 0 if command == "prepare" else 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, f"fastpoem.{command}", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr


def test_the_command(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastpoem.prepare import main

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 40}')
    source = text(tmp_path / "poems.txt", ["春江", "花月夜", "龘"])
    flags = ["--data", str(source), "--model", str(model), "--out", str(tmp_path / "store")]
    main([*flags, "--max_length", "4", "--buckets", "1"])
    out = capsys.readouterr().out
    assert "poems      3 (0 duplicates, 0 blank lines skipped, 1 cut to 4 tokens)" in out
    assert "龘 1" in out
    assert TokenStore.open(tmp_path / "store").max_length == 4
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    for wrong, said in (
        (["--max-length", "nan"], "--max-length"),
        (["--max-length", "1"], "--max-length 1"),
        (["--buckets", "256"], "--buckets 256"),
        (["--data", str(tmp_path / "none.txt")], "none.txt: does not exist"),
        (["--out", str(source)], "exists and is not a token store"),
        (["--model", str(tmp_path)], str(tmp_path)),
        (["--convert", "klingon"], "--convert"),
        (["--bukets", "3"], "--buckets"),
        (["--data", str(tmp_path / "store")], "is a token store already"),
    ):
        with pytest.raises(InputError) as caught:
            main([part for pair in (settings | dict([wrong])).items() for part in pair])
        assert said in str(caught.value)
    assert TokenStore.open(tmp_path / "store").max_length == 4  # a refused run touches nothing


def test_the_commands_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastpoem.prepare", "--data", "none.txt", "--model", ".", "--out", "store"]
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr == "fastpoem: none.txt: does not exist; check the path\n"
    assert list(tmp_path.iterdir()) == []


# The cache


def test_the_cache_is_reused_and_keyed(tmp_path: Path, tokenizer: PoemTokenizer, small: TokenStore) -> None:
    source = text(tmp_path / "poems.txt", verses(200))
    said: list[str] = []

    def cached(how: dict[str, Any] | None = None, **options: Any) -> TokenStore:
        said.clear()
        return cached_store(Source((source,), **(how or {})), tokenizer, say=said.append, **options)

    first = cached()
    assert first.path.parent == tmp_path / ".fastpoem"
    assert said == []
    assert cached().path == first.path
    assert "prepared before" in said[0]
    paths = {first.path, cached(max_length=20).path, cached(buckets=3).path}
    every = {"convert": "t2s", "field": "a", "line_break": "a", "clean": True, "whole": True}
    paths |= {cached({name: value}).path for name, value in every.items()}
    text(source, verses(200, seed=1))
    paths.add(cached().path)
    assert len(paths) == 9
    text(source, verses(200))
    assert cached().path == first.path
    assert cached(cache_dir=tmp_path / "elsewhere").path.parent == tmp_path / "elsewhere"


def test_a_text_that_changed_as_its_store_was_about_to_be_made(
    tmp_path: Path, tokenizer: PoemTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = text(tmp_path / "poems.txt", verses(200))
    right = prepare_store(source, tokenizer, tmp_path / "right").identity

    def digest(path: Path) -> dict[str, Any]:
        found = make.source_digest(path)
        text(source, verses(200, seed=1))
        return found

    with monkeypatch.context() as patch:
        patch.setattr("fastpoem.corpus.store.source_digest", digest)
        assert cached_store(source, tokenizer).identity != right
    text(source, verses(200))
    assert cached_store(source, tokenizer).identity == right


@pytest.mark.parametrize("name", [MANIFEST, ROW_MAP, "bucket-000.tokens", "bucket-001.lengths"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, tokenizer: PoemTokenizer, name: str, damage: str) -> None:
    source = text(tmp_path / "poems.txt", verses(200))
    first = cached_store(source, tokenizer)
    identity = first.identity
    file = first.path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    said: list[str] = []
    again = cached_store(source, tokenizer, say=said.append)
    assert again.identity == identity
    again.verify()
    if (name, damage) != (MANIFEST, "gone"):
        assert "damaged" in said[0]
        assert name in said[0]


def test_several_runs_at_once_agree(tmp_path: Path, folder: Path) -> None:
    source = text(tmp_path / "poems.txt", verses(20_000))
    code = PREPARE.replace("prepare_store(source, tokenizer, out,", "cached_store(source, tokenizer, cache_dir=out,")
    code = code.replace("import prepare_store", "import cached_store") + "print(store.identity)"
    command = [sys.executable, "-c", code, source, folder, tmp_path / "cache"]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [run.communicate()[0].split()[-1] for run in runs]
    assert [run.returncode for run in runs] == [0] * 4
    assert len(set(said)) == 1
    (made,) = (tmp_path / "cache").iterdir()  # one store, no litter
    TokenStore.open(made).verify()
    assert not (made / make.LOCK).exists()


def test_the_cache_moves_home_where_the_texts_folder_is_read_only(
    tmp_path: Path, tokenizer: PoemTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    source = text(tmp_path / "texts" / "poems.txt", ["春", "江"])
    real = os.access
    monkeypatch.setattr(make.os, "access", lambda path, mode: "texts" not in str(path) and real(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached_store(source, tokenizer).path.parent == tmp_path / "xdg" / "fastpoem"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, folder: Path) -> None:
    lines = verses(60_000)
    peaks = []
    for times in (1, 12):
        source = text(tmp_path / f"{times}.txt", lines * times)
        # VmHWM, not getrusage: that one remembers the process which started this one.
        code = f"{PREPARE}\nprint(*[row.split()[1] for row in open('/proc/self/status') if 'VmHWM' in row])"
        command = [sys.executable, "-c", code, source, folder, tmp_path / f"store{times}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows, peak = map(int, run.stdout.split()[-2:])
        assert rows == times * 60_000
        peaks.append(peak * 1024)
    assert 20 << 20 < peaks[0] < 400 << 20
    assert peaks[1] - peaks[0] < 50 << 20
