import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.checkpoint import (
    adapter_spec,
    checkpoint_problems,
    list_checkpoints,
    load_adapter,
    load_checkpoint,
    load_trained_weights,
    save_adapter,
    save_checkpoint,
    save_model,
)
from flipproof.config import ConfigError
from flipproof.model import byte_tokenizer

SPEC = BitFlipSpec(w_p_frac=0.01)


def trained(make, seed=0, r=2):
    """A faulty model with adapters and an optimizer, three steps in."""
    model = make()
    flipproof.inject(model, SPEC, LoraSpec(r=r, lora_alpha=6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        ids = torch.randint(0, 256, (2, 16), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("r", [0, 2])
def test_a_checkpoint_restores_weights_optimizer_and_rng_bitwise(tiny_llama, tmp_path, r):
    model, optimizer = trained(tiny_llama, r=r)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    path = save_checkpoint(tmp_path, 3, model, optimizer, keep_last=2)
    torch.rand(5)
    other, other_optimizer = trained(tiny_llama, seed=1, r=r)
    assert load_checkpoint(path, other, other_optimizer) == 3
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    one, two = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert one.keys() == two.keys()
    for key in one:
        assert all(torch.equal(one[key][name], two[key][name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    third, _ = trained(tiny_llama, seed=2, r=r)
    assert load_trained_weights(path, third) == 3
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), third.parameters(), strict=True))


def test_the_last_few_are_kept_in_order_of_steps(tiny_llama, tmp_path):
    model, optimizer = trained(tiny_llama)
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, model, optimizer, keep_last=2)
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".step-101.unfinished").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-10", "step-100"]


def test_a_crash_while_saving_leaves_the_last_one(tiny_llama, tmp_path, monkeypatch):
    model, optimizer = trained(tiny_llama)
    save_checkpoint(tmp_path, 1, model, optimizer, keep_last=1)
    import flipproof.checkpoint as checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, 2, model, optimizer, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    save_checkpoint(tmp_path, 2, model, optimizer, keep_last=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-2"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "no manifest"])
def test_damage_is_refused_by_name_and_the_previous_one_offered(tiny_llama, tmp_path, damage):
    model, optimizer = trained(tiny_llama)
    save_checkpoint(tmp_path, 1, model, optimizer, keep_last=2)
    path = save_checkpoint(tmp_path, 2, model, optimizer, keep_last=2)
    victim = next(path.glob("*.distcp"))
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "altered":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim = path / "manifest.json"
        victim.unlink()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=rf"step-2.*{victim.name}.*resume from step-1"):
        load_checkpoint(path, model, optimizer)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert not checkpoint_problems(tmp_path / "step-1")


def test_a_checkpoint_of_another_model_is_refused(tiny_llama, tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained(tiny_llama), keep_last=1)
    with pytest.raises(ConfigError, match="does not fit"):
        load_checkpoint(path, *trained(tiny_llama, r=3))


def test_peft_opens_the_adapter_with_the_same_logits(tiny_llama, tmp_path, token_ids):
    model, _ = trained(tiny_llama)
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad(), flipproof.faults(model.eval(), flips=False, guard=False):
        expected = model(token_ids).logits
        torch.testing.assert_close(opened(token_ids).logits, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(tiny_llama().eval()(token_ids).logits, expected, atol=1e-2)


def test_an_adapter_comes_back_bitwise(tiny_llama, tmp_path):
    model, _ = trained(tiny_llama)
    save_adapter(model, tmp_path, None)
    lora = adapter_spec(tmp_path)
    assert lora == LoraSpec(r=2, lora_alpha=6)
    other = tiny_llama()
    flipproof.inject(other, SPEC, lora)
    load_adapter(other, tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(tiny_llama, tmp_path):
    model, _ = trained(tiny_llama)
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
    model, _ = trained(tiny_llama)
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


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_opens_the_merged_model(tiny_llama, tmp_path, token_ids, tied):
    model, _ = trained(lambda: tiny_llama(tie_word_embeddings=tied))
    save_model(model, tmp_path, byte_tokenizer())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in name for name in opened.state_dict())
    with torch.no_grad():
        got = opened(token_ids).logits
        with flipproof.faults(model.eval(), flips=False, guard=False):
            torch.testing.assert_close(got, model(token_ids).logits, rtol=0, atol=1e-5)
    assert any(isinstance(module, flipproof.FaultyLinear) for module in model.modules())
