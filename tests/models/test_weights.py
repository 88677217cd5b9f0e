"""A model directory, read as several processes read it and as one does, against ``from_pretrained``."""

import json
import shutil

import pytest
import torch
import transformers
from reading import assert_equal_models, in_one_process, materialised
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.models.weights import own_dtype

UP, NORM, HEAD, TABLE = (
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.embed_tokens.weight",
)


@pytest.fixture
def directory(tiny_llama, tmp_path):
    """A model in bfloat16, its tensors and its config as they are on disk, and what changes them."""

    class Directory:
        path = tmp_path / "a model [of] = ours #1 é"
        config = ModelConfig(hf_model_path=str(path))

        def make(self, dtype=torch.bfloat16, size="50GB", **changes):
            tiny_llama(**changes).to(dtype).save_pretrained(self.path, max_shard_size=size)
            return load_file(self.path / "model.safetensors") if size == "50GB" else {}

        def write(self, tensors, name="model.safetensors"):
            (self.path / name).parent.mkdir(exist_ok=True)
            save_file(tensors, self.path / name, metadata={"format": "pt"})

        def say(self, name="config.json", drop=(), **keys):
            path = self.path / name
            config = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({key: config[key] for key in config if key not in drop} | keys))

        def assert_same(self, asked=None, expected=None):
            if expected is None:
                expected = AutoModelForCausalLM.from_pretrained(self.path, dtype=asked or "auto")
            for model in (materialised(self.config, asked), in_one_process(self.config) if asked is None else None):
                if model is not None:
                    assert_equal_models(model, expected)
                    assert model.config.to_dict() == expected.config.to_dict()
                    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
                    head, table = model.get_output_embeddings(), model.get_input_embeddings()
                    theirs = expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
                    assert (head.weight is table.weight) == theirs
            assert own_dtype(str(self.path)) == AutoModelForCausalLM.from_pretrained(self.path).dtype
            return expected

    return Directory()


def noise(tensors):
    return {name: torch.full_like(tensor, 7.0) for name, tensor in tensors.items()}


# -- which dtype -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("said", ["dtype", "torch_dtype", "nothing", "null", "another"])
def test_the_dtype_is_the_config_s_or_the_weights(directory, dtype, said):
    directory.make(dtype)
    name = str(dtype).removeprefix("torch.")
    keys = {"dtype": {"dtype": name}, "torch_dtype": {"torch_dtype": name}, "null": {"dtype": None}}.get(said, {})
    if said == "another":
        keys = {"dtype": "float32"}
    directory.say(drop=("dtype", "torch_dtype"), **keys)
    assert directory.assert_same().dtype == (torch.float32 if said == "another" else dtype)


@pytest.mark.parametrize("said", [{}, {"dtype": "bfloat16"}])
def test_of_a_mixed_checkpoint_all_has_one_dtype(directory, said):
    """Norms in float32, as some are published; without a word in the config, the first tensor counts."""
    tensors = directory.make()
    directory.write({name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()})
    directory.say(drop=("dtype",), **said)
    directory.assert_same()
    directory.assert_same("float32")


@pytest.mark.parametrize("asked", [None, "float16", "float32"])
def test_what_transformers_keeps_in_float32_stays_so(directory, monkeypatch, asked):
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["layernorm", "q_*.weight"])
    directory.make()
    expected = AutoModelForCausalLM.from_pretrained(directory.path, dtype=asked or "auto")
    assert len({parameter.dtype for parameter in expected.parameters()}) == (1 if asked == "float32" else 2)
    theirs = dict(expected.named_parameters())
    for name, parameter in materialised(directory.config, asked).named_parameters():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name


# -- which files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002.safetensors",
        "optimizer.safetensors",
        "adapter_model.safetensors",
        "original/model.safetensors",
        "a.safetensors",
        "z.safetensors",
    ],
)
def test_files_that_are_not_the_model_are_left_alone(directory, name):
    tensors = directory.make()
    directory.write(noise(tensors), name)
    assert not (directory.assert_same().model.norm.weight == 7).any()


def test_of_a_single_file_and_an_index_the_file_counts(directory):
    directory.make(size="20KB")
    shards = {name: tensor for file in directory.path.glob("model-*") for name, tensor in load_file(file).items()}
    directory.assert_same()
    directory.write(noise(shards))
    assert (directory.assert_same().model.norm.weight == 7).all()


