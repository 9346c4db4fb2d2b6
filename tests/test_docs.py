"""What README and docs/ say holds: links lead somewhere, both languages say the same, the settings are the code's, and the commands run."""

import importlib
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

import fastpoem
from tests.runs import tiny_data

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAIRS = [(path, path.with_name(path.name.replace(".md", ".zh-CN.md"))) for path in PAGES if ".zh-CN" not in path.name]
HUB_MODEL = "uer/gpt2-distil-chinese-cluecorpussmall"
NOT_RUN = ("pip install", "make ", ". .venv", "torchrun")  # by this file: continuous integration installs and makes


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language, in order."""
    return [code for name, code in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text(path)) if name == language]


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"(?m)^#+ (.*)", text(path))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head).lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = unquote(target).partition("#")
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}"


def test_readme_is_short():
    assert len(text(READMES[0]).split()) <= 900
    assert max(map(len, text(READMES[0]).splitlines()[:25])) < 300


@pytest.mark.parametrize("english, chinese", [pair for pair in PAIRS if pair[1].exists()], ids=lambda path: path.name)
def test_both_languages_say_the_same(english, chinese):
    """The same headings, rows of tables, commands and pictures."""
    bare = lambda path: [re.sub(r"\s*#.*|文件|FILE", "", block) for block in [*blocks(path), *blocks(path, "python")]]
    assert bare(english) == bare(chinese)
    for pattern in (r"(?m)^(#+) ", r"!\[[^]]*\]\(([^)]*)\)", r"(?m)^\|"):
        assert re.findall(pattern, text(english)) == re.findall(pattern, text(chinese)), pattern
    assert english.name in text(chinese) and chinese.name in text(english)


def test_a_page_of_the_users_half_is_there_in_chinese():
    pages = ("usage", "coming-from", "gpu", "faults", "exactness", "speed", "how-it-works", "neighbours", "devices")
    for name in ("README", *(f"docs/{page}" for page in pages)):
        assert (ROOT / f"{name}.zh-CN.md").is_file(), name


def test_chinese_paragraphs_are_not_wrapped():
    for page in PAGES:
        if ".zh-CN" in page.name:
            assert not re.search(r"(?m)^[\u4e00-\u9fff][^|#\n]*[\u4e00-\u9fff，、]\n[\u4e00-\u9fff]", text(page)), (
                page.name
            )


def test_the_settings_are_the_codes():
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert text(ROOT / "docs" / "settings.md") == module.page(), "run python docs/settings.py"


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, verses, small_model):
    folder = tmp_path_factory.mktemp("docs")
    data = tiny_data(folder / "poems.txt", verses)
    fastpoem.fit(data, model=str(small_model), max_steps=2, val_poems=4, out=str(folder / "run"), device="cpu")
    return folder


@pytest.fixture
def place(tmp_path, trained, small_model, monkeypatch):
    """A folder with poems.txt and a run, runs/x, in which the hub's model is a small one."""
    shutil.copy(trained / "poems.txt", tmp_path)
    shutil.copytree(trained / "run", tmp_path / "runs" / "x")
    (tmp_path / "run.toml").write_text("lr = 1e-4\nbatch-size = 8\n")
    monkeypatch.chdir(tmp_path)
    return small_model


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page) and page.name != "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_the_commands_run(page, place, capsys):
    """One after another, as they stand; a GPU's on the CPU, and with a small model where the default would be fetched."""
    for command in commands(page):
        words = shlex.split(re.sub(r"--device \S+", "--device cpu", command).replace("--model M", f"--model {place}"))
        name = words[1] if words[0] == "fastpoem" else words[2].removeprefix("fastpoem.")
        arguments = words[2:] if words[0] == "fastpoem" else words[3:]
        if not words[0].startswith(("fastpoem", "python")) or (words[0] == "python" and "fastpoem." not in command):
            continue
        if name == "train" and "--model" not in words and "--resume" not in words:
            arguments += ["--model", str(place), "--max-steps", "2", "--val-poems", "4"]
        if name in ("doctor", "demo"):
            continue  # the one takes a minute, the other serves until it is ended; tests of their own run them
        module = importlib.import_module(f"fastpoem.{name}")
        assert module.main(arguments) == 0, command
    capsys.readouterr()


@pytest.mark.parametrize("page", READMES, ids=lambda page: page.name)
def test_the_python_runs(page, place, trained):
    shutil.copytree(trained / "run", Path("runs/poems"))
    names: dict = {}
    for block in blocks(page, "python"):
        code = block.replace(f'"{HUB_MODEL}"', f"{str(place)!r}, max_steps=2, device='cpu'")
        exec(compile(code, page.name, "exec"), names)
