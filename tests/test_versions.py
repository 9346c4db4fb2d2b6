"""What pyproject.toml claims and what is tried are one: its lower bounds, both ends of the pretend GPU, and the set that `make test` takes."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
LOWEST = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in ASKED)
ENDS = ROOT / "tests" / "pretend_gpu"


def pinned(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def number(version: str) -> tuple[int, ...]:
    """2.11 and 2.11.0 are one."""
    parts = [int(part) for part in version.split(".")]
    return (*parts, *[0] * (3 - len(parts)))


def test_the_oldest_set_is_every_lower_bound():
    oldest = pinned(ROOT / "constraints-oldest.txt")
    without = {"ruff", "mypy"}  # which do not run in that suite
    assert {name: number(version) for name, version in oldest.items()} == {
        name: number(version) for name, version in LOWEST.items() if name not in without
    }


def test_the_pretend_gpu_runs_at_both_ends():
    oldest, newest = (pinned(ENDS / f"constraints-{end}.txt") for end in ("oldest", "newest"))
    tested = pinned(ROOT / "constraints.txt")
    for name in ("torch", "triton"):
        assert number(oldest[name]) == number(LOWEST[name]) < number(tested[name]) <= number(newest[name])
    rest = {name: version for name, version in newest.items() if name not in ("torch", "triton", "setuptools")}
    assert rest.items() <= oldest.items()


def test_what_is_pinned_is_allowed():
    for path in (ROOT / "constraints.txt", *ENDS.glob("constraints-*.txt")):
        for name, version in pinned(path).items():
            assert number(version) >= number(LOWEST.get(name, "0")), f"{path.name}: {name}"