def test_a_tensor_in_several_files_is_the_last_one_s_and_the_index_says_only_which_files(directory):
    tensors = directory.make()
    (directory.path / "model.safetensors").unlink()
    directory.write(tensors, "b.safetensors")
    directory.write(noise({NORM: tensors[NORM]}), "c.safetensors")
    directory.write(noise(tensors), "d.safetensors")
    where = dict.fromkeys(tensors, "b.safetensors") | {UP: "c.safetensors"}
    (directory.path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model = directory.assert_same()
    assert (model.model.norm.weight == 7).all()
    assert not (model.model.layers[1].mlp.up_proj.weight == 7).any()


def test_an_adapter_beside_the_model_is_left_alone_and_said(directory, caplog):
    pytest.importorskip("peft")
    directory.make()
    expected = AutoModelForCausalLM.from_pretrained(directory.path)
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    directory.say("adapter_config.json", **lora)
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight" for i in range(2) for m in "AB"]
    directory.write({n: torch.ones((2, 32) if "_A" in n else (32, 2)) for n in names}, "adapter_model.safetensors")
    mixed = AutoModelForCausalLM.from_pretrained(directory.path)
    assert any("lora" in name for name, _ in mixed.named_parameters())  # transformers would
    for model in (materialised(directory.config), in_one_process(directory.config)):
        assert_equal_models(model, expected)
    assert all("holds a PEFT adapter too, which is left alone; --adapter names one" in line for line in caplog.messages)


def test_a_file_that_the_config_names_is_the_one(directory):
    tensors = directory.make()
    directory.write(noise(tensors), "mine.safetensors")
    directory.say(transformers_weights="mine.safetensors")
    assert (directory.assert_same().model.norm.weight == 7).all()


def test_older_files_are_for_one_process(directory):
    tensors = directory.make()
    (directory.path / "model.safetensors").unlink()
    torch.save(tensors, directory.path / "pytorch_model.bin")
    assert_equal_models(in_one_process(directory.config), AutoModelForCausalLM.from_pretrained(directory.path))
    with pytest.raises(
        ConfigError, match=r"weights are in pytorch_model\.bin, and several processes read safetensors; "
    ):
        materialised(directory.config)
    assert own_dtype(str(directory.path)) == torch.bfloat16


# -- which tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["both", "head", "table", "different", "neither"])
def test_tied_weights_are_tied_as_the_files_have_them(directory, stored):
    tensors = directory.make(tie_word_embeddings=True)
    table = tensors.pop(TABLE)
    tensors |= {
        "both": {TABLE: table, HEAD: table.clone()},
        "head": {HEAD: table},
        "table": {TABLE: table},
        "different": {TABLE: table, HEAD: table + 1},
        "neither": {},
    }[stored]
    directory.write(tensors)
    if stored == "neither":
        for read in (materialised, in_one_process):
            with pytest.raises(ConfigError, match=r"not the weights of a LlamaForCausalLM: .* is missing"):
                read(directory.config)
        return
    model = directory.assert_same()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (stored != "different")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_with_and_without_the_base_model_s_prefix(tmp_path, prefix):
    """Published GPT-2s have them without."""
    config = transformers.GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name.replace("transformer.", prefix): tensor for name, tensor in tensors.items()}
    save_file(tensors | {f"{prefix}h.0.attn.bias": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    for read in (materialised, in_one_process):
        assert_equal_models(read(ModelConfig(hf_model_path=str(tmp_path))), expected)


def fp8(tensors):
    """The matrices of the blocks in float8, with a scale each."""
    made = {}
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            scale = weight.float().abs().max() / 448
            made |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
        else:
            made[name] = weight
    return made


def test_quantised_weights_are_never_taken_for_numbers(directory, caplog):
    tensors = directory.make()
    directory.write(fp8(tensors))
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    directory.say(quantization_config=method)
    with pytest.raises(ConfigError, match=r"its weights are quantised \(fp8\), and several processes read plain ones"):
        materialised(directory.config)
    with caplog.at_level("INFO", "flipproof"):
        model = in_one_process(directory.config)
    assert any("its weights are quantised, and read as bfloat16" in line for line in caplog.messages)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    # half a step of float8 with 3 bits of mantissa is 1/16 of a value, or of the least normal one
    bound = tensors[UP].float().abs() / 16 + tensors[UP].float().abs().max() / 448 * 2**-9
    assert ((weight.float() - tensors[UP].float()).abs() <= bound * 1.01).all()


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "made-up"])
def test_quantised_weights_that_cannot_be_read_are_refused_in_a_line(directory, method):
    directory.make()
    bits = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4, "group_size": 32}
    directory.say(quantization_config={"quant_method": method} | bits)
    if method == "made-up":  # transformers says so and reads plain weights
        directory.assert_same()
        return
    # its own package quantises plain weights while it loads them
    for read in (materialised, in_one_process) if method != "bitsandbytes" else (materialised,):
        with pytest.raises(ConfigError) as error:
            read(directory.config)
        assert len(error.value.problems) == len(str(error.value).splitlines()) == 1


# -- which settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 3]},
        {
            "temperature": 0.6,
            "top_p": 0.9,
            "do_sample": False,
        },  # which transformers warns of, and published models have
        {"max_new_tokens": 7, "some_key_of_its_own": [1, {"a": 2}]},
        None,
    ],
)
def test_generation_settings_are_the_directory_s(directory, settings):
    directory.make()
    path = directory.path / "generation_config.json"
    path.unlink()
    if settings is not None:
        path.write_text(json.dumps(settings))
    read = directory.assert_same().generation_config.to_dict()
    assert all(read[key] == value for key, value in (settings or {}).items())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_home_is_expanded(directory, monkeypatch, name):
    directory.make()
    monkeypatch.setenv("HOME", str(directory.path.parent))
    config = ModelConfig(hf_model_path=f"~/{directory.path.name}")
    for read in (materialised, in_one_process):
        assert_equal_models(read(config), AutoModelForCausalLM.from_pretrained(directory.path))
    shutil.rmtree(directory.path / name, ignore_errors=True)
    (directory.path / name).unlink()
    for read in (materialised, in_one_process):
        with pytest.raises(ConfigError, match=rf"'~/a model .*no (file named )?{name}"):
            read(config)


def test_all_parameters_are_read_and_not_drawn(directory):
    """A tensor left out would have its initial value; none of these is near one."""
    tensors = directory.make()
    directory.write(noise(tensors))
    for read in (materialised, in_one_process):
        assert all((parameter == 7).all() for parameter in read(directory.config).parameters())


def test_modules_that_share_a_module_are_read_once(tmp_path):
    shape = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = transformers.OPTForCausalLM(transformers.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=16))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(materialised(ModelConfig(hf_model_path=str(tmp_path))), expected)
