"""Bad input: one line that names the thing, the reason and the mend, within seconds, and nothing half-made."""

import contextlib
import errno
import gzip
import io
import json
import lzma
import math
import os
import resource
import socket
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

import fastpoem
from fastpoem.config import RANGES, from_kwargs
from fastpoem.corpus.manifest import sealed
from fastpoem.corpus.source import Source
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.errors import InputError
from fastpoem.generate import main as generate_main
from fastpoem.generation.poems import sample
from fastpoem.prepare import main as prepare_main
from fastpoem.run.fit import fit as run_fit
from fastpoem.train import main as train_main
from tests.runs import settings, tiny_model

POEM = "春江潮水连海平，海上明月共潮生。"


@pytest.fixture(scope="module")
def base(base):
    prepare_store(base / "poems.txt", PoemTokenizer.load(base / "model"), base / "store", max_length=64)
    fastpoem.fit(**settings(base, out=str(base / "run"), max_steps=1))
    return base


def refused(base, out: Path, **changes) -> str:
    """The line that training refuses these settings with, in seconds and without a trace on the disk."""
    begin = time.process_time()  # busy cores would count on the clock
    with pytest.raises(InputError) as refusal:
        run_fit(from_kwargs(**settings(base, out=str(out)) | changes))
    assert time.process_time() - begin < 10
    assert not out.exists()
    line = str(refusal.value)
    assert "\n" not in line and refusal.value.reason and refusal.value.mend
    return line


TEXTS = {  # name, content -> what the line says
    ("nothing.txt", None): "nothing.txt: does not exist; check the path",
    ("empty.txt", b""): "empty.txt: holds no poem: it is empty or blank",
    ("blank.txt", " \n\n\t\u3000\n".encode()): "blank.txt: holds no poem",
    ("binary.txt", bytes(range(256)) * 40): "NUL byte, so it is binary",
    ("mixed.txt", (f"{POEM}\n" * 20).encode() + (f"{POEM}\n" * 20).encode("gb18030")): "mixed.txt, line 21: is not UTF-8 but looks like GB18030; convert it: iconv -f GB18030 -t UTF-8 mixed.txt > utf8.txt",
    ("cut.txt", f"{POEM}\n{POEM}".encode()[:-1]): "cut.txt, line 2: ends inside a character, so it was cut",
    ("latin.txt", "caf\u00e9 au lait\n".encode("latin-1")): "latin.txt, line 1: is not UTF-8",
    ("utf16.txt", (f"{POEM}\n" * 9).encode("utf-16")[:-1]): "not UTF-16 either",
    ("a.tar.gz", b"x"): "is a .tar file, which is not read; unpack it with tar xf",
    ("a.csv", "id,verse\n1,春\n".encode()): "has the columns id, verse, none of a known name; name the one that holds the poems with --field",
    ("bad.jsonl", f'"{POEM}"\n"{POEM}"\n{{"text": '.encode()): "bad.jsonl, line 3: is malformed JSON",
    ("bad.json", f'["{POEM}",\n "{POEM}"\n "x"]'.encode()): "bad.json, line 3: is malformed JSON",
    ("object.json", b'{"a": 1}'): "line 1: item 1 is not a poem: it has 'a', not",
    ("cut.txt.gz", gzip.compress(POEM.encode() * 99)[:-20]): "cut.txt.gz: cannot be read",
    ("plain.txt.xz", POEM.encode()): "plain.txt.xz: cannot be read",
    ("hungry.txt.xz", lzma.compress(POEM.encode(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])): "Memory usage limit exceeded); compress it with xz -9 or less",
    ("tail.txt.xz", lzma.compress(POEM.encode()) + b"junk"): "tail.txt.xz: cannot be read",
    ("few.txt", f"{POEM}\n{POEM}\n".encode()): "2 poems, fewer than a batch of 4; lower --batch-size",
    ("many.txt", b"\n" * 5_000_000): "holds no poem",
}  # fmt: skip


