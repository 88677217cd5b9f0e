"""Guards go with one model: whoever takes them sees that they are of its weights, its dtype and its basis."""

import weakref
from dataclasses import replace

import pytest
import torch
from guards_by_hand import guards_of
from quantised_models import quantised
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.errors import ConfigError
from flipproof.faults import same_model
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.fault import GRANULARITIES
from flipproof.faults.inject import fault_sites, fault_state
from flipproof.faults.same_model import with_own_weights

LAST = "model.layers.1.mlp.down_proj"
SPEC = {"w_p_frac": 1e-3, "x_p_frac": 1e-3}


@pytest.fixture
def written(tmp_path):
    """Writes guards, and gives the keys of [bitflip] that use them."""

    def write(guards):
        directory = tmp_path / f"guards-{len(list(tmp_path.iterdir()))}"
        guards.write(directory)
        return {**SPEC, "guards": str(directory)}

    return write


def weight_of(model, name):
    return model.get_submodule(name).weight


@torch.no_grad()
def larger(model):
    weight_of(model, LAST).mul_(1.3)


@torch.no_grad()
def smaller(model):
    weight_of(model, LAST).mul_(0.75)


@torch.no_grad()
def another_row(model):  # of 32
    weight_of(model, LAST)[7] *= 0.5


@torch.no_grad()
def smaller_embedding(model):  # nothing flips there
    weight_of(model, "model.embed_tokens").mul_(0.5)


@pytest.mark.parametrize("by", ["channel", "layer"])
@pytest.mark.parametrize("change", [larger, smaller, another_row, smaller_embedding])
def test_a_model_of_other_weights_is_refused_whichever_differ(tiny_llama, written, change, by):
    model = tiny_llama()
    keys = written(guards_of(model, by=by))
    change(model)
    if change is another_row and by == "layer":  # the largest is in another one
        flipproof.inject(model, BitFlipSpec(**keys))
        return
    name = "model.embed_tokens" if change is smaller_embedding else LAST
    share = "3%" if change is another_row else "100%"
    with pytest.raises(ConfigError, match=rf"another model, the-model: {share} of the rows of {name} are far beyond"):
        flipproof.inject(model, BitFlipSpec(**keys))
    assert not fault_sites(model)
    assert type(model.get_submodule(LAST)) is nn.Linear


