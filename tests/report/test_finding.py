import math

import numpy as np
import pytest
from scipy import stats

from flipproof.measure.arms import Arm, costs
from flipproof.measure.points import Point, Setting
from flipproof.report import finding
from flipproof.report.analyse import curves_of
from flipproof.report.read import Logged, Sweep


def arm(*rows):
    """Rows are fault seeds, columns sequences."""
    return Arm.from_table(np.array(rows, dtype=float), 100)


CLEAN, FLIPPED = arm([2.0, 3.0]), arm([2.5, 3.6], [2.7, 3.6])
RECOVERED, TUNED = arm([2.2, 3.1], [2.2, 3.1]), arm([1.9, 2.8])


def number(value):
    return f"{value:.3g}".replace("-", "−")


def sentences(text):
    found = [one for one in text.replace("e.g.", "").split(". ") if one]
    assert text.endswith(".")
    return found


def test_a_run_says_its_cost_and_what_is_part_of_its_gain():
    text = finding.of_arms(
        {"run": {"clean": CLEAN, "flipped": FLIPPED, "recovered": RECOVERED, "recovered_clean": TUNED}}
    )
    first, second = sentences(text)
    cost = costs({"clean": CLEAN, "flipped": FLIPPED})["flipped"]
    assert f"{number(cost.cost)} nats per token (95% {number(cost.interval[0])} to {number(cost.interval[1])})" in first
    assert f"{math.exp(2.5):.4g} without them and {math.exp(3.1):.4g} with them" in first
    assert f"wins {number(3.1 - 2.65)} nats" in second
    assert "without a control, plain fine-tuning on the text is part of that" in second
    assert f"without flips won {number(0.15)}" in second


def test_training_is_worth_what_it_wins_over_its_control():
    control = arm([2.4, 3.4], [2.5, 3.3])  # 0.25 nats above under each seed, and on each sequence
    arms = {"clean": CLEAN, "flipped": FLIPPED, "recovered": RECOVERED, "control": control}
    _, second = sentences(finding.of_arms({"run": arms}))
    assert "wins 0.25 nats per token (95% 0.25 to 0.25)" in second
    assert "over its control" in second
    assert "fine-tuning" not in second
    assert "% of what flips cost that" not in second
    _, second = sentences(finding.of_arms({"run": arms | {"control_clean": arm([2.0, 2.8])}}))
    assert "trained alike without them, 50% of what flips cost that" in second  # 0.25 of 0.5


def test_one_seed_gives_the_gain_no_interval_and_the_text_alone_does_where_nothing_flips():
    one = {"clean": CLEAN, "flipped": arm([2.5, 3.6]), "recovered": arm([2.2, 3.2]), "recovered_clean": arm([1.9, 2.7])}
    _, second = sentences(finding.of_arms({"run": one}))
    assert "wins 0.35 nats per token (one fault seed, so no interval) over" in second
    low, high = stats.ttest_rel([2.0, 3.0], [1.9, 2.7]).confidence_interval(0.95)
    assert f"without flips won 0.2 (95% {number(low)} to {number(high)})" in second


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"clean": CLEAN}, ("no model was measured both", "Nothing here was trained")),
        ({"clean": CLEAN, "flipped": arm([2.5, 3.6])}, ("one fault seed, so no interval", "Nothing here was trained")),
        ({"clean": CLEAN, "flipped": arm([2.0, 3.0], [2.1, 2.9])}, ("nothing that can be told from zero",)),
        ({"clean": CLEAN, "flipped": arm([math.inf, 3.0], [2.1, 2.9])}, ("break the model", "at least one of 2 fault")),
        ({"recovered": RECOVERED, "recovered_clean": TUNED}, ("the trained model", "nor a control", "cannot be said")),
        (
            {"clean": CLEAN, "flipped": arm([math.inf, 3.0]), "recovered": RECOVERED},
            ("break the model", "is no number: a loss is infinite"),
        ),
    ],
)
def test_where_nothing_can_be_said_that_is_said(arms, words):
    text = finding.of_arms({"run": arms})
    assert len(sentences(text)) == 2
    assert all(word in text for word in words)


def test_several_runs_are_a_range():
    runs = {
        name: {"clean": CLEAN, "flipped": arm([2.0 + x, 3.0 + x])} for name, x in (("b", 0.5), ("a", 0.25), ("c", 1))
    }
    first, _ = sentences(finding.of_arms(runs))
    assert "Over 3 runs" in first
    assert first.index("0.25 nats") < first.index("in a") < first.index("1 nats") < first.index("in c")


def sweep(costs, seeds=3):
    """{(layers, protection, p): cost}; seeds scatter evenly."""
    points = [
        Point(p, None, Setting("w", layers, "all", protection), seed, 2.0 + cost + 0.01 * (seed - 1), 10)
        for (layers, protection, p), cost in costs.items()
        for seed in range(seeds)
    ]
    one = Sweep({}, {"none": 0.0, "secded": 0.125}, (), 2.0, math.exp(2.0), tuple(points))
    return one, curves_of(points, 2.0, {})


