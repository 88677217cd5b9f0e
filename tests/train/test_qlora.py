"""Adapters trained beside quantised weights with faults: runs, resumed runs and what is made of them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import settings, text_file
from torch.distributed.checkpoint import FileSystemReader

from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.faults.fitted import read_guards
from flipproof.log import logger
from flipproof.models.load import byte_tokenizer
from flipproof.train.export import export
from flipproof.train.loop import train


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("qlora") / "base"
    tiny_llama(hidden_size=64).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


FAULTS = {"w_code_p": 0.002, "w_scale_p_exp": 0.001, "w_global_p": 1e-5, "w_zero_out_t": 1.0, "x_p_frac": 0.01}


def qlora(base, run_dir, **training):
    of_floats = settings(base, run_dir, **training)
    tree = {
        "model": {"hf_model_path": str(base), "quantize": "nf4"},
        "training": {"seq_len": 32, "local_batch_size": 2, "gradient_accumulation_steps": 2, "lr": 1e-2,
                     "steps": of_floats.training.steps, "save_freq": 2, **training},
        "lora": {"r": 4, "lora_alpha": 8, "dropout": 0.1},
        "bitflip": FAULTS,
        "data": {"source": str(text_file(base.parent)), "max_tokens": 20_000},
        "eval": {"num_samples": 4, "trials": 2},
        "logging": {"run_dir": str(run_dir)},
    }  # fmt: skip
    return load_config([], tree)


def adapter(run_dir):
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(base):
    train(qlora(base, base.parent / "run"))
    return base.parent / "run"


def test_a_run_has_all_arms_and_wins_something(run):
    arms = json.loads((run / "results.json").read_text())["arms"]
    assert arms.keys() == {"clean", "guard", "flipped", "recovered", "recovered_clean"}
    assert arms["recovered"]["loss"] < arms["flipped"]["loss"] - 0.1
    assert arms["flipped"]["loss"] != arms["clean"]["loss"]
    assert {key.rpartition("lora_")[2] for key in adapter(run)} == {"A.weight", "B.weight"}


def test_a_resumed_run_is_the_run(base, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for gone in ("adapter", "checkpoints/step-6"):
        shutil.rmtree(tmp_path / "run" / gone)
    train(qlora(base, tmp_path / "run"), resume="auto")
    resumed, whole = adapter(tmp_path / "run"), adapter(run)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_with_quantised_inputs_too(base, tmp_path):
    """Resumed it is the run that was not stopped, and a log of its flips has those of inputs."""
    config = qlora(base, tmp_path / "run")
    faults = {"x_code_p": 0.002, "x_scale_p_frac": 0.01, "x_zero_out_t": 16.0, "w_code_p": 0.002, "w_zero_out_t": 1.0}
    config = replace(config, model=replace(config.model, quantize_inputs="int8"), bitflip=BitFlipSpec(**faults))
    train(config)
    whole = adapter(tmp_path / "run")
    for gone in ("adapter", "checkpoints/step-6"):
        shutil.rmtree(tmp_path / "run" / gone)
    train(config, resume="auto")
    resumed = adapter(tmp_path / "run")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert (
        main(["eval", str(tmp_path / "run"), "--to", str(tmp_path / "again"), "--flip-log", str(tmp_path / "log")]) == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert {"x_code", "x_scale", "w_code"} <= {line["tensor"].rpartition("/")[2] for line in lines}
    assert (
        main(["eval", str(tmp_path / "run"), "--to", str(tmp_path / "twice"), "--replay", str(tmp_path / "log")]) == 0
    )
    again, twice = (json.loads((tmp_path / to / "results.json").read_text())["arms"] for to in ("again", "twice"))
    assert twice["replayed"]["loss"] == pytest.approx(again["recovered"]["trial_losses"][0], rel=1e-6)


def test_checkpoints_hold_the_adapters_alone(run):
    held = FileSystemReader(run / "checkpoints" / "step-6").read_metadata().state_dict_metadata
    of_the_model = [name for name in held if name.startswith("model.")]
    assert len(of_the_model) == len(adapter(run))
    assert all(name.endswith((".lora_A", ".lora_B")) for name in of_the_model)


def test_the_arms_of_a_run_are_those_of_eval_and_a_log_replays(run, tmp_path, capsys):
    assert main(["eval", str(run), "--to", str(tmp_path / "again"), "--flip-log", str(tmp_path / "log")]) == 0
    arms, again = (json.loads((place / "results.json").read_text())["arms"] for place in (run, tmp_path / "again"))
    for name in arms:
        assert again[name]["loss"] == pytest.approx(arms[name]["loss"], rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert {"w_code", "w_scale"} <= {line["tensor"].rpartition("/")[2] for line in lines}
    assert all(line["bit"] < 4 for line in lines if line["tensor"].endswith("w_code"))
    assert main(["eval", str(run), "--to", str(tmp_path / "replay"), "--replay", str(tmp_path / "log")]) == 0
    replayed = json.loads((tmp_path / "replay" / "results.json").read_text())["arms"]
    assert replayed["replayed"]["loss"] == pytest.approx(again["recovered"]["trial_losses"][0], rel=1e-6)


def test_text_with_and_without_faults(run, capsys):
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "4"]) == 0
    assert "bits of codes" in capsys.readouterr().out


def test_an_adapter_is_exported_and_nothing_is_merged(run, tmp_path):
    export(run, tmp_path / "adapter", "adapter")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, adapter(run)[key]) for key, tensor in exported.items())
    for quantize in (None, "nf4", "int8"):
        with pytest.raises(ConfigError, match="the weights are nf4, and what adapters make of them is another model"):
            export(run, tmp_path / "model", quantize=quantize)
    assert not (tmp_path / "model").exists()


def test_adapters_train_behind_guards_that_were_fitted_to_the_quantised_model(base, tmp_path):
    """And the run keeps them; it has no word of other weights to say."""
    guards = ["profile", str(base), "--model.quantize", "nf4", "--data.source", str(text_file(base.parent))]
    guards += ["--data.max_tokens", "20000", "--training.seq_len", "32", "--num-samples", "128", "--guards", "channel"]
    assert main([*guards, "--to", str(tmp_path / "guards")]) == 0
    config = qlora(base, tmp_path / "run")
    faults = {**FAULTS, "w_zero_out_t": None, "guards": str(tmp_path / "guards")}
    config = replace(config, bitflip=BitFlipSpec(**faults))
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(logger, "warning", lambda text, *values: warned.append(text % values))
        train(config)
    assert not [line for line in warned if "guards" in line]
    kept = read_guards(str(tmp_path / "run"))
    assert kept.digest == read_guards(str(tmp_path / "guards")).digest
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["fitted"] == kept.about
    assert results["fitted"]["format"] == "nf4"
    arms = results["arms"]
    assert arms["recovered"]["loss"] < arms["flipped"]["loss"] - 0.1
    assert arms["guard"]["loss"] == pytest.approx(arms["clean"]["loss"], abs=1e-3)
    assert main(["eval", str(tmp_path / "run"), "--to", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())["arms"]
    assert again["recovered"]["loss"] == pytest.approx(arms["recovered"]["loss"], rel=1e-6)
    export(tmp_path / "run", tmp_path / "adapter", "adapter")
    assert read_guards(str(tmp_path / "adapter")).digest == kept.digest
