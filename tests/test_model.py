import pytest
import torch
from transformers import AutoTokenizer

from flipproof.config import ConfigError, ModelConfig, TrainingConfig
from flipproof.model import FLAVORS, byte_tokenizer, compute_context, load_model, load_tokenizer


def test_bytes_round_trip_and_the_tokenizer_is_saved_as_hugging_face_does(tmp_path):
    tokenizer = byte_tokenizer()
    text = "def f(x):\n\treturn 'é∑😀'  # \x00\x7f  two  spaces"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256, 257)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


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
        (ModelConfig(flavor="9B", init="random"), "model.flavor = '9B': known are 8B"),
        (ModelConfig(flavor="8B", hf_model_path=str(tmp_path)), "hidden_size 4096.* has 32"),
        (ModelConfig(hf_model_path=str(tmp_path)), "258 tokens; the model's vocabulary has 100"),
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
