"""The one command `fastpoem`, settings from a file, help in groups, and a run that is only planned."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from fastpoem import __main__ as command
from fastpoem import cli
from fastpoem.config import GROUPS, TrainConfig, from_kwargs
from fastpoem.errors import InputError
from fastpoem.train import TrainCommand, main, read_settings
from fastpoem.version import __version__
from tests.runs import ENVIRONMENT, ROOT, settings


@pytest.fixture(autouse=True)
def called_as_before(monkeypatch):
    monkeypatch.setattr(cli, "_called", None)
    monkeypatch.setattr(sys, "argv", ["fastpoem"])


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_each_command_there_is_and_imports_nothing(argv, capsys):
    assert command.dispatch(argv) == 0
    said = capsys.readouterr().out
    for name in ("train", "prepare", "generate", "doctor"):
        assert f"\n  {name} " in said
    for name in command.COMMANDS:
        there = (ROOT / "fastpoem" / f"{name}.py").exists() or (ROOT / "fastpoem" / name).is_dir()
        assert (f"\n  {name} " in said) == there
    script = "import sys; from fastpoem.__main__ import dispatch; dispatch(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *argv], env=ENVIRONMENT, capture_output=True, text=True)
    assert not {"torch", "numpy", "rich", "tyro", "fastpoem.train"} & {*done.stdout.splitlines()[-1].split()}


def test_version(capsys):
    assert command.dispatch(["--version"]) == 0 and capsys.readouterr().out == f"fastpoem {__version__}\n"


@pytest.mark.parametrize("argv, says", [
    (["trian"], "trian: no such command; did you mean fastpoem train?"),
    (["--train"], "--train: no such command; did you mean fastpoem train?"),
    (["xyz"], "xyz: no such command; use train, generate, "),
    ([""], "'': no such command; use train"),
    (["--print-completion", "fish"], "--print-completion fish: no such shell; use bash or zsh"),
    (["train", "--epoch", "2"], "--epoch: no such flag; did you mean --epochs?"),
])  # fmt: skip
def test_what_is_not_understood(argv, says):
    with pytest.raises(InputError) as refusal:
        command.dispatch(argv)
    assert says in str(refusal.value)


def test_commands_are_named_as_they_were_called(capsys, monkeypatch):
    for arguments, usage in (
        (["fastpoem", "prepare"], "usage: fastpoem prepare "),
        ([str(ROOT / "fastpoem/__main__.py"), "doctor"], "usage: python -m fastpoem doctor "),
    ):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            command.main([arguments[1], "--help"])
        assert end.value.code == 0 and capsys.readouterr().out.startswith(usage)
        monkeypatch.setattr(cli, "_called", None)
    assert cli.prog("train") == "python -m fastpoem.train"


def test_help_is_in_groups_with_each_setting_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    at = [said.index(f" {title} options ") for title in GROUPS]
    assert at == sorted(at)
    parts = dict(zip(GROUPS, [said[begin:end] for begin, end in zip(at, [*at[1:], None], strict=True)], strict=True))
    for name in cli.kinds(TrainCommand):
        assert sum(len(re.findall(rf"^. {cli.flag_of(name)}[ ,]", part, re.M)) for part in parts.values()) == 1, name
    assert "--lr" in parts["optimisation"] and "--precision" in parts["speed"] and "--dry-run" in parts["run"]
    assert {name for names in GROUPS.values() for name in names.split()} <= {*cli.kinds(TrainConfig)}
    assert "Peak learning rate." in said and "the flags there are" not in said


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize("words, offers", [
    (["fastpoem", "tr"], {"train"}), (["fastpoem", "train", "--batch"], {"--batching", "--batch-size"}),
    (["fastpoem", "train", "--precision", ""], {"auto", "fp32", "bf16", "fp16"}), (["fastpoem", "generate", "--tem"], {"--temperature"}),
    (["fastpoem", "train", "--data", "poe"], set()),
])  # fmt: skip
def test_completion(words, offers, tmp_path, capsys):
    command.dispatch(["--print-completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    script = f"source {tmp_path}/completion; COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _fastpoem; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == "" and {*done.stdout.split()} == offers


TOML = """
data = ["a.txt", "b.txt"]   # several
batch-size = 8
lr = 1e-3
max_grad_norm = "inf"
shuffle = false
dropout = 0
recipe = "fast"
warmup_steps = "None"
"""


def test_a_file_of_settings_and_flags_over_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(TOML)
    given = dict(
        data=["a.txt", "b.txt"], batch_size=8, lr=1e-3, max_grad_norm=float("inf"), shuffle=False, dropout=0,
        recipe="fast", warmup_steps=None,
    )  # fmt: skip
    assert read_settings(["--config", "run.toml"]) == (from_kwargs(**given), False)
    found, dry_run = read_settings(["--dry-run", "--config", "run.toml", "--batch-size", "4", "--shuffle"])
    assert dry_run and found == from_kwargs(**{**given, "batch_size": 4, "shuffle": True})
    found, _ = read_settings(["--recipe", "notebook", "--config", "run.toml"])
    assert (found.batching, found.loss_on_padding, found.warmup_steps, found.lr) == ("pad", True, 0, 1e-3)
    Path("own.toml").write_text('data = "a.txt"\nval-poems = 20\n')
    assert read_settings(["--config", "own.toml", "--val-data", "b.txt"])[0].val_poems is None


def test_paths_in_a_file_may_be_beside_it(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (base / "run.toml").write_text('data = "poems.txt"\nmodel = "model"\n')
    found, _ = read_settings(["--config", str(base / "run.toml")])
    assert (found.data, found.model) == ((str(base / "poems.txt"),), str(base / "model"))
    Path("poems.txt").write_text("春")
    assert read_settings(["--config", str(base / "run.toml")])[0].data == ("poems.txt",)


@pytest.mark.parametrize("text, says", [
    ("batchsize = 8", "has 'batchsize', which is no setting; did you mean batch_size?"),
    ("learning-rate = 1", "has 'learning-rate', which is no setting; did you mean lr?"),
    ("[train]\nlr = 1", "has 'train', which is no setting but a table"),
    ("qqq = 1", "has 'qqq', which is no setting; see --help"),
    ("lr = 'fast'", "lr='fast': is of the wrong kind; give a number"), ("lr = 2000.0", "--lr 2000.0: out of range"),
    ("batch-size = 8\nbatch_size = 9", "has batch_size twice"), ("lr = ", "is no TOML"), ("batching = 'packed'", "batching='packed'"),
    ("epochs = true", "epochs=True: is of the wrong kind"), ("seed = 1979-05-27", "seed=datetime.date(1979, 5, 27)"),
])  # fmt: skip
def test_a_file_that_is_wrong(tmp_path, text, says):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError) as refusal:
        read_settings(["--config", str(tmp_path / "run.toml")])
    assert says in str(refusal.value)


@pytest.mark.parametrize("name", ["none.toml", "none.json", "."])
def test_a_file_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such file|cannot be read"):
        read_settings(["--config", name])


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_plan_and_then_the_run_from_its_own_config(base, tmp_path, capsys, monkeypatch):
    """A dry run refuses what the run would, times it, and leaves the folders as they were."""
    here = shutil.copytree(base, tmp_path / "here", ignore=shutil.ignore_patterns(".fastpoem"))
    monkeypatch.chdir(here)
    flags = ["--data", "poems.txt", "--model", "model", "--from-scratch", "--device", "cpu", "--batch-size", "4"]
    flags += ["--out", "run", "--epochs", "2"]
    before = listing(here)
    assert main([*flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert listing(here) == before
    for part in (
        "60 poems from poems.txt",
        "2 epochs, 28 steps",
        "checkpoints run, ",
        "time        about ",
        "memory      ",
        "nothing was written",
    ):
        assert part in said, part
    with pytest.raises(InputError, match=r"absent\.txt: "):
        main(["--data", "absent.txt", "--model", "model", "--dry-run"])
    with pytest.raises(InputError, match="looks at a run that begins"):
        main([*flags, "--dry-run", "--resume"])
    assert main(flags) == 0
    with pytest.raises(InputError, match="holds a run already"):
        main([*flags, "--dry-run"])
    assert main(["--config", "run/config.json", "--out", "again", "--epochs", "1"]) == 0
    found = json.loads(Path("again/config.json").read_text())["settings"]
    assert (found["batch_size"], found["epochs"], found["out"]) == (4, 1, "again")
    assert read_settings(["--config", "run/config.json"])[0].out is None
    again = from_kwargs(**settings(here, epochs=2, lr=2e-5, log_every=100, dropout=None))
    assert read_settings(["--config", "run/config.json"])[0].batch_size == again.batch_size


def test_what_is_packed():
    """Each room of the package is in the wheel, and what is not Python: assets, C sources, py.typed."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {"fastpoem", *(f"fastpoem.{path.parent.name}" for path in (ROOT / "fastpoem").glob("*/__init__.py"))}
    assert {*content["tool"]["setuptools"]["packages"]} == rooms | {"fastpoem_kernels"}
    assert content["project"]["scripts"] == {"fastpoem": "fastpoem.__main__:main"}


