import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from flipproof import BitFlipSpec
from flipproof.measure.arms import ARMS, Arm, Cost, arm_names, arms_table, costs, gap_closed, guard_warning, worth


def test_the_cost_is_paired_by_sequence():
    """Against the analysis of variance of the table of differences."""
    rng = np.random.default_rng(0)
    clean = rng.normal(3, 1, 6)
    table = clean + 0.5 + rng.normal(0, 0.2, (4, 1)) + rng.normal(0, 0.1, 6) + rng.normal(0, 0.05, (4, 6))
    guard = clean + rng.normal(0.1, 0.1, 6)
    arms = {
        "clean": Arm.from_table(clean[None], 60),
        "guard": Arm.from_table(guard[None], 60),
        "flipped": Arm.from_table(table, 60),
    }
    found = costs(arms)
    assert list(found) == ["guard", "flipped"]
    paired = stats.ttest_rel(guard, clean).confidence_interval(0.95)
    assert found["guard"].interval == pytest.approx((paired.low, paired.high))
    d = table - clean
    k, s = d.shape
    mean = d.mean()
    ms_seeds = s * ((d.mean(1) - mean) ** 2).sum() / (k - 1)
    ms_text = k * ((d.mean(0) - mean) ** 2).sum() / (s - 1)
    ms_rest = ((d - d.mean(1)[:, None] - d.mean(0) + mean) ** 2).sum() / ((k - 1) * (s - 1))
    variance = (ms_seeds + ms_text - ms_rest) / (k * s)
    freedom = variance**2 / ((ms_seeds / (k * s)) ** 2 / (k - 1) + (ms_text / (k * s)) ** 2 / (s - 1))
    expected = stats.t.interval(0.95, freedom, loc=mean, scale=math.sqrt(variance))
    assert found["flipped"].cost == pytest.approx(mean)
    assert found["flipped"].interval == pytest.approx(expected)
    assert f"{mean:+.4f} ({expected[0]:+.4f} to {expected[1]:+.4f})" in arms_table(arms)
    # from results.json, as a resumed run has them
    again = {name: Arm.from_dict(json.loads(json.dumps(asdict(arm)))) for name, arm in arms.items()}
    assert costs(again) == found
    assert costs({"flipped": arms["flipped"]}) == {}
    broken = Arm.from_table(np.array([[1.0, 2.0], [1.0, math.inf]]), 20)
    assert costs({"clean": arms["clean"], "flipped": broken}) == {"flipped": Cost(math.inf, None)}
    # an arm of another version, of which the table does not say whether anything flips: seeds, where it has several
    unknown = costs({"clean": arms["clean"], "older": arms["flipped"], "older_clean": arms["guard"]})
    assert unknown == {"older": found["flipped"], "older_clean": Cost(found["guard"].cost, None)}


def of_losses(**losses):
    return {name: Arm.from_losses([loss], 1) for name, loss in losses.items()}


def test_the_share_is_of_what_flips_cost_the_control():
    trained = of_losses(clean=1.0, flipped=3.0, recovered=1.75, recovered_clean=1.25)
    assert gap_closed(trained) is None
    assert worth(trained) is None
    assert "No control was measured" in arms_table(trained).splitlines()[-1]
    arms = trained | of_losses(control=2.0, control_clean=1.0)
    assert gap_closed(arms) == 0.25
    assert worth(arms) == Cost(0.25, None)
    last = (
        "Training with faults is worth +0.2500 nats per token, control − recovered, 25% of what flips cost the control."
    )
    assert arms_table(arms).splitlines()[-1] == last
    assert gap_closed(arms | of_losses(control=1.0)) is None  # flips cost it nothing
    assert worth(arms | of_losses(recovered=2.5)).cost == -0.5
    assert math.isnan(worth(arms | of_losses(control=math.inf)).cost)
    assert "a loss is infinite" in arms_table(arms | of_losses(control=math.inf)).splitlines()[-1]
    assert arms_table(of_losses(clean=1.0, flipped=3.0)).splitlines()[-1].startswith("flipped")


def test_what_training_is_worth_is_paired_over_seeds_and_text():
    """Seeds and sequences that are hard for both, by much more than what is between the two, drop out."""
    rng = np.random.default_rng(1)
    hard, rows, columns = 3 + rng.normal(0, 1, 6) + rng.normal(0, 1, (4, 1)), rng.normal(0, 0.01, (4, 1)), [0.02, 0] * 3
    arms = {"control": Arm.from_table(hard, 60), "recovered": Arm.from_table(hard - 0.1 - rows - columns, 60)}
    found = worth(arms)
    assert found.cost == pytest.approx(0.11 + rows.mean())
    # two factors that add up, and nothing left of the differences: Satterthwaite's degrees of freedom of both
    of_seeds, of_text = rows.var(ddof=1) / 4, np.var(columns, ddof=1) / 6
    freedom = (of_seeds + of_text) ** 2 / (of_seeds**2 / 3 + of_text**2 / 5)
    expected = stats.t.interval(0.95, freedom, loc=found.cost, scale=math.sqrt(of_seeds + of_text))
    assert found.interval == pytest.approx(expected)


def test_a_broken_model_has_infinite_perplexity():
    arm = Arm.from_losses([1.0, math.inf], 1)
    assert arm.seed_sd is None
    assert arm.perplexity == math.inf
    assert Arm.from_dict({"trial_losses": [1.0, None], "tokens": 1}) == arm  # as JSON has it
    assert arm.perplexity_interval is None
    assert "inf" in arms_table({"flipped": arm})


