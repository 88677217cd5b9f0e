import pytest
import transformers
from guards_by_hand import guards_of

import flipproof
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.sweep.order import Rate
from flipproof.sweep.table import Grid, all_that_flips, rates_of, read_voltages, resolved


def config(bitflip=None, **sweep):
    overrides = {
        "model": {"hf_model_path": "some/model"},
        "bitflip": bitflip or {},
        "sweep": {"p": "1e-6,1e-5"} | sweep,
    }
    return load_config([], overrides)


def grid(model, bitflip=None, **sweep):
    settings = resolved(config(bitflip, **sweep))
    flipproof.inject(model, all_that_flips(settings))
    return Grid(settings, rates_of(settings.sweep), model, "float32")


def covered(grid, model, curve):
    """What is faulty under a cell's faults, of a model of its own."""
    flipproof.set_faults(model, grid.spec(curve[-1]))
    return {
        name for name, layer in flipproof.faulty_layers(model).items() if layer.w_fault.flips or layer.x_fault.flips
    }


def test_blocks_are_the_repeated_ones(tiny_llama):
    model = tiny_llama(num_hidden_layers=12)
    found = grid(model, layers="all,block")
    assert found.layers == ["all", *(f"model.layers.{i}." for i in range(12))]
    every = set(flipproof.faulty_layers(model))
    assert len(every) == 12 * 7
    by_block = [covered(found, model, curve) for curve in found.plan.curves]
    assert by_block[0] == every
    assert by_block[2] == {name for name in every if name.startswith("model.layers.1.")}  # and not of block 10
    assert set.union(*by_block[1:]) == every
    assert sum(map(len, by_block[1:])) == len(every)


def test_kinds_are_whole_last_names():
    """GPT-NeoX has a layer "dense" and others "dense_h_to_4h", "dense_4h_to_h"."""
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**shape, intermediate_size=64))
    found = grid(model, layers="kind")
    assert sorted(found.layers) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    for curve in found.plan.curves:
        names = covered(found, model, curve)
        assert {name.rpartition(".")[2] for name in names} == {curve[0].layers}
        assert len(names) == 2


def test_each_bit_of_the_dtype(tiny_llama):
    found = grid(tiny_llama(), bits="each,sign")
    assert found.bits == [*(str(bit) for bit in range(32)), "sign"]
    assert len(found.plan.trials) == 33 * 2 * 5


def test_the_grid_is_the_product(tiny_llama):
    found = grid(tiny_llama(), sites="w,x,head", layers="q_proj,up_proj", protection="none,secded,tmr-exp", seeds="2")
    # the head is a layer of its own
    assert found.layers == ["q_proj", "up_proj", "all"]
    assert len(found.plan.cells) == 2 * 3 * (2 * 2 + 1)
    assert found.overhead == {"none": 0.0, "secded": 0.125, "tmr-exp": 2 * 8 / 32}
    assert found.plan.seeds == (1, 2)


def test_keys_and_values_are_in_the_attention(tiny_llama):
    found = grid(tiny_llama(), sites="kv,w", layers="kind")
    assert {cell.layers for cell in found.plan.cells if cell.sites == "kv"} == {"self_attn"}
    assert "self_attn" not in {cell.layers for cell in found.plan.cells if cell.sites == "w"} | {"q_proj"}


def test_the_guard_is_the_default_where_it_can_be():
    assert resolved(config()).sweep.protections() == ["none"]
    thresholds = {"w_zero_out_t": "2", "x_zero_out_t": "64"}
    assert resolved(config(thresholds)).sweep.protections() == ["guard"]
    with pytest.raises(ConfigError, match=r"protection = guard: the guard needs bitflip\.x_zero_out_t; set it, or say"):
        resolved(config({"w_zero_out_t": "2"}))
    assert resolved(config({"w_zero_out_t": "2"}, sites="w,head")).sweep.protections() == ["guard"]
    with pytest.raises(ConfigError, match=r"secded\+guard: the guard needs bitflip\.w_zero_out_t and bitflip\.x_zero"):
        resolved(config(protection="none,secded+guard"))


