"""The arms that a model is measured in, side by side, and what is said of them.

``ARMS`` is the one table of them: everything that switches, names, compares or shows arms reads it. A model has those
that differ (``arm_names``): without flips there is no ``flipped``, without thresholds no ``guard``, and one that was
trained under a guard alone has ``recovered_guard``.

What training with faults is worth is not what ``recovered`` wins over ``flipped``, most of which may be fine-tuning on
the text: it is what it wins over its ``control``, trained without faults and else exactly as it (``worth``).

Loss is in nats per token; perplexity is exp of it. What the three intervals of an arm are about is said in
``intervals.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flipproof.faults.spec import OPERANDS, BitFlipSpec
from flipproof.measure.intervals import around, t_interval, two_way_interval, weighted_mean, weights_of

GUARD_COST = 0.01
"""Nats per token, 1% of perplexity: a guard that costs more than this by itself is warned of, and one that costs more
than a tenth of it where the interval over text is above 0."""


@dataclass(frozen=True)
class ArmKind:
    """What an arm is: one row of ``ARMS``."""

    bitflipped: str
    """What the papers' tables say under "Bitflipped" ..."""
    tuned: str
    """... and under "Fine-tuned"."""
    words: str
    """For people, after "the model"."""
    flips: bool = False
    """Whether bits flip, under a fault seed for each trial; only in a model where something flips."""
    guard: bool = False
    """Whether the guard stands. Without flips: only in a model that has thresholds."""
    weights: str | None = "base"
    """Whose: "base", or "trained" or "control", in which adapters are on. None: of no model by itself."""
    only_without_flips: bool = False
    """Whether an arm with flips takes its place where something flips."""
    against: str | None = "clean"
    """The arm that its cost is above."""

    @property
    def trained(self) -> bool:
        return self.weights not in ("base", None)


ARMS = {
    "clean": ArmKind("✘", "✘", "without faults", against=None),
    "guard": ArmKind("guard only", "✘", "behind the guard alone", guard=True),
    "flipped": ArmKind("✔", "✘", "flipped, not trained", flips=True, guard=True),
    "guarded": ArmKind("✔", "✘", "flipped, behind guards by channel", flips=True, guard=True, weights=None),
    "hardened": ArmKind("✔", "✘", "flipped, hardened, not trained", flips=True, guard=True, weights=None),
    "control": ArmKind("✔", "no faults", "flipped, trained without flips", flips=True, guard=True, weights="control"),
    "control_clean": ArmKind("✘", "no faults", "trained without flips, without faults", weights="control"),
    "recovered": ArmKind("✔", "✔", "flipped, trained with flips", flips=True, guard=True, weights="trained"),
    "recovered_guard": ArmKind(
        "guard only", "✔", "trained, behind the guard alone", guard=True, weights="trained", only_without_flips=True
    ),
    "recovered_clean": ArmKind("✘", "✔", "trained with flips, without faults", weights="trained"),
    "replayed": ArmKind("from a log", "-", "with the flips of a log", weights=None),
}
"""In the order of tables: the last of a model's arms that has faults is the one that a log of flips is of. The demo has
models beside each other, of which "guarded" and "hardened" are the arms ``flipped``."""


def arm_names(flips: bool, guard: bool, trained: bool, control: bool = False) -> tuple[str, ...]:
    """The arms of a model, in the order of the table, so that no two are the same by definition.

    Args:
        flips: whether anything flips bits.
        guard: whether any operand has a threshold.
        trained: whether there are adapters, or weights that were trained.
        control: whether there are others, trained without faults. Where nothing flips they would be the same.
    """
    weights = ["base"] + ["trained"] * trained + ["control"] * (control and flips)
    return tuple(
        name
        for name, kind in ARMS.items()
        if kind.weights in weights
        and (flips or not kind.flips)
        and (guard or kind.flips or not kind.guard)
        and not (flips and kind.only_without_flips)
    )


