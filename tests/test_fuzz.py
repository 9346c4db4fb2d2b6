"""Whatever bytes lie where a description, a model or a row should be: a refusal in a line, no traceback, no hang, no memory taken on trust."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.cli import parse
from fastpoem.config import TrainConfig, from_kwargs, with_defaults
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
from fastpoem.model.hub import BUNDLED
from fastpoem.run import checkpoint
from fastpoem.run.loop import check_state
from fastpoem.run.metrics import Mark, Metrics
from tests.runs import tiny_model

often = settings(max_examples=200)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(2**70)
    | st.just("../../etc"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
STATE = {
    "seconds": 1.5, "epoch_due": False, "val_loss": 2.5, "skipped": 0, "spike": [3, 9.0, 3.0, 7.5],
    "watch": {"count": 0, "window": [1.0]}, "metrics": [0, "a"], "metrics_at_the_end": [0, "a"], "length": "3 epochs",
    "identity": {},
}  # fmt: skip


def tensors():
    return {
        "model.safetensors": {"a": torch.zeros(50), "b": torch.zeros(3, 2)},
        "optimizer.safetensors": {"c": torch.zeros(()), "rng.cpu": torch.zeros(9, dtype=torch.uint8)},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one whole checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.write(folder, 7, tensors(), {"config.json": b"{}"}, STATE, keep=1)
    return folder


def read(run: Path):
    """The newest checkpoint's state, or None where it is passed over."""
    try:
        return checkpoint.read_newest(run, tensors(), check_state, lambda line: None)
    except InputError as refusal:
        assert "none of its 1 checkpoints is whole" in str(refusal)
        return None


def with_state(run: Path, content: bytes):
    file = run / "checkpoints/step-00000007/state.json"
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        return read(run)
    finally:
        file.write_bytes(before)


def places(value, path=()):
    """The path of everything in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


@often
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_for_a_state(run, content):
    assert with_state(run, content) is None


@often
@given(st.data())
def test_a_state_with_anything_in_any_place_under_a_right_checksum(run, data):
    """Nothing in it is believed for being well sealed: it is refused, or is a state that a run can go on from."""
    content = json.loads((run / "checkpoints/step-00000007/state.json").read_bytes())
    where = data.draw(st.sampled_from([path for path in places(content) if path and path != ("checksum",)]))
    holder = content
    for key in where[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[where[-1]] = data.draw(values)
    else:
        holder.pop(where[-1])
    content["checksum"] = checkpoint._checksum(content)
    state = with_state(run, json.dumps(content).encode())
    if state is not None:
        check_state(state)
        assert state["step"] == 7


@often
@given(st.sampled_from(["model.safetensors", "optimizer.safetensors"]), st.data())
def test_tensors_with_any_header_under_a_right_hash(run, name, data):
    """What the file says of itself is checked against the file and against the model before a byte is copied."""
    folder = run / "checkpoints/step-00000007"
    before = {file: (folder / file).read_bytes() for file in (name, "state.json")}
    content = bytearray(before[name])
    if data.draw(st.booleans()):
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        where = data.draw(st.sampled_from([path for path in places(header) if path]))
        holder = header
        for key in where[:-1]:
            holder = holder[key]
        holder[where[-1]] = data.draw(values)
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + size :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        (folder / name).write_bytes(content)
        described = json.loads(before["state.json"])
        described["files"][name] = {"size": len(content), "sha256": checkpoint.disk.file_hash(folder / name)}
        described["checksum"] = checkpoint._checksum(described)
        (folder / "state.json").write_text(json.dumps(described))
        read(run)
    finally:
        for file, whole in before.items():
            (folder / file).write_bytes(whole)


@often
@given(st.binary(max_size=400) | st.lists(values.map(lambda value: json.dumps(value)), max_size=5).map("\n".join).map(str.encode),
       st.integers(0, 500), st.integers(0, 50))  # fmt: skip
def test_any_bytes_for_metrics(tmp_path_factory, content, size, done):
    """Only whole rows of steps that were done remain, in rising order."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "metrics.jsonl").write_bytes(content)
    metrics = Metrics(folder, done=done, keep=Mark(size, "0" * 64), say=lambda line: None, hold=lambda: None)
    metrics.write({"step": done + 1, "loss": 1.0})
    metrics.close()
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    assert found[-1] == {"step": done + 1, "loss": 1.0}
    steps = [row["step"] for row in found]
    assert steps == sorted(steps) and steps.count(done + 1) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny", BUNDLED / "model")
    config, raw = hub.read_config(folder)
    network = GPT2(config)
    network.initialise(0)
    hub.save_folder(folder.parent / "whole", network.state_dict(), raw, [folder / "vocab.txt"])
    return folder.parent / "whole"