@pytest.mark.parametrize(
    ("bitflip", "sweep", "words"),
    [
        ({}, {"p": None}, "sweep.p is not set"),
        ({"w_protection": "secded"}, {}, "bitflip.w_protection = 'secded': a sweep takes that from sweep.protection"),
        ({"x_p_bits": {"15": 0.1}}, {}, "bitflip.x_p_bits = {'15': 0.1}: a sweep takes that from sweep.bits"),
        ({"layer_name_to_config": {"a": {"w_p_exp": 0.1}}}, {}, "layer_name_to_config 'a': sets w_p_exp, which"),
        ({"include_patterns": ["a"]}, {"layers": "block"}, "sweep.layers = 'block': bitflip.include_patterns = ['a']"),
    ],
)
def test_what_both_tables_say_is_refused(bitflip, sweep, words):
    with pytest.raises(ConfigError) as error:
        resolved(config(bitflip, **sweep))
    (problem,) = error.value.problems
    assert words in problem


BOTH = {"guards": "DIR", "w_zero_out_t": 1.0, "x_zero_out_t": 8.0}


@pytest.mark.parametrize(
    ("bitflip", "sweep", "words"),
    [
        ({"x_margin": 3.0, "w_zero_out_t": 1.0}, {"sites": "w"}, "x_margin = 3.0: it says how fitted guards are used"),
        ({"guards_by": "layer"}, {"protection": "none"}, "guards_by = 'layer': it says how fitted guards are used"),
        (BOTH, {}, "bitflip.guards = 'DIR': sweep.protection = guard: the guard is that of bitflip.w_zero_out_t and"),
        (BOTH, {"protection": "none,guard,guard-layer"}, ""),
        (BOTH, {"protection": "none"}, ""),
        (BOTH | {"x_zero_out_t": None}, {"sites": "w,x"}, ""),
        (BOTH | {"x_zero_out_t": None}, {"sites": "x"}, "bitflip.w_zero_out_t = 1.0: bitflip.guards = 'DIR' has"),
        (
            {"guards": "DIR", "w_zero_out_t": 1.0},
            {"protection": "guard-layer"},
            "bitflip.w_zero_out_t = 1.0: bitflip.guards = 'DIR' has thresholds in its place",
        ),
        (
            {"guards": "DIR", "layer_name_to_config": {"a": {"x_zero_out_t": 2.0}}},
            {"protection": "none,guard"},
            "layer_name_to_config 'a': x_zero_out_t = 2.0: bitflip.guards",
        ),
    ],
)
def test_guards_that_no_protection_has_are_told(bitflip, sweep, words):
    if not words:
        resolved(config(bitflip, **sweep))
        return
    with pytest.raises(ConfigError) as error:
        resolved(config(bitflip, **sweep))
    (problem,) = error.value.problems
    assert words in problem


def test_each_protection_has_the_keys_of_its_own_guard(tiny_llama, tmp_path):
    model = tiny_llama()
    guards_of(model).write(tmp_path)
    own = {".*up_proj": {"w_margin": 3.0, "w_zero_out_t": 0.5}}
    keys = BOTH | {"guards": str(tmp_path), "x_margin": 4.0, "layer_name_to_config": own}
    found = grid(model, keys, protection="none,guard,guard-layer,guard-channel+parity")
    for spec in [*found.guards.values(), *(found.spec(curve[0]) for curve in found.plan.curves)]:
        assert not spec.in_vain()
        flipproof.set_faults(model, spec)
    by_name = {curve[0].protection: found.spec(curve[0]).for_layer("a.up_proj") for curve in found.plan.curves}
    assert [by_name[name].w.zero_out_t for name in ("none", "guard", "guard-layer")] == [None, 0.5, None]
    assert [by_name[name].w.fitted is None for name in ("none", "guard", "guard-layer")] == [True, True, False]
    fitted = by_name["guard-channel+parity"]
    assert (fitted.w.fitted.by, fitted.w.fitted.margin, fitted.x.fitted.margin) == ("channel", 3.0, 4.0)


