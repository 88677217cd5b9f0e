import json
import math
import multiprocessing
import os
import signal

import pytest

from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.files import temporary_name
from flipproof.measure.points import Point, Setting
from flipproof.records import append_line, read_record
from flipproof.sweep.order import Cell, Plan, Rate, Trial
from flipproof.sweep.store import SweepDirectory

PLAN = Plan(tuple(Cell(Rate(p, None, p, p), "w", "all", "all", "none") for p in (1e-6, 1e-5)), (1, 2, 3))
TRIALS = list(PLAN.trials.values())


def config(**sweep):
    overrides = {"model": {"hf_model_path": "some/model"}, "data": {"source": "stdlib"}, "sweep": {"p": "1e-6"} | sweep}
    return load_config([], overrides)


@pytest.fixture
def directory(tmp_path):
    directory = SweepDirectory(tmp_path / "sweep")
    directory.begin(config()).release()
    return directory


def file_of(directory, trial):
    return directory.path / "points" / f"{trial.cell.id}-{trial.seed}.json"


def losses(path):
    """As a process that has just started reads them."""
    directory = SweepDirectory(path)
    directory.refresh(PLAN.trials)
    return {name: point.loss for name, point in directory.measured.items()}


def test_points_are_read_back_and_a_broken_model_is_null(directory):
    directory.write(TRIALS[0], 2.5, 100, 0.25)
    directory.write(TRIALS[1], math.inf, 100, 0.5)
    assert losses(directory.path) == {TRIALS[0].id: 2.5, TRIALS[1].id: math.inf}
    first, second = (read_record(file_of(directory, trial)) for trial in TRIALS[:2])
    assert first == {
        "id": f"{TRIALS[0].cell.id}/1",
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
    assert second["loss"] is None
    directory.refresh(PLAN.trials)
    assert directory.measured[TRIALS[0].id] == Point(
        p=1e-6, voltage=None, setting=Setting("w", "all", "all", "none"), seed=1, loss=2.5, tokens=100, seconds=0.25
    )


def test_a_file_that_was_read_is_not_read_again(directory, monkeypatch):
    from flipproof.sweep import store

    read, real = [], store.read_record
    monkeypatch.setattr(store, "read_record", lambda path: read.append(path.name) or real(path))
    for n, trial in enumerate(TRIALS, 1):
        directory.write(trial, 2.0, 100, 0.25)
        directory.refresh(PLAN.trials)
        assert len(directory.measured) == len(read) == n
    assert sorted(read) == sorted(path.name for path in (directory.path / "points").iterdir())


def as_lines(directory):
    """The directory as earlier versions left it: a line for each point."""
    path = directory.path / "points.jsonl"
    for file in sorted((directory.path / "points").iterdir()):
        append_line(path, read_record(file))
        file.unlink()
    (directory.path / "points").rmdir()
    return path


@pytest.mark.parametrize("cut", [0, 1, 80, 160])
def test_the_lines_of_earlier_versions_are_read_but_not_half_of_one(directory, cut):
    for trial, loss in zip(TRIALS[:2], (2.0, math.inf), strict=True):
        directory.write(trial, loss, 100, 0.25)
    expected = losses(directory.path)
    path = as_lines(directory)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    directory.begin(config()).release()
    found = losses(directory.path)
    assert found.items() <= expected.items()
    assert len(found) == (1 if cut else 2)
    directory.write(TRIALS[1], math.inf, 100, 0.25)
    directory.write(TRIALS[2], 4.0, 100, 0.25)
    assert losses(directory.path) == expected | {TRIALS[2].id: 4.0}
    path.write_bytes(whole + b"rubbish\n")
    with pytest.raises(ConfigError, match=r"points\.jsonl line 3: not a point of a sweep .*; take the line out"):
        losses(directory.path)


def test_a_file_that_is_no_point_is_told_by_its_name(directory):
    directory.write(TRIALS[0], 2.5, 100, 0.25)
    path = file_of(directory, TRIALS[0])
    whole = path.read_text()
    values = read_record(path)
    for text, words in (
        ("", r"not a point of a sweep"),
        ("rubbish", r"not a point of a sweep"),
        (whole.replace("2.5", "2.4"), r"not a point of a sweep \(it is not what was written"),
        (json.dumps(values | {"loss": 10**400}), r"not a point of a sweep"),
        (json.dumps(values | {"seconds": "x"}), r"not a point of a sweep"),
        (json.dumps(values | {"id": "0123/1"}), r"it holds the point 0123/1"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"{path.name}: {words}.*; delete it to measure"):
            losses(directory.path)
    path.write_text(whole)
    with pytest.raises(ConfigError, match=rf"{TRIALS[0].id} is a point of another grid; name another --to"):
        SweepDirectory(directory.path).refresh({TRIALS[1].id: TRIALS[1]})


def test_one_process_has_a_point(directory):
    other = SweepDirectory(directory.path)
    lock = directory.claim(TRIALS[0])
    assert other.claim(TRIALS[0]) is None
    second = other.claim(TRIALS[1])
    assert second is not None
    directory.write(TRIALS[0], 2.0, 100, 0.25)
    directory.clear(lock)
    other.clear(second)
    assert sorted(path.name for path in (directory.path / "claims").iterdir()) == ["sweep.lock"]
    assert other.claim(TRIALS[0]) is not None


def _claim_and_wait(path, claimed):
    lock = SweepDirectory(path).claim(TRIALS[0])
    claimed.put(lock is not None)
    signal.pause()


def test_the_claim_of_a_killed_process_is_free(directory):
    context = multiprocessing.get_context("fork")
    claimed = context.Queue()
    process = context.Process(target=_claim_and_wait, args=(directory.path, claimed))
    process.start()
    assert claimed.get(timeout=60)
    assert directory.claim(TRIALS[0]) is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (directory.path / "claims" / f"{file_of(directory, TRIALS[0]).stem}.lock").exists()
    assert directory.claim(TRIALS[0]) is not None


def _write_all(path, seed):
    directory = SweepDirectory(path)
    for cell in PLAN.cells * 100:
        directory.write(Trial(cell, seed % 3 + 1), 2.0, 100, 0.25)


def test_points_of_many_writers_are_whole_whenever_they_are_read(directory):
    """Six processes, two for each seed, write the same points over and over."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_all, args=(directory.path, seed)) for seed in range(6)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert set(losses(directory.path).values()) <= {2.0}
    assert [process.exitcode for process in processes] == [0] * 6
    assert losses(directory.path) == dict.fromkeys(PLAN.trials, 2.0)
    assert len(list((directory.path / "points").iterdir())) == len(TRIALS)


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
    with pytest.raises(ConfigError, match=r"holds something that is no sweep \(\.sweep\.toml\.mine, points\)"):
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
