"""Steps whose losses or gradients are not finite, and runs that end for them."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_runs import assert_same_run, metrics, settings, weights

import flipproof.train.loop as train_module
import flipproof.train.step as step_module
from flipproof.cli.main import main
from flipproof.errors import ConfigError
from flipproof.train.checkpoint import list_checkpoints
from flipproof.train.loop import train
from flipproof.train.optimizer import LossScale, learning_rate
from flipproof.train.step import Diverged


def spoil(monkeypatch, steps, what="loss"):
    """Make the loss, or its gradient alone, NaN in the second micro-batch of some steps, counted from 0."""
    original = step_module.next_token_loss
    ticks = []
    set_tick = step_module.set_tick
    monkeypatch.setattr(step_module, "set_tick", lambda model, tick: ticks.append(tick) or set_tick(model, tick))

    def spoiled(model, ids, **more):
        loss = original(model, ids, **more)
        if ticks[-1] % 2 == 0 or ticks[-1] // 2 not in steps:
            return loss
        if what == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss * 1.0

    monkeypatch.setattr(step_module, "next_token_loss", spoiled)


def saved_tensors(checkpoint, base, run_dir):
    """Adapters and Adam's moments of a checkpoint, by name."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(("model.", "optimizer.state.")) and hasattr(meta, "size")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert len(state) > 20
    return state


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken_and_counted(base, tmp_path, monkeypatch, caplog, what):
    """After it weights and moments have the bits that they had before; the run goes on, and ends well."""
    caplog.set_level("INFO")
    config = settings(base, tmp_path / "run", save_freq=1)
    config = replace(config, checkpoint=replace(config.checkpoint, keep_last=9))
    with monkeypatch.context() as patch:
        spoil(patch, {2, 4}, what)
        train(config)
    before, after, later = (
        saved_tensors(tmp_path / "run" / "checkpoints" / f"step-{step}", base, tmp_path) for step in (2, 3, 4)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in after)
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [line["loss"] is None for line in lines] == [what == "loss" and step in (2, 4) for step in range(6)]
    assert [line["grad_norm"] is None for line in lines] == [step in (2, 4) for step in range(6)]
    words = "loss is" if what == "loss" else "gradients are"
    assert f"step 3 is skipped: its {words} not finite" in caplog.messages
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    # the count is part of the checkpoint
    with monkeypatch.context() as patch:
        spoil(patch, {2, 4}, what)
        train(replace(config, logging=replace(config.logging)), resume="step-4")
    assert metrics(tmp_path / "run") == lines


def test_ten_in_a_row_end_the_run_with_one_line_and_leave_the_last_good_checkpoint(base, tmp_path, monkeypatch, capsys):
    config = settings(base, tmp_path / "run", steps=18, save_freq=4)
    (tmp_path / "config.toml").write_text(config.to_toml())
    with monkeypatch.context() as patch:
        spoil(patch, set(range(5, 18)))
        assert main(["train", "--config", str(tmp_path / "config.toml")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert "stopped after step 15: 10 steps in a row were not finite (loss nan, " in error[0]
    assert "the likely cause is the learning rate (training.lr = 0.01" in error[0]
    assert "the last checkpoint, step-12, is whole" in error[0]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-8", "step-12"]
    saved = saved_tensors(tmp_path / "run" / "checkpoints" / "step-12", base, tmp_path)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not (tmp_path / "run" / "adapter").exists()
    # from there a run whose steps are finite goes on
    train(config, resume="step-12")
    assert metrics(tmp_path / "run")[-1]["step"] == 18
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] == 7


@pytest.mark.parametrize(
    ("faults", "spoiled", "cause"),
    [
        (
            {"x_zero_out_t": None},
            range(3, 30),
            r"flips without a guard \(bitflip\.x_p_exp = 0\.001 and no x_zero_out_t",
        ),
        ({}, range(30), "the text or the base model, since no step was finite from the start"),
    ],
)
def test_the_likely_cause_is_named(base, tmp_path, monkeypatch, faults, spoiled, cause):
    config = settings(base, tmp_path / "run", steps=30, save_freq=0)
    spoil(monkeypatch, set(spoiled))
    with pytest.raises(Diverged, match=f"the likely cause is {cause}.*; no checkpoint was written"):
        train(replace(config, bitflip=replace(config.bitflip, **faults)))


def test_weights_that_are_not_finite_are_never_saved(base, whole_of_all_weights, tmp_path, monkeypatch):
    """Finite losses and gradients, but a learning rate without bounds."""

    def no_bounds(training, step):
        return math.inf if step == 3 else learning_rate(training, step)

    config = settings(base, tmp_path / "run", lora_r=0)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "learning_rate", no_bounds)
        with pytest.raises(Diverged, match=r"after step 4: the trained weights or Adam's moments are not finite"):
            train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2"]
    assert not (tmp_path / "run" / "model").exists()
    train(config, resume="auto")
    assert_same_run(whole_of_all_weights, tmp_path / "run")


def test_float16_may_halve_its_scale_as_often_as_it_takes(base, tmp_path, monkeypatch):
    """From 2^60 on, more than ten steps in a row overflow; none of them is the run's fault."""
    made = LossScale.__init__

    def huge(self, *arguments):
        made(self, *arguments)
        self.scale.fill_(2.0**60)

    monkeypatch.setattr(LossScale, "__init__", huge)
    mixed = {"dtype": "float32", "mixed_precision_param": "float16"}
    train(settings(base, tmp_path / "run", steps=12, save_freq=0, **mixed))
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] == 12


def test_a_base_model_that_is_not_finite_is_refused_by_tensor(base, tmp_path, tiny_llama):
    spoiled = shutil.copytree(base, tmp_path / "base")
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(spoiled)
    with pytest.raises(
        ConfigError, match=r"not finite before any training .*model\.layers\.0\.self_attn\.k_proj\.weight"
    ):
        train(settings(spoiled, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
