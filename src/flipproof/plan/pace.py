"""How long a training step takes: products, flips and communication, each from what it moves or computes.

Products: the FLOPs that the mathematics asks for (``train/throughput.py``), with forward once more where it is computed
again, but for a block's last product, whose result backward does not need, over a share of the GPU's dense peak. Flips
and merges move bytes through the GPU's memory: an input is read and written for each layer that it enters, a weight is
read and written when it is merged, flipped or both, in forward and, where flipped operands are not kept, again in
backward. Communication is what FSDP2 gathers and reduces, or what GPUs read of their neighbours' frozen weights. It
runs beside the rest, so a step takes the longer of the two, and the first and last block's share of it in any case;
FSDP copies what it gathered out of its buffers, and products beside communication are slower. Where what trains is
whole on each GPU, its gradients are averaged at the end, beside nothing, and GPUs that share AdamW's moments send each
other what they stepped. With ``cpu_offload`` shards come over PCI
Express for each gather, gradients go back over it, and AdamW runs on the CPU, by the bytes that it moves there (which
nothing here has measured).
"""

from dataclasses import dataclass

from flipproof.config import RunConfig
from flipproof.formats.spec import format_of
from flipproof.plan.gpus import Gpu
from flipproof.plan.memory import (
    Kept,
    Spread,
    codes_flip,
    computed_bytes,
    fetched,
    gathered_adapter_bytes,
    held_bytes,
    reduced_bytes,
    shares,
    slots,
)
from flipproof.plan.quantised import moved
from flipproof.plan.shape import Shape

OF_BANDWIDTH = 0.85
"""Of the memory's bandwidth, what flips reach (benchmarks/README.md: 0.95 of a copy, which reaches 0.9)."""
OF_LINK = 0.75
"""Of a link, what NCCL's all-gather reaches."""
CPU_BANDWIDTH = 40.0
"""Of the CPU's memory, for each GPU of its node, in 10⁹ bytes a second: a node of eight has some 300."""
BESIDE = 0.25
"""Of the time that communication takes, what it costs the products beside it (8B on 4 GPUs: benchmarks/README.md)."""


@dataclass(frozen=True)
class Pace:
    """Seconds of an optimizer step, on every GPU alike."""

    products: float
    flips: float
    slowed: float
    """What communication costs the rest: copies, and products that share the GPU with it."""
    communication: float
    """Beside the rest, but for ``exposed``."""
    exposed: float
    adam: float
    """Of AdamW on the CPU. (On a GPU it is nothing beside the rest.)"""
    gathered_bytes: float
    """That a GPU receives in a step."""
    reduced_bytes: float
    tokens: int
    """Of a step, on all GPUs."""

    @property
    def seconds(self) -> float:
        return self.products + self.flips + self.slowed + self.exposed + self.adam

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def pace(
    shape: Shape, config: RunConfig, spread: Spread, kept: Kept, gpu: Gpu, links: tuple[float, float], efficiency: float
) -> Pace:
    """
    Args:
        links: the slowest that is crossed among shards, and among replicas, in 10⁹ bytes a second and direction.
        efficiency: of the dense peak, what products reach.
    """
    training, c = config.training, computed_bytes(config)
    accumulation = training.gradient_accumulation_steps
    tokens = training.local_batch_size * training.seq_len * accumulation
    left_out = 0 if shape.stored else shape.largest / shape.products  # by blocks that are compiled
    again = shape.forward_flops * (1 - left_out) * kept.get("nothing", 0) / shape.blocks
    flops = shape.flops + again
    products = tokens * flops / (gpu.peak(c) * efficiency)
    flips = accumulation * _flipped_bytes(shape, config, kept) / (gpu.bandwidth * 1e9 * OF_BANDWIDTH)

    trained = shape.adapters * shape.blocks if config.lora.r else shape.parameters
    gathered = copied = scattered = replicated = 0.0
    times, others = 0, 1 - 1 / spread.shards
    gradient = 4
    if shared := shares(shape, config, spread):
        # the last blocks of forward are there still when backward begins
        blocks = (2 * shape.blocks - slots(shape, config)) * fetched(shape, config)
        gathered = accumulation * (blocks + held_bytes(config) * (shape.embedding + shape.head)) * others
    elif spread.shards > 1:
        gradient = reduced_bytes(config)
        whole = c * shape.parameters + shape.adapters * shape.blocks * gathered_adapter_bytes(config)
        again_for_backward = config.parallelism.sharding_strategy != "shard_grad_op"
        times = 1 if config.parallelism.keep_gathered else accumulation * (1 + again_for_backward)
        gathered = whole * others * times
        copied = 2 * whole * times / (gpu.bandwidth * 1e9 * OF_BANDWIDTH)
        scattered = gradient * trained * others
        # an all-reduce is a reduce-scatter and a gather
        replicated = 2 * gradient * trained / spread.shards * (1 - 1 / spread.replicas)
    communication = ((gathered + scattered) / links[0] + replicated / links[1]) / (1e9 * OF_LINK)
    averaged = at_the_end = 0.0
    if shared or spread.shards == 1:
        averaged = 2 * gradient * trained * (1 - 1 / spread.gpus)
        stepped = 4 * trained * others
        gathered += stepped
        at_the_end = (averaged / min(links) + stepped / links[0]) / (1e9 * OF_LINK)
    adam = 0.0
    if config.parallelism.cpu_offload:
        shard = (held_bytes(config) * shape.parameters + 4 * shape.adapters * shape.blocks) / spread.shards
        communication += (shard * times + gradient * trained / spread.shards) / (gpu.host * 1e9 * OF_LINK)
        # reads weights, gradients and both moments, and writes all but gradients, in float32
        adam = 28 * trained / spread.shards / (CPU_BANDWIDTH * 1e9)
    ends = 2 * communication / max(1, shape.blocks * accumulation)
    exposed = at_the_end + (max(communication - products - flips, ends) if communication else 0.0)
    slowed = copied + BESIDE * communication
    return Pace(
        products,
        flips,
        slowed,
        communication + at_the_end,
        exposed,
        adam,
        gathered,
        scattered + replicated + averaged,
        training.seq_len * config.sequences_per_step(spread.gpus),
    )


def _flipped_bytes(shape: Shape, config: RunConfig, kept: Kept) -> float:
    """That flips, merges and dequantisation read and write for a micro-batch on a GPU."""
    c, tokens = computed_bytes(config), config.training.local_batch_size * config.training.seq_len
    inputs = tokens * (5 * shape.hidden + shape.queries + shape.ffn) * shape.faulty / shape.products
    times = sum(n * (1 if level == "weights" else 2) for level, n in kept.items())
    if shape.stored:  # adapters stay beside the weights, which are dequantised
        made = moved(format_of(str(config.model.quantize)), c, codes_flip(config))
        return times * (2 * c * inputs + made * shape.products)
    weights = shape.products if config.lora.r else shape.faulty
    return float(2 * c * times * (inputs + weights))
