"""Flags, and settings of a call: every mistake is one plain line, and what goes on needs nothing but the run's folder."""

import dataclasses
import errno
import fcntl
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastpoem
from fastpoem.api import in_python
from fastpoem.cli import flag_of, kinds, parse, run_command
from fastpoem.config import TrainConfig, from_kwargs, saved_settings, with_defaults
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.doctor.__main__ import DoctorConfig
from fastpoem.errors import InputError
from fastpoem.generate import GenerateCommand
from fastpoem.model.hub import BUNDLED
from fastpoem.prepare import PrepareConfig
from fastpoem.settings import Data, Settings
from fastpoem.train import main as train
from tests import runs
from tests.runs import assert_same, settings, tiny_data, tiny_model

ENVIRONMENT = {**runs.ENVIRONMENT, "PYTHONUNBUFFERED": ""}
COMMANDS = {"train": TrainConfig, "prepare": PrepareConfig, "generate": GenerateCommand, "doctor": DoctorConfig}


def refused(cls, *argv: str) -> str:
    with pytest.raises(InputError) as refusal:
        parse(cls, argv)
    assert "\n" not in str(refusal.value) and "None" not in str(refusal.value) and "|" not in str(refusal.value)
    return str(refusal.value)


EVERY = [(cls, name) for cls in COMMANDS.values() for name in kinds(cls)]


@pytest.mark.parametrize("cls, name", EVERY, ids=[f"{cls.__name__}-{name}" for cls, name in EVERY])
def test_every_flag_of_every_command(cls, name):
    """Without its value, twice, and with a value that is none of its kind: each has its own plain line."""
    kind, flag = kinds(cls)[name], flag_of(name)
    if kind.base is bool:
        assert (
            refused(cls, flag, flag) == refused(cls, flag, f"--no-{flag[2:]}") == f"{flag}: given twice; give it once"
        )
        assert refused(cls, f"{flag}=True") == f"{flag}=True: takes no value; write {flag} or --no-{flag[2:]}"
        assert refused(cls, flag, "True") == f"{flag} True: takes no value; write {flag} alone"
        return
    for line in ([flag], [flag, "--model", "x"], [flag, "--help-me"]):
        assert refused(cls, *line).startswith(f"{flag}: needs a value, {kind.words}")
    value = kind.choices[0] if kind.choices else "1"
    if not kind.many:
        assert refused(cls, flag, value, f"{flag.replace('-', '_').replace('__', '--')}={value}") == f"{flag}: given twice; give it once"  # fmt: skip
        assert "a value without a flag" in refused(cls, flag, value, "more")
    if kind.base is not str or kind.choices:
        assert refused(cls, flag, "spring").startswith(f"{flag} spring: ")


def test_several_values_are_one_setting():
    for argv in (
        ["--data", "a", "b", "--lr", "1", "--data", "c"],
        ["--data=a", "b", "--data=c"],
        ["--data", "a", "--data", "b", "c"],
    ):
        assert parse(TrainConfig, argv).data == ("a", "b", "c")


@pytest.mark.parametrize("module, argv", [
    ("fastpoem_kernels.aot", ["--out", "a", "--arch", "sm_80", "--arch=sm_90"]), ("benchmarks.report", ["x", "--out", "a", "--out", "b"]),
    ("benchmarks.notebook", ["--lr", "1", "--lr", "2"]),
])  # fmt: skip
def test_twice_elsewhere(module, argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, *argv])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(*([argv] if "notebook" not in module else []))
    assert end.value.code == 2 and ": given twice; give it once" in capsys.readouterr().err


SAID = {
    ("poems.txt",): "poems.txt: a value without a flag; did you mean --data poems.txt?",
    ("--warmup-steps",): "--warmup-steps: needs a value, a whole number; see --help",
    ("--batching", "buckt"): "--batching buckt: no such choice; did you mean bucket?",
    ("--batching", "heap"): "--batching heap: no such choice; use auto, bucket, pack or pad",
    ("--lr", "1e-3x"): "--lr 1e-3x: is not a number; give a number",
    ("--epochs", "1.5"): "--epochs 1.5: is not a whole number; give a whole number",
    ("--seed", "9" * 5000): f"--seed {'9' * 58} …: has too many digits; give a whole number",
    ("-out", "x"): "-out: no such flag; did you mean --out?",
    ("--learning-rate", "1"): "--learning-rate: no such flag; did you mean --lr? see --help",
    ("--ep", "1"): "--ep: no such flag; did you mean --epochs?",
    ("--ip", "1"): "--ip: no such flag; see --help for the flags there are",
    ("–epochs", "1.5"): "--epochs 1.5: is not a whole number; give a whole number",
    ("--data", "a", "—batching=heap"): "--batching heap: no such choice; use auto, bucket, pack or pad",
    ("--no-lr",): "--no-lr: no such flag; did you mean --lr?",
}


