"""The page of a hardened directory: the costs that were written, what was rotated and what was left, and no winner
where intervals overlap. And what the guards of a sweep cost alone."""

import csv
import json
import math
import shutil

import pytest
from report_inputs import CLEAN, write_hardened, write_sweep

from flipproof.cli.main import main
from flipproof.report import figures
from flipproof.report import page as page_module
from flipproof.report.finding import of_hardening
from flipproof.report.hardening import cost_table
from flipproof.report.page import report
from flipproof.report.read import read_hardened, read_sources
from flipproof.report.sections import sections_of


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(page_module.pictures, "png", lambda _: b"a picture")
    monkeypatch.setattr(page_module.pictures, "svg", lambda *_: "<svg></svg>")


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_begins_with_what_hardening_did(no_pictures, tmp_path):
    written = write_hardened(tmp_path)
    page = report(tmp_path).read_text()
    sections = sections_of(read_sources(tmp_path))
    assert [section.id for section in sections] == ["hardening"]
    assert f'<p class="lead">{sections[0].finding}' in page
    assert "Bit flips in my/model" in page
    points = table(tmp_path / "report" / "hardening-points.csv")
    of = {
        (row["model"], row["protection"], float(row["p"])): [row["cost"], row["cost low"], row["cost high"]]
        for row in points
    }
    for side, model in (("before", "as it was"), ("after", "hardened")):
        for one in written[side]:
            ends = one["interval"] or ("", "")
            assert of.pop((model, one["protection"], one["p"])) == [str(one["cost"]), *map(str, ends)]
    assert not of
    for words in (
        "the guard alone", "0.0180 (0.0130 to 0.0230)", "2.5000 (2.4000 to 2.6000)", "2⁻¹⁶",
        "model.layers.1.mlp", "a norm stands &lt;between&gt;", "81,920 tokens of code",
    ):  # fmt: skip
        assert words in page, words


def test_a_row_for_each_probability_and_a_column_for_each_model_and_guard(tmp_path):
    write_hardened(tmp_path)
    columns, rows = cost_table(read_hardened(tmp_path / "hardened.json"))
    assert columns == [
        "p of every bit",
        "as it was, guard-tensor",
        "as it was, guard-channel",
        "hardened, guard-channel",
    ]
    assert [row[0] for row in rows] == ["0, the guard alone", "2⁻¹⁶", "2⁻¹⁴", "2⁻¹²"]
    assert rows[0][1:] == ["0.0000", "0.0020", "0.0010"]
    assert rows[3][1:] == ["9.0000 (8.5000 to 9.5000)", "0.5000 (0.4500 to 0.5500)", "0.3000 (0.2500 to 0.3500)"]


def test_what_intervals_cannot_tell_apart_is_not_called_better(tmp_path):
    written = write_hardened(tmp_path)
    found = of_hardening(read_hardened(tmp_path / "hardened.json"))
    assert "At p = 2⁻¹⁴ of every bit, flips cost the hardened model 0.07 nats per token (95% 0.06 to 0.08)" in found
    assert "2.5 nats per token (95% 2.4 to 2.6) behind one fitted threshold for all layers" in found
    assert "less at 2 of 3 probabilities" in found
    assert "at the other one cannot tell them apart" in found
    same = [one for one in written["before"] if one["protection"] == "guard-channel"]
    write_hardened(tmp_path, after=same)
    found = of_hardening(read_hardened(tmp_path / "hardened.json"))
    assert "cannot be told apart at any of the 3 probabilities" in found
    assert "less" not in found
    worse = [one | {"cost": 9.9, "interval": [9.8, 10.0]} for one in same]
    write_hardened(tmp_path, after=worse)
    assert "more at 3 of 3 probabilities" in of_hardening(read_hardened(tmp_path / "hardened.json"))
    one_seed = [one | {"interval": None, "cost": 1e-9} for one in same]
    write_hardened(tmp_path, after=one_seed)
    assert "cannot be told apart at any" in of_hardening(read_hardened(tmp_path / "hardened.json"))


