"""The Triton kernels under Triton's interpreter: the same tests as the CPU forms, in a process of their own.

Triton decides between compiler and interpreter when a kernel is defined, so the choice holds for a whole process.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import fastpoem_kernels
import numpy as np
import pytest
from fastpoem_kernels.dispatch import INTERPRETED

HERE = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process already")
@pytest.mark.parametrize(("room", "at_least"), [("loss", 70), ("adamw", 30)])
def test_triton_forms_pass_the_same_tests(room, at_least):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a runtime bound under NumPy 2.4")
    paths = os.pathsep.join([str(Path(fastpoem_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"test_kernels_{room}.py",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least
