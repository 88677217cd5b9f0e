import dataclasses
import errno
import json
import os
import pickle
import re
import threading
from concurrent.futures import wait
from contextlib import suppress

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict import get_state_dict

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import CheckpointConfig
from flipproof.errors import ConfigError
from flipproof.train import checkpoint
from flipproof.train.checkpoint import (
    Checkpointer,
    checkpoint_problems,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_trained_weights,
    whole_checkpoint,
)
from flipproof.world import World

SPEC = BitFlipSpec(w_p_frac=0.01)
ALONE = World(0, 1, torch.device("cpu"))


def train_on(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        ids = torch.randint(0, 256, (2, 16), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(make, seed=0, r=2):
    """A faulty model of one layer with adapters and an optimizer, three steps in."""
    model = make(num_hidden_layers=1)
    flipproof.inject(model, SPEC, LoraSpec(r=r, lora_alpha=6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    train_on(model, optimizer, seed)
    return model, optimizer


def progress(sequences=0, scale=1.0):
    return {"sequences": torch.tensor(sequences), "loss_scale": torch.tensor(scale, dtype=torch.float64)}


def saver(directory, keep_last=2, **options):
    return Checkpointer(directory, CheckpointConfig(keep_last=keep_last, **options), ALONE)


def save(directory, step, model, optimizer, used=None, **options):
    """One checkpoint, complete."""
    checkpoints = saver(directory, **options)
    checkpoints.save(step, model, optimizer, used or progress())
    checkpoints.wait()
    return directory / f"step-{step}"


@pytest.fixture
def held(monkeypatch):
    """Background writing waits at its last file until this event is set."""
    event, write_record = threading.Event(), checkpoint.write_record
    monkeypatch.setattr(checkpoint, "write_record", lambda *a: (event.wait(60), write_record(*a)))
    yield event
    event.set()


def test_who_writes_in_the_background_is_on_this_process_s_gpu(tiny_llama, tmp_path, monkeypatch):
    """Threads begin on the first, where another process may have left no memory for what CUDA takes."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread(), device)))
    with Checkpointer(tmp_path, CheckpointConfig(), World(0, 1, torch.device("cuda", 1))) as checkpoints:
        checkpoints.save(1, *trained(tiny_llama), progress())
    ((thread, device),) = chosen
    assert thread is not threading.current_thread()
    assert device == torch.device("cuda", 1)


@pytest.mark.parametrize(  # every pair of two of them
    ("r", "asynchronous", "state_dict_type"),
    [(0, False, "sharded"), (0, True, "full"), (2, False, "full"), (2, True, "sharded")],
)
def test_a_checkpoint_restores_weights_optimizer_and_progress_bitwise(
    tiny_llama, tmp_path, r, asynchronous, state_dict_type
):
    model, optimizer = trained(tiny_llama, r=r)
    options = {"asynchronous": asynchronous, "state_dict_type": state_dict_type}
    path = save(tmp_path, 3, model, optimizer, progress(96, 2.0**-7), **options)
    other, other_optimizer = trained(tiny_llama, seed=1, r=r)
    used = progress()
    tensors = dict(used)
    assert load_checkpoint(path, other, other_optimizer, used) == 3
    assert {name: float(value) for name, value in used.items()} == {"sequences": 96, "loss_scale": 2.0**-7}
    assert all(used[name] is tensors[name] for name in tensors)  # in place
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    one, two = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert one.keys() == two.keys()
    for key in one:
        assert all(torch.equal(one[key][name], two[key][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    third, _ = trained(tiny_llama, seed=2, r=r)
    assert load_trained_weights(path, third) == 3
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), third.parameters(), strict=True))


def test_a_fresh_model_and_optimizer_go_on_as_the_old_ones_would(tiny_llama, tmp_path):
    """Adam's moments and step are all there: the next steps are bitwise those of the run that saved."""
    model, optimizer = trained(tiny_llama)
    path = save(tmp_path, 3, model, optimizer)
    train_on(model, optimizer, seed=5)
    other = tiny_llama(num_hidden_layers=1)
    flipproof.inject(other, SPEC, LoraSpec(r=2, lora_alpha=6))
    flipproof.set_tick(other, 3)
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.05)
    load_checkpoint(path, other, fresh, progress())
    train_on(other, fresh, seed=5)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_writing_in_the_background_holds_the_step_that_it_was_asked_for(tiny_llama, tmp_path, held):
    """Training goes on, changing weights, moments and progress in place, while a thread writes what they were."""
    model, optimizer = trained(tiny_llama)
    before = [p.detach().clone() for p in model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    used = progress(7)
    checkpoints = saver(tmp_path)
    checkpoints.save(1, model, optimizer, used)
    assert not list_checkpoints(tmp_path)  # not complete, so not there
    train_on(model, optimizer, seed=5)
    used["sequences"].fill_(1000)
    held.set()
    checkpoints.wait()
    loaded, other = progress(), trained(tiny_llama, seed=1)
    load_checkpoint(tmp_path / "step-1", *other, loaded)
    assert int(loaded["sequences"]) == 7
    assert all(torch.equal(one, two) for one, two in zip(before, other[0].parameters(), strict=True))
    restored = [state["exp_avg"] for state in other[1].state.values()]
    assert all(torch.equal(one, two) for one, two in zip(moments, restored, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_a_save_waits_for_the_one_before(tiny_llama, tmp_path, held):
    model, optimizer = trained(tiny_llama)
    checkpoints = saver(tmp_path)
    checkpoints.save(1, model, optimizer, progress())
    threading.Timer(0.2, held.set).start()
    checkpoints.save(2, model, optimizer, progress())
    assert held.is_set()
    assert tmp_path / "step-1" in list_checkpoints(tmp_path)
    checkpoints.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1", "step-2"]


def test_the_last_few_are_kept_in_order_of_steps(tiny_llama, tmp_path):
    model, optimizer = trained(tiny_llama)
    checkpoints = saver(tmp_path)
    for step in (2, 9, 10, 100):
        checkpoints.save(step, model, optimizer, progress())
    checkpoints.wait()
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".step-101.unfinished").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-100"]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_drops_the_later_ones(tiny_llama, tmp_path):
    """Else "auto" would go on from one that this run never saw, and keep_last delete the new ones."""
    model, optimizer = trained(tiny_llama)
    for step in (50, 75, 100):
        save(tmp_path, step, model, optimizer, keep_last=3)
    save(tmp_path, 60, model, optimizer, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-50", "step-60"]


def test_weight_decay_is_the_configs_and_not_the_checkpoints(tiny_llama, tmp_path):
    path = save(tmp_path, 1, *trained(tiny_llama))
    model, optimizer = trained(tiny_llama)
    optimizer.param_groups[0]["weight_decay"] = 0.25
    load_checkpoint(path, model, optimizer, progress())
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_how_steps_are_carried_out_is_the_devices_and_not_the_checkpoints(tiny_llama, tmp_path):
    path = save(tmp_path, 1, *trained(tiny_llama))
    model, optimizer = trained(tiny_llama)
    optimizer.param_groups[0] |= {"foreach": False, "fused": True}
    load_checkpoint(path, model, optimizer, progress())
    assert {key: optimizer.param_groups[0][key] for key in ("foreach", "fused")} == {"foreach": False, "fused": True}


def test_a_failed_write_is_noticed_without_waiting(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_record", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    checkpoints = saver(tmp_path)
    checkpoints.check()  # nothing under way
    checkpoints.save(1, *trained(tiny_llama), progress())
    wait([checkpoints._pending])
    with pytest.raises(OSError, match="disk full"):
        checkpoints.check()
    checkpoints.check()


def test_a_crash_while_saving_leaves_the_last_one(tiny_llama, tmp_path, monkeypatch):
    model, optimizer = trained(tiny_llama)
    options = {"keep_last": 1, "asynchronous": False}
    save(tmp_path, 1, model, optimizer, **options)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_record", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save(tmp_path, 2, model, optimizer, **options)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    save(tmp_path, 2, model, optimizer, **options)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2"]


@pytest.mark.parametrize("then", ["save", "wait"])
def test_what_fails_in_the_background_is_raised_at_the_next_save_or_wait(tiny_llama, tmp_path, monkeypatch, then):
    model, optimizer = trained(tiny_llama)
    checkpoints = saver(tmp_path)
    checkpoints.save(1, model, optimizer, progress())
    checkpoints.wait()
    monkeypatch.setattr(checkpoint, "write_record", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    checkpoints.save(2, model, optimizer, progress())
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(3, model, optimizer, progress()) if then == "save" else checkpoints.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    assert not checkpoint_problems(tmp_path / "step-1")


@pytest.mark.parametrize("state_dict_type", ["sharded", "full"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "no manifest"])
def test_damage_is_refused_by_name_and_the_previous_one_offered(tiny_llama, tmp_path, caplog, damage, state_dict_type):
    model, optimizer = trained(tiny_llama)
    for step in (1, 2):
        path = save(tmp_path, step, model, optimizer, state_dict_type=state_dict_type)
    victim = next(path.glob("*.distcp"))
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "altered":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim = path / "manifest.json"
        victim.unlink()
    before = [p.clone() for p in model.parameters()]
    used = progress(5)
    with pytest.raises(ConfigError, match=rf"step-2.*{victim.name}.*--resume step-1 goes on from the one before"):
        load_whole(path, model, optimizer, used)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert int(used["sequences"]) == 5
    assert whole_checkpoint(path, fall_back=True) == tmp_path / "step-1"
    assert re.search(rf"step-2: {victim.name} is .*; goes on from step-1", caplog.text)
    (tmp_path / "step-1").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="step-2") as error:
        load_whole(path, model, optimizer, used)
    assert "goes on" not in str(error.value)  # there is none before


def test_a_checkpoint_of_another_model_is_refused(tiny_llama, tmp_path):
    path = save(tmp_path, 1, *trained(tiny_llama))
    with pytest.raises(ConfigError, match="does not fit"):
        load_checkpoint(path, *trained(tiny_llama, r=3), progress())


class Evil:
    """What unpickling makes a directory of."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def load_whole(path, *training):
    """As ``train`` does."""
    return load_checkpoint(whole_checkpoint(path), *training)


def plant(path, where, marker, model, optimizer):
    """Put a payload into a whole checkpoint, as what DCP would read."""
    if where == "index":
        (path / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    elif where == "within the index":
        index = dcp.FileSystemReader(path).read_metadata()
        index.planner_data = Evil(marker)
        (path / ".metadata").write_bytes(pickle.dumps(index))
    else:
        model_state, optimizer_state = get_state_dict(model, optimizer, options=checkpoint._TRAINABLE)
        optimizer_state["param_groups"][0]["lr"] = Evil(marker)
        state = {"model": model_state, "optimizer": optimizer_state, "progress": progress()}
        dcp.save(state, checkpoint_id=path, no_dist=True)


def rewrite_manifest(path, names=None):
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"] if names is None else names
    files = {name: checkpoint._fingerprint(path / name) for name in names}
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": files}))


@pytest.mark.parametrize("manifest", ["recomputed", "empty"])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("index", r"\.metadata is no index of a checkpoint \(it names posix\.mkdir"),
        ("within the index", r"\.metadata is no index of a checkpoint \(it names posix\.mkdir"),
        ("value", r"optimizer\.param_groups\..*\.lr is no plain value"),
    ],
)
def test_a_planted_payload_does_not_run(tiny_llama, tmp_path, where, said, manifest):
    model, optimizer = trained(tiny_llama)
    path, marker = save(tmp_path, 1, model, optimizer), tmp_path / "ran"
    plant(path, where, marker, model, optimizer)
    rewrite_manifest(path, None if manifest == "recomputed" else [])
    refused = (
        rf"step-1 is refused: {said}" if manifest == "recomputed" else r"step-1: manifest\.json is missing or damaged"
    )
    with pytest.raises(ConfigError, match=refused):
        load_whole(path, *trained(tiny_llama), progress())
    if where != "value" or manifest == "empty":  # which the weights alone do without
        with pytest.raises(ConfigError, match=refused):
            load_trained_weights(whole_checkpoint(path), trained(tiny_llama)[0])
    assert not marker.exists()
    with suppress(CheckpointException):  # and the payload is one: DCP itself runs it
        dcp.load({"optimizer": {"param_groups": {"0": {"lr": 0}}}}, checkpoint_id=path, no_dist=True)
    assert marker.exists()


def changes_a_class():
    """The opcodes by hand: no object says this of itself."""
    return (
        pickle.PROTO
        + bytes([2])
        + pickle.GLOBAL
        + b"torch.distributed.checkpoint.metadata\nMetadataIndex\n"
        + pickle.NONE
        + pickle.EMPTY_DICT
        + pickle.MARK
        + pickle.BINUNICODE
        + (10).to_bytes(4, "little")
        + b"__module__"
        + pickle.BINUNICODE
        + (4).to_bytes(4, "little")
        + b"evil"
        + pickle.SETITEMS
        + pickle.TUPLE2
        + pickle.BUILD
        + pickle.STOP
    )


def test_an_index_changes_no_class(tiny_llama, tmp_path):
    """Else the next that is pickled would import what it names."""
    path = save(tmp_path, 1, *trained(tiny_llama))
    (path / ".metadata").write_bytes(changes_a_class())
    rewrite_manifest(path)
    before = MetadataIndex.__module__
    try:
        with pytest.raises(
            ConfigError, match=r"step-1 is refused: \.metadata .*it would change <class .*MetadataIndex"
        ):
            load_checkpoint(path, *trained(tiny_llama), progress())
        assert MetadataIndex.__module__ == before
        pickle.loads(changes_a_class())
        assert MetadataIndex.__module__ == "evil"  # and it is one that would
    finally:
        MetadataIndex.__module__ = before


@pytest.mark.parametrize("wrong", ["index", "places", "place"])
def test_an_index_is_made_of_what_it_should_be(tiny_llama, tmp_path, wrong):
    path = save(tmp_path, 1, *trained(tiny_llama))
    index = dcp.FileSystemReader(path).read_metadata()
    if wrong == "places":
        index.storage_data = list(index.storage_data.items())
    elif wrong == "place":
        index.storage_data |= {next(iter(index.storage_data)): index}
    (path / ".metadata").write_bytes(pickle.dumps([index] if wrong == "index" else index))
    rewrite_manifest(path)
    with pytest.raises(
        ConfigError, match=r"step-1 is refused: \.metadata is no index of a checkpoint \(\w+ in the place"
    ):
        load_checkpoint(path, *trained(tiny_llama), progress())


def test_an_index_points_at_the_files_of_its_checkpoint_alone(tiny_llama, tmp_path):
    path = save(tmp_path, 1, *trained(tiny_llama))
    index = dcp.FileSystemReader(path).read_metadata()
    elsewhere = dataclasses.replace(next(iter(index.storage_data.values())), relative_path="../../secret")
    index.storage_data |= {next(iter(index.storage_data)): elsewhere}
    (path / ".metadata").write_bytes(pickle.dumps(index))
    rewrite_manifest(path)
    with pytest.raises(ConfigError, match=r"step-1 is refused: \.metadata points at '\.\./\.\./secret'"):
        load_checkpoint(path, *trained(tiny_llama), progress())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([".metadata"], r"step-1 is refused: .*points at '__0_0\.distcp'"),
        (["__0_0.distcp"], r"step-1: manifest\.json is missing or damaged"),
        ([".metadata", "../step-1/__0_0.distcp"], r"step-1: manifest\.json is missing or damaged"),
    ],
)
def test_what_the_manifest_does_not_name_is_not_read(tiny_llama, tmp_path, names, words):
    path = save(tmp_path, 1, *trained(tiny_llama))
    rewrite_manifest(path, names)
    with pytest.raises(ConfigError, match=words):
        load_whole(path, *trained(tiny_llama), progress())


@pytest.mark.parametrize(
    "files", ['[".metadata"]', '{".metadata": 1, "a\\u0000b": "1"}', '{".metadata": 1, "\\ud800": 1}']
)
def test_a_manifest_of_nonsense_is_damaged(tiny_llama, tmp_path, files):
    path = save(tmp_path, 1, *trained(tiny_llama))
    (path / "manifest.json").write_text(f'{{"step": 1, "files": {files}}}')
    with pytest.raises(ConfigError, match=r"step-1: manifest\.json is missing or damaged"):
        whole_checkpoint(path)


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tiny_llama, tmp_path, monkeypatch):
    """It may be whole, and would be deleted with what a run that goes back abandons. A file more is nothing."""
    model, optimizer = trained(tiny_llama)
    for step in (1, 2):
        path = save(tmp_path, step, model, optimizer)
    (path / ".DS_Store").write_text("")
    assert whole_checkpoint(path, fall_back=True) == path

    def refused(file):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr(checkpoint, "_fingerprint", refused)
    with pytest.raises(ConfigError, match=r"step-2: .* cannot be read \(Input/output error\)"):
        whole_checkpoint(path, fall_back=True)


def test_a_full_disk_is_told_by_its_name(tiny_llama, tmp_path, monkeypatch):
    """DCP wraps it into what is no Exception."""

    def full(*_, **__):
        raise CheckpointException("full", {0: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None)})

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*step-1") as error:
        save(tmp_path, 1, *trained(tiny_llama), asynchronous=False)
    assert error.value.errno == errno.ENOSPC
    assert not any(tmp_path.iterdir())  # what was begun is gone


def test_find_checkpoint(tiny_llama, tmp_path):
    assert find_checkpoint(tmp_path / "nowhere", "auto") is None
    with pytest.raises(ConfigError, match=r"--resume step-1: .*nowhere holds no complete checkpoint"):
        find_checkpoint(tmp_path / "nowhere", "step-1")
    model, optimizer = trained(tiny_llama)
    for step in (9, 10):
        save(tmp_path, step, model, optimizer)
    (tmp_path / ".step-11.unfinished").mkdir()
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "step-10"
    assert find_checkpoint(tmp_path, "step-9") == tmp_path / "step-9"
    for name in ("step-11", ".step-11.unfinished", "latest", ""):
        with pytest.raises(ConfigError, match=r"holds step-9, step-10") as error:
            find_checkpoint(tmp_path, name)
        assert f"--resume {name}:" in str(error.value)
