"""`fastpoem demo`: the page as a visitor's browser calls it, served by the command in a process of its own."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest

import fastpoem
from fastpoem.demo import DemoConfig, main
from fastpoem.errors import InputError
from fastpoem.poetry.forms import form_of, lines_of

ROOT = Path(fastpoem.__file__).parents[1]
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",  # some pairs of Gradio and Starlette warn
    "HTTP_PROXY": "http://127.0.0.1:9", "GRADIO_SERVER_NAME": "0.0.0.0",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
}  # fmt: skip  # a proxy that answers nobody, and a wish to be heard everywhere, which the command does not grant
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIKELY = dict(prompt="", form="", acrostic="", rhyme="", count=1, temperature=1.0, top_k=50, top_p=1.0)


class Served(NamedTuple):
    process: subprocess.Popen
    address: str
    said: str
    errors: Path

    def visitor(self):
        from gradio_client import Client

        return Client(self.address, verbose=False, analytics_enabled=False, download_files=False)

    def write(self, **changes):
        """(the poems, the notes) in the end."""
        return self.visitor().predict(**LIKELY | changes, api_name="/write")


@contextlib.contextmanager
def served(errors: Path, *arguments: object):
    pytest.importorskip("gradio")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "fastpoem", "demo", *map(str, arguments), "--no-browser", "--port", str(port)]
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            said = process.stdout.readline()
            found = re.search(r"http://[\d.]+:\d+/", said)
            assert found, errors.read_text()
            yield Served(process, found[0], said, errors)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def page(tmp_path_factory, small_model):
    with served(tmp_path_factory.mktemp("demo") / "errors", small_model, "--lang", "en") as one:
        yield one


def test_poems_in_a_form_grow_on_the_page(page):
    job = page.visitor().submit(
        **LIKELY | dict(form="七绝", acrostic="春夏秋冬", rhyme="平水韵", count=2), api_name="/write"
    )
    poems, note = job.result()
    both = poems.split("\n\n")
    assert note == "" and len(both) == 2
    for poem in both:
        assert form_of(poem) == "七绝" and [line[0] for line in poem.split("\n")] == [*"春夏秋冬"]
    states = [state for state, _ in job.outputs()]
    assert len(states) > 10 and {len(state.split("\n\n")) for state in states} == {1, 2}
    assert all(len(before) <= len(after) for before, after in itertools.pairwise(states))


def test_what_cannot_be_written_is_said_as_generate_says_it(page):
    for changes, says in (
        (dict(form="五绝", prompt="春眠不觉晓处处"), "--prompt '春眠不觉晓处处': cannot begin a 五绝: ， is due where it has 处; change it"),
        (dict(acrostic="春夏秋冬"), "--acrostic '春夏秋冬': needs a form; add --form 七绝 or another"),
        (dict(form="五绝", prompt="<b>"), "--prompt '<b>': cannot begin a 五绝: < is no Chinese character that the model knows; change it"),
        (dict(prompt="春😀"), "the vocabulary lacks 😀, which the model reads as [UNK]"),
    ):  # fmt: skip
        _, note = page.write(**changes)
        assert note.count("<p ") == 1 and says in note.replace("&#x27;", "'").replace("&lt;", "<").replace("&gt;", ">")
        assert "<b>" not in note
    assert page.errors.read_text() == ""


def test_visitors_wait_for_each_other(page):
    acrostics = ["春夏秋冬", "梅兰竹菊", "东南西北"]
    acrostics = [one for one in acrostics if not page.write(form="五绝", acrostic=one)[1]]  # what the vocabulary has
    jobs = [page.visitor().submit(**LIKELY | dict(form="五绝", acrostic=one), api_name="/write") for one in acrostics]
    heads = ["".join(line[0] for line in lines_of(job.result()[0])) for job in jobs]
    assert heads == acrostics and len(heads) > 1


def test_nobody_else_is_asked_and_nobody_else_hears(page):
    host, port = re.fullmatch(r"http://([\d.]+):(\d+)/", page.address).groups()
    assert host == "127.0.0.1"
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", int(port)), timeout=5):
        pass
    fetched = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(page.address).read().decode()
    loaded = re.findall(r"""(?:src|href)=["']?((?:https?:)?//[^"'>\s]*)""", fetched)
    assert not [one for one in loaded if not one.startswith(page.address)]
    config = page.visitor().config
    assert not [one for one in config["stylesheets"] if "//" in one] and not config["analytics_enabled"]


def test_a_run_in_chinese_and_ctrl_c_while_it_writes(tmp_path, small_model):
    shutil.copytree(small_model, tmp_path / "run" / "model")
    (tmp_path / "run" / "metrics.jsonl").touch()
    with served(tmp_path / "errors", tmp_path / "run", "--lang", "zh") as one:
        assert one.said.startswith("网页在 http://127.0.0.1:")
        visitor = one.visitor()
        assert "藏头" in str(visitor.config["components"])
        job = visitor.submit(**LIKELY | dict(form="七律", count=8), api_name="/write")
        next(iter(job))
        one.process.send_signal(signal.SIGINT)
        assert one.process.wait() == 130
        model = tmp_path / "run" / "model"
        assert one.errors.read_text() == f"fastpoem: the model is {model}\nfastpoem: stopped by SIGINT\n"


def test_without_gradio(tmp_path):
    script = "import sys; sys.modules['gradio'] = None; from fastpoem.__main__ import main; main(['demo', 'run'])"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastpoem: demo: gradio is not installed; pip install 'fastpoem[demo]'\n"


@pytest.mark.parametrize("argv, says", [
    ([], "--model: must be given"), (["a", "b"], "b: a value without a flag"), (["a", "--model", "b"], "b: a value without a flag"),
    (["a", "--port", "70000"], "--port 70000: out of range; use 1 to 65535"), (["a", "--prot", "1"], "did you mean --port?"),
])  # fmt: skip
def test_what_is_not_understood(argv, says):
    with pytest.raises(InputError) as refusal:
        main(argv)
    assert says in str(refusal.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.startswith("usage: python -m fastpoem.demo ") and "--no-browser" in said


def test_a_model_that_cannot_write_is_refused_before_the_page_opens(tmp_path):
    pytest.importorskip("gradio")
    with pytest.raises(InputError, match="no model folder"):
        main([str(tmp_path)])


def test_a_port_that_is_taken():
    gradio = pytest.importorskip("gradio")
    from fastpoem.demo import _open

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        with (
            gradio.Blocks() as blocks,
            pytest.raises(InputError, match=f"--port {port}: is in use or not permitted; give another"),
        ):
            _open(blocks, DemoConfig("model", port=port, browser=False))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_without_network_shows_the_page(page, tmp_path):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--virtual-time-budget=60000", "--dump-dom", page.address], capture_output=True, text=True
    )
    assert all(label in done.stdout for label in ("How the poem begins", "Acrostic", "Number of poems", "Write"))
