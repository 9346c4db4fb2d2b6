"""A step in parts, among processes and micro-batches: the numbers of the whole one. The processes are simulated one after the other here, each
with a model of its own; tests/test_torchrun.py has real ones."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fastpoem_kernels import gradient_norm
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpoem.corpus.feed import Feed, share, size_of_share
from fastpoem.corpus.plan import Step
from fastpoem.corpus.store import TokenStore, prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.exact import Tree
from fastpoem.engine.graphs import Graphs
from fastpoem.engine.optim import ALIGN, FlatAdamW
from fastpoem.engine.step import Pieces, Sums, TrainStep, evaluate
from fastpoem.engine.world import World
from fastpoem.errors import Ended
from fastpoem.model.dropout import Masks
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.hub import BUNDLED

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "store"
    prepare_store(BUNDLED / "poems.txt", PoemTokenizer.load(BUNDLED / "model"), folder, buckets=4)
    return TokenStore.open(folder)


def batches(store, poems, steps, seed):
    """So many batches of `poems` poems whatever their length, by `seed`."""
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        bucket = generator.integers(0, len(store.buckets), poems)
        index = np.array([generator.integers(0, store.buckets[one].rows) for one in bucket])
        yield Step(store.buckets[bucket.max()].length, bucket, index)


def make(
    store, poems, *, parts=1, accumulate=1, pad_targets=False, dropout=0.3, max_norm=1.0, dtype=torch.float32, **slices
):
    """The step of one process; of a divided one, what is summed is left to the test."""
    model = GPT2(
        GPT2Config(store.vocab_size, 80, 16, 2, 2, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    )
    model.initialise(0)
    optimizer = FlatAdamW(model.train(), CPU, dtype, weight_decay=0.01, max_norm=max_norm, **slices)
    poems = size_of_share(poems, parts)
    source = torch.zeros(poems * store.buckets[-1].length, dtype=torch.int16)
    divided = dict(reduce=World().reduce, accumulate=accumulate) if parts > 1 else {}
    return TrainStep(
        Pieces.plain(model, CPU),
        optimizer,
        source,
        poems=poems,
        pad_id=store.pad_id,
        pad_targets=pad_targets,
        **divided,
    )


def together(steps, feed, batch, accumulate, key, lr=1e-2, spoil=None):
    """One step of all processes. spoil: is given each process's sums before they are added up."""
    parts = len(steps) * accumulate
    for rank, step in enumerate(steps):
        for part in range(rank * accumulate, (rank + 1) * accumulate):
            rows = feed(batch, part, parts)
            step.masks = Masks(key, rows.first)
            step.send(rows, lr)
            step.micro(rows.shape)
        if spoil is not None:
            spoil(step, rank)
    total = sum(step.sums.flat for step in steps)
    for step in steps:
        step.sums.flat.copy_(total)
        step.update()


KINDS = [("bucket", False), ("pack", False), ("pad", False), ("pad", True)]


