"""Build the pretend GPU, run a command under it, and read its launch log. README.md beside this file says what it can and cannot see.

    python tests/pretend_gpu/pretend.py run CMD ARGS…
    python tests/pretend_gpu/pretend.py test [PYTEST OPTIONS…]

The library is preloaded into an unmodified CUDA build of PyTorch. Needs nothing but that build, gcc and nm; imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "fakecuda"
PACKAGES = Path(sysconfig.get_paths()["purelib"])
NVIDIA = PACKAGES / "triton/backends/nvidia"
LIBRARIES = ("libtorch_cuda", "libc10_cuda", "libtorch_python", "libcaffe2_nvrtc", "libtorch_cuda_linalg")
CUDA_NAME = r"(?:__cuda|cuda|cublas|nccl|cu[A-Z])\w*"


# ---- building


def missing() -> str | None:
    """What the pretend GPU cannot be built without, in a line, or None."""
    tools = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if tools:
        return f"the pretend GPU needs {' and '.join(tools)}: install the C compiler and binutils (Debian: apt-get install gcc binutils)"
    if not (PACKAGES / "torch/lib/libtorch_cuda.so").exists():
        return f"the pretend GPU needs a CUDA build of PyTorch in {sys.prefix}: make test-pretend-gpu installs one"
    return None


def library() -> Path:
    """The preloaded library, built once for these sources and this PyTorch and kept in the environment's folder."""
    sources = sorted(SOURCES.iterdir())
    version = (PACKAGES / "torch/version.py").read_bytes()
    key = hashlib.sha256(
        b"".join([version, Path(__file__).read_bytes(), *(file.read_bytes() for file in sources)])
    ).hexdigest()[:16]
    goal = Path(sys.prefix) / "pretend-gpu" / key / "libcuda.so.1"
    if not goal.exists():
        goal.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=goal.parent) as folder:
            made = Path(folder) / goal.name
            _build([file for file in sources if file.suffix == ".c"], made)
            made.rename(goal)
    return goal


def _build(sources: list[Path], goal: Path) -> None:
    """Compile `sources` and a stub, which does nothing and says so once, for every other CUDA function that PyTorch or Triton asks for."""
    wanted = set(re.findall(r"\b(cu[A-Z][A-Za-z0-9]+)(?=\()", (NVIDIA / "driver.c").read_text()))
    for name in LIBRARIES:
        command = ["nm", "-D", "--undefined-only", str(PACKAGES / f"torch/lib/{name}.so")]
        wanted |= set(re.findall(rf" U ({CUDA_NAME})", subprocess.run(command, capture_output=True, text=True).stdout))
    have = set(re.findall(rf"\b({CUDA_NAME})\(", "".join(file.read_text() for file in sources)))
    rest = sorted(name for name in wanted - have if not name.startswith("cuFile"))
    stubs = goal.parent / "stubs.c"
    stub = (
        'int {0}(void) {{ static int said; if (!said) {{ said = 1; fakecuda_unmodelled("{0}"); }} return 0; }}\n'.format
    )
    stubs.write_text("void fakecuda_unmodelled(const char*);\n" + "".join(map(stub, rest)))
    common = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-D__CUDA_FP16_H__", "-D__CUDA_BF16_H__"]
    headers = [f"-I{PACKAGES / 'nvidia/cu13/include'}", "-idirafter", str(NVIDIA / "include")]
    files = [str(file) for file in [*sources, stubs]]
    subprocess.run([*common, *headers, "-Wl,-soname,libcuda.so.1", *files, "-o", str(goal)], check=True)


