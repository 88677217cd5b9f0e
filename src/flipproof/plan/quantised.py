"""What a block of quantised layers keeps, holds and moves (``models/quantised.py``): arithmetic, as no GPU measured it.

Such blocks are not compiled, so what backward needs is what autograd saves, operator by operator. In values per token,
with H hidden features, A of queries, K of keys, F of the MLP and rank r:

- ``nothing``: the block's input, H;
- ``products``: its input, attention's result, and of each layer the product and, with adapters, both of theirs, which
  are products too: 5H + 3A + 4K + 4F + 7r. That is about as much as ``everything``;
- ``everything``: both norms' inputs in float32, 2H of 4 bytes; and both norms' results, q, k, v, attention, gate, its
  activation, up and their product, 2H + 2A + 2K + 4F;
- ``weights``: the same with each layer's own flipped input, 5H + 3A + 2K + 4F, a bit for each value of these, and the
  block's dequantised weights.

A block that is computed again for backward holds ``weights`` of itself while it works, whatever others keep: its layers
keep what they dequantise for this moment (``FaultyLinear.checkpointed``).

**Dequantising** (``faults/triton_dequantise.py``) reads codes and writes the weight. Where codes flip they do so in a
copy, of a byte each, which is there meanwhile.
"""

from flipproof.formats.spec import Format
from flipproof.models.recompute import Keep
from flipproof.plan.shape import Shape

_PER_SCALE = {"float": 2, "float32": 4, "e8m0": 9, "e4m3": 17, "nested": 41}
"""Bytes that are moved until a scale's number has been read, operator by operator; those of "float" have 2 or 4."""


def made_with(format: Format, computed: int, flips: bool) -> float:
    """Bytes of a weight that are there at most while it is dequantised, its result included, what is stored not.

    Args:
        computed: bytes of the dtype that is computed with.
        flips: whether codes flip.
    """
    numbers = 4 / format.group if format.group and format.scale not in ("float", "float32") else 0
    return computed + flips + numbers


def moved(format: Format, computed: int, flips: bool) -> float:
    """Bytes of a weight that its dequantisation reads and writes; arguments as above."""
    scales = _PER_SCALE[format.scale] / format.group if format.group else 0
    return format.bits / 8 + 2 * flips + scales + computed


def activations(shape: Shape, computed: int, rank: int, kept: Keep) -> float:
    """Bytes of a block that a token leaves for backward."""
    h, a, k, f = shape.hidden, shape.queries, shape.keys, shape.ffn
    if kept == "nothing":
        return float(h * computed)
    sums = 4 * shape.heads
    if kept == "products":
        return float(computed * (5 * h + 3 * a + 4 * k + 4 * f + 7 * rank) + sums)
    size = float(8 * h + computed * (2 * h + 2 * a + 2 * k + 4 * f) + sums)
    if kept == "weights" and shape.faulty:
        size += computed * (3 * h + a) + (5 * h + a + f) / 8
    return size


def at_work(shape: Shape, tokens: int, made: float, computed: int, rank: int, kept: Keep) -> float:
    """Bytes beside what blocks keep while one of them, which keeps this, is at work.

    Args:
        tokens: of a micro-batch.
        made: what ``made_with`` says.
    """
    h, f = shape.hidden, shape.ffn
    passing = tokens * computed
    if kept == "everything":
        return float(made * shape.largest + passing * (2 * f + 3 * h))
    if kept == "weights":
        return float(passing * (3 * f + 4 * h))
    again = tokens * activations(shape, computed, rank, "weights")
    return again + computed * shape.products + max((made - computed) * shape.largest, passing * (2 * f + 3 * h))