@dataclass(frozen=True)
class Arm:
    """One row of the table: mean over fault seeds, loss in nats per token. ``intervals.py`` says what the intervals
    cover."""

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
    sequence_tokens: tuple[int, ...] = ()
    """How many of the tokens are in each sequence; empty where these are as many in all."""

    @classmethod
    def from_losses(
        cls,
        losses: Sequence[float],
        tokens: int,
        sequence_losses: Sequence[float] = (),
        residual_variance: float | None = None,
        sequence_tokens: Sequence[int] = (),
    ) -> "Arm":
        """The arm of its trials' losses and, where they are known, its sequences'."""
        interval = t_interval(losses)
        mean = math.fsum(losses) / len(losses)
        weights = weights_of(sequence_tokens) if sequence_tokens else []
        return cls(
            loss=mean,
            perplexity=_exp(mean),
            tokens=tokens,
            trials=len(losses),
            loss_interval=interval,
            perplexity_interval=None if interval is None else (_exp(interval[0]), _exp(interval[1])),
            seed_sd=None if interval is None else float(np.std(losses, ddof=1)),
            text_interval=t_interval(around(mean, np.array(sequence_losses), weights).tolist()),
            trial_losses=tuple(losses),
            sequence_losses=tuple(sequence_losses),
            residual_variance=residual_variance,
            sequence_tokens=tuple(sequence_tokens),
        )

    @classmethod
    def from_table(cls, table: np.ndarray, tokens: int | Sequence[int]) -> "Arm":
        """The arm of losses of shape (trials, sequences). ``tokens``: of each sequence, or of all, which are alike."""
        each = [] if isinstance(tokens, int) or len(set(tokens)) == 1 else list(tokens)
        weights = weights_of(each) if each else [1.0] * table.shape[1]
        trials = [weighted_mean(row, weights) for row in table.tolist()]
        sequences = [math.fsum(column) / len(column) for column in table.T.tolist()]
        residual = None
        if min(table.shape) > 1 and np.isfinite(table).all():
            mean = math.fsum(trials) / len(trials)
            moved, of_sequences = (around(mean, part, weights if each else []) for part in (table, np.array(sequences)))
            rest = moved - np.array(trials)[:, None] - of_sequences + mean
            residual = float((rest**2).sum()) / ((len(trials) - 1) * (len(sequences) - 1))
        total = tokens if isinstance(tokens, int) else sum(tokens)
        return cls.from_losses(trials, total, sequences, residual, each)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Arm":
        """An arm of results.json. Raises ValueError, TypeError or ArithmeticError where it is none."""
        trials, sequences = (
            [math.inf if x is None else float(x) for x in values.get(key, ())]
            for key in ("trial_losses", "sequence_losses")
        )
        residual = values.get("residual_variance")
        if residual is not None and not (residual >= 0 and min(len(trials), len(sequences)) > 1):
            raise ValueError(f"residual_variance = {residual!r} of {len(trials)} seeds and {len(sequences)} sequences")
        each = [int(n) for n in values.get("sequence_tokens", ())]
        if each and (len(each) != len(sequences) or min(each) < 1):
            raise ValueError(f"sequence_tokens = {each!r} of {len(sequences)} sequences")
        return cls.from_losses(trials, int(values["tokens"]), sequences, residual, each)


@dataclass(frozen=True)
class Cost:
    """What an arm's loss is above another's (``ArmKind.against``) on the same sequences, in nats per token."""

    cost: float
    interval: tuple[float, float] | None
    """95% over fault seeds and text together, or over text alone for an arm without flips. None where there is one
    seed or one sequence, the model is broken beyond numbers, or an arm with one trial is not in ``ARMS``, which may be
    one seed."""


def costs(arms: dict[str, Arm]) -> dict[str, Cost]:
    """The cost of every arm that is compared with another (``ArmKind.against``); none where that is not there, or has
    no finite loss itself. An arm of another version, which is not in ``ARMS``, is compared with ``clean``."""
    found = {}
    for name, arm in arms.items():
        kind = ARMS.get(name)
        base = arms.get((kind.against or "") if kind else "clean")
        if base is None or not math.isfinite(base.loss):
            continue
        cost, interval = arm.loss - base.loss, None
        if len(arm.sequence_losses) == len(base.sequence_losses) and math.isfinite(cost):
            differences = _differences(arm, base, cost)
            if kind and not kind.flips:
                interval = t_interval(differences)
            elif arm.residual_variance is not None:
                # a sequence's clean loss is the same under every seed: the residuals of differences are the arm's own
                trials = [loss - base.loss for loss in arm.trial_losses]
                interval = two_way_interval(trials, differences, arm.residual_variance)
        found[name] = Cost(cost if math.isfinite(cost) else math.inf, interval)
    return found


def _differences(one: Arm, other: Arm, mean: float) -> list[float]:
    """By how much the loss of each sequence is higher in one arm than in the other, as intervals take it; ``mean``: of
    all."""
    differences = np.subtract(one.sequence_losses, other.sequence_losses)
    weights = weights_of(one.sequence_tokens) if one.sequence_tokens else []
    found: list[float] = around(mean, differences, weights).tolist()
    return found


def guard_warning(arms: dict[str, Arm], spec: BitFlipSpec) -> str | None:
    """A line for a guard that costs more than ``GUARD_COST`` before any bit flips; None where it does not, or where
    that was not measured."""
    found = costs(arms).get("guard")
    if found is None:
        return None
    surely = found.interval is not None and found.interval[0] > 0 and found.cost > GUARD_COST / 10
    if not (found.cost > GUARD_COST or surely):
        return None
    cost = f"{found.cost:.4g} nats per token" if math.isfinite(found.cost) else "all that the model knows"
    return f"the guard alone, before any bit flips, costs {cost}: {thresholds_in_words(spec)}"


