"""How much memory a training step takes on each GPU, term by term, in a closed form.

What lies there all the time: weights, adapters, gradients, AdamW's two moments. What comes and goes: activations, which
grow through forward and fall through backward. So there are three times at which memory may be at its most: at the
loss, in the backward pass of the last block, and at the end of backward, when all gradients are there.

**Activations of a block**, in values of the computed dtype per token, with H hidden features, A of queries, K of keys
and F of the MLP, are what the compiled block keeps (``torch.compile`` computes again what is cheap):

- ``nothing``: its input, H;
- ``products``: its input, q, k, v, attention, attention's projection, gate and up, 2H + 2A + 2K + 2F;
- ``everything``: its input, both norms' results, the sum between them, q, k, v, attention, gate, up and their product,
  4H + 2A + 2K + 3F;
- ``weights``: with flips each layer's own flipped input in the place of one that layers share, 7H + 3A + 2K + 3F, a bit
  for each value of these inputs, and the block's merged weights;

and 4 bytes a head for attention's sums. Where weights are cast to compute with them, ``everything`` holds the cast;
under FSDP the cast is what is gathered, and freed. Blocks of quantised layers are not compiled: ``quantised.py``.

Sources: what is kept was read off the compiler's own partition of a block, and off peaks measured on GPUs
(tests/plan/test_memory.py); ZeRO's stages are Rajbhandari et al., 2020.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from flipproof.config import RunConfig
from flipproof.formats.spec import format_of
from flipproof.models.loss import HELD_LOGITS
from flipproof.models.parallelize import shares_frozen
from flipproof.models.recompute import LEVELS, Keep
from flipproof.plan import quantised
from flipproof.plan.shape import Shape

Kept = Mapping[Keep, int]
"""How many blocks keep what."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CONTEXT = 0.6 * 2**30
"""What CUDA, cuBLAS and NCCL hold beside PyTorch's own."""
_FRAGMENTS = 0.02
"""Of what PyTorch allocates, what lies idle between."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    parts: dict[str, float]
    """At the time of the peak, by what they are for; these are PyTorch's own."""
    when: str
    """The time of the peak."""
    host: float = 0.0
    """In the CPU's memory, for each GPU of its node."""

    @property
    def allocated(self) -> float:
        """PyTorch's peak, as ``torch.cuda.max_memory_allocated`` counts."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """With what CUDA holds, and what lies idle between allocations."""
        return needed_for(self.allocated)


def needed_for(allocated: float) -> float:
    """Bytes of a GPU of which PyTorch allocates so many."""
    return allocated * (1 + _FRAGMENTS) + _CONTEXT


@dataclass(frozen=True)
class Spread:
    """How a model lies on GPUs."""

    shards: int
    """GPUs that share each parameter; 1 is the whole model on each."""
    replicas: int
    node: int | None = None
    """GPUs of a node; None is all."""

    @property
    def gpus(self) -> int:
        return self.shards * self.replicas


def shares(shape: Shape, config: RunConfig, spread: Spread) -> bool:
    """Whether GPUs read frozen weights from their neighbours (``models/frozen.py``), in the place of FSDP."""
    as_held = shape.stored or held_bytes(config) == computed_bytes(config)
    if not config.lora.r or not as_held or shape.divisor % spread.shards:
        return False
    return shares_frozen(config.parallelism, spread.shards, spread.node or spread.gpus)


def slots(shape: Shape, config: RunConfig) -> int:
    """Of blocks that are read from neighbours."""
    parallelism = config.parallelism
    return min(shape.blocks, 1 + max(1, parallelism.forward_prefetch, parallelism.backward_prefetch))


def fetched(shape: Shape, config: RunConfig) -> int:
    """Bytes of a block that are read from neighbours, this GPU's own among them."""
    return shape.stored_rows or held_bytes(config) * shape.products


def held_bytes(config: RunConfig) -> int:
    """Of a weight."""
    return _BYTES[config.training.dtype or "float32"]


def computed_bytes(config: RunConfig) -> int:
    """Of a value that is computed with."""
    return _BYTES[config.training.mixed_precision_param or config.training.dtype or "float32"]


def gathered_adapter_bytes(config: RunConfig) -> int:
    """Of an adapter's value that FSDP gathers: it casts all or nothing."""
    return computed_bytes(config) if held_bytes(config) != computed_bytes(config) else 4


def reduced_bytes(config: RunConfig) -> int:
    """Of a gradient that FSDP reduces."""
    return _BYTES[config.training.mixed_precision_reduce]


def scores(shape: Shape, config: RunConfig) -> int:
    """Bytes for a token of what attention weighs all others by, where a block computes with them: in float32, with keys
    that several heads share, PyTorch has no kernel on a GPU that does without. Each head has then its own keys and
    values, too."""
    whole = computed_bytes(config) == 4 and shape.keys < shape.queries
    return 4 * (shape.heads * config.training.seq_len + 2 * (shape.queries - shape.keys)) if whole else 0


def activations(shape: Shape, config: RunConfig, kept: Keep) -> float:
    """Bytes of a block that a token leaves for backward."""
    if shape.stored:
        return quantised.activations(shape, computed_bytes(config), config.lora.r, kept)
    h, a, k, f = shape.hidden, shape.queries, shape.keys, shape.ffn
    values: int = {
        "nothing": h,
        "products": 2 * h + 2 * a + 2 * k + 2 * f,
        "everything": 4 * h + 2 * a + 2 * k + 3 * f,
        "weights": 4 * h + 2 * a + 2 * k + 3 * f,
    }[kept]
    size = float(values * computed_bytes(config))
    if kept != "nothing":
        size += scores(shape, config) or 4 * shape.heads
    if kept == "weights" and shape.faulty:
        size += (3 * h + a) * computed_bytes(config) + (5 * h + a + f) / 8
    return size


