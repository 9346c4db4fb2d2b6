"""examples/train_poems.ipynb runs from its first cell to its last in a kernel of its own, shortened where it trains, and what is shown there
is what would be saved: one output for the training, in its last state."""

import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")
from tests.runs import ENVIRONMENT  # noqa: E402

NOTEBOOK = Path(__file__).parent.parent / "examples" / "train_poems.ipynb"


@pytest.fixture
def kernel(monkeypatch):
    """Its sockets are files: ports may be taken by others. Their names must be short."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    with tempfile.TemporaryDirectory() as folder:
        yield manager.AsyncKernelManager(transport="ipc", connection_file=f"{folder}/kernel.json")


def test_the_notebook_runs(tmp_path, kernel):
    content = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(content)
    assert not any(cell.get("outputs") for cell in content.cells)
    (training,) = (cell for cell in content.cells if "epochs=10" in cell.source and cell.cell_type == "code")
    training.source = training.source.replace("log_every=100", "log_every=1, max_steps=3, batch_size=4")
    at = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(content, km=kernel, timeout=600, startup_timeout=300, resources=at).execute()

    outputs = [output for cell in content.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "470 poems" in printed and "Jupyter support" not in printed  # which rich says of its own displays
    (display,) = (output.data for output in training.outputs if output.output_type == "display_data")
    said = "".join(output.text for output in training.outputs if output.get("name") == "stdout")
    assert [line.split()[:2] for line in said.splitlines()] == [["1", "1"], ["1", "2"], ["1", "3"]]  # of on_log
    for part in ("step 3/3", "100%", "image/svg+xml", "the trained model is in runs/notebook/model"):
        assert part in display["text/html"], part
    (summary,) = (output.data["text/html"] for output in training.outputs if output.output_type == "execute_result")
    assert "3 of 3 steps" in summary and "image/svg+xml" in summary
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1  # of run.plot()
