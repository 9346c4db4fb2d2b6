"""The pretend GPU itself: what a driver forbids is refused here, what it allows is not, and memory and devices are counted."""

import threading

import pytest
import torch
from pretend import parse

from fastpoem.engine.graphs import end_failed


def capture(tape, inside, mode="global", before=lambda: None):
    """(the error of capturing `inside` in a stream of its own or None, the log)"""
    before()
    torch.cuda.synchronize()
    tape.take()
    graph, pool, error = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), None
    try:
        with torch.cuda.graph(graph, pool, capture_error_mode=mode):
            inside()
    except RuntimeError as found:
        error = str(found).splitlines()[0]
    log = tape.take()
    if error:
        end_failed(graph, pool, torch.device("cuda", torch.cuda.current_device()))
    return error, log, graph


def done_outside(log):
    """What was done at once beside a capture. (PyTorch 2.11 writes down the generator's seed before each.)"""
    return [entry for entry in log.done if "FillFunctorIl" not in entry.words[1]]


@pytest.fixture
def x():
    return torch.ones(64, 64, device="cuda")


def elsewhere(call):
    """Run in another thread; raises what it raises."""
    found = []

    def run():
        try:
            call()
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if found:
        raise found[0]


def test_operations_are_logged_by_kind(x, tape):
    y = x @ x
    y.add_(1)
    x[0].copy_(y[0])
    host = y.cpu()
    z = host.pin_memory().to("cuda", non_blocking=True)
    log = tape.take()
    (product,) = log.products  # by the second name from torch 2.15 on
    assert product.words[0] in ("cublasSgemm", "cublasGemmEx") and product.values["k"] == "64"
    assert len(log.launches) == 1 and "add" in log.launches[0].words[1].lower()
    assert [(copy.way, copy.pageable, copy.bytes) for copy in log.copies] == [
        ("D2D", False, 256), ("D2H", True, 16384), ("H2D", False, 16384),
    ]  # fmt: skip
    assert log.waits and not log.refused and log.pinned
    del z


def test_fills_and_copies_are_done_and_nothing_else_is(x):
    for value, dtype in (
        (1.5, torch.float32),
        (3, torch.int64),
        (-2.0, torch.bfloat16),
        (True, torch.bool),
        (1.5, torch.double),
    ):
        assert torch.full((33,), value, dtype=dtype, device="cuda").tolist() == [value] * 33
    assert torch.arange(5).cuda().cpu().tolist() == [0, 1, 2, 3, 4]
    x.mul_(5)
    assert x[0, 0].item() == 1


def test_a_capture_counts_its_nodes_and_does_nothing_until_launched(tape, x):
    source, goal = torch.ones(8, device="cuda"), torch.zeros(8, device="cuda")
    error, log, graph = capture(tape, lambda: (goal.copy_(source), goal.add_(1), x @ x))
    assert error is None and [(one.nodes, one.failed) for one in log.captures] == [(3, False)] and not done_outside(log)
    assert goal.tolist() == [0] * 8
    tape.take()
    graph.replay()
    log = tape.take()
    assert len(log.done) == 1 and log.graph_launches[0].values["nodes"] == "3" and not log.waits
    assert goal.tolist() == [1] * 8


def test_products_of_every_kind_are_captured(tape):
    """Those with a bias go through cuBLASLt, which is told the stream itself."""
    x = torch.ones(64, 768, device="cuda", dtype=torch.bfloat16)
    weight, bias = x.new_ones(768, 768), x.new_ones(768)
    torch.addmm(bias, x, weight)
    tape.take()
    error, log, _ = capture(tape, lambda: (torch.addmm(bias, x, weight), x @ weight, torch.bmm(x[None], weight[None])))
    assert error is None and log.captures[0].nodes == 3 and not done_outside(log)


