"""Perplexity by arms: the same held-out text with and without faults, guard and training, each with its interval.

``clean`` is the model itself; ``guard`` has the range guard but no flips, so that what the threshold alone costs is
seen; ``flipped`` has both. After training the same model gives ``recovered`` (faults on) and ``recovered_clean``
(off).

Faulty arms are measured once per fault seed, with seeds that training never uses. Perplexity is exp of the
token-weighted mean cross-entropy; all sequences have as many tokens, so it is the plain mean over sequences too.

**Three intervals**, all 95%, for three questions. Write x_ks for the loss of sequence s under fault seed k.

- ``loss_interval``, over seeds: Student's t on the K seeds' means. How far the mean would move with other faults on
  *this* text. ``perplexity_interval``, which the table prints, is exp of it.
- ``text_interval``, over text: Student's t on the S sequences' means. How far it would move on other text of this kind,
  with *these* faults. Much of it is that some texts are harder than others, for every arm alike.
- ``Cost.interval``, over both: of what faults cost, the mean of d_ks = x_ks − clean_s, with other faults on other text.
  Hard texts are hard for the clean model too and drop out of the differences. Seeds and sequences are crossed, and the
  K·S differences are not independent: those of one seed share its faults, those of one sequence its words. With
  d_ks = μ + a_k + b_s + e_ks, the variance of the mean is σ_a²/K + σ_b²/S + σ_e²/(KS), and the two-way analysis of
  variance (Searle, Casella & McCulloch, Variance Components, 1992, ch. 4) estimates it without bias as

      V = s²_seeds/K + s²_text/S − s²_resid/(KS),

  from the variances of the seeds' means, of the sequences' means, and of what is left of d_ks without either. V is not
  taken below either of its first two terms, whose expectations are never above its own; its degrees of freedom are
  Satterthwaite's (1946) over these two. Sequences of one batch share a transient draw: the seeds' means hold that.

**Until it is sure.** ``until_ci`` adds seeds, in their fixed order, until the interval over seeds is narrow enough.
Stopping when the data look sure covers the truth a little less often than 95%, since a spread that is by chance too
small ends it early; Chow & Robbins (Ann. Math. Stat. 36, 1965) show that the coverage tends to 95% as the width asked
for goes to 0. Starting at 5 seeds it is 92.2% at worst, where 16 seeds are enough on average.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy import stats
from torch import nn

from flipproof import parallel, runlog
from flipproof.adapter import adapter_spec, load_adapter
from flipproof.build import build_model, check_length
from flipproof.config import RunConfig
from flipproof.data import PackedText, load_held_out
from flipproof.errors import ConfigError
from flipproof.files import write_json
from flipproof.inject import faults, is_faulty
from flipproof.injection_log import FlipLog, Replay, about, tapped
from flipproof.limits import check_ids
from flipproof.loss import loss_by_row
from flipproof.model import compute_context, load_tokenizer
from flipproof.ops.parity import dtype_name
from flipproof.parallel import World
from flipproof.runlog import logger

BASE_ARMS = ("clean", "guard", "flipped")
TRAINED_ARMS = ("recovered", "recovered_clean")
FLIPPED_ARMS = ("flipped", "recovered")
"""Those that have fault seeds."""
MIN_TRIALS = 5
"""Fewest fault seeds on which ``until_ci`` decides: a standard deviation of less is hardly one."""


@dataclass(frozen=True)
class Arm:
    """One row of the table: mean over fault seeds, loss in nats per token. The module says what the intervals cover."""

    loss: float
    perplexity: float
    tokens: int
    """Predicted tokens per trial."""
    trials: int
    loss_interval: tuple[float, float] | None
    """95% over fault seeds; None where there is one trial, as in arms without flips, which have no seed."""
    perplexity_interval: tuple[float, float] | None
    seed_sd: float | None
    """Standard deviation of the loss between fault seeds; None where there is one trial."""
    text_interval: tuple[float, float] | None
    """95% of the loss over sequences, for these fault seeds."""
    trial_losses: tuple[float, ...]
    """Of each fault seed, over all sequences."""
    sequence_losses: tuple[float, ...]
    """Of each sequence, over all fault seeds."""
    residual_variance: float | None
    """Of the losses of single sequences under single seeds, what differs from the sum of both effects, squared and
    over (K−1)(S−1); None where there is one seed or one sequence."""

    @classmethod
    def from_losses(
        cls,
        losses: Sequence[float],
        tokens: int,
        sequence_losses: Sequence[float] = (),
        residual_variance: float | None = None,
    ) -> "Arm":
        """The arm of its trials' losses and, where they are known, its sequences'."""
        interval = t_interval(losses)
        mean = math.fsum(losses) / len(losses)
        return cls(
            loss=mean,
            perplexity=_exp(mean),
            tokens=tokens,
            trials=len(losses),
            loss_interval=interval,
            perplexity_interval=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
            seed_sd=None if interval is None else float(np.std(losses, ddof=1)),
            text_interval=t_interval(sequence_losses),
            trial_losses=tuple(losses),
            sequence_losses=tuple(sequence_losses),
            residual_variance=residual_variance,
        )

    @classmethod
    def from_table(cls, table: np.ndarray, tokens: int) -> "Arm":
        """The arm of losses of shape (trials, sequences)."""
        trials, sequences = ([math.fsum(row) / len(row) for row in side.tolist()] for side in (table, table.T))
        residual = None
        if min(table.shape) > 1 and np.isfinite(table).all():
            rest = table - np.array(trials)[:, None] - np.array(sequences) + math.fsum(trials) / len(trials)
            residual = float((rest**2).sum()) / ((len(trials) - 1) * (len(sequences) - 1))
        return cls.from_losses(trials, tokens, sequences, residual)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Arm":
        """An arm of results.json."""
        trials, sequences = (
            [math.inf if x is None else x for x in values.get(key, ())] for key in ("trial_losses", "sequence_losses")
        )
        return cls.from_losses(trials, values["tokens"], sequences, values.get("residual_variance"))


@dataclass(frozen=True)
class Cost:
    """What an arm's loss is above the clean arm's on the same sequences, in nats per token."""

    cost: float
    interval: tuple[float, float] | None
    """95% over fault seeds and text together, or over text alone for an arm without flips. None where there is one
    seed or one sequence, or the model is broken beyond numbers."""


def costs(arms: dict[str, Arm]) -> dict[str, Cost]:
    """The cost of every arm but ``clean``; empty without that arm."""
    clean = arms.get("clean")
    if clean is None:
        return {}
    found = {}
    for name, arm in arms.items():
        if name == "clean":
            continue
        cost, interval = arm.loss - clean.loss, None
        if len(arm.sequence_losses) == len(clean.sequence_losses) and math.isfinite(cost):
            differences = np.subtract(arm.sequence_losses, clean.sequence_losses).tolist()
            if name not in FLIPPED_ARMS:
                interval = t_interval(differences)
            elif arm.residual_variance is not None:
                # a sequence's clean loss is the same under every seed: the residuals of differences are the arm's own
                trials = [loss - clean.loss for loss in arm.trial_losses]
                interval = two_way_interval(trials, differences, arm.residual_variance)
        found[name] = Cost(cost if math.isfinite(cost) else math.inf, interval)
    return found


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


def two_way_interval(
    seeds: Sequence[float], sequences: Sequence[float], residual_variance: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of a table of values that vary with their row and with their column (see the module).

    Args:
        seeds: means of the K ≥ 2 rows.
        sequences: means of the S ≥ 2 columns.
        residual_variance: of the values without the effects of row and column, over (K−1)(S−1).
    """
    k, s = len(seeds), len(sequences)
    of_seeds, of_text = float(np.var(seeds, ddof=1)) / k, float(np.var(sequences, ddof=1)) / s
    mean = math.fsum(seeds) / k
    variance = max(of_seeds + of_text - residual_variance / (k * s), of_seeds, of_text)
    if variance == 0:
        return mean, mean
    freedom = variance**2 / (of_seeds**2 / (k - 1) + of_text**2 / (s - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    return mean - half, mean + half


def sure_enough(losses: Sequence[float], until_ci: float, at_least: int = MIN_TRIALS) -> bool:
    """Whether the 95% interval over these seeds is within ±``until_ci`` of the mean's perplexity, or no further seed
    can make it so, one loss being infinite."""
    if len(losses) < at_least:
        return False
    interval = t_interval(losses)
    return interval is None or math.expm1((interval[1] - interval[0]) / 2) <= until_ci


def fault_seeds(base_seed: int, trials: int) -> list[int]:
    """Seeds for evaluation; ``base_seed``, which training uses, is not among them."""
    return [(base_seed + 1 + i) % 2**63 for i in range(trials)]


def mean_loss(
    model: nn.Module, text: PackedText, num_samples: int, batch_size: int, world: World | None = None
) -> tuple[float, int]:
    """(mean of ``sequence_losses``, predicted tokens)."""
    losses = sequence_losses(model, text, num_samples, batch_size, world)
    return math.fsum(losses) / len(losses), len(losses) * (text.sequences.shape[1] - 1)


@torch.no_grad()
def sequence_losses(
    model: nn.Module, text: PackedText, num_samples: int, batch_size: int, world: World | None = None
) -> list[float]:
    """Mean cross-entropy in nats per token of each of ``num_samples`` sequences spread evenly over the text, or of all
    where it has fewer; infinity where the model predicts nothing.

    ``batch_size`` sequences at a time in each process; all processes return the same.
    """
    world = world or World(0, 1, next(model.parameters()).device)
    n = min(num_samples, len(text))
    chosen = np.arange(n) * len(text) // n
    was_training = model.training
    model.eval()
    losses = torch.zeros(n, dtype=torch.float64)
    try:
        for start in range(0, n, batch_size * world.size):
            first = start + world.rank * batch_size
            here = chosen[first:][:batch_size]
            # Every process runs as many passes on as many rows, so that rows keep their place in the whole batch.
            short = batch_size - len(here) if world.size > 1 else 0
            ids = text.batch(np.concatenate([here, chosen[:1].repeat(short)])).to(world.device)
            losses[first : first + len(here)] = loss_by_row(model, ids)[: len(here)].cpu()
    finally:
        model.train(was_training)
    if world.size > 1:  # the others have 0 there: the sum is exact, in any order
        dist.all_reduce(losses, group=world.cpu_group)
    # NaN, too, is a model that flips have broken: it predicts nothing.
    return losses.where(losses.isfinite(), math.inf).tolist()


def arm_faults(model: nn.Module, name: str, seed: int | None) -> AbstractContextManager[None]:
    """The model as the named arm has it, within the block: from tick 0 of the fault seed, where the arm flips bits."""
    if not is_faulty(model):
        return nullcontext()
    flips = name in FLIPPED_ARMS
    return faults(model, flips=flips, guard=flips or name == "guard", adapters=name in TRAINED_ARMS, seed=seed)


def measure_arms(
    model: nn.Module,
    names: Sequence[str],
    text: PackedText,
    *,
    seeds: Sequence[int],
    num_samples: int,
    batch_size: int,
    world: World | None = None,
    until_ci: float | None = None,
    at_least: int = MIN_TRIALS,
) -> dict[str, Arm]:
    """The named arms of a model; one without faulty layers has the arm ``clean`` alone.

    An arm that flips bits is measured with all ``seeds``; with ``until_ci`` with the first of them that are enough
    (``sure_enough``), ``at_least`` so many. All processes stop at the same seed, having the same losses.
    """
    arms = {}
    for name in names:
        table: list[list[float]] = []
        for seed in seeds if name in FLIPPED_ARMS else [None]:
            with arm_faults(model, name, seed):
                table.append(sequence_losses(model, text, num_samples, batch_size, world))
            if until_ci is not None and sure_enough([math.fsum(row) / len(row) for row in table], until_ci, at_least):
                break
        arms[name] = Arm.from_table(np.array(table), len(table[0]) * (text.sequences.shape[1] - 1))
    return arms


def gap_closed(arms: dict[str, Arm]) -> float | None:
    """Share of the log-perplexity that flips cost which training won back: (flipped − recovered) / (flipped −
    clean)."""
    if not {"clean", "flipped", "recovered"} <= arms.keys():
        return None
    cost = arms["flipped"].loss - arms["clean"].loss
    return (arms["flipped"].loss - arms["recovered"].loss) / cost if cost > 0 else None


def evaluate(
    config: RunConfig,
    adapter: Path | None = None,
    to: Path | None = None,
    *,
    flip_log: Path | None = None,
    replay: Path | None = None,
) -> dict[str, Arm]:
    """Measure a model's arms on held-out text.

    Args:
        config: model, text, faults and trials. ``lora`` counts for nothing here: an adapter brings its own.
        adapter: directory of a PEFT adapter; adds the arms ``recovered`` and ``recovered_clean``.
        to: directory to write ``results.json`` into; it must not hold one.
        flip_log: file for every flip of the first trial of the arm ``flipped``, or with an adapter of ``recovered``.
        replay: such a file; adds the arm ``replayed``, that arm with the file's flips in the place of draws.

    Raises:
        ConfigError: where model, text, adapter, directory or file are at fault, before anything is measured.
    """
    check_free(to)
    if flip_log or replay:
        check_log(config, flip_log, replay)
        config = replace(config, training=replace(config.training, compile=False))  # which taps need
    with parallel.start(config.parallelism) as world, ExitStack() as stack:
        if world.size > 1 and (flip_log or replay):
            raise ConfigError([f"--flip-log and --replay work in one process; {world.size} were started"])
        tokenizer = load_tokenizer(config.model)
        check_length(config, tokenizer)
        text = load_held_out(config.data, tokenizer, config.training.seq_len)
        model, names = open_model(config, tokenizer, world, adapter)
        check_ids(model, tokenizer, text.sequences)
        name, seed = "recovered" if adapter else "flipped", fault_seeds(config.bitflip.base_seed, 1)[0]
        replayed = []
        if flip_log or replay:
            tap: FlipLog | Replay
            if flip_log:
                what = about(model, seed=seed, text=text.source, arm=name, eval=asdict(config.eval))
                tap = stack.enter_context(FlipLog(flip_log, **what, bitflip=asdict(config.bitflip)))
            elif replay:
                tap = Replay(replay, next(model.parameters()).dtype)
            with compute_context(config.training, model), arm_faults(model, name, seed), tapped(model, tap):
                replayed = sequence_losses(model, text, config.eval.num_samples, config.training.local_batch_size)
            if isinstance(tap, Replay):
                tap.check_all_done()
        arms = measure_config_arms(config, names, model, text, world)
        if replay:
            arms["replayed"] = Arm.from_table(np.array([replayed]), arms["clean"].tokens)
        if to is not None and world.first:
            to.mkdir(parents=True, exist_ok=True)
            write_results(to, config, arms, model, text)
    return arms


def check_log(config: RunConfig, flip_log: Path | None, replay: Path | None) -> None:
    """Raises ConfigError where a run of this config can neither write nor replay a log."""
    if flip_log and replay:
        raise ConfigError(["--flip-log and --replay: a replay draws nothing that a log could say; drop one"])
    if not config.bitflip.any_fault:
        raise ConfigError(["no faults are configured (bitflip.*), so there is nothing to log or to replay"])
    if flip_log and flip_log.exists():
        raise ConfigError([f"{flip_log} exists already; name another file"])


def check_free(to: Path | None) -> None:
    """Raises ConfigError where the directory holds results already."""
    if to is not None and (to / runlog.RESULTS).exists():
        raise ConfigError([f"{to / runlog.RESULTS} exists already; name another directory"])


def open_model(
    config: RunConfig, tokenizer: Any, world: World, adapter: Path | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """(a config's model with its adapter, ready to be measured; the arms that it has).

    Raises:
        ConfigError: where model or adapter are at fault.
    """
    # what is kept for a backward pass does not matter here
    config = replace(config, training=replace(config.training, activation_checkpointing="none"))
    model = build_model(config, tokenizer, world, adapter_spec(adapter) if adapter else None)
    names: tuple[str, ...] = ("clean",)
    if is_faulty(model):
        names = BASE_ARMS + (TRAINED_ARMS if adapter else ())
    else:
        logger.info("no faults are configured (bitflip.*): the clean arm alone is measured")
    if adapter:
        load_adapter(model, adapter)
    return model, names


def measure_config_arms(
    config: RunConfig, names: Sequence[str], model: nn.Module, text: PackedText, world: World
) -> dict[str, Arm]:
    """``measure_arms`` with the config's seeds, samples, batch and compute dtype."""
    trials, until_ci = config.eval.trials, config.eval.until_ci
    with compute_context(config.training, model):
        arms = measure_arms(
            model,
            names,
            text,
            seeds=fault_seeds(config.bitflip.base_seed, trials if until_ci is None else config.eval.max_trials),
            num_samples=config.eval.num_samples,
            batch_size=config.training.local_batch_size,
            world=world,
            until_ci=until_ci,
            at_least=max(MIN_TRIALS, trials),
        )
    if until_ci is not None:
        for name in arms.keys() & set(FLIPPED_ARMS):
            if not sure_enough(arms[name].trial_losses, until_ci):
                logger.warning("%s: after eval.max_trials = %d seeds not within ±%g of its perplexity",
                               name, arms[name].trials, until_ci)  # fmt: skip
    return arms


def write_results(
    directory: Path,
    config: RunConfig,
    arms: dict[str, Arm],
    model: nn.Module,
    text: PackedText | None,
    tasks: dict[str, Any] | None = None,
) -> None:
    """Write ``results.json``: the arms and what they were measured with, on text and (``harness.py``) in tasks. No
    times and no machine: equal runs write equal files.
    """
    trials = [arm.trials for name, arm in arms.items() if name in FLIPPED_ARMS] or [config.eval.trials]
    write_json(
        directory / runlog.RESULTS,
        {
            "arms": {name: asdict(arm) for name, arm in arms.items()},
            "costs": {name: asdict(cost) for name, cost in costs(arms).items()},
            "gap_closed": gap_closed(arms),
            **({} if tasks is None else {"tasks": tasks}),
            "fault_seeds": fault_seeds(config.bitflip.base_seed, max(trials)),
            "bitflip": asdict(config.bitflip),
            "dtype": dtype_name(next(model.parameters()).dtype),
            "text": text.source if text else None,
        },
    )


ARM_ROWS = {  # arm -> (bit-flipped, fine-tuned)
    "clean": ("✘", "✘"),
    "guard": ("guard only", "✘"),
    "flipped": ("✔", "✘"),
    "recovered": ("✔", "✔"),
    "recovered_clean": ("✘", "✔"),
    "replayed": ("from a log", "-"),
}
"""What the papers' tables say of an arm."""


def arms_table(arms: dict[str, Arm]) -> str:
    """The table of the papers: bit-flipped, fine-tuned, perplexity with its 95% interval over fault seeds; and the cost
    in nats with its own over seeds and text."""
    lines = [
        f"{'arm':<16} {'Bitflipped':<11} {'Fine-tuned':<11} {'PPL':>10}  {'95% interval':<20} {'loss':>8}  trials  "
        "cost, and 95% over text too",
    ]
    of_arms = costs(arms)
    for name, arm in arms.items():
        flipped, tuned = ARM_ROWS[name]
        low_high = arm.perplexity_interval
        interval = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else "-"
        cost = ""
        if name in of_arms:
            both = of_arms[name].interval
            cost = f"{of_arms[name].cost:+.4f}" + (f" ({both[0]:+.4f} to {both[1]:+.4f})" if both else "")
        lines.append(
            f"{name:<16} {flipped:<11} {tuned:<11} {arm.perplexity:>10.4g}  {interval:<20} {arm.loss:>8.4f}  "
            f"{arm.trials:<6}  {cost}".rstrip()
        )
    return "\n".join(lines)
