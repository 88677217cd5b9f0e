"""Perplexity by arms: the same held-out text with and without faults, guard and training, each with its interval.

``clean`` is the model itself; ``guard`` has the range guard but no flips, so that what the threshold alone costs is
seen; ``flipped`` has both. After training the same model gives ``recovered`` (faults on) and ``recovered_clean``
(off).

Faulty arms are measured once per fault seed, with seeds that training never uses. Perplexity is exp of the
token-weighted mean cross-entropy; the 95% interval is Student's t over the fault seeds' losses, and says how far the
mean would move with other faults on this text.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from flipproof import parallel, runlog
from flipproof.adapter import adapter_spec, load_adapter
from flipproof.build import build_model
from flipproof.config import ConfigError, RunConfig
from flipproof.data import PackedText, load_held_out
from flipproof.inject import faults, is_faulty
from flipproof.loss import IGNORED, next_token_loss
from flipproof.model import compute_context, load_tokenizer
from flipproof.parallel import World
from flipproof.runlog import logger

BASE_ARMS = ("clean", "guard", "flipped")
TRAINED_ARMS = ("recovered", "recovered_clean")


@dataclass(frozen=True)
class Arm:
    """One row of the table: mean over fault seeds, loss in nats per token."""

    loss: float
    perplexity: float
    tokens: int
    """Predicted tokens per trial."""
    trials: int
    loss_interval: tuple[float, float] | None
    """95% over fault seeds; None where there is one trial, as in arms without flips, which have no seed."""
    perplexity_interval: tuple[float, float] | None
    trial_losses: tuple[float, ...]

    @classmethod
    def from_losses(cls, losses: Sequence[float], tokens: int) -> "Arm":
        interval = t_interval(losses)
        mean = math.fsum(losses) / len(losses)
        return cls(
            loss=mean,
            perplexity=_exp(mean),
            tokens=tokens,
            trials=len(losses),
            loss_interval=interval,
            perplexity_interval=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
            trial_losses=tuple(losses),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Arm":
        """An arm of results.json."""
        return cls.from_losses([math.inf if x is None else x for x in values["trial_losses"]], values["tokens"])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # a float holds no larger exponential


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent values; None for fewer than two, or where one is infinite."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    mean = math.fsum(values) / n
    return float(mean - half), float(mean + half)


def fault_seeds(base_seed: int, trials: int) -> list[int]:
    """Seeds for evaluation; ``base_seed``, which training uses, is not among them."""
    return [(base_seed + 1 + i) % 2**63 for i in range(trials)]


@torch.no_grad()
def mean_loss(
    model: nn.Module, text: PackedText, num_samples: int, batch_size: int, world: World | None = None
) -> tuple[float, int]:
    """(token-weighted mean cross-entropy in nats, predicted tokens) over ``num_samples`` sequences spread evenly over
    the text, or all of it where it has fewer.

    ``batch_size`` sequences at a time in each process; all processes return the same.
    """
    world = world or World(0, 1, next(model.parameters()).device)
    n = min(num_samples, len(text))
    chosen = np.arange(n) * len(text) // n
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for start in range(0, n, batch_size * world.size):
            here = chosen[start + world.rank * batch_size :][:batch_size]
            # Every process runs as many passes on as many rows, so that rows keep their place in the whole batch.
            short = batch_size - len(here) if world.size > 1 else 0
            ids = text.batch(np.concatenate([here, chosen[:1].repeat(short)])).to(world.device)
            labels = ids.clone()
            labels[len(here) :] = IGNORED
            predicted = len(here) * (ids.shape[1] - 1)
            loss = float(next_token_loss(model, ids, labels).double())
            if predicted:
                total += loss * predicted
            tokens += predicted
    finally:
        model.train(was_training)
    total, tokens = world.total(total), round(world.total(tokens))
    loss_value = total / tokens
    # NaN, too, is a model that flips have broken: it predicts nothing.
    return (loss_value if math.isfinite(loss_value) else math.inf), tokens


def measure_arms(
    model: nn.Module,
    names: Sequence[str],
    text: PackedText,
    *,
    seeds: Sequence[int],
    num_samples: int,
    batch_size: int,
    world: World | None = None,
) -> dict[str, Arm]:
    """The named arms of a model; one without faulty layers has the arm ``clean`` alone."""
    arms = {}
    for name in names:
        flips = name in ("flipped", "recovered")
        guard = flips or name == "guard"
        losses, tokens = [], 0
        for seed in seeds if flips else [None]:
            on = partial(faults, model, flips=flips, guard=guard, adapters=name in TRAINED_ARMS, seed=seed)
            with on() if is_faulty(model) else nullcontext():
                loss, tokens = mean_loss(model, text, num_samples, batch_size, world)
            losses.append(loss)
        arms[name] = Arm.from_losses(losses, tokens)
    return arms


def gap_closed(arms: dict[str, Arm]) -> float | None:
    """Share of the log-perplexity that flips cost which training won back: (flipped − recovered) / (flipped −
    clean)."""
    if not {"clean", "flipped", "recovered"} <= arms.keys():
        return None
    cost = arms["flipped"].loss - arms["clean"].loss
    return (arms["flipped"].loss - arms["recovered"].loss) / cost if cost > 0 else None


def evaluate(config: RunConfig, adapter: Path | None = None, to: Path | None = None) -> dict[str, Arm]:
    """Measure a model's arms on held-out text.

    Args:
        config: model, text, faults and trials. ``lora`` counts for nothing here: an adapter brings its own.
        adapter: directory of a PEFT adapter; adds the arms ``recovered`` and ``recovered_clean``.
        to: directory to write ``results.json`` into; it must not hold one.

    Raises:
        ConfigError: where model, text, adapter or directory are at fault, before anything is measured.
    """
    if to is not None and (to / runlog.RESULTS).exists():
        raise ConfigError([f"{to / runlog.RESULTS} exists already; name another directory"])
    # what is kept for a backward pass does not matter here
    config = replace(config, training=replace(config.training, activation_checkpointing="none"))
    with parallel.start(config.parallelism) as world:
        tokenizer = load_tokenizer(config.model)
        text = load_held_out(config.data, tokenizer, config.training.seq_len)
        lora = adapter_spec(adapter) if adapter else None
        model = build_model(config, tokenizer, world, lora)
        names: tuple[str, ...] = ("clean",)
        if is_faulty(model):
            names = BASE_ARMS + (TRAINED_ARMS if adapter else ())
        else:
            logger.info("no faults are configured (bitflip.*): the clean arm alone is measured")
        if adapter:
            load_adapter(model, adapter)
        arms = measure_config_arms(config, names, model, text, world)
        if to is not None and world.first:
            to.mkdir(parents=True, exist_ok=True)
            write_results(to, config, arms, model, text)
    return arms


def measure_config_arms(
    config: RunConfig, names: Sequence[str], model: nn.Module, text: PackedText, world: World
) -> dict[str, Arm]:
    """``measure_arms`` with the config's seeds, samples, batch and compute dtype."""
    with compute_context(config.training, model):
        return measure_arms(
            model,
            names,
            text,
            seeds=fault_seeds(config.bitflip.base_seed, config.eval.trials),
            num_samples=config.eval.num_samples,
            batch_size=config.training.local_batch_size,
            world=world,
        )


