import pytest

from flipproof import BitFlipSpec
from flipproof.faults.matching import unmatched_patterns

NAMES = [
    f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
]


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        ({"skip_patterns": ["q_prj"]}, "bitflip.skip_patterns: 'q_prj' is in no layer's name; the nearest are q_proj"),
        ({"include_patterns": ["up_proj", "self_atn"]},
         "bitflip.include_patterns: 'self_atn' is in no layer's name; the nearest are self_attn"),
        ({"include_patterns": ["layers.0", "xyzzy"]}, "bitflip.include_patterns: 'xyzzy' is in no layer's name"),
        ({"layer_name_to_config": {r"model\.layers\.0": None}},
         r"bitflip.layer_name_to_config: 'model\\.layers\\.0' is no layer's whole name; it is found within "
         r"model.layers.0.self_attn.q_proj: did you mean '.*model\.layers\.0.*'?"),
        ({"layer_name_to_config": {r".*\.up_porj": {}}},
         r"bitflip.layer_name_to_config: '.*\\.up_porj' is no layer's whole name; the nearest are up_proj, "),
    ],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_is_a_line_with_the_nearest_names(patterns, line):
    (found,) = unmatched_patterns(BitFlipSpec(**patterns), NAMES)
    assert found.startswith(line)


def test_patterns_that_match_are_not_talked_of():
    layers = {r"model\.layers\.0\..*": {"w_p_exp": 0.1}, ".*": None}
    spec = BitFlipSpec(include_patterns=["layers.1"], skip_patterns=["q_proj"], layer_name_to_config=layers)
    assert unmatched_patterns(spec, NAMES) == []
