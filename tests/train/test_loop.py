import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from rounding import ROUNDED, training_moved
from safetensors.torch import load_file
from tiny_runs import FAULTS, assert_same_run, metrics, settings, train_until_crash, weights

import flipproof.train.loop as train_module
import flipproof.train.step as step_module
from flipproof import BitFlipSpec
from flipproof.config import RunConfig, TrainingConfig, load_config
from flipproof.errors import ConfigError
from flipproof.measure.evaluate import evaluate
from flipproof.models.load import byte_tokenizer
from flipproof.train.checkpoint import list_checkpoints
from flipproof.train.loop import train
from flipproof.train.optimizer import LossScale
from flipproof.train.start import DEFAULT_STEPS, resolve_steps


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


def test_the_same_seed_gives_the_same_run_twice(base, whole, tmp_path):
    train(settings(base, tmp_path / "run"))
    assert_same_run(whole, tmp_path / "run")
    train(settings(base, tmp_path / "other", steps=1, save_freq=0, seed=1))
    assert metrics(tmp_path / "other")[0]["loss"] != metrics(whole)[0]["loss"]


def test_training_lowers_the_loss(base, tmp_path):
    train(settings(base, tmp_path / "run", lora_r=0, steps=40, lr=1e-2, save_freq=0))
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 < losses[0] - 1


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
    train(settings(base, tmp_path / "run", steps=3, save_freq=0))
    assert ticks == list(range(6))


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


def test_a_run_by_tokens_per_parameter(base, tmp_path):
    """3.5 steps' worth of tokens for this model: four steps, and the schedule ends there."""
    parameters = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())  # without adapters
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
    tiny_llama(num_hidden_layers=1).to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
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


# -- starts that fail --------------------------------------------------------------------------------------------------


def test_a_start_that_fails_blocks_no_other(base, whole, tmp_path, monkeypatch):
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
    assert_same_run(whole, tmp_path / "run")


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


def test_the_arms_before_training_are_printed_before_the_first_step(base, tmp_path, caplog):
    caplog.set_level("INFO")
    train_until_crash(settings(base, tmp_path / "run"), 0)
    (table,) = (line for line in caplog.messages if line.startswith("before training:"))
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["arm", "clean", "guard", "flipped"]


def test_a_warm_up_longer_than_the_run_is_one_warning(base, tmp_path, caplog):
    train(settings(base, tmp_path / "run", steps=2, warmup_steps=3))
    (warning,) = (line for line in caplog.messages if "warmup_steps" in line)
    assert "training.warmup_steps = 3: the run ends after 2 steps" in warning
    caplog.clear()
    train(settings(base, tmp_path / "other", steps=2, warmup_steps=2))
    assert not any("warmup_steps" in line for line in caplog.messages)
