"""examples/train_poems.ipynb runs from its first cell to its last, shortened where it trains."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "examples" / "train_poems.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("epochs=10", "epochs=10, max_steps=3, batch_size=4")
            exec(compile(code, str(NOTEBOOK), "exec"), names)
    assert len(names["run"].metrics) >= 1 and "470 poems" in capsys.readouterr().out
