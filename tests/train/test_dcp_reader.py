"""Payloads in the directory of a run, as whoever was sent it would meet them."""

import contextlib
import io
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crash_points import prepare
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from flipproof.cli.main import main
from flipproof.train import checkpoint


class Evil:
    """What unpickling makes a directory of."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A directory with a base model and a run of four steps, checkpoints step-2 and step-4."""
    directory = tmp_path_factory.mktemp("trained")
    prepare(directory, root=".", save_freq=2)
    with contextlib.chdir(directory):
        assert main(["train", "--config", "run.toml"]) == 0
    return directory


def plant(path, where, marker):
    """Put a payload into a checkpoint; the file's other bytes and its length stay."""
    index = dcp.FileSystemReader(path).read_metadata()
    if where == "index":
        index.planner_data = Evil(marker)
        (path / ".metadata").write_bytes(pickle.dumps(index))
        return
    name = next(key for key in index.state_dict_metadata if key.endswith(".lr"))
    assert isinstance(index.state_dict_metadata[name], BytesStorageMetadata)
    key = next(key for key in index.storage_data if key.fqn == name)
    place = index.storage_data[key]
    torch.save(Evil(marker), path / "payload")
    payload = (path / "payload").read_bytes()
    (path / "payload").unlink()
    # at the end of the file, where the index now points
    file = path / place.relative_path
    place.offset, place.length = file.stat().st_size, len(payload)
    file.write_bytes(file.read_bytes() + payload)
    (path / ".metadata").write_bytes(pickle.dumps(index))


def rewrite_manifest(path, names):
    files = {name: checkpoint._fingerprint(path / name) for name in names}
    (path / "manifest.json").write_text(json.dumps({"step": 4, "files": files}))


COMMANDS = {
    "export": ["export", "run", "--to", "exported"],
    "export of the adapter": ["export", "run", "--format", "adapter", "--to", "exported"],
    "train": ["train", "--config", "run.toml", "--resume", "step-4", "--training.steps", "6"],
    "train, auto": ["train", "--config", "run.toml", "--resume", "auto", "--training.steps", "6"],
    "report": ["report", "run"],
    "eval": ["eval", "base", "--config", "run.toml", "--adapter", "run/adapter"],
}


@pytest.mark.parametrize("manifest", ["recomputed", "empty"])
@pytest.mark.parametrize("where", ["index", "value"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_verb_runs_what_was_planted(trained, tmp_path, capfd, monkeypatch, command, where, manifest):
    shutil.copytree(trained, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    path, marker = tmp_path / "there/run/checkpoints/step-4", tmp_path / "ran"
    plant(path, where, marker)
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    rewrite_manifest(path, names if manifest == "recomputed" else [])
    shutil.copytree(path, tmp_path / "planted")
    # what is damaged is passed over with a warning, and eval looks into no checkpoint
    goes_on = command == "eval" or (command == "train, auto" and manifest == "empty")
    assert main(COMMANDS[command]) == (0 if goes_on else 2)
    said = capfd.readouterr().err
    assert ("run/checkpoints/step-4" in said) == (command != "eval")
    assert "Traceback" not in said
    assert not marker.exists()
    # and the payload is one: who reads it as DCP does runs it
    index = dcp.FileSystemReader(tmp_path / "planted").read_metadata()
    if where == "value":
        place = max(
            (info for key, info in index.storage_data.items() if key.fqn.endswith(".lr")), key=lambda i: i.offset
        )
        data = (tmp_path / "planted" / place.relative_path).read_bytes()[place.offset :]
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


def test_a_whole_run_is_opened_by_all(trained, tmp_path, monkeypatch):
    """Those that the payloads keep out are let in without one."""
    shutil.copytree(trained, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    for name in ("export", "train, auto", "report", "eval"):
        assert main(COMMANDS[name]) == 0


@pytest.mark.parametrize("where", ["index", "value"])
def test_auto_does_not_fall_back_on_what_was_planted(trained, tmp_path, capfd, monkeypatch, where):
    shutil.copytree(trained, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    checkpoints, marker = tmp_path / "there/run/checkpoints", tmp_path / "ran"
    plant(checkpoints / "step-2", where, marker)
    rewrite_manifest(checkpoints / "step-2", [".metadata", "__0_0.distcp"])
    (checkpoints / "step-4/__0_0.distcp").write_bytes(b"")
    assert main(COMMANDS["train, auto"]) == 2
    assert "checkpoint run/checkpoints/step-2 is refused" in capfd.readouterr().err
    assert not marker.exists()


def test_a_report_of_a_run_with_a_damaged_checkpoint_is_made(trained, tmp_path, monkeypatch):
    """It needs none; and what is cut, empty or points elsewhere runs nothing."""
    shutil.copytree(trained, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    path = tmp_path / "there/run/checkpoints/step-4"
    whole = (path / ".metadata").read_bytes()
    for index in (whole[:100], b"", b"\x80", pickle.dumps([1])):
        (path / ".metadata").write_bytes(index)
        assert main(COMMANDS["report"]) == 0
    (path / ".metadata").unlink()
    os.mkfifo(path / ".metadata")
    assert main(COMMANDS["report"]) == 0


@pytest.mark.parametrize("changes", [{"offset": "x"}, {"length": 2**40}, {"offset": -1}, {"relative_path": "."}])
def test_an_index_that_points_at_nothing_is_refused(trained, tmp_path, capfd, monkeypatch, changes):
    shutil.copytree(trained, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    path = tmp_path / "there/run/checkpoints/step-4"
    index = dcp.FileSystemReader(path).read_metadata()
    for key, place in index.storage_data.items():
        if key.fqn.endswith(".lr"):
            for name, value in changes.items():
                setattr(place, name, value)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    rewrite_manifest(path, [".metadata", "__0_0.distcp"])
    for command in ("export", "train, auto"):
        assert main(COMMANDS[command]) == 2
        assert "checkpoint run/checkpoints/step-4 is refused" in capfd.readouterr().err
