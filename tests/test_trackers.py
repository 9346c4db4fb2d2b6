"""What a run shows other programs: the rows of metrics.jsonl, once each, under its name there; and none of them can end it."""

import importlib.machinery
import json
import sys
import types

import pytest

import fastpoem
from fastpoem.config import TrainConfig
from fastpoem.errors import InputError
from tests.runs import assert_tidy, rows, settings


def curves(run):
    """{name: [(step, value)]} that a tracker should have, by metrics.jsonl."""
    found = {}
    for row in [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]:
        group = "epoch" if "event" in row else "train"
        for name, value in row.items():
            if isinstance(value, float) and name != "seconds":
                found.setdefault(f"{group}/{name}", []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return found


class Calls:
    """Stand-ins of the three libraries, with the parameters that theirs have, that write down what they are told."""

    def __init__(self, monkeypatch):
        self.started, self.logged, self.ended, self.broken = [], {}, [], set()
        wandb, swanlab, mlflow = (self.module(monkeypatch, name) for name in ("wandb", "swanlab", "mlflow"))
        calls = self

        class Run:
            def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
                assert step_metric == "step"

            def log(self, data, step=None, commit=None):
                assert step is None
                calls.log("wandb", data["step"], {name: value for name, value in data.items() if name != "step"})

            def finish(self, exit_code=None):
                calls.ended.append("wandb")

        def init(
            entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, resume=None
        ):
            calls.start("wandb", project, name, id, config)
            assert resume == "allow"
            return Run()

        wandb.init = init

        def init(project=None, workspace=None, experiment_name=None, description=None, config=None, logdir=None, mode=None, id=None, resume=None):  # fmt: skip
            assert len(id) == 21 and resume == "allow"
            calls.start("swanlab", project, experiment_name, id, config)

        swanlab.init = init
        swanlab.log = lambda data, step=None, print_to_console=False: calls.log("swanlab", step, data)
        swanlab.finish = lambda state=None, error=None: calls.ended.append("swanlab")

        def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, tags=None, description=None):
            calls.start("mlflow", calls.experiment, run_name, run_id, None)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "an-id"))

        def set_experiment(experiment_name=None, experiment_id=None):
            calls.experiment = experiment_name

        def log_params(params, synchronous=None, run_id=None):
            assert all(isinstance(value, str) and len(value) <= 500 for value in params.values())
            calls.params = params

        def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None):
            assert synchronous is False and run_id == "an-id"
            calls.log("mlflow", step, metrics)

        mlflow.set_experiment, mlflow.start_run = set_experiment, start_run
        mlflow.log_params, mlflow.log_metrics = log_params, log_metrics
        mlflow.end_run = lambda status="FINISHED": calls.ended.append("mlflow")

    @staticmethod
    def module(monkeypatch, name):
        made = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    def start(self, *what):
        if what[0] in self.broken:
            raise RuntimeError("no key\nlog in first")
        self.started.append(what)

    def log(self, name, step, values):
        if (name, step) in self.broken:
            raise ConnectionError("gone")
        for key, value in values.items():
            self.logged.setdefault(name, {}).setdefault(key, []).append((step, value))


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def test_tensorboard_has_the_curves(base, tmp_path):
    """The real one, read back; a resumed run goes on in it."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    fastpoem.fit(**settings(base, out=str(out), max_steps=14, log_to="tensorboard"))
    run = fastpoem.fit(out=str(out), resume=True, max_steps=20)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    expected = curves(run.folder)
    assert {"train/loss", "train/lr", "epoch/val_loss"} <= {*events.Tags()["scalars"]} == expected.keys()
    for name, values in expected.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == values


def test_each_has_the_curves_and_a_resumed_run_goes_on_in_them(base, tmp_path, calls):
    out = tmp_path / "run"
    fastpoem.fit(**settings(base, out=str(out), max_steps=14, log_to=["wandb,swanlab", "mlflow"]))
    assert [what[:3] for what in calls.started[:2]] == [("wandb", "fastpoem", "run"), ("swanlab", "fastpoem", "run")]
    assert calls.started[0][4]["lr"] == 1e-2 and calls.params["lr"] == "0.01"
    calls.params = None
    run = fastpoem.fit(out=str(out), resume=True, max_steps=20)
    first, again = calls.started[:3], calls.started[3:]
    assert [what[3] for what in again] == [first[0][3], first[1][3], "an-id"]
    assert calls.params is None  # MLflow refuses to have one changed
    assert calls.logged == dict.fromkeys(("wandb", "swanlab", "mlflow"), curves(run.folder))
    assert calls.ended == ["wandb", "swanlab", "mlflow"] * 2


def test_one_that_breaks_ends_itself_only(base, tmp_path, calls, capsys):
    calls.broken = {("wandb", 3)}
    run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=5, log_to="wandb,swanlab"))
    assert capsys.readouterr().out.count("Weights & Biases's curves end here, they could not be written: gone") == 1
    assert [step for step, _ in calls.logged["wandb"]["train/loss"]] == [1, 2]
    assert calls.logged["swanlab"] == curves(run.folder) and calls.ended == ["swanlab"]
    plain = fastpoem.fit(**settings(base, out=str(tmp_path / "plain"), max_steps=5))
    assert rows(run.folder) == rows(plain.folder)


def test_one_that_does_not_start_is_refused_and_nothing_left(base, tmp_path, calls):
    calls.broken = {"swanlab"}
    with pytest.raises(InputError) as refusal:
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), log_to="wandb,swanlab"))
    said = "log_to='swanlab': SwanLab does not start (no key); log in with `swanlab login`, set SWANLAB_MODE=offline, or leave it out"
    assert str(refusal.value) == said
    assert calls.ended == ["wandb"] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, extra", [("tensorboard", "curves"), ("wandb", "wandb"), ("swanlab", "swanlab"), ("mlflow", "mlflow")])  # fmt: skip
def test_one_that_is_not_installed(base, tmp_path, monkeypatch, name, extra):
    """A folder of its name in which it kept something is not the library."""
    for found in (None, importlib.machinery.ModuleSpec(name, None)):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(InputError, match=rf"is not installed; pip install 'fastpoem\[{extra}\]'"):
            fastpoem.fit(**settings(base, out=str(tmp_path / "run"), log_to=name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given, tensorboard, names", [
    ((), False, ()),
    ((), True, ("tensorboard",)),
    (("wandb,tensorboard",), True, ("wandb", "tensorboard")),
    (("Wandb, mlflow", "swanlab", "wandb", ""), False, ("wandb", "mlflow", "swanlab")),
])  # fmt: skip
def test_names(given, tensorboard, names):
    assert TrainConfig(log_to=given, tensorboard=tensorboard).check().trackers == names


@pytest.mark.parametrize("given, mend", [("wand", "did you mean wandb?"), ("tb", "did you mean tensorboard?"), ("neptune", "use tensorboard, wandb, swanlab, mlflow")])  # fmt: skip
def test_a_name_that_is_none(given, mend):
    with pytest.raises(InputError) as refusal:
        TrainConfig(log_to=("mlflow", given)).check()
    assert str(refusal.value) == f"--log-to {given}: no such program; {mend}"


def test_without_any_nothing_is_added(base, tmp_path):
    assert_tidy(fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=1)).folder)
