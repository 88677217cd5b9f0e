"""The configs that ``flipproof config`` prints: what the tutorials say, and what a machine without anything can run."""

import json
import math
import tomllib
from pathlib import Path

import pytest

from flipproof.cli import main
from flipproof.config import RunConfig, load_config, preset_names, preset_text
from flipproof.train import resolve_steps

# The tutorials' configs, verbatim, and what the command line of the second says.
TUTORIALS = Path(__file__).parent / "tutorials"
TUTORIAL_70B = (TUTORIALS / "config_70b.toml").read_text()
TUTORIAL_8B = (TUTORIALS / "transform_cfg.toml").read_text()
TUTORIAL_8B_FLAGS = {
    "local_batch_size": 1,  # --per_device_train_batch_size
    "lr": 1e-5,
    "weight_decay": 0.01,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "linear",
    "seq_len": 2048,  # --block_size
    "log_freq": 50,  # --log_train_loss_steps
}
STEPS_8B = 4883
"""``--max_train_steps`` on 8 GPUs: 80,000,000 tokens at 8 x 1 x 2048 a step, gradient accumulation left out."""


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_begins_by_saying_what_it_is(name):
    assert isinstance(load_config([name]), RunConfig)
    assert preset_text(name).startswith("# ")


def test_70b_is_the_tutorial_and_nothing_else():
    assert tomllib.loads(preset_text("70b")) == tomllib.loads(TUTORIAL_70B)


def test_8b_is_the_tutorial_but_for_its_thresholds(tmp_path):
    (tmp_path / "transform_cfg.toml").write_text(TUTORIAL_8B)
    model = {"model": {"flavor": "8B", "hf_model_path": "unsloth/Llama-3.1-8B"}}
    seed, preset = load_config([tmp_path / "transform_cfg.toml"], model), load_config(["8b"])
    assert (preset.model, preset.lora, preset.data) == (seed.model, seed.lora, seed.data)
    assert {key: getattr(preset.training, key) for key in TUTORIAL_8B_FLAGS} == TUTORIAL_8B_FLAGS
    safe = load_config(["70b"]).bitflip
    for key in ("w_p_exp", "w_p_frac", "x_p_exp", "x_p_frac"):
        assert getattr(preset.bitflip, key) == getattr(seed.bitflip, key)
    for key in ("w_zero_out_t", "x_zero_out_t"):
        assert getattr(preset.bitflip, key) == getattr(safe, key)


def test_8b_takes_the_tutorials_steps_for_its_accumulation():
    config = load_config(["8b"])
    steps = resolve_steps(config, 8_000_000_000, 8).training.steps
    assert steps == math.ceil(STEPS_8B / config.training.gradient_accumulation_steps) == 2442


@pytest.mark.parametrize("processes", [1, 2, 8, 24, 512])
def test_8b_has_its_budget_on_any_number_of_processes(processes):
    config = load_config(["8b"])
    assert config.parallelism.fsdp_degree is None
    tokens_per_step = processes * 1 * 2 * 2048
    budget = 80_000_000
    tokens = resolve_steps(config, 8_000_000_000, processes).training.steps * tokens_per_step
    assert 0 <= tokens - budget < tokens_per_step


def test_tiny_dry_run_prints_it_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "tiny", "--dry-run"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    for section, values in tomllib.loads(preset_text("tiny")).items():
        assert printed[section].items() >= values.items()
    assert not list(tmp_path.iterdir())


def test_tiny_trains_from_scratch_under_faults_without_network_or_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--steps", "1", "--training.log_freq", "1", "--eval.num_samples", "4", "--eval.trials", "2"]
    assert main(["train", "--config", "tiny", *short]) == 0
    (line,) = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    # a model that knows nothing: ln of the byte tokenizer's vocabulary, and little more for logits that are not all 0
    assert json.loads(line)["loss"] == pytest.approx(math.log(258), abs=0.1)
    results = json.loads((tmp_path / "runs/tiny/results.json").read_text())
    assert list(results["arms"]) == ["recovered", "recovered_clean"]
    assert results["arms"]["recovered"]["trials"] == 2
    assert results["bitflip"]["w_p_exp"] == 2**-10
