import itertools
import math

import numpy as np
import pytest
from matplotlib.text import Text

from flipproof.measure.arms import Arm, Cost
from flipproof.measure.points import Setting
from flipproof.report import figures
from flipproof.report.analyse import CEILING, Curve, find_cliff
from flipproof.report.read import Logged, Validated


def curve(losses):
    """{p: losses of the seeds} -> the curve over a clean loss of 2 nats."""
    arms = {p: Arm.from_losses(of_seeds, 100) for p, of_seeds in losses.items()}
    cliff = find_cliff(2.0, {p: arm.loss for p, arm in arms.items()})
    return Curve(Setting("w", "all", "all", "none"), arms, {}, cliff, None)


def axis_of(figure):
    figure.draw_without_rendering()
    return figure.axes[0]


def test_a_curve_goes_through_its_perplexities_and_what_is_broken_is_on_the_edge():
    losses = {1e-6: [2.0, 2.2], 1e-5: [2.5, 2.9], 1e-4: [30.0, 40.0], 1e-3: [2.0, math.inf]}
    axis = axis_of(figures.perplexity_curves([curve(losses)], ["weights"], math.exp(2.0)))
    line, *others = axis.get_lines()
    assert line.get_xdata().tolist() == list(losses)
    np.testing.assert_allclose(np.array(line.get_ydata(), float), [math.exp(2.1), math.exp(2.7), math.nan, math.nan])
    (edge,) = [other for other in others if other.get_transform() == axis.get_xaxis_transform()
               and other.get_linestyle() == "None"]  # fmt: skip
    assert (list(edge.get_xdata()), list(edge.get_ydata())) == ([1e-4, 1e-3], [1.0, 1.0])


@pytest.mark.parametrize(
    "losses",
    [
        {1e-6: [2.0, 2.1], 1e-5: [0.0, 9.0]},  # whose interval is from far below 0 nats to far above guessing
        {1e-6: [1e-4, 2e-4], 1e-5: [CEILING, CEILING]},
        {1e-6: [math.inf], 1e-5: [800.0]},
    ],
)
def test_no_axis_goes_where_perplexity_cannot(losses):
    axis = axis_of(figures.perplexity_curves([curve(losses)], ["weights"], math.exp(2.0)))
    low, high = axis.get_ylim()
    assert 1 <= low < math.exp(2.0) < high < math.exp(2 * CEILING)
    assert high < math.exp(CEILING) or max(map(max, losses.values())) >= 9


@pytest.mark.parametrize(("low", "high"), [(7.8, 8.6), (4.65, 4.66), (4, 30), (4, 3000), (1, 1.2e6)])
def test_a_perplexity_axis_has_numbers(low, high):
    losses = {1e-6: [math.log(low)], 1e-5: [math.log(high)]}
    axis = axis_of(figures.perplexity_curves([curve(losses)], ["weights"], math.inf))
    bottom, top = axis.get_ylim()
    shown = [label.get_text() for label in axis.get_yticklabels() if bottom <= label.get_position()[1] <= top]
    assert len(shown) == len(set(shown)) >= 2
    assert all(shown)


def _with_curves():
    return figures.perplexity_curves([curve({1e-6: [2.0, 2.2]})] * 6, list("abcdef"), math.exp(2.0), "behind a guard")


def _with_panels():
    of_one = {name: (curve({1e-6: [2.0, 2.2], 1e-5: [math.inf]}), 1.0, math.exp(2.0)) for name in "abcdefg"}
    panels = [figures.Panel(title, "p", of_one) for title in ("all", "codes", "scales")]
    return figures.exposure_panels(panels, list("abcdefg"), "behind a guard")


@pytest.mark.parametrize("draw", [_with_curves, _with_panels])
def test_no_words_lie_on_others(draw):
    figure = draw()
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if axis.get_visible()]
    of_axes = [text for axis in figure.axes for text in axis.findobj(Text)]
    words = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in of_axes]
    assert {"behind a guard", *"abcdef"} <= {text.get_text() for text in words}
    boxes = [text.get_window_extent() for text in words] + [axis.get_tightbbox() for axis in axes]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_bars_are_the_costs_and_end_at_the_edges():
    costs = {"a": Cost(-0.5, (-0.7, -0.3)), "b": Cost(1.0, (-30.0, 32.0)), "c": Cost(math.inf, None)}
    axis = axis_of(figures.cost_bars(costs, 2.0))
    assert [bar.get_width() for bar in axis.patches[:2]] == [-0.5, 1.0]
    low, high = axis.get_xlim()
    assert -2 * 1.5 < low < -0.7
    assert CEILING < high < 1.1 * CEILING + 1
    assert axis.patches[2].get_width() == high  # what is broken
    assert [label.get_text() for label in axis.get_yticklabels()] == list(costs)


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1.0])
def test_every_tick_is_a_whole_number_by_itself(size):
    """No factor, and nothing to add, in a corner of the axis."""
    steps = [Logged(round(1e8 / size), 5 + size * loss, *[None] * 4) for loss in (1, 2, 3)]
    for figure in (
        figures.cost_bars({"a": Cost(-size, None), "b": Cost(size, None)}, 2.0),
        figures.training_curves({"": steps}),
    ):
        axis = axis_of(figure)
        for side in (axis.xaxis, axis.yaxis):
            assert not side.get_offset_text().get_text()
    ticks = {tick.get_position()[1]: tick.get_text() for tick in axis.get_yticklabels()}
    assert [float(text.replace("−", "-")) for text in ticks.values()] == pytest.approx(list(ticks), rel=1e-9)
    assert len(set(ticks.values())) == len(ticks) > 1


def test_a_training_loss_is_not_below_zero_and_infinity_is_on_the_edge():
    rows = [Logged(step, loss, *[None] * 4) for step, loss in ((1, 0.01), (2, 8.0), (3, math.inf))]
    axis = axis_of(figures.training_curves({"run": rows}))
    assert axis.get_ylim()[0] == 0
    assert axis.get_ylim()[1] < CEILING
    assert list(axis.get_lines()[1].get_xdata()) == [3]


def test_validations_are_drawn_beside_the_training_loss():
    rows = [Logged(step, 3.0 / step, *[None] * 4) for step in (1, 2, 3)]
    found = [Validated(2, 2.5, None, 2.0), Validated(3, math.inf, None, 1.5)]
    lines = axis_of(figures.training_curves({"run": rows}, {"run": found})).get_lines()
    drawn = {line.get_label(): line for line in lines}
    assert list(drawn["run validated, clean"].get_ydata()) == [2.0, 1.5]
    assert list(drawn["run validated, flipped"].get_xdata()) == [2, 3]
    assert drawn["run validated, flipped"].get_ydata()[0] == 2.5
    assert "run validated, guard" not in drawn
