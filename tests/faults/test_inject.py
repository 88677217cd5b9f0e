from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from rounding import ROUNDED
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.errors import ConfigError
from flipproof.faults.flip_log import hooked
from flipproof.faults.inject import fault_sites, fault_state

FLIPS = BitFlipSpec(w_p_exp=0.01, w_p_frac=0.01, x_p_exp=0.01, x_p_frac=0.01, w_zero_out_t=1.0, x_zero_out_t=8.0)


def test_every_linear_but_the_head_is_swapped_and_keeps_its_parameters(tiny_llama):
    model = tiny_llama()
    before = dict(model.named_parameters())
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    coverage = flipproof.inject(model, FLIPS)
    assert set(coverage.covered) == linears - {"lm_head"}
    assert coverage.skipped == {"lm_head": "the output head"}
    assert all(before[name] is p for name, p in model.named_parameters())
    covered = sum(model.get_submodule(name).weight.numel() for name in coverage.covered)
    assert coverage.flops_share == covered / (covered + model.lm_head.weight.numel())
    assert "14 faulty linear layers" in str(coverage)


def test_a_head_by_another_name_is_left_alone():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "output": nn.Linear(4, 9)})
    assert flipproof.inject(model, FLIPS).covered == ("body",)


def test_patterns_overrides_and_skips(tiny_llama):
    spec = BitFlipSpec(
        w_p_exp=0.01,
        x_zero_out_t=4.0,
        include_patterns=["self_attn", "mlp.up"],
        skip_patterns=["layers.1.self_attn"],
        layer_name_to_config={
            r"model\.layers\.0\.self_attn\.q_proj": {"w_p_exp": 0.25, "x_zero_out_t": None},
            r".*v_proj": None,
        },
    )
    model = tiny_llama()
    coverage = flipproof.inject(model, spec)
    attention = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "o_proj")]
    assert set(coverage.covered) == {*attention, "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    layers = flipproof.faulty_layers(model)
    assert layers[attention[0]].w_fault.fault.p_exp == 0.25
    assert layers[attention[0]].x_fault.fault.zero_out_t is None
    assert layers[attention[1]].w_fault.fault.p_exp == 0.01
    assert layers[attention[1]].x_fault.fault.zero_out_t == 4.0


def test_nothing_matched_is_an_error_that_echoes_the_patterns(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"no layer matched include_patterns = \['q_prj'\].*q_proj"):
        flipproof.inject(model, BitFlipSpec(w_p_exp=0.1, include_patterns=["q_prj"]))
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        flipproof.inject(nn.Sequential(nn.ReLU()), FLIPS)
    flipproof.inject(model, FLIPS)
    with pytest.raises(ValueError, match="already"):
        flipproof.inject(model, FLIPS)
    assert type(model.lm_head) is nn.Linear


def test_what_no_linear_swap_sees_is_reported():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64, n_positions=32))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel: 85\.7% of the weight FLOPs .* in Conv1D \(transformer.h.0"):
        flipproof.inject(model, FLIPS)
    assert not any(isinstance(module, flipproof.FaultyLinear) for module in model.modules())

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(10, 10, bias=False)
            self.experts = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 10, 10))})

    with pytest.raises(ValueError, match=r"Mixed: 75\.0% of the weight FLOPs .* in ParameterDict \(experts\)"):
        flipproof.inject(Mixed(), FLIPS)
    coverage = flipproof.inject(Mixed(), replace(FLIPS, skip_patterns=("experts",)))
    assert coverage.uncovered == {"experts": "ParameterDict is not an nn.Linear"}
    assert coverage.flops_share == 0.25
    assert "out of reach" in str(coverage)


def test_with_adapters_only_they_train(tiny_llama):
    model = tiny_llama()
    flipproof.inject(model, FLIPS, LoraSpec(r=4))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trainable)
    model = tiny_llama()
    flipproof.inject(model, FLIPS)
    assert all(p.requires_grad for p in model.parameters())


def test_ticks_advance_by_themselves_and_can_be_set(tiny_llama, token_ids):
    model = tiny_llama().eval()
    flipproof.inject(model, FLIPS)
    with torch.no_grad():
        first, second = model(token_ids).logits, model(token_ids).logits
        assert not torch.equal(first, second)
        flipproof.set_tick(model, 1)
        assert torch.equal(model(token_ids).logits, second)
        flipproof.set_tick(model, 0)
        assert torch.equal(model(token_ids).logits, first)
    with pytest.raises(ValueError, match="tick = -1"):
        flipproof.set_tick(model, -1)