def test_by_tensor_the_largest_weight_of_all_is_known(tiny_llama, written):
    model = tiny_llama()
    keys = written(guards_of(model, by="tensor"))
    flipproof.inject(model, BitFlipSpec(**keys))
    flipproof.remove(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with pytest.raises(ConfigError, match="was fitted to another model"):
        flipproof.inject(model, BitFlipSpec(**keys))


def test_a_model_that_lacks_a_layer_is_another(tiny_llama, written):
    keys = written(guards_of(tiny_llama(num_hidden_layers=3)))
    with pytest.raises(ConfigError, match=r"another model, the-model: there is no model\.layers\.2\.mlp\.down_proj"):
        flipproof.inject(tiny_llama(), BitFlipSpec(**keys))


@torch.no_grad()
def test_the_very_model_passes_without_a_word_and_one_that_was_trained_with_one(tiny_llama, written, caplog):
    model = tiny_llama()
    keys = written(guards_of(model))
    flipproof.inject(model, BitFlipSpec(**keys))
    flipproof.remove(model)
    assert not [line for line in caplog.messages if "guards" in line]
    weight_of(model, LAST).mul_(1.01)
    flipproof.inject(model, BitFlipSpec(**keys))
    assert [line for line in caplog.messages if "near: 1 layers have been trained or quantised since" in line]


def test_quantised_weights_are_looked_at_one_after_the_other(tiny_llama, written, monkeypatch):
    """Each is made anew for that, and is as large as the plain one."""
    model, alive, most = quantised(tiny_llama(), "nf4"), [], []
    keys = written(guards_of(model))
    real = same_model.dequantise

    def spy(*args):
        most.append(sum(one() is not None for one in alive))
        made = real(*args)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(same_model, "dequantise", spy)
    flipproof.inject(model, BitFlipSpec(**{**keys, "w_p_frac": None, "w_code_p": 1e-3}))
    assert most == [0] * 14


def test_the_dtype_is_the_one_that_flips(tiny_llama, written):
    model = tiny_llama()
    halved = replace(guards_of(model.bfloat16()), dtype="bfloat16")
    keys = written(halved)
    flipproof.inject(model, BitFlipSpec(**keys))
    model = tiny_llama()
    words = r"was fitted to a model of dtype 'bfloat16'; it is 'float32' here"
    with pytest.raises(ConfigError, match=words):
        flipproof.inject(model, BitFlipSpec(**keys))
    # under autocast bits flip in what is computed with, and float32 weights are rounded to the very same
    flipproof.inject(model, BitFlipSpec(**keys), computed=torch.bfloat16)
    assert fault_sites(model)
    other = tiny_llama()
    flipproof.inject(other, BitFlipSpec(**SPEC))
    with pytest.raises(ConfigError, match=words):
        flipproof.set_faults(other, BitFlipSpec(**keys))


def test_guards_of_another_basis_are_refused(tiny_llama, written):
    model = tiny_llama()
    keys = written(replace(guards_of(model), basis={"how": "residual", "seed": 3}))
    words = r"was fitted to a model of basis 'rotated \(residual, seed 3\)'; it is 'not rotated' here"
    with pytest.raises(ConfigError, match=words):
        flipproof.inject(model, BitFlipSpec(**keys))
    model.config.flipproof_rotation = {"how": "residual", "seed": 3}
    flipproof.inject(model, BitFlipSpec(**keys))


@pytest.mark.parametrize("computed", [None, torch.bfloat16])
@pytest.mark.parametrize("by", GRANULARITIES)
def test_merged_weights_have_guards_of_their_own(tiny_llama, written, caplog, by, computed):
    """Also a head that was tied, whose maxima were the embedding's."""

    def guards():
        found, dtype = guards_of(model), computed or torch.float32
        rounded = {name: maxima.to(dtype).float() for name, maxima in found.maxima.items()}
        return replace(found, maxima=rounded, dtype=dtype_name(dtype)).coarser(by)

    model = tiny_llama(tie_word_embeddings=True)
    old = guards()
    old = replace(old, maxima={name: maxima for name, maxima in old.maxima.items() if name != "lm_head/w"})
    sites = {"sites": ("linear", "head", "embedding"), "kv_p_frac": 1e-3}
    keys = written(old) | sites
    flipproof.inject(model, BitFlipSpec(**keys), LoraSpec(r=2), computed=computed)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3, generator=generator)
    found = with_own_weights(old, model, fault_state(model))
    flipproof.merge(model)
    expected = guards()
    assert found.maxima.keys() == expected.maxima.keys() > old.maxima.keys()
    assert all(torch.equal(maxima, expected.maxima[name]) for name, maxima in found.maxima.items())
    with pytest.raises(ConfigError, match=r"lm_head/w|was fitted to another model"):
        flipproof.inject(model, BitFlipSpec(**keys), computed=computed)
    caplog.clear()
    flipproof.inject(model, BitFlipSpec(**written(found), **sites), computed=computed)
    assert not [line for line in caplog.messages if "guards" in line]


@pytest.fixture
def mesh():
    """That of the second of four processes, which never talk."""
    torch.distributed.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("by", ["channel", "layer", "tensor"])
def test_of_a_sharded_weight_a_process_knows_its_part(tiny_llama, mesh, by):
    model = tiny_llama()
    guards = guards_of(model, by=by)

    def check(change):
        weights = {name: module.weight.detach().clone() for name, module in model.named_modules() if is_weighed(module)}
        change(weights[LAST])
        shards = {name: distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None) for name, w in weights.items()}
        guards.check_model("float32", None, {name: shard.detach for name, shard in shards.items()})

    def row(index, factor):
        return lambda weight: weight[index].mul_(factor)

    check(lambda _: None)
    check(row(0, 2.0))  # the first process sees that: of 32 rows this one has the 9th to 16th
    check(row(16, 2.0))
    for place in (8, 15):
        with pytest.raises(ConfigError, match=f"of the rows of {LAST} are far beyond"):
            check(row(place, 20.0))
    if by == "channel":
        with pytest.raises(ConfigError, match=f"12% of the rows of {LAST} are far beyond or below"):
            check(row(8, 0.5))
    else:  # what is largest may be in another part
        check(row(8, 0.5))