FORBIDDEN = {
    "item": lambda x: x.sum().item(),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "event": lambda x: (event := torch.cuda.Event(), event.record(), event.synchronize()),
    "default stream's event": lambda x: torch.cuda.default_stream().synchronize(),
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_capture_forbids_is_refused_and_leaves_no_graph(tape, x, what):
    FORBIDDEN[what](x)  # fine outside
    error, log, _ = capture(tape, lambda: FORBIDDEN[what](x))
    assert error and log.refused and [one.failed for one in log.captures] == [True]
    x.add_(1)
    torch.cuda.synchronize()  # and nothing is left of it


def test_other_threads_are_held_to_the_mode_of_the_capture(tape, x):
    """cudaThreadExchangeStreamCaptureMode: a thread may be refused what another is allowed, and that spoils a global capture."""
    event = torch.cuda.Event()
    event.record()
    error, log, _ = capture(tape, lambda: (x.add_(1), elsewhere(event.synchronize)))
    assert error and "another thread" in str(log.refused[0])
    error, log, _ = capture(tape, lambda: (x.add_(1), elsewhere(event.synchronize)), mode="thread_local")
    assert error is None and not log.refused and log.captures[0].nodes == 1
    error, log, _ = capture(tape, lambda: (x.add_(1), event.synchronize()), mode="thread_local")
    assert error and "this thread" in str(log.refused[0])
    error, log, _ = capture(tape, lambda: (x.add_(1), event.synchronize()), mode="relaxed")
    assert error is None and not log.refused
    error, log, _ = capture(tape, lambda: torch.cuda.synchronize(), mode="relaxed")
    assert error  # relaxed or not


def test_work_of_other_threads_in_other_streams_is_not_captured(tape, x):
    side = torch.cuda.Stream()

    def save():
        with torch.cuda.stream(side):
            x.cpu()

    error, log, _ = capture(tape, lambda: (x.add_(1), elsewhere(save)), mode="thread_local")
    assert error is None and log.captures[0].nodes == 1 and [copy.way for copy in log.copies] == ["D2H"]


def test_side_streams_join_a_capture_by_events_and_must_be_joined(tape, x):
    capture(tape, lambda: None)  # there is a stream for captures, and new ones come from a ring that it is in
    side = next(one for one in map(torch.cuda.Stream, [0] * 33) if one != torch.cuda.graph.default_capture_stream)

    def fork(join, outside=None):
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            x.mul_(2)
        if join:
            here.wait_stream(side)
        if outside is not None:
            here.wait_event(outside)

    error, log, _ = capture(tape, lambda: (x.add_(1), fork(True)))
    assert error is None and log.captures[0].nodes == 2
    error, log, _ = capture(tape, lambda: (x.add_(1), fork(False)))
    assert error and "not joined" in str(log.refused[0])
    outside = torch.cuda.Event()
    outside.record()
    error, log, _ = capture(tape, lambda: (x.add_(1), fork(True, outside)))
    assert error and "outside of the capture" in str(log.refused[0])
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.current_stream().wait_stream(side)
    assert not tape.take().refused


def test_a_kernel_that_is_first_launched_in_a_capture_is_refused(tape):
    import triton
    import triton.language as tl

    @triton.jit
    def doubled(at, N: tl.constexpr):
        tl.store(at + tl.arange(0, N), tl.load(at + tl.arange(0, N)) * 2)

    y = torch.ones(16, device="cuda")
    error, log, _ = capture(tape, lambda: doubled[(1,)](y, 16))
    assert error and "cuModuleLoadData" in str(log.refused[0])
    doubled[(1,)](y, 16)
    error, log, _ = capture(tape, lambda: doubled[(1,)](y, 16))
    assert error is None and [entry.words[:2] for entry in log.captures[0].operations] == [("triton", "doubled")]


def test_memory_is_counted_and_runs_out(tape):
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    block = torch.empty(3 << 30, dtype=torch.uint8, device="cuda")
    assert torch.cuda.mem_get_info() == (free - (3 << 30), total) and total == 80 << 30
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(total, dtype=torch.uint8, device="cuda")
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] == free


def test_a_graph_that_outlives_its_memory_is_caught(tape, x):
    kept = [torch.ones(32 << 20, dtype=torch.uint8, device="cuda")]
    goal = torch.zeros(8, dtype=torch.uint8, device="cuda")
    _, _, graph = capture(tape, lambda: goal.copy_(kept[0][:8]))
    graph.replay()
    kept.clear()
    torch.cuda.empty_cache()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        graph.replay()


def test_the_log_is_read_as_it_is_written():
    lines = [
        "# step 1", "L triton k grid=1,1,1 block=32 shared=0 device=0 stream=0 capture=0",
        "M cudaMemcpyAsync D2H pageable 8 device=0 stream=3 capture=0", "# step 2",
        "C begin capture=4 stream=5 device=0 mode=global", "G cublasSgemm m=1 n=2 k=3 device=0 stream=5 capture=4",
        "X cudaMalloc: this thread is capturing", "C end capture=4 graph=1 nodes=1 failed",
    ]  # fmt: skip
    parts = parse(lines).split()
    assert [*parts] == ["", "step 1", "step 2"]
    assert (
        len(parts["step 1"].launches) == 1 and parts["step 1"].copies[0].stream == 3 and len(parts["step 1"].waits) == 1
    )
    (one,) = parts["step 2"].captures
    assert one.failed and len(one.operations) == 1 and not parts["step 2"].done and len(parts["step 2"].refused) == 1
