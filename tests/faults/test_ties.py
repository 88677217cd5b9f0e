import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ZambaConfig,
    ZambaForCausalLM,
)

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.models.load import byte_tokenizer, save_model

ALL = BitFlipSpec(w_p_frac=0.1, sites=("linear", "head"), skip_patterns=("vision", "mamba"))
HEAD_TOO = LoraSpec(r=2, lora_alpha=6)


def adapted(model, spec=ALL):
    """With adapters that are not zero; and what each faulty weight becomes once they are merged, in float64."""
    flipproof.inject(model.eval(), spec, HEAD_TOO)
    generator = torch.Generator().manual_seed(5)
    for layer in flipproof.faulty_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return {
        name: (layer.weight.double() + 3.0 * layer.lora_B.double() @ layer.lora_A.double()).detach()
        for name, layer in flipproof.faulty_layers(model).items()
    }


SHAPE = {"vocab_size": 258, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def bert():
    """Ties a bias as well as a weight."""
    return BertLMHeadModel(BertConfig(**SHAPE, num_hidden_layers=1, is_decoder=True, tie_word_embeddings=True))


def llava():
    """Its flag stands in two configs."""
    text = LlamaConfig(**SHAPE, num_hidden_layers=1, tie_word_embeddings=True)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=257, tie_word_embeddings=True)
    return LlavaForConditionalGeneration(config)


def zamba():
    """Its blocks share their weights."""
    blocks = {"num_hidden_layers": 4, "layers_block_type": ["hybrid", "mamba", "hybrid", "mamba"]}
    mamba = {"attention_hidden_size": 64, "n_mamba_heads": 2, "mamba_d_state": 4, "use_mamba_kernels": False}
    return ZambaForCausalLM(ZambaConfig(**SHAPE, **blocks, **mamba, tie_word_embeddings=True))


@pytest.fixture(params=["llama", "bert", "llava", "zamba"])
def tied(request, tiny_llama):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"llama": lambda: tiny_llama(tie_word_embeddings=True), "bert": bert, "llava": llava, "zamba": zamba}[
            request.param
        ]()


def equal_where_merged(state, merged, base):
    """Faulty weights are W + s·B·A to float32's rounding, all others are the bits they were."""
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if layer in merged:
            torch.testing.assert_close(tensor.double(), merged[layer], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, base[name]), name


def test_merging_gives_tied_weights_their_own(tied, tmp_path):
    base = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    merged = adapted(tied)
    table = tied.get_input_embeddings()
    flipproof.merge(tied)
    head = tied.get_output_embeddings()
    assert head.weight is not table.weight
    equal_where_merged(tied.state_dict(), merged, base)
    # nothing ties them again
    tied.tie_weights()
    equal_where_merged(tied.state_dict(), merged, base)
    assert tied.config.tie_word_embeddings is False
    assert tied.config.get_text_config().tie_word_embeddings is False
    tied.save_pretrained(tmp_path)
    opened = type(tied).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in tied.state_dict().items())


def test_what_is_written_is_tied_no_more(tied, tmp_path):
    base = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    merged = adapted(tied)
    before = list(tied.named_parameters())
    save_model(tied, tmp_path, byte_tokenizer())
    assert tied.config.tie_word_embeddings
    assert [(name, id(p)) for name, p in tied.named_parameters()] == [(name, id(p)) for name, p in before]
    written = json.loads((tmp_path / "config.json").read_text())
    assert not written["tie_word_embeddings"]
    assert not written.get("text_config", {}).get("tie_word_embeddings")
    # by transformers, and by a reader who takes the files' tensors under their own names
    opened = type(tied).from_pretrained(tmp_path)
    equal_where_merged(opened.state_dict(), merged, base)
    assert len(load_file(tmp_path / "model.safetensors")) == len(opened.state_dict())


def test_removing_leaves_the_tie(tied, tmp_path):
    base = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    adapted(tied)
    flipproof.remove(tied)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert tied.config.tie_word_embeddings
    assert all(torch.equal(tensor, base[name]) for name, tensor in tied.state_dict().items())


def test_without_an_adapter_on_it_a_tied_head_stays_tied(tiny_llama, tmp_path):
    for number, (spec, lora) in enumerate(((BitFlipSpec(w_p_frac=0.1), HEAD_TOO), (ALL, None))):
        model = tiny_llama(tie_word_embeddings=True)
        flipproof.inject(model, spec, lora)
        save_model(model, tmp_path / str(number), byte_tokenizer())
        assert "lm_head.weight" not in load_file(tmp_path / str(number) / "model.safetensors")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).config.tie_word_embeddings
        flipproof.merge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings


def test_a_faulty_embedding_is_no_hindrance(tiny_llama):
    model = tiny_llama(tie_word_embeddings=True)
    table = model.model.embed_tokens.weight.detach().clone()
    merged = adapted(model, BitFlipSpec(w_p_frac=0.1, sites=("head", "embedding")))
    flipproof.merge(model)
    torch.testing.assert_close(model.lm_head.weight.double(), merged["lm_head"], rtol=1e-6, atol=1e-6)
    assert torch.equal(model.model.embed_tokens.weight, table)


class Shared(nn.Module):
    """Two layers that hold one weight, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.two.weight = self.one.weight
        self.again = self.three

    def forward(self, x):
        return self.again(self.three(self.two(self.one(x))))


def test_layers_that_share_a_weight_are_merged_each_by_itself():
    torch.manual_seed(0)
    model = Shared()
    merged = adapted(model, BitFlipSpec(w_p_frac=0.1))
    assert list(merged) == ["one", "two", "three"]
    flipproof.merge(model)
    for name, expected in merged.items():
        torch.testing.assert_close(getattr(model, name).weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert model.again is model.three


def test_a_layer_under_two_names_is_written_merged_under_both(tiny_llama, tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    model.model._tied_weights_keys = {"layers.1.mlp.up_proj.weight": "layers.0.mlp.up_proj.weight"}
    merged = adapted(model)
    save_model(model, tmp_path, byte_tokenizer())
    written = load_file(tmp_path / "model.safetensors")
    kept = [name for name in written if name.endswith("up_proj.weight")]
    assert kept == ["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(written[kept[0]].double(), merged["model.layers.0.mlp.up_proj"], rtol=1e-6, atol=1e-6)