@pytest.mark.parametrize("argv", SAID, ids=lambda argv: " ".join(argv)[:30])
def test_plain_words(argv):
    assert refused(TrainConfig, *argv) == SAID[argv]


def flags(config: TrainConfig, known: set[str]) -> list[str]:
    """The command line that says `config`."""
    argv = []
    for name, value in vars(config).items():
        if name in known:
            continue
        if isinstance(value, bool):
            argv.append(flag_of(name) if value else flag_of(f"no_{name}"))
        elif not isinstance(value, tuple):
            argv.append(f"{flag_of(name)}={value}")
        elif value:
            argv += [flag_of(name), *value]
    return argv


@given(st.builds(
    TrainConfig, data=st.lists(st.text("ab春 /.", min_size=1), max_size=3).map(tuple), lr=st.none() | st.floats(0, 1),
    epochs=st.integers(-5, 10**6), shuffle=st.booleans(), sample=st.none() | st.text("春-= a", min_size=1).filter(lambda text: text != "None"),
    batching=st.sampled_from(["bucket", "pack", "pad"]), max_steps=st.none() | st.integers(),
))  # fmt: skip
def test_what_is_written_is_read(config):
    assert parse(TrainConfig, flags(config, set())) == config


@pytest.mark.parametrize("module", COMMANDS)
def test_help_and_a_pipe_that_closes(module, tmp_path):
    """Every flag has its help, and `| head -1` ends it quietly."""
    line = f"{shlex.quote(sys.executable)} -m fastpoem.{module} -h | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: python -m fastpoem.{module}")


PRINTS = """
import sys
from fastpoem.cli import run_command
def main():
    for _ in range(100_000):
        print("春眠不觉晓")
    raise SystemExit("it went on")
run_command(main)
"""


@pytest.mark.parametrize("script, code, said", [
    (PRINTS, 0, ""),
    (PRINTS.replace("100_000", "1").replace('raise SystemExit("it went on")', "return 3"), 3, ""),
    (PRINTS.replace("print(", "open('pipe', 'wb', buffering=0).write(b'x'); print("), 1, "BrokenPipe"),
], ids=["while it prints", "at its end", "another pipe is a bug"])  # fmt: skip
def test_nobody_reads(tmp_path, script, code, said):
    if said:
        script = script.replace(
            "def main():", "import os\ndef main():\n    r, w = os.pipe(); os.close(r); os.write(w, b'x')"
        )
    reader, writer = os.pipe()
    if not said:
        os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert done.returncode == code and (said in done.stderr if said else done.stderr == "")


def test_windows_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: pytest.fail("it began"))
    assert end.value.code == 2
    assert capsys.readouterr().err == "fastpoem: fastpoem runs on Linux and macOS; on Windows use WSL 2\n"
    with pytest.raises(InputError, match="on Windows use WSL 2"):
        fastpoem.fit("poems.txt")


