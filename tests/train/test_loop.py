import functools
import json
import math
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import preloaded
import pytest
import torch
import torch.distributed.checkpoint as dcp
from paused import main_paused_at
from rounding import ROUNDED, training_moved
from safetensors.torch import load_file
from texts import sentences

import flipproof.train.loop as train_module
import flipproof.train.step as step_module
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.cli.verbs import EXIT_REQUEUE
from flipproof.config import RunConfig, TrainingConfig, load_config
from flipproof.data.sequences import training_indices
from flipproof.errors import ConfigError
from flipproof.measure.evaluate import evaluate
from flipproof.models.load import byte_tokenizer
from flipproof.train import rundir
from flipproof.train.checkpoint import list_checkpoints
from flipproof.train.loop import train
from flipproof.train.optimizer import LossScale, learning_rate
from flipproof.train.start import DEFAULT_STEPS, resolve_steps
from flipproof.train.step import Diverged, chosen_sequences

# below 1/128, from where on each bit of a block is drawn
FAULTS = {"w_p_exp": 0.001, "w_p_frac": 0.005, "w_zero_out_t": 1.0, "x_p_exp": 0.001, "x_zero_out_t": 64.0}


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def text_file(directory):
    path = directory / "text.txt"
    if not path.exists():
        path.write_text(sentences())
    return path


def settings(base, run_dir, lora_r=2, **training):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(base)},
            "training": {
                "seq_len": 32,
                "local_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "steps": 6,
                "lr": 1e-2,
                "warmup_steps": 2,
                "log_freq": 1,
                "save_freq": 2,
                **training,
            },
            "lora": {"r": lora_r, "lora_alpha": 4},
            "bitflip": FAULTS,
            "data": {"source": str(text_file(base.parent)), "max_tokens": 20_000},
            "eval": {"num_samples": 4, "trials": 2},
            "logging": {"run_dir": str(run_dir)},
        },
    )


