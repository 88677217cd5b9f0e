import json

import pytest
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.models.tokenizer import byte_tokenizer, load_tokenizer
from flipproof.sums import write_sums


def test_bytes_round_trip_and_the_tokenizer_is_saved_as_hugging_face_does(tmp_path):
    tokenizer = byte_tokenizer()
    text = "def f(x):\n\treturn 'é∑😀'  # \x00\x7f  two  spaces"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 256, 257)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"] == ids


def test_it_is_said_where_text_is_read_as_bytes_without_being_asked(caplog, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level("INFO", "flipproof"):
        load_tokenizer(ModelConfig(tokenizer="bytes", flavor="demo", init="random"))
        load_tokenizer(ModelConfig(hf_model_path=str(tmp_path)))
        assert not caplog.messages
        assert len(load_tokenizer(ModelConfig(flavor="demo", init="random"))) == 258
    assert caplog.messages == ["no tokenizer is named (model.tokenizer): text is read as bytes"]


def test_a_tokenizer_needs_no_letters(tmp_path):
    letters = {"A": 0, "C": 1, "G": 2, "T": 3, "</s>": 4}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])), eos_token="</s>")
    made.save_pretrained(tmp_path / "dna")
    assert load_tokenizer(ModelConfig(tokenizer=str(tmp_path / "dna")))("ACGT")["input_ids"] == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma", "cohere", "bert", "xglm"])
def test_special_tokens_alone_are_no_tokenizer(kind, tmp_path):
    """transformers makes such a one for a model whose directory has no tokenizer files."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 12
    for config, key in (
        (ModelConfig(hf_model_path=str(tmp_path)), "hf_model_path"),
        (ModelConfig(tokenizer=str(tmp_path)), "tokenizer"),
    ):
        with pytest.raises(ConfigError, match=f"^model.{key} = .*: holds no tokenizer; set model.tok"):
            load_tokenizer(config)


def test_home_is_expanded_and_a_path_may_hold_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    byte_tokenizer().save_pretrained(tmp_path / "a [b] = #é")
    for name in ("~/a [b] = #é", str(tmp_path / "a [b] = #é")):
        assert load_tokenizer(ModelConfig(tokenizer=name))("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    with pytest.raises(ConfigError, match=r"model.tokenizer = '~/none': no local directory"):
        load_tokenizer(ModelConfig(tokenizer="~/none"))


def test_what_only_fails_when_it_reads_is_told_as_well(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": [1]}))
    with pytest.raises(ConfigError, match=r"model\.tokenizer = .*: the directory holds no readable tokenizer \("):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))


def test_a_changed_file_of_a_tokenizer_that_has_sums_is_named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"large")
    write_sums(tmp_path)
    load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"other")  # which whoever loads the weights looks at
    load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|pad|>", "<|pae|>"))
    with pytest.raises(ConfigError, match=r"model\.tokenizer = .*: tokenizer\.json is not as it was written"):
        load_tokenizer(ModelConfig(tokenizer=str(tmp_path)))