def environment(
    cache: Path, *, sm: int = 90, devices: int = 1, memory: int = 80, log: Path | None = None
) -> dict[str, str]:
    """Variables of a process under the pretend GPU.

    cache: where Inductor and Triton keep what they compile, shared by all that run under one `sm` (90 or 80). memory: GiB a card.
    log: the file to which the launch log is appended when the process ends.
    """
    built = library()
    return {
        "LD_PRELOAD": str(built),
        "TRITON_LIBCUDA_PATH": str(built.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / f"sm_{sm}"),
        "TRITON_CACHE_DIR": str(cache / f"sm_{sm}" / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its worker processes take longer to start than these kernels to compile
        "FAKECUDA_SM": str(sm),
        "FAKECUDA_DEVICES": str(devices),
        "FAKECUDA_MEMORY": str(memory),
        "FAKECUDA_LOG": str(log or ""),
        "FASTPOEM_ASSUME_CHECKED": "1",
        "OMP_NUM_THREADS": "1",
    }


# ---- the launch log


class Entry(NamedTuple):
    """A line of the log: its letter, its words, and what it says as name=value."""

    letter: str
    words: tuple[str, ...]
    values: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return " ".join([self.letter, *self.words, *(f"{name}={value}" for name, value in self.values.items())])


class Copy(NamedTuple):
    """way: H2D, D2H, D2D or H2H. pageable: the host's side is not pinned, so the host waits (D2H) or the data is staged (H2D)."""

    way: str
    pageable: bool
    bytes: int
    stream: int


class Captured(NamedTuple):
    """One capture, from its begin to its end: what was refused in it ends it as failed."""

    nodes: int
    failed: bool
    operations: tuple[Entry, ...]


@dataclass(frozen=True)
class Log:
    """What happened on the pretend GPU, in order. Operations that were captured are not in it as done: `captures` has them."""

    entries: tuple[Entry, ...]

    @cached_property
    def done(self) -> list[Entry]:
        """What a real card would have been given to do now: kernels, products, copies, fills, graph launches, collectives."""
        return [entry for entry in self.entries if entry.letter in WORK and entry.values.get("capture") == "0"]

    @cached_property
    def launches(self) -> list[Entry]:
        """Kernels, `words` (triton or aten, name)."""
        return [entry for entry in self.done if entry.letter == "L"]

    @cached_property
    def products(self) -> list[Entry]:
        return [entry for entry in self.done if entry.letter == "G"]

    @cached_property
    def graph_launches(self) -> list[Entry]:
        return [entry for entry in self.done if entry.letter == "GL"]

    @cached_property
    def collectives(self) -> list[Entry]:
        """What NCCL was given to do, `words` (function, bytes)."""
        return [entry for entry in self.done if entry.letter == "N"]

    @cached_property
    def copies(self) -> list[Copy]:
        return [
            Copy(entry.words[1], "pageable" in entry.words, int(entry.words[-1]), int(entry.values["stream"]))
            for entry in self.done
            if entry.letter == "M" and entry.words[1] != "fill"
        ]

    @cached_property
    def fills(self) -> list[Entry]:
        return [entry for entry in self.done if entry.letter == "M" and entry.words[1] == "fill"]

    @cached_property
    def allocations(self) -> list[int]:
        """Bytes of each cudaMalloc."""
        return [int(entry.words[1]) for entry in self.entries if entry.letter == "A"]

    @cached_property
    def pinned(self) -> list[int]:
        """Bytes of each allocation of pinned host memory."""
        return [int(entry.words[1]) for entry in self.entries if entry.letter == "H"]

    @cached_property
    def waits(self) -> list[Entry]:
        """Where the host waits for the device: synchronisations, and copies from the device into pageable memory."""
        return [
            entry
            for entry in self.entries
            if entry.letter == "S" or (entry.letter == "M" and "D2H" in entry.words and "pageable" in entry.words)
        ]

    @cached_property
    def refused(self) -> list[Entry]:
        """Calls that a card would have refused; `str()` says why."""
        return [entry for entry in self.entries if entry.letter == "X"]

    @cached_property
    def unmodelled(self) -> set[str]:
        return {entry.name for entry in self.entries if entry.letter == "U"}

    @cached_property
    def captures(self) -> list[Captured]:
        found, open_ones = [], {}
        for entry in self.entries:
            number = entry.values.get("capture", "0")
            if entry.letter == "C" and entry.name == "begin":
                open_ones[number] = []
            elif entry.letter == "C":
                nodes = tuple(open_ones.pop(number, ()))
                found.append(Captured(int(entry.values["nodes"]), "failed" in entry.words, nodes))
            elif number in open_ones:
                open_ones[number].append(entry)
        return found

    def streams(self) -> Counter[int]:
        return Counter(int(entry.values["stream"]) for entry in self.done)

    def split(self) -> dict[str, Log]:
        """By marks: what came before the first under "", what came after a mark under its words."""
        parts: dict[str, list[Entry]] = {"": []}
        here = parts[""]
        for entry in self.entries:
            if entry.letter == "#":
                here = parts.setdefault(" ".join(entry.words), [])
            else:
                here.append(entry)
        return {name: Log(tuple(entries)) for name, entries in parts.items()}

    def processes(self) -> list[Log]:
        """Where processes share a file: the part of each. The one that ended last started the others."""
        begins = [place for place, entry in enumerate(self.entries) if entry.letter == "P"]
        return [Log(self.entries[begin:end]) for begin, end in itertools.pairwise([*begins, len(self.entries)])]

    def __str__(self) -> str:
        kinds = Counter(kind_of(entry) for entry in self.done)
        kinds |= Counter(
            {name: len(found) for name in ("allocations", "waits", "refused") if (found := getattr(self, name))}
        )
        return f"{len(self.done)} operations: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


WORK = {"L", "G", "M", "GL", "N"}


def kind_of(entry: Entry) -> str:
    """triton, attention, aten, product, copy H2D …, fill, graph or collective."""
    match entry.letter:
        case "L":
            return "attention" if "flash" in entry.words[1] or "fmha" in entry.words[1] else entry.words[0]
        case "M":
            return "fill" if entry.words[1] == "fill" else f"copy {entry.words[1]}"
    return {"G": "product", "GL": "graph", "N": "collective"}[entry.letter]


def parse(lines: Iterable[str]) -> Log:
    """Read lines as fakecuda writes them (README.md)."""
    return Log(tuple(_entries(lines)))


def _entries(lines: Iterable[str]) -> Iterator[Entry]:
    for line in lines:
        letter, _, rest = line.rstrip("\n").partition(" ")
        if letter in ("X", "#"):
            yield Entry(letter, tuple(rest.split(" ")), {})
            continue
        words, values = [], {}
        for word in rest.split(" "):
            name, equals, value = word.partition("=")
            if equals and name.isidentifier():
                values[name] = value
            else:
                words.append(word)
        yield Entry(letter, tuple(words), values)


class Tape:
    """The log of this very process, which must run under the pretend GPU."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.fakecuda_log.restype = ctypes.c_char_p

    def mark(self, words: str) -> None:
        self._library.fakecuda_mark(words.encode())

    def take(self) -> Log:
        """What happened since the last time, forgetting it."""
        content = self._library.fakecuda_log().decode()
        self._library.fakecuda_reset()
        return parse(content.splitlines())


def readable(name: str) -> str:
    """A kernel's name without C++'s mangling and namespaces, cut to a line's length."""
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"at::native::|\(anonymous namespace\)::|void |std::", "", name)[:100]


