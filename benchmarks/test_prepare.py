"""Preparing a corpus against the library's fast tokenizer, in turn on the same poems.

The library's time is that of `Tokenizer.encode_batch` alone, on lines already read, with all its threads; ours is given
both for the same work (`encode`) and for the whole way from a text file to a store flushed to disk (`prepare`).
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.scene import Scene
from fastpoem.corpus.read import read_blocks
from fastpoem.corpus.store import prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer

ROOT = Path(__file__).parents[1]
ROUNDS = 5
SAMPLE = 10  # the library tokenizes every tenth poem: its time per poem does not depend on how many there are


@pytest.fixture(scope="module")
def poems(scene: Scene) -> list[list[str]]:
    return [block.lines for block in read_blocks(scene.data)]


@pytest.fixture(scope="module")
def plain(poems: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "poems.txt"
    path.write_text("".join(f"{line}\n" for lines in poems for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("table", ["cold", "warm"])
def test_encode_against_the_library(benchmark: Any, scene: Scene, poems: list[list[str]], table: str) -> None:
    """Ids of all poems, each round paired with one of the library; the table empty each time, or filled before."""
    total = sum(map(len, poems))
    sample = [line for lines in poems for line in lines[::SAMPLE]]
    library = PoemTokenizer.load(scene.tokenizer).library
    library.enable_truncation(512)
    tokenizers = [PoemTokenizer.load(scene.tokenizer)]
    theirs, ours = [], []

    def library_round() -> None:
        begin = time.perf_counter()
        library.encode_batch(sample)
        theirs.append((time.perf_counter() - begin) / len(sample))
        if table == "cold":
            tokenizers[0] = PoemTokenizer.load(scene.tokenizer)

    def encode() -> None:
        begin = time.perf_counter()
        for lines in poems:
            tokenizers[0].encode(lines, 512)
        ours.append((time.perf_counter() - begin) / total)

    encode()
    ours.clear()
    benchmark.pedantic(encode, setup=library_round, rounds=ROUNDS)
    ratio = statistics.median(np.array(theirs) / np.array(ours))
    benchmark.extra_info.update(
        kind="encode",
        corpus=scene.poems,
        table=table,
        poems=total,
        ours_us_per_poem=1e6 * statistics.median(ours),
        library_us_per_poem=1e6 * statistics.median(theirs),
        times_the_library=ratio,
    )
    if table == "warm":
        assert ratio >= 30


def test_prepare_whole(benchmark: Any, scene: Scene, plain: Path, poems: list[list[str]], tmp_path: Path) -> None:
    """From a text file to a store on disk."""
    tokenizer = PoemTokenizer.load(scene.tokenizer)
    store = benchmark.pedantic(
        lambda: prepare_store(plain, tokenizer, tmp_path / "store"), rounds=ROUNDS, warmup_rounds=1
    )
    benchmark.extra_info.update(kind="stage", stage="prepare", corpus=scene.poems, poems=store.rows)
    assert store.rows == sum(map(len, poems))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_prepare_memory(benchmark: Any, scene: Scene, plain: Path, tmp_path: Path) -> None:
    """Peak memory at one corpus and at twelve."""
    code = (  # VmHWM, not getrusage: that one remembers the process which started this one
        "import sys; from pathlib import Path; from fastpoem.corpus.store import prepare_store;"
        "from fastpoem.corpus.tokenize import PoemTokenizer;"
        "prepare_store(Path(sys.argv[1]), PoemTokenizer.load(Path(sys.argv[2])), Path(sys.argv[3]));"
        "print(*[row.split()[1] for row in open('/proc/self/status') if 'VmHWM' in row])"
    )
    twelve = tmp_path / "twelve.txt"
    with open(twelve, "wb") as file:
        for _ in range(12):
            file.write(plain.read_bytes())

    def peak(source: Path) -> float:
        command = [sys.executable, "-c", code, source, scene.tokenizer, tmp_path / "store"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(run.stdout) * 1024 / 1e6  # MB

    one = peak(plain)
    much = benchmark.pedantic(lambda: peak(twelve), rounds=1)
    benchmark.extra_info.update(kind="memory", corpus=scene.poems, peak_mb_one=one, peak_mb_twelve=much)
    assert much - one <= 100
