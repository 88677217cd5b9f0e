import itertools
import math
import re

import pytest

from flipproof import BitFlipSpec
from flipproof.config import load_config
from flipproof.config.sweep import SweepConfig, operands_of, parse_protection
from flipproof.errors import ConfigError
from flipproof.sweep.order import Cell, Plan, Rate, next_trial
from flipproof.sweep.table import cell_spec


def rate(p, voltage=None):
    return Rate(p, voltage, p, p)


def plan_of(n, seeds, *curves):
    """A plan of ``n`` probabilities for each of the named curves."""
    return Plan(
        tuple(Cell(rate(2.0 ** (i - n)), sites, "all", "all", "none") for sites in curves for i in range(n)),
        tuple(range(1, seeds + 1)),
    )


def run(plan, loss_of, stop_after=None):
    """The points in the order in which they are measured, with a made-up loss for each."""
    losses, order = {}, []
    while (point := next_trial(plan, losses)) is not None and (stop_after is None or len(order) < stop_after):
        assert point.id not in losses
        losses[point.id] = loss_of(point)
        order.append(point)
    return order


@pytest.mark.parametrize("cliff", [1, 3, 40, 63])
@pytest.mark.parametrize("broken", [9.0, 500.0, math.inf])
def test_a_cliff_is_found_by_bisection(cliff, broken):
    """Of 64 values the two that the cliff is between are known after both ends and log2(64) halvings."""
    plan = plan_of(64, 5, "w")
    (curve,) = plan.curves
    index = {cell.id: i for i, cell in enumerate(curve)}
    order = run(plan, lambda point: 3.0 if index[point.cell.id] < cliff else broken, stop_after=2 + 6)
    assert {index[point.cell.id] for point in order[:2]} == {0, 63}
    assert {cliff - 1, cliff} <= {index[point.cell.id] for point in order}
    assert {point.seed for point in order} == {1}


def test_far_beyond_guessing_all_losses_are_alike():
    """A loss that grows by thousands of nats does not draw points away from where the model breaks."""
    plan = plan_of(33, 1, "w")
    index = {cell.id: i for i, cell in enumerate(plan.curves[0])}

    def loss(point):
        i = index[point.cell.id]
        return 3.0 if i < 5 else 20.0 * 2.0**i

    assert {4, 5} <= {index[point.cell.id] for point in run(plan, loss, stop_after=2 + 5)}


def test_curves_share_turns():
    plan = plan_of(9, 2, "w", "x", "wx")
    order = run(plan, lambda point: point.cell.rate.p * len(point.cell.sites))
    for turn in range(9):
        assert sorted(point.cell.sites for point in order[3 * turn : 3 * turn + 3]) == ["w", "wx", "x"]


def test_without_a_budget_every_point_is_measured_once():
    plan = plan_of(7, 3, "w", "x")
    order = run(plan, lambda point: math.inf if point.cell.rate.p > 0.1 else point.seed * point.cell.rate.p)
    assert [point.seed for point in order[: 7 * 2]] == [1] * 14  # every cell once, before any a second time
    assert {point.id for point in order} == plan.trials.keys()
    assert len(order) == len(plan.trials) == 7 * 2 * 3


def test_further_seeds_go_where_the_standard_error_is_largest():
    """Against the definition: s / sqrt(n) of the cells with two trials or more."""
    plan = plan_of(6, 12, "w")
    spread = {cell.id: s for cell, s in zip(plan.curves[0], (0.0, 0.1, 2.0, 0.5, 0.02, 0.0), strict=True)}
    order = run(plan, lambda point: 5.0 + spread[point.cell.id] * (-1) ** point.seed, stop_after=6 * 2 + 15)
    trials = {cell.id: 0 for cell in plan.cells}
    for point in order[:-15]:
        trials[point.cell.id] += 1
    assert min(trials.values()) >= 1
    for point in order[-15:]:
        if min(trials.values()) > 1:
            errors = {}
            for name, n in trials.items():
                values = [5.0 + spread[name] * (-1) ** (seed + 1) for seed in range(n)]
                mean = sum(values) / n
                errors[name] = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n < 12 else -1
            assert errors[point.cell.id] == pytest.approx(max(errors.values()), abs=1e-12)
        trials[point.cell.id] += 1
    noisiest = max(spread, key=spread.get)
    assert trials[noisiest] == max(trials.values()) >= 8


