import pytest
import torch
from reading import assert_equal_models, in_one_process, materialised
from safetensors.torch import load_file, save_file
from sharded_runs import LLAMA3_ROPE
from torch import nn
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import ModelConfig, TrainingConfig
from flipproof.errors import ConfigError
from flipproof.models.load import (
    FLAVORS,
    byte_tokenizer,
    compute_context,
    load_model,
    load_tokenizer,
)


@pytest.mark.parametrize(
    ("flavor", "billions"),
    # published sizes: Llama 3's 8.03, 70.6, 405.9 billion; AICrossSim-CLM by its names
    [("8B", 8.03), ("70B", 70.55), ("405B", 405.85), ("clm-60M", 0.06), ("clm-200M", 0.2), ("clm-1.1B", 1.1)],
)
def test_flavors_have_the_published_sizes(flavor, billions):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**FLAVORS[flavor]))
    non_embedding = flavor.startswith("clm")
    count = sum(p.numel() for n, p in model.named_parameters() if not (non_embedding and "embed_tokens" in n))
    assert count / 1e9 == pytest.approx(billions, rel=0.15 if non_embedding else 0.001)


def test_random_models_depend_on_the_seed_and_on_nothing_else():
    config, tokenizer = ModelConfig(flavor="demo", init="random"), byte_tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (load_model(config, tokenizer, None, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.dtype == torch.float32
    assert load_model(config, tokenizer, "bfloat16", 0).dtype == torch.bfloat16


def test_a_directory_opens_in_its_own_dtype_or_the_one_asked_for(tiny_llama, tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(hf_model_path=str(tmp_path))
    tokenizer = load_tokenizer(config)
    assert load_model(config, tokenizer, None, 0).dtype == torch.bfloat16
    assert load_model(config, tokenizer, "float32", 0).dtype == torch.float32


def test_what_does_not_fit_is_named(tiny_llama, tmp_path):
    tiny_llama(vocab_size=100).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    cases = [
        (ModelConfig(flavor="9B", init="random"), "model.flavor = '9B': known are 1B"),
        (ModelConfig(flavor="8B", hf_model_path=str(tmp_path)), "hidden_size 4096.* has 32"),
        (ModelConfig(hf_model_path="no/such-model"), "no local directory, and the Hub did not give a model"),
        (ModelConfig(hf_model_path=str(tmp_path.parent)), "holds no readable model"),
    ]
    for config, words in cases:
        with pytest.raises(ConfigError, match=words):
            load_model(config, tokenizer, None, 0)
    with pytest.raises(ConfigError, match="the directory holds no readable tokenizer"):
        load_tokenizer(ModelConfig(hf_model_path=str(tmp_path)))


def test_mixed_precision_computes_in_the_other_dtype(tiny_llama, token_ids):
    model = tiny_llama()
    with compute_context(TrainingConfig(mixed_precision_param="bfloat16"), model):
        assert model(token_ids).logits.dtype == torch.bfloat16
    with compute_context(TrainingConfig(mixed_precision_param="float32"), model):
        assert model(token_ids).logits.dtype == torch.float32


# -- from the meta device ----------------------------------------------------------------------------------------------


ROPE = LLAMA3_ROPE | {"original_max_position_embeddings": 64}


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": ROPE}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize(
    ("saved", "asked"), [("float32", None), ("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_pretrained_weights_are_those_of_from_pretrained(tiny_llama, tmp_path, changes, size, saved, asked):
    tiny_llama(**changes).to(getattr(torch, saved)).save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked or "auto")
    model = materialised(ModelConfig(hf_model_path=str(tmp_path)), asked)
    assert model.dtype == getattr(torch, asked or saved)
    if "rope_parameters" in changes:  # it does differ from the plain one
        assert not torch.equal(model.model.rotary_emb.inv_freq, tiny_llama().model.rotary_emb.inv_freq)
    if "tie_word_embeddings" in changes:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equal_models(model, expected)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("Phi", {"intermediate_size": 64}),
        ("Gemma2", {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}),
        ("Qwen2", {"intermediate_size": 64, "num_key_value_heads": 1}),
    ],
)
def test_other_families_too(tmp_path, kind, more):
    """With biases, learned positions, tied embeddings and an embedding's scale in a buffer."""
    import transformers

    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape, **more))
    for parameter in made.parameters():  # biases and norms that an initialisation would not give
        nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(materialised(ModelConfig(hf_model_path=str(tmp_path))), expected)