def test_a_sweep_says_where_it_falls_off_and_what_moves_that():
    limit = math.log(1.1)
    straight = {("all", "none", p): c for p, c in ((1e-5, 0.5 * limit), (1e-4, limit), (1e-3, 1.5 * limit))}
    first, second = sentences(finding.of_sweep(*sweep(straight)))
    assert "10% above the clean one at p = 0.0001 (" in first
    assert "95%" in first
    assert second.startswith(f"At the largest p measured, 10⁻³, they cost {1.5 * limit:.3g} nats per token (95%")
    protected = straight | {("all", "secded", 10 * p): cost for (_, _, p), cost in straight.items()}
    _, second = sentences(finding.of_sweep(*sweep(protected)))
    moved = "this is at p = 1.00e-03, 10 times that, for 12.5% more storage."
    assert second == f"With secded, the one protection tried, {moved}"
    worse = {("all", "parity", 0.5 * p): cost for (_, _, p), cost in straight.items()}
    _, second = sentences(finding.of_sweep(*sweep(protected | worse)))
    assert second == f"Of the 2 protections tried, secded does most: there {moved}"
    _, second = sentences(finding.of_sweep(*sweep(straight | worse)))
    assert second == "The one protection tried, parity, does not help: there this is at p = 5.00e-05, 0.5 times that."
    worst = {("all", "ecc", 0.01 * p): cost for (_, _, p), cost in straight.items()}
    _, second = sentences(finding.of_sweep(*sweep(straight | worse | worst)))
    assert second == (
        "None of the 2 protections tried helps: with parity, the best of them, this is at p = 5.00e-05, 0.5 times that."
    )
    layered = straight | {("a", "none", 1e-4): 0.1, ("b", "none", 1e-4): 0.2}
    _, second = sentences(finding.of_sweep(*sweep(layered)))
    assert "those in b (all bits) cost most at p = 10⁻⁴" in second
    assert "no interval" in finding.of_sweep(*sweep(straight, seeds=1))
    assert "is never 10% above" in finding.of_sweep(*sweep({("all", "none", 1e-5): 0.0}))
    assert "nothing can be said" in finding.of_sweep(*sweep({}))


def test_protections_whose_intervals_overlap_have_no_winner():
    limit = math.log(1.1)
    straight = {("all", "none", p): c for p, c in ((1e-5, 0.5 * limit), (1e-4, limit), (1e-3, 1.5 * limit))}
    moved = {
        ("all", name, times * p): cost
        for name, times in (("parity", 30), ("secded", 40), ("ecc", 1.1))
        for (_, _, p), cost in straight.items()
    }
    _, second = sentences(finding.of_sweep(*sweep(straight | moved)))
    assert second == (
        "Of the 3 protections tried, parity and secded cannot be told apart, and do most: there this is at "
        "p = 3.00e-03 and 4.00e-03."
    )
    _, second = sentences(finding.of_sweep(*sweep(moved)))  # without an unprotected curve the worst one is told first
    assert "parity and secded cannot be told apart" in second
    bad = {("all", name, times * p): cost for name, times in (("parity", 0.5), ("ecc", 0.6))
           for (_, _, p), cost in straight.items()}  # fmt: skip
    _, second = sentences(finding.of_sweep(*sweep(straight | bad)))
    assert second.startswith(
        "None of the 2 protections tried helps: ecc and parity cannot be told apart, and with them this"
    )
    # neither falls off where it was measured: that says nothing of which is better
    flat = {("all", name, p): 0.0 for name in ("parity", "ecc") for p in (1e-4, 1e-3)}
    _, second = sentences(finding.of_sweep(*sweep(straight | flat)))
    assert "protections tried, ecc and parity cannot be told apart: this is above p = 1.00e-03." in second


def test_layers_whose_costs_overlap_have_no_worst():
    straight = {("all", "none", p): 0.01 for p in (1e-5, 1e-4)}
    layered = straight | {("a", "none", 1e-4): 0.2, ("b", "none", 1e-4): 0.21, ("c", "none", 1e-4): 0.01}
    _, second = sentences(finding.of_sweep(*sweep(layered)))
    assert "those in b (all bits) cost most at p = 10⁻⁴" in second
    assert second.endswith("; intervals of 1 other overlaps with that.")


def test_a_text_parts_where_its_letters_do():
    assert "parts from the clean one at letter 4." in finding.of_texts({"clean": "abcd", "flipped": "abce"})
    assert "parts from the clean one at letter 5." in finding.of_texts({"clean": "abcd", "flipped": "abcde"})
    assert "is the clean one." in finding.of_texts({"clean": "abcd", "flipped": "abcd"})
    assert "takes a clean one" in finding.of_texts({"flipped": "abcd"})


def test_a_training_alone_says_that_it_is_no_measure():
    rows = [Logged(step, loss, *[None] * 4) for step, loss in ((10, 4.0), (20, math.inf))]
    first, second = sentences(finding.of_training({"run": rows}))
    assert first == "The training loss went from 4 at step 10 to infinite at step 20"
    assert "says nothing of held-out text" in second
    first, _ = sentences(finding.of_training({"run": rows[:1]}))
    assert first == "The training loss was 4 at step 10"
