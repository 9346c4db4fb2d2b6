"""The budget of a training step on paper: `python -m benchmarks.budget [--gpu H100|A100]` prints the tables of docs/performance.md.

Nothing here is measured. FLOPs and bytes are counted from the model's shape; each product takes as long as its FLOPs at the card's dense
bf16 rate or its operands at the memory's, whichever is longer, and everything else its bytes at the memory's rate. Operands count as read
from memory each time a kernel uses them: only what a cache keeps, or fewer kernels, makes a step faster than that. The number of launches
is that of the captured graph, the same at every batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastpoem_kernels.arguments import Parser

from fastpoem.doctor.checks import REAL
from fastpoem.doctor.machine import PEAKS, Peak
from fastpoem.doctor.trial import POEMS
from fastpoem.model.gpt2 import GPT2Config
from fastpoem.model.hub import count_parameters

BF16, FP32 = 2, 4  # bytes
CARDS = {"H100": PEAKS["H100"], "A100": PEAKS["A100-SXM4-80GB"]}  # SXM, 80 GB
NODES = 198  # kernels and copies of the captured step on rows, compiled; counted (tests/pretend_gpu)
PACKING = 3  # more of them where the batch is packed
NODE = 2e-6  # seconds of a launch inside a graph; assumed
PRODUCTS = 0.60  # of the card's rate that products reach; assumed
REST = 0.85  # of the memory's rate that everything else reaches; assumed
INPUTS = 63.36  # inputs of a poem of mean length: its tokens less the last
BATCHES = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Item:
    """A product, or a part of the step with all of its kernels together."""

    name: str
    flops: float
    bytes: float

    def seconds(self, card: Peak) -> float:
        return max(self.flops / (card.half * 1e12), self.bytes / (card.memory * 1e12))


def product(m: float, k: float, n: float) -> tuple[float, float]:
    """(FLOPs, bytes) of (m, k) @ (k, n) in bf16."""
    return 2 * m * k * n, BF16 * (m * k + k * n + m * n)


def products(shape: GPT2Config, rows: float) -> list[Item]:
    """Every matrix product of a step: three a weight, forward, gradient of the input, gradient of the weight."""
    wide, inner = shape.n_embd, shape.n_inner or 4 * shape.n_embd
    layer = [("qkv", wide, 3 * wide), ("projection", wide, wide), ("up", wide, inner), ("down", inner, wide)]
    weights = [(name, k, n) for _ in range(shape.n_layer) for name, k, n in layer] + [("head", wide, shape.vocab_size)]
    items = []
    for name, k, n in weights:
        for pass_, sizes in (("forward", (rows, k, n)), ("input", (rows, n, k)), ("weight", (k, rows, n))):
            items.append(Item(f"{name} {pass_}", *product(*sizes)))
    return items


def step(shape: GPT2Config, poems: int, inputs: float = 65) -> list[Item]:
    """The parts of a step of `poems` poems with `inputs` tokens each (their length less one), bf16 with fp32 masters, compiled."""
    rows, layers, wide = poems * inputs, shape.n_layer, shape.n_embd
    inner, vocabulary = shape.n_inner or 4 * wide, shape.vocab_size
    parameters = count_parameters(shape)
    matrices = products(shape, rows)
    heads = [item for item in matrices if item.name.startswith("head")]
    body = [item for item in matrices if not item.name.startswith("head")]
    # Of each of the n * inputs queries the half of the keys that it may see; forward 2 products, backward 5 (it computes the weights again).
    seen = rows * (inputs + 1) / 2
    attention = layers * 7 * 2 * seen * wide
    # Elements a token and layer that elementwise kernels read and write, fused as the compiler fuses them. Forward: residual sum, dropout and
    # norm in one, twice (4 D each); GELU (2 I). Backward: of the norm, with the residual's gradient and dropout's, twice (5 D each); of GELU,
    # which also sums its bias (3 I); sums for the other biases (5 D) and for the norms' weights (4 D).
    between = layers * rows * ((8 + 10 + 9) * wide + (2 + 3) * inner)
    logits = BF16 * rows * vocabulary
    return [
        Item("layers' products", sum(i.flops for i in body), sum(i.bytes for i in body)),
        Item("head's products", sum(i.flops for i in heads), sum(i.bytes for i in heads)),
        Item("attention", attention, BF16 * layers * rows * (4 + 9) * wide),  # q, k, v, out; and again with gradients
        Item("norms, GELU, dropout, biases", 0, BF16 * between),
        Item("loss, gradient in place", 0, 2 * logits),
        Item("gradients to the flat buffer", 0, 2 * BF16 * parameters),
        Item("embedding's gradient", 0, vocabulary * wide * (2 * FP32 + 2 * BF16) + rows * wide * (BF16 + 2 * FP32)),
        Item("norm of the gradient", 0, BF16 * parameters),
        Item("AdamW", 0, ADAMW * parameters),
    ]


ADAMW = 28  # bytes a parameter: reads master, both moments, gradient; writes master, both moments, working copy


def likely(shape: GPT2Config, poems: int, card: Peak, inputs: float = 65) -> float:
    """Seconds of a step if products reach PRODUCTS of the card's rate, everything else REST of the memory's, and a launch in a graph costs
    NODE. These three are assumed, from what such kernels usually reach."""
    rest = [item for item in step(shape, poems, inputs) if "products" not in item.name]
    matrices = sum(item.seconds(card) for item in products(shape, poems * inputs))
    return matrices / PRODUCTS + sum(item.seconds(card) for item in rest) / REST + NODES * NODE


def floor(shape: GPT2Config, poems: int, card: Peak, inputs: float = 65) -> float:
    """Seconds of a step with every kernel at the card's published rates, one after another, launches free."""
    rest = [item for item in step(shape, poems, inputs) if "products" not in item.name]
    return sum(item.seconds(card) for item in [*products(shape, poems * inputs), *rest])