def write_results(directory: Path, config: RunConfig, arms: dict[str, Arm], model: nn.Module, text: PackedText) -> None:
    """Write ``results.json``: the arms and what they were measured with. No times and no machine: equal runs write
    equal files.
    """
    runlog.write_json(
        directory / runlog.RESULTS,
        {
            "arms": {name: asdict(arm) for name, arm in arms.items()},
            "gap_closed": gap_closed(arms),
            "fault_seeds": fault_seeds(config.bitflip.base_seed, config.eval.trials),
            "bitflip": asdict(config.bitflip),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "text": text.source,
        },
    )


_ROWS = {  # arm -> (bit-flipped, fine-tuned)
    "clean": ("✘", "✘"),
    "guard": ("guard only", "✘"),
    "flipped": ("✔", "✘"),
    "recovered": ("✔", "✔"),
    "recovered_clean": ("✘", "✔"),
}


def arms_table(arms: dict[str, Arm]) -> str:
    """The table of the papers: bit-flipped, fine-tuned, perplexity, with 95% intervals."""
    lines = [
        f"{'arm':<16} {'Bitflipped':<11} {'Fine-tuned':<11} {'PPL':>10}  {'95% interval':<20} {'loss':>8}  trials",
    ]
    for name, arm in arms.items():
        flipped, tuned = _ROWS[name]
        low_high = arm.perplexity_interval
        interval = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else "-"
        lines.append(
            f"{name:<16} {flipped:<11} {tuned:<11} {arm.perplexity:>10.4g}  {interval:<20} {arm.loss:>8.4f}  "
            f"{arm.trials}"
        )
    return "\n".join(lines)
