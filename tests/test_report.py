"""The report: whole in itself, for one run and several, whatever is missing of them."""

import fcntl
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

import fastpoem
from fastpoem.cli import alone, parse
from fastpoem.errors import InputError
from fastpoem.model.hub import BUNDLED
from fastpoem.report import ReportConfig, main
from fastpoem.reporting.charts import Point, charts, smoothed, thinned, ticks, written
from fastpoem.reporting.told import names, told
from fastpoem.reporting.words import CHINESE
from tests.runs import settings, tiny_data, tiny_model

SECTIONS = ("overview", "curves", "lengths", "poems", "settings")
CURVES = (
    "loss", "accuracy", "validation-loss", "validation-accuracy", "learning-rate", "gradient-norm", "throughput",
)  # fmt: skip
VOID = {"meta", "input", "br", "img"}


class Checked(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order, and no id is there twice."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open and len(self.ids) == len({*self.ids})

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(path):
    """The page's text, once it has been found to be whole and to load nothing."""
    text = path.read_text(encoding="utf-8")
    page = Checked(text)
    assert {*SECTIONS} <= {*page.ids}
    assert {*re.findall(r"https?://[^\"'<> ]*", text)} <= {"http://www.w3.org/2000/svg"}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset", "data", "xlink:href"} & attrs.keys()]
    assert not re.search(r"@import|url\((?!#)", text)
    assert "None" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL).replace("None:", "")
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two finished runs."""
    base = tmp_path_factory.mktemp("report")
    tiny_model(base / "model", BUNDLED / "model")
    tiny_data(base / "poems.txt", BUNDLED / "poems.txt")
    for name, changes in {"one": dict(), "two": dict(lr=3e-3, seed=1, batching="pad")}.items():
        fastpoem.fit(**settings(base, out=str(base / name), val_poems=3, **changes))
    rows = [
        dict(step=step, epoch=step / 14, prompt=prompt, poem=f"{prompt}风{step}")
        for step in (14, 28, 42)
        for prompt in ("<春>", "")
    ]
    (base / "two" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run, to be damaged."""
    return shutil.copytree(trained / "one", tmp_path / "run")


def test_one_run(trained, tmp_path, capsys):
    assert main([str(trained / "one"), "--out", str(tmp_path / "new" / "page.html"), "--lang", "en"]) == 0
    text = checked(tmp_path / "new" / "page.html")
    said = capsys.readouterr().out.splitlines()
    assert said == [str(tmp_path / "new" / "page.html"), *(str(tmp_path / "new" / f"page-{key}.png") for key in CURVES)]
    for path in said[1:]:
        with open(path, "rb") as stream:
            assert stream.read(24)[16:24] == (1400).to_bytes(4) + (780).to_bytes(4)
    assert all(f'<figure id="{key}">' in text for key in CURVES)
    rows = [json.loads(line) for line in (trained / "one" / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if "event" in row]
    for number in (f"{epochs[-1]['mean_loss']:.3f}", f"{min(row['val_loss'] for row in epochs):.3f}"):
        assert f"<b>{number}</b>" in text
    assert "42 of 42 steps" in text and "finished" in text and "<code>lr</code>" in text
    poem = json.loads((trained / "one" / "samples.jsonl").read_text(encoding="utf-8").splitlines()[-1])["poem"]
    assert poem[2:] in text  # what it began with stands in a mark of its own


def test_several_runs_beside_one_another(trained, tmp_path):
    main([str(trained / "one"), str(trained / "two"), f"--out={tmp_path}", "--no-png", "--lang", "en"])
    text = checked(tmp_path / "report.html")
    differs = text[text.index("What differs") : text.index("What is not the default")]
    assert re.findall(r"<code>(.*?)</code>", differs) == ["batching", "lr", "seed", "batching (used)"]
    assert text.count('<button class="chip') == 2
    assert {int(number) for number in re.findall(r'<g class="r(\d)', text)} == {0, 1}
    shown = [text.index(f"<b>&lt;春&gt;</b>风{step}") for step in (14, 28, 42)]
    assert shown == sorted(shown) and "<春>" not in text
    assert not [*tmp_path.glob("*.png")]


@pytest.mark.parametrize("args", [
    ["a", "b", "--out", "x", "--no-png"],
    ["--out", "x", "a", "b", "--no-png"],
    ["--out=x", "a", "--no-png", "b"],
    ["--no-png", "--runs", "a", "b", "--out", "x"],
], ids=" ".join)  # fmt: skip
def test_runs_stand_anywhere(args):
    assert parse(ReportConfig, alone(ReportConfig, "runs", args)) == ReportConfig(("a", "b"), "x", png=False)


def test_in_chinese(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    main([str(trained / "two"), "--out", str(tmp_path / "page.html"), "--no-png"])
    text = checked(tmp_path / "page.html")
    assert '<html lang="zh-CN">' in text and "训练报告" in text and "验证损失" in text
    bare = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL)
    left = [word for word in CHINESE if " " in word and word in bare]
    assert not left


def tear(run):
    with (run / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 40, "ep')


def garble(run):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[20] = b"\x00\xff\n"
    (run / "metrics.jsonl").write_bytes(b"".join(lines))


def not_finite(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[3:9]:
        row |= {"loss": None, "loss_mean": None, "grad_norm": None, "skipped": 1, "spike_step": 5, "in_form": 0.25}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def without_epochs(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:6]))
    shutil.rmtree(run / "model")


def edit(**changes):
    def change(run):
        content = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(content | changes))

    return change


