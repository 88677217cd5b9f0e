import re

import pytest

from flipproof import BitFlipSpec, regexes
from flipproof.errors import ConfigError
from flipproof.faults.matching import unmatched_patterns

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", ""]
WORDS = "model.layers.0.self_attn.q_proj.weight.scale"
TRAP = r"((.)|(..)|(.*))*\2\3[A-Z]"
PATTERNS = [
    r".*q_proj",
    r"model\.layers\.(\d+)\..*",
    r"(?i)LM_HEAD",
    r"[^.]*",
    r"(?P<a>l)m_(?:head|x)",
    r"\w+",
    "",
    r"a|b",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("how", ["fullmatch", "match", "search"])
def test_they_are_those_of_re(pattern, how):
    for name in NAMES:
        ours, theirs = getattr(regexes, how)(pattern, name), getattr(re, how)(pattern, name)
        assert (ours and (ours.span(), ours.groups())) == (theirs and (theirs.span(), theirs.groups()))


@pytest.mark.parametrize("pattern", [r"((?:\w|\.)+)+[!?]", r"(\w+\.?)+[!?]", r"(?:.*)*(?:.*)*[!?]", r"(.+)+(?<=[!?])"])
def test_on_which_re_hangs_ends(pattern):
    assert regexes.fullmatch(pattern, WORDS) is None


def test_a_trap_is_told():
    said = re.escape(f"the pattern {TRAP!r} takes more than 0.5 s on {WORDS!r}")
    with pytest.raises(ConfigError, match=said):
        regexes.fullmatch(TRAP, WORDS)
    spec = BitFlipSpec(w_p_exp=0.1, layer_name_to_config={TRAP: False})
    with pytest.raises(ConfigError, match=said):
        spec.for_layer(WORDS)
    with pytest.raises(ConfigError, match=said):
        unmatched_patterns(spec, [WORDS])


NO_PATTERNS = ["(", "*", "a{2,1}", "[", "(?P<a>x)(?P=b)", 3, None, "(" * 10_000, r"x(?i)Q", "(?P<a>x)(?P<a>y)"]


@pytest.mark.parametrize("pattern", [*NO_PATTERNS, r"q{e}proj", "[[:alpha:]]+"])
def test_what_is_no_pattern_is_told(pattern):
    with pytest.raises(ValueError, match=r"."):
        regexes.check(pattern)
