"""Guards of quantised models: fitted to what is computed with, and to scales; of one format."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from guards_by_hand import scales_of
from quantised import decompressed
from quantised_models import checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.sequences import load_text
from flipproof.errors import ConfigError
from flipproof.faults.fitted import read_guards
from flipproof.formats.pack import pack
from flipproof.formats.quantise import quantise
from flipproof.measure.evaluate import evaluate
from flipproof.measure.guards import fit_guards
from flipproof.models.load import byte_tokenizer, load_model
from flipproof.models.quantised import quantised_layers

SAMPLES, LENGTH = 80, 64
FORMATS = ("int8", "int4-asym", "nvfp4", "nf4")
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tiny_llama, tmp_path_factory):
    """Of float32, with a channel of every layer's input that is large."""
    path = tmp_path_factory.mktemp("guards") / "base"
    model = tiny_llama(hidden_size=128, intermediate_size=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[5] *= 20
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def settings(directory, quantize=None, **bitflip):
    tree = {
        "model": {"hf_model_path": str(directory)} | ({"quantize": quantize} if quantize else {}),
        "training": {"seq_len": LENGTH, "local_batch_size": 8},
        "data": {"source": "stdlib", "max_tokens": 40_000},
        "eval": {"num_samples": SAMPLES, "trials": 2},
        "bitflip": bitflip,
    }
    return load_config([], tree)


@pytest.fixture(scope="module")
def fitted(base, tmp_path_factory):
    """Format -> directory of guards by channel."""
    found = {name: tmp_path_factory.mktemp("fitted") / name for name in FORMATS}
    for name, to in found.items():
        fit_guards(settings(base, name), "channel", to)
    return found


def calibration():
    text, _ = load_text(settings("x").data, byte_tokenizer(), LENGTH)
    return [text.batch([i * len(text) // SAMPLES]).ids for i in range(SAMPLES)]  # as evaluation spreads them


@pytest.mark.parametrize("name", ["int8", "int4-asym"])
@torch.no_grad()
def test_maxima_are_of_what_another_library_dequantises(base, fitted, name):
    """And inputs those that plain hooks see in a plain model of these weights."""
    guards = read_guards(str(fitted[name]))
    model, seen = AutoModelForCausalLM.from_pretrained(base).eval(), {}
    for layer, module in model.named_modules():
        if type(module) is not nn.Linear or layer == "lm_head":
            continue
        stored = quantise(module.weight, name)
        module.weight.copy_(decompressed(pack(stored), name))
        assert torch.equal(guards.maxima[f"{layer}/w"], module.weight.abs().amax(1, keepdim=True))
        assert guards.maxima[f"{layer}/w_scale"].equal(scales_of(stored).abs().max().float())

        def look(_module, args, key=f"{layer}/x"):
            largest = args[0].abs().flatten(0, -2).amax(0)
            seen[key] = torch.maximum(seen.get(key, largest), largest)

        module.register_forward_pre_hook(look)
    for ids in calibration():
        model(ids)
    assert len(seen) == 14
    for key, largest in seen.items():
        torch.testing.assert_close(guards.maxima[key], largest, rtol=1e-4, atol=1e-5)  # batches add up otherwise
    of_scales = {key for key in guards.maxima if key.endswith("/w_scale")}
    assert of_scales == {f"{key.removesuffix('/x')}/w_scale" for key in seen}
    assert guards.format == name


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_no_clean_number_is_zeroed_and_what_is_beyond_the_largest_is(base, fitted, name, caplog):
    spec = BitFlipSpec(guards=str(fitted[name]), w_margin=1.0, w_code_p=1e-3)
    model = load_model(settings(base, name).model, byte_tokenizer(), None, 0).eval()
    texts = calibration()[:10]
    clean = [model(ids).logits for ids in texts]
    flipproof.inject(model, spec)
    with flipproof.faults(model, flips=False):
        for ids, expected in zip(texts, clean, strict=True):
            assert torch.equal(model(ids).logits, expected)
    layer, maxima = model.get_submodule(DOWN), read_guards(str(fitted[name])).maxima
    assert maxima[f"{DOWN}/w_scale"].equal(scales_of(layer.stored()).abs().max().float())
    assert "thresholds" in repr(layer)
    assert not [line for line in caplog.messages if "fitted to other weights" in line]
    # an input beyond its own feature's largest goes
    x = torch.zeros(1, layer.in_features)
    largest = maxima[f"{DOWN}/x"]
    feature = int(largest.argmax())
    with flipproof.faults(model, flips=False):
        for factor, kept in ((1.999, True), (2.001, False)):
            x[0, feature] = largest[feature] * factor
            assert torch.equal(layer(x), F.linear(x * kept, layer.weight))


def test_coarser_ones_are_the_largest_of_finer_ones(base, fitted):
    guards = read_guards(str(fitted["nf4"]))
    of_w, of_scales = ([t for key, t in guards.maxima.items() if key.endswith(end)] for end in ("proj/w", "/w_scale"))
    tables = [t for key, t in guards.maxima.items() if key.endswith(("embed_tokens/w", "lm_head/w"))]
    model = load_model(settings(base, "nf4").model, byte_tokenizer(), None, 0)
    keys = {"guards": str(fitted["nf4"]), "w_margin": 1.0, "w_code_p": 1e-3}
    flipproof.inject(model, BitFlipSpec(**keys))
    layer, up = model.get_submodule(DOWN), torch.tensor(math.inf)
    for by, largest, scale in (
        ("layer", guards.maxima[f"{DOWN}/w"].max(), guards.maxima[f"{DOWN}/w_scale"]),
        ("tensor", max(t.max() for t in [*of_w, *tables]), max(of_scales)),
    ):
        flipproof.set_faults(model, BitFlipSpec(**keys, guards_by=by))
        assert layer.w_fault.one == largest.nextafter(up)
        assert layer.scale_guard.one == scale.nextafter(up)


@pytest.mark.parametrize(("method", "format"), [("gptq", "int4-asym"), ("compressed-tensors", "int8")])
def test_a_checkpoint_that_is_quantised_has_guards_of_its_own(tiny_llama, tmp_path, method, format, capsys):
    model = tiny_llama(hidden_size=128, intermediate_size=256).bfloat16()
    checkpoint(model, tmp_path / "model", method, format)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    argv = ["profile", str(tmp_path / "model"), "--data.source", "stdlib", "--data.max_tokens", "40000"]
    argv += ["--training.seq_len", "64", "--num-samples", str(SAMPLES), "--guards", "channel", "--to"]
    assert main([*argv, str(tmp_path / "guards")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"guards by channel, fitted to 5,120 tokens of stdlib, bfloat16, {format}"
    assert lines[3].split()[:3] == ["scales", "14", "14"]
    guards = read_guards(str(tmp_path / "guards"))
    layers = quantised_layers(load_model(settings(tmp_path / "model").model, byte_tokenizer(), None, 0))
    assert len(layers) == 14
    for name, layer in layers.items():
        assert guards.maxima[f"{name}/w"].equal(layer.weight.abs().amax(1, keepdim=True).float())
        assert guards.maxima[f"{name}/w_scale"].equal(layer.held("scale").abs().max().float())
    # other text is merged, and others' guards are told before it is looked at
    assert main([*argv, str(tmp_path / "again"), "--merge", str(tmp_path / "guards")]) == 0
    assert read_guards(str(tmp_path / "again")).digest == guards.digest


def test_guards_of_another_format_are_refused_in_a_line(base, fitted, tmp_path):
    """By weights they would be near, but a scale of int8 is a hundredth of one of nf4."""
    for format, here in (("nf4", "nf4"), ("nvfp4", "nvfp4"), (None, "not quantised")):
        faults = {"w_code_p": 1e-3} if format else {"w_p_frac": 1e-3}
        words = rf"was fitted to weights that are int8; here they are {here} \(model\.quantize\)"
        with pytest.raises(ConfigError, match=words) as error:
            evaluate(settings(base, format, guards=str(fitted["int8"]), **faults))
        assert len(error.value.problems) == 1
        with pytest.raises(ConfigError, match=f"--merge: .*{words}"):
            fit_guards(settings(base, format), "channel", tmp_path / "to", [str(fitted["int8"])])
    again = fit_guards(settings(base, "int8"), "channel", tmp_path / "same", [str(fitted["int8"])])
    assert again.digest == read_guards(str(fitted["int8"])).digest
    with pytest.raises(ConfigError, match="guards of format 'nf4' do not go with those of format 'int8'"):
        fit_guards(settings(base, "int8"), "channel", tmp_path / "to", [str(fitted["int8"]), str(fitted["nf4"])])
    assert not (tmp_path / "to").exists()


def test_those_of_the_plain_model_are_near_and_have_no_scales(base, fitted, tmp_path, caplog):
    plain = fit_guards(settings(base), "channel", tmp_path / "plain")
    assert not [key for key in plain.maxima if key.endswith("/w_scale")]
    assert "format" not in plain.about
    evaluate(settings(base, "int8", guards=str(tmp_path / "plain"), w_code_p=1e-3))
    assert [line for line in caplog.messages if "was fitted to other weights, which are near" in line]
    with pytest.raises(ConfigError, match=r"--merge: .* to weights that are not quantised; here they are int8"):
        fit_guards(settings(base, "int8"), "channel", tmp_path / "to", [str(tmp_path / "plain")])


def test_a_sweep_counts_their_thresholds(base, fitted, tmp_path):
    """Of weights and inputs, and one for the scales of each layer, over the bits that are stored."""
    argv = ["sweep", str(base), "--model.quantize", "int8", "--data.source", "stdlib", "--data.max_tokens", "40000"]
    argv += ["--training.seq_len", "64", "--num-samples", "2", "--p", "1e-3", "--sweep.seeds", "1", "--sites", "w"]
    argv += ["--protection", "none,guard-channel,guard-layer,guard-tensor", "--bitflip.guards", str(fitted["int8"])]
    assert main([*argv, "--to", str(tmp_path / "sweep")]) == 0
    header = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)] * 2
    stored = sum(out * features * 8 + out * 32 for out, features in shapes)  # a float32 scale for a row
    thresholds = {
        "guard-channel": sum(out + features + 1 for out, features in shapes), "guard-layer": 3 * 14, "guard-tensor": 3,
    }  # fmt: skip
    for name, count in thresholds.items():
        assert header["overhead"][name] == pytest.approx(32 * count / stored)
    assert header["guards"]["guard-channel"]["loss"] == pytest.approx(header["clean"]["loss"], abs=1e-6)
