"""Models that are quantised while they are read, and checkpoints that are."""

import pytest
import torch
from quantised_models import checkpoint, quantised_inputs, say
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.formats.config import quantization_config
from flipproof.formats.inputs import coded
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import FORMATS, format_of
from flipproof.models import quantised as quantised_module
from flipproof.models.build import build_model, check_length, with_trainable_weights
from flipproof.models.load import byte_tokenizer, load_model, skeleton
from flipproof.models.quantised import quantised_layers
from flipproof.world import ALONE, World

LAYOUTS = [
    ("compressed-tensors", "int8", None),
    ("compressed-tensors", "int4", 32),
    ("compressed-tensors", "int4-asym", None),
    ("compressed-tensors", "fp8", None),
    ("compressed-tensors", "mxfp4", None),
    ("compressed-tensors", "nvfp4", None),
    ("bitsandbytes", "nf4", None),
    ("gptq", "int4-asym", None),
    ("awq", "int4-asym", 64),
]


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama(hidden_size=128, intermediate_size=256).bfloat16().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def settings(directory, **tables):
    return load_config([], {**tables, "model": {"hf_model_path": str(directory), **tables.get("model", {})}})


def loaded(directory, dtype=None, **keys):
    return load_model(settings(directory, model=keys).model, byte_tokenizer(), dtype, 0)


def dequantised(model, stored):
    """The model, of plain weights that what is stored stands for."""
    for name, own in stored.items():
        model.get_submodule(name).weight.data = dequantise(own, torch.bfloat16)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_each_layer_is_what_quantise_makes_of_it(base, model, token_ids, name):
    read = loaded(base, quantize=name)
    layers = quantised_layers(read)
    assert len(layers) == 14
    stored = {layer: quantise(model.get_submodule(layer).weight, name) for layer in layers}
    for layer, own in stored.items():
        assert layers[layer].format == FORMATS[name]
        for operand, tensor in layers[layer].stored().operands.items():
            assert torch.equal(tensor, own.operands[operand])
    assert torch.equal(read(token_ids).logits, dequantised(model, stored)(token_ids).logits)
    assert type(read.lm_head) is nn.Linear


def test_there_is_one_plain_layer_at_a_time(base, monkeypatch):
    read, quantise_one = [], quantised_module.quantise

    def spy(weight, format):
        model = seen[0]
        linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        read.append([name for name, module in linear.items() if not module.weight.is_meta])
        return quantise_one(weight, format)

    seen, unread = [], quantised_module.unread_model
    monkeypatch.setattr(quantised_module, "quantise", spy)
    monkeypatch.setattr(quantised_module, "unread_model", lambda *how: seen.append(unread(*how)) or seen[0])
    loaded(base, quantize="nf4")
    assert read == [[]] * 14


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize(("method", "format", "group"), LAYOUTS)
def test_a_quantised_checkpoint_is_kept_as_it_is(model, token_ids, tmp_path, caplog, method, format, group, dtype):
    stored = checkpoint(model, tmp_path, method, format, group)
    with caplog.at_level("INFO", "flipproof"):
        read = loaded(tmp_path, dtype)
    assert f"14 of its layers are quantised ({format_of(format, group).name}), and stay so" in caplog.text
    for layer, own in quantised_layers(read).items():
        for operand, tensor in own.stored().operands.items():
            assert torch.equal(tensor, stored[layer].operands[operand])
    expected = dequantised(model, stored)
    if dtype:
        assert read.lm_head.weight.dtype == torch.float32
        torch.testing.assert_close(read(token_ids).logits, expected.float()(token_ids).logits, atol=0.02, rtol=0.02)
    else:
        assert torch.equal(read(token_ids).logits, expected(token_ids).logits)


@pytest.mark.parametrize(("format", "type"), [("int8", "int"), ("int4", "int"), ("fp8", "float"), ("int4", "float")])
def test_inputs_that_a_checkpoint_quantises_are_quantised(model, token_ids, tmp_path, caplog, format, type):
    """As compressed-tensors does, to the last bit of the logits."""
    quantised_inputs(model, tmp_path, format, type=type)
    with caplog.at_level("INFO", "flipproof"):
        read = loaded(tmp_path)
    inputs = {"int": "int8", "float": "fp8"}[type]
    assert f"14 of its layers are quantised ({format}, their inputs {inputs}), and stay so" in caplog.text
    assert "where it is served" not in caplog.text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert torch.equal(read(token_ids).logits, theirs(token_ids).logits)
    again = loaded(tmp_path, quantize_inputs=inputs)
    assert torch.equal(again(token_ids).logits, theirs(token_ids).logits)
    for layer in quantised_layers(read).values():
        layer.inputs = None
    assert not torch.equal(read(token_ids).logits, theirs(token_ids).logits)


