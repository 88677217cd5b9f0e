"""The configs that ``flipproof config`` prints: what the tutorials say, and what a machine without anything can run."""

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flipproof.cli.main import main
from flipproof.config import RunConfig, TrainingConfig, load_config, preset_names, preset_text
from flipproof.models.load import FLAVORS
from flipproof.train.optimizer import learning_rate
from flipproof.train.start import counted_parameters, resolve_steps

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


def test_70b_is_the_tutorial_with_its_scripts_schedule():
    """Which the TOML does not name: the script has linear warm-up and a cosine to 0, whatever the config says. And with
    a control, which the tutorial has none of."""
    preset = tomllib.loads(preset_text("70b"))
    assert preset["training"].pop("control") is True
    assert preset["training"].pop("lr_scheduler") == "cosine"
    assert preset == tomllib.loads(TUTORIAL_70B)
    training = replace(load_config(["70b"]).training, steps=21000)
    # closed form: 2e-4 · (1 + cos(π · (step − 100) / 20900)) / 2; at step 7900 the tutorial's run was stopped
    stopped = 2e-4 * (1 + math.cos(math.pi * 78 / 209)) / 2
    for step, expected in ((99, 2e-4), (100, 2e-4), (10550, 1e-4), (7900, stopped)):
        assert learning_rate(training, step) == pytest.approx(expected)


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
    """Its 8,000,000,000 parameters are those of the name; the model has 8,030,261,248."""
    config = load_config(["8b"])
    counted = counted_parameters(skeleton("8B"), config.training.tokens_per_parameter_of)
    steps = resolve_steps(config, counted, 8).training.steps
    assert steps == math.ceil(STEPS_8B / config.training.gradient_accumulation_steps) == 2442


def skeleton(flavor):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**FLAVORS[flavor]))


@pytest.mark.parametrize(
    ("flavor", "batch", "processes", "steps", "warmup"),
    [
        ("clm-60M", 48, 2, 7075, 1415),
        ("clm-200M", 38, 2, 31686, 6337),
        ("clm-400M", 12, 8, 45712, 9142),
        ("clm-1.1B", 24, 2, 239383, 47876),
    ],
)
def test_clm_has_the_steps_of_its_published_configs(flavor, batch, processes, steps, warmup):
    """AICrossSim's aixsim-*.yaml: 22 tokens for each parameter but the input embedding; a fifth is warm-up."""
    training = TrainingConfig(
        tokens_per_parameter=22, tokens_per_parameter_of="non-embedding", local_batch_size=batch, seq_len=2048
    )
    counted = counted_parameters(skeleton(flavor), training.tokens_per_parameter_of)
    found = resolve_steps(replace(RunConfig(), training=training), counted, processes).training.steps
    assert (found, int(0.2 * found)) == (steps, warmup)


@pytest.mark.parametrize(
    ("name", "flavor", "rows", "steps", "warmup"),
    [
        ("clm-60m", "clm-60M", 96, 7075, 1415),
        ("clm-200m", "clm-200M", 76, 31686, 6337),
        ("clm-400m", "clm-400M", 96, 45712, 9142),
        # which AICrossSim has published no config of: 22 x 622,929,024 / (96 x 2048) = 69704.4
        ("clm-600m", "clm-600M", 96, 69705, 13941),
        ("clm-1.1b", "clm-1.1B", 192, 59846, 11969),
    ],
)
def test_clm_presets_have_those_steps_on_any_number_of_gpus(name, flavor, rows, steps, warmup):
    config = load_config([name])
    assert (config.model.flavor, config.model.init) == (flavor, "random")
    counted = counted_parameters(skeleton(flavor), config.training.tokens_per_parameter_of)
    for processes in (1, 2):
        resolved = resolve_steps(config, counted, processes)
        assert resolved.sequences_per_step(processes) == rows
        assert (resolved.training.steps, resolved.training.warmup_steps) == (steps, warmup)


def test_clm_60m_has_the_tutorials_faults():
    """fc-only-w-a-exp-frac.yaml: 2^-17 on all bits, thresholds 1.25 and 30."""
    faults = load_config(["clm-60m"]).bitflip
    assert {faults.w_p_exp, faults.w_p_frac, faults.x_p_exp, faults.x_p_frac} == {2**-17}
    assert (faults.w_zero_out_t, faults.x_zero_out_t) == (1.25, 30.0)


def test_the_tutorials_budgets_with_and_without_accumulation():
    """8B: 4,883 steps are of 8 x 1 x 2048 tokens, and its command line accumulates 2, hence half. 70B: 1% of its tokens
    are 10,681 steps of 32 sequences and a sixth of one more; 21,000 leave the accumulation out, and train on twice as
    many."""
    training = TrainingConfig(tokens_per_parameter=0.01, seq_len=2048)
    for more, counted, processes, steps in (
        ({}, 8_000_000_000, 8, STEPS_8B),
        ({"gradient_accumulation_steps": 2}, 8_000_000_000, 8, 2442),
        ({"global_batch_size": 32, "local_batch_size": 2}, 70_000_000_000, 4, 10_681 + 1),
    ):
        config = replace(RunConfig(), training=replace(training, **more))
        assert resolve_steps(config, counted, processes).training.steps == steps
    assert 700_000_000 // (32 * 2048) == 10_681
    assert pytest.approx(1.97, abs=0.01) == 21_000 * 32 * 2048 / 700_000_000


@pytest.mark.parametrize(
    ("flavor", "parameters"), [("1B", 1_235_814_400), ("3B", 3_212_749_824), ("70B", 70_553_706_496)]
)
def test_llama_shapes_have_the_published_number_of_parameters(flavor, parameters):
    assert counted_parameters(skeleton(flavor), "all") == parameters


def test_all_parameters_are_what_the_model_has():
    assert counted_parameters(skeleton("8B"), "all") == 8_030_261_248
    embedding = 128256 * 4096
    assert counted_parameters(skeleton("8B"), "non-embedding") == 8_030_261_248 - embedding
    assert counted_parameters(skeleton("8B"), 7) == 7


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