@pytest.mark.parametrize("name, content", TEXTS, ids=[name for name, _ in TEXTS])
def test_texts(base, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert TEXTS[name, content] in refused(base, tmp_path / "run", data=str(tmp_path / name))
    assert {path.name for path in tmp_path.iterdir()} <= {name, ".fastpoem"}
    assert (
        not list((tmp_path / ".fastpoem").glob(".*"))
        if name != "few.txt" and (tmp_path / ".fastpoem").exists()
        else True
    )


def test_a_folder_or_a_device_for_a_text(base, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "is an empty folder" in refused(base, tmp_path / "run", data=str(tmp_path / "folder"))
    assert "/dev/null: is not a regular file" in refused(base, tmp_path / "run", data="/dev/null")
    assert "cannot be a path" in refused(base, tmp_path / "run", data="x" * 5000)


def test_poems_of_one_character_and_of_a_million(base, tmp_path):
    """These are poems: the longest is cut, the shortest has one thing to predict."""
    (tmp_path / "odd.txt").write_text("\n".join(["春", "江" * 1_000_000, POEM, "月"] * 3), encoding="utf-8")
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run")) | dict(data=str(tmp_path / "odd.txt")))
    assert math.isfinite(run.metrics[-1]["mean_loss"])


def change(file: Path, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def a_copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_manifest(store: Path, change):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("checksum")
    change(manifest)
    (store / "manifest.json").write_bytes(sealed(manifest))


def newer(store: Path):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest.pop("checksum")
    (store / "manifest.json").write_bytes(sealed(manifest | {"version": 99}))


STORES = {
    "truncated": (lambda store: os.truncate(store / "bucket-000.tokens", 7), "bucket-000.tokens: is truncated or foreign"),
    "flipped tokens": (lambda store: flip(store / "bucket-000.tokens"), "bucket-000.tokens: is damaged"),
    "flipped lengths": (lambda store: flip(store / "bucket-000.lengths"), "bucket-000.lengths: is damaged"),
    "flipped manifest": (lambda store: flip(store / "manifest.json"), "manifest.json"),
    "newer": (newer, "has version 99"),
    "a vocabulary of its own": (lambda store: with_manifest(store, lambda manifest: manifest["tokenizer"].update(vocab_size=60000)), "was made with another tokenizer"),
    "foreign": (lambda store: (store / "manifest.json").write_text('{"name": "my app"}'), "is not the manifest of a token store"),
    "a file gone": (lambda store: (store / "rows.bucket").unlink(), "rows.bucket: is missing"),
    "a link": (lambda store: ((store / "rows.bucket").unlink(), (store / "rows.bucket").symlink_to("/etc/hostname")), "rows.bucket: is not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", STORES)
def test_stores(base, tmp_path, damage):
    store = a_copy(base / "store", tmp_path / "store")
    spoil, says = STORES[damage]
    spoil(store)
    assert says in refused(base, tmp_path / "run", data=str(store))


def test_a_store_of_another_tokenizer_or_too_long(base, tmp_path):
    other = tiny_model(tmp_path / "model", base / "model")
    words = (other / "vocab.txt").read_text().splitlines()
    (other / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    line = refused(base, tmp_path / "run", data=str(base / "store"), model=str(other))
    assert "was made with another tokenizer; prepare the text again with this --model" in line
    short = tiny_model(tmp_path / "short", base / "model")
    change(short / "config.json", n_positions=20)
    line = refused(base, tmp_path / "run", data=str(base / "store"), model=str(short))
    assert "the model has 20 positions; prepare the text again with --max-length 20" in line
    assert "the model has 20 positions" in refused(base, tmp_path / "run", model=str(short), max_length=21)


def cut(path: Path):
    os.truncate(path, path.stat().st_size - 100)


def a_header_that_lies(path: Path):
    content = path.read_bytes()
    path.write_bytes((1 << 60).to_bytes(8, "little") + content[8:])


def lying_shapes(path: Path):
    header = json.dumps(
        {"transformer.wte.weight": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 64)


def as_bin(content):
    def spoil(model: Path):
        (model / "model.safetensors").unlink()
        torch.save(content, model / "pytorch_model.bin")

    return spoil


def old_bin(content, model: Path):
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_bomb(model: Path):
    """A hundred megabytes of zeros in a hundred kilobytes."""
    as_bin({"transformer.wte.weight": torch.zeros(25_000_000)})(model)
    path = model / "pytorch_model.bin"
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for entry in plain.infolist():
            zipped.writestr(entry.filename, plain.read(entry))
    path.write_bytes(packed.getvalue())


def inflated(model: Path):
    with (model / "model.safetensors").open("ab") as stream:
        stream.truncate(1 << 31)  # takes no room


def as_json(model: Path, change):
    saved = json.loads(PoemTokenizer.load(model).library.to_str())
    change(saved)
    (model / "tokenizer.json").write_text(json.dumps(saved))


class Harmful:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/fastpoem-was-here",))


MODELS = {
    "no config": (lambda model: (model / "config.json").unlink(), "no model folder: it has no config.json"),
    "config no JSON": (lambda model: (model / "config.json").write_text("{"), "config.json: unreadable"),
    "config too deep": (lambda model: (model / "config.json").write_text("[" * 100_000), "config.json: unreadable"),
    "another kind": (lambda model: change(model / "config.json", model_type="llama"), "describes 'llama', not a GPT-2"),
    "a run": (lambda model: ((model / "model").mkdir(), (model / "config.json").replace(model / "model/config.json"), (model / "config.json").write_text("{}")), "is the folder of a run, its model is below; name "),
    "quantized": (lambda model: change(model / "config.json", quantization_config={"quant_method": "bitsandbytes"}), "quantization_config is {'quant_method'"),
    "one position": (lambda model: change(model / "config.json", n_positions=1), "n_positions is 1; give a number from 2"),
    "an id without end": (lambda model: as_json(model, lambda saved: saved["model"]["vocab"].update({"春": 4_000_000_000})), "tokenizer.json: has the id 4000000000"),
    "an id that is none": (lambda model: as_json(model, lambda saved: saved["model"]["vocab"].update({"春": -1})), "tokenizer.json: has the id -1"),
    "an added id without end": (lambda model: as_json(model, lambda saved: saved["added_tokens"].append({"id": 1 << 24, "content": "[X]"})), "tokenizer.json: has the id 16777216"),
    "a recorded id without end": (lambda model: change(model / "tokenizer_config.json", added_tokens_decoder={"4000000000": {"content": "[X]"}}), "tokenizer_config.json: has the id 4000000000"),
    "an id of old without end": (lambda model: (model / "added_tokens.json").write_text('{"[X]": 4000000000}'), "added_tokens.json: has the id 4000000000"),
    "a link to nothing": (lambda model: (model / "model.safetensors").rename(model / "gone") and (model / "model.safetensors").symlink_to("nothing"), "model.safetensors: cannot be read (No such file"),
    "no tokenizer": (lambda model: [(model / name).unlink() for name in ("vocab.txt", "tokenizer.json")], "holds no tokenizer"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no weights (model.safetensors or pytorch_model.bin)"),
    "cut weights": (lambda model: cut(model / "model.safetensors"), "unreadable weights"),
    "empty weights": (lambda model: (model / "model.safetensors").write_bytes(b""), "unreadable weights"),
    "a header too large": (lambda model: a_header_that_lies(model / "model.safetensors"), "unreadable weights"),
    "shapes beyond the file": (lambda model: lying_shapes(model / "model.safetensors"), "unreadable weights"),
    "of another width": (lambda model: change(model / "config.json", n_embd=32), "has shape"),
    "of more layers": (lambda model: change(model / "config.json", n_layer=2), "its weights lack transformer.h.1"),
    "a small vocabulary": (lambda model: change(model / "config.json", vocab_size=100), "its tokenizer has 1901 ids, its embedding 100"),
    "a huge model": (lambda model: change(model / "config.json", n_embd=2**22), "GiB to train"),
    "too many layers": (lambda model: change(model / "config.json", n_layer=2**23), "n_layer is 8388608"),
    "a negative size": (lambda model: change(model / "config.json", n_head=-1), "n_head is -1"),
    "a size of text": (lambda model: change(model / "config.json", n_embd="16"), "n_embd is '16'"),
    "a probability of NaN": (lambda model: change(model / "config.json", attn_pdrop=math.nan), "attn_pdrop is nan"),
    "an epsilon of infinity": (lambda model: change(model / "config.json", layer_norm_epsilon=math.inf), "layer_norm_epsilon is inf"),
    "weights of NaN": (lambda model: save_file(load_file(model / "model.safetensors") | {"transformer.wte.weight": torch.full((1901, 16), math.nan)}, model / "model.safetensors"), "holds NaN or infinity"),
    "integers": (lambda model: save_file({"transformer.wte.weight": torch.ones((1901, 16), dtype=torch.int64)}, model / "model.safetensors"), "is torch.int64"),
    "a bin of a list": (as_bin([1, 2, 3]), "something else than named tensors"),
    "a bin of numbers": (as_bin({"transformer.wte.weight": 3}), "something else than named tensors"),
    "a bin of code": (as_bin({"transformer.wte.weight": Harmful()}), "it holds posix mkdir, not ordinary tensors"),
    "a bin that is packed": (as_bomb, "it is compressed, and larger than it looks"),
    "a bin without memory": (as_bin({"transformer.wte.weight": torch.empty(1901, 16, device="meta")}), "_rebuild_meta_tensor_no_storage, not ordinary"),
    "a sparse bin": (as_bin({"transformer.wte.weight": torch.ones(1901, 16).to_sparse()}), "_rebuild_sparse_tensor, not ordinary"),
    "a quantized bin": (lambda model: as_bin({"transformer.wte.weight": torch.quantize_per_tensor(torch.ones(1901, 16), 0.1, 0, torch.quint8)})(model), "_rebuild_qtensor, not ordinary"),
    "a nested bin": (lambda model: as_bin({"transformer.wte.weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})(model), "_rebuild_nested_tensor, not ordinary"),
    "a bin of an old form": (lambda model: old_bin({"transformer.wte.weight": Harmful()}, model), "it holds posix mkdir"),
    "weights far too large": (inflated, "2,147,483,648 bytes of weights, its model needs a fraction"),
    "a bin of rubbish": (lambda model: ((model / "model.safetensors").unlink(), (model / "pytorch_model.bin").write_bytes(b"PK rubbish")), "unreadable weights"),
    "an index outside": (lambda model: ((model / "model.safetensors").unlink(), (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')), "names a file outside its folder"),
    "an index of nonsense": (lambda model: ((model / "model.safetensors").unlink(), (model / "model.safetensors.index.json").write_text('{"weight_map": [3]}')), "unreadable weights"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(quantized|nested) tensor")
@pytest.mark.parametrize("damage", MODELS)
def test_models(base, tmp_path, damage):
    model = a_copy(base / "run/model", tmp_path / "model")
    spoil, says = MODELS[damage]
    spoil(model)
    assert says in refused(base, tmp_path / "run", model=str(model), from_scratch=False)
    assert not Path("/tmp/fastpoem-was-here").exists()


@pytest.mark.parametrize("form", ["zip", "old"])
def test_weights_of_a_bin(base, tmp_path, form):
    """Both forms of pytorch_model.bin are read, and train as the safetensors do."""
    model = a_copy(base / "run/model", tmp_path / "model")
    weights = OrderedDict(load_file(model / "model.safetensors"))
    weights["transformer.wte.weight"] = torch.nn.Parameter(weights["transformer.wte.weight"])
    old_bin(weights, model) if form == "old" else as_bin(weights)(model)
    changes = dict(max_steps=2, from_scratch=False)
    runs = [
        fastpoem.fit(**settings(base, out=str(tmp_path / source.parent.name), **changes) | dict(model=str(source)))
        for source in (base / "run/model", model)
    ]
    assert runs[0].metrics[0]["loss"] == runs[1].metrics[0]["loss"]


def test_poems_of_a_strangers_model(base, tmp_path):
    """In shards, with a config.json that would have transformers fetch kernels and import code: the poems of the plain one; nor does
    a model that is trained further pass such things on."""
    pytest.importorskip("transformers")
    model = a_copy(base / "run/model", tmp_path / "model")
    poems = sample(model, "春", seed=1)
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    names = dict.fromkeys(load_file(model / "model-1.safetensors"), "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    steering = {"attn_implementation": "owner/kernels", "_attn_implementation": "flash_attention_3"}
    steering |= {"experts_implementation": "x", "_experts_implementation": "y", "auto_map": {"AutoModel": "a.b"}}
    change(model / "config.json", **steering)
    assert sample(model, "春", seed=1) == poems
    changes = dict(out=str(tmp_path / "run"), from_scratch=False, max_steps=1) | {"model": str(model)}
    fastpoem.fit(**settings(base) | changes)
    kept = json.loads((tmp_path / "run/model/config.json").read_text())
    assert kept == json.loads((base / "run/model/config.json").read_text()) | {
        name: 0.2 for name in kept if name.endswith("pdrop")
    }
    change(model / "config.json", n_layer=1000, n_embd=1 << 20)
    with pytest.raises(InputError, match="GiB to load, this machine has"):
        sample(model)


NUMBERS = [name for name, _, _ in RANGES]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, 10**30, 1e300, "3", True])
def test_numbers_out_of_range(base, tmp_path, name, value):
    if name == "max_grad_norm" and (value in (math.inf, 10**30, 1e300)):
        pytest.skip("that large a norm is never reached: nothing is clipped")
    line = refused(base, tmp_path / "run", **{name: value})
    assert name in line.replace("-", "_") and ("out of range" in line or "is of the wrong kind" in line)


@pytest.mark.parametrize("name, low, high", RANGES, ids=NUMBERS)
def test_the_ends_of_the_ranges_work(base, tmp_path, name, low, high):
    """The smallest value that is allowed trains, and so does the largest, but for sizes that this text or model has not got."""
    for number, value in enumerate([low, high]):
        if name in ("batch_size", "accumulate", "max_length") and value == high:
            continue
        changes = {
            "max_steps": 3,
            name: value if name in ("lr", "weight_decay", "max_grad_norm", "dropout") else int(value),
        }
        if name == "max_steps" and value == high:
            changes["epochs"] = 1
        fastpoem.fit(**settings(base, out=str(tmp_path / str(number))) | changes)


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            dict(device="cuda:70"),
            "there is no such device here; this machine has cpu" if torch.version.cuda else "is a CPU build",
        ),
        (dict(device="cuda:" + "9" * 5000), "no such kind of device"),
        (dict(device=""), "no such kind of device"),
        (dict(model="/no/such"), "no such folder"),
        (dict(model="{}/poems.txt"), "no model folder"),
        (dict(max_length=65), "the model has 64 positions"),
        (dict(graphs="on"), "--graphs on"),
        (dict(sample="春\udcff"), "--sample '春\\udcff': holds what no poem does"),
        (dict(sample="春\n江"), "use characters of UTF-8 on one line"),
        (dict(data=b"poems.txt"), "is of the wrong kind"),
        (dict(lr=10**400), "--lr "),
        (dict(attention="flash"), "--attention flash"),
        (dict(batching="pack", loss_on_padding=True), "packed batches have no padding"),
        (dict(batch_size=58), "fewer than a batch of 58"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_settings_that_do_not_fit(base, tmp_path, changes, says):
    if torch.cuda.is_available():
        pytest.skip("said of a machine without a GPU")
    changes = {name: value.format(base) if isinstance(value, str) else value for name, value in changes.items()}
    assert says in refused(base, tmp_path / "run", **changes)


@pytest.mark.parametrize("name", ["data", "model", "out", "cache_dir"])
@pytest.mark.parametrize("value, says", [("", "is empty"), ("a\0b", "holds a NUL"), ("~nobody-here/x", "names a home folder that is not known"),
                                         ("x" * 300, "cannot be a path (File name too long)"), ("/x" * 3000, "cannot be a path")])  # fmt: skip
def test_paths_that_cannot_be(base, tmp_path, monkeypatch, name, value, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        fastpoem.fit(**settings(base) | {name: value})
    assert str(refusal.value).startswith(f"{name}='") and says in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_utf8(base, tmp_path, monkeypatch):
    """They work: bytes are bytes to the disk, and are spelled out where they must be shown or kept as JSON."""
    odd = os.fsdecode(b"\xff\xfe poems")
    folder = tmp_path / odd
    folder.mkdir()
    model = a_copy(base / "run/model", folder / odd)
    (folder / f"{odd}.txt").write_bytes((base / "poems.txt").read_bytes())
    collection = folder / "collection"
    collection.mkdir()
    (collection / f"{odd}.json").write_text(json.dumps([{"paragraphs": [POEM]}] * 40))
    monkeypatch.chdir(tmp_path)
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", said)

    def call(main, *arguments):
        """A command without a process of its own, which decodes arguments and spells names so."""
        assert not main([os.fsdecode(argument) for argument in arguments])
        said.flush()
        return said.buffer.getvalue().decode()

    shared = ("--model", model)
    train = ("--device", "cpu", "--batch-size", "4", "--max-steps", "2", "--cache-dir", folder / "cache")
    for number, data in enumerate([folder / f"{odd}.txt", collection]):
        out = folder / f"{odd}{number}"
        call(train_main, "--data", data, *shared, *train, "--out", out)
        assert "nothing is left to do" in call(train_main, "--data", data, *shared, *train, "--out", out, "--resume")
        for file in ("config.json", "checkpoints/step-00000002/state.json"):
            json.loads((out / file).read_text())
        call(prepare_main, "--data", data, *shared, "--out", out / "store")
    call(generate_main, "--model", out / "model")
    arguments = ["--data", data, *shared, "--out", out / "another"]
    store = command(*map(os.fsencode, arguments), cwd=tmp_path, module="prepare")[0]
    assert store.returncode == 0, store.stderr


def test_a_sample_that_training_takes_is_a_prompt(base, tmp_path, capsys):
    """Or a run would be refused when it has ended."""
    sample = "春\u3000\t江\u200d\ue000"
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1, sample=sample))
    assert "春" in capsys.readouterr().out.splitlines()[-1]


def test_the_longest_sample_that_leaves_room(base, tmp_path, capsys):
    """Of 64 positions: what generate has room for is taken, and what it has none for is refused before training."""
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1, sample="春" * 62))
    assert capsys.readouterr().out.splitlines()[-1].startswith("春" * 62)
    with pytest.raises(InputError, match="leave no room"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "other"), max_steps=1, sample="春" * 63))
    assert not (tmp_path / "other").exists()


def test_what_is_written_without_a_limit_is_json(base, tmp_path):
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1, max_grad_norm=math.inf))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    content = json.loads((tmp_path / "run/config.json").read_text(), parse_constant=refuse)
    assert content["settings"]["max_grad_norm"] == "inf"  # as the flag takes it


def test_no_home(base, tmp_path, monkeypatch):
    """A user of no name and no HOME: what needs his cache says so, and trains where it is told another."""
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    fastpoem.fit(**settings(base, out="run", max_steps=1))
    with pytest.raises(InputError, match="this user has no home folder; set HOME"):
        fastpoem.fit(max_steps=1, device="cpu", sample=None, out="verses")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_that_cannot_be(base, tmp_path):
    (tmp_path / "file").write_text("")
    for out, says in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file/below", "is a file"),
        (tmp_path / ("x" * 300), "cannot be a path"),
        (tmp_path / "none" / ("x" * 300), "cannot be"),
        (Path("/proc/none"), "cannot be"),
    ):
        with pytest.raises(InputError, match=says):
            fastpoem.fit(**settings(base, out=str(out)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("")
    with pytest.raises(InputError, match="run/checkpoints: is a file, where a folder is needed"):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run")))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/etc/hostname"), lambda path: path.symlink_to("none")],
                         ids=["fifo", "link", "dangling"])  # fmt: skip
@pytest.mark.parametrize("resume", [False, True])
def test_rows_that_are_no_file(base, tmp_path, make, resume):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl: is no file of this folder"):
        fastpoem.fit(**settings(base, out=str(tmp_path), resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_checkpoints_on_another_disk(base, tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system: here /dev/shm is none")
    (tmp_path / "checkpoints").symlink_to(memory)
    with pytest.raises(InputError, match="checkpoints: is on another disk; put the whole run there with out="):
        fastpoem.fit(**settings(base, out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("processes, refuses", [("", False), ("1", False), ("2", True), ("many", True)])
def test_several_processes(base, tmp_path, monkeypatch, processes, refuses):
    monkeypatch.setenv("WORLD_SIZE", processes)
    if refuses:
        assert "WORLD_SIZE: needs all of RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE" in refused(
            base, tmp_path / "run"
        )
    else:
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))


def test_curves_into_a_folder_that_is_not_utf8(base, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    out = tmp_path / os.fsdecode(b"\xff run")
    assert "is not UTF-8, which TensorBoard needs" in refused(base, out, tensorboard=True)


@pytest.mark.parametrize("name", ["p" * 216 + ".txt", "诗" * 72 + ".txt"])
def test_a_long_name_of_the_text(base, tmp_path, name):
    (tmp_path / name).write_bytes((base / "poems.txt").read_bytes())
    fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1) | dict(data=str(tmp_path / name)))


@pytest.mark.parametrize("refuses", ["begin", "write_config"])
def test_a_disk_that_is_full_at_the_start(base, tmp_path, monkeypatch, refuses):
    """The folder that was made for it is gone; one that the user made stays."""
    from fastpoem.run import folder
    from fastpoem.run.loop import Loop

    real = Loop.begin

    def full(*arguments):
        if refuses == "begin":
            real(*arguments)
        else:
            (tmp_path / "run/.config.json.partial").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((Loop, "begin") if refuses == "begin" else (folder, "write_config")), full)
    assert "No space left on device" in refused(base, tmp_path / "run")


def test_a_read_only_folder(base, tmp_path, monkeypatch):
    """As a user who is not root meets it."""
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == tmp_path) and real(path, mode)
    )
    assert f"run: cannot be written ({tmp_path} is read-only); name another folder with --out" in refused(
        base, tmp_path / "run"
    )


def command(*arguments, cwd, module="train", **environment):
    """(the process that has ended, the seconds of processor time that it took)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"fastpoem.{module}", *arguments], capture_output=True, text=True, cwd=cwd, timeout=600,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments, near",
    [
        (["--epoch", "3"], "--epochs"),
        (["--no-shufle"], "--no-shuffle"),
        (["--learning-rate", "1"], "see --help"),
        (["--lr=nan"], "--lr nan: out of range"),
        (["--batch_sise=3"], "--batch-size"),
        (["--seed", "9" * 5000], "--seed"),
        (["--epochs", ""], "--epochs"),
        (["--out", ""], "--out '': is empty; give the path"),
        (["--lr", "9" * 400], "--lr inf: out of range"),
        (["--\ud800"], "no such flag"),
    ],
)  # fmt: skip
def test_flags(tmp_path, arguments, near):
    done, _ = command(*[argument.encode("utf-8", "surrogatepass") for argument in arguments], cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert near in done.stderr and done.stderr.startswith("fastpoem: ") and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module, arguments, says",
    [
        ("generate", [], "--model: must be given"),
        ("generate", ["--modle", "x"], "--modle: no such flag; did you mean --model?"),
        ("generate", ["--model"], "--model"),
        ("prepare", ["--data=x", "--max_length", "9"], "--model, --out: must be given"),
        ("prepare", ["--data", "x", "--max_lenght", "9"], "--max-lenght: no such flag; did you mean --max-length?"),
    ],
)
def test_flags_that_must_be_given(tmp_path, module, arguments, says):
    done, _ = command(*arguments, cwd=tmp_path, module=module)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    assert done.stderr.startswith("fastpoem: ") and says in done.stderr


def test_what_training_will_not_see_is_said(base, tmp_path, capsys):
    (tmp_path / "poems.txt").write_text(f"{POEM}\n" * 39 + "鱻" * 99, encoding="utf-8")
    common = settings(base, data=str(tmp_path / "poems.txt"), max_steps=1)
    fastpoem.fit(**common, out=str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "poems that were cut to 64 tokens: 1\n" in said
    assert "[UNK], characters that the vocabulary lacks: 鱻 …" in said
    (tmp_path / "poems.txt").write_text(f"{POEM}\n" * 40, encoding="utf-8")
    fastpoem.fit(**common, out=str(tmp_path / "whole"))
    assert "[UNK]" not in (said := capsys.readouterr().out) and "were cut" not in said


def test_text_of_other_kinds_is_trained_on_and_said(base, tmp_path, capsys):
    """A list of poems, several files, a table in GB18030 with line breaks: one corpus, and what is odd in it is said in lines."""
    lines = "".join(f'{n},"{POEM}\n{POEM}"\n' for n in range(30))
    (tmp_path / "a.csv").write_bytes(("题,内容\n" + lines).encode("gb18030"))
    (tmp_path / "b.txt").write_text(f"[CLS]{POEM}[SEP]\n" * 20 + "春 江[UNK]\n", encoding="utf-8")
    common = settings(base, max_steps=2) | dict(data=[str(tmp_path / "a.csv"), tmp_path / "b.txt"], line_break="亩")
    run = fastpoem.fit(**common, out=str(tmp_path / "run"))
    said = capsys.readouterr().out
    for part in ("51 poems from a.csv and 1 more", "read as GB18030: a.csv", "taken from '内容' of a.csv", "kept as 亩 in 30 poems",
                 "20 came with the tokenizer's own frame", "[UNK] stands in the text 1 times"):  # fmt: skip
        assert part in said
    config = json.loads((run.model / "tokenizer_config.json").read_text())
    assert config["fastpoem"]["line_break_token"] == "亩" and config["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = PoemTokenizer.load(run.model)
    theirs = BertTokenizer.from_pretrained(run.model)
    assert (
        tokenizer.line_break == "亩"
        and tokenizer.encode([f"{POEM}亩春"], 64)[0].tolist() == theirs(f"{POEM}亩春")["input_ids"]
    )
    # The model keeps its line breaks where it is trained further, and a store made with them is taken as it is.
    more = common | dict(line_break=None, model=str(run.model), from_scratch=False)
    fastpoem.fit(**more, out=str(tmp_path / "more"))
    assert "kept as 亩 in 30 poems" in capsys.readouterr().out
    store = prepare_store(
        Source((tmp_path / "a.csv",), line_break="亩"), PoemTokenizer.load(base / "model", "亩"), tmp_path / "store"
    )
    fastpoem.fit(**common | dict(data=str(store.path), line_break=None), out=str(tmp_path / "stored"))
    assert "line_break_token" in (tmp_path / "stored/model/tokenizer_config.json").read_text()
    assert "the store was prepared with 亩" in refused(base, tmp_path / "no", data=str(store.path), line_break="亮")
    assert "--whole: the store was prepared without it" in refused(
        base, tmp_path / "no", data=str(store.path), whole=True
    )
    assert "is a token store, which stands alone" in refused(
        base, tmp_path / "no", data=[store.path, tmp_path / "b.txt"]
    )
    new = dict(line_break="[lb]", from_scratch=False, model=str(run.model))
    assert "--line-break '[lb]': is no token of this model; " in refused(base, tmp_path / "no", **new)
    added = refused(base, tmp_path / "no", **new | dict(line_break="[unused7]"))  # not one to use instead of itself
    assert added.endswith("is no token of this model; add --grow-vocab")


def test_the_command_says_it_in_one_line(base, tmp_path):
    (tmp_path / "gb.txt").write_bytes((POEM + "\n").encode("gb18030") * 30 + b"\xff")
    done, seconds = command(
        "--data", "gb.txt", "--model", str(base / "model"), "--from-scratch", "--device", "cpu", cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == "" and seconds < 20
    assert done.stderr == (
        "fastpoem: gb.txt, line 31: the file is not UTF-8, and from here on not GB18030 either; get the whole file, or convert it to UTF-8\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("network", ["refuses", "is silent", "has no names"])
def test_no_network(base, tmp_path, network):
    """A hub name without a network is refused in seconds, and says how to do without. A silent one is not asked again and again."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never answers
        endpoint = {
            "refuses": "http://127.0.0.1:9",
            "is silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "has no names": "https://hub.invalid",
        }[network]
        done, seconds = command(
            "--data", str(base / "poems.txt"), "--model", "owner/name", "--out", "run", cwd=tmp_path,
            HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"), no_proxy="*",
        )  # fmt: skip
        silent.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
    assert done.returncode == 2 and seconds < 20
    assert asked in ((1, 2) if network == "is silent" else (0,))
    assert done.stderr.startswith(f"fastpoem: owner/name: it could not be fetched from the hub at {endpoint}")
    assert done.stderr.count("\n") == 1 and "give --model a folder fetched elsewhere" in done.stderr
    assert not (tmp_path / "run").exists()
