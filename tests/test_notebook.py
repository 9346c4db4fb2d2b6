"""What a notebook shows of a run and hands to its callbacks; and that training does not feel either."""

import json
import signal
import sys
import time
import types

import pytest

import fastpoem
from fastpoem.errors import InputError
from fastpoem.run import notebook
from fastpoem.run.console import Figures, Voice
from fastpoem.run.notebook import POINTS, SECONDS, Curve, Notebook, in_a_notebook, voice_of
from fastpoem.run.saving import Diverged
from tests.runs import assert_same, settings
from tests.test_report import Checked
from tests.test_resume import logits_of_nan

TEXT = "text/html"


class Kernel:
    """What IPython is to a cell that a kernel runs: `shown` are its outputs, each with all that it was drawn as."""

    def __init__(self):
        self.shown, self.broken = [], False

    def display(self, bundle, raw, display_id):
        assert raw and display_id is True
        self.shown.append([bundle])
        return types.SimpleNamespace(update=self.update)

    def update(self, bundle, raw):
        if self.broken:
            raise OSError("nobody listens")
        self.shown[-1].append(bundle)

    @property
    def last(self):
        return self.shown[-1][-1][TEXT]


@pytest.fixture
def kernel(monkeypatch):
    """This process is a notebook's."""
    found = Kernel()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=found)
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = found.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    monkeypatch.delitem(sys.modules, "spyder_kernels", raising=False)
    return found


