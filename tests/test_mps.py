"""A device with neither float64 nor our kernels trains as the CPU does, on operators that it has. No Mac has run this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_step_keeps_to_what_such_a_device_has():
    done = subprocess.run(
        [sys.executable, "-m", "tests.apple"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[:2000]
    found = json.loads(done.stdout)
    for cpu, there in zip(found["cpu"], found["apple"], strict=True):
        for one, other in zip(cpu["steps"], there["steps"], strict=True):
            assert other == pytest.approx(one, rel=1e-5)
        assert there["totals"] == pytest.approx(cpu["totals"], rel=1e-6)
        assert there["held out"] == pytest.approx(cpu["held out"], rel=1e-6)
        assert there["weights"] == pytest.approx(cpu["weights"], rel=1e-5)
    assert {"mm", "_log_softmax", "addcdiv_", "native_layer_norm", "to the host torch.int64"} <= {*found["asked"]}
