"""The forward pass and the making of batches on CUDA tensors that have a shape and no memory: every operator has a CUDA form of that
shape, and none of them asks the device anything (on such a tensor that raises)."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from fastpoem.corpus.feed import Feed, Shape
from fastpoem.corpus.plan import Step
from fastpoem.corpus.store import TokenStore, prepare_store
from fastpoem.corpus.tokenize import PoemTokenizer
from fastpoem.engine.batch import assemble
from fastpoem.model.gpt2 import GPT2, GPT2Config
from fastpoem.model.hub import BUNDLED

SHAPE = GPT2Config(21128, 1024, 768, 6, 12)  # the real one


class WithoutGuards(TorchFunctionMode):
    """A CPU build of PyTorch cannot take `x[...]` or `x.contiguous()` of a CUDA tensor, though nothing is there: the same by other names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.contiguous:
            return args[0].clone()
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args
        dim = 0
        for one in index if isinstance(index, tuple) else (index,):
            if one is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(one, int):
                tensor, dim = tensor.select(dim, one), dim - 1
            else:
                start, stop, stride = one.indices(tensor.shape[dim])
                assert stride == 1
                tensor = tensor.narrow(dim, start, stop - start)
            dim += 1
        return tensor


def forward(shape):
    """A batch of this shape and its logits, dropout on, in bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad(), torch.device("cuda"), WithoutGuards():
            model = GPT2(SHAPE).train()
            source, where = torch.zeros(10**6, dtype=torch.int16), torch.zeros(shape.poems, 2, dtype=torch.int64)
            batch = assemble(source, where, shape, 0)
            return batch, model(batch.inputs, batch.packing)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake") / "store"
    prepare_store(BUNDLED / "poems.txt", PoemTokenizer.load(BUNDLED / "model"), folder)
    return TokenStore.open(folder)


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_forward_at_every_bucket_shape(store, batching):
    feed = Feed(store, batching, rounded=True)
    edges = [bucket.length for bucket in store.buckets] + [130, 512]
    for length in edges:
        shape = Shape(16, length)
        if batching == "pack":
            bucket = next((i for i, one in enumerate(store.buckets) if one.length == length), None)
            if bucket is None:
                continue
            rows = np.arange(16) % store.buckets[bucket].rows
            shape = feed(Step(length, np.full(16, bucket), rows)).shape
        batch, logits = forward(shape)
        rows = shape.packed or 16 * (length - 1)
        assert logits.shape == (rows, 21128) and logits.dtype == torch.bfloat16 and logits.device.type == "cuda"
        assert batch.targets.numel() == rows


def test_the_control():
    with FakeTensorMode(), torch.device("cuda"), pytest.raises(DataDependentOutputException):
        torch.zeros(()).item()
