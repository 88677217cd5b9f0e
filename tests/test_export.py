import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from flipproof.checkpoint import list_checkpoints
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.export import export
from flipproof.model import byte_tokenizer
from flipproof.train import train


@pytest.fixture
def run(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = load_config(
        [],
        {
            "model": {"hf_model_path": str(tmp_path / "base")},
            "training": {"seq_len": 32, "local_batch_size": 4, "steps": 4, "lr": 1e-2},
            "lora": {"r": 2},
            "bitflip": {"w_p_frac": 0.05, "x_p_frac": 0.05},
            "data": {"source": "stdlib", "max_tokens": 20_000},
            "eval": {"num_samples": 8, "trials": 2},
            "logging": {"run_dir": str(tmp_path / "run")},
        },
    )
    train(config)
    return tmp_path / "run"


def test_the_exported_model_has_the_perplexity_of_recovered_clean(run, tmp_path):
    import json

    from flipproof.data import load_held_out
    from flipproof.evaluate import mean_loss

    export(run, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = load_config([run / "config.toml"])
    text = load_held_out(config.data, AutoTokenizer.from_pretrained(tmp_path / "model"), 32)
    loss, _ = mean_loss(model, text, 8, 4)
    recorded = json.loads((run / "results.json").read_text())["arms"]["recovered_clean"]["perplexity"]
    assert math.exp(loss) == pytest.approx(recorded, rel=1e-5)


def test_adapter_and_model_are_the_same_function(run, tmp_path, token_ids):
    export(run, tmp_path / "model")
    export(run, tmp_path / "adapter", "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(token_ids).logits, merged(token_ids).logits, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_named_and_nothing_is_written(run, tmp_path):
    def refused(words, *arguments):
        with pytest.raises(ConfigError, match=words):
            export(*arguments)

    refused("exists already", run, tmp_path / "base")
    refused("holds no run", tmp_path / "base", tmp_path / "out")
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    next(checkpoint.glob("*.distcp")).write_bytes(b"")
    refused("distcp is damaged", run, tmp_path / "out")
    checkpoint.rename(run / "checkpoints" / "gone")
    refused("no complete checkpoint", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
