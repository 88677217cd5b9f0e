import pytest

from flipproof import BitFlipSpec, Fault, LoraSpec
from flipproof.spec import Pattern, check_seed


def test_fields_become_the_two_faults():
    spec = BitFlipSpec(w_p_exp=0.1, w_zero_out_t=2.0, x_p_frac=0.2, x_faults="persistent")
    assert spec.w == Fault(0.1, 0.0, 2.0)
    assert spec.x == Fault(0.0, 0.2, None, Pattern(persistent=True).encode())
    assert not BitFlipSpec().any_fault
    assert BitFlipSpec(layer_name_to_config={"a": {"w_p_exp": 0.1}}).any_fault


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"w_p_exp": 0.6}, "w_p_exp = 0.6"),
        ({"x_p_frac": float("nan")}, "x_p_frac = nan"),
        ({"x_zero_out_t": -1}, "x_zero_out_t = -1"),
        ({"w_faults": "sometimes"}, "w_faults = 'sometimes'.*'transient' and 'persistent'"),
        ({"base_seed": -1}, "base_seed = -1"),
        ({"layer_name_to_config": {"(": {}}}, "regular expression"),
        ({"layer_name_to_config": {"a": {"w_p": 0.1}}}, "'a'.w_p: no such key"),
        ({"layer_name_to_config": {"a": {"w_p_exp": 9}}}, "'a'.w_p_exp = 9"),
        ({"layer_name_to_config": {"a": True}}, "'a' = true"),
        ({"w_p_exp": 0.6, "x_p_exp": -2}, "w_p_exp = 0.6.*x_p_exp = -2"),
    ],
)
def test_every_bad_field_is_named_with_its_value(values, words):
    with pytest.raises(ValueError, match=words):
        BitFlipSpec(**values)


def test_the_first_matching_override_counts_and_null_leaves_alone():
    spec = BitFlipSpec(w_p_exp=0.1, layer_name_to_config={"a": None, "a|b": {"w_p_exp": 0.2}, ".*": {"w_p_exp": False}})
    assert spec.for_layer("a") is None
    assert spec.for_layer("b").w.p_exp == 0.2
    assert spec.for_layer("ab").w.p_exp == 0.0


def test_lora_scaling_and_its_limits():
    assert LoraSpec(r=8, lora_alpha=16).scaling == 2.0
    assert LoraSpec().scaling == 0.0
    for values in ({"r": -1}, {"lora_alpha": float("inf")}, {"lora_alpha": 0}):
        with pytest.raises(ValueError, match=next(iter(values))):
            LoraSpec(**values)


def test_seeds():
    assert check_seed(2**63 - 1) == 2**63 - 1
    for seed in (-1, 2**63, 1.5, True):
        with pytest.raises(ValueError, match="seed"):
            check_seed(seed)
