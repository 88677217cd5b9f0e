"""``flipproof compare``: sharding strategies and activation checkpointing side by side, each measured over a few steps
of the training that a config describes, beside what ``flipproof plan`` says of it.

Each row is the real thing: the config's model, built, spread and compiled as ``flipproof train`` does it, its text, and
the steps of ``train/step.py``. Nothing is written.

The processes measure one row after the other, all together. Where a row does not fit, all find so at the same
allocation, since all do the same. Should one alone run out of memory, the others would wait for it until
``parallelism.timeout_minutes`` end the run.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from flipproof.config import ParallelismConfig, RunConfig
from flipproof.config.schema import Strategy
from flipproof.data.sequences import load_text
from flipproof.errors import ConfigError
from flipproof.log import logger
from flipproof.models.build import build_model, check_length, check_use, with_trainable_weights
from flipproof.models.load import load_tokenizer
from flipproof.models.packed import check_text
from flipproof.models.parallelize import checkpointing_of
from flipproof.plan.estimate import Plan, Request, plan_of, sized
from flipproof.plan.gpus import GPUS, Gpu, gpu_named
from flipproof.plan.memory import Spread
from flipproof.train.cuda_graph import Recorded, peak_allocated
from flipproof.train.rundir import placed
from flipproof.train.start import check_trainable, held_dtype, resolve_batch
from flipproof.train.step import Training
from flipproof.train.throughput import communication_share
from flipproof.world import World, arrange, join_world, layout, node_size

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_WARM_UP = 3
"""Steps before those that count: the first compiles, the second records a CUDA graph where there is one."""
_PROFILED = 2
"""Steps after them: one while the profiler warms up, and one that it records."""


@dataclass(frozen=True)
class Measured:
    """What steps took, of all processes."""

    seconds: float
    """Of a step, in the mean."""
    peak: float | None
    """Bytes that PyTorch allocated at most, on the GPU where that is most. None on CPUs, where no more is known than
    the most that a process ever held."""
    communication: float | None
    """Share of one more step, which is profiled, in which collectives run, in the mean of the processes, waiting for
    each other included. None for a process alone."""
    exposed: float | None
    """The share in which collectives run and nothing computes. None on CPUs, too, whose cores do both."""


@dataclass(frozen=True)
class Row:
    """A strategy with a mode of activation checkpointing."""

    config: RunConfig
    spread: Spread | None
    """How the model lies on the processes; None where it cannot."""
    measured: Measured | None
    planned: Plan | None
    """None for what is not planned for."""
    why: str | None
    """Why nothing was measured."""

    @property
    def strategy(self) -> str:
        """With its degrees, where there are two."""
        name: str = self.config.parallelism.sharding_strategy
        if self.spread is None or (name != "hybrid_shard" and 1 in (self.spread.shards, self.spread.replicas)):
            return name
        return f"{name} {self.spread.shards} x {self.spread.replicas}"


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    processes: int
    device: str
    gpu: Gpu | None
    """What plans are of. None for a device that is not planned for: of their numbers only bytes count then."""
    steps: int
    """That were measured of each row."""


def compare(
    config: RunConfig,
    strategies: Sequence[Strategy] = (),
    checkpointing: Sequence[str | int] = (),
    steps: int = 6,
    node_link: float = 50.0,
    efficiency: float = 0.5,
) -> Comparison:
    """Measure each strategy with each mode, in each of the processes that torchrun started.

    Args:
        strategies: () is all of them, or for a process alone ``no_shard``. The config's own keeps its degrees.
        checkpointing: values of ``training.activation_checkpointing``; () is the config's own.
        steps: to measure of each, after a warm-up.
        node_link, efficiency: of plans, as in ``Request``.

    Raises:
        ConfigError: before anything is measured, for strategies that share a model where there is one process, and for
            a model, text or batch that ``train`` refuses. What it refuses of one row is that row's ``why``.
    """
    check_trainable(config)
    with join_world(ParallelismConfig(timeout_minutes=config.parallelism.timeout_minutes)) as world:
        strategies = tuple(dict.fromkeys(strategies)) or (STRATEGIES if world.size > 1 else ("no_shard",))
        modes = tuple(dict.fromkeys(checkpointing)) or (config.training.activation_checkpointing,)
        sharing = [strategy for strategy in strategies if strategy != "no_shard"]
        if world.size == 1 and sharing:
            raise ConfigError(
                [
                    f"--strategies {' '.join(sharing)}: 1 process was started, which can share a model with no other; "
                    "start several (--devices N, or torchrun), or compare no_shard alone"
                ]
            )
        bench = _Bench(config, world, steps, node_link, efficiency)
        rows = [bench.row(strategy, mode) for strategy in strategies for mode in modes]
        return Comparison(rows, world.size, bench.device, bench.gpu, steps)


class _Bench:
    """What the rows have in common, in one of the processes."""

    def __init__(self, config: RunConfig, world: World, steps: int, node_link: float, efficiency: float) -> None:
        self.world, self.steps = world, steps
        self.tokenizer = load_tokenizer(config.model)
        check_length(config, self.tokenizer)
        self.config = config = self._short(with_trainable_weights(config))
        training = config.training
        needed = (training.steps or 0) * config.sequences_per_step(world.size)
        self.text, self.held_out = load_text(config.data, self.tokenizer, training.seq_len, needed)
        where = placed(world)
        name, nodes = gpu_named(where["gpu"]), where["nodes"]
        self.device, self.gpu = where["gpu"] or "CPU", GPUS[name] if name else None
        self.request = Request(world.size // nodes, nodes, node_link=node_link, efficiency=efficiency)
        self.shape = None
        try:
            self.shape, _ = sized(config, world.size)
        except ConfigError as error:
            logger.warning("flipproof plan says nothing of it: %s", "; ".join(error.problems))
        self._arranged: dict[tuple[int, int], World] = {}

    def _short(self, config: RunConfig) -> RunConfig:
        """A training of no more steps than are measured, and with the dtype that its weights would have."""
        training = replace(
            config.training,
            dtype=held_dtype(config, self.tokenizer),
            steps=_WARM_UP + self.steps + _PROFILED,
            epochs=None,
            tokens_per_parameter=None,
            warmup_steps=0,
            warmup_ratio=None,
        )
        return resolve_batch(replace(config, training=training), self.world.size)

    def row(self, strategy: Strategy, mode: Any) -> Row:
        """Measure one; all processes call."""
        training = replace(self.config.training, activation_checkpointing=mode)
        named = replace(self.config.parallelism, sharding_strategy=strategy)
        config = replace(self.config, training=training, parallelism=named)
        spread, measured, planned = None, None, None
        why: str | None = None
        try:
            config = replace(config, parallelism=self._parallelism(strategy))
            world = self._arrange(config.parallelism)
            on_a_node = node_size(world.size)
            replicas, shards = layout(config.parallelism, world.size, on_a_node)
            spread = Spread(shards, replicas, on_a_node)
            check_use(config, world.size)
            planned = self._planned(config, spread)
            measured = self._measured(config, world)
        except ConfigError as error:
            why = "; ".join(error.problems)
        except torch.OutOfMemoryError as error:
            why = str(error).partition(" GPU ")[0]  # what follows is about the process
        # only now, since what was raised holds the model
        gc.collect()
        torch.compiler.reset()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        told = [reason for reason in self.world.gathered(why) if reason]
        row = Row(config, spread, None if told else measured, planned, told[0] if told else None)
        said = f"{row.measured.seconds * 1e3:,.1f} ms a step" if row.measured else row.why
        logger.info("%s with activation_checkpointing = %s: %s", row.strategy, mode, said)
        return row

    def _parallelism(self, strategy: Strategy) -> ParallelismConfig:
        """The config's own strategy as it is; another over all processes, and in groups over those of a node or, on
        one node, as few groups as there can be."""
        own, size = self.config.parallelism, self.world.size
        if strategy == own.sharding_strategy:
            return own
        degree = None
        if strategy == "hybrid_shard" and self.request.nodes == 1:
            degree = next((size // n for n in range(2, size) if size % n == 0), None)
            if degree is None:
                raise ConfigError([f"hybrid_shard: {size} processes do not divide into groups of several"])
        other = replace(own, sharding_strategy=strategy, fsdp_degree=degree, replicas=None)
        if problems := other.problems():
            raise ConfigError(f"parallelism.{problem}" for problem in problems)
        return other

    def _arrange(self, parallelism: ParallelismConfig) -> World:
        """Those that are arranged alike have their communicators, and the memory that these take, in common."""
        degrees = layout(parallelism, self.world.size, node_size(self.world.size))
        if degrees not in self._arranged:
            self._arranged[degrees] = arrange(self.world, parallelism)
        return self._arranged[degrees]

    def _planned(self, config: RunConfig, spread: Spread) -> Plan | None:
        if self.shape is None:
            return None
        mode: Any = checkpointing_of(config, self.world)
        if mode == "auto" and self.gpu is None:  # it fills a memory that is not known
            return None
        config = replace(config, training=replace(config.training, activation_checkpointing=mode))
        # where it is not known, any will do: what another mode needs is the same on all
        return plan_of(self.shape, config, spread, self.gpu or GPUS["h100"], self.request)

    def _measured(self, config: RunConfig, world: World) -> Measured:
        model = build_model(config, self.tokenizer, world, config.lora)
        check_text(config.training, model, self.tokenizer, self.text, self.held_out)
        training = Training(config, model, world, self.text, [len(self.text)])
        model.train()
        training.fit_memory()
        try:
            return measure_steps(
                lambda step: training.step(step, config.training.lr), world, self.steps, training.recorded
            )
        finally:
            training.release()


def measure_steps(
    step: Callable[[int], object], world: World, count: int, recorded: Recorded | None = None
) -> Measured:
    """Time ``count`` steps, after some that warm up and before some for the profiler; all processes call.

    Args:
        step: runs the step of this number, which counts from 0.
        recorded: what its micro-batches may be.
    """
    on_gpu = world.device.type == "cuda"

    def together() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        world.wait()
        return time.perf_counter()

    step(0)
    if on_gpu:  # what compiles is no part of it
        torch.cuda.reset_peak_memory_stats()
    for number in range(1, _WARM_UP):
        step(number)
    began = together()
    for number in range(_WARM_UP, _WARM_UP + count):
        step(number)
    seconds = world.largest(together() - began) / count
    peak = world.largest(peak_allocated(recorded)) if on_gpu else None
    running = exposed = None
    if world.size > 1:
        kind = torch.profiler.ProfilerActivity
        one_after_another = torch.profiler.schedule(wait=0, warmup=1, active=1)
        with torch.profiler.profile(
            activities=[kind.CUDA if on_gpu else kind.CPU], schedule=one_after_another, acc_events=True
        ) as profile:
            # profilers take long to start, not all as long, and waiting for one would pass for communication
            step(_WARM_UP + count)
            together()
            profile.step()
            step(_WARM_UP + count + 1)
            if on_gpu:
                torch.cuda.synchronize()
        shares = communication_share(profile) or (None, None)  # which all processes have, or none
        running, exposed = (None if share is None else world.mean(share) for share in shares)
    return Measured(seconds, peak, running, exposed)


# -- what is said ------------------------------------------------------------------------------------------------------


def as_records(comparison: Comparison) -> list[dict[str, Any]]:
    """Of JSON: bytes, seconds, and shares of a step; null is what was not measured or is not planned for."""
    return [
        {
            "sharding_strategy": row.config.parallelism.sharding_strategy,
            "shards": None if row.spread is None else row.spread.shards,
            "replicas": None if row.spread is None else row.spread.replicas,
            "activation_checkpointing": row.config.training.activation_checkpointing,
            "why": row.why,
            "measured": None if row.measured is None else _measured_record(row, row.measured, comparison),
            "planned": None if row.planned is None else _planned_record(row.planned, comparison.gpu is not None),
        }
        for row in comparison.rows
    ]


def _measured_record(row: Row, found: Measured, comparison: Comparison) -> dict[str, float | None]:
    tokens = row.config.sequences_per_step(comparison.processes) * row.config.training.seq_len
    return {
        "tokens_per_second": tokens / found.seconds,
        "seconds": found.seconds,
        "allocated": found.peak,
        "communication_seconds": None if found.communication is None else found.communication * found.seconds,
        "communication_share": found.communication,
        "exposed_communication_share": found.exposed,
    }


def _planned_record(plan: Plan, timed: bool) -> dict[str, float | None]:
    pace = plan.pace
    return {
        "tokens_per_second": pace.tokens_per_second if timed else None,
        "seconds": pace.seconds if timed else None,
        "allocated": plan.memory.allocated,
        "communication_seconds": pace.communication if timed else None,
        "communication_share": pace.communication / pace.seconds if timed else None,
        "exposed_communication_share": pace.exposed / pace.seconds if timed else None,
        "gathered_bytes": pace.gathered_bytes,
        "reduced_bytes": pace.reduced_bytes,
    }


_COLUMNS = (
    # whose, its head, its name in records, in which unit, how it is written
    ("measured", "tokens/s", "tokens_per_second", 1.0, ",.0f"),
    ("measured", "step ms", "seconds", 1e3, ",.1f"),
    ("measured", "GiB", "allocated", 2**-30, ".2f"),
    ("measured", "comm. ms", "communication_seconds", 1e3, ",.1f"),
    ("measured", "of step", "communication_share", 1.0, ".0%"),
    ("measured", "exposed", "exposed_communication_share", 1.0, ".0%"),
    ("planned", "tokens/s", "tokens_per_second", 1.0, ",.0f"),
    ("planned", "GiB", "allocated", 2**-30, ".2f"),
)


def as_table(comparison: Comparison) -> str:
    """For a terminal: a line for each row, with a dash for what was not measured or is not planned for."""
    training = comparison.rows[0].config.training
    several = f"{comparison.processes} processes" if comparison.processes > 1 else "1 process"
    title = (
        f"{several} on {comparison.device}, each with {training.local_batch_size} x "
        f"{training.gradient_accumulation_steps} sequences of {training.seq_len} tokens a step; means of "
        f"{comparison.steps} steps"
    )
    lines = [
        ["", "", *(whose if head == "tokens/s" else "" for whose, head, *_ in _COLUMNS)],
        ["strategy", "checkpointing", *(head for _, head, *_ in _COLUMNS)],
    ]
    for row, record in zip(comparison.rows, as_records(comparison), strict=True):
        cells = []
        for whose, _, name, unit, written in _COLUMNS:
            value = (record[whose] or {}).get(name)
            cells.append("–" if value is None else format(value * unit, written))
        lines.append([row.strategy, str(row.config.training.activation_checkpointing), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    reasons = ["", "", *(row.why or "" for row in comparison.rows)]
    said = [title]
    for line, reason in zip(lines, reasons, strict=True):
        names = map(str.ljust, line[:2], widths)
        numbers = map(str.rjust, line[2:], widths[2:])
        said.append("  ".join([*names, *numbers, reason]).rstrip())
    return "\n".join(said)
