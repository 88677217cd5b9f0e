import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from flipproof import BitFlipSpec
from flipproof.errors import ConfigError
from flipproof.faults.matching import adapter_layers, unmatched_patterns

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


@pytest.mark.parametrize(
    "target_modules",
    [
        ["q_proj"],
        ["self_attn.q_proj", "up_proj"],
        ["proj"],
        "all-linear",
        r".*\.(q|up)_proj",
        [NAMES[4]],
        ["q_proj", "xyzzy"],
    ],
)
def test_adapters_are_where_peft_puts_them(target_modules):
    """PEFT itself says which modules a list, a pattern or "all-linear" means, on modules of the same names."""
    model = nn.Module()
    for name in [*NAMES, "lm_head", "model.gate_up_proj"]:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(2, 2))
    model.get_output_embeddings = lambda: model.lm_head
    linear = {name: name == "lm_head" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ours = [target_modules] if isinstance(target_modules, str) else target_modules
    if "xyzzy" in ours or "proj" in ours:  # the one is no name, the other no whole part of one
        with pytest.raises(
            ConfigError,
            match=f"'{ours[-1]}' names no nn.Linear; there are q_proj, k_proj, up_proj, gate_up_proj, lm_head",
        ):
            adapter_layers(ours, linear)
        return
    if target_modules == "all-linear":
        theirs = [name for name in linear if name != "lm_head"]  # as PEFT documents it, of whole models only
    else:
        theirs = [n for n in linear if check_target_module_exists(LoraConfig(target_modules=target_modules), n)]
    assert sorted(adapter_layers(ours, linear)) == sorted(theirs)


def test_whole_parts_of_names_choose_layers():
    names = [f"model.layers.{i}.self_attn.{name}_proj" for i in (1, 10) for name in "qk"]
    linear = dict.fromkeys([*names, "lm_head"], False)
    assert adapter_layers(["self_attn"], linear) == names
    assert adapter_layers(["layers.1"], linear) == names[:2]
