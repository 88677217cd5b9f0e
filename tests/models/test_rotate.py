import copy
import subprocess
import sys

import pytest
import torch
from bumpy import bumpy
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import flipproof
from flipproof import BitFlipSpec
from flipproof.errors import ConfigError
from flipproof.models.parallelize import blocks
from flipproof.models.rotate import check, gain_of, rotate

WHOLE = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "SmolLM3", "Phi3", "Granite"]
NORM_BETWEEN = ("post_attention_layernorm", "is a norm between a layer and the residual stream")
NO_RMS_NORM = ("norm", "is no RMSNorm: it does more than scale a vector as a whole and by a gain")
PARTLY = {
    "Gemma2": NORM_BETWEEN,
    "Gemma3Text": NORM_BETWEEN,
    "Olmo2": NORM_BETWEEN,
    "Cohere": NO_RMS_NORM,
    "Phi": NO_RMS_NORM,
    "GPTNeoX": NO_RMS_NORM,
    "OPT": NO_RMS_NORM,
    "Mixtral": ("mlp.gate", "is a MixtralTopKRouter, no nn.Linear"),
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def assert_same_logits(model, before, ids):
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-4 * max(1.0, float(before.abs().max())))


@pytest.mark.parametrize("how", ["residual", "full"])
@pytest.mark.parametrize("kind", WHOLE)
def test_a_rotated_model_is_the_same_function_in_another_basis(kind, how, token_ids):
    model = bumpy(kind)
    plain, before = copy.deepcopy(model), logits(model, token_ids)
    norms = [module for name, module in model.named_modules() if name.endswith(("layernorm", "model.norm"))]
    assert len(norms) == 5
    assert all((gain_of(norm)[0] - 1).abs().max() > 0.5 for norm in norms)
    said = rotate(model, how, 7)
    assert_same_logits(model, before, token_ids)
    assert all((gain_of(norm)[0] == 1).all() for norm in norms)
    assert said.left == {}
    assert said.difference < 1e-5
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    assert set(said.stream) == set(layers)
    assert len(said.folded) == 5
    assert said.values == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    downs = tuple(name for name in layers if name.endswith("down_proj"))
    assert said.online == (downs if how == "full" else ())
    for name in layers:
        old, new = plain.get_submodule(name).weight, model.get_submodule(name).weight
        assert (old - new).abs().max() > 0.1, name
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_float64_model_is_the_same_function_too(token_ids):
    model = bumpy("Llama").double()
    before = logits(model, token_ids)
    assert rotate(model, "residual", 7).difference < 1e-5  # its norms compute in float32
    assert_same_logits(model, before, token_ids)


@pytest.mark.parametrize("kind", PARTLY)
def test_what_cannot_be_rotated_is_left_and_named(kind, token_ids):
    model = bumpy(kind)
    plain, before = copy.deepcopy(model), logits(model, token_ids)
    said = rotate(model, "residual", 0)
    part, why = PARTLY[kind]
    assert said.stream == ()
    assert any(part in name and reason == why for name, reason in said.left.items())
    assert why in str(said)
    assert len(said.values) == 2
    embedding, old = model.get_input_embeddings(), plain.get_input_embeddings()
    assert torch.equal(embedding.weight, old.weight)
    assert_same_logits(model, before, token_ids)


def test_a_gain_on_a_branch_keeps_the_stream_and_a_gate_keeps_the_values(token_ids):
    model = bumpy("Llama")
    block = model.model.layers[1]
    block.mlp.register_forward_hook(lambda _module, _args, y: y * torch.linspace(1, 2, 48))
    block.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: (args[0] * torch.linspace(1, 2, 48),))
    before = logits(model, token_ids)
    said = rotate(model, "residual", 0)
    assert said.stream == ()
    assert said.left == {
        "model.layers.1.mlp": "adds to the residual stream what no nn.Linear gave",
        "model.layers.1.self_attn": "its values do not go from one nn.Linear to another, head by head",
    }
    assert said.values == ("model.layers.0.self_attn",)
    assert_same_logits(model, before, token_ids)


def test_a_model_without_linear_layers_stays_as_it_is():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=48, n_layer=2, n_head=4, n_positions=64))
    before = copy.deepcopy(model.state_dict())
    said = rotate(model, "residual", 0)
    assert (said.stream, said.values, said.online) == ((), (), ())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "flipproof_rotation")
    with pytest.raises(ConfigError, match=r"'full': GPT2LMHeadModel has no nn\.Linear as down projection"):
        rotate(model, "full", 0)


def test_values_of_each_head_are_in_a_basis_of_its_own(token_ids):
    """A head's values are the old ones up to an orthogonal matrix: their products with each other stay."""
    model = bumpy("Qwen3")
    plain = copy.deepcopy(model)
    rotate(model, "residual", 0)
    seen = {}
    for which, one in (("old", plain), ("new", model)):
        one.model.layers[0].self_attn.v_proj.register_forward_hook(
            lambda _module, _args, y, which=which: seen.__setitem__(which, y.view(-1, 2, 16))
        )
        logits(one, token_ids)
    for head in range(2):
        old, new = seen["old"][:, head], seen["new"][:, head]
        assert not torch.allclose(old, new, atol=0.1)
        torch.testing.assert_close(new @ new.T, old @ old.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "SmolLM3"])
