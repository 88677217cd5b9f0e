import gc
import weakref

import numpy as np
import pytest
import torch
import transformers

from flipproof.cli.main import main
from flipproof.errors import ConfigError
from flipproof.models.limits import check_ids, check_positions, checker_of_ids, positions, watch_ids
from flipproof.models.load import byte_tokenizer

SHAPE = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}


@pytest.mark.parametrize(
    ("kind", "more", "room"),
    [
        ("Llama", {"max_position_embeddings": 64}, 64),
        ("Llama", {"max_position_embeddings": 64, "rope_parameters": LINEAR}, 128),
        ("Llama", {"max_position_embeddings": 32, "rope_parameters": YARN}, 128),  # Qwen 2.5 says it so
        ("Llama", {"max_position_embeddings": 128, "rope_parameters": LLAMA3}, 128),  # Llama 3.1 counts it in
        ("Mistral", {"max_position_embeddings": 64, "sliding_window": 16}, 64),
        ("Gemma3Text", {"max_position_embeddings": 64, "rope_parameters": GEMMA}, 64),
        ("OPT", {"max_position_embeddings": 64}, 64),
        ("GPT2", {"n_positions": 64}, 64),
        ("Falcon", {"alibi": True}, None),
        ("Bloom", {}, None),
        ("Mamba", {}, None),
        ("XLNet", {}, None),
        ("Mpt", {"max_seq_len": 64}, 64),
        ("Whisper", {"max_target_positions": 64}, 64),
        ("Gemma3", {"text_config": {"max_position_embeddings": 64}}, 64),
    ],
)
def test_positions_as_each_config_says_them(kind, more, room):
    config = getattr(transformers, f"{kind}Config")(**more)
    assert positions(config) == room
    check_positions(config, room or 10**6)
    if room:
        with pytest.raises(ConfigError, match=f"seq_len = {room + 1}: the model has {room} positions; at most {room} "):
            check_positions(config, room + 1)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
        ("GPT2", {"n_positions": 64}),
        ("Mpt", {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}),
        ("Bloom", {"seq_length": 64}),
    ],
)
def test_a_model_takes_as_many_positions_and_no_more(kind, more):
    """What ``transformers`` itself says where there is a table; without a limit a longer one runs too."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE | more)
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    model = getattr(transformers, name)(config).eval()
    room = positions(config)
    with torch.no_grad():
        model(torch.zeros(1, room or 65, dtype=torch.long))
        if room:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.zeros(1, room + 1, dtype=torch.long))


@pytest.fixture
def short(tiny_llama, tmp_path):
    """A model of 64 positions, and a text."""
    tiny_llama(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("lorem ipsum " * 2000)
    return str(tmp_path / "model"), ["--data.source", str(tmp_path / "text.txt")], tmp_path


@pytest.mark.parametrize("verb", ["eval", "train", "profile", "sweep"])
def test_every_verb_refuses_longer_sequences_before_it_begins(short, verb, capsys):
    model, text, tmp_path = short
    path = ["--model.hf_model_path", model] if verb == "train" else [model]
    more = {
        "sweep": ["--p", "1e-3", "--to", str(tmp_path / "out")],
        "profile": ["--to", str(tmp_path / "out")],
        "eval": ["--to", str(tmp_path / "out")],
        "train": ["--logging.run_dir", str(tmp_path / "out"), "--lora.r", "2", "--bitflip.w_p_frac", "1e-3"],
    }[verb]
    assert main([verb, *path, *text, *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("error: training.seq_len = 2048: the model has 64 positions; at most 64 is allowed")
    assert not (tmp_path / "out").exists()


def larger_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return tokenizer


def test_tokens_beyond_the_embedding_are_refused_where_a_text_holds_one(tiny_llama):
    model, tokenizer = tiny_llama(), larger_tokenizer()
    assert len(tokenizer) == model.config.vocab_size + 1
    ids = np.arange(2**17, dtype=np.int32).reshape(-1, 2) % 258
    check_ids(model, tokenizer, ids)
    ids[-1, -1] = 258
    words = r"holds '<image_soft_token>', id 258, and the model's embedding has 258 rows \(ids up to 257\)"
    with pytest.raises(ConfigError, match=words):
        check_ids(model, tokenizer, ids[:2], ids)
    watch_ids(model, tokenizer)
    model(torch.from_numpy(ids[:1]).long())
    with pytest.raises(ConfigError, match=words):
        model(torch.from_numpy(ids[-1:]).long())


def test_a_tokenizer_with_more_tokens_than_the_model_runs_until_one_is_met(short, capsys):
    model, text, tmp_path = short
    larger_tokenizer().save_pretrained(model)
    flags = ["--training.seq_len", "64", "--num-samples", "2"]
    assert main(["eval", model, *text, *flags]) == 0
    (tmp_path / "text.txt").write_text("<image_soft_token>" + "lorem ipsum " * 2000)
    capsys.readouterr()
    assert main(["eval", model, "--data.eval_source", str(tmp_path / "text.txt"), *flags]) == 2
    assert "holds '<image_soft_token>', id 258" in capsys.readouterr().err.strip().splitlines()[-1]
    assert main(["generate", model, "--prompt", "a<image_soft_token>", "--max_new_tokens", "2"]) == 2
    assert "holds '<image_soft_token>', id 258" in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_checks_ids_later_does_not_hold_the_model(tiny_llama):
    """A run's text outlives its model, beside which that of its control would have no room."""
    model, tokenizer = tiny_llama(vocab_size=100), byte_tokenizer()
    check, gone = checker_of_ids(model, tokenizer), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    check(np.array([[99]]))
    with pytest.raises(ConfigError, match="id 100, and the model's embedding has 100 rows"):
        check(np.array([[100]]))
