"""tiles.c against products in float64: on AMX where this processor has it, and with AMX's instructions carried out in C everywhere
(pretend_tiles.c), in the real blocks and in ones so small that every product has several of each kind."""

import math
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fastpoem_kernels import cross_entropy, native, product, products
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.engine.optim import FlatAdamW
from fastpoem.model.gpt2 import GPT2, GPT2Config

pytestmark = [
    pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not())),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the tiles are Intel's"),
]
PRETEND = f" -mamx-tile -mamx-bf16 -DPRETEND {Path(__file__).with_name('pretend_tiles.c')}"
BUILDS = {"AMX": "", "pretended": PRETEND, "small blocks": PRETEND + " -DBLOCK=20480 -DGROUP=8192 -DMOST=3 -DDEEP=2"}
SIDES = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100, 130])


@pytest.fixture(scope="module", params=BUILDS)
def tiles(request, tmp_path_factory):
    """The C with tiles."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "AMX":
            patch.setattr(native, "COMPILE", native.COMPILE + BUILDS[request.param])
            patch.setattr(native, "_folder", tmp_path_factory.mktemp("tiles"))
            patch.setattr(products, "_has_amx", lambda: True)
            forget()
        if request.param == "AMX" and not products.has_tiles():
            pytest.skip("this processor has no AMX")
        assert products.has_tiles()
        yield
    forget()


def forget():
    native._loaded.cache_clear()
    products.has_tiles.cache_clear()


def made_up(rows, columns, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*((columns, rows) if transposed else (rows, columns)), generator=generator).bfloat16()
    return made.t() if transposed else made


def rounded_once(mine, exact):
    """bfloat16 has 8 bits; what is added up in float32 is off by a little of the largest."""
    return ((mine.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, SIDES, st.booleans(), st.booleans(), st.sampled_from([1, 2, 3, 5]), st.integers(0, 99))
def test_product(tiles, m, n, k, a_transposed, b_transposed, threads, seed):
    a, b = made_up(m, k, a_transposed, seed), made_up(k, n, b_transposed, seed + 1)
    room, before = torch.full((m, n + 3), math.nan, dtype=torch.bfloat16), torch.get_num_threads()
    torch.set_num_threads(threads)
    made = product(a, b, out=room[:, :n])
    torch.set_num_threads(before)
    assert rounded_once(made, a.double() @ b.double()) and room[:, n:].isnan().all()
    assert torch.equal(made, product(a, b))  # by any number of threads
    assert torch.equal(made[m // 2 :], product(a[m // 2 :], b))  # with any other rows


@pytest.mark.parametrize("sides", [(70, 40, 2100), (2100, 40, 70), (70, 2100, 40)])
def test_products_of_one_long_side(tiles, sides):
    m, n, k = sides
    for transposed in (False, True):
        a, b = made_up(m, k, transposed, 0), made_up(k, n, not transposed, 1)
        assert rounded_once(product(a, b), a.double() @ b.double())


def test_what_lies_beside_an_operand_is_not_read(tiles):
    """NaN there would stay, even times zero."""
    for m, n, k in [(40, 40, 40), (64, 64, 33), (33, 64, 64)]:
        room = torch.full((2, 200, 200), math.nan, dtype=torch.bfloat16)
        a, b = room[0, :m, :k].fill_(1), room[1, :k, :n].fill_(2)
        assert (product(a, b) == 2 * k).all()
        assert (product(b.t(), a.t()) == 2 * k).all()


def test_no_number_and_no_end(tiles):
    a, b = torch.ones(40, 40).bfloat16(), torch.ones(40, 40).bfloat16()
    a[3, 5], a[7, 1] = math.nan, math.inf
    made = product(a, b)
    assert made[3].isnan().all() and (made[7] == math.inf).all() and (made[[0, 4, 39]] == 40).all()


def test_what_does_not_fit_is_refused(tiles):
    a = torch.ones(4, 5).bfloat16()
    for b, out in [(torch.ones(4, 5).bfloat16(), None), (torch.ones(5, 4), None), (a.t(), torch.ones(5, 5).bfloat16())]:
        with pytest.raises(ValueError, match="no product of"):
            product(a, b, out=out)
    assert product(torch.ones(0, 5).bfloat16(), a.t()).shape == (0, 4)  # PyTorch's


def gradients():
    """Loss and gradient of a small model in bfloat16."""
    model = GPT2(GPT2Config(300, 40, 64, 2, 2))
    model.initialise(0)
    optimizer = FlatAdamW(model.train(), torch.device("cpu"), torch.bfloat16, weight_decay=0.01, max_norm=1.0)
    torch.manual_seed(1)
    ids = torch.randint(1, 300, (5, 33))
    loss = cross_entropy(model(ids), ids.flatten()).loss
    loss.backward()
    return loss.item(), optimizer.grad.float()


def test_a_model_learns_on_tiles_what_it_learns_without(tiles, monkeypatch):
    loss, gradient = gradients()
    monkeypatch.setattr(products, "has_tiles", lambda: False)
    expected, without = gradients()
    assert abs(loss - expected) < 1e-3 * expected
    assert not torch.equal(gradient, without)
    assert (gradient - without).norm() < 0.01 * without.norm()


def test_it_compiles_for_a_processor_that_has_all_of_it():
    """What this one has not, gcc does not see here."""
    compiler = shutil.which("gcc")
    command = [
        compiler,
        *native.COMPILE.replace("native", "sapphirerapids").split(),
        "-fsyntax-only",
        "-DHALF=1",
        "-Werror",
    ]
    files = [str(file) for file in native.SOURCES if file.suffix == ".c"]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    if "sapphirerapids" in done.stderr:
        pytest.skip("a gcc that does not know AMX")
    assert done.returncode == 0, done.stderr


def test_a_processor_without_amx_compiles_nothing_to_find_out(monkeypatch):
    monkeypatch.setattr(products, "_has_amx", lambda: False)
    monkeypatch.setattr(native, "_loaded", lambda half: pytest.fail("compiled"))
    products.has_tiles.cache_clear()
    assert not products.has_tiles()
    products.has_tiles.cache_clear()
