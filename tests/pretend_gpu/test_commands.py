"""The real commands with --device cuda: every way of batching, precision, compiling and graphs; saved, resumed, told to stop; exit codes."""

import itertools
import json
import signal

import pytest
import torch
from conftest import TRAIN, assert_sound, rows
from safetensors.torch import load_file

from benchmarks.budget import NODES


def weights(folder):
    return load_file(folder / "model.safetensors")


KINDS = [
    *itertools.product(["bucket", "pack", "pad"], ["bf16"], ["off", "on"], ["off", "on"], [90]),
    *itertools.product(["bucket", "pack", "pad"], ["fp32"], ["off"], ["on"], [90]),
    *itertools.product(["bucket", "pack"], ["bf16"], ["on"], ["on"], [80]),
    ("bucket", "fp32", "on", "off", 80),
]


@pytest.mark.parametrize(("batching", "precision", "compiled", "graphs", "sm"), KINDS)
def test_training_is_logged_saved_and_resumed(command, tiny, tmp_path, batching, precision, compiled, graphs, sm):
    """Two epochs of 14 steps, cut in the first and gone on with: every step in the metrics, every graph launched as often as it should be."""
    run = tmp_path / "run"
    flags = [
        *tiny,
        "--out",
        run,
        "--epochs",
        2,
        "--batching",
        batching,
        "--precision",
        precision,
        "--compile",
        compiled,
    ]
    flags += ["--graphs", graphs, "--log-every", 1, "--schedule", "constant"]
    first = command(TRAIN, *flags, "--max-steps", 9, "--save-every", 4, sm=sm)
    assert_sound(first)
    assert [row["step"] for row in rows(run) if "event" not in row] == [*range(1, 10)]
    begun = weights(run / "checkpoints/step-00000004")

    again = command(TRAIN, *flags, "--resume", sm=sm)
    assert_sound(again)
    assert [row["step"] for row in rows(run) if "event" not in row] == [*range(1, 29)]
    assert [row["epoch"] for row in rows(run) if "event" in row] == [1, 2]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step-00000009",
        "step-00000014",
        "step-00000028",
    }

    # Nothing is computed here, so weights never change: what was drawn comes through every copy, thread and file.
    kept = weights(run / "model")
    assert kept.keys() == begun.keys() and all(torch.equal(kept[name], begun[name]) for name in kept)
    assert any(tensor.abs().sum() > 0 for tensor in kept.values())
    state = load_file(run / "checkpoints/step-00000028/optimizer.safetensors")
    assert state["rng.cuda"].dtype == torch.uint8

    for outcome, steps in ((first, 9), (again, 19)):
        captures, launched = outcome.log.captures, outcome.log.graph_launches
        assert not any(one.failed for one in captures)
        if graphs == "off":
            assert not captures and not launched
        else:
            assert len(launched) == steps and {entry.values["capture"] for entry in launched} == {"0"}
            numbers = {entry.values["graph"] for entry in launched}
            assert len(numbers) <= len(captures) and all(one.nodes > 20 for one in captures)
    names = {entry.words[1] for entry in again.log.entries if entry.letter == "L"}
    assert any(name.startswith("triton_") for name in names) == (compiled == "on")
    if precision == "bf16":
        assert any("flash" in name for name in names)
    assert ("compiled in" in again.said) == (compiled == "on")


