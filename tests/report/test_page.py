import csv
import html.parser
import json
import math
import re
import shutil
import urllib.parse
import urllib.request
import xml.etree.ElementTree

import PIL.Image
import pytest
from report_inputs import (
    BITS,
    CLEAN,
    CLIFF,
    LAYERS,
    PROTECTIONS,
    PS,
    SITES,
    VOLTAGES,
    write_profile,
    write_run,
    write_sweep,
)

from flipproof import pictures
from flipproof.cli.main import main
from flipproof.errors import ConfigError
from flipproof.measure.arms import Arm, costs
from flipproof.measure.intervals import t_interval
from flipproof.measure.points import Setting
from flipproof.report import page as page_module
from flipproof.report.analyse import curves_of
from flipproof.report.finding import of_sweep
from flipproof.report.page import report
from flipproof.report.read import read_sources
from flipproof.report.sections import sections_of


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """But for those of ``everything``, which are made before and looked at."""
    monkeypatch.setattr(pictures, "DPI", 20)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A directory with all there is, and its report: (directory, rows of the sweep)."""
    directory = tmp_path_factory.mktemp("runs")
    write_run(directory)
    rows = write_sweep(directory / "sweep")
    write_profile(directory / "profile")
    (directory / "base").mkdir()
    (directory / "base" / "samples.txt").write_text("[clean]\none\n[1, 2]\n\n[flipped]\ntwo\n")
    assert report(directory) == directory / "report.html"
    return directory, rows


class Page(html.parser.HTMLParser):
    """What a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.sections, self.hrefs, self.text, self.inside = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.ids += [named["id"]] if "id" in named else []
        self.hrefs += [named["href"]] if "href" in named else []
        self.sections += [named["id"]] if tag == "section" else []
        assert tag != "script"
        assert "src" not in named
        if tag not in ("meta", "link", "img"):
            self.inside.append((tag, named))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "img"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag, f"</{tag}> ends something else"

    def handle_data(self, data):
        if not self.inside or self.inside[-1][0] != "style":
            self.text.append(data)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def svgs(page):
    """The figures of a page, each as an XML tree of its own."""
    return [xml.etree.ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_stands_alone_and_every_link_leads_somewhere(everything):
    directory, _ = everything
    text = (directory / "report.html").read_text()
    page = Page(text)
    assert not page.inside
    assert page.sections == ["settings", "arms", "perplexity", "sensitivity", "protection", "voltage", "magnitudes",
                             "training", "texts-" + directory.name.lower(), "texts-base"]  # fmt: skip
    local = [href for href in page.hrefs if not href.startswith(("#", "data:"))]
    assert {href.removeprefix("#") for href in page.hrefs if href.startswith("#")} >= set(page.sections)
    assert all((directory / href).is_file() for href in local)
    assert not [href for href in local if ":" in href or href.startswith("/")]
    assert not re.findall(r"https?:(?!//www\.w3\.org/(?:2000/svg|1999/xlink)\")|@import|url\((?!#)", text)
    written = {f"report/{path.name}" for path in (directory / "report").iterdir() if path.suffix in (".png", ".csv")}
    assert written == set(local)
    assert "all is <b>well</b>" in page.text
    assert any("metrics.jsonl: the last line is half written" in text for text in page.text)


def test_every_figure_is_drawn_once_as_svg_and_png_and_has_a_table(everything):
    directory, _ = everything
    text = (directory / "report.html").read_text()
    figures = svgs(text)
    pictures = {path.name: path.read_bytes() for path in (directory / "report").glob("*.png")}
    assert len(figures) == len(pictures) == len(set(pictures.values()))
    for name in pictures:
        section = re.sub(r"-\d+\.png$|\.png$", "", name)
        assert list((directory / "report").glob(f"{section}*.csv"))
    ids = [id for figure in figures for element in figure.iter() if (id := element.get("id"))]
    assert len(set(Page(text).ids)) == len(Page(text).ids)
    assert len(ids) > len(figures)
    titles = {section.title for section in sections_of(read_sources(directory))}
    assert {figure.get("aria-label") for figure in figures} <= titles
    for figure in figures:
        own = {element.get("id") for element in figure.iter()}
        used = re.findall(r"(?:href=\"#|url\(#)([^\")]+)", xml.etree.ElementTree.tostring(figure, "unicode"))
        assert set(used) <= own
        assert any(element.text for element in figure.iter("{http://www.w3.org/2000/svg}text"))  # and no outlines


def test_pictures_are_at_200_dpi(everything):
    pictures = list((everything[0] / "report").glob("*.png"))
    assert pictures
    for picture in pictures:
        with PIL.Image.open(picture) as image:
            assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
            assert len(image.convert("RGB").getcolors(2**24)) > 8  # something is drawn


def test_the_tables_find_the_cliff_that_was_made(everything):
    directory, _ = everything
    rows = table(directory / "report" / "perplexity-cliffs.csv")
    assert len(rows) == len(SITES) * len(LAYERS) * len(BITS) * len(PROTECTIONS)
    for row in rows:
        setting = Setting(*(row[name] for name in Setting._fields))
        if setting.bits == "all" or setting.layers == "all":  # whose costs cross the threshold at CLIFF
            cliff = CLIFF * (10 if setting.protection == "secded" else 1)
            assert float(row["cliff p"]) == pytest.approx(cliff, rel=1e-9)
            assert float(row["measured below"]) == max(p for p in PS if p < cliff)
            assert float(row["measured past"]) == min(p for p in PS if p > cliff)
    protection = {
        tuple(row[name] for name in Setting._fields): row for row in table(directory / "report" / "protection.csv")
    }
    secded = protection["w", "all", "all", "secded"]
    assert float(secded["extra storage (%)"]) == 12.5
    assert float(secded["cliff over none"]) == pytest.approx(10, rel=1e-9)


def test_tables_hold_the_inputs_and_intervals_of_the_t_distribution(everything):
    directory, points = everything
    losses = {}
    for point in points:
        key = tuple(point[name] for name in Setting._fields), point["p"]
        losses.setdefault(key, []).append(math.inf if point["loss"] is None else point["loss"])
    rows = table(directory / "report" / "perplexity.csv")
    assert len(rows) == len(losses)
    for row in rows:
        measured = losses[tuple(row[name] for name in Setting._fields), float(row["p"])]
        assert float(row["loss"]) == math.fsum(measured) / 3
        assert (row["seeds"], row["tokens"]) == ("3", "4096")
        if interval := t_interval(measured):
            assert (float(row["loss low"]), float(row["loss high"])) == interval
            assert [float(row[f"95% {end}"]) for end in ("low", "high")] == [math.exp(end) for end in interval]
        else:
            assert (row["loss"], row["loss low"], row["PPL"]) == ("inf", "", "inf")
    for row in table(directory / "report" / "sensitivity.csv"):
        of = (row["sites"], row["layers"], row["bits"], row["protection"]), float(row["p"])
        assert float(row["cost"]) == math.fsum(losses[of]) / 3 - CLEAN
    for row in table(directory / "report" / "voltage.csv"):
        assert [float(row["voltage (V)"]), float(row["bit-error rate"])] in VOLTAGES
    arms = {row["arm"]: row for row in table(directory / "report" / "arms.csv")}
    assert (arms["flipped"]["PPL"], arms["flipped"]["95% low"], arms["clean"]["PPL"]) == ("inf", "", str(math.exp(2.0)))
    low, high = t_interval([2.4, 2.5, 2.7])
    assert (float(arms["recovered"]["95% low"]), float(arms["recovered"]["95% high"])) == (
        math.exp(low),
        math.exp(high),
    )
    histogram = table(directory / "report" / "magnitudes-histogram.csv")
    assert [list(row.values()) for row in histogram[:2]] == [
        ["all layers", "weights", "-9", "100"],
        ["all layers", "weights", "-8", "700"],
    ]


def test_the_costs_of_arms_are_those_of_results(everything):
    directory, _ = everything
    arms = {
        name: Arm.from_dict(arm) for name, arm in json.loads((directory / "results.json").read_text())["arms"].items()
    }
    rows = {row["arm"]: row for row in table(directory / "report" / "arms.csv")}
    for name, cost in costs(arms).items():
        assert float(rows[name]["cost"]) == cost.cost
        assert rows[name]["cost low"] == ("" if cost.interval is None else str(cost.interval[0]))
    assert rows["flipped"]["cost"] == "inf"
    assert float(rows["recovered"]["cost"]) == pytest.approx(7.6 / 3 - 2)
    assert rows["clean"]["cost"] == ""


def test_arms_of_another_version_are_shown(no_pictures, tmp_path):
    write_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    old = {"older": [2.6, 2.7, 2.8], "older_clean": [1.9], "of a later one": [2.2, 2.4]}
    results["arms"] |= {name: {"trial_losses": losses, "tokens": 100} for name, losses in old.items()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["report", str(tmp_path)]) == 0
    rows = {row["arm"]: row for row in table(tmp_path / "report" / "arms.csv")}
    for name, losses in old.items():
        assert float(rows[name]["cost"]) == pytest.approx(math.fsum(losses) / len(losses) - 2.0)
        assert rows[name]["Bitflipped"] == rows[name]["cost low"] == ""


def test_the_page_credits_training_with_what_it_wins_over_its_control(no_pictures, tmp_path):
    write_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    results["arms"]["control"] = {"trial_losses": [2.6, 2.7, 2.8], "tokens": 100}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert main(["report", str(tmp_path)]) == 0
    rows = {row["arm"]: row for row in table(tmp_path / "report" / "arms.csv")}
    assert float(rows["control"]["cost"]) == pytest.approx(2.7 - 2.0)
    assert (rows["control"]["Bitflipped"], rows["control"]["Fine-tuned"]) == ("✔", "no faults")
    assert "over its control, trained alike without them" in (tmp_path / "report.html").read_text()


def test_one_logged_step_is_a_number_and_no_curve(tmp_path):
    write_run(tmp_path / "a")
    path = tmp_path / "a" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    (training,) = [section for section in sections_of(read_sources(tmp_path)) if section.id == "training"]
    assert not training.drawings
    assert "The training loss was 3 at step 1." in training.finding
    assert "marker" not in training.caption
    write_run(tmp_path / "b")
    (training,) = [section for section in sections_of(read_sources(tmp_path)) if section.id == "training"]
    (drawing,) = training.drawings
    assert len(drawing.draw().axes[0].get_lines()) == 2  # b's losses, and their markers on the edge
    assert {row[0] for row in training.tables[0].rows} == {"a", "b"}


def test_settings_of_runs_and_what_training_took(tmp_path):
    for name, r in (("a", 8), ("b", 0)):
        write_run(tmp_path / name)
        lines = ["[bitflip]", "w_p_exp = 0.0009765625", f"x_zero_out_t = {4.0 + r}", "base_seed = 0", "[training]",
                 "lr = 3e-4", "steps = 3", "[lora]", f"r = {r}"]  # fmt: skip
        (tmp_path / name / "config.toml").write_text("\n".join(lines))
    page = report(tmp_path).read_text()
    rows = {row.pop("setting"): row for row in table(tmp_path / "report" / "settings.csv")}
    assert rows == {
        "bitflip.w_p_exp": {"a": "0.0009765625", "b": "0.0009765625"},
        "bitflip.x_zero_out_t": {"a": "12.0", "b": "4.0"},
        "lora.r": {"a": "8", "b": "0"},
        "training.lr": {"a": "0.0003", "b": "0.0003"},
        "training.steps": {"a": "3", "b": "3"},
    }  # and base_seed is what it is by default
    assert "2⁻¹⁰" in page
    for row in table(tmp_path / "report" / "training-took.csv"):  # medians of 101, 102, 103 and of 0.5, 0.75
        assert list(row.values())[1:] == ["3", "192", "102.0", "0.875", "62.5", "1.0"]


def test_an_unfinished_sweep_says_so(tmp_path):
    rows = write_sweep(tmp_path, drop=5)
    sources = read_sources(tmp_path)
    assert len(sources.sweeps[tmp_path.name].points) == len(rows) - 5
    assert sources.notes == [f"sweep.json: {len(rows) - 5} of {len(rows)} points are measured so far."]
    shutil.rmtree(tmp_path / "points")
    (section,) = sections_of(read_sources(tmp_path))
    assert section.finding.startswith("No point with flips is measured yet.")
    assert section.tables == section.drawings == []


@pytest.mark.parametrize(
    ("kept", "ids"),
    [
        (lambda row: row["p"] == 1e-4, ["sensitivity", "protection", "voltage"]),
        (lambda row: row["p"] == 1e-4 and list(row.values())[3:7] == ["w", "all", "all", "none"], ["voltage"]),
        (lambda row: row["voltage"] is None, ["sweep"]),
    ],
)
def test_a_sweep_of_one_p_says_what_it_found_once(tmp_path, kept, ids):
    rows = write_sweep(tmp_path)
    rows[0] |= {"voltage": None}
    for row in rows:
        path = tmp_path / "points" / f"{row['id'].replace('/', '-')}.json"
        path.write_text(json.dumps(row)) if kept(row) else path.unlink()
    text = report(tmp_path).read_text()
    assert Page(text).sections == ids
    (sweep,) = read_sources(tmp_path).sweeps.values()
    found = of_sweep(sweep, curves_of(sweep.points, CLEAN, sweep.axes))
    assert text.count(found) == text.count(f'<p class="lead">{found}') == 1
    assert all(table(tmp_path / "report" / f"{name}.csv") for name in ids)


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    write_run(tmp_path)
    first = report(tmp_path).read_bytes()
    files = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert report(tmp_path).read_bytes() == first  # equal data give equal files
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == files
    (tmp_path / "metrics.jsonl").unlink()
    report(tmp_path)
    assert not (tmp_path / "report" / "training.png").exists()
    (tmp_path / "report" / "mine.png").write_text("mine")
    with pytest.raises(ConfigError, match=r"report holds what is no report's \(mine.png\)"):
        report(tmp_path)
    assert (tmp_path / "report" / "mine.png").read_text() == "mine"
    (tmp_path / "paper.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="exists and is no report"):
        report(tmp_path, tmp_path / "paper.html")
    assert report(tmp_path, tmp_path / "new" / "figures.html").read_text().count('href="figures/arms.csv"') == 1
    assert (tmp_path / "new" / "figures" / "arms.csv").exists()
    assert not [path.name for path in (*tmp_path.iterdir(), *(tmp_path / "new").iterdir()) if path.name[0] == "."]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, "", "hold none of results.json"),
        ("results.json", '{"arms": {"cl', "results.json: not as flipproof writes it"),
        ("results.json", '{"dtype": "float32"}', "results.json: 'arms' is missing"),
        ("results.json", "[]", "results.json: not as flipproof writes it ([] is not an object)"),
        ("sweep.json", '{"axes": {}}', "sweep.json: 'clean' is missing"),
        ("points/1-1.json", "", "points: there is no sweep.json beside it"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step"\n{"step": 3, "loss": 1}\n', "metrics.jsonl line 2"),
        ("profile.json", '{"all": {"weights": {}}, "layers": {}}', "profile.json: 'histogram' is missing"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path, name, content, words):
    if name:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == err.count("flipproof report: error: ") == 1
    assert words in err
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ([name] if name else [])
    assert main(["report", str(tmp_path / "gone")]) == 2
    assert "gone is not a directory" in capsys.readouterr().err


def test_tasks_have_a_table(tmp_path):
    metric = {"mean": 0.75, "interval": [0.5, 1.0], "seed_sd": 0.1, "stderr": 0.05, "trials": [0.7, 0.8]}
    result = {"shown": True, "questions": 20, "num_fewshot": 0, "version": 1, "arms": {"flipped": {"acc,none": metric}}}
    (tmp_path / "results.json").write_text(json.dumps({"arms": {}, "tasks": {"mini": result}}))
    page = report(tmp_path).read_text()
    assert 'id="tasks"' in page
    assert 'id="arms"' not in page
    (row,) = table(tmp_path / "report" / "tasks.csv")
    assert row == {
        "run": tmp_path.name,
        "task": "mini",
        "metric": "acc",
        "arm": "flipped",
        "mean": "0.75",
        "95% low": "0.5",
        "95% high": "1.0",
        "standard error": "0.05",
        "seeds": "2",
        "questions": "20",
    }


@pytest.fixture
def no_pictures(monkeypatch):
    """Where their names are the subject: rendering takes most of a report's time."""
    monkeypatch.setattr(page_module.pictures, "png", lambda _: b"a picture")
    monkeypatch.setattr(page_module.pictures, "svg", lambda *_: "<svg></svg>")


def links(page):
    """The files that a page leads to, as a browser resolves its links."""
    parsed = Page(page.read_text())
    hrefs = [href for href in parsed.hrefs if not href.startswith(("#", "data:"))]
    base = page.resolve().as_uri()
    return {urllib.request.url2pathname(urllib.parse.urlparse(urllib.parse.urljoin(base, href)).path) for href in hrefs}


@pytest.mark.parametrize("name", ["a b", "50% of #1?", "größe [1]", "c:d", "it's & <more>"])
def test_links_lead_to_files_of_any_name(no_pictures, tmp_path, name):
    write_run(tmp_path / name)
    page = report(tmp_path / name, tmp_path / name / f"{name}.html")
    written = {str(path) for path in (tmp_path / name / name).iterdir() if path.suffix in (".png", ".csv")}
    assert len(written) > 2
    assert links(page) == written


def test_runs_of_one_name_stay_two(no_pictures, tmp_path):
    """Of directories that differ in their parents, in their case or in what a file's name cannot tell."""
    for i, name in enumerate(("a/run", "b/run", "a-run", "a b", "a-b", "A-b", tmp_path.name)):
        write_run(tmp_path / name)
        results = json.loads((tmp_path / name / "results.json").read_text())
        results["arms"]["clean"]["trial_losses"] = [1.0 + i]
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        write_profile(tmp_path / name)
    write_run(tmp_path)
    write_sweep(tmp_path / "1" / "perplexity")
    write_sweep(tmp_path / "1")
    (tmp_path / "a b" / "samples.txt").write_text("[clean]\nof samples\n")
    page = report(tmp_path)
    parsed = Page(page.read_text())
    assert len(set(parsed.ids)) == len(parsed.ids)
    rows = [row for row in table(tmp_path / "report" / "arms.csv") if row["arm"] == "clean"]
    assert sorted(float(row["loss"]) for row in rows) == [1.0, 2.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert len({row["run"] for row in rows}) == 8
    magnitudes = [path for path in (tmp_path / "report").iterdir() if path.name.startswith("magnitudes-")]
    assert len({path.name.casefold() for path in magnitudes if "histogram" not in path.name}) == 2 * 7  # PNG and CSV
    assert len([one for one in parsed.ids if one.startswith("texts-")]) == 9
    assert {str(path) for path in (tmp_path / "report").iterdir() if path.name != ".written"} == links(page)


@pytest.mark.parametrize("voltage", [True, False])
def test_a_sweep_of_a_broken_model_is_shown_without_costs(tmp_path, voltage):
    write_sweep(tmp_path / "fine")
    write_sweep(tmp_path / "broken")
    sweep = json.loads((tmp_path / "broken" / "sweep.json").read_text())
    sweep |= {"clean": {"loss": None, "perplexity": None}, "guard": {"loss": None, "perplexity": None}}
    (tmp_path / "broken" / "sweep.json").write_text(json.dumps(sweep if voltage else sweep | {"voltages": None}))
    page = Page(report(tmp_path).read_text())

    assert ("voltage-broken" in page.ids) == voltage
    assert {"perplexity-broken", "perplexity-fine", "sensitivity-fine"} <= set(page.ids)
    assert "sensitivity-broken" not in page.ids
    assert {row["cost"] for row in table(tmp_path / "report" / "perplexity-broken.csv")} == {""}
    assert {row["cliff"] for row in table(tmp_path / "report" / "perplexity-broken-cliffs.csv")} == {"not measured"}


def test_nulls_of_all_kinds_are_read(tmp_path):
    """What is no number is null in every file."""
    arms = {"clean": {"trial_losses": [None], "sequence_losses": [None, 1.0], "tokens": 10}}
    metric = {"mean": None, "interval": None, "seed_sd": None, "stderr": None, "trials": [None]}
    result = {"shown": True, "questions": None, "num_fewshot": 0, "version": 1, "arms": {"clean": {"ppl,none": metric}}}
    results = {"arms": arms, "tasks": {"mini": result}, "unfinished": ["other"]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    write_profile(tmp_path)
    profile = json.loads((tmp_path / "profile.json").read_text())
    empty = {"count": 0, "zeros": 0, "nan": 5, "infinite": 0, "quantiles": dict.fromkeys(["p50", "p99"]),
             "maximum": None, "proposed_t": None, "zero_out_t": None, "clipped": None, "histogram": []}  # fmt: skip
    profile["all"] = {"weights": empty, "inputs": empty}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    text = report(tmp_path).read_text()
    assert "∞" in text
    assert "results.json: other was not measured." in text


def test_a_users_own_files_with_names_like_ours_stay(no_pictures, tmp_path):
    write_run(tmp_path)
    for name in (".report.old", ".report.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    report(tmp_path)
    assert all((tmp_path / name / "mine").read_text() == "mine" for name in (".report.old", ".report.new"))
    names = {path.name for path in tmp_path.iterdir() if path.name[0] == "."}
    assert names == {".report.old", ".report.new"}


def test_two_writers_of_one_report_leave_a_whole_one(no_pictures, tmp_path, monkeypatch):
    """The second one gets in between the first one's two renames."""
    write_run(tmp_path)
    report(tmp_path)
    written = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    real, calls = page_module.os.replace, []

    def replaced(source, target):
        calls.append(target)
        real(source, target)
        if len(calls) == 2:  # the old one is aside, and the name is free
            report(tmp_path)

    monkeypatch.setattr(page_module.os, "replace", replaced)
    report(tmp_path)
    assert len(calls) > 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == written
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", str(tmp_path), "--to", str(tmp_path / "file" / "page.html")]) == 2
    assert f"{tmp_path / 'file'} is not a directory" in capsys.readouterr().err