def test_persistent_draws_repeat_and_transient_ones_do_not(tiny_llama, token_ids):
    for kind, repeats in (("persistent", True), ("transient", False)):
        model = tiny_llama().eval()
        flipproof.inject(model, BitFlipSpec(w_p_frac=0.1, w_faults=kind, x_p_frac=0.1, x_faults=kind))
        with torch.no_grad():
            assert torch.equal(model(token_ids).logits, model(token_ids).logits) is repeats
    # another seed is another chip
    persistent = BitFlipSpec(w_p_frac=0.1, w_faults="persistent")
    model = tiny_llama().eval()
    flipproof.inject(model, persistent)
    one = model(token_ids).logits
    flipproof.set_seed(model, 1)
    assert not torch.equal(model(token_ids).logits, one)
    flipproof.set_seed(model, 0)
    assert torch.equal(model(token_ids).logits, one)


def test_equal_layers_do_not_share_masks(tiny_llama):
    model = tiny_llama()
    flipproof.inject(model, FLIPS)
    keys = [int(key) for layer in flipproof.faulty_layers(model).values() for key in (layer.x_key, layer.w_key)]
    assert len(set(keys)) == len(keys) == 28


def test_generate_flips_anew_for_each_token(tiny_llama):
    model = tiny_llama().eval()
    flipproof.inject(model, FLIPS)
    ticks = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, _i, _o: ticks.append(int(m.state.tick)))
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert ticks == [0, 1, 2, 3, 4]


def test_faults_switches_and_restores(tiny_llama, token_ids):
    model = tiny_llama().eval()
    clean = model(token_ids).logits
    flipproof.inject(model, FLIPS, LoraSpec(r=2))
    for layer in flipproof.faulty_layers(model).values():
        nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        model(token_ids)
        expected_next = model(token_ids).logits
        flipproof.set_tick(model, 1)
        with flipproof.faults(model, flips=False, guard=False, adapters=False):
            assert torch.equal(model(token_ids).logits, clean)
        with flipproof.faults(model, seed=5):
            one = model(token_ids).logits
        with flipproof.faults(model, seed=5):
            assert torch.equal(model(token_ids).logits, one)
        assert torch.equal(model(token_ids).logits, expected_next)


def test_after_another_seed_the_keys_are_the_same_tensors(tiny_llama):
    """A CUDA graph that was recorded before reads them where they were."""
    model = tiny_llama()
    everything = replace(FLIPS, sites=("linear", "head", "embedding"), kv_p_exp=0.1)
    flipproof.inject(model, everything)
    sites, state = fault_sites(model).values(), fault_state(model)
    assert {site.kind for site in sites} == {"linear", "head", "embedding", "kv"}
    before, place = [site.keys_held() for site in sites], state._next
    with flipproof.faults(model, seed=5):
        assert state.seed == 5
        within = [site.keys_held() for site in sites]
    assert state.seed == everything.base_seed
    assert state._next is place
    for site, held, other in zip(sites, before, within, strict=True):
        assert all(value is held[name] is not other[name] for name, value in site.keys_held().items())


def test_merge_and_remove_give_plain_layers_back(tiny_llama, token_ids):
    for restore in (flipproof.merge, flipproof.remove):
        model = tiny_llama().eval()
        clean = model(token_ids).logits
        flipproof.inject(model, FLIPS, LoraSpec(r=2, lora_alpha=6))
        layer = model.model.layers[0].mlp.up_proj
        nn.init.normal_(layer.lora_B)
        expected = layer.weight + 3.0 * layer.lora_B @ layer.lora_A
        restore(model)
        assert not any(isinstance(m, flipproof.FaultyLinear) for m in model.modules())
        assert all(type(m) is nn.Linear for n, m in model.named_modules() if n.endswith("_proj"))
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        if restore is flipproof.merge:
            atol = ROUNDED * float(expected.abs().max())  # a sum of three terms
            torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, expected, rtol=0, atol=atol)
        else:
            assert torch.equal(model(token_ids).logits, clean)
        flipproof.inject(model, FLIPS)


