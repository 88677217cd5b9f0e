"""``flipproof plan``: whether a training fits, how long it takes and what it costs, before any GPU is rented."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flipproof.config import RunConfig
from flipproof.errors import ConfigError
from flipproof.models.build import with_trainable_weights
from flipproof.models.load import byte_tokenizer
from flipproof.models.quantised import check_spread, unshared
from flipproof.models.recompute import LEVELS, Keep
from flipproof.plan.gpus import Gpu, benched, gpu_called
from flipproof.plan.memory import Kept, Memory, Spread, computed_bytes, in_all, memory, needed_for, shares
from flipproof.plan.pace import Pace, pace
from flipproof.plan.shape import Shape, shape_of
from flipproof.train.start import held_dtype, resolve_steps
from flipproof.world import layout

_ROOM = 0.94
"""Of a GPU's memory, what training fills, as ``activation_checkpointing = "auto"`` has it."""
_NODE = 8
"""GPUs of a node, where more than are asked for would do."""
_KEEPS: dict[str, Keep] = {"full": "nothing", "selective": "products", "none": "everything"}


@dataclass(frozen=True)
class Request:
    """What is asked of a plan beside the training's config."""

    gpus: int
    """Of a node."""
    nodes: int = 1
    gpu: str = "h100"
    node_link: float = 50.0
    """Between nodes, of a GPU, in 10⁹ bytes a second; 400 Gb/s InfiniBand is 50."""
    efficiency: float = 0.5
    price: float | None = None
    """Of a GPU for an hour."""
    bench: Path | None = None
    """What ``flipproof bench`` wrote on such a GPU."""

    def find_gpu(self) -> Gpu:
        """Raises ConfigError as ``gpu_called`` and ``benched`` do."""
        gpu = gpu_called(self.gpu)
        return gpu if self.bench is None else benched(gpu, self.bench)


@dataclass(frozen=True)
class Plan:
    """What a training needs, as far as arithmetic tells."""

    shape: Shape
    spread: Spread
    gpu: Gpu
    kept: Kept
    memory: Memory
    pace: Pace
    request: Request
    config: RunConfig
    """With what followed from it: dtypes, accumulation, steps."""
    dry_run: int | None = None
    """Bytes that ``memory.allocated`` is by ``dry_run.py``, where it was asked."""

    @property
    def steps(self) -> int:
        return self.config.training.steps or 0

    @property
    def rows(self) -> dict[Keep, int]:
        """For each level the largest ``local_batch_size`` that fits."""
        return {level: _rows(self.shape, self.config, self.spread, self.gpu, level) for level in LEVELS}

    @property
    def by_level(self) -> dict[Keep, Memory]:
        """What the config's own ``local_batch_size`` needs where all blocks keep the level."""
        return {level: memory(self.shape, self.config, self.spread, in_all(self.shape, level)) for level in LEVELS}

    @property
    def room(self) -> float:
        """Bytes of a GPU that training may fill."""
        return _room(self.gpu)

    @property
    def needed(self) -> float:
        """Bytes of each GPU, by the dry run where there was one."""
        return self.memory.needed if self.dry_run is None else needed_for(self.dry_run)

    @property
    def fits(self) -> bool:
        return self.needed <= self.room

    def efficiency_at(self, tokens_per_second: float) -> float | None:
        """The efficiency of products by which so many tokens a second are planned; None where none gives them, or they
        depend on communication."""
        paced = self.pace
        products = paced.products + paced.tokens / tokens_per_second - paced.seconds
        if products <= 0 or min(products, paced.products) + paced.flips < paced.communication:
            return None
        efficiency = self.request.efficiency * paced.products / products
        return efficiency if efficiency <= 1 else None

    @property
    def hours(self) -> float:
        return self.steps * self.pace.seconds / 3600

    @property
    def cost(self) -> float | None:
        price = self.request.price
        return None if price is None else price * self.hours * self.spread.gpus


def make_plan(config: RunConfig, request: Request) -> Plan:
    """
    Raises:
        ConfigError: for what cannot be: a GPU nobody knows, a bench of another, degrees that do not multiply to the
            GPUs, a model of another kind than decoders, one that fits at no setting.
    """
    plan = plan_anyway(config, request)
    check_fits(plan.shape, plan.config, plan.spread, plan.gpu)
    return plan


def plan_anyway(config: RunConfig, request: Request) -> Plan:
    """As ``make_plan``, also where nothing fits."""
    gpu, spread = request.find_gpu(), _spread(config, request)
    check_spread(config.parallelism, spread.gpus, request.gpus, config.model.quantize)
    shape, config = sized(config, spread.gpus)
    if not can_lie(shape, config, spread):
        why = f"over {spread.shards} GPUs, by which its rows do not divide"
        raise unshared(config.parallelism, str(config.model.quantize), why)
    return plan_of(shape, config, spread, gpu, request)


def can_lie(shape: Shape, config: RunConfig, spread: Spread) -> bool:
    """Whether a model lies so on GPUs: one whose weights are quantised where each has all, or they share rows."""
    return not shape.stored or spread.shards == 1 or shares(shape, config, spread)