@often
@given(st.dictionaries(st.sampled_from(["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "attn_pdrop",
    "layer_norm_epsilon", "activation_function", "model_type", "scale_attn_weights", "initializer_range"]), values, min_size=1))  # fmt: skip
def test_any_values_in_a_models_configuration(tmp_path_factory, model, changes):
    folder = tmp_path_factory.mktemp("config")
    raw = json.loads((model / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        shape, _ = hub.read_config(folder)
    except InputError:
        return
    assert hub.count_parameters(shape) > 0 and shape.n_embd % shape.n_head == 0


@often
@given(st.sampled_from(["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"]), st.data())
def test_any_bytes_for_weights(tmp_path_factory, model, name, data):
    folder = tmp_path_factory.mktemp("weights")
    shape, _ = hub.read_config(model)
    if name == "model.safetensors" and data.draw(st.booleans()):
        content = bytearray((model / name).read_bytes())
        content[data.draw(st.integers(0, 2000))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = data.draw(st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
    (folder / name).write_bytes(content)
    network = GPT2(shape)
    try:
        hub.load_weights(network, folder)
    except InputError:
        return
    assert all(value.isfinite().all() for value in network.state_dict().values())


flags = st.sampled_from(["--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__])
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)


@often
@given(
    st.lists(st.tuples(flags | words, st.none() | words | st.floats().map(repr) | st.integers().map(str)), max_size=3)
)
def test_any_command_line(arguments):
    argv = [word for pair in arguments for word in pair if word is not None]
    try:
        config = parse(TrainConfig, argv, default=with_defaults(parse(TrainConfig, argv))).check()
    except InputError as refusal:
        assert "\n" not in str(refusal)
    except SystemExit as done:
        assert done.code in (0, None) and {"-h", "--help"} & {*argv}
    else:
        assert config.check() is config


@often
@given(st.dictionaries(st.sampled_from([*TrainConfig.__dataclass_fields__]) | st.text(max_size=5), values, max_size=3))
def test_any_arguments_of_fit(changes):
    try:
        from_kwargs(**changes)
    except InputError as refusal:
        assert "\n" not in str(refusal)


def test_memory_is_not_taken_on_trust(model, run, tmp_path):
    """Headers that claim terabytes, under a limit of two gigabytes: refused, in seconds."""
    for folder, name in ((tmp_path / "a", "model.safetensors"), (tmp_path / "b", "pytorch_model.bin")):
        folder.mkdir()
        (folder / "config.json").write_bytes((model / "config.json").read_bytes())
        if name.endswith(".bin"):
            torch.save({"transformer.wte.weight": torch.zeros(1).expand(1 << 40)}, folder / name)
        else:
            header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
            (folder / name).write_bytes(len(header).to_bytes(8, "little") + header)
    code = """
import sys
from pathlib import Path
from fastpoem.errors import InputError
from fastpoem.model import hub
from fastpoem.model.gpt2 import GPT2
for folder in map(Path, sys.argv[1:]):
    try:
        hub.load_weights(GPT2(hub.read_config(folder)[0]), folder)
    except InputError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")], capture_output=True, text=True, timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30)),
    )  # fmt: skip
    assert done.stdout == "refused\nrefused\n", done.stderr
