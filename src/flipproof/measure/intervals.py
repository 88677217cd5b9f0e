"""How sure a mean is: over fault seeds, over text, and over both.

**Three intervals** of an arm (``arms.py``), all 95%, for three questions. Write x_ks for the loss of sequence s under
fault seed k.

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

**Sequences of unequal length.** Those of instruction data have n_s tokens each that count, and means are over tokens:
with weights w_s = n_s / mean(n), the mean loss of a seed is the mean of w_s·x_ks, a ratio whose error, to first order,
is that of the mean of w_s·x_ks + (1 − w_s)·L around L, the loss itself (Cochran, Sampling Techniques, 1977, ch. 6).
These stand in the place of x_ks above (``around``); where all weights are 1 they are x_ks.

**Until it is sure.** ``until_ci`` adds seeds, in their fixed order, until the interval over seeds is narrow enough.
Stopping when the data look sure covers the truth a little less often than 95%, since a spread that is by chance too
small ends it early; Chow & Robbins (Ann. Math. Stat. 36, 1965) show that the coverage tends to 95% as the width asked
for goes to 0. Starting at 5 seeds it is 92.2% at worst, where 16 seeds are enough on average.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

MIN_TRIALS = 5
"""Fewest fault seeds on which ``until_ci`` decides: a standard deviation of less is hardly one."""


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean of independent values; None for fewer than two, or where one is infinite."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return None
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    mean = math.fsum(values) / n
    return float(mean - half), float(mean + half)


def weights_of(tokens: Sequence[int]) -> list[float]:
    """What sequences of so many tokens count for in a mean over tokens: 1 on average, and each where all are alike."""
    mean = math.fsum(tokens) / len(tokens)
    return [n / mean for n in tokens]


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Of values whose weights are 1 on average."""
    return math.fsum(w * x for w, x in zip(weights, values, strict=True)) / len(values)


def around(mean: float, values: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Values of sequences, in the last axis, whose plain mean varies as their weighted one does (see the module)."""
    if not weights or not math.isfinite(mean):
        return values
    w = np.array(weights)
    moved: np.ndarray = w * values + (1 - w) * mean
    return moved


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


def narrow_enough(values: Sequence[float], until_ci: float, at_least: int = MIN_TRIALS) -> bool:
    """``sure_enough`` of a plain number, such as a task's metric: whether the 95% interval over these seeds is within
    ±``until_ci`` times the mean's magnitude, or no further seed can make it so."""
    if len(values) < at_least:
        return False
    interval = t_interval(values)
    return interval is None or interval[1] - interval[0] <= until_ci * abs(interval[0] + interval[1])


def sure_enough(losses: Sequence[float], until_ci: float, at_least: int = MIN_TRIALS) -> bool:
    """Whether the 95% interval over these seeds is within ±``until_ci`` of the mean's perplexity, or no further seed
    can make it so, one loss being infinite."""
    if len(losses) < at_least:
        return False
    interval = t_interval(losses)
    return interval is None or math.expm1((interval[1] - interval[0]) / 2) <= until_ci