def sized(config: RunConfig, gpus: int) -> tuple[Shape, RunConfig]:
    """The model's shape, and the config with what follows from it: dtypes, accumulation, steps.

    Raises:
        ConfigError: as ``make_plan`` does.
    """
    config = _with_dtypes(config)
    shape = shape_of(config)
    of = config.training.tokens_per_parameter_of
    counted = of if isinstance(of, int) else shape.parameters - shape.embedding * (of == "non-embedding")
    return shape, resolve_steps(config, counted, gpus)


def _with_dtypes(config: RunConfig) -> RunConfig:
    """``config`` with the dtypes that training has. Of a flavor's checkpoint only a network would say it; Llama's is
    bfloat16."""
    training = config.training
    if training.dtype is not None:
        return config
    if config.model.flavor is not None and config.model.init == "pretrained":
        computed: Any = training.mixed_precision_param or "bfloat16"
        held: Any = "bfloat16" if config.lora.r else "float32"
        return replace(config, training=replace(training, dtype=held, mixed_precision_param=computed))
    config = with_trainable_weights(config)
    held = held_dtype(config, byte_tokenizer()) or "float32"
    return replace(config, training=replace(config.training, dtype=held))


def plan_of(shape: Shape, config: RunConfig, spread: Spread, gpu: Gpu, request: Request) -> Plan:
    """Of a config whose steps are resolved."""
    kept = _kept(shape, config, spread, gpu)
    between = min(gpu.link, request.node_link)
    links = gpu.link if spread.shards <= request.gpus else between, gpu.link if request.nodes == 1 else between
    return Plan(
        shape,
        spread,
        gpu,
        kept,
        memory(shape, config, spread, kept),
        pace(shape, config, spread, kept, gpu, links, request.efficiency),
        request,
        config,
    )


def _spread(config: RunConfig, request: Request) -> Spread:
    total, parallelism = request.gpus * request.nodes, config.parallelism
    if total < 1:
        raise ConfigError([f"--gpus {request.gpus} --nodes {request.nodes}: at least one GPU is needed"])
    if parallelism.cpu_offload and total == 1:
        raise ConfigError(["parallelism.cpu_offload = True: one GPU shares with no other; it needs several"])
    try:
        replicas, shards = layout(parallelism, total, request.gpus)
    except ConfigError as error:
        degrees = {"fsdp_degree": parallelism.fsdp_degree, "replicas": parallelism.replicas}
        said = ", ".join(f"parallelism.{key} = {value}" for key, value in degrees.items() if value)
        raise ConfigError(
            [
                f"{said} with {parallelism.sharding_strategy}: {total} GPUs ({request.nodes} x {request.gpus}) do not "
                "divide so"
            ]
        ) from error
    return Spread(shards, replicas, request.gpus)


def check_fits(shape: Shape, config: RunConfig, spread: Spread, gpu: Gpu) -> None:
    """Raises ConfigError where not one sequence fits at any setting, with what would."""
    needed = _least(shape, config, spread)
    if needed <= _room(gpu):
        return
    would = None
    wider = [Spread(2**i, 1, _NODE) for i in range(1, 13)]
    more = [wide.gpus for wide in wider if can_lie(shape, config, wide) and _least(shape, config, wide) <= _room(gpu)]
    if spread.shards > 1 and not shape.stored and _least(shape, offloading(config), spread) <= _room(gpu):
        would = "parallelism.cpu_offload = true"
    elif more:
        would = f"full_shard over {more[0]} of them"
    elif shape.stored:  # which a node shares at most
        would = "a larger GPU"
    raise ConfigError(
        [
            f"--gpus {spread.gpus} x {gpu.name}: even one sequence with activation_checkpointing = 'full' needs "
            f"{needed / 2**30:.1f} GiB of the {_ROOM * gpu.memory:.1f} that training may fill on each; "
            f"{would or 'no number of them'} would do"
        ]
    )


def _least(shape: Shape, config: RunConfig, spread: Spread) -> float:
    """Bytes of each GPU that a sequence needs where all is computed again."""
    one = replace(config, training=replace(config.training, local_batch_size=1))
    return memory(shape, one, spread, in_all(shape, "nothing")).needed


def offloading(config: RunConfig) -> RunConfig:
    return replace(config, parallelism=replace(config.parallelism, cpu_offload=True))


def _room(gpu: Gpu) -> float:
    return _ROOM * gpu.memory * 2**30


