"""What several tests share: a small Hugging Face model with random weights, the bundled verses, and the shared data where it is there."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from fastpoem import paths, signals
from fastpoem.model.hub import BUNDLED

with contextlib.suppress(ImportError):  # tests/pretend_gpu does without
    from hypothesis import HealthCheck, settings

    # The clock judges nothing: cores may be busy. Examples are the same every time; `--hypothesis-profile explore` draws new ones.
    unhurried = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
    settings.register_profile("same", derandomize=True, **unhurried)
    settings.register_profile("explore", **unhurried)
    settings.load_profile("same")

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background was told to ignore it
SHARED = Path(os.environ.get("FASTPOEM_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prepared stores of the bundled verses go into a folder of the test session."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def given_back():
    """A command listens to signals, and keeps its caches in one place, until its process ends. One that a test ran in this process no longer."""
    yield
    signals._leave()
    signals._a_command = False
    paths.keep_caches(None)


@pytest.fixture(scope="session")
def verses() -> Path:
    return BUNDLED / "poems.txt"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a tiny model's shape and sixty poems, which `tests.runs.settings` trains on."""
    from tests import runs  # here, as tests/pretend_gpu and the kernels' own processes have no such package

    folder = tmp_path_factory.mktemp("base")
    runs.tiny_model(folder / "model", BUNDLED / "model")
    runs.tiny_data(folder / "poems.txt", BUNDLED / "poems.txt")
    return folder


@pytest.fixture(scope="session")
def shared_poems() -> Path:
    return _shared("data/poems.txt.xz")


@pytest.fixture(scope="session")
def shared_model() -> Path:
    return _shared("models/gpt2-distil-chinese")


def _shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"no {SHARED / name}: point FASTPOEM_SHARED at the shared data")
    return SHARED / name


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: 2 layers, 32 wide, biases and norms random too, so that none of them can be forgotten unnoticed."""
    import torch
    from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = BertTokenizer.from_pretrained(BUNDLED / "model")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