def metrics(run_dir):
    """The lines of metrics.jsonl without what a clock or the machine says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_gib")} for line in lines]


def weights(run_dir):
    path = run_dir / "adapter" / "adapter_model.safetensors"
    return load_file(path if path.exists() else run_dir / "model" / "model.safetensors")


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    assert (one / "results.json").read_text() == (other / "results.json").read_text()
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_what_the_readme_lists(base, tmp_path, caplog):
    caplog.set_level("INFO")
    config = settings(base, tmp_path / "run")
    train(config)
    run = tmp_path / "run"
    assert load_config([run / "config.toml"]) == config
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 2 * 2 * 32
    not_measured = {"mfu", "communication_share", "exposed_communication_share"}  # on a CPU
    assert lines[-1].keys() == {"step", "tokens", "loss", "lr", "grad_norm", "skipped_steps", "blake2b", *not_measured}
    assert all(lines[-1][name] is None for name in not_measured)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-4", "step-6"]
    arms = json.loads((run / "results.json").read_text())["arms"]
    assert list(arms) == ["clean", "guard", "flipped", "recovered", "recovered_clean"]
    assert [f" step {n}/6 " in (run / "run.log").read_text() for n in range(1, 7)] == [True] * 6
    assert any(tensor.any() for name, tensor in weights(run).items() if "lora_B" in name)


def test_the_same_seed_gives_the_same_run_twice(base, tmp_path):
    train(settings(base, tmp_path / "a"))
    train(settings(base, tmp_path / "b"))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train(settings(base, tmp_path / "c", seed=1))
    assert metrics(tmp_path / "c") != metrics(tmp_path / "a")


def test_training_lowers_the_loss(base, tmp_path):
    train(settings(base, tmp_path / "run", lora_r=0, steps=40, lr=1e-2, save_freq=0))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < losses[0] - 1


def child_paused_at(step, tmp_path, config):
    """A process that trains, paused in the middle of a step (from 0) until ``tmp_path / "go"`` is there.

    Returns it, once it has got there.
    """
    (tmp_path / "config.toml").write_text(config.to_toml())
    argv = ["train", "--config", str(tmp_path / "config.toml")]
    alone = {"CUDA_VISIBLE_DEVICES": ""}
    process = preloaded.start(main_paused_at, step, tmp_path, argv, environment=alone, said=tmp_path / "said")
    deadline = time.monotonic() + 120
    while not (tmp_path / "reached").exists():
        if process.exitcode is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the child did not reach step {step}: {(tmp_path / 'said').read_text()}")
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_run_killed_after_a_checkpoint_and_resumed_equals_one_never_killed(base, tmp_path, lora_r):
    train(settings(base, tmp_path / "whole", lora_r=lora_r))

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
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_it_goes_on(base, tmp_path, number, name):
    """The signal arrives in the middle of step 3, where no checkpoint is due."""
    options = {"save_freq": 5, "log_freq": 1}
    train(settings(base, tmp_path / "whole", **options))
    config = settings(base, tmp_path / "stopped", **options)
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
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
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


def crash_at(step):
    """A learning rate that ends the run in the middle of a step, counted from 0."""

    def crash(training, now):
        if now == step:
            raise RuntimeError("power cut")
        return learning_rate(training, now)

    return crash


def test_resume_after_a_crash_with_lines_beyond_the_checkpoint(base, tmp_path, monkeypatch):
    train(settings(base, tmp_path / "whole"))
    config = settings(base, tmp_path / "crashed")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "learning_rate", crash_at(5))
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    assert len((tmp_path / "crashed" / "metrics.jsonl").read_text().splitlines()) == 6
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_dropout_is_resumed_too(tiny_llama, tmp_path, monkeypatch):
    """It is drawn per step: no RNG state is carried, and what ran before (here a whole run) does not matter."""
    tiny_llama(attention_dropout=0.1).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    train(settings(tmp_path / "base", tmp_path / "whole"))
    config = settings(tmp_path / "base", tmp_path / "crashed")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "learning_rate", crash_at(3))
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    torch.manual_seed(99)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")

    # and it does drop: neighbouring steps differ, and so does a run without
    tiny_llama().save_pretrained(tmp_path / "base")
    train(settings(tmp_path / "base", tmp_path / "without"))
    assert metrics(tmp_path / "without")[0]["loss"] != metrics(tmp_path / "whole")[0]["loss"]


def test_resuming_from_an_earlier_checkpoint_by_name(base, tmp_path):
    train(settings(base, tmp_path / "whole"))
    config = settings(base, tmp_path / "run")
    train(config)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-4", "step-6"]
    with pytest.raises(ConfigError, match=r"--resume step-2: .* holds step-4, step-6"):
        train(config, resume="step-2")
    train(config, resume="step-4")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


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


def test_auto_starts_where_there_is_nothing_to_resume(base, tmp_path):
    train(settings(base, tmp_path / "a"))
    train(settings(base, tmp_path / "b"), resume="auto")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_of_a_damaged_checkpoint_the_one_before_goes_on_where_none_is_named(base, tmp_path, caplog):
    config = settings(base, tmp_path / "run")
    train(config)
    before = metrics(tmp_path / "run")
    next((tmp_path / "run" / "checkpoints" / "step-6").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step-6.*distcp is damaged.*--resume step-4 goes on from the one before"):
        train(config, resume="step-6")
    assert metrics(tmp_path / "run") == before
    train(config, resume="auto")
    assert "is damaged (size or hash differ from the manifest); goes on from step-4" in caplog.text
    assert metrics(tmp_path / "run") == before
    for name in ("step-4", "step-6"):
        (tmp_path / "run" / "checkpoints" / name / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"step-6: manifest\.json is missing or damaged"):
        train(config, resume="auto")


def test_accumulation_is_the_mean_over_micro_batches(base, tmp_path):
    """One step over 2 x 2 sequences is one step over 4, where nothing flips: draws are per micro-batch."""
    off = dict.fromkeys(FAULTS, 0.0) | {"w_zero_out_t": 100.0, "x_zero_out_t": 1e4}
    for name, rows, accumulation in (("a", 2, 2), ("b", 4, 1), ("moved", 4, 1)):
        config = settings(base, tmp_path / name, local_batch_size=rows, gradient_accumulation_steps=accumulation)
        with training_moved(0) if name == "moved" else nullcontext():
            train(replace(config, bitflip=replace(config.bitflip, **off)))
    assert_as_near_as_moved(tmp_path / "a", tmp_path / "b", tmp_path / "moved")


def assert_as_near_as_moved(run, reference, *moved, by=ROUNDED):
    """Losses and gradient norms of the steps differ by no more than where weights were moved by a share of ``by``."""
    for key in ("loss", "grad_norm"):
        one, other, *rest = ([line[key] for line in metrics(each)] for each in (run, reference, *moved))
        allowed = max(abs(a - b) for each in rest for a, b in zip(each, other, strict=True)) + by * max(other)
        assert one == pytest.approx(other, rel=0, abs=allowed), key


def test_micro_batches_and_steps_draw_different_flips(base, tmp_path, monkeypatch):
    ticks = []
    set_tick = step_module.set_tick
    monkeypatch.setattr(step_module, "set_tick", lambda model, tick: ticks.append(tick) or set_tick(model, tick))
    train(settings(base, tmp_path / "run"))
    assert ticks == list(range(12))


def test_pretraining_from_scratch_without_faults(tmp_path):
    overrides = {
        "model": {"flavor": "demo", "init": "random"},
        "training": {"seq_len": 32, "steps": 2, "dtype": "float32"},
        "data": {"source": "stdlib", "max_tokens": 5_000},
        "eval": {"num_samples": 2},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    train(load_config([], overrides))
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["arms"]) == ["clean"]
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("bitflip", "lora_r", "init", "arms"),
    [
        ({}, 2, "pretrained", ["clean", "recovered_clean"]),
        ({}, 0, "pretrained", ["clean", "recovered_clean"]),
        ({"w_zero_out_t": 0.5}, 2, "pretrained", ["clean", "guard", "recovered_guard", "recovered_clean"]),
        ({"w_p_frac": 0.1}, 0, "pretrained", ["clean", "flipped", "recovered", "recovered_clean"]),
        ({"w_p_frac": 0.1, "w_zero_out_t": 0.5}, 0, "random", ["recovered", "recovered_clean"]),
    ],
)
def test_a_run_measures_the_arms_that_differ(base, tmp_path, caplog, bitflip, lora_r, init, arms):
    config = settings(base, tmp_path / "run", lora_r, steps=1, save_freq=0)
    config = replace(config, model=replace(config.model, init=init), bitflip=BitFlipSpec(**bitflip))
    with caplog.at_level("INFO", logger="flipproof"):
        train(config)
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["arms"]) == arms
    assert any(line.startswith("before training:\n") for line in caplog.messages) == (init == "pretrained")


def test_eval_of_a_runs_adapter_is_what_the_run_says(base, tmp_path):
    config = settings(base, tmp_path / "run", steps=2, save_freq=0)
    train(config)
    evaluate(config, tmp_path / "run" / "adapter", tmp_path / "eval")
    assert (tmp_path / "run" / "results.json").read_text() == (tmp_path / "eval" / "results.json").read_text()


def budget(tokens_per_parameter, **training):
    return replace(RunConfig(), training=TrainingConfig(tokens_per_parameter=tokens_per_parameter, **training))


@pytest.mark.parametrize(
    ("training", "parameters", "processes", "steps"),
    [
        # the 8B seed: 1% of 8e9 tokens on 8 GPUs, 80e6 / (8 * 1 * 2 * 2048) = 2441.4
        ({"local_batch_size": 1, "gradient_accumulation_steps": 2, "seq_len": 2048}, 8_000_000_000, 8, 2442),
        # 22 tokens per parameter of 60M on one process: 1.32e9 / (4 * 4 * 1024) = 80566.4
        ({"local_batch_size": 4, "gradient_accumulation_steps": 4, "seq_len": 1024}, 60_000_000, 1, 80567),
        ({"local_batch_size": 1, "seq_len": 10}, 1000, 1, 1),  # 10 tokens: exactly one step
        ({"local_batch_size": 1, "seq_len": 10}, 1001, 1, 2),
        ({"local_batch_size": 1, "seq_len": 10}, 1, 1, 1),
    ],
)
def test_steps_follow_from_tokens_per_parameter(training, parameters, processes, steps):
    share = 22 if parameters == 60_000_000 else 0.01
    assert resolve_steps(budget(share, **training), parameters, processes).training.steps == steps


def test_steps_that_are_given_count_and_else_there_is_a_default():
    assert resolve_steps(budget(0.01, steps=7), 10**9, 8).training.steps == 7
    assert resolve_steps(budget(None), 10**9, 8).training.steps == DEFAULT_STEPS == 1000


def test_a_run_by_tokens_per_parameter(base, tmp_path, tiny_llama):
    """3.5 steps' worth of tokens for this model: four steps, and the schedule ends there."""
    parameters = sum(p.numel() for p in tiny_llama().parameters())  # without the adapters
    options = {"steps": None, "tokens_per_parameter": 3.5 * 2 * 2 * 32 / parameters, "warmup_steps": 0}
    train(settings(base, tmp_path / "run", **options))
    lines = metrics(tmp_path / "run")
    assert [line["lr"] for line in lines] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert load_config([tmp_path / "run" / "config.toml"]).training.steps == 4


