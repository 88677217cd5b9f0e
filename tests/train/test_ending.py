"""What a run leaves at its end, as other tools read it."""

import dataclasses
import json
import math

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from rounding import assert_same_function
from tiny_runs import FAULTS, metrics, settings, train_until_crash
from transformers import AutoModelForCausalLM

from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure.arms import Arm
from flipproof.measure.card import bitflip_config, configs_of, front_matter, markdown_table, tuning_config
from flipproof.models.load import byte_tokenizer
from flipproof.sums import check_sums
from flipproof.train.ending import train_loss
from flipproof.train.export import export
from flipproof.train.loop import train


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ending") / "base"
    tiny_llama().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def with_merged(config):
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, export_merged=True))


@pytest.fixture(scope="module")
def run(base):
    """A finished run that has written its merged model, too; for reading."""
    config = with_merged(settings(base, base.parent / "run", steps=3, log_freq=2))
    lora = dataclasses.replace(config.lora, target_modules=("q_proj", "up_proj"), dropout=0.1, use_rslora=True)
    return train(dataclasses.replace(config, lora=lora))


def test_the_merged_model_is_what_peft_makes_of_the_adapter(run, base, token_ids):
    merged = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").merge_and_unload()
    with torch.no_grad():
        expected = theirs.eval()(token_ids).logits
        assert_same_function(merged(token_ids).logits, lambda: theirs(token_ids).logits, theirs.parameters())
        assert (AutoModelForCausalLM.from_pretrained(base).eval()(token_ids).logits - expected).abs().max() > 1e-3
    check_sums(run / "model", "model")
    changed = {name for name, w in merged.state_dict().items() if not torch.equal(w, theirs_base(base)[name])}
    assert changed == {
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


def theirs_base(base):
    return AutoModelForCausalLM.from_pretrained(base).state_dict()


def test_all_results_are_flat_and_those_of_results(run):
    found = json.loads((run / "all_results.json").read_text())
    assert all(isinstance(value, int | float) for value in found.values())
    arms = json.loads((run / "results.json").read_text())["arms"]
    assert (found["perplexity"], found["eval_loss"]) == (arms["recovered"]["perplexity"], arms["recovered"]["loss"])
    for name, arm in arms.items():
        assert (found[f"perplexity_{name}"], found[f"eval_loss_{name}"]) == (arm["perplexity"], arm["loss"])
    assert found["eval_samples"] == 4
    first, last = (line["loss"] for line in metrics(run) if "loss" in line)  # means over two steps and over one
    assert found["train_loss"] == pytest.approx((2 * first + last) / 3, rel=1e-12)
    assert math.isclose(math.exp(found["eval_loss"]), found["perplexity"], rel_tol=1e-12)


def test_a_loss_that_was_not_finite_has_no_mean(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "eval_loss_clean": 9}\n')
    assert train_loss(tmp_path) == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": null}\n')
    assert train_loss(tmp_path) is None


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_card_is_read_by_the_hub_and_is_the_one_that_export_writes(run, base, tmp_path, kind):
    card = ModelCard.load(run / kind / "README.md")
    assert card.data.library_name == {"adapter": "peft", "model": "transformers"}[kind]
    assert set(card.data.tags) >= {"flipproof", "bit-flips", "lora"}
    assert card.data.base_model is None  # a path is no name on the Hub
    arms = json.loads((run / "results.json").read_text())["arms"]
    table = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    header = next(row for row in table if row[0] == "arm")
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in table if row[0] in arms}
    assert rows.keys() == arms.keys()
    for name, arm in arms.items():
        assert float(rows[name]["Val PPL (↓)"]) == pytest.approx(arm["perplexity"], rel=1e-4)
    assert rows["clean"]["Bitflip config"] == rows["clean"]["Fine-tune config"] == "N/A"
    assert rows["guard"]["Bitflip config"] == "w_zero_out_t = 1, x_zero_out_t = 64"
    assert rows["recovered"]["Bitflip config"] == ", ".join(f"{key} = {value:g}" for key, value in FAULTS.items())
    assert rows["recovered"]["Fine-tune config"] == "LoRA rank=2"
    low, high = arms["recovered"]["perplexity_interval"]
    assert rows["recovered"]["95% over fault seeds"] == f"{low:.5g} to {high:.5g}"
    for word in (str(base), "q_proj, up_proj", "lora_alpha / √r", "dropout=0.1", "of the measurement 1, 2"):
        assert word in card.text
    export(run, tmp_path / kind, kind)
    assert (tmp_path / kind / "README.md").read_text() == (run / kind / "README.md").read_text()
    check_sums(tmp_path / kind, kind)


