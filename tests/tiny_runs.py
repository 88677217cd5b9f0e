"""Trainings of a few steps that tests compare: their config, what they leave, how they are stopped on their way."""

import json
import time

import preloaded
import pytest
import torch
from paused import main_paused_at
from safetensors.torch import load_file
from texts import sentences

from flipproof.config import load_config
from flipproof.train import loop
from flipproof.train.optimizer import learning_rate

# below 1/128, from where on each bit of a block is drawn
FAULTS = {"w_p_exp": 0.001, "w_p_frac": 0.005, "w_zero_out_t": 1.0, "x_p_exp": 0.001, "x_zero_out_t": 64.0}


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


def crash_at(step):
    """A learning rate that ends the run in the middle of a step, counted from 0."""

    def crash(training, now):
        if now == step:
            raise RuntimeError("power cut")
        return learning_rate(training, now)

    return crash


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


def train_until_crash(config, step, resume=None):
    """Train, and end in the middle of a step, counted from 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", crash_at(step))
        with pytest.raises(RuntimeError, match="power cut"):
            loop.train(config, resume)