@pytest.mark.parametrize(("name", "inputs"), [("int8", "int8"), ("fp8", "fp8"), ("nf4", "int8")])
def test_inputs_are_quantised_as_asked(base, token_ids, name, inputs):
    read, plain = loaded(base, quantize=name, quantize_inputs=inputs), loaded(base, quantize=name)
    expected = plain(token_ids).logits
    assert {layer.inputs for layer in quantised_layers(read).values()} == {FORMATS[inputs]}
    assert not torch.equal(read(token_ids).logits, expected)
    for layer in quantised_layers(plain).values():
        layer.register_forward_pre_hook(lambda _, args: (coded(args[0], FORMATS[inputs]),))
    assert torch.equal(read(token_ids).logits, plain(token_ids).logits)
    config = settings(base, model={"quantize": name, "quantize_inputs": inputs}).model
    layers = quantised_layers(skeleton(config, byte_tokenizer(), "bfloat16")).values()
    assert {layer.inputs for layer in layers} == {FORMATS[inputs]}


def test_what_is_not_known_of_a_checkpoint_s_activations_is_said(model, tmp_path, caplog):
    quantised_inputs(model, tmp_path, "int8", dynamic=False, strategy="tensor")
    read = loaded(tmp_path)
    assert "its activations are quantised in another way, too, where it is served; here they are not" in caplog.text
    assert {layer.inputs for layer in quantised_layers(read).values()} == {None}


def test_what_bitsandbytes_and_peft_train_is_what_we_train(base, model, token_ids):
    """QLoRA, by hand: PEFT on the dequantised model, a step of SGD each."""
    peft = pytest.importorskip("peft")
    mine = loaded(base, "float32", quantize="nf4")
    plain = dequantised(model, {n: m.stored() for n, m in quantised_layers(mine).items()}).float()
    for name, layer in quantised_layers(mine).items():
        plain.get_submodule(name).weight.data = layer.weight
    flipproof.inject(mine, BitFlipSpec(), LoraSpec(r=4, lora_alpha=8))
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    losses = []
    for name, layer in flipproof.faulty_layers(mine).items():
        other = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(layer.lora_A)
    for trained in (mine, theirs):
        weights = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=1.0)
        for _ in range(3):
            loss = trained(token_ids, labels=token_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    assert losses[2] < losses[0]


def test_a_model_on_meta_has_the_layers_too(base):
    model = skeleton(settings(base, model={"quantize": "nvfp4"}).model, byte_tokenizer(), "bfloat16")
    layers = quantised_layers(model)
    assert len(layers) == 14
    assert all(tensor.is_meta for layer in layers.values() for tensor in layer.buffers())
    flipproof.inject(model, BitFlipSpec(w_code_p=0.01), LoraSpec(r=2))


# --- refusals


def refused(action, *args, **how):
    with pytest.raises(ConfigError) as error:
        action(*args, **how)
    assert len(error.value.problems) == len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_groups_that_do_not_divide_name_the_layer(tiny_llama, tmp_path):
    tiny_llama(hidden_size=96).save_pretrained(tmp_path)
    said = "model.layers.0.self_attn.q_proj: int4 has groups of 128 in-features, and a weight of shape (96, 96) has 96"
    assert f"{said}: a multiple of the group size is allowed, or another size: int4-gN" in refused(
        loaded, tmp_path, quantize="int4"
    )
    config = settings(tmp_path, model={"quantize": "int4"}).model
    assert said in refused(skeleton, config, byte_tokenizer(), None)


def test_groups_of_another_size_are_in_the_name(tiny_llama, tmp_path):
    """As compressed-tensors has them when it is told the size."""
    tiny_llama(hidden_size=96).bfloat16().save_pretrained(tmp_path)
    plain = loaded(tmp_path).model.layers[0].mlp.up_proj.weight
    layer = loaded(tmp_path, quantize="int4-g32").model.layers[0].mlp.up_proj
    assert (layer.format.name, layer.format.group) == ("int4-g32", 32)
    assert torch.equal(layer.weight, dequantise(quantise(plain, format_of("int4", 32))))


def test_a_missing_scale_names_the_layer(model, tmp_path):
    checkpoint(model, tmp_path, "compressed-tensors", "int4", 32)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj: weight_scale is missing" in refused(loaded, tmp_path)


def test_a_float8_weight_without_a_scale_is_not_taken_for_numbers(model, tmp_path):
    checkpoint(model, tmp_path, "compressed-tensors", "fp8")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj: weight_scale is missing" in refused(loaded, tmp_path)


def test_a_checkpoint_of_another_group_size_is_refused(model, tmp_path):
    checkpoint(model, tmp_path, "compressed-tensors", "int4", 32)
    say(tmp_path, quantization_config(format_of("int4", 64)))
    assert ".down_proj: scale, an operand of int4-g64, is torch.bfloat16 of shape (128, 8)" in refused(loaded, tmp_path)


def test_a_quantised_checkpoint_is_not_quantised_again(model, tmp_path):
    checkpoint(model, tmp_path, "bitsandbytes", "nf4")
    said = refused(loaded, tmp_path, quantize="int8")
    assert "model.quantize = 'int8'" in said
    assert "is quantised already (bitsandbytes); leave it out" in said


def test_inputs_are_quantised_where_weights_are(base, model, tmp_path):
    said = "model.quantize_inputs = 'int8': the weights are plain; quantise them, too (model.quantize), or leave it out"
    assert said in refused(loaded, base, quantize_inputs="int8")
    config = settings(base, model={"quantize_inputs": "int8"})
    for build in (lambda: skeleton(config.model, byte_tokenizer(), None), lambda: check_length(config, None)):
        assert said in refused(build)
    quantised_inputs(model, tmp_path, "int8")
    problem = refused(loaded, tmp_path, quantize_inputs="fp8")
    assert "model.quantize_inputs = 'fp8': the inputs of model.hf_model_path" in problem
    assert "are int8 where it is served; leave it out" in problem


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"quantize_inputs": "int4"}, "model.quantize_inputs = 'int4': 'int8', 'fp8' or None is allowed"),
        ({"quantize_inputs": "fp8", "init": "random"}, "quantize_inputs = 'fp8': init = 'random' has no weights to"),
        ({"quantize": "int3"}, "model.quantize = 'int3': int8, int4, "),
        ({"quantize": "nf4-g7"}, "is allowed (group size 7 of nf4: an even number from 2 is allowed)"),
        ({"quantize": "mxfp4-g64"}, "is allowed (group size 64 of mxfp4: 32, and nothing else, is allowed)"),
        ({"quantize": "nf4", "init": "random"}, "init = 'random' has no weights to quantise"),
    ],
)
def test_keys_that_say_nothing_are_refused(base, keys, problem):
    assert problem in refused(settings, base, model=keys)


