import shutil
import subprocess

import pytest
import torch

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer, load_model, model_on_meta
from flipproof.models.peft_format import read_adapter
from flipproof.models.save import new_directory, save_model
from flipproof.sums import SUMS, check_sums, write_sums
from flipproof.world import World


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "a.bin").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "d" / "sub" / "b c.json").write_text("{}")
    write_sums(tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.skipif(shutil.which("b2sum") is None, reason="there is no b2sum here, whose format it is")
def test_b2sum_checks_them(directory):
    check = ["b2sum", "--check", SUMS]
    assert subprocess.run(check, cwd=directory, check=True, capture_output=True, text=True).stdout == (
        "a.bin: OK\nsub/b c.json: OK\n"
    )


def test_what_has_changed_is_named(directory):
    (directory / "more.txt").write_text("added later")
    check_sums(directory, "it")
    data = bytearray((directory / "a.bin").read_bytes())
    data[123_456] ^= 4
    (directory / "a.bin").write_bytes(data)
    with pytest.raises(ConfigError, match=rf"^it: a\.bin is not as it was written \({SUMS}\); .*delete {SUMS}"):
        check_sums(directory, "it")
    (directory / "sub" / "b c.json").unlink()
    with pytest.raises(ConfigError, match=rf"^it: .*sub/b c\.json, which {SUMS} names: No such file or directory"):
        check_sums(directory, "it")
    for damaged in ("", "x", "\0" * 100, (directory / SUMS).read_text()[:-10]):
        (directory / SUMS).write_text(damaged)
        with pytest.raises(ConfigError, match=rf"^it: .*{SUMS}"):
            check_sums(directory, "it")
    (directory / SUMS).unlink()
    check_sums(directory, "it")


def test_a_flipped_bit_in_a_model_that_was_written_is_seen_before_it_is_used(tiny_llama, tmp_path):
    with new_directory(tmp_path / "model", World(0, 1, torch.device("cpu"))) as new:
        save_model(tiny_llama(), new, byte_tokenizer())
    config = ModelConfig(hf_model_path=str(tmp_path / "model"))
    load_model(config, byte_tokenizer(), None, 0)
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    refused = r"hf_model_path = '.*model': model\.safetensors is not as it was written"
    with pytest.raises(ConfigError, match=refused):
        load_model(config, byte_tokenizer(), None, 0)
    with pytest.raises(ConfigError, match=refused):
        model_on_meta(config, byte_tokenizer(), None)


def test_and_in_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("x")
    write_sums(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("y")
    with pytest.raises(ConfigError, match=r"^adapter .*: adapter_model\.safetensors is not as it was written"):
        read_adapter(tmp_path)