@settings(max_examples=40)
@given(
    poems=st.integers(1, 9), ranks=st.integers(1, 4), accumulate=st.integers(1, 3), kind=st.sampled_from(KINDS),
    rounded=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_division_has_the_numbers_of_the_whole(store, poems, ranks, accumulate, kind, rounded, seed):
    parts = ranks * accumulate
    if not 1 < parts <= poems:
        return
    pad_targets, feed = kind[1], Feed(store, kind[0], rounded)
    whole = make(store, poems, pad_targets=pad_targets)
    steps = [make(store, poems, parts=parts, accumulate=accumulate, pad_targets=pad_targets) for _ in range(ranks)]
    for number, batch in enumerate(batches(store, poems, 3, seed)):
        whole(feed(batch), 1e-2, key=number)
        together(steps, feed, batch, accumulate, number)
        mine, theirs = whole.result(), steps[0].result()
        assert theirs.loss == pytest.approx(mine.loss, rel=1e-6) and theirs.norm == pytest.approx(mine.norm, rel=1e-5)
        assert (theirs.correct, theirs.counted, theirs.skipped) == (mine.correct, mine.counted, mine.skipped)
    assert torch.equal(steps[0].account.losses, steps[-1].account.losses)
    for step in steps:
        assert torch.equal(step.optimizer.master, steps[0].optimizer.master)
    # Adam makes the rounding of a gradient near zero as large as its rate.
    apart = (whole.optimizer.master - steps[0].optimizer.master).abs()
    assert (apart > 1e-4).float().mean() < 0.01 and apart.max() < 0.04


def test_shares_are_as_equal_as_can_be():
    for poems in range(1, 40):
        for parts in range(1, poems + 1):
            sizes = [len(range(poems)[share(poems, part, parts)]) for part in range(parts)]
            assert sum(sizes) == poems and max(sizes) - min(sizes) <= 1 and max(sizes) == size_of_share(poems, parts)


def average(step, rank):
    step.sums.flat.mul_(0.5)


def clip_first(step, rank):
    step.sums.gradient.mul_(min(1.0, 0.1 / step.sums.gradient.norm().item()))


def one_mask_for_all(step, rank):
    """As if each process took its first poem for the step's: a second backward pass with that mask in place of the right one."""
    step.sums.flat.zero_()
    step.masks = step.masks._replace(first=0)
    step.micro(step.sent)


@pytest.mark.parametrize("fault", ["none", "average", "local count", "clip first", "one mask for all"])
def test_what_goes_wrong_elsewhere_is_seen(store, fault, monkeypatch):
    """The control of the law above: losses of the whole against those with a planted fault."""
    clip = 0.1 if fault == "clip first" else 1.0
    whole = make(store, 6, max_norm=clip)
    steps = [make(store, 6, parts=2, max_norm=clip) for _ in range(2)]
    feed = Feed(store, "bucket")
    if fault == "local count":
        monkeypatch.setattr("fastpoem.corpus.feed.Rows.share", lambda rows, pad_targets: 0.5)
    for step in steps:
        micro = step.micro
        step.micro = lambda shape, step=step, micro=micro: (setattr(step, "sent", shape), micro(shape))
    spoil = {"average": average, "clip first": clip_first, "one mask for all": one_mask_for_all}.get(fault)
    norms = []
    for number, batch in enumerate(batches(store, 6, 3, 5)):
        whole(feed(batch), 1e-2, key=number)
        together(steps, feed, batch, 1, number, spoil=spoil)
        norms.append(abs(steps[0].result().norm / whole.result().norm - 1))
    assert (max(norms) < 1e-5) is (fault == "none"), norms


def test_what_is_not_finite_anywhere_is_skipped_everywhere(store):
    steps = [make(store, 4, parts=2) for _ in range(2)]
    before = steps[0].optimizer.master.clone()

    def spoil(step, rank):
        if rank == 1:
            step.sums.gradient[3] = torch.inf

    (batch,) = batches(store, 4, 1, 0)
    together(steps, Feed(store, "bucket"), batch, 1, 0, spoil=spoil)
    for step in steps:
        assert step.result().skipped and torch.equal(step.optimizer.master, before) and not step.sums.counts.any()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replayed_in_parts(store, accumulate, dtype):
    """The discipline of recordings, with an update recorded once: what a part leaves is spoiled where nothing may read it."""
    plain, replayed = (make(store, 7, parts=6, accumulate=accumulate, dtype=dtype) for _ in range(2))
    graphs = Graphs(replayed, print)
    replayed.launch, replayed.launch_update = graphs, graphs.update
    feed = Feed(store, "bucket", rounded=True)
    shapes = [feed(batch, 0, 6).shape for batch in batches(store, 7, 2, 1)]
    before = replayed.optimizer.master.clone()
    graphs.record(shapes)
    assert torch.equal(replayed.optimizer.master, before) and not replayed.sums.flat.any()
    for number, batch in enumerate(batches(store, 7, 4, 1)):
        for step in (plain, replayed):
            step.parts([feed(batch, part, 6) for part in range(accumulate)], 1e-2, key=number)
    assert torch.equal(plain.optimizer.master, replayed.optimizer.master)
    assert torch.equal(plain.account.sums, replayed.account.sums) and plain.totals().skipped == 0


def test_a_part_that_fails_is_told_and_raised(store):
    step, told = make(store, 4, parts=2), []
    step.reduce = lambda sums, error: told.append(error) or World().reduce(sums, error)
    feed, (batch,) = Feed(store, "bucket"), batches(store, 4, 1, 0)
    step.micro = lambda shape: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(feed(batch, 0, 2), 1e-2)
    assert isinstance(told[0], ZeroDivisionError)


def test_what_processes_tell_one_another():
    world = World(rank=1, size=4)
    world._hear(torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 1.0]))  # SIGINT to one, SIGTERM to two
    assert world.told == (2, True)
    world._hear(torch.zeros(6))
    assert world.told == (None, False)
    with pytest.raises(Ended, match="process 2 of 4 failed in this step, and said why"):
        world._hear(torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0, 0.0]))
    world._hear(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 0.0]))  # itself: its own error is raised


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_validation_does_not_depend_on_how_many_share_it(store, size):
    model, feed = make(store, 4).optimizer.module, Feed(store, "bucket")
    rows = [feed(batch) for batch in batches(store, 3, 4, 2)]
    of = lambda rank: [one if number % size == rank else None for number, one in enumerate(rows)]
    parts = []
    for rank in range(size):
        evaluate(model, of(rank), CPU, store.pad_id, add_up=lambda tensor: parts.append(tensor) or tensor)
    found = evaluate(model, of(0), CPU, store.pad_id, add_up=lambda tensor: sum(parts))
    assert found == evaluate(model, rows, CPU, store.pad_id)