def test_several_processes_are_refused_among_which_fsdp_would_spread_the_weights(base, model, tmp_path):
    by_fsdp = {"sharding_strategy": "shard_grad_op"}
    checkpoint(model, tmp_path / "gptq", "gptq", "int4-asym")
    world = World(0, 2, torch.device("cpu"))
    for name, config in (
        ("nf4", settings(base, model={"quantize": "nf4"}, parallelism=by_fsdp)),
        ("int4-asym", settings(tmp_path / "gptq", parallelism=by_fsdp)),
    ):
        (line,) = refused(build_model, config, byte_tokenizer(), world).splitlines()
        assert (
            f"parallelism.sharding_strategy = 'shard_grad_op' over 2 processes, 2 on a node: the weights are {name},"
            in (line)
        )
        assert "no_shard, which gives all to each, is allowed" in line


def test_quantised_weights_neither_train_nor_compile(base, model, tmp_path):
    config = settings(base, model={"quantize": "nf4"})
    assert "lora.r = 0: the weights are nf4, which do not train" in refused(with_trainable_weights, config)
    config = settings(base, model={"quantize": "nf4"}, lora={"r": 2}, checkpoint={"export_merged": True})
    assert "checkpoint.export_merged = True: the weights are nf4" in refused(with_trainable_weights, config)
    config = settings(base, model={"quantize": "nf4"}, training={"compile": True})
    assert "layers with quantised weights are not compiled" in refused(build_model, config, byte_tokenizer(), ALONE)
    checkpoint(model, tmp_path, "gptq", "int4-asym")
    assert "lora.r = 0: the weights are int4-asym" in refused(with_trainable_weights, settings(tmp_path))


def test_formats_of_inputs_that_a_config_may_say_are_known():
    from typing import get_args

    from flipproof.config.schema import QuantizeInputs

    assert set(get_args(QuantizeInputs)) <= FORMATS.keys()


def test_the_layers_are_ours(base):
    layers = quantised_layers(loaded(base, quantize="int8")).values()
    assert {type(layer) for layer in layers} == {QuantisedLinear}