def test_the_embedded_default_ends_with_a_poem(command, tmp_path):
    outcome = command(TRAIN, "--device", "cuda", "--out", tmp_path / "run", "--epochs", 2)
    assert_sound(outcome)
    assert "compiled in" in outcome.said and "CUDA graphs" in outcome.said and "bfloat16" in outcome.said
    assert outcome.said.splitlines()[-2].startswith("the trained model is in")
    described = json.loads((tmp_path / "run/config.json").read_text())
    assert "H100 (pretend)" in json.dumps(described)


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_another_card_is_used_and_no_other(command, tiny, tmp_path, graphs):
    flags = [*tiny, "--device", "cuda:7", "--out", tmp_path / "run", "--epochs", 2, "--graphs", graphs]
    outcome = command(TRAIN, *flags, devices=8)
    assert_sound(outcome)
    used = {
        entry.values["device"]
        for entry in outcome.log.entries
        if entry.letter in ("L", "G", "M", "E", "S", "GL", "C", "A")
        if "device" in entry.values
    }
    assert used == {"7"}
    outcome = command(TRAIN, *flags[:-4], "--epochs", 3, "--resume", "--graphs", graphs, devices=8)
    assert_sound(outcome)
    refused = command(TRAIN, *tiny, "--device", "cuda:7", devices=2)
    assert refused.code == 2
    assert (
        refused.said
        == "fastpoem: --device cuda:7: there is no such device here; this machine has cpu, cuda:0, cuda:1\n"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_and_goes_on(command, tiny, tmp_path, number):
    run = tmp_path / "run"
    flags = [*tiny, "--out", run, "--compile", "off", "--log-every", 20]
    outcome = command.stopped(TRAIN, *flags, "--epochs", 10000, after="step 20/", number=number)
    assert_sound(outcome, 128 + number)
    assert "stopped after a complete checkpoint" in outcome.said
    done = int(max(path.name for path in (run / "checkpoints").iterdir()).removeprefix("step-"))
    outcome = command(TRAIN, *flags, "--epochs", done // 14 + 2, "--resume")
    assert_sound(outcome)
    assert f"step {done} of" in outcome.said


def test_what_fails_its_check_is_not_used(command, tiny, tmp_path):
    """On this card everything fails it, since nothing is computed: plain operators train, one by one, and each is said."""
    unchecked = {"FASTPOEM_ASSUME_CHECKED": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    outcome = command(TRAIN, *tiny, "--out", tmp_path / "run", "--compile", "off", extra=unchecked)
    assert_sound(outcome)
    assert outcome.said.count("failed its check") >= 5 and "checking this GPU, once" in outcome.said
    log = outcome.log.of_the_last_process()  # the checks run in others
    assert log.launches and not log.graph_launches and not log.captures
    assert not {"whole_row", "update"} & {entry.words[1] for entry in log.launches}
    again = command(TRAIN, *tiny, "--out", tmp_path / "again", "--compile", "off", extra=unchecked)
    assert_sound(again)
    assert "checking this GPU" not in again.said and again.said.count("failed its check") >= 5
    for flag in ("--graphs", "--compile"):
        refused = command(TRAIN, *tiny, "--out", tmp_path / "insists", flag, "on", extra=unchecked)
        assert refused.code == 2 and "failed its check on this GPU" in refused.said


def test_a_card_without_bf16_computes_in_fp32(command, tiny, tmp_path):
    outcome = command(TRAIN, *tiny, "--out", tmp_path / "run", "--compile", "off", sm=75)
    assert_sound(outcome)
    assert "float32 (the GPU has no bf16)" in outcome.said and not any(
        "flash" in entry.words[1] for entry in outcome.log.launches
    )
    for flags, words in (
        (["--precision", "bf16"], "has no bf16"),
        (["--attention", "flash"], "compute capability 8.0"),
    ):
        refused = command(TRAIN, *tiny, "--out", tmp_path / "run2", *flags, sm=75)
        assert refused.code == 2 and words in refused.said.splitlines()[-1]


def test_the_doctor_trains_for_a_moment_in_every_form(command):
    """Its checks are left out, which it says: nothing could pass them here."""
    outcome = command("fastpoem.doctor", "--device", "cuda:0", "--quick", "--json")
    assert_sound(outcome)
    report = json.loads(outcome.said.splitlines()[-1])
    assert report["ok"] and report["checks"] == [] and "kernels 21128" in {one["name"] for one in report["skipped"]}
    assert [one["form"] for one in report["trials"]] == ["plain", "graphs", "compiled", "compiled + graphs"]
    assert all(one["step_ms"] is not None and one["peak_bytes"] > 1 << 30 for one in report["trials"])
    assert report["machine"]["capability"] == [9, 0] and report["uses"]["graphs"] and report["uses"]["compile"]
    assert len(outcome.log.captures) == 6  # three lengths in two forms
    assert outcome.log.captures[-1].nodes == NODES  # as docs/performance.md has it


def test_missing_tools_are_named_at_the_start(command, tiny, tmp_path):
    """Without a C compiler Triton cannot build its launcher."""
    bare = {"PATH": str(tmp_path), "CC": ""}
    refused = command(TRAIN, *tiny, "--out", tmp_path / "run", "--compile", "on", extra=bare)
    assert refused.code == 2 and "--compile on: there is no C compiler" in refused.said
    assert len(refused.said.splitlines()) == 1 or "poems of" in refused.said.splitlines()[0]


def test_poems_are_written_on_the_card(command, tiny, tmp_path):
    run = tmp_path / "run"
    assert_sound(command(TRAIN, *tiny, "--out", run, "--compile", "off"))
    for more in (["--temperature", 0], ["--count", 2, "--seed", 1]):
        outcome = command("fastpoem.generate", "--model", run / "model", "--device", "cuda:0", "--prompt", "春", *more)
        assert_sound(outcome)
        assert outcome.log.products


@pytest.mark.parametrize(
    "flags", [["--attention", "flash"], ["--dropout", 0], ["--loss-on-padding"], ["--recipe", "notebook"]]
)
def test_other_flags_run(command, tiny, tmp_path, flags):
    outcome = command(TRAIN, *tiny, "--out", tmp_path / "run", "--compile", "off", *flags)
    assert_sound(outcome)
    assert any("flash" in entry.words[1] for entry in outcome.log.launches) == ("notebook" not in flags)


def test_the_doctor_finds_this_card_ill(command, tmp_path):
    """Nothing is computed here, so every comparison must fail: a doctor that finds this card healthy looks at nothing."""
    variables = {"FASTPOEM_ASSUME_CHECKED": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    outcome = command("fastpoem.doctor", "--device", "cuda:0", "--quick", "--json", extra=variables)
    assert outcome.code == 1 and "Traceback" not in outcome.said, outcome.said
    report = json.loads(next(line for line in outcome.said.splitlines() if line.startswith("{")))
    assert not report["ok"] and "H100 (pretend)" in report["machine"]["name"] and report["sentence"]
    pieces = {record["name"].split()[0] for record in report["checks"] if not record["ok"]}
    assert pieces >= {"attention", "compiled", "replay"}


def test_the_doctor_says_what_it_was_told_to_assume(command, tmp_path):
    outcome = command("fastpoem.doctor", "--device", "cuda:0", "--quick")
    assert_sound(outcome)
    assert "FASTPOEM_ASSUME_CHECKED=1" in outcome.said and "compiled + graphs" in outcome.said
    assert outcome.log.graph_launches and any(
        "triton_" in entry.words[1] for entry in outcome.log.entries if entry.letter == "L"
    )