def test_the_card_of_an_earlier_step_has_no_arms_of_a_later_one(run, tmp_path):
    export(run, tmp_path / "early", "adapter", step=2)
    text = (tmp_path / "early" / "README.md").read_text()
    assert "for 2 steps" in text
    assert "| flipped |" in text
    assert "| recovered" not in text


def test_a_run_killed_before_its_end_leaves_no_result_that_is_not_its_own(base, tmp_path):
    config = with_merged(settings(base, tmp_path / "run", steps=2))
    train(config)
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    train_until_crash(longer, 3, "auto")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"all_results.json", "model"}
    assert "for 2 steps" in (tmp_path / "run" / "adapter" / "README.md").read_text()  # what these weights are
    train(longer, "auto")
    assert (tmp_path / "run" / "model" / "README.md").read_text().count("for 4 steps") == 1
    assert "perplexity_recovered" in json.loads((tmp_path / "run" / "all_results.json").read_text())


def test_a_card_begins_with_what_the_hub_knows():
    head = front_matter("unsloth/Llama-3.1-8B", "peft", ["lora"], ["Cheng98/fineweb-edu-1.25B", "stdlib", "./my.txt"])
    data = ModelCard(head + "text").data
    assert (data.base_model, data.library_name, data.tags) == ("unsloth/Llama-3.1-8B", "peft", ["lora"])
    assert data.datasets == ["Cheng98/fineweb-edu-1.25B"]
    assert ModelCard(front_matter("/a/b: c", "transformers", [])).data.base_model is None
    assert markdown_table(["a"], [["b|c\nd"]]).splitlines()[-1] == "| b\\|c d |"


def test_configs_are_said_as_the_papers_tables_do():
    bitflip = {"w_p_exp": 2**-16, "w_zero_out_t": 1.25, "x_p_frac": 1e-5, "x_zero_out_t": 30.0, "base_seed": 7}
    assert bitflip_config(bitflip) == "w_p_exp = 2^-16, w_zero_out_t = 1.25, x_p_frac = 1e-05, x_zero_out_t = 30"
    assert bitflip_config(bitflip, flips=False) == "w_zero_out_t = 1.25, x_zero_out_t = 30"
    assert bitflip_config(dataclasses.asdict(load_config([], {"model": {"hf_model_path": "a/b"}}).bitflip)) == "N/A"
    config = {"bitflip": bitflip, "lora": {"r": 32}}
    arms = dict.fromkeys(["clean", "flipped", "control", "recovered"], Arm.from_losses([1.0], 1))
    assert configs_of("clean", arms, config) == ("N/A", "N/A")
    assert configs_of("flipped", arms, config) == (bitflip_config(bitflip), "N/A")
    assert configs_of("recovered", arms, config) == (bitflip_config(bitflip), "LoRA rank=32")
    assert configs_of("recovered", arms, {"bitflip": bitflip})[1] is None
    assert configs_of("flipped", arms | {"hardened": arms["clean"]}, config) == (None, None)
    assert tuning_config({"lora": {"r": 0}, "model": {"init": "random"}}) == "all weights, from scratch"


def test_target_modules_that_match_nothing_end_a_run_before_it_begins(base, tmp_path):
    config = settings(base, tmp_path / "run")
    wrong = dataclasses.replace(config, lora=dataclasses.replace(config.lora, target_modules=("q_prj",)))
    with pytest.raises(ConfigError, match=r"'q_prj' names no nn\.Linear; there are q_proj, k_proj"):
        train(wrong)
    assert not (tmp_path / "run").exists()