def is_weighed(module):
    return isinstance(module, nn.Linear | nn.Embedding)


# -- other faults, or the same -----------------------------------------------------------------------------------------


def faults_in(model):
    found = {}
    for name, site in fault_sites(model).items():
        for attribute in ("x_fault", "w_fault", "fault", "faults"):
            if (value := getattr(site, attribute, None)) is not None:
                found[name, attribute] = value
    state = next(iter(fault_sites(model).values())).state
    return found, state.guards, state.seed, state.exact_gradient


@pytest.mark.parametrize("bad", ["another model", "too few layers", "too coarse", "not there"])
def test_faults_that_cannot_be_set_leave_the_old_ones_all(tiny_llama, written, token_ids, tmp_path, bad):
    model = tiny_llama()
    sites = {"sites": ("linear", "head", "embedding"), "kv_p_frac": 1e-3}
    guards = guards_of(model)
    flipproof.inject(model, BitFlipSpec(**written(guards), **sites))
    before, output = faults_in(model), model(token_ids).logits
    if bad == "another model":
        new = written(replace(guards, maxima={name: 2 * maxima for name, maxima in guards.maxima.items()}))
    elif bad == "too few layers":
        new = written(replace(guards, maxima={n: maxima for n, maxima in guards.maxima.items() if n != f"{LAST}/x"}))
    elif bad == "too coarse":
        new = written(guards.coarser("layer")) | {"guards_by": "channel"}
    else:
        new = {**SPEC, "guards": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match="guards"):
        flipproof.set_faults(model, BitFlipSpec(**new, **sites, base_seed=7, exact_gradient=False))
    found, *others = faults_in(model)
    assert found.keys() == before[0].keys()
    assert all(value is before[0][name] for name, value in found.items())
    assert tuple(others) == before[1:]
    flipproof.set_tick(model, 0)
    assert torch.equal(model(token_ids).logits, output)


# -- keys that say nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("w_margin", 2.0), ("x_margin", 3.0), ("kv_margin", 3.0), ("guards_by", "layer"), ("guards_floor", 0)],
)
def test_how_guards_are_used_says_nothing_without_any(tiny_llama, written, key, value):
    model = tiny_llama()
    words = rf"bitflip\.{key} = {value!r}.*: it says how fitted guards are used; set bitflip\.guards to"
    with pytest.raises(ConfigError, match=words):
        flipproof.inject(model, BitFlipSpec(w_p_frac=1e-3, **{key: value}))
    flipproof.inject(model, BitFlipSpec(**written(guards_of(model)), **{key: value}))
    with pytest.raises(ConfigError, match=words):
        flipproof.set_faults(model, BitFlipSpec(**{key: value}))


def test_a_threshold_says_nothing_beside_guards(tiny_llama, written):
    keys = written(guards_of(tiny_llama()))
    for key in ("w_zero_out_t", "x_zero_out_t", "kv_zero_out_t"):
        words = rf"bitflip\.{key} = 8\.0: bitflip\.guards = '.*' has thresholds in its place; leave one of the two out"
        with pytest.raises(ConfigError, match=words):
            flipproof.inject(tiny_llama(), BitFlipSpec(**keys, **{key: 8.0}))
    spec = BitFlipSpec(**keys, layer_name_to_config={".*down_proj": {"x_zero_out_t": 4.0, "x_margin": 3.0}, "a": False})
    with pytest.raises(
        ConfigError, match=r"bitflip\.layer_name_to_config '\.\*down_proj': x_zero_out_t = 4\.0: "
    ) as raised:
        flipproof.inject(tiny_llama(), spec)
    assert len(raised.value.problems) == 1
    spec = BitFlipSpec(w_p_frac=1e-3, layer_name_to_config={".*down_proj": {"x_zero_out_t": 4.0, "x_margin": 3.0}})
    with pytest.raises(
        ConfigError, match=r"bitflip\.layer_name_to_config '\.\*down_proj': x_margin = 3\.0: it says how"
    ):
        flipproof.inject(tiny_llama(), spec)
