import dataclasses
import importlib
import json
import os
import struct
import subprocess
import sys
import time
from types import ModuleType

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flipproof.config import LoggingConfig, RunConfig
from flipproof.errors import ConfigError
from flipproof.records import unsealed
from flipproof.train.metrics import Trackers, check_trackers, log_in


@pytest.fixture
def config(tmp_path):
    def make(**logging):
        (tmp_path / "run").mkdir(exist_ok=True)
        return RunConfig(logging=LoggingConfig(run_dir=str(tmp_path / "run"), **logging))

    return make


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module that notes how it is called."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", values, step))

        def finish(self):
            calls.append(("finish",))

    def init(**kwargs):
        calls.append(("init", kwargs))
        return Run()

    fake = ModuleType("wandb")
    fake.init, fake.Error, fake.calls = init, type("Error", (Exception,), {}), calls
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def run(config, first_step, last_step, offset=0.0):
    trackers = Trackers(config, first_step)
    for step in range(first_step + 1, last_step + 1):
        trackers.write(step=step, loss=1 / step + offset, mfu=None if step == 2 else 0.25)
    trackers.close()


def jsonl(tmp_path):
    return [unsealed(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_metrics_go_on_after_the_step_they_resume_from(config, tmp_path):
    run(config(), 0, 3)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    run(config(), 2, 3, offset=10.0)
    assert [(line["step"], line["loss"]) for line in jsonl(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3 + 10)]


def test_without_trackers_there_is_the_jsonl_and_nothing_else(config, tmp_path):
    run(config(), 0, 2)
    assert jsonl(tmp_path) == [{"step": 1, "loss": 1.0, "mfu": 0.25}, {"step": 2, "loss": 0.5, "mfu": None}]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_tensorboard_reads_back_what_was_written_and_a_resumed_run_replaces_its_later_steps(config, tmp_path):
    settings = config(tensorboard=True)
    run(settings, 0, 4)
    run(settings, 2, 5, offset=10.0)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    expected = {1: 1.0, 2: 0.5, 3: 1 / 3 + 10, 4: 0.25 + 10, 5: 0.2 + 10}
    assert {event.step: event.value for event in events.Scalars("loss")} == {
        step: float(np.float32(value)) for step, value in expected.items()
    }
    assert len(events.Scalars("loss")) == 5
    assert [(event.step, event.value) for event in events.Scalars("mfu")] == [(s, 0.25) for s in (1, 3, 4, 5)]
    assert {row["step"]: row["loss"] for row in jsonl(tmp_path)} == expected
    assert jsonl(tmp_path)[1]["mfu"] is None


def test_tensorboard_loses_nothing_when_the_process_is_killed(config, tmp_path):
    trackers = Trackers(config(tensorboard=True), 0)
    trackers.write(step=1, loss=0.5)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()  # before it is closed
    assert [event.value for event in events.Scalars("loss")] == [0.5]
    trackers.close()


def test_wandb_is_told_the_config_and_a_resumed_run_goes_on_under_its_id(config, tmp_path, fake_wandb):
    settings = config(wandb="online", wandb_project="faults", wandb_group="8B", wandb_tags=("lr1e-5", "steps4883"))
    run(settings, 0, 2)
    (_, first), *rest = fake_wandb.calls
    assert rest == [("log", {"loss": 1.0, "mfu": 0.25}, 1), ("log", {"loss": 0.5}, 2), ("finish",)]
    identity = first.pop("id")
    assert first == {
        "project": "faults",
        "group": "8B",
        "tags": ["lr1e-5", "steps4883"],
        "name": "run",
        "dir": tmp_path / "run",
        "mode": "online",
        "config": dataclasses.asdict(settings),
        "resume": "allow",
    }
    assert (tmp_path / "run" / "wandb_id").read_text() == f"{identity}\n"
    fake_wandb.calls.clear()
    run(settings, 1, 1)
    assert fake_wandb.calls[0][1]["id"] == identity


def test_wandb_tells_the_controls_of_several_runs_apart(config, tmp_path, fake_wandb):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    logging = LoggingConfig(run_dir=str(tmp_path / "run" / "control"), wandb="online")
    (tmp_path / "run" / "control").mkdir()
    Trackers(RunConfig(logging=logging), 0).close()
    assert fake_wandb.calls[0][1]["name"] == "run-control"


def test_where_wandb_lets_nobody_in_there_is_one_line(config, fake_wandb):
    def refuse(**_):
        raise fake_wandb.Error("No API key configured.\nUse `wandb login` to log in.")

    fake_wandb.init = refuse
    with pytest.raises(ConfigError, match=r'^logging.wandb = "online": No API key .* log in\.; offline logs into .*$'):
        Trackers(config(wandb="online"), 0)


def test_a_login_that_fails_is_one_line_before_anything_begins(fake_wandb, tmp_path):
    """Weights & Biases' server is asked once, and only where it will be written to."""
    asked = []

    def login(verify):
        asked.append(verify)
        raise fake_wandb.Error("Invalid credentials for https://api.wandb.ai.\nGet a key.")

    fake_wandb.login = login
    logging = LoggingConfig(run_dir="runs/a", wandb="online")
    with pytest.raises(ConfigError) as error:
        log_in(logging)
    assert error.value.problems == [
        'logging.wandb = "online": Invalid credentials for https://api.wandb.ai. Get a key.; offline logs into '
        "runs/a/wandb"
    ]
    for mode in ("offline", "disabled"):
        log_in(LoggingConfig(wandb=mode))
    fake_wandb.login = lambda verify: asked.append(verify)
    log_in(logging)
    assert asked == [True, True]


def test_without_a_key_there_is_no_login(monkeypatch, tmp_path):
    """The package itself, without a terminal."""
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r'^logging.wandb = "online": .*API key.*; offline logs into '):
        log_in(LoggingConfig(wandb="online"))


def wandb_records(path):
    """The records of a W&B run file: after 7 bytes of header, each behind checksum, length and kind (1 is whole)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position = path.read_bytes(), 7
    while position + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, position)
        assert kind == 1
        if position + 7 + length > len(data):
            return
        yield Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length


def test_wandb_offline_writes_the_history_into_the_run(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(config(wandb="offline"), 0, 3)
    identity = (tmp_path / "run" / "wandb_id").read_text().strip()
    (path,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    for _ in range(300):  # W&B's own process may still be writing
        if sum(record.HasField("history") for record in wandb_records(path)) == 3:
            break
        time.sleep(0.1)
    rows = []
    for record in wandb_records(path):
        if record.HasField("run"):
            assert (record.run.run_id, record.run.project, record.run.display_name) == (identity, "flipproof", "run")
        if record.HasField("history"):
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in row.items() if not name.startswith("_") or name == "_step"})
    assert rows == [
        {"_step": 1, "loss": 1.0, "mfu": 0.25},
        {"_step": 2, "loss": 0.5},
        {"_step": 3, "loss": 1 / 3, "mfu": 0.25},
    ]


def test_a_missing_package_is_one_line_that_says_how_to_get_it(monkeypatch, tmp_path):
    wanted = LoggingConfig(tensorboard=True, wandb="offline")
    check_trackers(wanted)
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        check_trackers(wanted)
    assert error.value.problems == [
        "logging.tensorboard = true needs the package tensorboard; pip install 'flipproof[track]'",
        "logging.wandb = \"offline\" needs the package wandb; pip install 'flipproof[track]'",
    ]
    check_trackers(LoggingConfig())


def test_the_folder_that_wandb_leaves_behind_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_trackers(LoggingConfig(wandb="online"))


def test_peak_memory_counts_what_is_allocated():
    """In a process of its own: the peak of this one depends on the tests before."""
    code = """
from flipproof.train.metrics import peak_memory_gib
blocks, peaks = [], []
for mib in (600, 200, 200):  # the first two are more than what importing took and gave back
    blocks.append(bytearray(mib * 2**20))
    blocks[-1][::4096] = b"x" * len(blocks[-1][::4096])
    peaks.append(peak_memory_gib())
print(*peaks)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    first, second, third = map(float, said.split())
    assert first > 600 / 2**10
    assert 190 / 2**10 < third - second < 210 / 2**10


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a new program begins with a peak of its own")
def test_peak_memory_is_not_that_of_the_process_before():
    """Linux hands the largest resident size on to the program that takes a process's place."""
    code = """
import os, sys
if len(sys.argv) == 1:
    large = b"x" * 2 * 2**30
    os.execv(sys.executable, [sys.executable, "-c", os.environ["CODE"], "again"])
from flipproof.train.metrics import peak_memory_gib
print(peak_memory_gib())
"""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CODE": code}, check=True, capture_output=True)
    assert 0.05 < float(run.stdout) < 1.5
