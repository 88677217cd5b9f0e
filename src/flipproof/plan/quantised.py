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

**Dequantising** (``formats/quantise.py``) holds for a moment, of each weight, a byte where codes were unpacked, the
number that its code stands for, and beside it the place in a table by which that is found, 4 bytes, or its copy in the
dtype that is computed with.
"""

from flipproof.formats.spec import Format
from flipproof.models.recompute import Keep
from flipproof.plan.shape import Shape

_FROM_TABLES = ("nf4", "e2m1")


def _number(format: Format, held: int) -> int:
    """Bytes of a number as it is dequantised."""
    return held if format.scale == "float" else 4


def made_with(format: Format, held: int, computed: int, flips: bool) -> int:
    """Bytes of a weight that are there at most while it is dequantised, its result included.

    Args:
        held: bytes of the dtype of the weight that was quantised.
        computed: of the one that is computed with.
        flips: whether codes flip, which those that are packed in no pairs do in a copy.
    """
    number = _number(format, held)
    place = 4 if format.code in _FROM_TABLES else 0
    unpacked = 1 if format.bits == 4 or flips else 0
    return unpacked + number + max(place, computed if computed != number else 0)


def moved(format: Format, held: int, computed: int) -> float:
    """Bytes of a weight that its dequantisation reads and writes, one operator after the other."""
    number = _number(format, held)
    found = 0.0
    if format.bits == 4:  # both halves of each byte, and the two in a row
        found += 2 * (0.5 + 0.5) + 2
    if format.code in _FROM_TABLES:
        found += (1 + 4) + (4 + number)
    else:
        found += 1 + number
    found += 2 * number * (2 if format.code == "int" else 1)  # less the zero point, times the scale
    return found + (number + computed) * (number != computed)


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


def at_work(shape: Shape, tokens: int, made: int, computed: int, rank: int, kept: Keep) -> float:
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
