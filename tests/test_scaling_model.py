"""Many GPUs on paper: the laws of the model, figures worked out by hand, and docs/scaling.md as the program prints it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import budget, collectives, gloo, scaling
from benchmarks.collectives import CLUSTERS, all_gather, all_reduce, ring, tree
from benchmarks.scaling import GPUS, REAL, WAYS
from tests.runs import ENVIRONMENT

PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
NVLINK, ONE_ADAPTER, PCIE = CLUSTERS
clusters = pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda one: one.name)
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@clusters
@ways
def test_one_gpu_is_the_budgets(way, cluster):
    for poems in scaling.BATCHES:
        one = way(poems, 1, cluster)
        assert one.total == pytest.approx(budget.likely(REAL, poems, cluster.card, budget.INPUTS)) and one.exchange == 0


def test_a_ring_by_hand():
    """2 * 7 waits, and 7/8 of the bytes twice. Through two machines 14 of the 15 waits of a pass are inside one."""
    assert ring(NVLINK, 8, 3.7e9, 2) == pytest.approx(8.4e-6 + 2 * (7 * 3.4e-6 + 7 / 8 * 0.010))
    assert ring(ONE_ADAPTER, 16, 4.7e9, 1) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6 + 15 / 16 * 0.100)
    assert ring(PCIE, 2, 2.8e9, 2) == pytest.approx(8.4e-6 + 2 * (5.7e-6 + 0.050))


def test_a_tree_by_hand():
    """Up and down 7 links inside a machine and log2(128) between them; short messages by LL128."""
    assert tree(NVLINK, 1024, 0) == pytest.approx(14e-6 + 2 * (7 * 1.25e-6 + 7 * 8.5e-6))
    assert tree(PCIE, 8, 2.8e9 * 0.92) == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + 0.100))


def test_nccl_takes_the_faster():
    large, small = 2e9, 1e3
    assert all_reduce(NVLINK, 8, large) == ring(NVLINK, 8, large, 2) < tree(NVLINK, 8, large)
    assert all_reduce(NVLINK, 1024, small) == tree(NVLINK, 1024, small) < ring(NVLINK, 1024, small, 2)


@clusters
def test_the_exchange_grows_with_gpus_and_bytes(cluster):
    for collective in (all_reduce, all_gather):
        by_gpus = [collective(cluster, gpus, 2e8) for gpus in GPUS]
        assert by_gpus[0] == 0 and by_gpus == sorted(by_gpus)
        for gpus in GPUS[1:]:
            by_size = [collective(cluster, gpus, size) for size in (1e3, 1e6, 1e8, 1e9)]
            assert by_size == sorted(by_size)


@clusters
@ways
def test_a_share_never_computes_more_than_a_larger_one(way, cluster):
    for poems in scaling.BATCHES:
        compute = [way(poems, gpus, cluster).compute for gpus in GPUS[1:] if gpus <= poems]
        assert compute == sorted(compute, reverse=True)


def test_zero1_divides_the_update_and_sends_three_quarters():
    for gpus in GPUS[1:]:
        whole, part = scaling.replicated(8192, gpus, NVLINK), scaling.zero1(8192, gpus, NVLINK)
        assert part.update == pytest.approx(whole.update / gpus) and part.compute == whole.compute
    whole, part = scaling.replicated(128, 8, PCIE), scaling.zero1(128, 8, PCIE)
    assert part.exchange / whole.exchange == pytest.approx(6 / 8, rel=0.02)


def test_a_divided_step_updates_by_what_the_engine_moves():
    """An fp32 gradient of 4 bytes, read for the norm and again for AdamW, where an undivided step reads one of 2 bytes."""
    undivided, divided = scaling.alone(16, NVLINK.card).update, scaling.replicated(16, 2, NVLINK).update
    assert divided / undivided == pytest.approx((28 + 2 + 4) / (28 + 2))


FREE = dict.fromkeys(("forward", "head", "backward", "gather", "gather_root", "scatter", "scatter_root"), 0.0)


def test_fsdp_hides_what_it_can():
    compute = FREE | {"forward": 2.0, "head": 3.0, "backward": 4.0}
    assert scaling.simulated(6, **compute) == 6 * 2 + 3 + 6 * 4
    link = FREE | {"gather": 1.0, "scatter": 2.0, "gather_root": 5.0, "scatter_root": 7.0}
    assert scaling.simulated(6, **link) == 5 + 6 * 1 + 6 * 1 + 6 * 2 + 7
    # The link is faster than a layer: what cannot be hidden is the first gather and the last reduction.
    both = compute | {"gather": 1.0, "scatter": 2.0, "gather_root": 5.0, "scatter_root": 7.0}
    assert scaling.simulated(6, **both) == (5 + 1) + (6 * 2 + 3 + 6 * 4) + (2 + 7)


@clusters
def test_fsdp_is_no_faster_than_its_parts(cluster):
    for poems, gpus in ((16, 2), (1024, 8), (8192, 64), (8192, 1024)):
        step = scaling.fsdp(poems, gpus, cluster)
        gathers = 2 * all_gather(cluster, gpus, 2 * scaling.PARAMETERS) * 0.8  # the root only once
        assert step.exchange > 0 and step.total > max(step.compute, gathers)


@clusters
@ways
def test_a_threshold_is_the_first_batch(way, cluster):
    for gpus in (2, 8, 64):
        for least in (1 / gpus, 0.5, 0.9):
            found = scaling.from_which(way, gpus, cluster, least)
            assert scaling.efficiency(way, found, gpus, cluster) > least
            assert found == gpus or scaling.efficiency(way, found - gpus, gpus, cluster) <= least
    shares = [scaling.efficiency(way, poems, 16, cluster) for poems in (16, 64, 256, 1024, 4096, 16384)]
    assert shares == sorted(shares)  # so that it is a threshold


@clusters
def test_the_page_has_these_tables(cluster):
    for table in (scaling.exchanges(cluster), scaling.sweep(cluster), scaling.thresholds(cluster)):
        assert table in PAGE, f"{cluster.name}: run python -m benchmarks.scaling"


def test_the_page_has_the_models_figures():
    for figure in (f"{NVLINK.rate} GB/s", f"{PCIE.rate} GB/s", f"{collectives.NIC:.0f} GB/s"):
        assert figure in PAGE


def test_processes_that_share_a_core_take_turns():
    rounds = [gloo.Round(0.100, 0.250, 0.050, 0.300), gloo.Round(0.200, 0.350, 0.050, 0.500)]
    row = "| 4 | 1 | 4 | 150 | 300 | 50 | 350 | 400 | 1.16 (1.11 to 1.20) | 1.12 (1.00 to 1.25) |"
    assert gloo.line(4, rounds, 2) == row
    assert gloo.HEAD in PAGE and gloo.HEAD.count("|") == 2 * row.count("|")


@pytest.mark.parametrize("way, gpus", [("replicated", 1), ("replicated", 8)])
def test_the_pages_first_figure(way, gpus):
    """At the default batch of 16 more GPUs are slower."""
    took = 1e3 * WAYS[way](16, gpus, NVLINK).total
    assert f"{took:.2f}" in PAGE.split("## How")[0] and took >= 1e3 * scaling.alone(16, NVLINK.card).total


def test_what_the_page_says_of_the_ways():
    for cluster in CLUSTERS:
        for poems, gpus in ((poems, gpus) for poems in scaling.BATCHES for gpus in GPUS[1:] if gpus <= poems):
            took = {name: way(poems, gpus, cluster).total for name, way in WAYS.items()}
            assert (took["ZeRO-1"] < took["replicated"]) == (gpus <= 256)
            assert gpus < 256 or took["FSDP"] == max(took.values())
            if cluster is NVLINK and gpus <= 16 and poems // gpus >= 64:
                assert took["FSDP"] == min(took.values())


def test_real_steps_are_timed_beside_their_parts(tmp_path):
    """What --measure starts, with a small model and one round."""
    program = tmp_path / "program.py"
    program.write_text(
        "import dataclasses\n"
        "from benchmarks import gloo\n"
        "gloo.SHAPE = dataclasses.replace(gloo.SHAPE, n_layer=1, n_embd=8, n_head=1, vocab_size=99)\n"
        "gloo.ROUNDS = gloo.STEPS = 1\n"
        "gloo.work()\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    ((*times,),) = json.loads(done.stdout)
    assert len(times) == 4 and all(0 < one < 60 for one in times)
