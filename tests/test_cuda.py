"""What only a GPU can tell: the doctor's checks, as tests. `pytest -m cuda` on a machine that has one."""

import os

import pytest
import torch
from fastpoem_kernels.check import check

from fastpoem.doctor import apart, checks, verdicts
from fastpoem.engine.compile import why_not_compile

CUDA = torch.device("cuda")
REASON = (
    "no CUDA device"
    if not torch.cuda.is_available()
    else "a pretend GPU computes nothing"
    if os.environ.get("FASTPOEM_ASSUME_CHECKED") == "1"
    else None
)
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]


@pytest.mark.parametrize("rows", [8, 64, 1030])
def test_kernels(rows):
    assert [record for record in check(CUDA, rows=rows) if not record.ok] == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_training_uses(dtype, packed):
    names = checks.wanted(dtype, vocabulary=21128, packed=packed, compiles=why_not_compile(CUDA) is None, graphs=True)
    found = dict(apart.in_a_process(CUDA, names))
    assert {name: verdicts.failures(records) for name, records in found.items()} == {name: {} for name in names}


def test_the_real_model():
    names = ["compiled bfloat16 full", "replay bfloat16 full compiled"]
    found = dict(apart.in_a_process(CUDA, names))
    assert {name: verdicts.failures(records) for name, records in found.items()} == {name: {} for name in names}