@pytest.mark.parametrize("damage, says", [
    (tear, "finished"),
    (garble, "line 21 of metrics.jsonl is damaged"),
    (not_finite, "6 steps were skipped"),
    (without_epochs, "stopped"),
    (lambda run: (run / "metrics.jsonl").write_bytes(b""), "Nothing is logged yet"),
    (lambda run: (run / "config.json").unlink(), "config.json is missing or damaged"),
    (lambda run: (run / "config.json").write_text("[1]"), "finished"),
    (lambda run: (run / "config.json").write_text("{"), "config.json is missing or damaged"),
    (edit(settings={"epochs": "many", "data": {}}, model=[1], store={"path": 3}), "Overview"),
    (edit(store={"path": "elsewhere", "identity": "x"}), "its token store is gone"),
    (lambda run: (run / "samples.jsonl").write_text('{"step": 1}\n{"step": 2, "prompt": "", "poem": "月"}\n{"st'), "月"),
], ids=lambda one: getattr(one, "__name__", None))  # fmt: skip
def test_broken_runs(trained, run, tmp_path, damage, says):
    damage(run)
    main([str(run), "--out", str(tmp_path / "page.html"), "--lang", "en", "--no-png"])
    assert says in checked(tmp_path / "page.html")
    main([str(trained / "one"), str(run), "--out", str(tmp_path / "both.html"), "--lang", "en", "--no-png"])
    checked(tmp_path / "both.html")
    assert "Run(" in repr(opened := fastpoem.Run(run)) and Checked(opened._repr_html_())


def test_a_run_that_trains_is_told_as_such_and_left_alone(run, tmp_path):
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        main([str(run), "--out", str(tmp_path / "page.html"), "--no-png", "--lang", "en"])
        assert "is training" in checked(tmp_path / "page.html")
    main([str(run), "--no-png", "--lang", "en"])
    assert "is training" not in checked(run / "report" / "report.html")
    fastpoem.fit(out=str(run), resume=True)  # a report in its folder is in nobody's way


@pytest.mark.parametrize("args, says", [
    ([], "RUN: must be given"),
    (["nowhere"], "nowhere: no such folder"),
    (["{base}"], "holds no run"),
    (["{base}/one", "{base}/../{name}/one"], "is given twice"),
    (["{base}/one", "--out", "{base}/poems.html"], "is no report, and would be written over"),
    (["{base}/one", "--out", "{base}/poems.txt"], "poems.txt: the page is HTML; let it end in .html, or in a slash if poems.txt is to be a folder"),
    (["{base}/one", "--out", "{base}/curves.PNG"], "the page is HTML"),
    (["{base}/one", "--out", ""], "is empty"),
    (["{base}/one", "--outt", "x"], "no such flag; did you mean --out?"),
    (["{base}/one", "--lang", "fr"], "no such choice"),
], ids=str)  # fmt: skip
def test_what_is_refused(trained, args, says):
    (trained / "poems.html").write_text("<p>mine</p>")
    before = sorted(trained.rglob("*"))
    with pytest.raises(InputError) as refusal:
        main([arg.format(base=trained, name=trained.name) for arg in args])
    assert says in str(refusal.value)
    assert sorted(trained.rglob("*")) == before and (trained / "poems.html").read_text() == "<p>mine</p>"


@pytest.mark.parametrize("out", ["x.txt/", "v1.2", "there.txt"])
def test_a_folder_may_be_called_what_it_likes(trained, tmp_path, out):
    (tmp_path / "there.txt").mkdir()
    assert main([str(trained / "one"), "--out", f"{tmp_path}/{out}", "--no-png"]) == 0
    assert (tmp_path / out / "report.html").is_file()


def test_without_matplotlib(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(trained / "one"), "--out", str(tmp_path)]) == 0
    assert "pip install 'fastpoem[plots]'" in capsys.readouterr().err
    checked(tmp_path / "report.html")
    with pytest.raises(InputError, match="matplotlib is not installed"):
        fastpoem.Run(trained / "one").plot()


