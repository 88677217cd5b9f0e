"""GGUF files written here, with the ``gguf`` package, from a model that is known."""

import json
import os

import gguf
import numpy as np
import pytest
import torch
from reading import assert_equal_models, materialised
from texts import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from flipproof.config import ModelConfig, load_config
from flipproof.errors import ConfigError
from flipproof.models.layerwise import rotate_into
from flipproof.models.load import load_model, load_tokenizer
from flipproof.models.rotate import rotate
from flipproof.models.tokenizer import byte_tokenizer
from flipproof.train.export import export
from flipproof.train.loop import train
from flipproof.world import ALONE

F16, Q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers.": "blk.",
}


def interleaved(weight, heads):
    """Rows as llama.cpp has them, whose rotary embedding turns neighbours and not halves."""
    rows = weight.shape[0] // heads
    order = [head * rows + half * (rows // 2) + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(model, path, kind, tokenizer=True, drop=()):
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        letters = sorted(byte_tokenizer().get_vocab().items(), key=lambda entry: entry[1])[:256]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*(letter for letter, _ in letters), "<|endoftext|>", "th"])
        writer.add_token_types([1] * 256 + [3, 1])
        writer.add_token_merges(["t h"])
        writer.add_eos_token_id(256)
        writer.add_bos_token_id(256)
    for name, tensor in model.state_dict().items():
        array = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            array = interleaved(array, heads) if part in name else array
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name in drop:
            continue
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(bos_token_id=256, tie_word_embeddings=False, rms_norm_eps=2**-20)  # which a float32 has


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def in_memory(path, dtype=None):
    config = ModelConfig(hf_model_path=str(path))
    return load_model(config, load_tokenizer(config), dtype, 0)


def refused(path, words):
    with pytest.raises(ConfigError, match=words) as error:
        in_memory(path)
    assert str(error.value).startswith(f"model.hf_model_path = {str(path)!r}")
    assert len(str(error.value).splitlines()) == 1


def test_a_file_of_plain_weights_is_the_model_that_it_was_made_of(model, tmp_path):
    file = write_gguf(model, tmp_path / "tiny.gguf", F16)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # is another's
    model.half().save_pretrained(tmp_path / "original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    for path in (file, tmp_path):
        read = in_memory(path)
        assert read.dtype == torch.float16
        assert_equal_models(read, original)
        assert_equal_models(materialised(ModelConfig(hf_model_path=str(path))), read)
    assert (read.config.eos_token_id, read.config.max_position_embeddings) == (256, 128)
    assert in_memory(file, "float32").dtype == torch.float32


def test_a_file_is_rotated_block_by_block_as_it_is_in_memory(model, tmp_path):
    config = ModelConfig(hf_model_path=str(write_gguf(model, tmp_path / "tiny.gguf", F16)))
    (tmp_path / "rotated").mkdir()
    rotate_into(tmp_path / "rotated", config, load_tokenizer(config), None, "residual", 0, ALONE)
    expected = in_memory(config.hf_model_path)
    rotate(expected, "residual", 0)
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path / "rotated"), expected)


def test_quantised_weights_become_bfloat16(model, tmp_path, caplog):
    """Q8_0: blocks of 32 values, each an integer of 8 bits times the block's scale in half precision."""
    caplog.set_level("INFO")
    read = in_memory(write_gguf(model, tmp_path / "tiny.gguf", Q8_0)).state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            blocks = tensor.numpy().reshape(-1, 32)
            scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
            steps = np.round(blocks / scale)
            tensor = torch.from_numpy(steps * scale.astype(np.float16).astype(np.float32)).reshape(tensor.shape)
        # a quotient halfway between two integers is rounded to either
        wrong = read[name] != tensor.bfloat16()
        assert read[name].dtype == torch.bfloat16
        assert wrong.float().mean() < 0.001, name
    assert "weights are quantised (Q8_0), and become bfloat16" in caplog.text