def test_a_tied_head_is_untied_where_the_last_gain_is_folded_into_it(kind, token_ids):
    model = bumpy(kind, tie_word_embeddings=True)
    before = logits(model, token_ids)
    said = rotate(model, "residual", 0)
    assert said.untied
    assert "tied" in str(said)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert_same_logits(model, before, token_ids)


def test_a_tied_head_stays_tied_where_there_is_no_gain(token_ids):
    model = bumpy("Llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
    before = logits(model, token_ids)
    said = rotate(model, "residual", 0)
    assert not said.untied
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_logits(model, before, token_ids)


def largest_inputs(model, ids):
    """Of each linear layer, the largest of what enters the product."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, args, name=name: seen.__setitem__(name, float(args[0].abs().max()))
        )
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_massive_channel_is_spread_over_all(token_ids):
    """One channel of 1000 in the residual stream of 48, and one of the inputs of a down projection of 96."""
    model = bumpy("Llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 1000.0
        model.model.norm.weight[5] = 20.0
        model.model.layers[0].mlp.up_proj.weight[7] *= 1000.0
    before = largest_inputs(model, token_ids)
    assert before["lm_head"] > 100
    rotated = copy.deepcopy(model)
    rotate(rotated, "residual", 0)
    after = largest_inputs(rotated, token_ids)
    # after the norm a vector has length sqrt(48), and one that is all in one channel has at most sqrt(2) anywhere
    assert after["lm_head"] < 2.5
    assert after["model.layers.0.mlp.down_proj"] == pytest.approx(before["model.layers.0.mlp.down_proj"], rel=1e-3)
    rotate(model, "full", 0)
    spread = largest_inputs(model, token_ids)["model.layers.0.mlp.down_proj"]
    assert spread < 0.25 * before["model.layers.0.mlp.down_proj"]


def test_seeds_are_reproducible_and_the_global_rng_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (bumpy("Llama") for _ in range(3))
    said = [rotate(model, "full", seed) for model, seed in ((one, 0), (same, 0), (other, 1))]
    assert torch.equal(torch.get_rng_state(), before)
    assert said[0] == said[1]
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if a.dim() == 2 and "q_proj" not in name:
            assert not torch.allclose(a, c, atol=0.01), name


def test_16_bit_weights_are_rounded_once():
    """Rotating in float32 and rounding gives the same numbers, but for those that float32's own rounding moves over an
    edge: one in about 2^15 of bfloat16's."""
    model = bumpy("Llama").bfloat16()
    wide = copy.deepcopy(model).float()
    rotate(model, "full", 0)
    rotate(wide, "full", 0)
    for (name, parameter), other in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert (parameter != other.bfloat16()).float().mean() < 0.003, name


def test_none_is_nothing():
    model = bumpy("Llama")
    before = copy.deepcopy(model.state_dict())
    said = rotate(model, "none", 0)
    assert (said.stream, said.values, said.online, str(said)) == ((), (), (), "rotated: nothing")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_modes_come_back():
    model = bumpy("Llama").train()
    model.model.layers[0].eval()
    rotate(model, "full", 0)
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="rotate = 'some': allowed are none, residual, full"):
        rotate(bumpy("Llama"), "some", 0)
    with pytest.raises(ValueError, match="seed"):
        rotate(bumpy("Llama"), "full", -1)
    model = bumpy("Llama")
    rotate(model, "residual", 0)
    with pytest.raises(ConfigError, match="LlamaForCausalLM is rotated already"):
        rotate(model, "residual", 0)
    with pytest.raises(ConfigError, match="on the meta device; rotate a model whose weights are in this process"):
        rotate(bumpy("Llama").to("meta"), "full", 0)
    model = bumpy("Llama")
    flipproof.inject(model, BitFlipSpec(w_p_exp=1e-5))
    with pytest.raises(ConfigError, match="has faulty layers; rotate it first, then inject"):
        rotate(model, "full", 0)


@pytest.mark.parametrize("broken", ["off", "nan"])
def test_another_function_is_refused(broken, token_ids):
    model = bumpy("Llama")
    before = logits(model, token_ids)
    assert check(model, token_ids, before) == 0
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1 if broken == "off" else torch.nan
    with pytest.raises(ConfigError, match="LlamaForCausalLM is another function when it is rotated: its logits moved"):
        check(model, token_ids, before)


def test_plain_transformers_opens_what_is_rotated_offline(tmp_path, token_ids):
    model = bumpy("Llama", tie_word_embeddings=True)
    before = logits(model, token_ids)
    rotate(model, "residual", 0)
    model.save_pretrained(tmp_path / "model")
    torch.save((token_ids, before), tmp_path / "logits")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "ids, before = torch.load(sys.argv[2]); "
        "after = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(ids).logits; "
        "assert 'flipproof' not in sys.modules; "
        "print(float((after - before).abs().max()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model", tmp_path / "logits"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 1e-4


def test_blocks_are_where_they_were():
    model = bumpy("Llama")
    before = [type(block).__name__ for block in blocks(model)]
    rotate(model, "full", 0)
    assert [type(block).__name__ for block in blocks(model)] == before
