import math

import numpy as np
import pytest
from scipy import stats

from flipproof.measure.arms import Arm
from flipproof.measure.intervals import sure_enough, t_interval, two_way_interval


def test_the_interval_is_students_t():
    values = [2.0, 2.5, 1.5, 2.2]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))
    assert t_interval([1.0]) is None
    assert t_interval([1.0, math.inf]) is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """4000 simulated experiments of 5 trials: coverage is Binomial(4000, 0.95); bound at a false alarm of 1e-6."""
    draws = np.random.default_rng(0).normal(3.0, 0.5, (4000, 5))
    covered = sum(low < 3.0 < high for low, high in map(t_interval, draws.tolist()))
    assert stats.binomtest(covered, 4000, 0.95).pvalue > 1e-6


@pytest.mark.parametrize(
    ("seeds", "text", "rest", "least", "most"),
    [
        (1.0, 0.0, 0.0, 0.95, 0.95),  # nothing but seeds: Student's t, exactly
        (0.05, 1.0, 0.2, 0.945, 0.96),
        (1.0, 1.0, 1.0, 0.94, 0.965),
        (0.3, 1.0, 1.0, 0.935, 0.965),
        (0.0, 0.0, 1.0, 0.96, 0.995),  # independent values: the two first terms count them twice
    ],
)
def test_the_interval_over_seeds_and_text_covers_the_truth(seeds, text, rest, least, most):
    """2000 simulated experiments of 5 seeds and 16 sequences with these standard deviations: coverage is
    Binomial(2000, p), p from least to most; bound at a false alarm of 1e-6 for either side."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        table = rng.normal(0, seeds, (5, 1)) + rng.normal(0, text, 16) + rng.normal(0, rest, (5, 16))
        arm = Arm.from_table(table, 1)
        low, high = two_way_interval(arm.trial_losses, arm.sequence_losses, arm.residual_variance)
        covered += low < 0 < high
    assert stats.binomtest(covered, 2000, least, alternative="less").pvalue > 1e-6
    assert stats.binomtest(covered, 2000, most, alternative="greater").pvalue > 1e-6


def test_stopping_when_sure_covers_the_truth_92_times_of_100_at_worst():
    """1500 experiments that stop at a half-width of half a standard deviation, where coverage is least: 0.9223 by
    400,000 experiments in plain NumPy. Binomial(1500, 0.9223), bound at a false alarm of 1e-6."""
    rng = np.random.default_rng(0)
    covered = 0
    for draws in rng.normal(3.0, 1.0, (1500, 100)).tolist():
        count = next((n for n in range(5, 100) if sure_enough(draws[:n], math.expm1(0.5))), 100)
        low, high = t_interval(draws[:count])
        covered += low < 3.0 < high
    assert stats.binomtest(covered, 1500, 0.9223).pvalue > 1e-6