@pytest.mark.parametrize(
    ("bitflip", "sweep", "words"),
    [
        ({}, {"layers": "q_prj"}, "sweep.layers = 'q_prj': no faulty layer has that in its name; did you mean q_proj?"),
        ({}, {"bits": "40"}, "sweep.bits = '40'"),
        ({}, {"bits": "31,30-31,16"}, None),
        ({"w_burst": 4}, {"bits": "exp", "sites": "w"}, "sweep: w_burst = 4: runs of bits need one probability"),
    ],
)
def test_what_the_model_does_not_have_is_refused(tiny_llama, bitflip, sweep, words):
    if words is None:
        assert grid(tiny_llama(), bitflip, **sweep).bits == ["31", "30-31", "16"]
        return
    with pytest.raises(ConfigError) as error:
        grid(tiny_llama(), bitflip, **sweep)
    (problem,) = error.value.problems
    assert words in problem


def test_a_dtype_has_its_own_bits(tiny_llama):
    settings = resolved(config(bits="15,16"))
    model = tiny_llama()
    flipproof.inject(model, all_that_flips(settings))
    Grid(settings, rates_of(settings.sweep), model, "float32")
    with pytest.raises(ConfigError, match=r"sweep\.bits: bit '16': bfloat16 has bits 0 to 15"):
        Grid(settings, rates_of(settings.sweep), model, "bfloat16")


def test_voltages(tmp_path):
    path = tmp_path / "chip.csv"
    path.write_text("\ufeffVoltage, BER ,note\n0.7,1e-6,a\n0.6,1e-4,b\n\n0.8,0,c\n")
    assert read_voltages(path) == [Rate(1e-6, 0.7, 1e-6, 1e-6), Rate(1e-4, 0.6, 1e-4, 1e-4), Rate(0.0, 0.8, 0.0, 0.0)]
    assert [rate.voltage for rate in rates_of(config(p=None, voltage=str(path)).sweep)] == [0.8, 0.7, 0.6]
    path.write_text("p_frac,p_exp,ber,voltage\n1e-3,1e-5,1e-4,0.65\n")
    assert read_voltages(path) == [Rate(1e-4, 0.65, 1e-5, 1e-3)]
    with pytest.raises(ConfigError, match=r"sweep\.bits = 15: .* has p_exp and p_frac"):
        rates_of(config(p=None, voltage=str(path), bits="15,exp").sweep)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the first line names columns, voltage and ber among them; it is ''"]),
        ("volts,ber\n1,2\n", ["it is 'volts, ber'"]),
        ("voltage,ber\n", ["holds no rows"]),
        (
            "voltage,ber\n0.7,1e-6\n0.6,many\n0.5\n0.4,0.9\nnan,1e-3\n0.7,1e-2\n0.1,1e-6\n",
            [
                "line 3: ber = 'many': a number is allowed",
                "line 4: ber = None: a number is allowed",
                "line 5: ber = 0.9: a flip probability from 0 to 0.5 is allowed",
                "line 6: voltage = nan: a number of volts",
                "line 7: voltage = 0.7 is that of line 2, too",
                "line 8: ber = 1e-06 is that of line 2, too",
            ],
        ),
    ],
)
def test_bad_voltages_are_told_by_line(tmp_path, text, words):
    path = tmp_path / "chip.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_voltages(path)
    assert len(error.value.problems) == len(words)
    for problem, word in zip(error.value.problems, words, strict=True):
        assert str(path) in problem
        assert word in problem
    with pytest.raises(ConfigError, match="cannot be read"):
        read_voltages(tmp_path / "gone.csv")
