"""engine/: batches made on the device, and a step that can be replayed: nothing stale, nothing asked of the device, one compiled form."""

import ast
import contextlib
import gc
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastpoem.engine
from fastpoem.corpus.feed import SLOT, Feed, Rows, Shape
from fastpoem.corpus.plan import Step, TextOrder
from fastpoem.corpus.store import TokenStore, prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.batch import IGNORE, assemble
from fastpoem.engine.compile import compiled_pieces, forms
from fastpoem.engine.graphs import Graphs, nothing_collected
from fastpoem.engine.optim import FlatAdamW
from fastpoem.engine.step import Pieces, TrainStep
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.hub import BUNDLED

CPU = torch.device("cpu")
VOCABULARY = 101


def make(backend=None, dtype=torch.float32, dropout=0.2, longest=16, batch=4):
    """A step whose model is drawn from seed 0."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(VOCABULARY, 32, 16, 2, 2, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout))
    model.initialise(0)
    optimizer = FlatAdamW(model.train(), CPU, dtype, weight_decay=0.01, max_norm=0.5)
    pieces = Pieces(model) if backend is None else compiled_pieces(model, backend)
    return TrainStep(pieces, optimizer, torch.zeros(batch * longest, dtype=torch.int16), poems=batch, pad_id=0)


def stream(count, kind="bucket", seed=0, batch=4):
    """Batches of changing shape, poems of changing length in each."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        longest = int(draw.choice([5, 9, 16]))
        lengths = draw.integers(2, longest + 1, batch)
        lengths[draw.integers(batch)] = longest
        ids = torch.from_numpy(draw.integers(1, VOCABULARY, batch * longest).astype(np.int16))
        where = torch.from_numpy(np.stack([np.arange(batch) * longest, lengths], 1))
        tokens = int(lengths.sum()) - batch
        shape = Shape(batch, longest, -(-tokens // 8) * 8 if kind == "pack" else 0)
        yield Rows(ids, where, shape, tokens)


@pytest.mark.parametrize("kind", ["bucket", "pack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replay_is_the_plain_step(kind, dtype):
    """A hundred steps of changing shape and rate, some skipped, dropout on, everything spoiled between two steps: bit for bit."""
    plain, replayed = make(dtype=dtype), make(dtype=dtype)
    replayed.launch = Graphs(replayed, print)
    spoil = {7, 8, 40}
    torch.manual_seed(1)
    for number, one in enumerate(stream(100, kind)):
        for step in (plain, replayed):
            state = torch.get_rng_state()
            pieces = step.pieces
            if number in spoil:
                step.pieces = pieces._replace(model=lambda *given, model=pieces.model: model(*given) * math.inf)
            step(one, 1e-3 * (1 + number % 3))
            step.pieces = pieces
            if step is plain:
                torch.set_rng_state(state)
        assert torch.equal(plain.account.losses.nan_to_num(), replayed.account.losses.nan_to_num()), number
    assert plain.totals() == replayed.totals() and plain.totals().skipped == 3
    assert torch.equal(plain.optimizer.master, replayed.optimizer.master)
    assert torch.equal(plain.optimizer.exp_avg_sq, replayed.optimizer.exp_avg_sq)
    assert len(replayed.launch.recorded) >= 3


@pytest.mark.parametrize("name", ["message", "source", "lr", "grad"])
def test_a_step_that_reads_what_is_stale_is_found(name):
    """The control of the test above: where one static tensor is not renewed, the spoiled one shows."""
    step, fresh = make(dropout=0.0), make(dropout=0.0)
    step.launch = Graphs(step, print)
    rows = list(stream(2))
    for one in rows:
        fresh(one, 1e-3)
    step(rows[0], 1e-3)
    if name in ("message", "source"):
        tensor = getattr(step, name)
        step.send = lambda rows, lr, send=step.send: (old := tensor.clone(), send(rows, lr), tensor.copy_(old))
    elif name == "lr":
        step.optimizer.lr = torch.full((), math.nan)
        step.work = lambda shape: None
    else:
        step.optimizer.grad[:100] = math.nan
        step.optimizer.module.transformer.wte.weight.main_grad = torch.zeros(VOCABULARY, 16)
    try:
        step(rows[1], 1e-3)
    except (IndexError, RuntimeError):
        return
    assert not torch.equal(step.optimizer.master, fresh.optimizer.master)


@pytest.mark.parametrize("kind", ["bucket", "pack", "rounded"])  # to more than this model's positions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rehearsal_changes_nothing(kind, dtype):
    step = make(dtype=dtype)
    for one in stream(3, kind.replace("rounded", "pack")):
        step(one, 1e-3)
    shape = one.shape.rounded() if kind == "rounded" else one.shape
    tensors = [*step.account, step.message, *(vars(step.optimizer)[n] for n in ("master", "exp_avg", "exp_avg_sq"))]
    tensors += [step.optimizer.applied, step.optimizer.working, *(step.optimizer.scale or ())]
    before, state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    with step.rehearsal(shape):
        step.work(shape)
        assert step.result().skipped
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["bucket", "pack"])
@pytest.mark.parametrize("where", ["assemble", "model", "account"])
def test_a_rehearsal_that_fails_in_the_middle_changes_nothing(kind, where):
    """As a recording does that fails: dropout on, twenty more steps are those of a step that never tried, bit for bit."""
    tried, never = make(), make()
    first, *rest = stream(21, kind)
    for step in (tried, never):
        torch.manual_seed(1)
        step(first, 1e-3)

    def fails(*given):
        getattr(pieces, where)(*given)
        raise ValueError(where)

    pieces, state = tried.pieces, torch.get_rng_state()
    tried.pieces = pieces._replace(**{where: fails})
    with pytest.raises(ValueError, match=where), tried.rehearsal(rest[0].shape):
        tried.work(rest[0].shape)
    tried.pieces = pieces
    for step in (tried, never):
        torch.set_rng_state(state)
        for one in rest:
            step(one, 1e-3)
    assert tried.totals() == never.totals() and torch.equal(tried.account.losses, never.account.losses)
    assert torch.equal(tried.optimizer.master, never.optimizer.master)


@contextlib.contextmanager
def collector(on):
    """It runs as often as it can, or not at all."""
    enabled, threshold = gc.isenabled(), gc.get_threshold()
    gc.collect()
    gc.set_threshold(1)
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        (gc.enable if enabled else gc.disable)()


class Garbage:
    """A cycle."""

    def __init__(self):
        self.myself = self


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_while_a_step_is_recorded(on):
    """And it is left as the user had it, also where recording fails."""
    with collector(on):
        gc.disable()
        before = weakref.ref(Garbage())
        (gc.enable if on else gc.disable)()
        with pytest.raises(ValueError), nothing_collected():
            assert (before() is None) == on
            inside = weakref.ref(Garbage())
            with nothing_collected():
                [[] for _ in range(10_000)]
            [[] for _ in range(10_000)]
            assert inside() is not None and not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == on
        [[] for _ in range(10_000)]
        assert (inside() is None) == on


@pytest.mark.parametrize("replayed", [False, True])
def test_a_step_goes_with_its_last_name(replayed):
    """What it and its graphs hold of a card is given back then and there: they are no cycle, nor part of one."""
    with collector(False):
        step = make()
        if replayed:
            step.launch = Graphs(step, print)
        for one in stream(10):
            step(one, 1e-3)
        parts = [step, step.optimizer, step.optimizer.master, step.account.sums, *([step.launch] if replayed else [])]
        parts = [weakref.ref(part) for part in parts]
        del step
        assert [part() for part in parts] == [None] * len(parts)


def test_what_does_not_fit_the_static_tensors_is_refused():
    step, (rows,) = make(), stream(1)
    with pytest.raises(ValueError, match="poems"):
        step(rows._replace(where=rows.where[:3]), 1e-3)
    with pytest.raises(ValueError, match="poems"):
        step(rows._replace(where=rows.where.int()), 1e-3)
    with pytest.raises(ValueError, match="on meta"):
        step(rows._replace(where=rows.where.to("meta")), 1e-3)
    with pytest.raises(ValueError, match="on meta"):
        step(rows._replace(source=rows.source.to("meta")), 1e-3)
    with pytest.raises(ValueError, match=r"ids \[1, "):
        step(rows._replace(source=rows.source[None]), 1e-3)
    with pytest.raises(ValueError, match="ids"):
        step(rows._replace(source=rows.source.int()), 1e-3)
    with pytest.raises(ValueError, match="ids"):
        step(rows._replace(source=torch.zeros(65, dtype=torch.int16)), 1e-3)


class NothingAsked(TorchDispatchMode):
    """Refuses what cannot be captured: operators that read the device, or whose output's size depends on what is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        bad = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        assert not bad, f"{func} cannot be captured"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["bucket", "pack"])
def test_the_step_asks_nothing_of_the_device(kind, dtype):
    """Every operator of a whole step, forward, backward and update, with the kernels' plain forms (our CPU forms may ask: they are the CPU's)."""
    from fastpoem_kernels import plain

    from fastpoem.engine.kernels import Kernels

    step = make(dtype=dtype)
    step.optimizer.kernels = Kernels(plain.cross_entropy, plain.clipped_adamw_)
    for one in stream(4, kind):
        step.send(one, 1e-3)
        with NothingAsked():
            step.work(one.shape)
    with pytest.raises(AssertionError, match="cannot be captured"), NothingAsked():
        step.account.last.sum().item()


def test_no_line_of_the_step_waits_for_the_device():
    """What a dispatch mode cannot see: `.tolist()`, `.cpu()`, `.item()`, synchronisation, in the code that a graph records."""
    waits = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero"}
    root = Path(fastpoem.engine.__file__).parent
    recorded = {
        root / "step.py": {"work", "account", "send"},
        root / "batch.py": None,
        root / "optim.py": {"step", "collect", "update"},
        root.parent / "model" / "attention.py": None,
        root.parent / "model" / "flash.py": None,
        root.parent / "model" / "gpt2.py": {"forward"},
    }
    for path, names in recorded.items():
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        functions = [n for n in functions if names is None or n.name in names]
        assert functions
        for function in functions:
            called = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
            assert not called & waits, (path.name, function.name, called & waits)


@pytest.mark.parametrize("kind", ["bucket", "pack"])
def test_one_compiled_form_serves_every_length(kind):
    """No graph break (they raise), and nothing compiled again once two lengths have been seen."""
    torch._dynamo.reset()
    step, plain = make("aot_eager", dropout=0.0), make(dropout=0.0)
    rows = list(stream(30, kind))
    sizes = sorted({one.shape for one in rows})
    assert len(sizes) >= 3
    for shape in (sizes[-1], sizes[0]):
        with step.rehearsal(shape):
            step.work(shape)
    seen = forms()
    for one in rows:
        step(one, 1e-3)
        plain(one, 1e-3)
        assert step.result().loss == pytest.approx(plain.result().loss, rel=2e-5)
    assert forms() == seen


def test_inductor_would_capture_the_compiled_step():
    """Inductor's own rule for CUDA graphs, on every graph of the compiled step, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    torch._dynamo.reset()
    found, graphs = [], []

    def look(graph, _):
        graphs.append(graph)
        found.append(get_first_incompatible_cudagraph_node(graph))
        return graph

    from functorch.compile import make_boxed_func

    step = make(
        aot_autograd(
            fw_compiler=lambda g, e: make_boxed_func(look(g, e)), bw_compiler=lambda g, e: make_boxed_func(look(g, e))
        )
    )
    for one in stream(2):
        step(one, 1e-3)
    assert len(graphs) >= 4 and found == [None] * len(found)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed")
    tokenizer = PoemTokenizer.load(BUNDLED / "model")
    prepare_store(BUNDLED / "poems.txt", tokenizer, folder / "store", buckets=4)
    return TokenStore.open(folder / "store")


@pytest.mark.parametrize("batching", ["bucket", "edges", "pad", "pack", "rounded"])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_batches_hold_the_poems(store, batching, data):
    """Sent or resident, in any batching: inputs and targets of each poem are its tokens, and everything else is ignored."""
    chosen = data.draw(st.lists(st.integers(0, store.rows - 1), min_size=1, max_size=7))
    bucket, index = store.locate(np.array(chosen))
    step = Step(store.buckets[bucket.max()].length, bucket, index)
    kind = {"edges": "bucket", "rounded": "pack"}.get(batching, batching)
    feed, resident = (Feed(store, kind, rounded=kind != batching) for _ in range(2))
    corpus = resident.corpus()
    sent, placed = feed(step), resident(step)
    assert placed.source is None and (sent.shape, sent.tokens) == (placed.shape, placed.tokens)
    poems = [torch.from_numpy(store[row].astype(np.int64)) for row in chosen]
    one, other = (
        assemble(source, rows.where, rows.shape, store.pad_id)
        for source, rows in ((sent.source, sent), (corpus, placed))
    )
    assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    assert int((one.targets != IGNORE).sum()) == sent.tokens
    if one.packing is None:
        for row, poem in enumerate(poems):
            assert torch.equal(one.inputs[row, : len(poem) - 1], poem[:-1])
            assert torch.equal(one.targets[row, : len(poem) - 1], poem[1:])
            assert (one.inputs[row, len(poem) :] == store.pad_id).all() and (
                one.targets[row, len(poem) - 1 :] == IGNORE
            ).all()
        padded = assemble(sent.source, sent.where, sent.shape, store.pad_id, pad_targets=True).targets
        assert torch.equal(padded, one.targets.masked_fill(one.targets == IGNORE, store.pad_id))
        longest = step.length if batching == "edges" else max(map(len, poems))
        assert one.inputs.shape == (len(poems), longest - 1)
        return
    assert torch.equal(one.inputs[0, : sent.tokens], torch.cat([poem[:-1] for poem in poems]))
    assert torch.equal(one.targets[0, : sent.tokens], torch.cat([poem[1:] for poem in poems]))
    assert (one.targets[0, sent.tokens :] == IGNORE).all()
    packing, extra = one.packing, sent.shape.packed - sent.tokens
    assert 0 <= extra < SLOT if batching == "rounded" else extra == 0
    assert packing.borders.tolist() == [0, *np.cumsum([len(poem) - 1 for poem in poems]), sent.shape.packed]
    assert torch.equal(packing.positions[: sent.tokens], torch.cat([torch.arange(len(poem) - 1) for poem in poems]))
    flat = packing.unfold.flatten()
    assert torch.equal(flat[packing.fold[: sent.tokens]], torch.arange(sent.tokens))
    assert packing.fold.max() < len(flat) and packing.unfold.shape[1] > extra - 1


@given(poems=st.integers(1, 2048), longest=st.integers(2, 2000), share=st.floats(0, 1), more=st.integers(0, 3))
def test_packed_sizes_are_rounded_to_few(poems, longest, share, more):
    """Attention takes the padding for one more poem, so it is shorter than the longest; and there is little of it."""
    tokens = max(1, round(share * poems * (longest - 1)))
    exact = Shape(poems, longest, tokens)
    rounded = exact.rounded()
    inputs, extra = rounded.longest - 1, rounded.packed - tokens
    assert rounded.rounded() == rounded and rounded.packed % SLOT == 0
    assert longest - 1 <= inputs < max(2 * longest, 129) and inputs % 8 == 0
    assert 0 <= extra < max(SLOT, tokens / 16) and extra < inputs
    assert exact._replace(packed=min(tokens + more, rounded.packed)).rounded() == rounded


def test_the_shapes_of_an_epoch_are_known_before_it(store):
    order = TextOrder([b.length for b in store.buckets], store.rows, store.locate, np.array([3, 9]), 4, 7)
    feed = Feed(store, "pack", rounded=True)
    ahead = feed.packed_shapes(*order.poems_of(0, 0, order.steps), 4)
    assert len(ahead) == len({*ahead}) and {*ahead} == {feed(order(0, step)).shape for step in range(order.steps)}


def test_rounding_changes_no_gradient(store):
    """A packed batch with padding behind it trains as one without."""
    bucket, index = store.locate(np.array([3, 77, 200, 12]))
    batch = Step(store.buckets[bucket.max()].length, bucket, index)
    norms = []
    for rounded in (False, True):
        rows = Feed(store, "pack", rounded)(batch)
        model = GPT2(GPT2Config(store.vocab_size, 64, 16, 2, 2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
        model.initialise(0)
        optimizer = FlatAdamW(model.train(), CPU, torch.float32, weight_decay=0.0, max_norm=1e9)
        step = TrainStep(
            Pieces(model), optimizer, torch.zeros(len(rows.source), dtype=torch.int16), poems=4, pad_id=store.pad_id
        )
        step(rows, 0.0)
        norms.append((step.result(), rows.shape))
    (exact, _), (padded, shape) = norms
    assert shape.packed % SLOT == 0
    assert padded.loss == pytest.approx(exact.loss, rel=1e-6) and padded.norm == pytest.approx(exact.norm, rel=1e-5)