def test_a_sharded_model_is_not_restored_and_stays_as_it_is(tiny_llama, token_ids):
    """FSDP gathers weights into the layers that it has wrapped, and would not into others."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_llama(tie_word_embeddings=True).eval()
        flipproof.inject(model, replace(FLIPS, sites=("linear", "head")), LoraSpec(r=2))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        expected = model(token_ids).logits
        for restore in (flipproof.merge, flipproof.remove):
            with pytest.raises(ValueError, match="this model is sharded"):
                restore(model)
        flipproof.set_tick(model, 0)
        assert torch.equal(model(token_ids).logits, expected)
        assert model.config.tie_word_embeddings
    finally:
        dist.destroy_process_group()


def test_offloaded_weights_are_merged_once_they_are_back(tiny_llama):
    model = tiny_llama().eval()
    flipproof.inject(model, FLIPS, LoraSpec(r=2))
    layer = model.model.layers[0].mlp.up_proj
    nn.init.normal_(layer.lora_B)
    expected = layer.merged_weight().detach().clone()
    cpu_offload(model, execution_device=torch.device("cpu"))
    for restore in (flipproof.merge, flipproof.remove):
        with pytest.raises(ValueError, match="accelerate fetches this model's weights"):
            restore(model)
    remove_hook_from_module(model, recurse=True)
    flipproof.merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_what_is_not_faulty_is_not_restored(tiny_llama):
    for restore in (flipproof.merge, flipproof.remove):
        with pytest.raises(ValueError, match="no faulty layers"):
            restore(tiny_llama())


def test_set_faults_changes_rates_in_place(tiny_llama, token_ids):
    other = BitFlipSpec(w_p_frac=0.3, base_seed=4)
    one, two = tiny_llama().eval(), tiny_llama().eval()
    flipproof.inject(one, FLIPS)
    one(token_ids)
    flipproof.set_faults(one, other)
    flipproof.inject(two, other)
    assert torch.equal(one(token_ids).logits, two(token_ids).logits)


def test_a_layer_used_twice_is_one_faulty_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4)})
    coverage = flipproof.inject(model, FLIPS)
    assert model["a"] is model["b"]
    assert coverage.covered == ("a", "c")
    flipproof.remove(model)
    assert model["a"] is model["b"]


def test_head_and_embedding(tiny_llama, token_ids):
    """Against a model whose tables were flipped by hand."""
    spec = BitFlipSpec(w_p_exp=0.001, w_p_frac=0.01, w_zero_out_t=2.0, sites=("head", "embedding"), base_seed=3)
    model, by_hand = tiny_llama().eval(), tiny_llama().eval()
    coverage = flipproof.inject(model, spec)
    assert coverage.covered == ("lm_head",)
    assert coverage.memories == ("model.embed_tokens",)
    flipproof.set_tick(model, 4)
    for name in ("lm_head", "model.embed_tokens"):
        weight = by_hand.get_parameter(f"{name}.weight")
        flipped = flipproof.flip(weight, p_exp=0.001, p_frac=0.01, zero_out_t=2.0, seed=3, site=f"{name}/w", tick=4)
        assert not torch.equal(flipped, weight)
        weight.data.copy_(flipped)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, by_hand(token_ids).logits)
    flipproof.remove(model)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert list(model.state_dict()) == list(tiny_llama().state_dict())


def test_tied_head_and_embedding_are_one_memory(tiny_llama, token_ids):
    model = tiny_llama(tie_word_embeddings=True).eval()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.1, sites=("head", "embedding")))
    head, table = model.lm_head, model.model.embed_tokens
    assert head.weight is table.weight
    assert head.w_key == table.key
    assert head.x_key != table.key


def test_an_embedding_that_scales_goes_on_scaling():
    config = GemmaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8)
    model = GemmaForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    table = model.get_input_embeddings()
    clean, cls = table(ids), type(table)
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.1, sites=("embedding",)))
    rows = flipproof.flip(table.weight.detach(), p_frac=0.1, seed=0, site="model.embed_tokens/w", tick=0)[ids]
    assert torch.equal(model.get_input_embeddings()(ids), rows * model.config.hidden_size**0.5)
    with flipproof.faults(model, flips=False):
        assert torch.equal(table(ids), clean)
    flipproof.remove(model)
    assert type(table) is cls
    assert torch.equal(table(ids), clean)


def test_sites_that_a_spec_leaves_out_become_clean(tiny_llama, token_ids):
    model = tiny_llama().eval()
    everything = BitFlipSpec(w_p_frac=0.1, sites=("linear", "head", "embedding"))
    flipproof.inject(model, everything)
    only_head, by_itself = replace(everything, sites=("head",)), tiny_llama().eval()
    flipproof.set_faults(model, only_head)
    flipproof.inject(by_itself, only_head)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, by_itself(token_ids).logits)


def test_experts_count_by_how_many_of_them_a_token_sees():
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    attention, experts, router, head = 4 * 16 * 16, 2 * 3 * 16 * 32, 8 * 16, 64 * 16
    share = (experts + router) / (attention + experts + router + head)
    with pytest.raises(ValueError, match=f"MixtralForCausalLM: {share:.1%} of the weight FLOPs"):
        flipproof.inject(model, FLIPS)
    coverage = flipproof.inject(model, replace(FLIPS, skip_patterns=("experts", "gate")))
    assert coverage.flops_share == attention / (attention + experts + router + head)


def test_bits_that_the_dtype_does_not_have_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"bitflip.x_p_bits or x_protected_bits, bit '31': bfloat16 has bits 0 to 15"):
        flipproof.inject(tiny_llama().bfloat16(), BitFlipSpec(x_p_bits={"31": 0.1}))


def test_the_embedding_obeys_patterns_and_overrides(tiny_llama):
    everything = {"w_p_frac": 0.1, "sites": ("linear", "embedding")}
    for left_alone in ({"skip_patterns": ("embed",)}, {"include_patterns": ("layers",)}):
        model = tiny_llama()
        assert flipproof.inject(model, BitFlipSpec(**everything, **left_alone)).memories == ()
        assert type(model.model.embed_tokens) is nn.Embedding
    model = tiny_llama()
    own = {"model.embed_tokens": {"w_p_frac": 0.25}}
    flipproof.inject(model, BitFlipSpec(sites=("embedding",), layer_name_to_config=own))
    assert model.model.embed_tokens.fault.fault.p_frac == 0.25


def test_keys_and_values_of_one_layer_by_override(tiny_llama):
    model = tiny_llama()
    spec = BitFlipSpec(layer_name_to_config={r".*layers\.1\.self_attn": {"kv_p_frac": 0.1}})
    assert flipproof.inject(model, spec).memories == ("model.layers.1.self_attn",)


def test_a_tied_head_draws_alike_whether_or_not_the_embedding_is_faulty(tiny_llama):
    keys = []
    for sites in (("head",), ("head", "embedding")):
        model = tiny_llama(tie_word_embeddings=True)
        flipproof.inject(model, BitFlipSpec(w_p_frac=0.1, sites=sites))
        keys.append(int(model.lm_head.w_key))
    assert keys[0] == keys[1]


def test_a_model_with_a_faulty_embedding_can_be_copied_and_saved(tiny_llama, token_ids, tmp_path):
    model = tiny_llama().eval()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.1, sites=("linear", "embedding")))
    torch.save(model, tmp_path / "model.pt")
    for copy in (deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        flipproof.set_tick(model, 3)
        flipproof.set_tick(copy, 3)
        with torch.no_grad():
            assert torch.equal(copy(token_ids).logits, model(token_ids).logits)
        flipproof.remove(copy)
        assert type(copy.model.embed_tokens) is nn.Embedding


def test_under_autocast_bits_flip_in_the_dtype_that_is_computed_with(tiny_llama, token_ids):
    seen = {}

    def look(name, x, draw):
        seen[name.rpartition("/")[2]] = seen.get(name.rpartition("/")[2], set()) | {x.dtype}
        return x

    model = tiny_llama().eval()
    everything = {"w_p_frac": 0.1, "x_p_frac": 0.1, "kv_p_frac": 0.1}
    flipproof.inject(model, BitFlipSpec(**everything, sites=("linear", "head", "embedding")))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), hooked(model, look):
        model(token_ids)
    assert seen == {key: {torch.bfloat16} for key in "wxkv"}


def test_bits_of_overrides_are_checked_too(tiny_llama):
    spec = BitFlipSpec(w_p_frac=0.1, layer_name_to_config={".*q_proj": {"w_p_bits": {"31": 0.1}}})
    with pytest.raises(ValueError, match=r"bitflip.w_p_bits or w_protected_bits, bit '31': bfloat16 has bits 0 to 15"):
        flipproof.inject(tiny_llama().bfloat16(), spec)


def test_patterns_that_match_nothing_are_warned_of_and_the_head_is_known(tiny_llama, caplog):
    spec = BitFlipSpec(w_p_exp=0.1, skip_patterns=["output", "lm_head", "embed", "q_proj", "gate_prj"])
    with caplog.at_level("WARNING", "flipproof"):
        flipproof.inject(tiny_llama(), spec)
    (line,) = caplog.messages
    assert line.startswith("bitflip.skip_patterns: 'gate_prj' is in no layer's name; the nearest are gate_proj")


def test_adapters_without_a_faulty_linear_layer_are_refused(tiny_llama):
    for where in (
        {"sites": ["embedding"]},
        {"include_patterns": ["embed"], "sites": ["linear", "embedding"]},
        {"skip_patterns": ["proj"]},
    ):
        model = tiny_llama()
        spec = BitFlipSpec(w_p_exp=0.1, kv_p_exp=0.1, **where)
        with pytest.raises(ConfigError) as error:
            flipproof.inject(model, spec, LoraSpec(r=2))
        (line,) = error.value.problems
        assert line.startswith("lora.r = 2: adapters are made on linear layers of bitflip.sites; no layer matched")
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any("flipproof" in type(module).__module__ for module in model.modules())
    flipproof.inject(tiny_llama(), BitFlipSpec(w_p_exp=0.1, sites=["head", "embedding"]), LoraSpec(r=2))
