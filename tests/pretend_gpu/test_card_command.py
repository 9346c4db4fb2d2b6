"""`python -m benchmarks.card` on the pretend GPU: its figures mean nothing, and every line that only a card runs has run."""

import json

from conftest import UNCOVERED

ENTRIES = (
    "steps, graphs", "a capture that fails late", "checkpoints while graphs replay", "bandwidth", "epoch",
    "batch 16, pack", "stopped and resumed",
)  # fmt: skip


def test_entries_of_a_card(command, tmp_path):
    more = ["--small", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    outcome = command(
        "benchmarks.card", *more, *(word for name in ENTRIES for word in ("--only", name)), extra=UNCOVERED
    )
    found = json.loads((tmp_path / "out/card.json").read_text())
    assert {name: entry.get("error") for name, entry in found["entries"].items()} == dict.fromkeys(ENTRIES), (
        outcome.said
    )
    results = {name: entry["result"] for name, entry in found["entries"].items()}
    # Losses are what the memory held before, so that they agree ("ok") is chance here.
    assert outcome.code == int(not all(result.get("ok", True) for result in results.values()))
    assert "H100 (pretend)" in found["about"]["name"]
    steps, late, saved, rates, epoch, batch, resumed = (results[name] for name in ENTRIES)
    assert steps["recorded"] >= 2 and not steps["broken"] and len(steps["losses"]) == 8
    assert late["steps_after"] == 4 and "could not be recorded" in late["said"][0]
    assert saved["checkpoints"] >= 2
    assert epoch["steps"] == epoch["of"] and batch["recorded"] and batch["nodes"] > 0
    assert resumed["stopped_after"] == resumed["steps"] // 2
    assert all(row["us"] > 0 for row in rates["rows"].values())