def thresholds_in_words(spec: BitFlipSpec) -> str:
    """Which thresholds may zero clean values, and what finds better ones: the end of a warning."""
    keys = [f"{operand}_zero_out_t" for operand in OPERANDS]
    found = {
        f"bitflip.{key} = {t:g}" for one in spec.variants() for key in keys if (t := getattr(one, key)) is not None
    }
    if spec.guards:
        return (
            f"bitflip.guards = {spec.guards!r} zeroes clean values: fit them to text like this one, too (flipproof "
            "profile --guards … --merge), or raise bitflip.x_margin"
        )
    return f"{' or '.join(sorted(found))} zeroes clean values; flipproof profile proposes thresholds that zero none"


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # a float holds no larger exponential


def gain(arms: Mapping[str, Arm], before: str, after: str) -> Cost:
    """By how much the loss is lower in the arm ``after`` than in ``before``, and its 95% interval: paired over fault
    seeds and text, or over text alone where nothing flips. What is left of the single differences without the effects
    of seed and sequence is not kept, so the interval takes it for nothing and is rather too wide. NaN where a loss is
    infinite."""
    one, other = arms[before], arms[after]
    lower = one.loss - other.loss
    if not math.isfinite(lower):
        return Cost(math.nan, None)
    alike, pairs = len(one.sequence_losses) == len(other.sequence_losses) > 1, len(one.trial_losses)
    text = _differences(one, other, lower) if alike else []
    seeds = np.subtract(one.trial_losses, other.trial_losses).tolist() if pairs == len(other.trial_losses) > 1 else []
    if not any(name not in ARMS or ARMS[name].flips for name in (before, after)):
        return Cost(lower, t_interval(text))
    return Cost(lower, two_way_interval(seeds, text, 0.0) if seeds and text else None)


def worth(arms: Mapping[str, Arm]) -> Cost | None:
    """What training with faults is worth in nats per token: control − recovered. None without a control."""
    return gain(arms, "control", "recovered") if {"control", "recovered"} <= arms.keys() else None


def gap_closed(arms: Mapping[str, Arm]) -> float | None:
    """Share of what flips cost the control which training with them won back: (control − recovered) / (control −
    control_clean). None without a control, or where flips cost it nothing."""
    if not {"control", "control_clean", "recovered"} <= arms.keys():
        return None
    cost = arms["control"].loss - arms["control_clean"].loss
    won = arms["control"].loss - arms["recovered"].loss
    return won / cost if 0 < cost < math.inf and math.isfinite(won) else None


def in_order(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms in the order of tables."""
    return {name: arms[name] for name in ARMS if name in arms}


def arms_table(arms: dict[str, Arm]) -> str:
    """The table of the papers: bit-flipped, fine-tuned, perplexity with its 95% interval over fault seeds; and the cost
    in nats with its own over seeds and text."""
    lines = [
        f"{'arm':<16} {'Bitflipped':<11} {'Fine-tuned':<11} {'PPL':>10}  {'95% interval':<20} {'loss':>8}  trials  "
        "cost, and 95% over text too",
    ]
    of_arms = costs(arms)
    for name, arm in arms.items():
        low_high = arm.perplexity_interval
        interval = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if low_high else "-"
        cost = ""
        if name in of_arms:
            both = of_arms[name].interval
            cost = f"{of_arms[name].cost:+.4f}" + (f" ({both[0]:+.4f} to {both[1]:+.4f})" if both else "")
        lines.append(
            f"{name:<16} {ARMS[name].bitflipped:<11} {ARMS[name].tuned:<11} {arm.perplexity:>10.4g}  {interval:<20} "
            f"{arm.loss:>8.4f}  {arm.trials:<6}  {cost}".rstrip()
        )
    if "recovered" in arms:
        lines += ["", _worth_in_words(arms)]
    return "\n".join(lines)


def _worth_in_words(arms: Mapping[str, Arm]) -> str:
    """What training with faults won over its control, in a line; or that this cannot be told."""
    won, share = worth(arms), gap_closed(arms)
    if won is None:
        return (
            "No control was measured (training.control, eval --control): what training with faults is worth beyond "
            "fine-tuning on the text cannot be told."
        )
    if not math.isfinite(won.cost):
        return "What training with faults is worth (control − recovered) is no number: a loss is infinite."
    between = f" (95% {won.interval[0]:+.4f} to {won.interval[1]:+.4f})" if won.interval else ""
    of_cost = "" if share is None else f", {share:.0%} of what flips cost the control"
    return f"Training with faults is worth {won.cost:+.4f} nats per token{between}, control − recovered{of_cost}."