def test_its_tokenizer_is_read_as_well(model, tmp_path):
    config = ModelConfig(hf_model_path=str(write_gguf(model, tmp_path / "tiny.gguf", F16)))
    tokenizer = load_tokenizer(config)
    letters = byte_tokenizer()("a é", add_special_tokens=False)["input_ids"]
    assert tokenizer("th" + "a é", add_special_tokens=False)["input_ids"] == [257, *letters]
    assert (tokenizer.decode([257, *letters]), tokenizer.eos_token_id) == ("tha é", 256)


def test_a_file_is_converted_once_and_again_where_it_was_changed(model, tmp_path, caplog):
    caplog.set_level("INFO")
    file = write_gguf(model, tmp_path / "tiny.gguf", F16)
    first, again = in_memory(file), in_memory(file)
    assert caplog.text.count("is converted into") == 1
    assert_equal_models(again, first)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    write_gguf(model, file, F16)
    assert torch.equal(in_memory(file).lm_head.weight, model.lm_head.weight.half())
    assert caplog.text.count("is converted into") == 2


def test_a_run_on_it_leaves_an_ordinary_model(model, tmp_path):
    file = write_gguf(model, tmp_path / "tiny.gguf", Q8_0)
    (tmp_path / "text.txt").write_text(sentences(20_000))
    overrides = {
        "model": {"hf_model_path": str(file)},
        "training": {"seq_len": 32, "local_batch_size": 2, "steps": 2},
        "lora": {"r": 2},
        "bitflip": {"w_p_exp": 1e-3, "w_zero_out_t": 8.0},
        "data": {"source": str(tmp_path / "text.txt")},
        "eval": {"num_samples": 2, "trials": 2},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    train(load_config([], overrides))
    assert {"clean", "recovered"} <= json.loads((tmp_path / "run/results.json").read_text())["arms"].keys()
    export(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("th")["input_ids"] == [257]
    fixed = ("embed", "norm", "lm_head")
    read = in_memory(file).state_dict()
    same = {name: torch.equal(tensor, read[name]) for name, tensor in merged.state_dict().items()}
    assert all(same[name] == any(part in name for part in fixed) for name in same)


def test_what_cannot_be_read_is_told_in_a_line(model, tmp_path, monkeypatch):
    file = write_gguf(model, tmp_path / "tiny.gguf", F16)
    whole = file.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 4096):
        file.write_bytes(whole[:size])
        refused(file, r"tiny\.gguf': is no GGUF file, damaged or cut short \(.+\)$")
    file.write_bytes(b"GGML" + whole[4:])
    refused(file, r"is no GGUF file, damaged or cut short \(.+\)$")
    file.write_bytes(whole)
    file.rename(tmp_path / "tiny.bin")
    refused(tmp_path / "tiny.bin", r"is a file; name the directory .* only a \.gguf file is read")
    refused(file, "there is no such file$")
    (tmp_path / "tiny.bin").unlink()
    for name in ("b-Q8_0", "a-F16"):
        (tmp_path / f"{name}.gguf").write_bytes(whole)
    refused(tmp_path, r"holds 2 GGUF files \(a-F16\.gguf, b-Q8_0\.gguf\); name one of them$")
    refused(write_gguf(model, file, F16, drop=("blk.1.ffn_up.weight",)), "layers.1.mlp.up_proj.weight is missing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(file, r"needs the package gguf; pip install 'flipproof\[gguf\]'$")
    assert not [name for name in os.listdir(tmp_path / "cache/flipproof") if not name.endswith(".lock")]


def test_an_architecture_that_transformers_does_not_know_is_told(model, tmp_path):
    file = write_gguf(model, tmp_path / "tiny.gguf", F16)
    file.write_bytes(file.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lmama"))
    refused(file, r"transformers cannot read it \(.*lmama.*\)$")


def test_without_a_tokenizer_another_can_be_named(model, tmp_path):
    file = write_gguf(model, tmp_path / "tiny.gguf", F16, tokenizer=False)
    refused(file, "holds no tokenizer; set model.tokenizer to one, or to 'bytes'$")
    assert load_tokenizer(ModelConfig(hf_model_path=str(file), tokenizer="bytes")).vocab_size == 258
    assert load_model(ModelConfig(hf_model_path=str(file)), byte_tokenizer(), None, 0).dtype == torch.float16
