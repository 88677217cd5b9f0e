"""Runs that end on their way and go on, with the same config or with another."""

import functools
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from tiny_runs import assert_same_run, child_paused_at, crash_at, metrics, settings, train_until_crash

import flipproof.train.loop as train_module
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.sequences import training_indices
from flipproof.errors import ConfigError
from flipproof.launch import EXIT_REQUEUE
from flipproof.measure.evaluate import evaluate
from flipproof.models.load import byte_tokenizer
from flipproof.train import rundir
from flipproof.train.checkpoint import Checkpointer, list_checkpoints
from flipproof.train.loop import train
from flipproof.train.optimizer import learning_rate
from flipproof.train.step import chosen_sequences


@pytest.mark.parametrize(("lora_r", "undisturbed"), [(0, "whole_of_all_weights"), (2, "whole")])
def test_a_run_killed_after_a_checkpoint_and_resumed_equals_one_never_killed(
    base, tmp_path, lora_r, undisturbed, request
):
    config = settings(base, tmp_path / "killed", lora_r=lora_r)
    process = child_paused_at(4, tmp_path, config)
    try:  # step 5 does not end, but the thread that writes the checkpoint of step 4 does
        deadline = time.monotonic() + 60
        while not (tmp_path / "killed" / "checkpoints" / "step-4").exists():
            assert time.monotonic() < deadline, "step 4 was not written"
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-2", "step-4"]

    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        train(config)
    train(config, resume="auto")
    assert_same_run(request.getfixturevalue(undisturbed), tmp_path / "killed")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_it_goes_on(base, whole, tmp_path, number, name):
    """The signal arrives in the middle of step 3, where no checkpoint is due."""
    config = settings(base, tmp_path / "stopped", save_freq=5)
    process = child_paused_at(2, tmp_path, config)
    os.kill(process.pid, number)
    (tmp_path / "go").touch()
    process.join(timeout=120)
    stderr = (tmp_path / "said").read_text()
    assert process.exitcode == EXIT_REQUEUE == 75
    command = f"train --config {tmp_path / 'stopped' / 'config.toml'} --resume"
    assert stderr.splitlines()[-1].endswith(f"stopped by {name} after step 3; flipproof {command} goes on from there")
    assert ("Ctrl-C again ends at once" in stderr) == (number == signal.SIGINT)
    assert "Traceback" not in stderr
    log = (tmp_path / "stopped" / "run.log").read_text()
    assert log.splitlines()[-1].endswith(
        f"Interrupted: stopped by {name} after step 3; flipproof {command} goes on from there"
    )
    assert [path.name for path in list_checkpoints(tmp_path / "stopped" / "checkpoints")] == ["step-3"]
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 3]
    assert not (tmp_path / "stopped" / "adapter").exists()

    assert main(command.split()) == 0
    assert_same_run(whole, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "run.log").read_text().startswith(log + "\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_the_programs_own_again_after_training(number):
    def mine(*_):
        raise AssertionError

    before = signal.signal(number, mine)
    try:
        with train_module._StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.came == number
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_ends_at_once():
    with train_module._StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.came == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_after_a_crash_with_lines_beyond_the_checkpoint(base, whole, tmp_path):
    config = settings(base, tmp_path / "crashed")
    train_until_crash(config, 5)
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    assert len((tmp_path / "crashed" / "metrics.jsonl").read_text().splitlines()) == 6
    train(config, resume="auto")
    assert_same_run(whole, tmp_path / "crashed")


def test_a_run_that_fails_leaves_its_last_checkpoint_written(base, tmp_path, monkeypatch):
    """What comes next in the same process would meet the thread that writes it."""
    may_be_written, complete = threading.Event(), Checkpointer._complete

    def complete_later(self, unfinished, files, about):
        may_be_written.wait()
        complete(self, unfinished, files, about)

    def power_cut(training, step):
        if step == 2:
            threading.Timer(0.3, may_be_written.set).start()
            raise RuntimeError("power cut")
        return learning_rate(training, step)

    monkeypatch.setattr(Checkpointer, "_complete", complete_later)
    monkeypatch.setattr(train_module, "learning_rate", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(settings(base, tmp_path / "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2"]


def test_dropout_is_resumed_too(tiny_llama, whole, tmp_path):
    """It is drawn per step: no RNG state is carried, and what ran before (here a whole run) does not matter."""
    tiny_llama(num_hidden_layers=1, attention_dropout=0.1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    train(settings(tmp_path / "base", tmp_path / "whole"))
    config = settings(tmp_path / "base", tmp_path / "crashed")
    train_until_crash(config, 3)
    torch.manual_seed(99)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")

    # and it does drop: neighbouring steps differ, and so does a run without
    assert metrics(whole)[0]["loss"] != metrics(tmp_path / "whole")[0]["loss"]


def test_resuming_from_an_earlier_checkpoint_by_name(finished, whole, tmp_path):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    with pytest.raises(ConfigError, match=r"--resume step-2: .* holds step-4, step-6"):
        train(finished, resume="step-2")
    train(finished, resume="step-4")
    assert_same_run(whole, tmp_path / "run")


def test_lines_of_metrics_that_are_gone_are_told_and_who_takes_the_file_away_goes_on(base, tmp_path, monkeypatch):
    """Also when the run is killed again before its next checkpoint, and when it then goes back."""
    config = settings(base, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    crash_in = functools.partial(monkeypatch.setattr, train_module, "learning_rate")
    crash_in(crash_at(5))
    with pytest.raises(RuntimeError, match="power cut"):
        train(config)
    whole = path.read_text()
    for left in ("", "".join(whole.splitlines(keepends=True)[1:])):
        path.write_text(left)
        with pytest.raises(ConfigError, match=r"metrics\.jsonl has \d lines up to step 4, and 4 were written"):
            train(config, resume="auto")
        assert path.read_text() == left
    path.unlink()
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, resume="auto")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5]
    crash_in(crash_at(4))
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, resume="auto")
    assert path.read_text() == ""
    crash_in(learning_rate)
    train(config, resume="step-2")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 4, 5, 6]


def test_auto_starts_where_there_is_nothing_to_resume(base, whole, tmp_path):
    train(settings(base, tmp_path / "run"), resume="auto")
    assert_same_run(whole, tmp_path / "run")


def test_of_a_damaged_checkpoint_the_one_before_goes_on_where_none_is_named(finished, tmp_path, caplog):
    config = finished
    before = metrics(tmp_path / "run")
    next((tmp_path / "run" / "checkpoints" / "step-6").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step-6.*distcp is damaged.*--resume step-4 goes on from the one before"):
        train(config, resume="step-6")
    assert metrics(tmp_path / "run") == before
    train(config, resume="auto")
    assert "is damaged (size or hash differ from the manifest); goes on from step-4" in caplog.text
    assert metrics(tmp_path / "run") == before
    for name in ("step-2", "step-4", "step-6"):
        (tmp_path / "run" / "checkpoints" / name / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"step-6: manifest\.json is missing or damaged"):
        train(config, resume="auto")


def test_a_second_run_is_refused_before_it_loads_anything(base, whole, tmp_path, monkeypatch):
    config = settings(base, tmp_path / "run")
    process = child_paused_at(1, tmp_path, config)
    try:
        monkeypatch.setattr(rundir, "PATIENCE_S", 0)
        monkeypatch.setattr(train_module, "load_tokenizer", lambda *_: pytest.fail("something was loaded"))
        for resume in (None, "auto"):
            with pytest.raises(ConfigError, match=rf"run is in use by process {process.pid} on .*, since "):
                train(config, resume=resume)
        monkeypatch.undo()
        (tmp_path / "go").touch()
        process.join(timeout=240)
    finally:
        process.kill()
    assert process.exitcode == 0
    assert_same_run(whole, tmp_path / "run")


# -- going on with another config --------------------------------------------------------------------------------------


@pytest.fixture
def finished(base, whole, tmp_path):
    """The config of a run of six steps in ``tmp_path``, with checkpoints of steps 2, 4 and 6."""
    shutil.copytree(whole, tmp_path / "run")
    config = settings(base, tmp_path / "run")
    return replace(config, checkpoint=replace(config.checkpoint, keep_last=9))


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_nothing_else(base, tmp_path, tiny_llama):
    base, run = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    begun = settings(base, run)
    train(begun)
    before = contents(run)
    other_text = tmp_path / "other.txt"
    other_text.write_text("x = 1; y = 2\n" * 3000)
    for section, change, words in [
        ("bitflip", {"w_p_frac": 0.2}, r"bitflip\.w_p_frac = 0\.2, .* begun with 0\.005"),
        ("lora", {"lora_alpha": 16.0}, r"lora\.lora_alpha = 16\.0, .* begun with 4"),
        ("lora", {"r": 4}, r"lora\.r = 4, .* begun with 2"),
        ("training", {"seq_len": 16}, r"training\.seq_len = 16, .* begun with 32"),
        ("training", {"local_batch_size": 3}, r"local_batch_size x processes = 3, .* begun with 2"),
        ("training", {"steps": 5}, r"training\.steps = 5, but .*step-6 has done 6"),
        ("data", {"source": str(other_text)}, r"data\.source = .*other\.txt', .*; the training text is another"),
        ("data", {"max_tokens": 500}, r"data\.max_tokens = 500, .*; the training text is another"),
        ("training", {"dtype": "bfloat16"}, r"training\.dtype = 'bfloat16', .*; the base model is another"),
    ]:
        changed = replace(begun, **{section: replace(getattr(begun, section), **change)})
        with pytest.raises(ConfigError, match=words):
            train(changed, resume="auto")
        assert contents(run) == before, words

    edited = tiny_llama(num_hidden_layers=1)
    edited.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    edited.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"the base model is another .* though no key that names it has changed"):
        train(begun, resume="auto")
    tiny_llama(num_hidden_layers=1).save_pretrained(base)
    (tmp_path / "text.txt").write_text("import nothing\n" * 3000)
    with pytest.raises(ConfigError, match=r"the training text is another .* though no key that names it has changed"):
        train(begun, resume="auto")
    assert contents(run) == before


def test_what_is_only_called_otherwise_is_the_same(finished, base, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(base, tmp_path / "moved")
    shutil.copy(base.parent / "text.txt", tmp_path / "copy.txt")
    expected = contents(tmp_path / "run")
    moved = replace(
        finished,
        model=replace(finished.model, hf_model_path=str(tmp_path / "moved")),
        data=replace(finished.data, source=str(tmp_path / "copy.txt")),
    )
    train(moved, resume="step-4")
    assert any("moved', until now " in line and line.endswith("the same base model") for line in caplog.messages)
    got = contents(tmp_path / "run")
    for name in ("adapter/adapter_model.safetensors",):
        assert got[tmp_path / "run" / name] == expected[tmp_path / "run" / name]


def test_an_evaluation_that_has_changed_is_measured_anew(finished, tmp_path, caplog):
    """Its arms before training are those that eval gives for the same samples and seeds."""
    caplog.set_level("INFO")
    changed = replace(finished, eval=replace(finished.eval, num_samples=6, trials=3))
    changed = replace(changed, data=replace(finished.data, held_out_tokens=512))
    train(changed, resume="auto")
    assert "resumed with the held-out text is another: the arms before training were measured anew" in caplog.messages
    assert any("eval.num_samples = 6, until now 4: the arms before training were" in line for line in caplog.messages)
    arms = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    fresh = evaluate(changed)
    for name, arm in fresh.items():
        assert arms[name]["trial_losses"] == list(arm.trial_losses), name
    assert {name: arm["trials"] for name, arm in arms.items()}["recovered"] == 3


def test_a_start_that_dies_while_it_measures_anew_leaves_no_mixture(finished, tmp_path, monkeypatch):
    """Between results.json and config.toml: the next start, with the old evaluation again, does not take the new."""
    old = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["flipped"]
    write = train_module.write_toml
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_toml", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        with pytest.raises(OSError, match="power cut"):
            train(replace(finished, eval=replace(finished.eval, num_samples=6)), resume="auto")
    assert write is train_module.write_toml
    assert json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["flipped"] != old
    train(finished, resume="auto")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["flipped"] == old


def test_going_back_is_decided_before_the_first_step(base, whole, tmp_path):
    """Killed before its first save, a run that went back to step 2 with another learning rate goes on from step 2."""
    for name in ("whole", "killed"):
        shutil.copytree(whole, tmp_path / name)
    config = settings(base, tmp_path / "whole")
    slower = {
        name: replace(settings(base, tmp_path / name, lr=1e-3), checkpoint=replace(config.checkpoint, keep_last=9))
        for name in ("whole", "killed")
    }
    train(slower["whole"], resume="step-2")
    train_until_crash(slower["killed"], 2, resume="step-2")
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-2"]
    assert load_config([tmp_path / "killed" / "config.toml"]).training.lr == 1e-3
    train(slower["killed"], resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("at", ["forget_abandoned", "write_toml"])
def test_going_back_is_all_or_nothing_wherever_it_is_killed(finished, tmp_path, monkeypatch, at):
    """After the decision is written, and before config.toml is: the abandoned branch is not gone on with."""
    lines = metrics(tmp_path / "run")
    back = replace(finished, training=replace(finished.training, lr=1e-3))
    calls = []
    real = getattr(train_module, at)

    def dies(*arguments):
        calls.append(arguments)
        if at == "write_toml" or len(calls) == 2:  # the first comes before a checkpoint is looked for
            raise OSError("power cut")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, at, dies)
        with pytest.raises(OSError, match="power cut"):
            train(back, resume="step-2")
    assert metrics(tmp_path / "run") == lines  # nothing is lost before something else is decided
    train(back, resume="auto")
    assert metrics(tmp_path / "run")[:2] == lines[:2]
    assert metrics(tmp_path / "run")[2]["lr"] == pytest.approx(1e-3)  # the peak: it did go on from step 2


def test_more_steps_read_on_in_the_text(finished, tmp_path, caplog):
    caplog.set_level("INFO")
    before = metrics(tmp_path / "run")
    longer = replace(finished, training=replace(finished.training, steps=9))
    train(longer, resume="auto")
    assert "resumed with training.steps = 9, until now 6" in caplog.messages
    lines = metrics(tmp_path / "run")
    assert lines[:6] == before
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[6]["lr"] == pytest.approx(1e-2 * (1 - 4 / 7))  # of nine steps, two of them warm-up


def test_each_segment_of_a_text_has_an_order_of_its_own():
    """The first is that of a run that never was longer; nothing comes twice before all has come once."""
    whole = chosen_sequences([10, 7], seed=3, first=0, count=17 + 14)
    assert (whole[:10] == training_indices(10, 3, 0, 10)).all()
    assert (whole[10:17] == 10 + training_indices(7, 3, 0, 7)).all()
    assert (whole[17:] == training_indices(17, 3, 17, 14)).all()
    assert sorted(whole[:17]) == list(range(17))
    for first in range(25):
        for count in (1, 3, 6):
            assert (chosen_sequences([10, 7], 3, first, count) == whole[first : first + count]).all()
    assert (chosen_sequences([10], 3, 8, 9) == training_indices(10, 3, 8, 9)).all()
    three = chosen_sequences([4, 2, 3], 0, 0, 9)
    assert [sorted(three[:4]), sorted(three[4:6]), sorted(three[6:])] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
