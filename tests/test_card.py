"""`python -m benchmarks.card`: what is measured is kept, an entry at a time, whatever happens to the process that measures; and can be read."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peers
from benchmarks.card import __main__ as card
from benchmarks.card import draw, entries, forms, learn, markdown, tools, worker
from benchmarks.card.place import Missing, Place
from benchmarks.card.results import Results, finite
from fastpoem.doctor.machine import PEAKS
from fastpoem.errors import InputError
from tests.runs import assert_trained_alike

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path):
    return Place(CPU, True, tmp_path / "work")


def content(folder):
    return json.loads((folder / "card.json").read_text(encoding="utf-8"))


# ---- the real thing, tiny


def test_a_part_is_measured_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTPOEM_SHARED", str(tmp_path / "none"))
    more = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu"]
    wanted = ["bandwidth", "memcheck", "steps, plain", "batch 32, bucket"]
    assert card.main([*more, "--minutes", "60", *(word for name in wanted for word in ("--only", name))]) == 0
    found = content(tmp_path / "out")
    assert [*found["entries"]] == [*sorted(wanted, key=[*found["entries"]].index)] and not found["left_out"]
    assert found["entries"]["memcheck"]["missing"] == "compute-sanitizer looks at a GPU"
    assert len(found["entries"]["steps, plain"]["result"]["losses"]) == 8
    assert found["entries"]["batch 32, bucket"]["result"]["tokens_per_s"] > 0
    assert all(row["share"] > 0 for row in found["entries"]["bandwidth"]["result"]["rows"].values())
    told = (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    assert "**Small sizes**" in told and "| batch 32" not in told and "| 32 | bucket |" in told
    assert card.main([*more, "--part", "learn", "--minutes", "0"]) == 0  # what there is stays, and nothing new fits
    again = content(tmp_path / "out")
    assert again["entries"] == found["entries"]
    assert {*again["left_out"]} == {f"learn {name}" for name in learn.RUNS}
    assert card.main([*more[:2], "--part", "draw"]) == 0
    assert "the time was over" in (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    capsys.readouterr()


# ---- what an entry may do


def entry(run, needs=0.0):
    return entries.Entry("x", "speed", needs, 60.0, run)


def test_what_raises_is_a_line(place):
    def fault(place, seconds):
        raise RuntimeError("planted\nmore of it")

    def lacks(place, seconds):
        raise Missing("no such tool")

    assert worker.attempt(entry(fault), place, 1)["error"] == "RuntimeError: planted"
    assert worker.attempt(entry(lacks), place, 1)["missing"] == "no such tool"
    assert worker.attempt(entry(lambda place, seconds: {"left": seconds}), place, 3)["result"] == {"left": 3}
    assert finite({"a": [float("nan"), (1.0, float("inf"))], 2: None}) == {"a": [None, [1.0, None]], "2": None}


def test_a_process_does_what_fits_and_ends_after_a_failure(place, monkeypatch):
    def fault(place, seconds):
        raise RuntimeError("planted")

    epoch = {"setup_s": 2.0, "seconds": 10.0, "steps": 5, "of": 50}
    seen, told = [], []
    listed = [
        entry(lambda place, seconds: epoch)._replace(name="epoch"),
        entry(lambda place, seconds: {}, needs=1e6)._replace(name="long"),
        entry(lambda place, seconds: seen.append(place.pace) or {})._replace(name="next"),
        entry(fault)._replace(name="bad"),
        entry(lambda place, seconds: {})._replace(name="after"),
    ]
    monkeypatch.setattr(worker, "entries", lambda device, small: listed)
    monkeypatch.setattr(worker, "keep_caches_in", lambda folder: None)
    job = {**vars(place), "device": "cpu", "work": str(place.work)}
    names = [one.name for one in listed]
    assert worker.main({"place": job, "names": names, "end": time.time() + 100}, told.append) == 1
    assert [next(iter(one.items())) for one in told] == [
        ("begins", "epoch"), ("ends", "epoch"), ("leaves", "long"), ("begins", "next"), ("ends", "next"), ("begins", "bad"), ("ends", "bad"),
    ]  # fmt: skip
    assert seen == [(2.0, 2.0, 50)] and "it needs about 1000000 s" in told[2]["reason"] and told[-1]["entry"]["error"]


@pytest.mark.parametrize(("setup", "seconds", "steps"), [(2, 1000, None), (2, 129, 50), (90, 157, 50), (2, 20, 0)])
def test_a_falling_schedule_is_as_long_as_the_time(place, setup, seconds, steps):
    assert learn._steps_that_fit(place, seconds) is None
    paced = Place(**{**vars(place), "pace": (setup, 2.0, 300)})
    if steps == 0:
        with pytest.raises(RuntimeError, match="too little time"):
            learn._steps_that_fit(paced, seconds)
    else:
        assert learn._steps_that_fit(paced, seconds) == steps


# ---- the process that measures, as others may end it

SCRIPT = """
import json, os, sys, time
job = json.loads(open(sys.argv[1]).read())
say = lambda **what: print(json.dumps(what), flush=True)
if "unable" in job["names"]:
    print("no such library", file=sys.stderr)
    sys.exit(3)