@pytest.mark.parametrize("module", ["train", "prepare", "generate", "doctor"])
def test_nothing_that_windows_lacks_is_imported_before_that(module):
    script = (
        f"import sys, fastpoem.{module}; print([name for name in ('fcntl', 'torch', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def whole(base):
    return fastpoem.fit(**settings(base, out=str(base / "whole"))).folder


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(base, tmp_path, monkeypatch, number):
    """Said, and not permissions; nothing half-made stays."""

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    fastpoem.fit(**settings(base, out=str(tmp_path / "first"), max_steps=1))  # its store is ready
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"run: its file system has no file locks \(.*local disk with out="):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1))
    tokenizer = PoemTokenizer.load(base / "model")
    with pytest.raises(InputError, match=r"store: its file system has no file locks \(.*--out of prepare, --cache-dir"):
        prepare_store(base / "poems.txt", tokenizer, tmp_path / "store", max_length=64)
    left = {path.name for path in tmp_path.iterdir()} - {"first"}
    assert left <= {"run"} and (not left or {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"})


def spoken(base: Path, out: Path, **changes) -> list[str]:
    config = from_kwargs(**settings(base, out=str(out)) | changes)
    return flags(config, {name for name, value in vars(config).items() if value == getattr(TrainConfig(), name)})


def test_resume_needs_only_the_folder(base, whole, tmp_path, monkeypatch, capsys):
    """From the command line and as a call, and from another folder than the one it began in."""
    monkeypatch.chdir(base)
    argv = spoken(base, tmp_path / "run", data="poems.txt", model="model")
    assert train([*argv, "--max-steps", "9"]) == 0
    monkeypatch.chdir(tmp_path)
    assert train(["--out", "run", "--resume", "--max-steps", "20"]) == 0
    fastpoem.fit(out="run", resume=True, max_steps=None)
    assert_same(whole, tmp_path / "run")
    saved = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    assert saved["data"] == [str(base / "poems.txt")] and saved["lr"] == 0.01


def test_what_is_given_wins(base, whole, tmp_path):
    given = TrainConfig(out=str(whole), resume=True)
    config = with_defaults(given)
    assert (config.batch_size, config.data) == (4, (str(base / "poems.txt"),))
    assert from_kwargs(out=str(whole), resume=True, log_every=7).log_every == 7
    saved = json.loads((whole / "config.json").read_text())
    saved["settings"]["max_steps"] = 9  # a number of epochs is said instead of a number of steps
    (tmp_path / "config.json").write_text(json.dumps(saved))
    said = [
        from_kwargs(out=str(tmp_path), resume=True, **more) for more in (dict(), dict(epochs=3), dict(max_steps=20))
    ]
    assert [config.max_steps for config in said] == [9, None, 20]
    assert parse(TrainConfig, ["--log-every", "7"], default=config).log_every == 7
    data = str(base / "poems.txt")
    for was, given in ((dict(val_poems=3), dict(val_data=(data,))), (dict(val_data=[data]), dict(val_poems=3))):
        saved["settings"] |= dict(val_poems=None, val_data=[]) | was
        (tmp_path / "config.json").write_text(json.dumps(saved))
        config = from_kwargs(out=str(tmp_path), resume=True, **given)  # and is not refused for what nobody gave
        assert (config.val_poems, config.val_data) == (given.get("val_poems"), given.get("val_data", ()))


@pytest.mark.parametrize("old", [None, "poems.txt", ["a", "b"]])
def test_a_folder_of_an_older_version(whole, tmp_path, old):
    """Data was a string or nothing; settings that came since have their defaults; infinity is a word."""
    content = json.loads((whole / "config.json").read_text())
    content["settings"] |= {"data": old, "max_grad_norm": "inf"}
    del content["settings"]["patience"], content["cwd"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    saved = saved_settings(tmp_path)
    assert saved["data"] == ((old,) if isinstance(old, str) else tuple(old or ())) and saved["max_grad_norm"] == float(
        "inf"
    )
    assert with_defaults(TrainConfig(out=str(tmp_path), resume=True)).patience is None


SPOILED = {
    "is damaged: it holds no settings": ["{", "[]", '{"settings": 3}', "[" * 100_000, "{}", '{"settings": {}, "versions": 3}'],
    "has a setting colour, unknown here (it is fastpoem 9.9's)": ['{"settings": {"colour": 1}, "versions": {"fastpoem": "9.9"}}'],
    "is damaged: its epochs is 'many'": ['{"settings": {"epochs": "many"}}'],
}  # fmt: skip


@pytest.mark.parametrize(
    "says, content", [(says, one) for says, some in SPOILED.items() for one in some], ids=lambda text: text[:30]
)
def test_a_damaged_config(tmp_path, says, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        train(["--out", str(tmp_path), "--resume"])
    assert says in str(refusal.value) and "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes", [dict(batch_size=5), dict(lr=0.5, shuffle=False), dict(data=("{}/more.txt",)), dict(line_break="[lb]"),
                dict(batch_size=5, sample="--春"), dict(model="{}/wide")], ids=repr
)  # fmt: skip
def test_a_refused_resume_ends_with_the_command_that_is_meant(base, whole, tmp_path, changes):
    """The command is given, and trains a new run from the weights of the old, or with the model that was meant where it is another."""
    tiny_data(base / "more.txt", BUNDLED / "poems.txt", poems=61)
    if not (base / "wide").is_dir():
        wide = tiny_model(base / "wide", BUNDLED / "model") / "config.json"
        wide.write_text(wide.read_text().replace('"n_embd": 16', '"n_embd": 32'))
    filled = lambda value: value.format(base) if isinstance(value, str) else value
    changes = {
        name: tuple(map(filled, value)) if isinstance(value, tuple) else filled(value)
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match="cannot be resumed") as refusal:
        train([*spoken(base, whole, **changes), "--resume"])
    command = str(refusal.value).partition("python -m fastpoem.train ")[2]
    argv = shlex.split(command)
    config = parse(TrainConfig, argv, default=with_defaults(parse(TrainConfig, argv)))
    onward = {"from_scratch": False, "model": str(whole / "model"), "grow_vocab": "line_break" in changes}
    model = changes.get("model", str(whole / "model"))
    expected = from_kwargs(**settings(base, out=f"{whole}-2") | (changes if "model" in changes else changes | onward))
    assert ("from its weights" in str(refusal.value)) == ("model" not in changes)
    assert config == expected
    with pytest.raises(InputError, match=re.escape(f"fastpoem.fit(model={model!r}, out=")):
        fastpoem.fit(out=str(whole), resume=True, **changes)


class TestCall:
    """fastpoem.fit, as Python has it."""

    def test_signature(self):
        parameters = inspect.signature(fastpoem.fit).parameters
        assert {name: one.default for name, one in parameters.items()} == {
            **vars(TrainConfig()), "on_log": None, "on_epoch": None,
        }  # fmt: skip
        assert [name for name, one in parameters.items() if one.kind is not one.KEYWORD_ONLY] == ["data"]
        for field in dataclasses.fields(TrainConfig):
            assert f"\n{field.name}: " in fastpoem.fit.__doc__
        assert {"fit", "Run", "TokenStore"} <= {*dir(fastpoem)}

    def test_editors_know_the_same(self):
        """The names, and for each the annotation, but that paths may be paths."""
        hints = typing.get_type_hints(TrainConfig)
        said = typing.get_type_hints(Settings)
        assert [*said] == [name for name in hints if name != "data"]
        for name, hint in said.items():
            if hint != Data:
                parts = [one for one in typing.get_args(hint) or (hint,) if typing.get_origin(one) is not os.PathLike]
                assert set(parts) == {*(typing.get_args(hints[name]) or (hints[name],))}, name

    @pytest.mark.parametrize("call, says", [
        (dict(lern_rate=1), "lern_rate: no such setting; did you mean lr?"),
        (dict(batchsize=1), "batchsize: no such setting; did you mean batch_size?"),
        (dict(batch_size=0), "batch_size=0: out of range; use a number from 1 to 65536"),
        (dict(batch_size="4"), "batch_size='4': is of the wrong kind; give a whole number"),
        (dict(batching="bag"), "batching='bag': is not one of them; use auto or bucket or pack or pad"),
        (dict(device="gpu"), "device='gpu': no such kind of device; use auto, cpu, cuda, cuda:N or mps"),
        (dict(loss_on_padding=True, batching="pack"), "loss_on_padding=True: packed batches have no padding; drop it, or use batching='pad'"),
        (dict(resume=True), "resume=True: it needs to know which run; name the run's folder with out=…"),
        (dict(shuffle="x" * 10_000), "shuffle='xxxx"),
    ], ids=repr)  # fmt: skip
    def test_words(self, call, says):
        with pytest.raises(InputError) as refusal:
            fastpoem.fit("poems.txt", **call)
        assert says in str(refusal.value) and len(str(refusal.value)) < 200 and "--" not in str(refusal.value)

    def test_words_of_the_rooms_below(self):
        for said, meant in {
            "lower --batch-size": "lower batch_size",
            "prepare the text again with --max-length 20": "prepare the text again with max_length=20",
            "add --resume to continue it, or name another folder with --out": "add resume=True to continue it, or name another folder with out=…",
            "use --attention auto": "use attention='auto'",
            "iconv --from gb18030": "iconv --from gb18030",
            "python -m fastpoem.train --data a b --no-shuffle --lr 1e-3": "fastpoem.fit(data=['a', 'b'], shuffle=False, lr=0.001)",
        }.items():
            assert in_python(InputError("x", "y", said)).mend == meant

    def test_data_comes_first(self, base, tmp_path, whole):
        given = {name: value for name, value in settings(base, out=tmp_path / "run").items() if name != "data"}
        run = fastpoem.fit(base / "poems.txt", **given | {"model": base / "model"})
        assert_same(whole, run.folder)


class TestRun:
    """fastpoem.Run("runs/x")."""

    def test_opened(self, whole):
        run = fastpoem.Run(whole)
        assert run.metrics == [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        assert run.model == whole / "model" and run.stopped_by is None
        assert re.fullmatch(r"Run\('.*whole', 42 steps, loss \d+\.\d{4}\)", repr(run))
        assert repr(fastpoem.Run(whole, [], stopped_by=15)).endswith("0 steps, stopped by SIGTERM)")

    def test_torn_and_without_a_model(self, whole, tmp_path):
        rows = (whole / "metrics.jsonl").read_bytes()
        (tmp_path / "metrics.jsonl").write_bytes(rows[:-20])
        run = fastpoem.Run(str(tmp_path))
        assert len(run.metrics) == len(rows.splitlines()) - 1
        with pytest.raises(InputError, match="holds no model and no whole checkpoint yet"):
            run.generate("春")

    @pytest.mark.parametrize(
        "place, says", [("nothing", "no such folder"), ("", "it has no metrics.jsonl"), ("poems.txt", "no such folder")]
    )
    def test_where_there_is_none(self, tmp_path, place, says):
        (tmp_path / "poems.txt").write_text("")
        with pytest.raises(InputError, match=says):
            fastpoem.Run(tmp_path / place)