@pytest.mark.parametrize(
    ("flips", "guard", "trained", "names"),
    [
        (False, False, False, ["clean"]),
        (False, True, False, ["clean", "guard"]),
        (True, False, False, ["clean", "flipped"]),
        (True, True, False, ["clean", "guard", "flipped"]),
        (False, False, True, ["clean", "recovered_clean"]),
        (False, True, True, ["clean", "guard", "recovered_guard", "recovered_clean"]),
        (True, False, True, ["clean", "flipped", "recovered", "recovered_clean"]),
        (True, True, True, ["clean", "guard", "flipped", "recovered", "recovered_clean"]),
    ],
)
def test_the_arms_are_those_that_differ(flips, guard, trained, names):
    assert list(arm_names(flips, guard, trained)) == names
    assert set(names) <= ARMS.keys()
    more = [name for name in ARMS if name in names or (flips and name in ("control", "control_clean"))]
    assert list(arm_names(flips, guard, trained, control=True)) == more


def guarded(clean, guard):
    return {"clean": Arm.from_table(np.array([clean]), 1), "guard": Arm.from_table(np.array([guard]), 1)}


@pytest.mark.parametrize(
    ("arms", "warned"),
    [
        (guarded([3.0, 4.0], [3.1, 3.915]), False),  # +0.0075 on average, of which nothing is sure
        (guarded([3.0, 4.0], [3.1, 3.93]), True),  # +0.015
        (guarded([3.0, 4.0], [3.002, 4.002]), True),  # little, and surely
        (guarded([3.0, 4.0], [3.0005, 4.0005]), False),  # surely nothing that matters
        (guarded([3.0, 4.0], [2.0, 2.0]), False),
        (guarded([3.0, 4.0], [3.0, math.inf]), True),
        (guarded([math.inf, 4.0], [9.0, 9.0]), False),  # a broken model has nothing to lose
        ({"clean": Arm.from_losses([3.0], 1)}, False),
    ],
)
def test_a_guard_that_costs_is_warned_of_once_with_its_thresholds(arms, warned):
    spec = BitFlipSpec(x_zero_out_t=8.0, layer_name_to_config={"a": {"x_zero_out_t": 4.0, "w_zero_out_t": 0.5}})
    line = guard_warning(arms, spec)
    assert (line is not None) == warned
    if warned:
        assert "bitflip.w_zero_out_t = 0.5 or bitflip.x_zero_out_t = 4 or bitflip.x_zero_out_t = 8" in line
        assert "flipproof profile" in line
        assert "\n" not in line


def test_sequences_count_by_their_tokens():
    """The weighted means, and the error of a ratio (Cochran, 1977) by its own formula."""
    rng = np.random.default_rng(1)
    clean = rng.normal(3, 1, 7)
    guard, table = clean + rng.normal(0.1, 0.1, 7), clean + 0.5 + rng.normal(0, 0.2, (4, 7))
    tokens = rng.integers(5, 60, 7)
    arms = {
        "clean": Arm.from_table(clean[None], tokens.tolist()),
        "guard": Arm.from_table(guard[None], tokens.tolist()),
        "flipped": Arm.from_table(table, tokens.tolist()),
    }
    assert arms["clean"].loss == pytest.approx((clean * tokens).sum() / tokens.sum())
    assert arms["flipped"].trial_losses == pytest.approx((table * tokens).sum(1) / tokens.sum())
    assert arms["flipped"].tokens == tokens.sum()

    def ratio(values):
        mean = (values * tokens).sum() / tokens.sum()
        error = math.sqrt((tokens**2 * (values - mean) ** 2).sum() / (7 * 6)) / tokens.mean()
        return stats.t.interval(0.95, 6, loc=mean, scale=error)

    assert arms["clean"].text_interval == pytest.approx(ratio(clean))
    assert costs(arms)["guard"].interval == pytest.approx(ratio(guard - clean))
    # as a table of as many values as tokens, whose two-way means are those of the tokens
    again = {name: Arm.from_dict(json.loads(json.dumps(asdict(arm)))) for name, arm in arms.items()}
    assert again == arms
    d = table - clean
    mean = (d * tokens).sum() / (4 * tokens.sum())
    z = (d - mean) * tokens / tokens.mean() + mean
    alike = {"clean": Arm.from_table(np.zeros((1, 7)), 70), "flipped": Arm.from_table(z, 70)}
    assert costs(arms)["flipped"].interval == pytest.approx(costs(alike)["flipped"].interval)
    broken = Arm.from_table(np.array([[1.0, math.inf]]), [3, 4])
    assert (broken.loss, broken.text_interval) == (math.inf, None)


def test_sequences_of_as_many_tokens_are_what_they_were_to_the_bit():
    table = np.random.default_rng(2).normal(3, 1, (3, 7))
    arm = Arm.from_table(table, [31] * 7)
    assert arm == Arm.from_table(table, 7 * 31)
    assert arm.trial_losses == tuple(math.fsum(row) / 7 for row in table.tolist())


def test_sequence_tokens_that_fit_no_sequences_are_refused():
    values = asdict(Arm.from_table(np.ones((1, 3)), [1, 2, 3]))
    for wrong in ([1, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="sequence_tokens"):
            Arm.from_dict(values | {"sequence_tokens": wrong})
