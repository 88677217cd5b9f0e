import pickle

import pytest

from flipproof import BitFlipSpec, Fault, LoraSpec
from flipproof.errors import ConfigError
from flipproof.faults.fault import Pattern
from flipproof.values import Seed, checked


def test_fields_become_the_two_faults():
    spec = BitFlipSpec(w_p_exp=0.1, w_zero_out_t=2.0, x_p_frac=0.2, x_faults="persistent")
    assert spec.w == Fault(0.1, 0.0, 2.0)
    assert spec.x == Fault(0.0, 0.2, None, Pattern(persistent=True))
    assert not BitFlipSpec().any_fault
    assert BitFlipSpec(layer_name_to_config={"a": {"w_p_exp": 0.1}}).any_fault


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"w_p_exp": 0.6}, "w_p_exp = 0.6"),
        ({"x_p_frac": float("nan")}, "x_p_frac = nan"),
        ({"x_zero_out_t": -1}, "x_zero_out_t = -1"),
        ({"w_faults": "sometimes"}, "w_faults = 'sometimes': 'transient' or 'persistent' is allowed"),
        ({"base_seed": -1}, "base_seed = -1"),
        ({"layer_name_to_config": {"(": {}}}, r"config key = '\(': a regular expression is allowed \(missing \)"),
        ({"layer_name_to_config": {"a": {"w_p": 0.1}}}, "'a'.w_p: unknown key; known are w_p_exp, w_p_frac"),
        ({"layer_name_to_config": {"a": {"w_p_exp": 9}}}, "'a'.w_p_exp = 9"),
        ({"layer_name_to_config": {"a": True}}, "'a' = True: a table of keys, or false, is allowed"),
        ({"w_p_exp": 0.6, "x_p_exp": -2}, "w_p_exp = 0.6.*\nx_p_exp = -2"),
        ({"w_p_exp": "1e-5"}, "w_p_exp = '1e-5'"),
        ({"include_patterns": "q_proj"}, r"include_patterns = 'q_proj': a list .* such as \['q_proj'\]"),
        ({"skip_patterns": ["a", ""]}, r"skip_patterns\[1\] is empty: a text is allowed"),
        ({"skip_patterns": [1]}, r"skip_patterns\[0\] = 1: a text is allowed"),
        ({"skip_patterns": None}, "skip_patterns = None: a list of texts is allowed"),
        ({"sites": "head"}, r"sites = 'head': a list .* such as \['head'\]"),
        ({"sites": ["heads"]}, r"sites\[0\] = 'heads': 'linear', 'head' or 'embedding' is allowed"),
        ({"sites": []}, r"sites = \[\]: a list of one or more of 'linear', 'head' and 'embedding' is allowed"),
        ({"w_protected_bits": "sign"}, "w_protected_bits = 'sign': a list"),
        ({"layer_name_to_config": {"a": {"w_protected_bits": "sign"}}}, "'a'.w_protected_bits = 'sign': a list"),
        ({"layer_name_to_config": {"a": 1}}, "'a' = 1: a table of keys, or false"),
        ({"layer_name_to_config": ["a"]}, r"layer_name_to_config = \['a'\]: a table"),
        ({"row_bytes": "1024"}, "row_bytes = '1024': a multiple of 8"),
        ({"row_bytes": 1024.0}, "row_bytes = 1024.0"),
        ({"exact_gradient": "no"}, "exact_gradient = 'no': true or false"),
        ({"base_seed": 2**63}, "base_seed = 9223372036854775808"),
        ({"w_burst": 2.0}, "w_burst = 2.0"),
    ],
)
def test_every_bad_field_is_named_with_its_value(values, words):
    with pytest.raises(ValueError, match=words):
        BitFlipSpec(**values)


def test_problems_are_a_list_whatever_they_hold():
    with pytest.raises(ConfigError) as error:
        BitFlipSpec(w_faults="a; b\nc", w_p_exp=2)
    assert [problem.split(" = ")[0] for problem in error.value.problems] == ["w_p_exp", "w_faults"]
    copied = pickle.loads(pickle.dumps(error.value))
    assert copied.problems == error.value.problems


def test_the_first_matching_override_counts_and_null_leaves_alone():
    spec = BitFlipSpec(w_p_exp=0.1, layer_name_to_config={"a": None, "a|b": {"w_p_exp": 0.2}, ".*": {"w_p_exp": False}})
    assert spec.for_layer("a") is None
    assert spec.for_layer("b").w.p_exp == 0.2
    assert spec.for_layer("ab").w.p_exp == 0.0


def test_keys_that_say_nothing_can_be_left_out():
    layers = {"a": {"w_zero_out_t": 3.0, "w_p_exp": 0.2}, "b": None}
    both = BitFlipSpec(w_p_exp=0.1, guards="d", x_zero_out_t=2.0, x_margin=3.0, layer_name_to_config=layers)
    words = ["x_zero_out_t = 2.0: bitflip.guards = 'd'", "layer_name_to_config 'a': w_zero_out_t = 3.0"]
    assert len(both.in_vain()) == len(words)
    assert all(word in line for word, line in zip(words, both.in_vain(), strict=True))
    kept = {"a": {"w_p_exp": 0.2}, "b": None}
    assert both.without_vain() == BitFlipSpec(w_p_exp=0.1, guards="d", x_margin=3.0, layer_name_to_config=kept)
    alone = BitFlipSpec(w_p_exp=0.1, x_zero_out_t=2.0, x_margin=3.0)
    assert alone.without_vain() == BitFlipSpec(w_p_exp=0.1, x_zero_out_t=2.0)
    assert kept != layers == both.layer_name_to_config


def test_lora_scaling_and_its_limits():
    assert LoraSpec(r=8, lora_alpha=16).scaling == 2.0
    assert LoraSpec().scaling == 0.0
    wrong = [{"r": r} for r in (-1, 1.5, 2.0, True, "2", None)]
    for values in (*wrong, *({"lora_alpha": alpha} for alpha in (float("inf"), float("nan"), 0, "32", True))):
        ((name, value),) = values.items()
        with pytest.raises(ConfigError, match=f"^{name} = {value!r}: "):
            LoraSpec(**values)


def test_seeds():
    assert checked("seed", 2**63 - 1, Seed) == 2**63 - 1
    for seed in (-1, 2**63, 1.5, True):
        with pytest.raises(ValueError, match=rf"^seed = {seed!r}: a seed from 0 to 2\^63 - 1 is allowed$"):
            checked("seed", seed, Seed)