def test_a_broken_model_costs_without_end_and_a_half_done_one_is_a_note(no_pictures, tmp_path):
    broken = [{"protection": "guard-channel", "sites": "wx", "p": 1e-3, "cost": None, "interval": None}]
    write_hardened(tmp_path / "a", before=broken, after=broken)
    found = read_hardened(tmp_path / "a" / "hardened.json")
    assert found.costs["hardened", "guard-channel"][1e-3].cost == math.inf
    assert "an infinite loss" in of_hardening(found)
    assert cost_table(found)[1] == [["10⁻³", "∞", "∞"]]
    write_hardened(tmp_path / "b", before=None, after=None)
    page = report(tmp_path).read_text()
    assert "b/hardened.json: it is not measured to the end; the same flipproof harden goes on" in page
    assert 'id="hardening"' in page


def test_the_picture_draws_what_a_logarithm_can_show(tmp_path):
    written = write_hardened(tmp_path)
    written["after"][1] |= {"cost": -0.001, "interval": [-0.003, 0.001]}
    written["after"][3] |= {"cost": 20.0, "interval": [19.0, 21.0]}
    write_hardened(tmp_path, after=written["after"])
    axis = figures.cost_curves(read_hardened(tmp_path / "hardened.json").costs).axes[0]
    lines = {line.get_label(): line for line in axis.containers}
    drawn = lines["hardened, guard-channel"].lines[0].get_xydata()
    assert [list(point) for point in drawn if not math.isnan(point[1])] == [[2**-14, 0.07]]
    (edge,) = [line for line in axis.get_lines() if list(line.get_ydata()) == [1.0]]  # of the axes
    assert list(edge.get_xdata()) == [2**-12]


def test_where_flips_cost_nothing_there_is_no_picture(tmp_path):
    written = write_hardened(tmp_path)
    free = {side: [one | {"cost": -0.001, "interval": None} for one in written[side]] for side in ("before", "after")}
    write_hardened(tmp_path, **free)
    (section,) = sections_of(read_sources(tmp_path))
    assert not section.drawings
    assert section.tables[0].rows[1][1:] == ["−0.0010"] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rotation": 3}, "hardened.json: not as flipproof writes it"),
        ({"before": [{"p": "x"}]}, "hardened.json: "),
        ({"rotation": None}, "hardened.json: 'rotation' is missing"),
    ],
)
def test_what_harden_did_not_write_is_one_line(capsys, tmp_path, changes, words):
    write_hardened(tmp_path, **changes)
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err


def test_the_guard_alone_stands_beside_the_protections(no_pictures, tmp_path):
    """Of each granularity where a sweep has several, and of a sweep's only guard."""
    write_sweep(tmp_path / "several")
    write_sweep(tmp_path / "one")
    for name, change in (
        ("several", {"guards": {f"guard-{by}": {"loss": CLEAN + cost, "perplexity": math.exp(CLEAN + cost)}
                                for by, cost in (("tensor", 0.0), ("channel", 0.25))}}),
        ("one", {"guard": {"loss": None, "perplexity": None}}),
    ):  # fmt: skip
        sweep = json.loads((tmp_path / name / "sweep.json").read_text()) | change
        sweep["overhead"] |= {"guard-channel": 0.006}
        shutil.rmtree(tmp_path / name / "points")  # which have their own tests
        (tmp_path / name / "sweep.json").write_text(json.dumps(sweep))
    page = report(tmp_path).read_text()
    assert all(f'id="protection-{name}"' in page for name in ("several", "one"))
    rows = table(tmp_path / "report" / "protection-several-guards.csv")
    assert [(row["guard"], row["cost"], row["extra storage (%)"]) for row in rows] == [
        ("none (clean)", "", ""), ("guard-tensor", "0.0", ""), ("guard-channel", "0.25", "0.6"),
    ]  # fmt: skip
    assert [float(row["PPL"]) for row in rows] == [math.exp(CLEAN + cost) for cost in (0.0, 0.0, 0.25)]
    (row,) = table(tmp_path / "report" / "protection-one-guards.csv")[1:]
    assert (row["guard"], row["PPL"], row["cost"]) == ("guard", "inf", "inf")
