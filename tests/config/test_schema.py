"""Defaults against their own declarations, and the rules that several keys must fulfil together."""

import pytest

from flipproof.config import SECTIONS, load_config, preset_names
from flipproof.errors import ConfigError
from flipproof.faults.spec import LoraSpec


def problems(overrides):
    with pytest.raises(ConfigError) as error:
        load_config([], overrides)
    return error.value.problems


def test_every_default_is_what_its_key_declares():
    for section in SECTIONS.values():
        assert section.checked_keys(vars(section())) == (vars(section()), [])


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("bitflip", {"w_burst": 4, "w_p_frac": 0.1}, "bitflip.w_burst = 4: runs of bits need one probability"),
        ("bitflip", {"w_burst": 4, "w_p_frac": 0.1, "w_p_exp": 0.7}, "bitflip.w_p_exp = 0.7: "),
        ("model", {"hf_model_path": None, "init": "randm", "flavor": "demo"}, "model.init = 'randm': "),
        ("eval", {"until_ci": 0.01, "trials": 9, "max_trials": 8}, "eval.max_trials = 8: with until_ci at least 9 "),
        ("eval", {"until_ci": 0.01, "max_trials": 4}, "eval.max_trials = 4: with until_ci at least 5 "),
        ("eval", {"until_ci": 0.01, "trials": 0, "max_trials": 8}, "eval.trials = 0: "),
        ("training", {"epochs": 2, "steps": 9}, "training.epochs = 2: steps = 9 gives the length of the run as well"),
        ("training", {"epochs": 2, "tokens_per_parameter": 9}, "training.epochs = 2: tokens_per_parameter = 9.0 gives"),
        ("training", {"warmup_ratio": 0.2, "warmup_steps": 9}, "training.warmup_ratio = 0.2: warmup_steps = 9 gives"),
        (
            "training",
            {"precision": "bf16-mixed", "dtype": "bfloat16"},
            "training.precision = 'bf16-mixed': it means dtype = 'float32', and dtype = 'bfloat16' is given",
        ),
        (
            "training",
            {"precision": "32-true", "mixed_precision_param": "float16"},
            "training.precision = '32-true': it means mixed_precision_param = None, and",
        ),
        ("training", {"beta1": 1.0}, "training.beta1 = 1.0: a number of at least 0, below 1, is allowed"),
        ("sweep", {"p": "1e-5", "voltage": "a.csv"}, "sweep.voltage = 'a.csv': gives the probabilities, and so does p"),
        ("sweep", {"p": "1", "voltage": "a.csv"}, "sweep.p = '1': "),
    ],
)
def test_rules_of_several_keys_say_nothing_of_a_key_that_is_wrong_by_itself(section, values, expected):
    tree = {"model": {"hf_model_path": "m"}}
    tree[section] = tree.get(section, {}) | values
    (found,) = problems(tree)
    assert found.startswith(expected)


def test_no_shard_has_the_whole_model_in_every_process():
    parallelism = {"sharding_strategy": "no_shard", "fsdp_degree": 2, "cpu_offload": True}
    found = problems({"model": {"hf_model_path": "m"}, "parallelism": parallelism})
    assert found == [
        "parallelism.fsdp_degree = 2: no_shard allows 1",
        "parallelism.cpu_offload = True: no_shard keeps the whole model on the device",
    ]


def test_a_model_must_be_named():
    assert "hf_model_path is not set" in problems({})[0]
    assert "set flavor" in problems({"model": {"init": "random"}})[0]


def test_adapters_are_said_in_pefts_own_words(tmp_path):
    """In a file as ``LoraConfig`` has them, and as here."""
    ours = 'r = 8\ntarget_modules = ["q_proj", "v_proj"]\ndropout = 0.05\nuse_rslora = true\n'
    theirs = 'r = 8\ntarget_modules = "q_proj,v_proj"\nlora_dropout = 0.05\nrslora = true\n'
    read = []
    for lora in (ours, theirs):
        (tmp_path / "run.toml").write_text(f'[model]\nhf_model_path = "a/b"\n[lora]\n{lora}')
        read.append(load_config([tmp_path / "run.toml"]).lora)
    assert read[0] == read[1] == LoraSpec(r=8, target_modules=("q_proj", "v_proj"), dropout=0.05, use_rslora=True)
    assert read[0].scaling == 32 / 8**0.5


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({}, []),
        (
            {"lora": {"dropout": 0.1, "lora_alpha": 8}, "checkpoint": {"export_merged": True}},
            [
                "lora.lora_alpha = 8.0 says nothing: lora.r = 0 makes no adapters",
                "lora.dropout = 0.1 says nothing: lora.r = 0 makes no adapters",
                "checkpoint.export_merged = True says nothing: lora.r = 0 makes no adapters",
            ],
        ),
        ({"lora": {"r": 1, "dropout": 0.1, "use_rslora": True}, "checkpoint": {"export_merged": True}}, []),
        ({"lora": {"dropout": 0}, "checkpoint": {"export_merged": False}}, []),
        (
            {"training": {"lr_scheduler": "constant", "min_lr_ratio": 0.1}},
            ["training.min_lr_ratio = 0.1 says nothing: training.lr_scheduler = 'constant' stays at the peak"],
        ),
        ({"training": {"min_lr_ratio": 0.1}}, []),
        ({"data": {"buffer_size": 7}}, ["data.buffer_size = 7 says nothing: data.streaming is off"]),
        ({"data": {"buffer_size": 7, "streaming": True}}, []),
    ],
)
def test_keys_that_say_nothing_beside_the_others_are_a_line_each(keys, lines):
    assert load_config([], {"model": {"hf_model_path": "m"}} | keys).in_vain() == lines


def test_no_preset_sets_a_key_in_vain():
    for name in preset_names():
        config = load_config([name], {"model": {"hf_model_path": "m"}})
        assert config.in_vain() == []