def test_a_float16_run_has_the_losses_of_a_float32_one(base, tmp_path):
    mixed = {"dtype": "float32", "mixed_precision_param": "float16", "steps": 20, "save_freq": 0}
    config = settings(base, tmp_path / "b", lora_r=0, **mixed)
    off = dict.fromkeys(FAULTS, 0.0) | {"w_zero_out_t": None, "x_zero_out_t": None}  # bits differ between dtypes
    train(replace(config, bitflip=replace(config.bitflip, **off)))
    for name in ("c", "moved"):  # by a unit in the last place of a float16
        config = settings(base, tmp_path / name, lora_r=0, **mixed | {"mixed_precision_param": None})
        with training_moved(0, by=2**-10) if name == "moved" else nullcontext():
            train(replace(config, bitflip=replace(config.bitflip, **off)))
    assert_as_near_as_moved(tmp_path / "b", tmp_path / "c", tmp_path / "moved", by=2**-10)  # of unscaled gradients
    half, single = metrics(tmp_path / "b"), metrics(tmp_path / "c")
    assert half != single
    assert half[-1]["loss"] < half[0]["loss"] - 0.5


def test_the_loss_of_a_float16_checkpoint_is_scaled():
    """training.dtype is the checkpoint's where the config says none."""
    assert LossScale(TrainingConfig(), torch.float16).used
    assert not LossScale(TrainingConfig(), torch.bfloat16).used


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_a_16_bit_checkpoint_train_in_float32(dtype, tiny_llama, tmp_path, caplog):
    tiny_llama().to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    few = {"steps": 2, "save_freq": 0, "lr": 1e-5}
    with caplog.at_level("INFO", "flipproof"):
        train(settings(tmp_path / "base", tmp_path / "default", lora_r=0, **few))
    said = [line for line in caplog.messages if line.startswith("lora.r = 0: ")]
    assert len(said) == 1
    assert "they train in float32 (training.dtype)" in said[0]
    asked = {"dtype": "float32", "mixed_precision_param": dtype}
    train(settings(tmp_path / "base", tmp_path / "asked", lora_r=0, **few, **asked))
    assert_same_run(tmp_path / "default", tmp_path / "asked")
    assert f'mixed_precision_param = "{dtype}"' in (tmp_path / "default/config.toml").read_text()
    # what is written is what was trained; a 16-bit weight of 0.02 has steps of 2**-13, float32 loses none of 1e-5
    before, after = load_file(tmp_path / "base/model.safetensors"), weights(tmp_path / "default")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all((before[name] != after[name]).float().mean() > 0.9 for name in before if "proj" in name)


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_not_trained(dtype, init, base, tmp_path):
    config = settings(base, tmp_path / "run", lora_r=0, dtype=dtype)
    words = rf"dtype = '{dtype}' with lora.r = 0: .*use float32 with training.mixed_precision_param = '{dtype}', or"
    with pytest.raises(ConfigError, match=words):
        train(replace(config, model=replace(config.model, init=init)))
    assert not (tmp_path / "run").exists()


