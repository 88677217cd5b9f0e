import json
import math
import multiprocessing
import os
import signal

import pytest

from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.files import temporary_name
from flipproof.records import sealed, unsealed
from flipproof.sweep.order import Cell, Plan, Rate
from flipproof.sweep.store import SweepDirectory

PLAN = Plan(tuple(Cell(Rate(p, None, p, p), "w", "all", "all", "none") for p in (1e-6, 1e-5)), (1, 2, 3))
POINTS = list(PLAN.points.values())


def config(**sweep):
    overrides = {"model": {"hf_model_path": "some/model"}, "data": {"source": "stdlib"}, "sweep": {"p": "1e-6"} | sweep}
    return load_config([], overrides)


@pytest.fixture
def directory(tmp_path):
    directory = SweepDirectory(tmp_path / "sweep")
    directory.begin(config()).release()
    return directory


def losses(path):
    """As a process that has just started reads them."""
    directory = SweepDirectory(path)
    directory.refresh(PLAN.points)
    return {name: measured.loss for name, measured in directory.measured.items()}


def test_points_are_read_back_and_a_broken_model_is_null(directory):
    directory.append(POINTS[0], 2.5, 100, 0.25)
    directory.append(POINTS[1], math.inf, 100, 0.5)
    assert losses(directory.path) == {POINTS[0].id: 2.5, POINTS[1].id: math.inf}
    lines = [unsealed(line) for line in (directory.path / "points.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "id": f"{POINTS[0].cell.id}/1",
        "p": 1e-6,
        "voltage": None,
        "sites": "w",
        "layers": "all",
        "bits": "all",
        "protection": "none",
        "seed": 1,
        "loss": 2.5,
        "tokens": 100,
        "seconds": 0.25,
    }
    assert lines[1]["loss"] is None


@pytest.mark.parametrize("cut", range(1, 160, 13))
def test_half_a_line_is_not_read_and_cut_off_by_the_next_writer(directory, caplog, cut):
    directory.append(POINTS[0], 2.0, 100, 0.25)
    directory.append(POINTS[1], 3.0, 100, 0.25)
    path = directory.path / "points.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    directory.refresh(PLAN.points)
    assert directory.measured.keys() == {POINTS[0].id} == losses(directory.path).keys()
    with caplog.at_level("WARNING", logger="flipproof"):
        directory.append(POINTS[1], 3.0, 100, 0.25)
    assert path.read_bytes() == whole
    directory.refresh(PLAN.points)
    assert directory.measured.keys() == {POINTS[0].id, POINTS[1].id}


def test_repair_is_logged_by_name(directory, monkeypatch):
    from flipproof.sweep import store as module

    said = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *values: said.append(text % values))
    (directory.path / "points.jsonl").write_text('{"id": "4')
    directory.repair()
    assert (directory.path / "points.jsonl").read_text() == ""
    directory.repair()
    (line,) = said
    assert "points.jsonl" in line
    assert '{"id": "4' in line


def test_a_line_that_is_no_point_is_told_by_its_number(directory):
    directory.append(POINTS[0], 2.5, 100, 0.25)
    path = directory.path / "points.jsonl"
    whole = path.read_text()
    path.write_text(whole + "rubbish\n")
    with pytest.raises(ConfigError, match=r"points\.jsonl line 2: not a point of a sweep"):
        losses(directory.path)
    path.write_text(whole + whole.replace("2.5", "2.4"))
    with pytest.raises(ConfigError, match=r"points\.jsonl line 2: not a point of a sweep \(it is not what was written"):
        losses(directory.path)
    for odd in ({"loss": 10**400}, {"id": []}, {"seconds": "x"}):
        path.write_text(whole + json.dumps(unsealed(whole) | odd) + "\n")
        with pytest.raises(ConfigError, match=r"points\.jsonl line 2: "):
            losses(directory.path)
    path.write_text(whole + json.dumps(sealed(unsealed(whole) | {"id": "0123/1"})) + "\n")
    with pytest.raises(ConfigError, match=r"points\.jsonl line 2: 0123/1 is a point of another grid"):
        losses(directory.path)


def test_one_process_has_a_point(directory):
    other = SweepDirectory(directory.path)
    lock = directory.claim(POINTS[0])
    assert other.claim(POINTS[0]) is None
    second = other.claim(POINTS[1])
    assert second is not None
    directory.append(POINTS[0], 2.0, 100, 0.25)
    directory.clear(POINTS[0], lock)
    other.clear(POINTS[1], second)
    assert sorted(path.name for path in (directory.path / "claims").iterdir()) == ["points.lock", "sweep.lock"]
    assert other.claim(POINTS[0]) is not None