def _kept(shape: Shape, config: RunConfig, spread: Spread, gpu: Gpu) -> Kept:
    """As ``models/recompute.py`` has it: auto goes through the levels as long as all blocks find room, and the level
    that does not fit goes to as many as do."""
    mode = config.training.activation_checkpointing
    if isinstance(mode, int):
        nothing = -(-shape.blocks // mode)
        return {"nothing": nothing, "everything": shape.blocks - nothing}
    if mode != "auto":
        return in_all(shape, _KEEPS[mode])

    def fits(kept: Kept) -> bool:
        return memory(shape, config, spread, kept).needed <= _room(gpu)

    best = LEVELS[0]
    for level in LEVELS[1:]:
        if not fits(in_all(shape, level)):
            some = ({best: shape.blocks - n, level: n} for n in range(shape.blocks - 1, 0, -1))
            return next(filter(fits, some), in_all(shape, best))
        best = level
    return in_all(shape, best)


def _rows(shape: Shape, config: RunConfig, spread: Spread, gpu: Gpu, level: Keep) -> int:
    def fits(rows: int) -> bool:
        tried = replace(config, training=replace(config.training, local_batch_size=rows))
        return memory(shape, tried, spread, in_all(shape, level)).needed <= _room(gpu)

    low, high = 0, 1
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def as_record(plan: Plan) -> dict[str, Any]:
    """Of JSON: bytes, seconds and counts."""
    return {
        "model": asdict(plan.shape) | {"parameters": plan.shape.parameters},
        "gpu": {key: getattr(plan.gpu, key) for key in ("name", "memory", "bandwidth", "link")}
        | {"peak_flops": plan.gpu.peak(computed_bytes(plan.config))},
        "gpus": plan.spread.gpus,
        "shards": plan.spread.shards,
        "replicas": plan.spread.replicas,
        "kept": plan.kept,
        "memory": {
            "parts": plan.memory.parts,
            "peak": plan.memory.when,
            "allocated": plan.memory.allocated,
            "dry_run": plan.dry_run,
            "needed": plan.needed,
            "host": plan.memory.host,
        },
        "fits": plan.fits,
        "largest_local_batch_size": plan.rows,
        "step": asdict(plan.pace) | {"seconds": plan.pace.seconds, "tokens_per_second": plan.pace.tokens_per_second},
        "steps": plan.steps,
        "hours": plan.hours,
        "cost": plan.cost,
        "efficiency": plan.request.efficiency,
    }


_SAYS: dict[Keep, str] = {
    "nothing": "each block's input (full)",
    "products": "products and attention (selective)",
    "everything": "everything (none)",
    "weights": "everything, merged weights and flipped inputs (what auto ends with)",
}


def _short(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def as_text(plan: Plan) -> str:
    """For a terminal."""
    shape, spread, pace_ = plan.shape, plan.spread, plan.pace
    adapters = f" and {_short(shape.adapters * shape.blocks)} in adapters" if shape.adapters else ""
    copies = f", sharded over {spread.shards}" if spread.shards > 1 else ""
    copies += f", {spread.replicas} copies" if spread.replicas > 1 else ""
    lines = [f"{_short(shape.parameters)} parameters{adapters} on {spread.gpus} x {plan.gpu.name}{copies}"]
    lines.append(f"\nmemory of each GPU in GiB, at its most {plan.memory.when}:")
    lines += [f"  {name:<28}{size / 2**30:>8.1f}" for name, size in plan.memory.parts.items()]
    lines.append(f"  {'allocated by PyTorch':<28}{plan.memory.allocated / 2**30:>8.1f}")
    if plan.dry_run is not None:
        off = plan.memory.allocated / plan.dry_run - 1
        lines.append(f"  {'by a dry run of a step':<28}{plan.dry_run / 2**30:>8.1f}  ({off:+.1%} off it)")
    lines.append(f"  {'needed, with CUDA and gaps':<28}{plan.needed / 2**30:>8.1f}  of {plan.gpu.memory:.1f}")
    if plan.memory.host:
        node = plan.memory.host * min(plan.request.gpus, spread.gpus)
        lines.append(f"  {'in the CPU memory of a node':<28}{node / 2**30:>8.1f}")
    lines += [f"  {n} block{'s keep' if n > 1 else ' keeps'} {_SAYS[level]}" for level, n in plan.kept.items() if n]
    if not plan.fits:
        lines.append("  it does NOT fit")
    lines.append("  the largest local_batch_size that fits, by what blocks keep:")
    lines += [f"    {_SAYS[level]}: {rows or 'none'}" for level, rows in plan.rows.items()]
    peak = plan.gpu.peak(computed_bytes(plan.config))
    beside_them = "flips and dequantisation" if shape.stored else "flips and merges"
    beside = (
        f", communication {pace_.communication:.2f} beside them, which slows them by {pace_.slowed:.2f} and leaves "
        f"{pace_.exposed:.2f} exposed"
    )
    lines.append(
        f"\na step of {pace_.tokens:,} tokens: {pace_.seconds:.2f} s (products {pace_.products:.2f} at "
        f"{plan.request.efficiency:.0%} of {peak / 1e12:.0f} TFLOP/s, {beside_them} {pace_.flips:.2f}"
        f"{beside if spread.gpus > 1 else ''}{f', AdamW on the CPU {pace_.adam:.2f}' if pace_.adam else ''})"
    )
    price = "" if plan.cost is None else f", {plan.cost:,.2f} at {plan.request.price:g} a GPU-hour"
    lines.append(f"{pace_.tokens_per_second:,.0f} tokens/s; {plan.steps:,} steps take {plan.hours:,.2f} hours{price}")
    return "\n".join(lines)
