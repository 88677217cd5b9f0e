"""Models of other shapes than Llama's, tiny and random, through the whole of ``flipproof eval``."""

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure.evaluate import evaluate

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
GROUPED = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
COVERED = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, intermediate_size=48)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE, intermediate_size=48)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GROUPED)),
}
FAULTS = {"w_p_exp": 1e-3, "w_p_frac": 1e-2, "w_zero_out_t": 8.0, "x_p_frac": 1e-2, "kv_p_frac": 1e-2}


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "text.txt").write_text("What a bit was it no longer is. " * 200)
    return {
        "model": {"hf_model_path": str(tmp_path / "model"), "tokenizer": "bytes"},
        "data": {"eval_source": str(tmp_path / "text.txt")},
        "training": {"seq_len": 32, "local_batch_size": 8},
        "eval": {"trials": 2, "num_samples": 16},
        "bitflip": FAULTS | {"sites": ["linear", "head", "embedding"]},
    }


@pytest.mark.parametrize("name", COVERED)
def test_arms_of_other_architectures(name, settings):
    torch.manual_seed(0)
    model = COVERED[name]().eval()
    model.save_pretrained(settings["model"]["hf_model_path"])
    arms = evaluate(load_config([], settings))
    ids = torch.tensor(list(("What a bit was it no longer is. " * 200).encode()))  # for the size of the loss only
    with torch.no_grad():
        plain = model(ids[None, :32], labels=ids[None, :32]).loss
    assert arms["clean"].loss == pytest.approx(float(plain), rel=0.1)
    assert arms["guard"].loss == arms["clean"].loss  # the thresholds are beyond what these models hold
    assert arms["flipped"].loss != arms["clean"].loss
    assert arms["flipped"].seed_sd > 0


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
            r"GPT2LMHeadModel: \d\d\.\d% of the weight FLOPs are out of reach of faults, in Conv1D",
        ),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4)),
            r"MixtralForCausalLM: \d\d\.\d% of the weight FLOPs are out of reach of faults, in MixtralExperts",
        ),
    ],
)
def test_those_that_cannot_be_covered_are_refused(model, line, settings):
    model().save_pretrained(settings["model"]["hf_model_path"])
    with pytest.raises(ConfigError, match=line):
        evaluate(load_config([], settings))


def test_a_model_of_several_modalities_works_through_its_text(settings):
    text = GROUPED | {"head_dim": 8, "max_position_embeddings": 32}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(settings["model"]["hf_model_path"])
    with pytest.raises(ConfigError, match=r"out of reach of faults, in .*name them in bitflip.skip_patterns"):
        evaluate(load_config([], settings))
    settings["bitflip"] |= {"skip_patterns": ["vision_tower", "multi_modal_projector"]}
    assert evaluate(load_config([], settings))["flipped"].seed_sd > 0
    settings["training"]["seq_len"] = 33
    with pytest.raises(ConfigError, match="seq_len = 33: the model has 32 positions"):
        evaluate(load_config([], settings))


def test_a_model_directory_without_a_tokenizer(settings, capsys):
    COVERED["qwen2"]().save_pretrained(settings["model"]["hf_model_path"])
    for verb in (["eval"], ["generate", "--prompt", "a"], ["profile"], ["sweep", "--to", "nowhere", "--p", "1e-3"]):
        assert main([verb[0], settings["model"]["hf_model_path"], *verb[1:]]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1, verb
        assert "tokenizer" in lines[0], verb
