"""Compilation without a GPU: what the kernels cost on each architecture, held to a line."""

import json

import pytest
from fastpoem_kernels.dispatch import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from fastpoem_kernels import aot

SWEEPS = ("whole_row", "looped_row", "scale_unless_one", "partial_squares", "update")  # the kernels that move the bulk


@pytest.fixture(autouse=True, scope="module")
def _compile_afresh(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def assert_holds_the_line(record):
    name, widths = record["kernel"], record["accesses"]
    assert record["f64_instructions"] == 0, name
    assert record["spill_bytes"] <= 16, name
    assert 0 < record["registers"] <= 65536 // (32 * record["warps"]), name
    if name.startswith(SWEEPS):
        assert widths["LDG.128"] >= 2, name
        scalars = 5 if name.startswith("update") else 3  # step's scalars; target, its logit and 1 / valid
        assert (
            sum(count for kind, count in widths.items() if kind.startswith("LDG") and kind != "LDG.128") <= scalars
        ), name
        assert sum(count for kind, count in widths.items() if kind.startswith("STG") and kind != "STG.128") <= 2, name
        if "evaluate" not in name and not name.startswith("partial"):
            assert widths["STG.128"] >= 2, name
        assert record["share_of_least"] == (0.667 if name.startswith("looped") and "evaluate" not in name else 1.0), (
            name
        )


def test_the_command_writes_every_kernel(tmp_path, capsys):
    assert aot.main(["--arch", "sm_90", "--out", str(tmp_path / "new" / "folder")]) == 0
    written = json.loads((tmp_path / "new" / "folder" / "resources.json").read_text())["kernels"]
    assert {r["kernel"].removesuffix("_evaluate").rsplit("_bf16")[0] for r in written} >= {
        *SWEEPS,
        "count_targets",
        "add_rows",
    }
    printed = capsys.readouterr().out
    for record in written:
        assert_holds_the_line(record)
        assert record["kernel"] in printed
        for ending, start in ((".ptx", b"//"), (".cubin", b"\x7fELF"), (".sass", b"\t.")):
            file = tmp_path / "new" / "folder" / f"{record['kernel']}.sm_90{ending}"
            assert file.read_bytes().startswith(start), file


FP32 = ("whole_row_fp32", "partial_squares_fp32", "update_fp32")


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        (75, ("whole_row_fp16", "looped_row_fp16", "update_fp16", *FP32)),
        *((arch, ("whole_row_bf16", "looped_row_bf16", "update_bf16")) for arch in (80, 100)),
        *(pytest.param(arch, FP32, marks=pytest.mark.slow) for arch in (80, 100)),  # as on sm_75 and sm_90
    ],
)
def test_training_kernels_hold_the_line_elsewhere(arch, wanted):
    built = [aot.build(launch, arch) for launch in aot.launches() if launch.name in wanted]
    assert len(built) == len(wanted)
    for record in built:
        assert_holds_the_line(record)


def test_the_line_can_be_crossed():
    """A row stride that Triton does not know at compile time makes every access two bytes wide, and the record shows it."""
    launch = next(launch for launch in aot.launches() if launch.name == "whole_row_bf16")
    unaligned = launch._replace(aligned=())
    record = aot.build(unaligned, 90)
    assert record["accesses"].get("LDG.128", 0) == 0
    assert record["accesses"]["LDG.U16"] > 20
    with pytest.raises((AssertionError, KeyError)):
        assert_holds_the_line(record)


def test_reads_access_widths():
    sass = """
        /*0130*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0140*/  LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0150*/  LDG.E.U16 R9, desc[UR4][R6.64] ;
        /*0160*/  LDG.E R9, desc[UR4][R6.64] ;
        /*0170*/  STG.E.64 desc[UR4][R6.64], R8 ;
        /*0180*/  STS.128 [R6], R8 ;
    """
    assert aot.accesses(sass) == {"LDG.128": 2, "LDG.32": 1, "LDG.U16": 1, "STG.64": 1}


@pytest.mark.parametrize("arch", ["sm90", "90", "sm_90;sm_80", ""])
def test_refuses_a_list_that_is_none(arch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        aot.main(["--arch", arch, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "sm_80,sm_90,sm_100" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
