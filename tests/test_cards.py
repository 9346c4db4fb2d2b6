"""engine/cards: which GPU auto takes, and what is said where PyTorch has none."""

from types import SimpleNamespace

import pytest
import torch

import fastpoem
from fastpoem.doctor import verdicts
from fastpoem.engine import cards, precision
from fastpoem.errors import InputError


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`lines` are what nvidia-smi prints, None: it is not there; `cuda` PyTorch's devices by the cards' ids, `build` its CUDA."""
    made = SimpleNamespace(lines=None, cuda=[], build="13.0", said=[], calls=0)

    def smi(command, **options):
        made.calls += 1
        if made.lines is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout="\n".join(made.lines))

    monkeypatch.setattr(cards.subprocess, "run", smi)
    monkeypatch.setattr(cards, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(made.cuda))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(made.cuda))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=made.cuda[i]))

    def choose(wanted):
        monkeypatch.setattr(torch.version, "cuda", made.build)
        return str(precision.choose_device(wanted, made.said.append))

    made.choose = choose
    return made


@pytest.mark.parametrize(
    ("visible", "lines", "chosen", "says"),
    [
        ("abc", ["GPU-a, 100, 1024", "GPU-b, 900, 1024", "GPU-c, 500, 1024"], "cuda:1", "0.9 of 1.0 GiB"),
        ("cba", ["GPU-a, 100, 1024", "GPU-b, 100, 1024", "GPU-c, 900, 1024"], "cuda:0", "most free memory of 3 GPUs"),
        ("ca", ["GPU-a, 700, 1024", "GPU-b, 900, 1024", "GPU-c, 500, 1024"], "cuda:1", "of 2 GPUs"),  # b is hidden
        ("ab", ["GPU-a, 700, 1024", "GPU-b, 700, 1024"], "cuda:0", "cuda:0 has"),
        ("ab", ["GPU-a, [N/A], 1024", "GPU-b, 900, 1024"], "cuda:0", "the first of 2 GPUs"),
        ("ab", None, "cuda:0", "the first of 2 GPUs"),
        ("a", ["GPU-a, 1, 1024", "GPU-b, 900, 1024"], "cuda:0", None),
    ],
)
def test_auto_takes_the_card_with_the_most_free_memory(machine, visible, lines, chosen, says):
    machine.cuda, machine.lines = list(visible), lines
    assert machine.choose("auto") == chosen
    assert (says is None and machine.said == []) or says in machine.said[0]
    machine.said.clear()
    assert machine.choose("cuda") == "cuda:0" and machine.said == []


def test_why_there_is_no_gpu(machine, monkeypatch):
    assert machine.choose("auto") == "cpu" and machine.said == []
    machine.lines = ["GPU-a, 900, 1024"]
    machine.build = None
    assert machine.choose("auto") == "cpu"
    assert (
        machine.said[0].startswith("there is a GPU, but it is not used: this PyTorch")
        and "CPU build" in machine.said[0]
    )
    with pytest.raises(
        InputError,
        match=r"--device cuda:1: this PyTorch \(.*\) is a CPU build: install a PyTorch with CUDA|CPU build; install",
    ):
        machine.choose("cuda:1")
    machine.build = "13.0"

    def old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", old)
    with pytest.raises(InputError, match=r"made for CUDA 13.0, cannot use the GPU here \(The NVIDIA driver .* too old"):
        machine.choose("cuda")
    machine.said.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.choose("auto") == "cpu" and machine.said == []
    with pytest.raises(InputError, match="hides all GPUs"):
        machine.choose("cuda")


def test_a_device_that_is_not_there(machine, monkeypatch):
    machine.cuda = ["a", "b"]
    with pytest.raises(InputError, match="this machine has cpu, cuda:0, cuda:1"):
        machine.choose("cuda:2")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"--device mps.*this machine has cpu, cuda:0, cuda:1"):
        machine.choose("mps")
    for wrong in ("tpu", "cpu:0", "mps:0", "cuda:", "cuda:x"):
        with pytest.raises(InputError, match="no such kind of device"):
            machine.choose(wrong)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert machine.choose("mps") == "mps"


def test_a_cache_folder_is_obeyed_by_all_that_is_kept(tmp_path, monkeypatch):
    """And the next run in the process is not held to it; what the user's environment says goes before."""
    from fastpoem_kernels import native

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    seen = []
    loaded = lambda: native._kept_at(["/bin/sh"]).parent

    def look(*_):
        seen.append(
            (
                verdicts.place(),
                loaded(),
                cards.os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
                cards.os.environ["TRITON_CACHE_DIR"],
            )
        )
        raise InputError("enough", "seen", "stop")

    monkeypatch.setattr("fastpoem.run.fit.take", look)
    for folder in (tmp_path / "kept", None):
        with pytest.raises(InputError, match="enough"):
            fastpoem.fit(device="cpu", out=str(tmp_path / "run"), cache_dir=folder and str(folder))
    kept, user = tmp_path / "kept", cards.Path(cards.os.environ["XDG_CACHE_HOME"]) / "fastpoem"
    assert seen == [
        (kept / "checked.json", kept / "native", str(kept / "inductor"), "mine"),
        (user / "checked.json", user / "native", None, "mine"),
    ]
