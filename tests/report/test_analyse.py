import math

import pytest

from flipproof.measure.arms import Arm
from flipproof.measure.points import Point, Setting
from flipproof.report.analyse import (
    CEILING,
    cost_maps,
    curves_of,
    find_cliff,
    labels_of,
    p_text,
    sites_in_words,
)

LIMIT = math.log(1.1)


def test_the_cliff_is_where_a_line_in_log_p_crosses_the_threshold():
    """Costs that are linear in log p, measured anywhere, put the cliff where it is."""
    for cliff in (3e-7, 2.0**-14, 0.02):
        for factors in ((0.1, 10), (0.5, 1.5, 100), (1e-3, 0.9, 1.01, 5)):
            losses = {cliff * factor: 2 + LIMIT + 0.03 * math.log(factor) for factor in factors}
            found = find_cliff(2.0, losses)
            assert found.p == pytest.approx(cliff, rel=1e-9)
            assert (found.above, found.up_to) == (
                max(p for p in losses if p < cliff),
                min(p for p in losses if p > cliff),
            )


def test_a_cliff_that_was_not_bracketed_is_a_bound():
    assert str(find_cliff(2.0, {1e-6: 2.0, 1e-5: 2.0 + 0.9 * LIMIT})) == "above 1.00e-05"
    assert str(find_cliff(2.0, {1e-6: 2.2, 1e-5: 3.0})) == "below 1.00e-06"
    assert str(find_cliff(2.0, {1e-6: 2.0, 1e-5: math.inf})) == "1.00e-06 to 1.00e-05"
    assert str(find_cliff(2.0, {})) == "not measured"
    assert find_cliff(2.0, {0.0: 5.0, 1e-6: 2.0}).up_to is None  # p = 0 has no place in log p
    # the first crossing counts, though the curve comes back
    assert find_cliff(2.0, {1e-6: 2.0, 1e-5: 2.0 + 2 * LIMIT, 1e-4: 2.0}).p == pytest.approx(10**-5.5)
    assert find_cliff(2.0, {1e-6: 2.0, 1e-5: 2.4}, threshold=0.5).p is None  # 0.4 nats are less than 50%


def points(costs, seeds=(1, 2, 3)):
    """{(layers, bits, p): cost} -> points whose seeds scatter evenly around it."""
    return [
        Point(p, None, Setting("wx", layers, bits, "none"), seed, 2.0 + cost + 0.1 * (i - 1), 100)
        for (layers, bits, p), cost in costs.items()
        for i, seed in enumerate(seeds)
    ]


def test_curves_are_arms_over_seeds_in_the_order_of_the_axes():
    axes = {"layers": ["b", "a"], "bits": ["15", "2"]}
    costs = {("a", "2", 1e-3): 1.0, ("a", "2", 1e-5): 0.0, ("b", "2", 1e-5): 0.1, ("b", "15", 1e-5): 0.2}
    curves = curves_of(points(costs), 2.0, axes)
    assert [curve.setting[1:3] for curve in curves] == [("b", "15"), ("b", "2"), ("a", "2")]
    assert list(curves[2].arms) == [1e-5, 1e-3]
    assert curves[2].arms[1e-3] == Arm.from_losses([2.9, 3.0, 3.1], 100)
    assert list(labels_of([curve.setting for curve in curves]).values()) == ["b, bit 15", "b, bit 2", "a, bit 2"]


def test_cost_maps_hold_costs_the_worst_first():
    costs = {(layers, bits, p): p * (2 if layers == "a" else 3) * int(bits)
             for layers in ("a", "b") for bits in ("1", "2") for p in (0.1, 0.2)}  # fmt: skip
    costs["all", "1", 0.1] = 9.0
    costs["b", "2", 0.2] = math.inf
    maps = cost_maps(curves_of(points(costs), 2.0, {"layers": ["all", "a", "b"], "bits": ["1", "2"]}), 2.0)
    assert [of.p for of in maps] == [0.1, 0.2]  # the one with most finite cells comes first
    assert (maps[0].layers, maps[0].bits) == (("all", "a", "b"), ("1", "2"))
    assert maps[1].layers == ("a", "b")
    for of in maps:
        for (layers, bits), cost in of.costs.items():
            assert cost.cost == pytest.approx(costs[layers, bits, of.p])
            assert of.grid[of.layers.index(layers), of.bits.index(bits)] == cost.cost
    assert math.isnan(maps[0].grid[0, 1])  # all layers were measured at bit 1 alone
    low, high = maps[0].costs["a", "2"].interval
    assert (low + high) / 2 == pytest.approx(0.4)
    assert (high - low) / 2 == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))  # t(0.975, 2) by the tables
    assert [list(of.costs) for of in maps] == [
        [("all", "1"), ("b", "2"), ("a", "2"), ("b", "1"), ("a", "1")],
        [("b", "2"), ("a", "2"), ("b", "1"), ("a", "1")],
    ]


def test_the_interval_of_a_cliff_is_where_the_ends_of_the_losses_cross():
    """Costs straight in log p whose intervals have one width: the cliff's interval has that width over the slope."""
    slope, half = 0.05, 4.302652729911275 * 0.1 / math.sqrt(3)
    costs = {("all", "all", 10.0**k): LIMIT + slope * (k + 30) * math.log(10) for k in range(-60, 0)}
    (curve,) = curves_of(points(costs), 2.0, {})
    assert curve.cliff.p == pytest.approx(1e-30)
    low, high = curve.cliff_interval
    assert math.log(low) == pytest.approx(math.log(1e-30) - half / slope)
    assert math.log(high) == pytest.approx(math.log(1e-30) + half / slope)
    assert curves_of(points(costs, seeds=(1,)), 2.0, {})[0].cliff_interval is None  # one seed has no interval
    few = {key: cost for key, cost in costs.items() if 1e-31 < key[2] < 1e-29}
    assert curves_of(points(few), 2.0, {})[0].cliff_interval is None  # whose ends do not cross where it was measured


def test_a_loss_worse_than_guessing_has_no_place_on_an_axis():
    (curve,) = curves_of(points({("all", "all", p): cost for p, cost in ((1e-3, 1.0), (1e-2, CEILING))}), 2.0, {})
    assert (curve.shown, curve.broken) == ([1e-3], [1e-2])


def test_words():
    assert [p_text(p) for p in (2**-16, 1e-4, 3.312e-5, 0.5, 0)] == ["2⁻¹⁶", "10⁻⁴", "3.31·10⁻⁵", "2⁻¹", "0"]
    assert sites_in_words("wxkv") == "weights + inputs + keys and values"
    assert sites_in_words("lm_head") == "lm_head"