def test_needs_no_torch(trained, tmp_path):
    call = f"main([{str(trained / 'one')!r}, '--out', {str(tmp_path)!r}, '--no-png'])"
    code = f"import sys; from fastpoem.report import main; {call}; assert not {{'torch', 'pandas'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


class TestInANotebook:
    def test_the_last_line_of_a_cell(self, trained):
        found = fastpoem.Run(trained / "one")
        text = found._repr_html_()
        Checked(text)
        assert len(text) < 10_000 and "image/svg+xml" in text and f"{found.metrics[-1]['mean_loss']:.3f}" in text

    def test_plot(self, trained, run):
        figure = fastpoem.Run(trained / "one").plot(fastpoem.Run(trained / "two"))
        assert len(figure.axes[0].lines) == 4  # as logged and smoothed
        assert len([place for place in figure.axes if place.get_visible()]) == len(CURVES)
        without_epochs(run)
        not_finite(run)
        assert fastpoem.Run(run).plot()._repr_png_().startswith(b"\x89PNG")

    def test_frame(self, trained):
        pytest.importorskip("pandas")
        found = fastpoem.Run(trained / "one")
        assert isinstance(found.metrics, list)
        frame = found.frame()
        assert [*frame.index] == [row["step"] for row in found.metrics if "event" not in row]
        assert [*frame["loss"]] == [row["loss"] for row in found.metrics if "event" not in row]
        assert [*found.frame("epoch")["val_loss"]] == [row["val_loss"] for row in found.metrics if "event" in row]
        assert len(found.frame("nothing")) == 0

    def test_frame_without_pandas(self, trained, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(InputError, match=r"fastpoem\[frame\]"):
            fastpoem.Run(trained / "one").frame()


finite = st.floats(-1e6, 1e6)


@effort(max_examples=40)
@given(st.lists(finite, min_size=1, max_size=2000))
def test_lines_keep_what_they_say(values):
    points = [Point(index, None, None, value) for index, value in enumerate(values)]
    some = thinned(points, 100)
    assert len(some) <= 100 and some == sorted(some) and {*some} <= {*points}
    assert {some[0], some[-1]} == {points[0], points[-1]}
    assert {min(values), max(values)} == {min(p.value for p in some), max(p.value for p in some)}
    smooth = [point.value for point in smoothed(points)]
    room = 1e-6 * max(map(abs, values))
    assert len(smooth) == len(values) and min(values) - room <= min(smooth) <= max(smooth) <= max(values) + room


@effort(max_examples=60)
@given(finite, st.floats(1e-6, 1e6))
def test_ticks(low, size):
    found = ticks(low, low + size)
    room = 1e-6 * max(abs(low), size)
    assert len(found) <= 8 and all(low - room <= tick <= low + size + room for tick in found)
    assert size <= 1e-9 * abs(low) or len(found) >= 2
    logs = ticks(size, 7 * size, log=True)
    assert 1 <= len(logs) <= 20 and logs == sorted({*logs}) and all(size <= tick <= 7 * size for tick in logs)


@pytest.mark.parametrize("value, says", [
    (0, "0"), (2e-5, "2e-5"), (1.25e-4, "1.25e-4"), (0.0015, "0.0015"), (3.14159, "3.14"), (12500, "12,500"), (1.25e6, "1.25M"),
])  # fmt: skip
def test_numbers(value, says):
    assert written(value) == says


@pytest.mark.parametrize("rows, most, an_epoch", [
    ([(1, 1), (10, 1), (11, 2)], None, 10),
    ([(1, 1), (10, 1)], None, None),
    ([(1, 1), (10, 1), (10, 1, "epoch")], None, 10),
    ([(1, 1), (7, 1), (7, 1, "epoch")], 7, None),
    ([], None, None),
])  # fmt: skip
def test_how_long_an_epoch_is(tmp_path, rows, most, an_epoch):
    found = [dict(step=step, epoch=epoch, **({"event": event[0]} if event else {})) for step, epoch, *event in rows]
    run = told(tmp_path, "run", found)
    run.config = {"settings": {"max_steps": most, "epochs": 3}}
    assert run.steps_an_epoch == an_epoch
    assert run.planned == (3 * an_epoch if an_epoch else most)


def test_a_column_that_others_add_is_drawn(tmp_path):
    rows = [dict(event="epoch", step=step, epoch=step, mean_loss=1.0, in_form=step / 4) for step in (1, 2, 3)]
    found = {chart.key: chart for chart in charts([told(tmp_path, "run", rows)])}
    assert found["in-form"].percent and [point.value for point in found["in-form"].lines[0].points] == [0.25, 0.5, 0.75]


def test_names_tell_runs_apart(tmp_path):
    assert names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert names([tmp_path / "a" / "x"]) == ["x"]
    assert math.isfinite(len(names([])))