def test_a_single_trial_scatters_as_it_differs_from_its_neighbours():
    plan = plan_of(8, 2, "w")
    index = {cell.id: i for i, cell in enumerate(plan.curves[0])}
    order = run(plan, lambda point: 3.0 if index[point.cell.id] < 4 else 9.0)
    assert {index[point.cell.id] for point in order[8:10]} == {3, 4}


def test_processes_that_share_a_sweep_spread_out_and_cover_it():
    """Three workers that finish in turn, each seeing what the others are busy with."""
    plan = plan_of(16, 2, "w")
    index = {cell.id: i for i, cell in enumerate(plan.curves[0])}
    losses, busy, started = {}, [], []
    for _ in range(3):
        busy.append(next_trial(plan, losses, {point.id for point in busy}))
    assert {index[point.cell.id] for point in busy} == {15, 0, 7}  # the ends, and already the middle
    while busy:
        point = busy.pop(0)
        started.append(point.id)
        losses[point.id] = 3.0 if index[point.cell.id] < 6 else math.inf
        if (point := next_trial(plan, losses, {other.id for other in busy})) is not None:
            busy.append(point)
    assert sorted(started) == sorted(plan.trials)


def test_ids_are_stable_and_tell_every_cell_from_every_other():
    cells = [
        Cell(rate(p, voltage), *rest)
        for p, voltage, *rest in itertools.product(
            (1e-6, 1e-5), (None, 0.7), ("w", "x"), ("all", "q"), ("all", "15"), ("none", "guard")
        )
    ]
    assert len({cell.id for cell in cells}) == len(cells) == 64
    assert Cell(rate(1e-6), "w", "all", "all", "none").id == "668b8f89359fcd49"  # points of older versions have it


def test_axes_are_read():
    table = SweepConfig(
        p="1e-7:1e-3:9, 0.5,1e-5", sites="xw,w,wx,kvwx,head", bits="15,7-14,all", protection="none, guard"
    )
    halves = [1e-7, 10**-6.5, 1e-6, 10**-5.5, 1e-5, 10**-4.5, 1e-4, 10**-3.5, 1e-3, 0.5]
    assert table.probabilities() == pytest.approx(halves, rel=1e-11)
    assert 1e-5 in table.probabilities()
    assert table.site_names() == ["wx", "w", "wxkv", "head"]
    assert table.bit_names() == ["15", "7-14", "all"]
    assert table.protections() == ["none", "guard"]
    assert SweepConfig(p=[1e-6, "1e-5"], bits=15).probabilities() == [1e-6, 1e-5]
    assert SweepConfig(bits=15).bit_names() == ["15"]
    assert [operands_of(sites) for sites in ("x", "wkv", "head")] == [("x",), ("w", "kv"), ("w",)]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("p", "0.7", "p = '0.7': a flip probability from 0 to 0.5"),
        ("p", "1e-6:1e-3", "p = '1e-6:1e-3': a flip probability from 0 to 0.5, or a:b:n"),
        ("p", "0:1e-3:4", "p = '0:1e-3:4': a flip probability from 0 to 0.5, or a:b:n"),
        ("p", "1e-3:1e-6:4", "from a > 0 up to b"),
        ("p", "1e-6,,1e-5", "from 2 to 10,000, or None is allowed (not '')"),
        ("p", "nan", "p = 'nan': a flip probability from 0 to 0.5"),
        (
            "sites",
            "wy",
            "sites = 'wy': w, x, kv, several of these together (wx), head, embedding, code, scale or None is allowed",
        ),
        ("sites", "ww", "sites = 'ww'"),
        ("sites", "headw", "sites = 'headw'"),
        ("bits", "mantissa", "bits = 'mantissa': 'all', 'each', 'sign'"),
        ("bits", "9-7", "bits = '9-7'"),
        ("protection", "ecc", "protection = 'ecc': none, guard, guard-layer,"),
        ("protection", "secded+parity", "protection = 'secded+parity'"),
        ("protection", "tmr-foo", "is allowed (tmr = 'foo': 'sign', 'exp', 'frac', a bit"),
        ("seeds", "0", "seeds = '0': a whole number from 1 to 1,000,000"),
        ("budget_minutes", "0", "budget_minutes = '0': a positive number"),
        ("sead", "3", "sweep.sead: unknown key; did you mean seeds?"),
    ],
)
def test_bad_tables_are_told_with_what_is_allowed(key, value, words):
    with pytest.raises(ConfigError) as error:
        load_config([], {"model": {"hf_model_path": "m"}, "sweep": {key: value}})
    (problem,) = error.value.problems
    assert problem.startswith(f"sweep.{key}")
    assert words.removeprefix("sweep.") in problem


