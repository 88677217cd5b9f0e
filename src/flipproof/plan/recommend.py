"""``flipproof plan --recommend``: the strategy, degrees, recomputation and micro-batch that take the least time of all
that fit, with the batch of a step as it is; and why the others do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import tomli_w

from flipproof.config import RunConfig
from flipproof.plan.estimate import Plan, Request, can_lie, check_fits, offloading, plan_of, sized
from flipproof.plan.memory import Spread

Mode = Literal["auto", "none", "selective", "full"]
_MODES: tuple[Mode, ...] = ("auto", "none", "selective", "full")


@dataclass(frozen=True)
class Option:
    """A way to run a training, with the micro-batch that is fastest among those that fit, else with the smallest."""

    config: RunConfig
    plan: Plan

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What of the config makes it this one."""
        training, parallelism = self.config.training, self.config.parallelism
        degrees = {"fsdp_degree": parallelism.fsdp_degree, "replicas": parallelism.replicas}
        return {
            "training": {
                "local_batch_size": training.local_batch_size,
                "gradient_accumulation_steps": training.gradient_accumulation_steps,
                "activation_checkpointing": training.activation_checkpointing,
            },
            "parallelism": {"sharding_strategy": parallelism.sharding_strategy}
            | ({"cpu_offload": True} if parallelism.cpu_offload else {})
            | {key: degree for key, degree in degrees.items() if degree is not None},
        }


def recommend(config: RunConfig, request: Request) -> list[Option]:
    """All ways, those that fit first and the fastest of them first.

    Raises:
        ConfigError: as ``make_plan`` does; where none fits, too.
    """
    gpu, total = request.find_gpu(), request.gpus * request.nodes
    usual = replace(
        config.parallelism, sharding_strategy="full_shard", fsdp_degree=None, replicas=None, cpu_offload=False
    )
    shape, config = sized(replace(config, parallelism=usual), total)
    least = [(offloading(config) if total > 1 else config, Spread(total, 1, request.gpus))]
    if shape.stored:
        ways = Spread(request.gpus, request.nodes, request.gpus), Spread(1, total)
        least = [(config, spread) for spread in ways if can_lie(shape, config, spread)]
    check_fits(shape, *least[0], gpu)
    sequences = config.training.local_batch_size * config.training.gradient_accumulation_steps
    options = []
    for parallelism, spread in _ways(config, request):
        if not can_lie(shape, replace(config, parallelism=parallelism), spread):
            continue
        for mode in _MODES:
            tried = []
            for rows in (n for n in range(sequences, 0, -1) if sequences % n == 0):
                training = replace(
                    config.training,
                    local_batch_size=rows,
                    gradient_accumulation_steps=sequences // rows,
                    global_batch_size=None,
                    activation_checkpointing=mode,
                )
                way = replace(config, training=training, parallelism=parallelism)
                tried.append(Option(way, plan_of(shape, way, spread, gpu, request)))
            options.append(max(tried, key=_order))
    return sorted(options, key=_order, reverse=True)


def _order(option: Option) -> tuple[bool, float]:
    """The fastest last; before all that fit those that do not, the smallest last."""
    plan = option.plan
    return plan.fits, plan.pace.tokens_per_second if plan.fits else -plan.memory.needed


def _ways(config: RunConfig, request: Request) -> Iterator[tuple[Any, Spread]]:
    """(a table of parallelism, how the model lies then)."""
    total, usual = request.gpus * request.nodes, config.parallelism
    if total == 1:
        yield usual, Spread(1, 1)
        return
    for offload in (False, True):
        own = replace(usual, cpu_offload=offload)
        yield own, Spread(total, 1, request.gpus)
        yield replace(own, sharding_strategy="shard_grad_op"), Spread(total, 1, request.gpus)
        for degree in range(2, request.gpus + 1):
            if request.gpus % degree == 0 and degree < total:
                hybrid = replace(own, sharding_strategy="hybrid_shard", fsdp_degree=degree, replicas=total // degree)
                yield hybrid, Spread(degree, total // degree, request.gpus)
    yield replace(usual, sharding_strategy="no_shard"), Spread(1, total)


def as_table(options: list[Option]) -> str:
    """For a terminal: what fits, what does not and why, and the TOML of the first."""
    lines = ["  tokens/s    GiB  strategy                   checkpointing  local_batch_size x accumulation"]
    for option in options:
        plan, training = option.plan, option.config.training
        lies: str = option.config.parallelism.sharding_strategy
        if lies == "hybrid_shard":
            lies += f" {plan.spread.shards} x {plan.spread.replicas}"
        lies += ", offload" * option.config.parallelism.cpu_offload
        speed = f"{plan.pace.tokens_per_second:>10,.0f}" if plan.fits else "         –"
        why = "" if plan.fits else f"  does not fit: {plan.room / 2**30:.1f} GiB may be filled"
        lines.append(
            f"{speed} {plan.memory.needed / 2**30:>6.1f}  {lies:<26} {training.activation_checkpointing!s:<14} "
            f"{training.local_batch_size} x {training.gradient_accumulation_steps}{why}"
        )
    lines.append(f"\nthe first, as TOML:\n\n{tomli_w.dumps(options[0].settings).rstrip()}")
    return "\n".join(lines)


def as_records(options: list[Option]) -> list[dict[str, Any]]:
    """Of JSON, in the same order."""
    return [
        option.settings
        | {
            "fits": option.plan.fits,
            "needed": option.plan.memory.needed,
            "tokens_per_second": option.plan.pace.tokens_per_second,
            "hours": option.plan.hours,
            "cost": option.plan.cost,
        }
        for option in options
    ]
