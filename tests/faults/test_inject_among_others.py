"""An injection that fails, and what others have put on a layer or around a model."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.errors import ConfigError

FLIPS = BitFlipSpec(w_p_exp=0.01, w_p_frac=0.01, x_p_exp=0.01, x_p_frac=0.01, w_zero_out_t=1.0, x_zero_out_t=8.0)


def everything_of(model):
    """What injection could change: the modules, their classes and hooks, the parameters, what trains, the attention."""
    modules = [
        (name, id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    return modules, parameters, getattr(getattr(model, "config", None), "_attn_implementation", None)


@pytest.mark.parametrize("broken", ["attention", "layer", "adapter", "dtype", "weight_norm", "patterns"])
def test_an_injection_that_fails_leaves_the_model_as_it_was(tiny_llama, monkeypatch, broken):
    model = tiny_llama()
    spec, lora = replace(FLIPS, sites=("linear", "head", "embedding"), kv_p_frac=0.1), LoraSpec(r=2)
    if broken == "attention":
        model._supports_attention_backend = False
    elif broken == "layer":
        plain, made = flipproof.FaultyLinear.__init__, []

        def fail_late(self, *args):
            made.append(1)
            if len(made) == 9:
                raise MemoryError
            plain(self, *args)

        monkeypatch.setattr(flipproof.FaultyLinear, "__init__", fail_late)
    elif broken == "adapter":
        monkeypatch.setattr(flipproof.FaultyLinear, "reset_lora_parameters", lambda self: 1 / 0)
    elif broken == "dtype":
        model.model.layers[1].mlp.down_proj.double()
    elif broken == "weight_norm":
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model.model.layers[1].mlp.down_proj)
    else:
        spec = replace(spec, include_patterns=("nothing",))
    before = everything_of(model)
    with pytest.raises((ValueError, MemoryError, ZeroDivisionError)) as raised:
        flipproof.inject(model, spec, lora)
    assert everything_of(model) == before
    if broken in ("dtype", "weight_norm"):
        assert "model.layers.1.mlp.down_proj" in str(raised.value)
    monkeypatch.undo()
    flipproof.inject(tiny_llama(), FLIPS, lora)


def test_hooks_on_a_layer_stay_through_injection_and_back(tiny_llama, token_ids):
    model, seen = tiny_llama().eval(), []
    layer = model.model.layers[0].mlp.up_proj
    handle = layer.register_forward_hook(lambda module, _x, _y: seen.append(type(module)))
    model(token_ids)
    flipproof.inject(model, FLIPS)
    model(token_ids)
    flipproof.remove(model)
    model(token_ids)
    assert seen == [nn.Linear, flipproof.FaultyLinear, nn.Linear]
    handle.remove()
    model(token_ids)
    assert len(seen) == 3


def test_data_parallel_is_refused(tiny_llama):
    model = tiny_llama()
    flipproof.inject(model, FLIPS)
    with pytest.raises(RuntimeError, match="torchrun"):
        model.model.layers[0].mlp.up_proj._replicate_for_data_parallel()


def test_what_spreads_a_model_over_processes_comes_after(tiny_llama):
    """Else adapters would be trained by each process for itself, without a word."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        sharded = tiny_llama()
        fully_shard(sharded.model.layers[1])
        for model, what in (
            (nn.parallel.DistributedDataParallel(tiny_llama()), "DistributedDataParallel is around"),
            (nn.Sequential(nn.DataParallel(tiny_llama())), "DataParallel at 0 is around"),
            (sharded, r"fully_shard at model\.layers\.1 is around"),
        ):
            before = everything_of(model)
            with pytest.raises(ValueError, match=what):
                flipproof.inject(model, FLIPS, LoraSpec(r=2))
            assert everything_of(model) == before
    finally:
        torch.distributed.destroy_process_group()


def test_arguments_of_other_types_are_refused_by_name(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"spec = \{'w_p_exp': 0\.1\}: a BitFlipSpec"):
        flipproof.inject(model, {"w_p_exp": 0.1})
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.1))
    for tick in (1.5, True, "1", -1, 2**48):
        with pytest.raises(ValueError, match=f"tick = {tick!r}: ticks are integers"):
            flipproof.set_tick(model, tick)
    for name in ("flips", "guard", "adapters"):
        with pytest.raises(ConfigError, match=f"{name} = 'no'"), flipproof.faults(model, **{name: "no"}):
            pass
    draw = {"p_exp": 0.1, "seed": 0, "site": "a", "tick": 0}
    for name, value in {"tick": 1.5, "site": 3, "offset": 0.5, "seed": 1.5, "p_exp": "a"}.items():
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            flipproof.flip(torch.ones(4), **draw | {name: value})


@pytest.mark.parametrize("head", ["disk", "cpu"])
def test_a_model_whose_weights_accelerate_placed_is_refused_by_name(tiny_llama, tmp_path, head):
    accelerate = pytest.importorskip("accelerate")
    tiny_llama().save_pretrained(tmp_path / "model")
    where = {"device_map": {"model": "cpu", "lm_head": head}, "offload_folder": str(tmp_path / "rest")}
    model = type(tiny_llama()).from_pretrained(tmp_path / "model", **where)
    if head == "cpu":  # all in one place
        assert flipproof.inject(model, FLIPS).covered
        return
    with pytest.raises(
        ConfigError, match=r"^the model's weights are where accelerate placed them \(cpu, disk\); load it "
    ):
        flipproof.inject(model, FLIPS)
    ids = torch.arange(8)[None]
    with torch.no_grad():  # it is as it was
        assert torch.equal(model(ids).logits, tiny_llama().eval()(ids).logits)
    part = nn.ModuleDict({"plain": nn.Linear(4, 4), "offloaded": accelerate.cpu_offload(nn.Linear(4, 4), "cpu")})
    with pytest.raises(ConfigError, match=r"^offloaded's weights are where accelerate placed them \(elsewhere\)"):
        flipproof.inject(part, FLIPS)
