from functools import partial
from unittest.mock import patch

import pytest
import torch
from rounding import assert_same_function
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.faults.attention import FaultyKeysValues, attend_with
from flipproof.faults.inject import fault_sites
from flipproof.faults.state import FaultState
from flipproof.models import recompute

SHAPE = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
OTHERS = {
    # eager, with a soft cap on scores and grouped heads
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, **IDS, intermediate_size=64, num_key_value_heads=2, head_dim=8)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE, **IDS, intermediate_size=64)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SHAPE, **IDS, ffn_dim=64, word_embed_proj_dim=32)),
}


@pytest.fixture(params=["llama", *OTHERS])
def model(request, tiny_llama):
    torch.manual_seed(0)
    return (tiny_llama if request.param == "llama" else OTHERS[request.param])().eval()


def logits(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def test_without_flips_the_model_is_itself(model, token_ids):
    clean, name = logits(model, token_ids), model.config._attn_implementation
    coverage = flipproof.inject(model, BitFlipSpec(kv_p_exp=0.001, kv_p_frac=0.05))
    assert len(coverage.memories) == 2
    assert "faulty besides: " in str(coverage)
    with flipproof.faults(model, flips=False):
        assert torch.equal(logits(model, token_ids), clean)
    assert not torch.equal(logits(model, token_ids), clean)
    flipproof.remove(model)
    assert model.config._attn_implementation == name
    assert torch.equal(logits(model, token_ids), clean)


@pytest.mark.parametrize("faulty", [False, True])
def test_another_attention_reads_the_same_faulty_keys_and_values(tiny_llama, token_ids, faulty):
    one, other = tiny_llama(attn_implementation="sdpa"), tiny_llama(attn_implementation="eager")
    if faulty:
        for model in (one, other):
            flipproof.inject(model, BitFlipSpec(kv_p_exp=0.001, kv_p_frac=0.05))
    attend_with(one, "eager")
    assert torch.equal(logits(one, token_ids), logits(other, token_ids))
    if faulty:
        flipproof.remove(one)
    assert one.config._attn_implementation == "eager"


def test_keys_and_values_flip_as_rows_of_their_own_draws(tiny_llama, token_ids, monkeypatch):
    """Against attention that is given keys and values flipped by hand."""
    fault = {"p_exp": 0.01, "p_frac": 0.1, "zero_out_t": 3.0}
    model = tiny_llama().eval()
    flipproof.inject(model, BitFlipSpec(**{f"kv_{key}": value for key, value in fault.items()}, base_seed=5))
    flipproof.set_tick(model, 9)
    flipped = logits(model, token_ids)
    flipproof.remove(model)

    attend = torch.nn.functional.scaled_dot_product_attention
    sites = iter(["model.layers.0.self_attn", "model.layers.1.self_attn"])

    def by_hand(query, key, value, **options):
        site = next(sites)
        both = []
        for x, operand in ((key, "k"), (value, "v")):
            rows = [
                flipproof.flip(row.transpose(0, 1), **fault, seed=5, site=f"{site}/{operand}", tick=9, offset=i * 2**40)
                for i, row in enumerate(x[:, :1])  # one head of keys and values, which sdpa repeats
            ]
            both.append(torch.stack(rows).transpose(1, 2).repeat_interleave(query.shape[1], dim=1))
        options.pop("enable_gqa", None)
        return attend(query, *both, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", by_hand)
    assert torch.equal(logits(model, token_ids), flipped)


def test_a_persistent_fault_stays_at_its_place_as_the_cache_grows(model, token_ids):
    flipproof.inject(model, BitFlipSpec(kv_p_exp=0.001, kv_p_frac=0.05, kv_zero_out_t=8.0, kv_faults="persistent"))
    with torch.no_grad():
        output = model(token_ids[:, :10], use_cache=True)
        steps = [output.logits]
        for t in range(10, token_ids.shape[1]):
            output = model(token_ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    assert_same_function(torch.cat(steps, dim=1), lambda: logits(model, token_ids), model.parameters())
    # and a row of the batch has it wherever the other rows are
    assert_same_function(logits(model, token_ids[:1]), lambda: logits(model, token_ids)[:1], model.parameters())


def test_a_transient_one_flips_anew_at_every_read(model, token_ids):
    flipproof.inject(model, BitFlipSpec(kv_p_frac=0.05))
    first, second = logits(model, token_ids), logits(model, token_ids)
    assert not torch.equal(first, second)
    flipproof.set_tick(model, 0)
    assert torch.equal(logits(model, token_ids), first)


KV = BitFlipSpec(kv_p_exp=0.002, kv_p_frac=0.02, kv_zero_out_t=1.0)


def test_gradients_pass_where_a_value_was_kept(token_ids):
    torch.manual_seed(0)
    faulty = FaultyKeysValues("a", KV.kv, FaultState(0))
    key, value = (torch.randn(2, 1, 9, 8, requires_grad=True) for _ in "kv")
    flipped = faulty.read(key, value)
    for x, y in zip((key, value), flipped, strict=True):
        y.sum().backward()
        assert torch.equal(x.grad, (y != 0).float())
        assert 0 < x.grad.sum() < x.numel()


@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_training_is_the_same_compiled_and_recomputed(tiny_llama, token_ids, how):
    def prepared(prepare):
        model = tiny_llama()
        flipproof.inject(model, KV, LoraSpec(r=2, lora_alpha=2))
        prepare(model)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for layer in flipproof.faulty_layers(model).values():
                torch.nn.init.normal_(layer.lora_B, std=0.02)
        return model

    def gradients(model):
        flipproof.set_tick(model, 0)
        model.zero_grad()
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    def change(model):
        if how == "recomputed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        else:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")

    plain = prepared(lambda model: model.train())
    assert_same_function(gradients(prepared(change)), lambda: gradients(plain), plain.parameters())


def test_only_the_named_modules(tiny_llama, token_ids):
    model = tiny_llama().eval()
    flipproof.inject(model, BitFlipSpec(kv_p_frac=0.05, skip_patterns=("layers.0.",)))
    assert list(fault_sites(model)) == ["model.layers.1.self_attn.faulty_keys_values"]
    assert not any("faulty" in key for key in model.state_dict())
    clean_spec = BitFlipSpec(kv_p_frac=0.0, x_p_frac=0.1)
    flipproof.set_faults(model, clean_spec)  # no linear layer was injected, so nothing is left
    assert torch.equal(logits(model, token_ids), logits(tiny_llama().eval(), token_ids))


def test_a_model_without_such_attention_is_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"bitflip.kv_\*: Plain has no attention"):
        flipproof.inject(Plain(), BitFlipSpec(kv_p_frac=0.1))


def test_all_blocks_are_one_compiled_function(tiny_llama, token_ids):
    """Else a model of more blocks than torch.compile has patience for could not be compiled."""
    model = tiny_llama(num_hidden_layers=6)
    flipproof.inject(model, KV, LoraSpec(r=2, lora_alpha=2))
    counter = CompileCounter()
    torch._dynamo.reset()
    with patch("torch.compile", partial(torch.compile, backend=counter)):
        recompute._recomputing.cache_clear()
        recompute.prepare(list(model.model.layers), compiled=True)
    model(token_ids, use_cache=False)
    assert counter.frame_count == 2  # the input of the first block needs no gradient
    recompute._recomputing.cache_clear()