# ---- what was compiled


class Cubin(NamedTuple):
    """A compiled kernel: its registers a thread, and the bytes that ptxas spilled."""

    name: str
    source: str  # the file of its lines: one kernel, compiled for several block sizes, has one
    arch: str
    registers: int
    spilled: int


def cubins(cache: Path) -> list[Cubin]:
    """Every kernel compiled under `cache`. Those that use no stack cannot have spilled; ptxas is asked about the others."""
    # Some builds of PyTorch bring one, and have Triton use it.
    ptxas = next(path for path in (PACKAGES / "torch/bin/ptxas", NVIDIA / "bin/ptxas") if path.exists())
    found = []
    for cubin in sorted(cache.rglob("*.cubin")):
        dump = [str(NVIDIA / "bin/cuobjdump"), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        ptx = cubin.with_suffix(".ptx")
        text = ptx.read_text()
        arch, source = re.search(r"\.target (sm_\w+)", text)[1], re.search(r'\.file\s+1 "([^"]*)"', text)[1]
        spilled = 0
        if stack:
            again = [str(ptxas), "-v", f"--gpu-name={arch}", str(ptx), "-o", os.devnull]
            said = subprocess.run(again, capture_output=True, text=True, check=True).stderr
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        found.append(Cubin(cubin.stem, source, arch, registers, spilled))
    return found


def main(arguments: list[str]) -> int:
    if (lack := missing()) is not None:
        print(lack, file=sys.stderr)
        return 1
    match arguments:
        case ["run", *command] if command:
            with _cache() as cache:
                return subprocess.run(command, env=_variables(cache)).returncode
        case ["test", *options]:
            with _cache() as cache:
                return _test(_variables(cache), options)
    print(__doc__, file=sys.stderr)
    return 2


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """A folder for what is compiled: the one PRETEND_GPU_CACHE names, or one that does not outlive the command."""
    with tempfile.TemporaryDirectory(prefix="pretend-gpu-") as folder:
        yield Path(os.environ.get("PRETEND_GPU_CACHE") or folder)


def _variables(cache: Path) -> dict[str, str]:
    """This process' variables, over those of a pretend card: FAKECUDA_SM=80 and the like are the user's choice."""
    card = environment(cache, sm=int(os.environ.get("FAKECUDA_SM", 90)))
    return {**card, **os.environ, "LD_PRELOAD": card["LD_PRELOAD"], "HF_HUB_OFFLINE": "1"}


def _test(variables: dict[str, str], options: list[str]) -> int:
    """The tests of this folder under coverage, and then the share of the lines for CUDA alone that have run."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(prefix="pretend-gpu-coverage-") as folder:
        data = str(Path(folder) / "data")
        variables |= {"COVERAGE_FILE": data}
        covered = [
            sys.executable,
            "-m",
            "coverage",
            "run",
            f"--rcfile={here / 'coverage.ini'}",
            "-m",
            "pytest",
            *("--quiet", "--numprocesses", "2", "--dist", "worksteal", "--timeout", "900"),
        ]
        code = subprocess.run([*covered, *(options or [str(here)])], cwd=here.parents[1], env=variables).returncode
        if code:
            return code
        combine = [sys.executable, "-m", "coverage", "combine", "--quiet", f"--rcfile={here / 'coverage.ini'}", folder]
        subprocess.run(combine, cwd=here.parents[1], env=variables, check=True)
        return subprocess.run([sys.executable, str(here / "cuda_only.py"), data]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
