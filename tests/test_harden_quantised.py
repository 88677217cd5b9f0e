"""Models hardened whose weights are quantised: rotated before, guarded and measured as what they become."""

import json

import pytest
import torch
from quantised_models import checkpoint, quantised_inputs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.sequences import load_held_out
from flipproof.faults.fitted import read_guards
from flipproof.formats.quantise import dequantise, quantise
from flipproof.measure.evaluate import measure_arms
from flipproof.models.load import byte_tokenizer, load_model
from flipproof.models.quantised import quantised_layers
from flipproof.models.rotate import rotate

TEXT = ["--data.source", "stdlib", "--data.max_tokens", "100000", "--training.seq_len", "64", "--num-samples", "16"]
SMALL = ["--training.local_batch_size", "16", "--calibrate", "70", "--sweep.seeds", "2", "--p", "1e-4,1e-3,3e-3"]
BITS = {"nf4": {"w_code_p", "w_scale_p_exp", "w_global_p"}, "int4-asym": {"w_code_p", "w_scale_p_exp", "w_zero_p"}}


@pytest.fixture(scope="module")
def original(tiny_llama, tmp_path_factory):
    """Of float32, with a channel that is a hundred times as large as others."""
    path = tmp_path_factory.mktemp("harden") / "model"
    model = tiny_llama(hidden_size=128, intermediate_size=256, tie_word_embeddings=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 100
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stored(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "gptq"
    checkpoint(tiny_llama(hidden_size=128, intermediate_size=256).bfloat16(), path, "gptq", "int4-asym")
    byte_tokenizer().save_pretrained(path)
    return path


def harden(model, to, *more):
    assert main(["harden", str(model), *TEXT, *SMALL, "--to", str(to), *more]) == 0
    return to


@pytest.fixture(scope="module")
def hardened(original, tmp_path_factory):
    return harden(
        original, tmp_path_factory.mktemp("hardened") / "out", "--model.quantize", "nf4", "--eval.trials", "2"
    )


@pytest.fixture(scope="module")
def kept(stored, tmp_path_factory):
    return harden(stored, tmp_path_factory.mktemp("kept") / "out", "--eval.trials", "2")


def opened(path, quantize=None):
    tree = {"model": {"hf_model_path": str(path)} | ({"quantize": quantize} if quantize else {})}
    return load_model(load_config([], tree).model, byte_tokenizer(), None, 0).eval()


@torch.no_grad()
def test_weights_are_rotated_and_then_quantised(original, hardened, token_ids):
    """As by hand: ``rotate`` on the plain model, and each layer but the head rounded after."""
    by_hand = AutoModelForCausalLM.from_pretrained(original)
    rotate(by_hand, "residual", 0)
    written = AutoModelForCausalLM.from_pretrained(hardened)  # plain weights
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(written.get_parameter(name), parameter)
    quantised = opened(hardened, "nf4")
    layers = quantised_layers(quantised)
    assert len(layers) == 14
    for name in layers:
        by_hand.get_submodule(name).weight.copy_(dequantise(quantise(by_hand.get_submodule(name).weight, "nf4")))
    assert torch.equal(quantised(token_ids).logits, by_hand(token_ids).logits)
    guards = read_guards(str(hardened))
    assert (guards.format, guards.basis["how"]) == ("nf4", "residual")
    for name in layers:
        assert torch.equal(guards.maxima[f"{name}/w"], by_hand.get_submodule(name).weight.abs().amax(1, keepdim=True))


@pytest.mark.parametrize(("fixture", "format", "quantize"), [("hardened", "nf4", "nf4"), ("kept", "int4-asym", None)])
def test_the_costs_are_those_of_a_plain_evaluation_of_all_stored_bits(fixture, format, quantize, request):
    to = request.getfixturevalue(fixture)
    found = json.loads((to / "hardened.json").read_text())
    assert found["format"] == format
    assert {one["protection"] for one in found["before"]} == {"guard-tensor", "guard-channel"}
    model = opened(to, quantize)
    p = {"x_p_exp": 1e-3, "x_p_frac": 1e-3} | dict.fromkeys(BITS[format], 1e-3)
    p |= {"w_scale_p_frac": 1e-3} if format == "int4-asym" else {}  # of nf4 they are places in a table
    flipproof.inject(model, BitFlipSpec(guards=str(to), **p))
    tree = {"model": {"hf_model_path": "x"}, "data": {"source": "stdlib", "max_tokens": 100_000}}
    text = load_held_out(load_config([], tree).data, byte_tokenizer(), 64)
    arms = measure_arms(model, ("guard", "flipped"), text, seeds=(1, 2), num_samples=16, batch_size=16)
    as_it_was = opened(found["model"], quantize)
    flipproof.inject(as_it_was, BitFlipSpec(w_code_p=1e-3))
    clean = measure_arms(as_it_was, ("clean",), text, seeds=(1,), num_samples=16, batch_size=16)["clean"].loss
    costs = {one["p"]: one for one in found["after"]}
    assert costs[1e-3]["cost"] == pytest.approx(arms["flipped"].loss - clean, rel=1e-9)
    assert costs[0.0]["cost"] == pytest.approx(arms["guard"].loss - clean, abs=1e-9)
    results = json.loads((to / "results.json").read_text())
    assert results["arms"]["flipped"]["trial_losses"] == pytest.approx(arms["flipped"].trial_losses, rel=1e-9)


def test_the_directory_says_what_it_holds_and_what_was_measured(original, hardened, capsys):
    card = (hardened / "README.md").read_text()
    command = "--model.quantize nf4 --bitflip.guards out --bitflip.w_code_p 1e-5 --bitflip.x_p_exp 1e-5"
    assert f"flipproof eval out {command}" in card
    assert "Its weights are plain. What was measured, and what the guards fit, is what they are as nf4" in card
    assert "Measured with weights in nf4, whose stored bits flip." in card
    assert "Measured with weights in nf4" in (hardened / "report.html").read_text()
    argv = ["eval", str(hardened), *TEXT, *command.replace(" out ", f" {hardened} ").split(), "--eval.trials", "1"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main(["eval", str(hardened), *TEXT, "--bitflip.guards", str(hardened)]) == 2
    assert "was fitted to weights that are nf4; here they are not quantised (model.quantize)" in capsys.readouterr().err


@torch.no_grad()
def test_a_checkpoint_that_is_quantised_is_kept_bit_by_bit_and_says_what_was_not_tried(stored, kept, token_ids):
    before, after = load_file(stored / "model.safetensors"), load_file(kept / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in before)
    said = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (stored, kept)]
    assert said[0] == said[1]
    assert torch.equal(opened(stored)(token_ids).logits, opened(kept)(token_ids).logits)
    card, page = (kept / "README.md").read_text(), (kept / "report.html").read_text()
    for text in (card, page):
        assert "Nothing was rotated: its weights are quantised already (gptq, int4-asym)" in text
    assert "its weights are the original's, bit by bit" in card
    assert "flipproof eval out --bitflip.guards out --bitflip.w_code_p" in card
    found = json.loads((kept / "hardened.json").read_text())
    channel = [{**one, "protection": ""} for one in found["before"] if one["protection"] == "guard-channel"]
    assert channel == [{**one, "protection": ""} for one in found["after"]]


def test_what_was_not_tried_is_said_when_the_work_begins(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("flipproof.harden._guard_and_measure", lambda *_: None)
    argv = ["harden", str(stored), *TEXT, *SMALL]
    assert main([*argv, "--to", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "rotated: nothing"
    assert out[1].startswith("not rotated: its weights (quantised already (gptq, int4-asym); the model that they were")
    assert main([*argv, "--to", str(tmp_path / "two"), "--rotate", "none"]) == 0
    assert "not rotated" not in capsys.readouterr().out  # nobody asked


def test_a_rotation_when_the_model_runs_goes_with_quantised_weights(original, tmp_path, token_ids):
    to = harden(original, tmp_path / "full", "--model.quantize", "int8", "--rotate", "full", "--eval.trials", "1")
    by_hand = AutoModelForCausalLM.from_pretrained(original)
    rotate(by_hand, "full", 0)
    quantised = opened(to, "int8")
    with torch.no_grad():
        for name in quantised_layers(quantised):
            weight = by_hand.get_submodule(name).weight
            weight.copy_(dequantise(quantise(weight, "int8")))
        assert torch.equal(quantised(token_ids).logits, by_hand(token_ids).logits)
    assert "Plain `transformers` does not compute this function" in (to / "README.md").read_text()


def test_what_cannot_be_is_one_line_before_anything_is_written(original, stored, tiny_llama, tmp_path, capsys):
    odd = tmp_path / "odd"
    tiny_llama(hidden_size=96).save_pretrained(odd)
    byte_tokenizer().save_pretrained(odd)
    for model, flags, words in (
        (stored, ["--model.quantize", "nf4"], "model.quantize = 'nf4': model.hf_model_path"),
        (odd, ["--model.quantize", "int4"], "q_proj: int4 has groups of 128 in-features"),
        (original, ["--model.quantize", "nf4", "--bitflip.w_scale_zero_out_t", "1"], "has thresholds in its place"),
    ):
        assert main(["harden", str(model), *TEXT, *SMALL, *flags, "--to", str(tmp_path / "x")]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert words in line
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("checkpoint_of_them", [False, True])
def test_inputs_that_are_quantised_flip_as_they_are_stored(original, tiny_llama, tmp_path, checkpoint_of_them):
    """Those of a plain model that is asked for it, and of a checkpoint that is served so; the card's command runs."""
    path, quantised = original, "--model.quantize fp8 --model.quantize_inputs fp8 "
    if checkpoint_of_them:
        path, quantised = tmp_path / "w8a8", ""
        quantised_inputs(tiny_llama(hidden_size=128, intermediate_size=256), path, "int8")
        byte_tokenizer().save_pretrained(path)
    to = harden(path, tmp_path / "out", *quantised.split(), "--eval.trials", "1", "--p", "1e-3")
    command = f"{quantised}--bitflip.guards out --bitflip.w_code_p 1e-5 --bitflip.x_code_p 1e-5"
    assert f"flipproof eval out {command}" in (to / "README.md").read_text()
    assert main(["eval", str(to), *TEXT, *command.replace(" out ", f" {to} ").split(), "--eval.trials", "1"]) == 0
    loss = json.loads((to / "results.json").read_text())["arms"]
    assert loss["flipped"]["loss"] > loss["clean"]["loss"]