for name in job["names"]:
    if name == "long":
        say(leaves=name, reason="it needs too much")
        continue
    print('{"ends": "good", "en', flush=True)  # half a line
    say(begins=name, limit=0.2 if name in ("hangs", "cut off") else 60)
    if name == "dies":
        print("the last words", file=sys.stderr)
        os.kill(os.getpid(), 9)
    if name in ("hangs", "cut off"):
        time.sleep(600)
    say(ends=name, entry={"part": "speed", "seconds": 1.0, **({"error": "E: planted"} if name == "fails" else {"result": {}})})
    if name == "fails":
        sys.exit(1)
"""


@pytest.fixture
def scripted(tmp_path, place, monkeypatch):
    """`measure` with a process that does what the names say: results, and the lines that were said."""
    (tmp_path / "script.py").write_text(SCRIPT)
    place.work.mkdir()
    monkeypatch.setattr(card, "WORKER", [sys.executable, str(tmp_path / "script.py")])
    monkeypatch.setattr(card, "GRACE", 0.3)
    names = ["good", "fails", "dies", "hangs", "long", "unable", "better", "cut off"]
    monkeypatch.setattr(card, "entries", lambda device, small: [entry(None)._replace(name=name) for name in names])
    results, said = Results(tmp_path), []

    def run(*names, minutes=5.0):
        card.measure(results, place, names, time.time() + 60 * minutes, said.append)
        return results, said

    return run


def test_whatever_ends_a_process_costs_one_entry(scripted, tmp_path):
    results, _ = scripted("good", "fails", "long", "dies", "hangs", "better")
    kinds = {name: one.get("error", "fine") for name, one in content(tmp_path)["entries"].items()}
    assert kinds == {
        "good": "fine",
        "fails": "E: planted",
        "dies": "its process was ended by SIGKILL; the end of its log: the last words",
        "hangs": "its process had not ended in its time; the end of its log: empty",
        "better": "fine",
    }
    assert content(tmp_path)["left_out"] == {"long": "it needs too much"}
    assert [results.is_done(name) for name in ("good", "fails", "dies", "better", "long")] == [
        True,
        False,
        False,
        True,
        False,
    ]
    scripted("dies", "long")
    assert "the last words" in results.entries["dies"]["error"] and not results.is_done("dies")


def test_a_process_that_cannot_begin_costs_one_entry(scripted):
    results, _ = scripted("unable", "good")
    assert results.entries["unable"]["error"] == "its process ended with code 3; the end of its log: no such library"
    assert results.is_done("good")


def test_what_the_end_cuts_off_has_not_failed(scripted):
    results, _ = scripted("cut off", minutes=0.01)
    assert [*results.content["left_out"]] == ["cut off"] and not results.entries


def test_tables_are_written_whatever_ends_a_call(place, tmp_path, monkeypatch):
    def stopped(*_):
        sys.exit(143)

    monkeypatch.setattr(card, "measure", stopped)
    with pytest.raises(SystemExit):
        card.main(["--out", str(tmp_path), "--device", "cpu", "--work", str(place.work)])
    assert (tmp_path / "card.md").is_file()


def test_no_time_is_said(scripted):
    results, _ = scripted("good", minutes=0)
    assert results.content["left_out"] == {"good": "the time was over"} and not results.entries


# ---- the file


def test_figures_of_two_cards_do_not_meet(tmp_path):
    about = {"name": "H100", "torch": "2.11.0", "triton": "3.6.0", "small": False, "poems": "the real ones"}
    results = Results(tmp_path)
    results.begin(about)
    results.keep("a", {"part": "speed", "result": {"x": float("nan")}})
    assert Results(tmp_path).result("a") == {"x": None}
    results.keep("b", {"part": "checks", "result": {"ok": False}})
    assert results.is_done("a") and not results.is_done("b")  # what was wrong is tried again
    Results(tmp_path).begin({**about, "driver": "newer"})
    with pytest.raises(
        InputError, match=r"card.json: was measured with name H100, and here it is A100; name another folder"
    ):
        Results(tmp_path).begin({**about, "name": "A100"})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "about": 1, "entries": {}, "left_out": {}}']
)
def test_another_file_is_refused(tmp_path, text, capsys):
    (tmp_path / "card.json").write_text(text)
    assert card.main(["--out", str(tmp_path), "--part", "draw"]) == 2
    assert "is no file of benchmarks.card" in capsys.readouterr().err


def test_wrong_flags(tmp_path, capsys):
    assert card.main(["--out", str(tmp_path / "none"), "--part", "draw"]) == 2
    assert "holds no card.json" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert card.main(["--out", str(tmp_path), "--device", "cpu", "--only", "nonsense"]) == 2
    assert "--only nonsense: is no entry" in capsys.readouterr().err


@pytest.mark.parametrize("small", [True, False])
def test_the_list(small):
    listed = entries.entries(CPU, small)
    names = [one.name for one in listed]
    assert len({*names}) == len(names) and {one.part for one in listed} == {*entries.PARTS}
    assert all(0 < one.needs <= one.most <= 300 for one in listed)
    assert {
        f"batch {poems}, {how}" for poems in ((16, 32) if small else entries.BATCHES) for how in ("pack", "bucket")
    } <= {*names}
    assert sum(one.needs for one in entries.chosen(listed, "forms", ())) < 540
    first = names[: names.index("learn fast, 0.2 / width") + 1]  # in a first call of nine minutes
    assert first[:3] == ["doctor, quick", "epoch", "batch 16, pack"] and len(first) == 10 - small
    assert sum(one.needs for one in listed[: len(first)]) < 540


# ---- what it says


def h100(folder):
    """A card.json as an H100 might have it."""
    results = Results(folder)
    results.content["about"] = {
        "name": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "small": False, "poems": "made up, of real lengths", "count": 217561, "precision": "bf16",
        "peak": PEAKS["H100"]._asdict(),
    }  # fmt: skip
    record = {
        "name": "kernels 21128 x",
        "ok": False,
        "error": 0.5,
        "tolerance": 1e-6,
        "ms": 0.05,
        "torch_ms": 0.4,
        "note": "a|b",
    }
    trial = {"form": "plain", "step_ms": 20.0, "epoch_s": 270.0, "setup_s": 3.0, "note": ""}
    doctor = {
        "sentence": "training will use bf16",
        "trials": [trial],
        "notebook": None,
        "checks": [record],
        "rates": {"copy_gb_s": 2900.0},
    }
    speed = {"steps": 400, "poems_per_s": 7000.0, "tokens_per_s": 450e3, "mfu": 0.167, "epoch_s": 30.0, "said": []}
    batch = speed | {"step_ms": 2.2, "memory": {"allocated": 2 << 30, "reserved": 3 << 30}, "nodes": 203}
    found = {
        "doctor, quick": doctor, "memcheck": {"ok": False, "summary": "ERROR SUMMARY: 2 errors", "errors": ["Invalid __global__ write of size 2 bytes"]},
        "epoch": speed | {"of": 13597, "seconds": 30.0, "setup_s": 20.0, "whole_s": 52.0},
        "notebook, batch 16": speed | {"by": "notebook", "turns": 8, "epoch_s": 420.0, "step_ms": 31.0, "setup_s": 9.0},
        "trainer, compiled, batch 16": speed | {"by": "loop, compiled", "turns": 8, "tokens_per_s": 150e3, "step_ms": 6.0, "setup_s": 60.0},
        "batch 16, pack": batch, "batch 16, bucket": batch | {"nodes": None},
        "bandwidth": {"rows": {"loss, 1,030 rows": {"us": 30.0, "gb_s": 2800.0, "copy_us": 29.0, "copy_gb_s": 2900.0, "share": 0.97}}},
        "ncu": {"kernels": {"whole_row": {"launches": 3, "us": 28.0, "percent": 88.0, "read": 43e6, "written": 42e6}}},
        "a capture that fails late": {"ok": True, "apart": 1e-7, "spread": 0.0, "steps": 40, "said": ["could not be recorded"]},
        "learn fast, 0.2 / width": {"val_loss": 4.5678, "lr": 2.6e-4, "steps": 13565, "share": 1.0, "seconds": 30.0, "curve": [(50, 8.0), (100, None)]},
    }  # fmt: skip
    for form, shift in zip(forms.FORMS, (0.0, 0.01, 0.02, 0.01, 0.02), strict=True):
        losses = [10.0 - step / 100 + shift for step in range(300)]
        found[f"steps, {form}"] = {
            "losses": losses,
            "norms": losses,
            "recompiled": 0,
            "recorded": 3,
            "said": [],
            "broken": False,
        }
    for name, result in found.items():
        results.keep(name, {"part": "speed", "seconds": 1.0, "code": "abc", "result": result})
    results.keep(
        "racecheck", {"part": "checks", "seconds": 1.0, "code": "abd", "missing": "compute-sanitizer is not installed"}
    )
    results.keep("learn default", {"part": "learn", "seconds": 1.0, "error": "RuntimeError: a | b"})
    results.leave_out("learn notebook", "it needs about 50 s, and 3 s were left")
    return results


def test_tables_and_pictures(tmp_path):
    results = h100(tmp_path)
    markdown.write(results)
    told = (tmp_path / "card.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines() if line.startswith("|")
    ]
    # computed, as docs/performance.md has them: floor 1.22 ms, likely 2.01 ms, 201 nodes packed
    assert [
        "16",
        "pack",
        "2.20",
        "1.22",
        "2.01",
        "30.0",
        "0.450",
        "16.7%",
        "2.0 / 3.0",
        "203 (201)",
        "**3.00**",
    ] in lines
    assert ["notebook", "400 in 8 turns", "420.0", "7,000", "450,000", "16.7%", "**14.0**"] in lines
    assert ["plain", "300", "10.0100", "7.1650", "1.2e-03", "1.2e-03", "0", "3", ""] in lines
    assert ["fast, 0.2 / width", "2.60e-04", "13,565", "100%", "30.0", "**4.5678**"] in lines
    assert ["a capture that fails late", "right", "1.0e-07", "0.0e+00", "could not be recorded"] in lines
    for words in (
        r"**WRONG** a\|b",
        "Invalid __global__ write",
        "compute-sanitizer is not installed",
        "it needs about 50 s",
        "2 versions of the source",
    ):
        assert words in told
    assert "Computed: 17 s at the floor, 27 s likely." in told
    said = []
    made = draw.charts(results, said.append)
    assert [path.name for path in made] == ["batches.png", "forms.png", "learn.png", "kernels.png"] and not said
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000 for path in made)
    widths = {tuple(map(len, [])) or line.count("|") for line in told.splitlines() if line.startswith("| plain")}
    assert len(widths) <= 2


def test_nothing_measured_is_nothing_said(tmp_path, monkeypatch):
    results, said = Results(tmp_path), []
    assert "##" not in markdown.text(results) and draw.charts(results, said.append) == [] and not said
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert draw.charts(results, said.append) == [] and "--part draw" in said[0]


# ---- NVIDIA's tools

NCU = """==PROF== Profiling "whole_row"
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed"
"","","usecond","Mbyte","Mbyte","%"
"0","whole_row","30.5","43.5","40","88.1"
"1","whole_row","29.5","43.5","40","90"
"2","update","1,200.25","950","800","93"
"""


def test_what_ncu_says():
    found = tools.read_ncu(NCU)
    assert found["update"] == {"launches": 1, "us": 1200.25, "percent": 93.0, "read": 950e6, "written": 800e6}
    assert found["whole_row"]["launches"] == 2 and found["whole_row"]["us"] == 30.5
    assert tools.read_ncu("==ERROR== ERR_NVGPUCTRPERM - no permission") == {}


@pytest.mark.parametrize(
    ("said", "code", "ok"),
    [
        ("========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)", 0, False),
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", 0, True),
        (
            "========= Invalid __global__ write of size 2 bytes\n=========     at update\n========= ERROR SUMMARY: 12 errors",
            7,
            False,
        ),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= ERROR SUMMARY: 10 errors", 0, False),
        ("no such device", 1, None),
    ],
)
def test_what_the_sanitizer_says(tmp_path, monkeypatch, said, code, ok):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(tools, "_program", lambda *_: 0.0)
    place = SimpleNamespace(gpu=True, device="cuda")
    if ok is None:
        with pytest.raises(RuntimeError, match=r"memcheck said nothing \(exit code 1\): no such device"):
            tools.sanitizer("memcheck", place, 20)
    else:
        found = tools.sanitizer("racecheck" if "RACECHECK" in said else "memcheck", place, 20)
        assert found["ok"] is ok and "SUMMARY" in found["summary"] and len(found["errors"]) == said.count("\n")
    with pytest.raises(Missing):
        tools.sanitizer("memcheck", SimpleNamespace(gpu=False, device="cpu"), 20)


# ---- the strongest peer


def test_the_loop_by_hand_does_what_the_strongest_trainer_does(small_model, tmp_path, monkeypatch):
    from transformers import BertTokenizer, GPT2LMHeadModel

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    tokenizer = BertTokenizer.from_pretrained(small_model)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    by_hand, trainers, begun = (GPT2LMHeadModel.from_pretrained(small_model, **off) for _ in range(3))
    lines = ["白日依山尽，黄河入海流。", "春江", "欲穷千里目", "更上一层楼，更上一层楼。"]
    batches = [peers.tokenized(tokenizer, lines[at : at + 2]) for at in (0, 2)] * 2
    peers.loop(by_hand, tokenizer, batches, folder=tmp_path, batch_size=2, lr=1e-3)
    flags = {**peers.strongest("cpu"), "torch_compile": False}
    peers.train(
        trainers,
        tokenizer,
        batches,
        folder=tmp_path,
        batch_size=2,
        lr=1e-3,
        max_steps=4,
        lr_scheduler_type="constant",
        **flags,
    )
    assert_trained_alike(by_hand, trainers)
    pairs = zip(by_hand.parameters(), begun.parameters(), strict=True)
    moved = max((one - before).abs().max().item() for one, before in pairs)
    assert moved > 1e-3
    assert peers.strongest("cuda")["bf16"] and peers.strongest("cuda")["torch_compile"]