def parts(card: Peak, poems: int = 16, inputs: float = 65) -> str:
    """Where a step's floor lies, as a Markdown table."""
    single = products(REAL, poems * inputs)
    lines = ["| part | GFLOP | MiB | µs at the least |", "| --- | ---: | ---: | ---: |"]
    for item in step(REAL, poems, inputs):
        took = item.seconds(card)
        if "products" in item.name:
            mine = [one for one in single if one.name.startswith("head") == item.name.startswith("head")]
            took = sum(one.seconds(card) for one in mine)
        lines.append(f"| {item.name} | {item.flops / 1e9:.1f} | {item.bytes / 2**20:,.0f} | {1e6 * took:,.0f} |")
    items, total = step(REAL, poems, inputs), floor(REAL, poems, card, inputs)
    flops, moved = sum(i.flops for i in items) / 1e9, sum(i.bytes for i in items) / 2**20
    return "\n".join([*lines, f"| **together** | {flops:.1f} | {moved:,.0f} | {1e6 * total:,.0f} |"])


def sweep(card: Peak) -> str:
    """The table over batch sizes, poems of mean length."""
    lines = [
        "| batch | TFLOP | GB | logits MiB | floor ms | likely ms | steps an epoch | epoch at the floor s | likely s | likely M tokens/s | likely share of peak |",
        "| ---: |" + " ---: |" * 10,
    ]
    for poems in BATCHES:
        items = step(REAL, poems, INPUTS)
        flops, moved = sum(item.flops for item in items), sum(item.bytes for item in items)
        least = floor(REAL, poems, card, INPUTS)
        took, steps = likely(REAL, poems, card, INPUTS), POEMS // poems
        logits = BF16 * poems * INPUTS * REAL.vocab_size / 2**20
        lines.append(
            f"| {poems} | {flops / 1e12:.2f} | {moved / 1e9:.1f} | {logits:,.0f} | {1e3 * least:.2f} | {1e3 * took:.2f} | {steps:,} "
            f"| {steps * least:.0f} | {steps * took:.0f} | {poems * INPUTS / took / 1e6:.2f} | {flops / took / card.half / 1e12:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description="The budget of a training step on paper.")
    parser.add_argument("--gpu", choices=CARDS, action="append")
    for name in parser.parse_args().gpu or CARDS:
        card = CARDS[name]
        print(f"### {name}: {card.half:,.0f} TFLOP/s bf16 dense, {card.memory} TB/s\n")
        print(
            f"A step of 16 poems of 66 tokens.\n\n{parts(card)}\n\nOver batch sizes, poems of mean length.\n\n{sweep(card)}\n"
        )


if __name__ == "__main__":
    main()