class Threads:
    """Processes as threads that meet for each collective: what `World` gives to `Tree`."""

    def __init__(self, rank, size, meeting, table):
        self.rank, self.size, self._meeting, self._table = rank, size, meeting, table

    def _all(self, value):
        self._table[self.rank] = value
        self._meeting.wait()
        found = list(self._table)
        self._meeting.wait()
        return found

    def exchange(self, tensor, sizes):
        found = [one[self.rank] for one in self._all(tensor)]
        assert [len(one) for one in found] == list(sizes)
        return torch.cat(found)

    def gather(self, tensor, mine):
        tensor.copy_(torch.cat(self._all(tensor[mine])))

    def add_up(self, tensor):
        return tensor.copy_(sum(self._all(tensor.clone())))


def exact_sum(parts, ranks):
    """Of the shards (S, n), by so many processes; with what each hears."""
    meeting, table = threading.Barrier(ranks, timeout=60), [None] * ranks

    def one(rank):
        tree, sums = Tree(len(parts), Threads(rank, ranks, meeting, table)), Sums.of(torch.zeros(parts.shape[1]))
        for _ in range(2):  # the second in memory that the first left
            for shard in tree.mine:
                tree.keep(parts[shard])
            sums.told.copy_(torch.eye(6)[rank % 6])
            tree.total(sums)
            assert len(tree._free) <= 5  # whatever was taken comes back, and is enough for the next
        assert len({one.data_ptr() for one in tree._free}) == len(tree._free)
        return sums

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


@settings(max_examples=40, deadline=None)
@given(power=st.integers(0, 3), ranks=st.integers(1, 8), size=st.integers(ALIGN, 300), seed=st.integers(0, 99))
def test_exact_sums_do_not_depend_on_who_adds(power, ranks, size, seed):
    shards, ranks = 1 << power, min(ranks, 1 << power)
    parts = torch.randn(shards, size, generator=torch.Generator().manual_seed(seed))
    parts[:, -ALIGN + 4 : -ALIGN + 10] = 0  # told
    tree = [*parts]
    while len(tree) > 1:
        tree = [left + right for left, right in zip(tree[::2], tree[1::2], strict=True)]
    for sums in exact_sum(parts, ranks):
        told = sums.told.clone()
        sums.told.zero_()
        assert torch.equal(sums.flat, tree[0])
        assert ranks == 1 or told.tolist() == [float(one < ranks) for one in range(6)] or ranks > 6


def test_other_orders_would_not_be_exact():
    """The control of the law above: sums of these numbers do depend on their order."""
    parts = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(parts.sum(0), exact_sum(parts, 1)[0].flat)


@pytest.mark.parametrize("fault", ["none", "masks of its own", "not the global count", "skipped by its own loss"])
def test_a_shard_that_goes_its_own_way_is_not_exact(store, fault):
    """Three processes against one, with a planted fault in the last shard."""
    (batch,) = batches(store, 8, 1, 3)
    feed, shards = Feed(store, "bucket"), []
    for wrong in (False, fault != "none"):
        step, found = make(store, 8, parts=4), []
        for part in range(4):
            rows, is_wrong = feed(batch, part, 4), wrong and part == 3
            step.masks = Masks(6 if is_wrong and fault == "masks of its own" else 5, rows.first)
            if is_wrong and fault == "not the global count":
                rows = rows._replace(step=(rows.step[0] - 1, rows.step[1]))
            step.send(rows, 1e-2)
            step.micro(rows.shape)
            if is_wrong and fault == "skipped by its own loss":
                step.sums.flat.zero_()
            found.append(step.sums.flat.clone())
            step._begin_sums()
        shards.append(torch.stack(found))
    one, three = exact_sum(shards[0], 1)[0], exact_sum(shards[1], 3)[0]
    assert torch.equal(one.gradient, three.gradient) is (fault == "none")
    assert fault != "none" or (one.loss == three.loss and torch.equal(one.counts, three.counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count, off", [(2, 0), (3, 0), (5, 0), (3, ALIGN)])
def test_slices_of_an_update_are_the_whole(store, dtype, count, off):
    """Bit for bit, in each precision. off: a slice that begins too late is seen."""
    steps = [make(store, 4, parts=2, dtype=dtype, slices=(0, count)) for _ in range(1 + count)]
    whole, parts = steps[0].optimizer, []
    for rank, step in enumerate(steps[1:]):
        step.optimizer = make(store, 4, dtype=dtype, slices=(rank, count), divided=True).optimizer
        parts.append(step.optimizer)
    if off:
        parts[1].mine = slice(parts[1].mine.start + off, parts[1].mine.stop + off)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        grad = torch.randn(len(whole.working), generator=generator)
        grad[whole.used :] = 0
        if number == 1:
            grad[0] = torch.nan
        for step in steps:
            step.message.view(torch.float64)[-1, 0] = 1e-2
            step.sums.gradient.copy_(grad)
            step.sums.counts.fill_(1)
            step.sums.norm.copy_(gradient_norm(step.sums.gradient[: whole.used]))
            step.update()
        working = torch.cat([one.working[one.mine] for one in parts])
        for one in parts:
            one.working.copy_(working)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(one, name) for one in parts])) is not bool(off)
    assert torch.equal(whole.working, parts[-1].working) is not bool(off)
    assert steps[0].account.sums.tolist() == steps[-1].account.sums.tolist() and steps[0].totals().skipped == 1
