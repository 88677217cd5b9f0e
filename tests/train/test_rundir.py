import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from flipproof.errors import ConfigError
from flipproof.train import rundir
from flipproof.train.rundir import Record, check_run_dir, forget_abandoned, held, placed
from flipproof.world import World

RECORD = Record("model", 4, ((10, "one"), (5, "two")), "held", "measured", ("step-4",), gpu="NVIDIA H200", nodes=2)


def test_the_second_is_refused_at_once_and_told_who_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "PATIENCE_S", 0)
    with held(tmp_path / "run"):
        with pytest.raises(ConfigError) as error, held(tmp_path / "run"):
            pass
        (line,) = error.value.problems
        assert f"{tmp_path / 'run'} is in use by process {os.getpid()} on {socket.gethostname()}, since 20" in line
        assert "--logging.run_dir" in line
        with pytest.raises(ConfigError, match="in use"), held(tmp_path / "run"):  # the refused one broke nothing
            pass
        with held(tmp_path / "other"):
            pass
    with held(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_process_is_gone_with_it(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from flipproof.train.rundir import held
with held(Path({str(tmp_path / "run")!r})):
    print("has it", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    assert json.loads((tmp_path / "run" / ".lock-holder").read_text())["pid"] == process.pid
    process.send_signal(signal.SIGKILL)
    with held(tmp_path / "run"):  # at once, whether or not the kernel is done with it
        assert json.loads((tmp_path / "run" / ".lock-holder").read_text())["pid"] == os.getpid()
    process.communicate()


@pytest.mark.parametrize("there", ["", "a", "a/b", "a/b/run"])
def test_a_start_that_writes_nothing_leaves_no_directory(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    with held(tmp_path / "a" / "b" / "run"):
        assert (tmp_path / "a" / "b" / "run").is_dir()
    assert sorted(tmp_path.rglob("*")) == before
    with held(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "b" / "run" / "config.toml").touch()
    assert [path.name for path in (tmp_path / "a" / "b" / "run").iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("files", "new", "resumed"),
    [
        ([], True, True),
        (["metrics.jsonl", "run.json", "config.toml", "results.json"], True, True),  # came to no step
        (["wandb_id", "tensorboard/events", "hangs/rank-0", ".lock", ".lock-holder"], True, True),
        (["checkpoints/.step-3.unfinished/file", "run.json", "config.toml"], True, True),
        (["metrics.jsonl=line", "run.json", "config.toml"], False, True),
        (["checkpoints/step-3/manifest.json", "run.json", "config.toml"], False, True),
        (["checkpoints/step-3/manifest.json", "config.toml"], False, True),  # of a version without run.json
        (["config.toml"], False, True),
        (["adapter/adapter_config.json", "run.json", "config.toml"], False, True),
        (["results.json"], False, False),  # what eval measured
        (["model/config.json"], False, False),  # what export wrote
    ],
)
def test_what_is_a_run_and_what_is_none(tmp_path, files, new, resumed):
    for name, _, content in (file.partition("=") for file in files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for resume, free in ((False, new), (True, resumed)):
        if free:
            check_run_dir(tmp_path, resume)
        else:
            with pytest.raises(ConfigError, match=r"holds a run already \(.*--resume.*--logging\.run_dir"):
                check_run_dir(tmp_path, resume)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logging\.run_dir = '.*file' is not a directory"):
        check_run_dir(tmp_path / "file", resume=False)


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert Record.read(tmp_path) is None
    RECORD.write(tmp_path)
    assert Record.read(tmp_path) == RECORD
    for damage in ("", "[]", "{}", '{"text": 3}', (tmp_path / "run.json").read_text().replace("rows", "columns")):
        (tmp_path / "run.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"run\.json is damaged"):
            Record.read(tmp_path)
    replace(RECORD, nodes=0).write(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.json is damaged \(nodes = 0\)"):
        Record.read(tmp_path)


def test_a_record_says_where_its_processes_are(monkeypatch):
    assert placed(World(0, 1, torch.device("cpu"), None)) == {"gpu": "", "nodes": 1}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert placed(World(0, 16, torch.device("cuda", 0), None)) == {"gpu": "NVIDIA H200", "nodes": 2}


def test_what_is_abandoned_is_gone_whoever_finishes_it(tmp_path):
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step}" / "file").touch()
    forget_abandoned(tmp_path)  # no record, nothing to do
    record = replace(RECORD, abandoned=("step-4", "step-6", "step-8"))  # the last is gone already
    record.write(tmp_path)
    forget_abandoned(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    assert Record.read(tmp_path) == replace(record, abandoned=())


def test_a_name_that_leads_out_of_the_directory_deletes_nothing_there(tmp_path):
    (tmp_path / "mine").mkdir()
    replace(RECORD, abandoned=("../../mine",)).write(tmp_path / "run") if (tmp_path / "run").mkdir() is None else None
    forget_abandoned(tmp_path / "run")
    assert (tmp_path / "mine").exists()
