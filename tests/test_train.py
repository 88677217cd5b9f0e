import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import flipproof.train as train_module
from flipproof import BitFlipSpec
from flipproof.checkpoint import list_checkpoints
from flipproof.cli import EXIT_REQUEUE, main
from flipproof.config import RunConfig, TrainingConfig, load_config
from flipproof.errors import ConfigError
from flipproof.evaluate import evaluate
from flipproof.model import byte_tokenizer
from flipproof.train import DEFAULT_STEPS, LossScale, learning_rate, make_optimizer, resolve_steps, train

FAULTS = {"w_p_exp": 0.001, "w_p_frac": 0.01, "w_zero_out_t": 1.0, "x_p_exp": 0.001, "x_zero_out_t": 64.0}


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


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
            "data": {"source": "stdlib", "max_tokens": 20_000},
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


def test_a_run_leaves_what_the_readme_lists(base, tmp_path):
    config = settings(base, tmp_path / "run")
    train(config)
    run = tmp_path / "run"
    assert load_config([run / "config.toml"]) == config
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 2 * 2 * 32
    not_measured = {"mfu", "communication_share", "exposed_communication_share"}  # on a CPU
    assert lines[-1].keys() == {"step", "tokens", "loss", "lr", "grad_norm", *not_measured}
    assert all(lines[-1][name] is None for name in not_measured)
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-4", "step-6"]
    arms = json.loads((run / "results.json").read_text())["arms"]
    assert list(arms) == ["clean", "guard", "flipped", "recovered", "recovered_clean"]
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
    """``python -m flipproof train``, paused in the middle of a step (from 0) until ``tmp_path / "go"`` is there.

    Returns the process, once it has got there.
    """
    (tmp_path / "config.toml").write_text(config.to_toml())
    code = f"""
import os, runpy, sys, time
import flipproof.train as train_module
from flipproof import BitFlipSpec
original = train_module.learning_rate
def pause(training, step):
    if step == {step}:
        open({str(tmp_path / "reached")!r}, "w").close()
        while not os.path.exists({str(tmp_path / "go")!r}):
            time.sleep(0.02)
    return original(training, step)
train_module.learning_rate = pause
sys.argv = ["flipproof", "train", "--config", {str(tmp_path / "config.toml")!r}]
runpy.run_module("flipproof", run_name="__main__", alter_sys=True)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (tmp_path / "reached").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"the child did not reach step {step}: {process.communicate()[1]}")
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
        process.communicate()
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-2", "step-4"]

    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        train(config)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_saves_and_asks_to_be_started_again(base, tmp_path):
    """The signal arrives in the middle of step 3, where no checkpoint is due."""
    options = {"save_freq": 5, "log_freq": 1}
    train(settings(base, tmp_path / "whole", **options))
    config = settings(base, tmp_path / "stopped", **options)
    process = child_paused_at(2, tmp_path, config)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == EXIT_REQUEUE == 75
    assert "stopped by SIGTERM after step 3; --resume goes on from there" in stderr
    assert "Traceback" not in stderr
    assert [path.name for path in list_checkpoints(tmp_path / "stopped" / "checkpoints")] == ["step-3"]
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 3]
    assert not (tmp_path / "stopped" / "adapter").exists()

    assert main(["train", "--config", str(tmp_path / "config.toml"), "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_sigterm_is_the_programs_own_again_after_training(base, tmp_path):
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        train(settings(base, tmp_path / "run", steps=1))
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


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


def test_auto_starts_where_there_is_nothing_to_resume(base, tmp_path):
    train(settings(base, tmp_path / "a"))
    train(settings(base, tmp_path / "b"), resume="auto")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_damaged_checkpoint_stops_the_resume(base, tmp_path):
    config = settings(base, tmp_path / "run")
    train(config)
    next((tmp_path / "run" / "checkpoints" / "step-6").glob("*.distcp")).write_bytes(b"")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"step-6.*distcp is damaged.*--resume step-4 goes on from the one before"):
        train(config, resume="auto")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_accumulation_is_the_mean_over_micro_batches(base, tmp_path):
    """One step over 2 x 2 sequences is one step over 4, where nothing flips: draws are per micro-batch."""
    off = dict.fromkeys(FAULTS, 0.0) | {"w_zero_out_t": 100.0, "x_zero_out_t": 1e4}
    for name, rows, accumulation in (("a", 2, 2), ("b", 4, 1)):
        config = settings(base, tmp_path / name, local_batch_size=rows, gradient_accumulation_steps=accumulation)
        train(replace(config, bitflip=replace(config.bitflip, **off)))
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_micro_batches_and_steps_draw_different_flips(base, tmp_path, monkeypatch):
    ticks = []
    set_tick = train_module.set_tick
    monkeypatch.setattr(train_module, "set_tick", lambda model, tick: ticks.append(tick) or set_tick(model, tick))
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


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        # closed forms at steps 0, 1 (warm-up), 2 (peak), 6 (half-way), 9 (last) of 10
        ("linear", [0.5, 1.0, 1.0, 0.5, 0.125]),
        ("cosine", [0.5, 1.0, 1.0, 0.5, 0.0380602337]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate_schedules(scheduler, expected):
    training = TrainingConfig(steps=10, warmup_steps=2, lr=1.0, lr_scheduler=scheduler)
    assert [learning_rate(training, step) for step in (0, 1, 2, 6, 9)] == pytest.approx(expected)


def test_weight_decay_is_for_matrices(tiny_llama):
    model = tiny_llama()
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0} == {
        name for name, _ in model.named_parameters() if "norm" in name
    }


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


def test_the_loss_scale_is_out_of_the_way_but_for_float16():
    for training in (TrainingConfig(dtype="bfloat16"), TrainingConfig(mixed_precision_param="bfloat16")):
        scale = LossScale(training)
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.full((3,), 5.0)
        scale.unscale([parameter])
        assert parameter.grad.tolist() == [5.0] * 3
        assert scale.update(torch.tensor(torch.inf))  # the step is taken, and NaN is seen
        assert float(scale.scale) == 1


@pytest.mark.parametrize("training", [{"dtype": "float16"}, {"dtype": "float32", "mixed_precision_param": "float16"}])
def test_the_loss_scale_halves_at_once_and_doubles_after_2000_good_steps(training):
    scale = LossScale(TrainingConfig(**training))
    assert float(scale.scale) == 2**16
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0**16)
    scale.unscale([parameter, nn.Parameter(torch.ones(1))])  # the other has no gradient
    assert parameter.grad.tolist() == [1.0] * 3

    good = torch.tensor(0.5)
    assert all(scale.update(good) for _ in range(1999))
    assert float(scale.scale) == 2**16
    assert not scale.update(torch.tensor(torch.nan))
    assert float(scale.scale) == 2**15
    assert not scale.update(torch.tensor(torch.inf))
    assert float(scale.scale) == 2**14
    assert all(scale.update(good) for _ in range(1999))  # the count began anew
    assert float(scale.scale) == 2**14
    assert scale.update(good)
    assert float(scale.scale) == 2**15


def test_a_float16_run_has_the_losses_of_a_float32_one(base, tmp_path):
    mixed = {"dtype": "float32", "mixed_precision_param": "float16", "steps": 20, "save_freq": 0}
    config = settings(base, tmp_path / "b", lora_r=0, **mixed)
    off = dict.fromkeys(FAULTS, 0.0) | {"w_zero_out_t": None, "x_zero_out_t": None}  # bits differ between dtypes
    train(replace(config, bitflip=replace(config.bitflip, **off)))
    config = settings(base, tmp_path / "c", lora_r=0, **mixed | {"mixed_precision_param": None})
    train(replace(config, bitflip=replace(config.bitflip, **off)))
    half, single = metrics(tmp_path / "b"), metrics(tmp_path / "c")
    for one, other in zip(half, single, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-2)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)  # of unscaled gradients
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
    monkeypatch.setattr(train_module.LossScale, "update", lambda self, norm: scales.append(float(self.scale)) or False)
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
