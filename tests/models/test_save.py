import json

import pytest
import torch
import transformers
from reading import assert_equal_models, in_one_process, materialised
from rounding import assert_same_function
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import ModelConfig
from flipproof.models.load import byte_tokenizer, load_tokenizer, save_model
from flipproof.world import World


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_opens_the_merged_model(tiny_llama, tmp_path, token_ids, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.01), LoraSpec(r=2, lora_alpha=6))
    for layer in flipproof.faulty_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path, byte_tokenizer())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in name for name in opened.state_dict())
    with torch.no_grad():
        got = opened(token_ids).logits
        with flipproof.faults(model.eval(), flips=False, guard=False):
            assert_same_function(got, lambda: model(token_ids).logits, model.parameters())
        plain = tiny_llama(tie_word_embeddings=tied).eval()(token_ids).logits
        assert not torch.allclose(got, plain, atol=1e-2)
    # the model stays as it is
    assert any(isinstance(module, flipproof.FaultyLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path)("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]


# -- what was read is written back, by several processes as by one -----------------------------------------------------


class OneOfTwo(World):
    """The first of two processes, which holds all and waits for nobody; a small model's only file is its."""

    def least(self, value):
        return value

    def once(self, action):
        return action()

    def wait(self):
        pass


def llama(tiny_llama, path, **changes):
    tiny_llama(**changes).bfloat16().save_pretrained(path)


def without_a_dtype(tiny_llama, path):
    llama(tiny_llama, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({"a_key_of_its_own": [1], **config, "dtype": None, "architectures": None})
    )


def different_head(tiny_llama, path):
    llama(tiny_llama, path, tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def neox(_tiny_llama, path):
    shape = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.GPTNeoXConfig(**shape, intermediate_size=64)
    transformers.GPTNeoXForCausalLM(config).half().save_pretrained(path)


MADE = {
    "llama": llama,
    "tied": lambda made, path: llama(made, path, tie_word_embeddings=True),
    "without a dtype": without_a_dtype,
    "different head": different_head,
    "older names": neox,
}
SETTINGS = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [256, 3], "own_key": {"a": [1]}}


@pytest.mark.parametrize("name", MADE)
def test_a_directory_is_written_as_it_was_read(name, tiny_llama, tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    MADE[name](tiny_llama, source)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "other": "{{ 1 }}"}
    tokenizer.save_pretrained(source)
    # published ones have settings that transformers would not write for a model of its own
    (source / "generation_config.json").write_text(json.dumps(SETTINGS))
    config = ModelConfig(hf_model_path=str(source))
    tokenizer = load_tokenizer(config)
    save_model(in_one_process(config), tmp_path / "one", tokenizer)
    save_model(materialised(config), tmp_path / "two", tokenizer, OneOfTwo(0, 2, torch.device("cpu")))

    one, two = ({file.name: file for file in (tmp_path / which).iterdir()} for which in ("one", "two"))
    read = load_file(source / "model.safetensors")
    (weights,) = [file for file in two.values() if file.suffix == ".safetensors"]
    for written in (load_file(one["model.safetensors"]), load_file(weights)):
        assert written.keys() == read.keys()
        assert all(written[key].dtype == read[key].dtype and torch.equal(written[key], read[key]) for key in read)
    assert json.loads(two["model.safetensors.index.json"].read_text())["weight_map"].keys() == read.keys()

    rest = {key for key in one if "safetensors" not in key}
    assert rest == {key for key in two if "safetensors" not in key}
    assert rest >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    for key in rest:
        if one[key].is_file():
            assert one[key].read_bytes() == two[key].read_bytes(), key
    for written in (tmp_path / "one", tmp_path / "two"):
        assert_equal_models(
            AutoModelForCausalLM.from_pretrained(written, dtype="auto"),
            AutoModelForCausalLM.from_pretrained(source, dtype="auto"),
        )
        generation = json.loads((written / "generation_config.json").read_text())
        assert generation.items() >= {k: v for k, v in SETTINGS.items() if k != "do_sample"}.items()
        assert AutoTokenizer.from_pretrained(written).chat_template == tokenizer.chat_template
        config = json.loads((written / "config.json").read_text())
        assert config["architectures"] == [type(in_one_process(ModelConfig(hf_model_path=str(source)))).__name__]
        assert config["dtype"] == str(next(iter(read.values())).dtype).removeprefix("torch.")