def _kept_weights(shape: Shape, config: RunConfig, kept: Keep, sharded: bool) -> float:
    """Bytes of a block's weights that are kept beside the weights themselves."""
    if shape.stored:
        return float(shape.products * computed_bytes(config) * (kept == "weights"))
    size, trains = 0.0, not config.lora.r
    if kept in ("everything", "weights") and held_bytes(config) != computed_bytes(config) and not sharded:
        size += shape.products * computed_bytes(config)
    if kept == "weights" and not trains:
        size += shape.products * computed_bytes(config)
        size += shape.faulty / 8  # which of them the guard zeroed
    return size


def codes_flip(config: RunConfig) -> bool:
    """Whether those of quantised weights do."""
    return any(variant.part("code").flips for variant in config.bitflip.variants())


WORKSPACES = 4 * 2**25
"""Bytes that cuBLAS takes of PyTorch: 32 MiB on a Hopper for each thread and stream that multiplies, forward's and
backward's, as kernels and as a graph is recorded (benchmarks/README.md)."""


def in_all(shape: Shape, level: Keep) -> Kept:
    return {level: shape.blocks}


def memory(shape: Shape, config: RunConfig, spread: Spread, kept: Kept) -> Memory:
    """Of each GPU, where one block after the other is the one at work."""
    training, c, held = config.training, computed_bytes(config), held_bytes(config)
    tokens, trains = training.local_batch_size * training.seq_len, not config.lora.r
    shared = shares(shape, config, spread)
    adapters, sharded = shape.adapters * shape.blocks, spread.shards > 1 and not shared
    trained = shape.parameters if trains else adapters
    h, f = shape.hidden, shape.ffn
    # of what trains, where frozen weights are shared, each GPU has all, but of the moments
    shards = 1 if shared else spread.shards
    apart = shape.matrices if shared else shape.parameters  # what is shared
    weights = held * (shape.parameters - apart + apart / spread.shards)
    if shape.stored:  # shared, or whole on each GPU
        beside = held * (shape.embedding + shape.head)
        weights = shape.blocks * shape.stored + held * (shape.parameters - shape.blocks * shape.products)
        weights -= (shape.blocks * shape.stored_rows + beside) * (1 - 1 / spread.shards)
    always = {
        "weights": weights,
        "adapters": 4 * adapters / shards,
        "AdamW's moments": 8 * trained / spread.shards,
    }
    gradients = 4 * trained / shards
    host, copied = 0.0, 0.0
    if config.parallelism.cpu_offload:  # what is sharded lies there, and comes a block at a time
        host, always, gradients = sum(always.values()) + gradients, {}, 0.0
        copied = (held * shape.block + 4 * shape.adapters) / spread.shards
    kept_activations = sum(n * activations(shape, config, level) for level, n in kept.items()) * tokens
    kept_weights = sum(n * _kept_weights(shape, config, level, sharded) for level, n in kept.items())
    least = min((level for level, n in kept.items() if n), key=LEVELS.index)
    unit = shape.block * c + shape.adapters * gathered_adapter_bytes(config)
    head = (shape.head or shape.embedding) * c
    stays = config.parallelism.sharding_strategy == "shard_grad_op" or config.parallelism.keep_gathered
    stay = (shape.blocks * unit + shape.embedding * c) * stays
    # what works, and NCCL's buffer of what was gathered last, which FSDP keeps until the next is
    at_loss = (2 * head + stay) * sharded
    at_block = (stay + head if stays else 2 * unit) * sharded + copied
    if shared:  # the slots
        at_loss = at_block = slots(shape, config) * fetched(shape, config) + held * max(shape.embedding, shape.head)
    logits = tokens * shape.vocabulary
    if shape.whole_logits:  # as computed; in float32, where that is another dtype; and their gradient
        loss = logits * (shape.whole_logits * c + (8 if c < 4 else 4)) + tokens * h * c
    else:
        loss = 2 * min(HELD_LOGITS, logits) * c + 2 * tokens * h * c
    loss += 4 * (shape.head or shape.embedding) * trains
    block: float = tokens * c * {"nothing": 6 * f + 6 * h, "products": 4 * f + 4 * h}.get(least, 3 * f + 4 * h)
    block += 2 * tokens * scores(shape, config)
    block += 2 * c * shape.largest if (shape.faulty or config.lora.r) else 0
    if shape.stored:
        made = quantised.made_with(format_of(str(config.model.quantize)), c, codes_flip(config))
        block = quantised.at_work(shape, tokens, made, c, config.lora.r, least)
    reduced = reduced_bytes(config) if sharded else 4
    # a block's gradients as they were computed, and as they are reduced; of adapters they are of one dtype
    block_gradients = ((reduced + c) * shape.block if trains else reduced * shape.adapters) * sharded
    # FSDP sums those of a step's earlier micro-batches whole
    summed = reduced * trained if training.gradient_accumulation_steps > 1 else 0
    phases = {
        "at the loss": {"activations": kept_activations, "loss": loss, "gathered": at_loss, "gradients": summed},
        "in a block's backward": {
            "activations": kept_activations,
            "gathered": at_block,
            "a block at work": block,
            "gradients": summed + block_gradients,
        },
        "at the end of backward": {
            "activations": kept_activations / shape.blocks,
            "gathered": at_block,
            "a block at work": block,
            "gradients": gradients + block_gradients,
        },
    }
    when = max(phases, key=lambda name: sum(phases[name].values()))
    parts = always | phases[when] | {"kept weights": kept_weights, "cuBLAS": WORKSPACES}
    return Memory({name: size for name, size in parts.items() if size}, when, host)
