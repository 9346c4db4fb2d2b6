"""The real commands with --device cuda: every way of batching, precision, compiling and graphs; saved, resumed, told to stop; exit codes."""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import TRAIN, UNCOVERED, assert_sound, rows
from fastpoem_kernels.check import Record
from pretend import environment
from safetensors.torch import load_file

from benchmarks.budget import NODES, PACKING
from fastpoem.doctor import __main__ as doctor
from fastpoem.doctor import examine, trial, verdicts
from fastpoem.doctor.checks import wanted, with_kernels, with_separate
from fastpoem.model.hub import BUNDLED


def weights(folder):
    return load_file(folder / "model.safetensors")


KINDS = [
    *itertools.product(["bucket"], ["bf16"], ["off", "on"], ["off", "on"], [90]),
    *(
        (batching, "bf16", *both, 90)
        for batching, both in itertools.product(["pack", "pad"], [("off", "off"), ("on", "on")])
    ),
    ("bucket", "fp32", "on", "on", 90),
    ("pack", "fp32", "off", "on", 90),
    ("pack", "bf16", "off", "on", 80),
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
    card = {"sm": sm, "extra": UNCOVERED if compiled == "on" else {}}
    first = command(TRAIN, *flags, "--max-steps", 9, "--save-every", 4, **card)
    assert_sound(first)
    assert [row["step"] for row in rows(run) if "event" not in row] == [*range(1, 10)]
    begun = weights(run / "checkpoints/step-00000004")

    again = command(TRAIN, *flags, "--resume", "--save-every", "None", **card)
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
    assert "packed (PyTorch's variable-length flash kernel)" in outcome.said
    assert outcome.said.splitlines()[-2].startswith("the trained model is in")
    described = json.loads((tmp_path / "run/config.json").read_text())
    assert "H100 (pretend)" in json.dumps(described)


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_another_card_is_used_and_no_other(command, tiny, tmp_path, graphs):
    elsewhere = [*tiny[: tiny.index("--device")], "--device", "cuda:7"]
    flags = [*elsewhere, "--out", tmp_path / "run", "--compile", graphs]
    flags += ["--graphs", graphs, "--epochs", 2]
    outcome = command(TRAIN, *flags, devices=8)
    assert_sound(outcome)
    used = {
        entry.values["device"]
        for entry in outcome.log.entries
        if entry.letter in ("L", "G", "M", "E", "S", "GL", "C", "A")
        if "device" in entry.values
    }
    assert used == {"7"}
    outcome = command(TRAIN, *flags[:-1], 3, "--resume", devices=8)
    assert_sound(outcome)
    refused = command(TRAIN, *elsewhere, devices=2)
    assert refused.code == 2
    assert (
        refused.said
        == "fastpoem: --device cuda:7: there is no such device here; this machine has cpu, cuda:0, cuda:1\n"
    )


@pytest.mark.parametrize(
    "compiled, accumulate, parallel", [("off", 1, "data"), ("off", 1, "auto"), ("on", 2, "sharded")]
)
def test_two_processes_train_on_two_cards(command, tiny, tmp_path, compiled, accumulate, parallel):
    """Each on its own, with one sum a step between the recording of its share and the recording of the update; then, where each updates a
    slice, the weights are put together."""
    run = tmp_path / "run"
    flags = [*tiny[: tiny.index("--device")], "--device", "cuda", "--out", run, "--epochs", 2, "--log-every", 1]
    flags += ["--compile", compiled, "--accumulate", accumulate, "--parallel", parallel]
    torchrun = ["--standalone", "--nproc-per-node", "2", "-m", TRAIN]
    extra = UNCOVERED if compiled == "on" else {}
    outcome = command("torch.distributed.run", *torchrun, *flags, devices=2, extra=extra)
    assert_sound(outcome)
    assert ("divide the poems and the update" in outcome.said) == (parallel != "data")
    assert [row["step"] for row in rows(run) if "event" not in row] == [*range(1, 29)]
    trained = [log for log in outcome.log.processes() if log.collectives]
    assert len(trained) == 2
    assert {entry.values["device"] for log in trained for entry in log.graph_launches} == {"0", "1"}
    parameters = sum(tensor.numel() for tensor in weights(run / "model").values())
    for log in trained:
        assert len({entry.values["device"] for entry in log.done if "device" in entry.values}) == 1
        assert not any(one.failed or any(entry.letter == "N" for entry in one.operations) for one in log.captures)
        gradient = "ncclAllReduce" if parallel == "data" else "ncclReduceScatter"
        sums = [
            at
            for at, one in enumerate(log.done)
            if one.letter == "N" and one.name == gradient and int(one.words[1]) >= 4 * parameters
        ]
        assert len(sums) == 28
        steps = [log.done[a:b] for a, b in itertools.pairwise(sums)]
        assert {sum(one.letter == "GL" for one in step) for step in steps} == {1 + accumulate}  # the update is one
        gathers = [one for one in log.collectives if one.name == "ncclAllGather"]  # in bf16, by halves
        assert {int(one.words[1]) // parameters for one in gathers} <= {1} and len(gathers) == 29 * (parallel != "data")
    kept = weights(run / "model")
    assert all(tensor.isfinite().all() and tensor.abs().sum() > 0 for name, tensor in kept.items() if "wte" in name)


def test_weights_are_sharded_over_two_cards(command, tiny, tmp_path):
    """FSDP's own gathers and sums, a block at a time, and one small sum a step of ours."""
    run = tmp_path / "run"
    flags = [*tiny[: tiny.index("--device")], "--device", "cuda", "--out", run, "--epochs", 1, "--log-every", 1]
    torchrun = ["--standalone", "--nproc-per-node", "2", "-m", TRAIN]
    outcome = command("torch.distributed.run", *torchrun, *flags, "--parallel", "fsdp", devices=2)
    assert_sound(outcome)
    assert "divide the poems, the weights and the update" in outcome.said
    assert [row["step"] for row in rows(run) if "event" not in row] == [*range(1, 15)]
    trained = [log for log in outcome.log.processes() if log.collectives]
    assert len(trained) == 2
    for log in trained:
        names = collections.Counter(one.name for one in log.collectives)
        assert names["ncclReduceScatter"] == 14 * 2 and names["ncclAllGather"] >= 14 * 2  # one block and the root
    assert all(tensor.isfinite().all() for tensor in weights(run / "model").values())


def test_two_processes_stop_together(command, tiny, tmp_path):
    """torchrun passes the signal on to each; both end with the same step, in one checkpoint."""
    run = tmp_path / "run"
    flags = [*tiny[: tiny.index("--device")], "--device", "cuda", "--out", run, "--compile", "off", "--log-every", 20]
    torchrun = ["--standalone", "--nproc-per-node", "2", "-m", TRAIN]
    outcome = command.stopped(
        "torch.distributed.run", *torchrun, *flags, "--epochs", 10000, after="step 20/", devices=2
    )
    assert not outcome.log.refused and "stopped after a complete checkpoint" in outcome.said
    assert len({len(log.collectives) for log in outcome.log.processes() if log.collectives}) == 1
    assert [path.name for path in (run / "checkpoints").iterdir()]


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
    flags = ["--compile", "off", "--batching", "bucket"]
    outcome = command(TRAIN, *tiny, "--out", tmp_path / "run", *flags, extra=unchecked)
    assert_sound(outcome)
    assert outcome.said.count("failed its check") >= 5 and "checking this GPU, once" in outcome.said
    *checks, log = outcome.log.processes()
    assert log.launches and not log.graph_launches and not log.captures
    assert not {"whole_row", "update"} & {entry.words[1] for entry in log.launches}
    ours = [bool({"whole_row", "update"} & {entry.words[1] for entry in one.launches}) for one in checks]
    assert (
        ours == [True, False, False] and checks[2].launches
    )  # kernels, attention, replay: trained without what had failed


def test_what_is_remembered_to_have_failed_is_not_checked_again(command, tiny, tmp_path, monkeypatch):
    unchecked = {"FASTPOEM_ASSUME_CHECKED": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    monkeypatch.setenv("XDG_CACHE_HOME", unchecked["XDG_CACHE_HOME"])
    card, wrong = torch.device("cuda:0"), [Record("cross_entropy float32", False, error=1.0, tolerance=0.1)]
    vocabulary = json.loads((BUNDLED / "model/config.json").read_text())["vocab_size"]
    names = wanted(torch.bfloat16, vocabulary=vocabulary, packed=False, compiles=True, graphs=True)
    names = with_kernels(names, {names[0]: ["cross_entropy"]})
    verdicts.remember(verdicts.card(card), dict.fromkeys(with_separate(names, dict.fromkeys(names, wrong)), wrong))
    bucketed = [*tiny, "--batching", "bucket"]
    outcome = command(TRAIN, *bucketed, "--out", tmp_path / "run", extra=unchecked)
    assert_sound(outcome)
    assert "checking this GPU" not in outcome.said and outcome.said.count("failed its check") == 5
    names = {entry.words[1] for entry in outcome.log.launches}
    assert "update" in names and "whole_row" not in names and not outcome.log.graph_launches
    for flag in ("--graphs", "--compile"):
        refused = command(TRAIN, *bucketed, "--out", tmp_path / "insists", flag, "on", extra=unchecked)
        assert refused.code == 2 and "failed its check on this GPU" in refused.said


def test_a_card_without_bf16_computes_in_fp16(command, tiny, tmp_path):
    """With a loss scale, which is in the recording too, and rows: the variable-length kernel is not for such a card."""
    outcome = command(TRAIN, *tiny, "--out", tmp_path / "run", "--compile", "off", sm=75)
    assert_sound(outcome)
    assert (
        "float16 (the GPU has no bf16" in outcome.said
        and "of like length" in outcome.said
        and not any("flash" in entry.words[1] for entry in outcome.log.launches)
    )
    for flags, words in (
        (["--precision", "bf16"], "has no bf16"),
        (["--attention", "flash"], "compute capability 8.0"),
    ):
        refused = command(TRAIN, *tiny, "--out", tmp_path / "run2", *flags, sm=75)
        assert refused.code == 2 and words in refused.said.splitlines()[-1]


def test_the_doctor_trains_for_a_moment_in_every_form(command, capsys):
    """Its checks are left out, which it says: nothing could pass them here."""
    outcome = command("fastpoem.doctor", "--device", "cuda:0", "--quick", "--json")
    assert_sound(outcome)
    report = json.loads(outcome.said.splitlines()[-1])
    assert report["ok"] and report["checks"] == [] and "kernels 21128" in {one["name"] for one in report["skipped"]}
    assert [one["form"] for one in report["trials"]] == ["plain", "graphs", "compiled", "compiled + graphs"]
    assert all(one["step_ms"] is not None and one["peak_bytes"] > 1 << 30 for one in report["trials"])
    assert report["memory"]["expandable_segments"] is False and report["machine"]["unused_gpu"] is None
    assert report["machine"]["capability"] == [9, 0] and report["uses"]["graphs"] and report["uses"]["compile"]
    assert len(outcome.log.captures) == 4  # packed batches of two sizes in two forms
    expected = NODES + PACKING if torch.__version__ >= "2.14" else 200  # the newest as docs/performance.md has it
    assert outcome.log.captures[-1].nodes == expected
    assert any("triton_" in entry.words[1] for entry in outcome.log.entries if entry.letter == "L")
    doctor.show(report)
    said = capsys.readouterr().out
    assert "expandable segments off (PYTORCH_ALLOC_CONF is not set)" in said
    assert "FASTPOEM_ASSUME_CHECKED=1" in said and "compiled + graphs" in said and "H100 (pretend)" in said


def test_the_doctor_finds_this_card_ill(tmp_path, monkeypatch, capsys):
    """Nothing is computed here, so every comparison must fail: a doctor that finds this card healthy looks at nothing. A check of each
    kind; training is left out."""
    monkeypatch.setenv("FASTPOEM_ASSUME_CHECKED", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = ["kernels 21128", "attention bfloat16 packed", "compiled bfloat16", "replay bfloat16"]
    monkeypatch.setattr(examine, "_checks", lambda *_: (names, []))
    monkeypatch.setattr(trial, "train", lambda *_, **__: trial.Trial("plain", 1.0, 1.0, 1.0))
    real, given = examine.in_a_process, []
    monkeypatch.setattr(examine, "in_a_process", lambda *arguments: given.append(arguments[2]) or real(*arguments))
    assert doctor.main(["--device", "cuda:0", "--quick", "--json", "--check-seconds", "400"]) == 1
    assert {*given} == {400.0}
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and "H100 (pretend)" in report["machine"]["name"] and report["sentence"]
    found = {record["name"]: record["ok"] for record in report["checks"]}
    assert not any(found.values()), found
    without = "plain-loss plain-update"
    assert {*names[1:2], f"{names[2]} {without}", f"{names[3]} {without}", "clipped_adamw float32"} <= {*found}
    assert [one["note"] for one in report["trials"]] == ["", *["failed its check"] * 3]


@pytest.mark.parametrize(
    ("asked", "grows"),
    [
        ({}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
    ],
)
def test_the_doctor_shows_how_memory_is_taken(cache, asked, grows):
    script = "import json, torch; from fastpoem.doctor import machine; print(json.dumps(machine.allocator(torch.device('cuda', 0))))"
    variables = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    variables |= environment(cache) | UNCOVERED | asked
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    words = [f"{name}={value}" for name, value in asked.items()]
    assert json.loads(done.stdout) == {"expandable_segments": grows, "allocator": words[0] if words else None}


def test_a_driver_that_is_too_old_is_a_line(command, tiny, tmp_path):
    """nvidia-smi shows a card and PyTorch sees none: said once, by every command that would have taken it, and PyTorch's own warning is not."""
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho GPU-abc, 900, 1024\n")
    smi.chmod(0o755)
    old = {"FAKECUDA_DRIVER": "11040", "PATH": f"{smi.parent}:{os.environ['PATH']}", **UNCOVERED}
    reason = f"PyTorch {torch.__version__}, made for CUDA 13.0, cannot use the GPU here (The NVIDIA driver on your system is too old (found version 11040)"
    run, flags = tmp_path / "run", [*tiny[:-1]]
    trained = command(TRAIN, *flags, "auto", "--out", run, "--max-steps", 1, extra=old)
    poem = command("fastpoem.generate", "--model", run / "model", "--device", "auto", extra=old)
    for outcome in (trained, poem):
        assert outcome.code == 0 and "Warning" not in outcome.said, outcome.said
        assert (
            outcome.said.count(f"there is a GPU, but it is not used: {reason}") == outcome.said.count("too old") == 1
        ), outcome.said
    refused = command(TRAIN, *flags, "cuda", "--out", tmp_path / "no", extra=old)
    assert (
        refused.code == 2
        and refused.said.startswith(f"fastpoem: --device cuda: {reason}")
        and refused.said.count("\n") == 1
    )


def test_missing_tools_are_named_at_the_start(command, tiny, tmp_path):
    """Without a C compiler Triton cannot build its launcher."""
    bare = {"PATH": str(tmp_path), "CC": ""}
    refused = command(TRAIN, *tiny, "--out", tmp_path / "run", "--compile", "on", extra=bare)
    assert refused.code == 2 and "--compile on: there is no C compiler" in refused.said
    assert len(refused.said.splitlines()) == 1 or "poems from" in refused.said.splitlines()[0]


def test_memory_that_runs_out_is_a_line(command, wide, tmp_path):
    """While the run is set up, and in its first step, after a recording has failed for the same reason."""
    run = tmp_path / "run"
    flags = [*wide, "--out", run, "--max-steps", 2, "--compile", "off", "--val-poems", 0]
    for memory, batch in ((1, 4), (2, 256)):
        refused = command(TRAIN, *flags, "--batch-size", batch, memory=memory)
        said = refused.said.splitlines()
        assert refused.code == 2 and "Traceback" not in refused.said, refused.said
        assert said[-1].startswith(
            f"fastpoem: --batch-size {batch}: cuda:0 has {memory}.0 GiB, of which training held "
        )
        assert (
            "iB more" not in said[-1]
            and "use a smaller --batch-size, a smaller --max-length or --vocab corpus" in said[-1]
        )
        assert sum("could not be recorded as a CUDA graph (CUDA out of memory." in line for line in said) == (
            memory == 2
        )
    assert_sound(command(TRAIN, *flags, "--batch-size", 4, memory=2))


def test_a_model_that_cannot_fit_is_refused(command, tiny, tmp_path):
    outcome = command(TRAIN, *tiny, "--out", tmp_path / "run", "--shape", "gpt2", memory=1)
    assert_sound(outcome, 2)
    (said,) = (line for line in outcome.said.splitlines() if line.startswith("fastpoem: "))
    assert said.startswith("fastpoem: --device cuda:0: weights and optimizer of ")
    assert said.endswith("this one has 1.0; use a smaller model, or several GPUs with torchrun and --parallel fsdp")
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("compiled, dropout", [("off", 0), ("on", 0), ("auto", 0.1)])
def test_activations_are_computed_again(command, tiny, tmp_path, compiled, dropout):
    """With dropout plainly: a recording, or compiled code, might not draw the same again."""
    flags = [*tiny, "--out", tmp_path / "run", "--compile", compiled, "--dropout", dropout, "--checkpoint-activations"]
    outcome = command(TRAIN, *flags)
    assert_sound(outcome)
    said = "kernels are launched one by one: dropout with --checkpoint-activations is neither compiled nor recorded"
    assert (said in outcome.said) == (dropout > 0)
    assert ("lengths recorded as CUDA graphs" in outcome.said) == bool(outcome.log.graph_launches) == (dropout == 0)
    assert ("compiled in" in outcome.said) == (compiled == "on")