def filled(lang="en", steps=100):
    """A display in the midst of training."""
    voice = Notebook(lang)
    voice.table([("data", "60 poems from <b>poems</b>")])
    voice.start(0, 2 * steps, steps, 2)
    for step in range(1, steps + 1):
        voice.figures = Figures(5 - step / steps, 0.2, 41_234.0, 0.42, 1300 << 20)
        voice.advance()
        row = {"step": step, "epoch": 1, "loss_mean": 5 - step / steps, "accuracy_mean": 0.2}
        voice.row({**row, "tokens_per_s": 41_234.0, "seconds": 65.0})
    epoch = {"event": "epoch", "step": steps, "epoch": 1, "mean_loss": 4.4, "mean_accuracy": 0.25}
    voice.row({**epoch, "val_loss": 4.75, "val_accuracy": 0.3})
    return voice


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of two epochs that nobody looked at."""
    return fastpoem.fit(**settings(base, out=str(tmp_path_factory.mktemp("whole") / "run"), epochs=2, quiet=True))


class TestTheDisplay:
    def test_one_output_that_is_drawn_anew_and_not_felt(self, kernel, base, tmp_path, whole, capfd):
        began, given = time.monotonic(), []
        hear = dict.fromkeys(("on_log", "on_epoch"), given.append)
        run = fastpoem.fit(**settings(base, out=str(tmp_path / "run"), epochs=2, lang="en"), **hear)
        took = time.monotonic() - began
        (drawn,) = kernel.shown
        assert len(drawn) <= took / SECONDS + 2 and capfd.readouterr() == ("", "")
        for bundle in drawn:
            Checked(bundle[TEXT])
        parts = [
            "step 28/28",
            "100%",
            "width:100.0%",
            "image/svg+xml",
            "60 poems from",
            "poems after step 28:",
            str(run.model),
        ]
        parts += [f"<td>{row['mean_loss']:.3f}</td>" for row in run.metrics if "event" in row]
        for part in parts:
            assert part in kernel.last, part
        assert "step 28/28" in drawn[-1]["text/plain"] and str(run.model) in drawn[-1]["text/plain"]
        assert given == run.metrics
        assert_same(run.folder, whole.folder)
        ours, others = (json.loads((one.folder / "config.json").read_text()) for one in (run, whole))
        assert ours["settings"].keys() == others["settings"].keys() and "on_log" not in str(ours)

    def test_quiet_is_quiet(self, kernel, base, tmp_path, capfd):
        fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=2, quiet=True))
        assert not kernel.shown and capfd.readouterr() == ("", "")

    def test_a_cell_that_is_stopped_leaves_the_last_state(self, kernel, base, tmp_path):
        stop = lambda row: signal.raise_signal(signal.SIGINT) if row["step"] == 5 else None
        common = settings(base, out=str(tmp_path / "run"), max_steps=8, lang="en")
        with pytest.raises(KeyboardInterrupt):
            fastpoem.fit(**common, on_log=stop)
        for part in ("step 5/8", "62%", "stopping after this step", "resume=True"):
            assert part in kernel.last
        before = len(kernel.shown[0])
        fastpoem.fit(**common, resume=True)
        assert len(kernel.shown) == 2 and len(kernel.shown[0]) == before  # its thread has ended
        assert "<td>1</td><td>2</td>" in kernel.last and "step 8/8" in kernel.last  # with what was before

    def test_a_frontend_that_is_gone_stops_nothing(self, kernel, base, tmp_path):
        kernel.broken = True
        assert fastpoem.fit(**settings(base, out=str(tmp_path / "run"), max_steps=2)).metrics[-1]["step"] == 2

    @pytest.mark.parametrize("lang, says", [
        ("en", ("epoch 2/2  step 100/200", "50%  left 42s", "loss 4.000", "41.2k tok/s", "<th>val. loss</th>")),
        ("zh", ("第 2/2 轮  第 100/200 步", "50%  剩余 42s", "损失 4.000", "41.2k token/秒", "<th>验证损失</th>", "数据")),
    ])  # fmt: skip
    def test_what_it_says(self, kernel, lang, says):
        voice = filled(lang)
        Checked(text := voice.html())
        assert "<svg" in text and "currentColor" in text
        for part in (*says, "<td>4.750</td>", "&lt;b&gt;poems", "<td>1m05</td>"):
            assert part in text, part
        with voice.phase("validating on {0:,} poems", 512) as at:
            at(128, 512)
            assert "512" in voice.html() and "128/512" in voice.html() and "41.2k tok/s" not in voice.html()
        voice.close()

    def test_it_is_bounded(self, kernel):
        voice = filled(steps=20_000)
        for number in range(2000):
            voice.say(f"line {number}")
        text = voice.html()
        assert len(text) < 60_000 and "line 1999" in text and "line 1" in text
        assert text.count("<tr>") + text.count("<tr class=epoch>") < notebook.KEPT + notebook.STEPS + notebook.EPOCHS
        voice.close()

    def test_before_anything_and_without_numbers(self, kernel):
        voice = Notebook("en")
        Checked(voice.html())
        voice.start(0, 10, 10, 1)
        voice.figures = Figures(float("nan"), float("nan"), 1.0, None, 0)
        voice.advance()
        row = {"step": 1, "epoch": 1, "loss_mean": float("nan"), "accuracy_mean": float("nan"), "tokens_per_s": 1.0}
        voice.row({**row, "skipped": 1})
        Checked(text := voice.html())
        assert "skipped 1" in text and "<svg" not in text
        voice.close()


def test_a_long_curve_keeps_its_shape():
    curve = Curve()
    for step in range(100_000):
        curve.add(step, float(step))
    assert POINTS <= len(curve.points) < 2 * POINTS
    assert all(x == pytest.approx(y) for x, y in curve.points) and curve.points == sorted(curve.points)
    assert curve.points[0][0] < 500 and curve.points[-1][0] > 99_000


def test_where_it_is_shown(kernel, monkeypatch):
    assert in_a_notebook() and type(voice_of(False, "auto")) is Notebook
    assert type(voice_of(True, "auto")) is Voice
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "spyder_kernels", types.ModuleType("spyder_kernels"))
        assert not in_a_notebook()
    for ipython in (types.SimpleNamespace(get_ipython=lambda: None), types.SimpleNamespace(), None):
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert not in_a_notebook() and type(voice_of(False, "auto")) is Voice


class TestCallbacks:
    def test_an_error_is_raised_after_a_checkpoint(self, kernel, base, tmp_path, whole):
        """In the midst of an epoch, at the end of one before and after it was summed up, and at the very end; then nothing is given twice."""
        given, out = [], tmp_path / "run"
        places = [(5, False), (14, False), (14, True), (28, True)]

        def hear(row):
            given.append(row)
            if places and (row["step"], "event" in row) == places[0]:
                raise ZeroDivisionError("mine")

        while places:
            step = places[0][0]
            changes = settings(base, epochs=2) if step == 5 else {"resume": True}
            with pytest.raises(ZeroDivisionError, match="mine") as error:
                fastpoem.fit(**changes | {"out": str(out), "lang": "en"}, on_log=hear, on_epoch=hear)
            assert error.value.__notes__ == [
                f"Step {step} is saved: fastpoem.fit(out={str(out)!r}, resume=True) goes on."
            ]
            assert f"step {step}/28" in kernel.last and not (out / "model").exists()
            places.pop(0)
        run = fastpoem.fit(out=str(out), resume=True, quiet=True, on_log=hear, on_epoch=hear)
        assert given == run.metrics
        assert_same(whole.folder, run.folder)

    def test_divergence_is_told_whatever_a_callback_makes_of_it(self, base, tmp_path, monkeypatch):
        given = []
        logits_of_nan(monkeypatch, set(range(3, 99)))

        def hear(row):
            given.append(row)
            return row["step"] == 7 and f"{row['loss']:.3f}"

        with pytest.raises(Diverged, match="step 7: "):
            fastpoem.fit(**settings(base, out=str(tmp_path / "run"), quiet=True), on_log=hear)
        assert [row["loss"] is None for row in given] == [False] * 2 + [True] * 5

    def test_what_is_given_is_a_copy(self, base, tmp_path):
        spoil = lambda row: row.clear()
        changes = settings(base, out=str(tmp_path / "run"), max_steps=2, quiet=True)
        run = fastpoem.fit(**changes, on_log=spoil, on_epoch=spoil)
        assert fastpoem.Run(run.folder).metrics == run.metrics and run.metrics[0]["step"] == 1

    def test_what_is_no_function_is_refused(self):
        with pytest.raises(InputError, match="on_log: is not a function"):
            fastpoem.fit("poems.txt", on_log="print")
        with pytest.raises(TypeError):
            fastpoem.fit("poems.txt", print)
