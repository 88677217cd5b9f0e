import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.adapter import adapter_spec, load_adapter, save_adapter
from flipproof.errors import ConfigError

SPEC = BitFlipSpec(w_p_frac=0.01)


def trained(make):
    """A faulty model whose adapters are not zero."""
    model = make()
    flipproof.inject(model, SPEC, LoraSpec(r=2, lora_alpha=6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ids = torch.randint(0, 256, (2, 16), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_peft_opens_the_adapter_with_the_same_logits(tiny_llama, tmp_path, token_ids):
    model = trained(tiny_llama)
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad(), flipproof.faults(model.eval(), flips=False, guard=False):
        expected = model(token_ids).logits
        torch.testing.assert_close(opened(token_ids).logits, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(tiny_llama().eval()(token_ids).logits, expected, atol=1e-2)


def test_an_adapter_comes_back_bitwise(tiny_llama, tmp_path):
    model = trained(tiny_llama)
    save_adapter(model, tmp_path, None)
    lora = adapter_spec(tmp_path)
    assert lora == LoraSpec(r=2, lora_alpha=6)
    other = tiny_llama()
    flipproof.inject(other, SPEC, lora)
    load_adapter(other, tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(tiny_llama, tmp_path):
    model = trained(tiny_llama)
    save_adapter(model, tmp_path / "a", None)

    def refused(words, spec=SPEC, r=2, **changes):
        other = tiny_llama(**changes)
        flipproof.inject(other, spec, LoraSpec(r=r))
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ConfigError, match=words):
            load_adapter(other, tmp_path / "a")
        assert all(torch.equal(one, two) for one, two in zip(before, other.parameters(), strict=True))

    refused("shape", intermediate_size=96)
    refused("shape", r=3)
    refused("has no layer for .*down_proj", spec=BitFlipSpec(w_p_frac=0.1, skip_patterns=["down_proj"]))
    refused("is missing", num_hidden_layers=3)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"short")
    refused("adapter_model.safetensors is missing or damaged")


def test_adapters_of_other_kinds_are_refused(tiny_llama, tmp_path):
    model = trained(tiny_llama)
    save_adapter(model, tmp_path / "a", None)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change, words in (({"peft_type": "IA3"}, "IA3"), ({"use_dora": True}, "use_dora")):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ConfigError, match=words):
            adapter_spec(tmp_path / "b")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is missing"):
        adapter_spec(tmp_path / "nowhere")


def test_the_process_that_does_not_write_writes_nothing(tiny_llama, tmp_path):
    save_adapter(trained(tiny_llama), tmp_path / "a", None, writes=False)
    assert not (tmp_path / "a").exists()


def test_without_adapters_there_is_none_to_write(tiny_llama, tmp_path):
    model = tiny_llama()
    flipproof.inject(model, SPEC)
    with pytest.raises(ConfigError, match=r"has no adapter \(lora.r = 0\)"):
        save_adapter(model, tmp_path / "a", None)
    assert not (tmp_path / "a").exists()
