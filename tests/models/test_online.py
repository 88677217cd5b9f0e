import copy
import json
from functools import partial

import pytest
import torch
from bumpy import bumpy
from reading import assert_equal_models, in_one_process, materialised
from rounding import assert_same_function
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import ModelConfig, load_config
from flipproof.errors import ConfigError
from flipproof.measure.evaluate import evaluate
from flipproof.models import online, recompute
from flipproof.models.load import byte_tokenizer, load_model, save_model
from flipproof.models.parallelize import blocks
from flipproof.models.rotate import rotate

DOWN = "model.layers.{}.mlp.down_proj"


def dense(n, seed):
    """T by its definition."""
    return torch.kron(*online._factors(n, seed))


def turned(kind="Llama", seed=3, **more):
    model = bumpy(kind, **more)
    rotate(model, "full", seed)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def keep(into, name):
    return lambda _module, args: into.__setitem__(name, args[0].detach())


# -- the operator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 64, 96, 1536])
def test_the_weight_takes_back_exactly_what_the_input_is_multiplied_by(n):
    t, inverse = dense(n, 5), online.inverse(n, 5)
    back = torch.kron(inverse.left, inverse.right)
    one = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(t @ back.T, one, rtol=0, atol=1e-12)
    # nearly orthogonal: rounded to bfloat16's 8 bits, so by 2^-8 of an entry at most
    assert (t.T @ t - one).abs().max() < 2**-7
    assert t.abs().max() < 2 / n**0.5
    assert not torch.equal(t, dense(n, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_factors_are_the_same_numbers_in_every_dtype(dtype):
    for placed, factor in zip(online._placed(96, 1, dtype, torch.device("cpu")), online._factors(96, 1), strict=True):
        assert placed.dtype == dtype
        assert torch.equal(placed.double(), factor)


def test_the_operator_is_the_product_with_its_gradient():
    x = torch.randn(2, 3, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    hook = online.RotateInput(2)
    y, more = hook(nn.Identity(), (x, "more"))
    assert more == "more"
    torch.testing.assert_close(y, x @ dense(96, 2), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: hook(None, (x,))[0], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which would not touch an addition either
        assert hook(None, (x.detach().float(),))[0].dtype == torch.float32
    torch.library.opcheck(torch.ops.flipproof.rotate_online.default, (x.detach(), 2, True))


def test_what_has_no_small_factors_is_not_rotated():
    assert online.can_rotate(28672)
    assert online.can_rotate(3 * 1009 * 64) is False
    model = bumpy("Llama", intermediate_size=1031)
    with pytest.raises(ConfigError, match=r"'full': LlamaForCausalLM has no nn\.Linear as down projection"):
        rotate(model, "full", 0)


# -- in a model --------------------------------------------------------------------------------------------------------


def test_bits_flip_in_the_rotated_input(token_ids):
    """What enters flip(X) of a down projection is the product of activations times T."""
    plain, model = bumpy("Llama"), turned()
    flipproof.inject(model, BitFlipSpec(x_p_frac=0.01))
    flipped, seen = {}, {}

    def hook(name, x, _draw):
        flipped[name] = x.clone()
        return x

    flipproof.faulty_layers(model)[DOWN.format(0)].state.flip_hook = hook
    plain.get_submodule(DOWN.format(0)).register_forward_pre_hook(keep(seen, "x"))
    logits(plain, token_ids)
    logits(model, token_ids)
    wanted = (seen["x"].double() @ dense(96, 3)).float()
    torch.testing.assert_close(flipped[DOWN.format(0) + "/x"], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_injecting_merging_and_removing_keep_the_rotation(token_ids):
    model = turned()
    before = logits(model, token_ids)
    spec = BitFlipSpec(x_p_frac=0.5)
    for back in (flipproof.remove, flipproof.merge):
        flipproof.inject(model, spec, LoraSpec(r=2))
        with flipproof.faults(model, flips=False, guard=False):
            assert_same_function(logits(model, token_ids), lambda: before, [])
        back(model)
        assert torch.equal(logits(model, token_ids), before)


def test_copies_and_devices_keep_it_and_no_key_is_added(token_ids):
    plain, model = bumpy("Llama"), turned()
    before = logits(model, token_ids)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert dict(model.named_buffers()).keys() == dict(plain.named_buffers()).keys()
    assert torch.equal(logits(copy.deepcopy(model), token_ids), before)
    state = model.state_dict()
    there = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    there.load_state_dict(state)
    there.model.rotary_emb = model.model.rotary_emb  # whose buffers to_empty loses
    assert torch.equal(logits(there, token_ids), before)
    half, exact = logits(copy.deepcopy(model).bfloat16(), token_ids), logits(bumpy("Llama").bfloat16(), token_ids)
    assert (half - exact).abs().max() < 0.05 * before.abs().max()


def gradients(model, ids, keep=None, compiled=False):
    model = copy.deepcopy(model)
    flipproof.inject(model, BitFlipSpec(w_p_frac=1e-9), LoraSpec(r=2))
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, y: y.requires_grad_())
    if keep is not None:
        recompute.prepare(blocks(model), compiled)
        for block in blocks(model):
            recompute.keep(block, keep)
    loss = model(ids, use_cache=False).logits.square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("kept", ["nothing", "products"])
def test_checkpointed_blocks_have_the_same_gradients(kept, token_ids):
    model = turned()
    got, wanted = gradients(model, token_ids, kept), gradients(model, token_ids)
    assert len(wanted) == 2 * 7 * 2 + 1
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


@pytest.fixture
def guards_alone(monkeypatch):
    """torch.compile without its slow half: what it looks at to tell what it has compiled is what matters here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    recompute._recomputing.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    recompute._recomputing.cache_clear()


@pytest.mark.usefixtures("guards_alone")
def test_compiled_blocks_tell_models_apart(token_ids):
    """Blocks of one class are compiled once, and torch.compile looks at no hooks: a plain model, a rotated one, another
    seed, and the first again must each give what they give when they are not compiled. Layers of a model share a graph,
    and so do models that are rotated alike."""
    models = [bumpy("Llama"), turned(), turned(seed=4), turned(), bumpy("Llama")]
    before = [logits(model, token_ids) for model in models]
    graphs = []
    for model, wanted in zip(models, before, strict=True):
        recompute.prepare(blocks(model), compiled=True)
        torch.testing.assert_close(logits(model, token_ids), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        graphs.append(counters["stats"]["unique_graphs"])
    each = graphs[0]
    assert graphs == [each, 2 * each, 3 * each, 3 * each, 3 * each]


# -- in a directory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "OPT"])
def test_a_directory_opens_with_it(kind, tmp_path, token_ids):
    model = turned(kind)
    before = logits(model, token_ids)
    model.save_pretrained(tmp_path / "one")
    config = ModelConfig(hf_model_path=str(tmp_path / "one"))
    opened = in_one_process(config)
    assert type(opened) is type(model)
    assert opened.config.model_type == model.config.model_type
    assert torch.equal(logits(opened, token_ids), before)
    assert_equal_models(materialised(config), opened)
    save_model(opened, tmp_path / "two", byte_tokenizer())
    assert json.loads((tmp_path / "one/config.json").read_text()) == json.loads(
        (tmp_path / "two/config.json").read_text()
    )
    again = in_one_process(ModelConfig(hf_model_path=str(tmp_path / "two")))
    assert torch.equal(logits(again, token_ids), before)


def test_plain_transformers_refuses_it(tmp_path):
    turned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="flipproof_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match="flipproof_silu"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_arms_are_those_of_the_model_that_was_rotated(tmp_path, capfd):
    turned().save_pretrained(tmp_path / "turned")
    bumpy("Llama").save_pretrained(tmp_path / "plain")
    arms = {}
    for name in ("turned", "plain"):
        byte_tokenizer().save_pretrained(tmp_path / name)
        settings = {
            "model": {"hf_model_path": str(tmp_path / name)},
            "data": {"eval_source": "stdlib"},
            "training": {"seq_len": 32, "local_batch_size": 8},
            "eval": {"trials": 2, "num_samples": 16},
            "bitflip": {"x_p_frac": 0.01},
        }
        arms[name] = evaluate(load_config([], settings))
    assert arms["turned"]["clean"].loss == pytest.approx(arms["plain"]["clean"].loss, rel=1e-4)
    assert arms["turned"]["flipped"].loss != pytest.approx(arms["plain"]["flipped"].loss, rel=1e-4)
    assert "flipproof_llama" not in capfd.readouterr().err  # nobody is told of a type that is not the model's


def test_from_scratch_it_is_the_same_architecture(tmp_path):
    turned().save_pretrained(tmp_path)
    model = load_model(ModelConfig(hf_model_path=str(tmp_path), init="random"), byte_tokenizer(), None, 0)
    hooks = [list(model.get_submodule(DOWN.format(i))._forward_pre_hooks.values()) for i in range(2)]
    assert all(len(found) == 1 and isinstance(found[0], online.RotateInput) for found in hooks)


def test_a_list_of_another_model_is_refused(tmp_path):
    turned().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def refused(entry, words):
        path.write_text(json.dumps(config | {"flipproof_rotation": config["flipproof_rotation"] | entry}))
        with pytest.raises(ConfigError, match=words):
            in_one_process(ModelConfig(hf_model_path=str(tmp_path)))

    refused({"online": [DOWN.format(9)]}, "flipproof_rotation lists 'model.layers.9.mlp.down_proj', which is no linear")
    refused({"online": 3}, "flipproof_rotation")
    refused({"seed": "0"}, "flipproof_rotation")
    path.write_text(json.dumps({key: config[key] for key in config if key != "flipproof_rotation"}))
    with pytest.raises(ConfigError, match="flipproof_rotation is missing"):
        in_one_process(ModelConfig(hf_model_path=str(tmp_path)))
