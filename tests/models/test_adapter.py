import math
import os

import pytest
import torch
from peft import PeftConfig, PeftModel
from rounding import assert_same_function
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.errors import ConfigError
from flipproof.models.adapter import adapter_spec, load_adapter, save_adapter

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
        assert_same_function(opened(token_ids).logits, lambda: model(token_ids).logits, model.parameters())
        assert not torch.allclose(tiny_llama().eval()(token_ids).logits, expected, atol=1e-2)


def test_an_adapter_comes_back_bitwise(tiny_llama, tmp_path):
    model = trained(tiny_llama)
    save_adapter(model, tmp_path, None)
    lora = adapter_spec(tmp_path)
    assert lora == dict.fromkeys(flipproof.faulty_layers(model), LoraSpec(r=2, lora_alpha=6))
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


@pytest.fixture
def uneven(tiny_llama):
    """A faulty model whose adapters differ in rank and scaling, and which has layers without one."""
    lora = {
        "model.layers.0.self_attn.q_proj": LoraSpec(r=2, lora_alpha=6),
        "model.layers.1.self_attn.q_proj": LoraSpec(r=2, lora_alpha=6),
        "model.layers.0.mlp.up_proj": LoraSpec(r=5, lora_alpha=6),
        "model.layers.1.mlp.down_proj": LoraSpec(r=3, lora_alpha=1.5),
        "lm_head": LoraSpec(r=1, lora_alpha=6),
    }
    model = tiny_llama().eval()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.01, sites=("linear", "head")), lora)
    for layer in flipproof.faulty_layers(model).values():
        if layer.lora:
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(0))
    return model, lora


def test_adapters_of_several_ranks_are_written_as_peft_reads_them(uneven, tiny_llama, tmp_path, token_ids):
    model, lora = uneven
    save_adapter(model, tmp_path / "adapter", None)
    assert adapter_spec(tmp_path / "adapter") == lora
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    with torch.no_grad(), flipproof.faults(model, flips=False, guard=False):
        assert_same_function(opened(token_ids).logits, lambda: model(token_ids).logits, model.parameters())


def test_only_adapters_train_and_layers_without_one_have_none(uneven):
    model, lora = uneven
    expected = {f"{name}.{matrix}" for name in lora for matrix in ("lora_A", "lora_B")}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    assert {name for name, _ in model.named_parameters() if "lora" in name} == expected


def test_what_is_not_finite_is_not_written(uneven, tmp_path):
    model, _ = uneven
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B[3, 1] = math.nan
    with pytest.raises(ConfigError, match=r"not finite.*model\.layers\.0\.mlp\.up_proj\.lora_B\.weight"):
        save_adapter(model, tmp_path / "adapter", None)
    assert not (tmp_path / "adapter").exists()


def test_files_have_the_permissions_of_any_new_one(uneven, tmp_path):
    before = os.umask(0o027)
    try:
        save_adapter(uneven[0], tmp_path / "adapter", None)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()} == {0o640}


def test_the_process_that_does_not_write_writes_nothing(tiny_llama, tmp_path):
    save_adapter(trained(tiny_llama), tmp_path / "a", None, writes=False)
    assert not (tmp_path / "a").exists()


def test_without_adapters_there_is_none_to_write(tiny_llama, tmp_path):
    model = tiny_llama()
    flipproof.inject(model, SPEC)
    with pytest.raises(ConfigError, match=r"has no adapter \(lora.r = 0\)"):
        save_adapter(model, tmp_path / "a", None)
    assert not (tmp_path / "a").exists()


def test_adapters_chosen_apart_from_faults_are_written_as_peft_reads_them(tiny_llama, tmp_path, token_ids):
    """Adapters on clean layers, faulty layers without adapters, dropout and rank-stabilised scaling."""
    lora = LoraSpec(r=3, lora_alpha=5, target_modules=("q_proj", "lm_head"), dropout=0.25, use_rslora=True)
    model = tiny_llama().eval()
    coverage = flipproof.inject(model, BitFlipSpec(w_p_frac=0.01, include_patterns=("up_proj",)), lora)
    adapted = ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(2))]
    layers = flipproof.faulty_layers(model)
    assert sorted(name for name, layer in layers.items() if layer.lora_A is not None) == adapted
    assert coverage.covered == tuple(f"model.layers.{i}.mlp.up_proj" for i in range(2))
    assert {name for name, reason in coverage.skipped.items() if "adapter" in reason} == set(adapted)
    for name in adapted:
        torch.nn.init.normal_(layers[name].lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter", None)
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.25, True)
    assert config.target_modules == set(adapted)
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    with torch.no_grad(), flipproof.faults(model, flips=False, guard=False):
        assert_same_function(opened(token_ids).logits, lambda: model(token_ids).logits, model.parameters())
    back = adapter_spec(tmp_path / "adapter")
    assert back == dict.fromkeys(adapted, LoraSpec(r=3, lora_alpha=5, dropout=0.25, use_rslora=True))


def test_adapters_scaled_by_two_rules_are_written_by_one(tiny_llama, tmp_path, token_ids):
    lora = {
        "model.layers.0.self_attn.q_proj": LoraSpec(r=4, lora_alpha=6, use_rslora=True),
        "model.layers.1.self_attn.q_proj": LoraSpec(r=4, lora_alpha=6, use_rslora=True),
        "model.layers.0.mlp.up_proj": LoraSpec(r=2, lora_alpha=3),
    }
    model = tiny_llama().eval()
    flipproof.inject(model, SPEC, lora)
    for name in lora:
        torch.nn.init.normal_(model.get_submodule(name).lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter", None)
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    with torch.no_grad(), flipproof.faults(model, flips=False, guard=False):
        assert_same_function(opened(token_ids).logits, lambda: model(token_ids).logits, model.parameters())


def test_target_modules_need_adapters_and_layers_of_that_name(tiny_llama):
    with pytest.raises(ConfigError, match=r"target_modules = \['q_proj'\]: lora\.r = 0 makes no adapters"):
        LoraSpec(target_modules="q_proj")
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"'q_prj' names no nn\.Linear; there are q_proj, k_proj, .*, lm_head$"):
        flipproof.inject(model, SPEC, LoraSpec(r=2, target_modules=["q_prj"]))
    assert not any(isinstance(module, flipproof.FaultyLinear) for module in model.modules())
