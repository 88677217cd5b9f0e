"""Whole checkpoints: what we write is loaded by transformers to the last bit, and what it writes is read."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.utils.match import match_name
from quantised import COMPRESSED, PLAIN_NF4, same, scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from flipproof.errors import ConfigError
from flipproof.formats.config import quantization_config, read_quantization_config
from flipproof.formats.pack import pack
from flipproof.formats.quantise import dequantise, quantise
from flipproof.formats.spec import FORMATS, format_of


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    """A directory with a model in bfloat16, of weights that all groups divide."""
    directory = tmp_path_factory.mktemp("plain")
    tiny_llama(hidden_size=128, intermediate_size=256).bfloat16().save_pretrained(directory)
    return directory


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()


def quantised_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def write(model, format, directory):
    """The model with all linear layers in ``format``, as a checkpoint; each becomes, in place, what is stored of it."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name, layer in quantised_layers(model).items():
        stored = quantise(layer.weight, format)
        layer.weight.data = dequantise(stored)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in pack(stored).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = quantization_config(format)
    (directory / "config.json").write_text(json.dumps(config))
    return tensors


def layers_of(tensors):
    """Tensors of a file by layer, and by their names in it."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition("_proj.")
        if rest:
            found.setdefault(f"{layer}_proj", {})[rest] = tensor
    return found


@pytest.mark.parametrize("name", COMPRESSED)
def test_transformers_loads_it_to_the_last_bit(plain, token_ids, tmp_path, name):
    ours = load(plain)
    tensors = write(ours, FORMATS[name], tmp_path)
    loaded = load(tmp_path, quantization_config=CompressedTensorsConfig(dequantize=True))
    for layer, linear in quantised_layers(ours).items():
        assert same(loaded.get_submodule(layer).weight.data, linear.weight.data)
    assert same(loaded(token_ids).logits, ours(token_ids).logits)
    read = read_quantization_config(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    assert (read.method, read.format, read.ignore) == ("compressed-tensors", FORMATS[name], ("lm_head",))
    for layer, parts in layers_of(tensors).items():
        assert same(dequantise(read.unpack(parts)), ours.get_submodule(layer).weight.data)


@pytest.mark.parametrize("name", [name for name in COMPRESSED if name != "int4-asym"])
def test_so_it_does_by_its_default(plain, token_ids, tmp_path, name):
    """Which keeps weights compressed until the first forward; it fails with zero points, compressed-tensors 0.20."""
    ours = load(plain)
    write(ours, FORMATS[name], tmp_path)
    loaded = load(tmp_path)
    assert same(loaded(token_ids).logits, ours(token_ids).logits)


def quant_states(model):
    return {n: m.weight for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "quant_state")}


@pytest.mark.parametrize("format", [FORMATS["nf4"], PLAIN_NF4])
def test_transformers_loads_nf4(plain, tmp_path, format):
    """Dequantised before any forward, after which bitsandbytes has rounded scales on a CPU."""
    ours = load(plain)
    write(ours, format, tmp_path)
    loaded = load(tmp_path, device_map="cpu")
    weights = quant_states(loaded)
    assert weights.keys() == quantised_layers(ours).keys()
    for layer, weight in weights.items():
        found = bnb.dequantize_4bit(weight.data, weight.quant_state)
        assert same(found, ours.get_submodule(layer).weight.data)


@pytest.mark.parametrize("double", [True, False])
def test_what_transformers_saves_as_nf4_is_read(plain, tmp_path, double):
    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = load(plain, quantization_config=asked, device_map="cpu")
    theirs.save_pretrained(tmp_path)
    read = read_quantization_config(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    assert (read.method, read.format) == ("bitsandbytes", FORMATS["nf4"] if double else PLAIN_NF4)
    assert read.ignore == ("lm_head",)
    layers = layers_of(load_file(tmp_path / "model.safetensors"))
    weights = quant_states(theirs)
    assert weights.keys() == layers.keys()
    for layer, parts in layers.items():
        expected = bnb.dequantize_4bit(weights[layer].data, weights[layer].quant_state)
        assert same(dequantise(read.unpack(parts)), expected)


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("group", [None, -1, 64])
def test_compressed_tensors_reads_its_own_words(name, group):
    if group is not None and not name.startswith("int"):
        return
    format = FORMATS[name] if group is None else format_of(name, group)
    ours = quantization_config(format, ["lm_head", "re:.*gate"])
    theirs = QuantizationConfig.model_validate(ours)
    expected = scheme(name, group)
    assert theirs.config_groups["group_0"].weights == expected.weights
    assert theirs.ignore == ["lm_head", "re:.*gate"]
    again = read_quantization_config(json.loads(theirs.model_dump_json()))
    assert (again.format, again.ignore, again.activations) == (format, ("lm_head", "re:.*gate"), False)


_LAYERS = ["lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate_proj"]


@pytest.mark.parametrize("ignore", [
    ["lm_head"], ["re:.*gate$"], ["re:.*gate"], ["model.layers.1.mlp.gate"], ["gate"], ["re:model.layers.1[.]", "head"],
])  # fmt: skip
def test_layers_that_are_left_out_are_those_of_compressed_tensors(ignore):
    read = read_quantization_config(quantization_config(FORMATS["int8"], ignore))
    for name in _LAYERS:
        assert read.quantises(name) == (not any(match_name(name, other) for other in ignore))


@pytest.mark.parametrize(("name", "ignore"), [("int8", "re:["), ("nf4", "*"), ("nf4", "(")])
def test_what_is_no_pattern_leaves_no_layer_out(name, ignore):
    read = read_quantization_config(quantization_config(FORMATS[name], [ignore]))
    assert all(read.quantises(layer) for layer in _LAYERS)


@pytest.mark.parametrize("ignore", [
    ["lm_head"], ["gate"], ["mlp.gate"], ["model.layers.1"], ["model.layers.1.mlp"], ["proj"], ["model.*gate"],
])  # fmt: skip
def test_layers_that_are_left_out_are_those_of_transformers(ignore):
    read = read_quantization_config(quantization_config(FORMATS["nf4"], ignore))
    for name in _LAYERS:
        assert read.quantises(name) == should_convert_module(name, ignore)


# What others write


def compressed(weights=None, **changes):
    config = quantization_config(FORMATS["int4"])
    config["config_groups"]["group_0"]["weights"] |= weights or {}
    for key, value in changes.items():
        (config if key in ("config_groups", "ignore", "kv_cache_scheme", "sparsity_config") else config["config_groups"]
         ["group_0"])[key] = value  # fmt: skip
    return config


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
STATIC = ACTIVATIONS | {"dynamic": False, "strategy": "tensor"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(("config", "group", "zero_plus", "ignore"), [
    (GPTQ, 128, 1, ("lm_head",)),
    (GPTQ | {"checkpoint_format": "gptq", "group_size": 32}, 32, 1, ("lm_head",)),
    (GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True}, 128, 0, ("lm_head",)),
    (GPTQ | {"format": "gptq_v2", "dynamic": {}}, 128, 0, ("lm_head",)),
    (GPTQ | {"group_size": -1, "lm_head": True}, None, 1, ()),
    (AWQ, 128, 0, ("lm_head",)),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, 64, 0, ("lm_head",)),
    (AWQ | {"modules_to_not_convert": ["visual"]}, 128, 0, ("lm_head", "visual")),
    (AWQ | {"modules_to_not_convert": None}, 128, 0, ("lm_head",)),
])  # fmt: skip
def test_gptq_and_awq_are_read(config, group, zero_plus, ignore):
    read = read_quantization_config(config)
    assert read.method == config["quant_method"]
    assert (read.format.ungrouped, read.format.group, read.format.zero_plus) == ("int4-asym", group, zero_plus)
    assert read.ignore == ignore


@pytest.mark.parametrize(("config", "inputs", "others"), [
    (compressed(), None, False), (compressed(input_activations=ACTIVATIONS), "int8", False),
    (compressed(input_activations=ACTIVATIONS | {"type": "float", "symmetric": True}), "fp8", False),
    (compressed(input_activations=STATIC), None, True),
    (compressed(input_activations=ACTIVATIONS | {"dynamic": "local"}), None, True),
    (compressed(input_activations=ACTIVATIONS | {"num_bits": 4}), None, True),
    (compressed(input_activations=ACTIVATIONS | {"symmetric": False}), None, True),
    (compressed(input_activations=ACTIVATIONS | {"strategy": "group", "group_size": 128}), None, True),
    (compressed(input_activations=ACTIVATIONS | {"strategy": "tensor"}), None, True),
    (compressed(input_activations=ACTIVATIONS | {"scale_dtype": "torch.uint8"}), None, True),
    (compressed(output_activations=ACTIVATIONS), None, True), (compressed(kv_cache_scheme=ACTIVATIONS), None, True),
    (compressed(input_activations=ACTIVATIONS, kv_cache_scheme=ACTIVATIONS), "int8", True),
])  # fmt: skip
def test_how_inputs_are_quantised_is_said_and_whether_anything_else_is(config, inputs, others):
    read = read_quantization_config(config)
    assert (read.inputs and read.inputs.name, read.activations) == (inputs, others)


@pytest.mark.parametrize(("preset", "inputs"), [
    ("W8A8", "int8"), ("W4A8", "int8"), ("FP8_DYNAMIC", "fp8"), ("W4AFP8", "fp8"), ("W4A16", None), ("NVFP4", None),
    ("MXFP8", None),
])  # fmt: skip
def test_inputs_are_read_of_what_compressed_tensors_writes(preset, inputs):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    written = json.loads(QuantizationConfig(config_groups={"group_0": scheme}).model_dump_json())
    read = read_quantization_config(written | {"format": infer_module_format(torch.nn.Linear, scheme).value})
    assert (read.inputs and read.inputs.name, read.activations) == (inputs, preset in ("NVFP4", "MXFP8"))


def test_plain_int8_and_the_format_beside_the_groups_are_read():
    config = quantization_config(FORMATS["int8"]) | {"format": "int-quantized"}
    config["config_groups"]["group_0"].pop("format")
    assert read_quantization_config(config).format == FORMATS["int8"]


@pytest.mark.parametrize(("config", "message"), [
    ({}, "quant_method = None is not supported; supported are compressed-tensors .* nf4, GPTQ and AWQ"),
    ({"quant_method": "fp8"}, "quant_method = 'fp8' is not supported"),
    ({"quant_method": ["gptq"]}, "quant_method = .* is not supported"),
    (compressed(config_groups={}), "config_groups = {} is not one group of layers that are quantised alike"),
    (compressed(config_groups={"W4A16": ["Linear"]}), "config_groups = .* is not one group"),
    (compressed(config_groups={"a": {}, "b": {}}), "config_groups = .* is not one group"),
    (compressed(targets=["re:.*q_proj"]), r"targets = .* is not \['Linear'\], all linear layers"),
    (compressed(format="marlin-24"), "format = 'marlin-24' is not supported for int4"),
    (compressed(weights={"symmetric": False}, format="int-quantized"), "format = 'int-quantized' is not .* int4-asym"),
    (compressed(weights={"num_bits": 3}), "weights = .* is not supported"),
    (compressed(weights={"strategy": "block"}), "weights = .* is not supported"),
    (compressed(weights={"strategy": ["group"]}), "weights = .* is not supported"),
    (compressed(weights={"num_bits": 8, "symmetric": False}), "weights = .* is not supported"),
    (compressed(weights={"actorder": "group"}), "actorder = 'group' is not supported"),
    (compressed(weights={"group_size": None}), "group_size = None is not supported"),
    (compressed(weights={"type": "float", "group_size": 16}), "group size 16 of mxfp4: 32, and nothing else"),
    (compressed(sparsity_config={"format": "sparse"}), "sparsity_config = .* is not supported"),
    (compressed(ignore="lm_head"), "ignore = 'lm_head': a list of names is allowed$"),
    (BNB | {"load_in_4bit": False, "load_in_8bit": True}, "load_in_4bit = False is not supported"),
    (BNB | {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4' is not supported"),
    (GPTQ | {"bits": 8}, "bits = 8 is not supported"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not supported"),
    (GPTQ | {"dynamic": {"-:.*gate.*": {}}}, "dynamic = .* is not supported"),
    (GPTQ | {"group_size": 0}, "group size 0 of int4-asym: a whole number from 1"),
    (GPTQ | {"group_size": "128"}, "group_size = '128' is not supported"),
    (AWQ | {"version": "gemv"}, "version = 'gemv' is not supported"),
    (AWQ | {"bits": 8}, "bits = 8 is not supported"),
    (AWQ | {"zero_point": False}, "zero_point = False is not supported"),
])  # fmt: skip
def test_others_are_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=f"^quantization_config: {message}"):
        read_quantization_config(config)


@pytest.mark.parametrize(("format", "inputs", "preset"), [
    ("int8", "int8", "W8A8"), ("int4", "int8", "W4A8"), ("fp8", "fp8", "FP8_DYNAMIC"), ("int4", "fp8", "W4AFP8"),
])  # fmt: skip
def test_inputs_are_written_as_compressed_tensors_does(format, inputs, preset):
    theirs = preset_name_to_scheme(preset, ["Linear"])
    ours = quantization_config(FORMATS[format], inputs=FORMATS[inputs])
    assert ours["format"] == infer_module_format(torch.nn.Linear, theirs).value
    group = QuantizationConfig.model_validate(ours).config_groups["group_0"]
    for key in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size"):
        assert getattr(group.input_activations, key) == getattr(theirs.input_activations, key)
        assert getattr(group.weights, key) == getattr(theirs.weights, key)
    assert read_quantization_config(ours).inputs == FORMATS[inputs]


@pytest.mark.parametrize("name", ["int4-asym", "nf4", "mxfp8", "nvfp4"])
def test_inputs_beside_other_weights_are_not_written(name):
    with pytest.raises(
        ConfigError, match=f"^no checkpoint holds {name} with int8 inputs; weights may be int8, int4, fp8$"
    ):
        quantization_config(FORMATS[name], inputs=FORMATS["int8"])


def test_no_config_says_e5m2():
    with pytest.raises(ConfigError, match=r"^no checkpoint holds fp8-e5m2; supported are "):
        quantization_config(FORMATS["fp8-e5m2"])


def test_nf4_in_other_blocks_is_in_no_checkpoint():
    with pytest.raises(ConfigError, match=r"^no checkpoint holds nf4-g32: blocks of nf4 are of 64 there$"):
        quantization_config(format_of("nf4-g32"))