def _claim_and_wait(path, claimed):
    lock = SweepDirectory(path).claim(POINTS[0])
    claimed.put(lock is not None)
    signal.pause()


def test_the_claim_of_a_killed_process_is_free(directory):
    context = multiprocessing.get_context("fork")
    claimed = context.Queue()
    process = context.Process(target=_claim_and_wait, args=(directory.path, claimed))
    process.start()
    assert claimed.get(timeout=60)
    assert directory.claim(POINTS[0]) is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (directory.path / "claims" / f"{POINTS[0].id}.lock").exists()
    assert directory.claim(POINTS[0]) is not None


def _append_all(path, seed):
    directory = SweepDirectory(path)
    for cell in PLAN.cells * 100:
        directory.append(type(POINTS[0])(cell, seed), float(seed), 100, 0.25)


def test_lines_of_many_writers_stay_whole(directory):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append_all, args=(directory.path, seed)) for seed in PLAN.seeds]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = [json.loads(line) for line in (directory.path / "points.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 200
    assert losses(directory.path) == {point.id: float(point.seed) for point in POINTS}


def test_another_sweep_is_refused_by_what_differs(directory):
    directory.check(config())
    directory.check(config(p="1e-6,1e-6", budget_minutes="3"))
    for key, value, words in (
        ("p", "1e-6:1e-5:2", "holds another sweep, of sweep.p = 1e-06; here it is 1e-06, 1e-05"),
        ("sites", "w", "of sweep.sites = wx; here it is w"),
        ("seeds", "6", "of sweep.seeds = 5; here it is 6"),
    ):
        with pytest.raises(ConfigError) as error:
            directory.check(config(**{key: value}))
        (problem,) = error.value.problems
        assert words in problem
    other = load_config([], {"model": {"hf_model_path": "x"}, "bitflip": {"w_faults": "persistent"}})
    with pytest.raises(ConfigError) as error:
        directory.check(other)
    for words in ("of model.hf_model_path = some/model; here it is x", "of bitflip.w_faults", "of data.source"):
        assert any(words in problem for problem in error.value.problems)


CLEAN = {"loss": 1.0, "perplexity": 2.5}


def test_the_header_must_say_the_same(directory):
    assert directory.header({"dtype": "float32"}) is None
    directory.write_header({"dtype": "float32", "axes": {"p": [1e-6]}, "clean": CLEAN, "guard": None})
    assert directory.header({"dtype": "float32", "axes": {"p": (1e-6,)}})["clean"] == CLEAN
    with pytest.raises(ConfigError, match=r"^--to .*: holds another sweep, of dtype = float32; here it is bfloat16$"):
        directory.header({"dtype": "bfloat16"})


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a directory"):
        SweepDirectory(tmp_path / "file").check(config())
    with pytest.raises(ConfigError, match=r"holds something that is no sweep \(file\); name another one"):
        SweepDirectory(tmp_path).check(config())
    SweepDirectory(tmp_path / "new").check(config())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_start_that_was_killed_while_it_wrote_blocks_nothing(tmp_path):
    """What is there then are locks, and a part of the table under a temporary name."""
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "sweep.lock").touch()
    temporary_name(tmp_path / "sweep.toml").write_text("[mod")
    SweepDirectory(tmp_path).begin(config()).release()
    SweepDirectory(tmp_path).check(config())
    (tmp_path / ".sweep.toml.mine").write_text("mine")
    (tmp_path / "sweep.toml").unlink()
    with pytest.raises(ConfigError, match=r"holds something that is no sweep \(\.sweep\.toml\.mine\)"):
        SweepDirectory(tmp_path).check(config())


def test_what_is_known_of_the_header_is_compared_before_the_model_is(directory):
    directory.write_header({"sequences_per_pass": 4, "voltages": None, "clean": CLEAN, "guard": None})
    directory.check(config(), {"sequences_per_pass": 4, "voltages": None})
    with pytest.raises(ConfigError, match=r"^--to .*: holds another sweep, of sequences_per_pass = 4; here it is 8$"):
        directory.check(config(), {"sequences_per_pass": 8})
    for damaged in ('{"sequences', '{"clean": [1], "guard": null}', '{"clean": {"loss": 1}, "guard": null}', "{}"):
        (directory.path / "sweep.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"sweep\.json: not as a sweep writes it .*; delete it"):
            directory.check(config(), {})


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match="file is not a directory"):
            SweepDirectory(path).check(config())
