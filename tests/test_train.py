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

import flipproof.train as train_module
from flipproof.checkpoint import list_checkpoints
from flipproof.config import ConfigError, TrainingConfig, load_config
from flipproof.model import byte_tokenizer
from flipproof.train import learning_rate, make_optimizer, train

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
    assert lines[-1].keys() == {"step", "tokens", "loss", "lr", "grad_norm", "mfu"}
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


@pytest.mark.parametrize("lora_r", [0, 2])
def test_a_run_killed_after_a_checkpoint_and_resumed_equals_one_never_killed(base, tmp_path, lora_r):
    train(settings(base, tmp_path / "whole", lora_r=lora_r))

    config = settings(base, tmp_path / "killed", lora_r=lora_r)
    (tmp_path / "config.toml").write_text(config.to_toml())
    # The child stops for good in the middle of step 5, so that SIGKILL finds it past the checkpoint of step 4.
    child = f"""
import time
import flipproof.train as train_module
from flipproof.config import load_config
original = train_module.learning_rate
def hang(training, step):
    if step == 4:
        open({str(tmp_path / "reached")!r}, "w").close()
        time.sleep(600)
    return original(training, step)
train_module.learning_rate = hang
train_module.train(load_config([{str(tmp_path / "config.toml")!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", child], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "reached").exists():
            assert process.poll() is None, "the child ended early"
            assert time.monotonic() < deadline, "the child did not reach step 5"
            time.sleep(0.1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [path.name for path in list_checkpoints(tmp_path / "killed" / "checkpoints")] == ["step-2", "step-4"]

    with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
        train(config)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resume_after_a_crash_with_lines_beyond_the_checkpoint(base, tmp_path, monkeypatch):
    train(settings(base, tmp_path / "whole"))
    config = settings(base, tmp_path / "crashed")

    def crash(training, step):
        if step == 5:
            raise RuntimeError("power cut")
        return learning_rate(training, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "learning_rate", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    with (tmp_path / "crashed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')
    assert len((tmp_path / "crashed" / "metrics.jsonl").read_text().splitlines()) == 6
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")


def test_a_damaged_checkpoint_stops_the_resume(base, tmp_path):
    config = settings(base, tmp_path / "run")
    train(config)
    next((tmp_path / "run" / "checkpoints" / "step-6").glob("*.distcp")).write_bytes(b"")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match=r"step-6.*distcp is damaged.*resume from step-4"):
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


def test_processes_must_fit_the_config(base, tmp_path, monkeypatch):
    config = settings(base, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"fsdp_degree = 4, but 1 process .*--parallelism.fsdp_degree 1"):
        train(replace(config, parallelism=replace(config.parallelism, fsdp_degree=4)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started"):
        train(config)
    assert not (tmp_path / "run").exists()