def test_a_float16_step_with_infinite_gradients_is_skipped(base, tmp_path, monkeypatch):
    """A scale of 2^60 overflows float16 at once: no step is taken, and each halves it. The checkpoint holds it."""
    made = LossScale.__init__

    def huge(self, *arguments):
        made(self, *arguments)
        self.scale.fill_(2.0**60)

    config = settings(base, tmp_path / "run", dtype="float32", mixed_precision_param="float16", steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(LossScale, "__init__", huge)
        train(config)
    assert not any(tensor.any() for name, tensor in weights(tmp_path / "run").items() if "lora_B" in name)
    longer = replace(config, training=replace(config.training, steps=4))
    scales = []
    monkeypatch.setattr(LossScale, "update", lambda self, finite: scales.append(float(self.scale)))
    train(longer, resume="step-3")
    assert scales == [2.0**57]


def test_processes_must_fit_the_config(base, tmp_path, monkeypatch):
    config = settings(base, tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"1 process was started, .*= 4 x 1 = 4; start 4 .*--parallelism.fsdp_degree 1"
    ):
        train(replace(config, parallelism=replace(config.parallelism, fsdp_degree=4)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started, .*= 1 x 1 = 1; .*--parallelism.fsdp_degree 2"):
        train(replace(config, parallelism=replace(config.parallelism, fsdp_degree=1)))
    assert not (tmp_path / "run").exists()


# -- steps that are not finite -----------------------------------------------------------------------------------------


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
    config = settings(base, tmp_path / "run", steps=30, save_freq=4)
    (tmp_path / "config.toml").write_text(config.to_toml())
    with monkeypatch.context() as patch:
        spoil(patch, set(range(5, 30)))
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
    assert metrics(tmp_path / "run")[-1]["step"] == 30
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


def test_weights_that_are_not_finite_are_never_saved(base, tmp_path, monkeypatch):
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
    train(settings(base, tmp_path / "whole", lora_r=0))
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_float16_may_halve_its_scale_as_often_as_it_takes(base, tmp_path, monkeypatch):
    """From 2^60 on, more than ten steps in a row overflow; none of them is the run's fault."""
    made = LossScale.__init__

    def huge(self, *arguments):
        made(self, *arguments)
        self.scale.fill_(2.0**60)

    monkeypatch.setattr(LossScale, "__init__", huge)
    mixed = {"dtype": "float32", "mixed_precision_param": "float16"}
    train(settings(base, tmp_path / "run", steps=14, save_freq=0, **mixed))
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] == 14


def test_a_base_model_that_is_not_finite_is_refused_by_tensor(base, tmp_path, tiny_llama):
    model = tiny_llama()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(base)
    with pytest.raises(
        ConfigError, match=r"not finite before any training .*model\.layers\.0\.self_attn\.k_proj\.weight"
    ):
        train(settings(base, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# -- going on with another config --------------------------------------------------------------------------------------


@pytest.fixture
def finished(base, tmp_path):
    """A run of six steps, with checkpoints of steps 4 and 6; (its config, what is in its directory)."""
    config = settings(base, tmp_path / "run")
    train(config)
    return config


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_goes_on_with_nothing_else(finished, base, tmp_path, tiny_llama):
    run = tmp_path / "run"
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
        changed = replace(finished, **{section: replace(getattr(finished, section), **change)})
        with pytest.raises(ConfigError, match=words):
            train(changed, resume="auto")
        assert contents(run) == before, words

    edited = tiny_llama()
    edited.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    edited.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"the base model is another .* though no key that names it has changed"):
        train(finished, resume="auto")
    tiny_llama().save_pretrained(base)
    (tmp_path / "text.txt").write_text("import nothing\n" * 3000)
    with pytest.raises(ConfigError, match=r"the training text is another .* though no key that names it has changed"):
        train(finished, resume="auto")
    assert contents(run) == before


def test_what_is_only_called_otherwise_is_the_same(finished, base, tmp_path, caplog):
    caplog.set_level("INFO")
    shutil.copytree(base, tmp_path / "moved")
    shutil.copy(tmp_path / "text.txt", tmp_path / "copy.txt")
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


def test_going_back_is_decided_before_the_first_step(base, tmp_path, monkeypatch):
    """Killed before its first save, a run that went back to step 2 with another learning rate goes on from step 2."""
    for name in ("whole", "killed"):
        config = settings(base, tmp_path / name)
        train(replace(config, checkpoint=replace(config.checkpoint, keep_last=9)))
    slower = {
        name: replace(settings(base, tmp_path / name, lr=1e-3), checkpoint=replace(config.checkpoint, keep_last=9))
        for name in ("whole", "killed")
    }
    train(slower["whole"], resume="step-2")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "learning_rate", crash_at(2))
        with pytest.raises(RuntimeError, match="power cut"):
            train(slower["killed"], resume="step-2")
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-2"]
    assert load_config([tmp_path / "killed" / "config.toml"]).training.lr == 1e-3
    train(slower["killed"], resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("at", ["forget_abandoned", "write_toml"])
def test_going_back_is_all_or_nothing_wherever_it_is_killed(base, tmp_path, monkeypatch, at):
    """After the decision is written, and before config.toml is: the abandoned branch is not gone on with."""
    config = settings(base, tmp_path / "run")
    config = replace(config, checkpoint=replace(config.checkpoint, keep_last=9))
    train(config)
    lines = metrics(tmp_path / "run")
    back = replace(config, training=replace(config.training, lr=1e-3))
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


# -- one run in a directory, which blocks nothing where it fails -------------------------------------------------------


def test_a_second_run_is_refused_before_it_loads_anything(base, tmp_path, monkeypatch):
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
    train(settings(base, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_start_that_fails_blocks_no_other(base, tmp_path, monkeypatch):
    config = settings(base, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "build_model", lambda *_: (_ for _ in ()).throw(ConfigError(["no model"])))
        with pytest.raises(ConfigError, match="no model"):
            train(config)
    assert not (tmp_path / "run").exists()
    for name in ("measure_config_arms", "learning_rate"):  # before the first step, and in it
        with monkeypatch.context() as patch:
            patch.setattr(train_module, name, lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            with pytest.raises(RuntimeError, match="out of memory"):
                train(config)
    train(config)
    train(settings(base, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_where_the_run_cannot_be_written_nothing_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "load_tokenizer", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"logging\.run_dir = .*file is not a directory"):
        train(settings(base, tmp_path / "file" / "run"))
    config = settings(base, tmp_path / "run")
    monkeypatch.setattr(train_module, "log_in", lambda _: (_ for _ in ()).throw(ConfigError(["no key"])))
    with pytest.raises(ConfigError, match="no key"):
        train(config)
    assert not (tmp_path / "run").exists()


# -- what is said before the first step --------------------------------------------------------------------------------


def test_the_arms_before_training_are_printed_before_the_first_step(base, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "learning_rate", crash_at(0))
        with pytest.raises(RuntimeError, match="power cut"):
            train(settings(base, tmp_path / "run"))
    (table,) = (line for line in caplog.messages if line.startswith("before training:"))
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["arm", "clean", "guard", "flipped"]


def test_a_warm_up_longer_than_the_run_is_one_warning(base, tmp_path, caplog):
    train(settings(base, tmp_path / "run", steps=2, warmup_steps=3))
    (warning,) = (line for line in caplog.messages if "warmup_steps" in line)
    assert "training.warmup_steps = 3: the run ends after 2 steps" in warning
    caplog.clear()
    train(settings(base, tmp_path / "other", steps=2, warmup_steps=2))
    assert not any("warmup_steps" in line for line in caplog.messages)