@pytest.mark.slow
def test_wheel_and_sdist_from_a_copy(tmp_path):
    """Built without network, and the installed command trains in an empty folder."""
    names = ["fastpoem", "kernels", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    build = "from setuptools import build_meta as b; b.build_sdist('../out'); b.build_wheel('../out')"
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,), (sdist,) = (tmp_path / "out").glob("*.whl"), (tmp_path / "out").glob("*.tar.gz")
    needed = ("fastpoem/py.typed", "fastpoem/assets/poems.txt", "fastpoem/assets/model/vocab.txt", "fastpoem_kernels/native.c",
              "fastpoem_kernels/native.h", "fastpoem_kernels/attention.c", "fastpoem_kernels/adamw.c", "fastpoem_kernels/py.typed")  # fmt: skip
    with zipfile.ZipFile(wheel) as one, tarfile.open(sdist) as other:
        contents = one.namelist(), other.getnames()
    for held in contents:
        assert all(any(name.endswith(one) for name in held) for one in needed), held
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    empty = tmp_path / "empty"
    empty.mkdir()
    script = f"import sys; sys.path.insert(0, {str(site)!r}); from fastpoem.__main__ import main; main()"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "XDG_CACHE_HOME": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "--max-steps", "2", "--device", "cpu"], cwd=empty, env=variables, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0 and "the trained model is in runs/" in done.stdout, done.stderr