def test_a_checkpoint_with_other_names_than_the_model_is_read_and_written_so(tmp_path):
    """transformers writes GPT-NeoX's head under its older name and renames it when it reads."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=64)).save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(materialised(ModelConfig(hf_model_path=str(tmp_path))), expected)


def test_a_checkpoint_whose_tensors_transformers_makes_of_others_is_refused(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = MixtralForCausalLM(MixtralConfig(**shape, intermediate_size=64, num_key_value_heads=1, num_local_experts=2))
    made.save_pretrained(tmp_path)
    config = ModelConfig(hf_model_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"the tensors of MixtralForCausalLM of others, such as .*\.w1\.weight"):
        materialised(config)
    assert torch.equal(load_model(config, byte_tokenizer(), None, 0).lm_head.weight, made.lm_head.weight)


def test_with_faults_the_base_weights_are_the_same_and_adapters_begin_as_always(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    spec, lora = BitFlipSpec(w_p_frac=0.1, x_p_frac=0.1), LoraSpec(r=2)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    flipproof.inject(expected, spec, lora)
    config = ModelConfig(hf_model_path=str(tmp_path))
    assert_equal_models(materialised(config, prepare=lambda model: flipproof.inject(model, spec, lora)), expected)


@pytest.mark.parametrize("read", [materialised, in_one_process])
def test_tensors_that_are_missing_or_misshapen_are_refused_by_name(tiny_llama, tmp_path, caplog, read):
    tiny_llama().save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", ModelConfig(hf_model_path=str(tmp_path))
    whole = load_file(path)
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"

    def refused(tensors, words):
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=rf"not the weights of a LlamaForCausalLM: {words}$"):
            read(config)

    refused({k: v for k, v in whole.items() if k != up}, f"{up} is missing")
    refused({k: v for k, v in whole.items() if k not in (up, norm)}, rf"{up} is missing \(and 1 more like it\)")
    refused({k: v for k, v in whole.items() if k != "lm_head.weight"}, "lm_head.weight is missing")  # no head, untied
    refused(whole | {up: whole[up].T.contiguous()}, rf"{up} has shape \(32, 64\), the model's has \(64, 32\)")
    refused(whole | {norm: whole[norm][:31].clone()}, rf"{norm} has shape \(31,\), the model's has \(32,\)")
    # more than the model has does no harm, and is said once; what old versions wrote is not worth a word
    more = {"extra.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(whole | more, path, metadata={"format": "pt"})
    with caplog.at_level("WARNING", "flipproof"):
        assert_equal_models(read(config), tiny_llama())
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "LlamaForCausalLM does not have extra.weight, and leaves it out"
    ]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged or cut short: "):
        read(config)
    path.unlink()
    with pytest.raises(ConfigError, match=r"\(no model\.safetensors\)"):
        read(config)


RANDOM = ModelConfig(flavor="demo", init="random")


def test_random_weights_depend_on_the_seed_and_have_the_std_of_the_config():
    """0.02 for Llama. A std of n normal draws is within 6 / sqrt(2 n) of it, relatively; false alarm 2e-9 a matrix."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (materialised(RANDOM, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    std = one.config.initializer_range
    assert std == 0.02
    drawn = []
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if "norm" in name:
            assert torch.equal(a, torch.ones_like(a))
            continue
        assert not torch.equal(a, c), name
        bound = 6 / (2 * a.numel()) ** 0.5
        assert a.std().item() == pytest.approx(std, rel=bound), name
        assert abs(a.mean().item()) < 6 * std / a.numel() ** 0.5
        drawn.append(a.flatten()[:16])
    # no two modules begin alike, though each has a generator of its own
    assert len({tuple(part.tolist()) for part in drawn}) == len(drawn) == 2 + 4 * 7
    assert_equal_models(one, two)


def test_random_weights_do_not_depend_on_faults_and_adapters():
    spec = BitFlipSpec(w_p_frac=0.1)
    plain = dict(materialised(RANDOM).named_parameters())
    faulty = materialised(RANDOM, prepare=lambda model: flipproof.inject(model, spec, LoraSpec(r=2)))
    held = dict(faulty.named_parameters())
    assert all(torch.equal(held[name], parameter) for name, parameter in plain.items())
    expected = load_model(RANDOM, byte_tokenizer(), None, 0)
    flipproof.inject(expected, spec, LoraSpec(r=2))
    assert_equal_models(faulty, expected)


def test_random_weights_have_the_buffers_of_a_model_made_at_once():
    with torch.random.fork_rng():
        expected = AutoModelForCausalLM.from_config(materialised(RANDOM).config)
    got = dict(materialised(RANDOM).named_buffers())
    assert got
    assert all(torch.equal(got[name], buffer) for name, buffer in expected.named_buffers())


def test_random_weights_of_a_tied_model_in_bfloat16(tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=True).config.save_pretrained(tmp_path)
    config = ModelConfig(hf_model_path=str(tmp_path), init="random")
    model = materialised(config, "bfloat16")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.float().std().item() == pytest.approx(0.02, rel=6 / (2 * 258 * 32) ** 0.5)