def test_p_and_voltage_exclude_each_other():
    with pytest.raises(ConfigError, match="drop one"):
        load_config([], {"sweep": {"p": "1e-6", "voltage": "a.csv"}})


def test_protections_are_taken_apart():
    assert parse_protection("none") == (False, "none", (), None)
    assert parse_protection("secded+guard") == (True, "secded", (), None)
    assert parse_protection("tmr-sign+exp+guard") == (True, "none", ("sign", "exp"), None)
    assert parse_protection("guard+parity+tmr-10-14") == (True, "parity", ("10-14",), None)
    assert parse_protection("tmr-sign+exp+guard-channel") == (True, "none", ("sign", "exp"), "channel")
    for wrong in ("guard-block", "guard+guard-layer", "guard-layer+guard-layer"):
        with pytest.raises(ConfigError, match=f"protection = '{re.escape(wrong)}': none, guard"):
            load_config([], {"model": {"hf_model_path": "m"}, "sweep": {"protection": wrong}})


BASE = BitFlipSpec(
    w_p_exp=0.25,
    w_zero_out_t=2.0,
    x_zero_out_t=64.0,
    w_faults="persistent",
    x_p_row=0.01,
    row_bytes=64,
    skip_patterns=("gate",),
    layer_name_to_config={"a.*": {"w_zero_out_t": 3.0}, "b.*": False},
    base_seed=7,
)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (
            Cell(rate(1e-3), "w", "all", "all", "guard"),
            {"w_p_exp": 1e-3, "w_p_frac": 1e-3, "x_p_row": None},
        ),
        (
            Cell(rate(1e-3), "x", "q_proj", "7-14", "none"),
            {
                "w_p_exp": None,
                "x_p_bits": {"7-14": 1e-3},
                "w_zero_out_t": None,
                "x_zero_out_t": None,
                "include_patterns": ("q_proj",),
                "layer_name_to_config": {"a.*": {}, "b.*": False},
            },
        ),
        (
            Cell(Rate(1e-4, 0.6, 1e-5, 1e-3), "wxkv", "all", "all", "guard+tmr-sign+exp"),
            {f"{o}_{key}": p for o in ("w", "x", "kv") for key, p in (("p_exp", 1e-5), ("p_frac", 1e-3))}
            | {f"{o}_protected_bits": ("sign", "exp") for o in ("w", "x", "kv")},
        ),
        (
            Cell(Rate(1e-4, 0.6, 1e-5, 1e-3), "kv", "all", "frac", "secded+guard"),
            {"w_p_exp": None, "x_p_row": None, "kv_p_bits": {"frac": 1e-3}, "kv_protection": "secded"},
        ),
        (
            Cell(rate(1e-3), "head", "all", "15", "guard"),
            {"w_p_exp": None, "w_p_bits": {"15": 1e-3}, "x_p_row": None, "sites": ("head",), "skip_patterns": ()},
        ),
    ],
)
def test_the_faults_of_a_cell_are_the_configs_with_these_changes(cell, expected):
    from dataclasses import replace

    assert cell_spec(BASE, cell) == replace(BASE, **expected)
