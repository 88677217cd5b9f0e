"""How the weights of a model are stored: which keys make their bits flip, and how many bits there are.

Of a plain weight (``w``) sign, exponent and mantissa flip. Of a quantised one ``w`` is all that a memory holds of it,
codes, scales, zero points and the numbers that scales are made with; ``code`` and ``scale`` are these operands alone.
What is stored three times (``tmr-exp``) are bits of a plain weight, and of a quantised one bits of its scales; SECDED
and parity stand over every operand.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.fault import Pattern
from flipproof.faults.layouts import ELEMENT_BITS, LAYOUTS
from flipproof.faults.quantised import PART_OF, elements
from flipproof.faults.spec import BitFlipSpec
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.operands import operands_of
from flipproof.formats.spec import Format

_RATES = ("w_code_p", "w_scale_p_exp", "w_scale_p_frac", "w_zero_p", "w_global_p")


class Flipping(NamedTuple):
    """The part of a cell that is about weights."""

    site: str
    """One of w, code and scale; empty where weights are left alone."""
    p: float
    tripled: Sequence[str]


def format_of_layers(layers: Iterable[nn.Module]) -> Format | None:
    """The format of a model's linear layers; None where they are plain.

    Raises:
        ConfigError: where some are quantised and some are not, or in several ways: no key means all of them.
    """
    found = {layer.format if isinstance(layer, QuantisedLinear) else None for layer in layers}
    if len(found) > 1:
        names = ", ".join(sorted(format.name if format else "plain" for format in found))
        raise ConfigError([f"sweep: the weights of its layers are stored in several ways ({names}); name the layers of "
                           "one (bitflip.include_patterns)"])  # fmt: skip
    return next(iter(found), None)


def quantised_keys(format: Format, flipping: Flipping) -> dict[str, Any]:
    """The keys of faults of a quantised weight, those of plain weights off."""
    keys: dict[str, Any] = {"w_p_exp": None, "w_p_frac": None, "w_p_bits": {}, "w_protected_bits": ()}
    keys |= dict.fromkeys(_RATES) | {"w_code_p_bits": {}, "w_scale_p_bits": {}, "w_scale_protected_bits": ()}
    of = elements(format)
    parts = {PART_OF[name] for name in of if flipping.site in ("w", name)}
    keys |= {f"w_{part}_p": flipping.p for part in parts - {"scale"}}
    if "scale" in parts:
        keys["w_scale_p_exp"] = flipping.p
        if of["scale"] is None or LAYOUTS[of["scale"]].mantissa:  # a float of the weight's dtype, or e4m3
            keys["w_scale_p_frac"] = flipping.p
        keys["w_scale_protected_bits"] = tuple(flipping.tripled)
    return keys


def inputs_of_layers(layers: Iterable[nn.Module]) -> Format | None:
    """How the inputs of a model's linear layers are quantised, all in one way; None where they are not."""
    return next((layer.inputs for layer in layers if isinstance(layer, QuantisedLinear)), None)


def input_keys(p: float | None, tripled: Sequence[str]) -> dict[str, Any]:
    """The keys of faults of quantised inputs, codes and scales alike, those of plain inputs off; ``p`` is None where
    none flips."""
    keys: dict[str, Any] = {"x_p_exp": None, "x_p_frac": None, "x_p_bits": {}, "x_protected_bits": ()}
    keys |= {"x_code_p_bits": {}, "x_scale_p_bits": {}}
    keys["x_scale_protected_bits"] = () if p is None else tuple(tripled)
    return keys | dict.fromkeys(("x_code_p", "x_scale_p_exp", "x_scale_p_frac"), p)


def stored_bits(layers: Iterable[Any], plain: str, spec: BitFlipSpec) -> dict[str, float]:
    """Site -> bits that a memory holds for a weight of these layers on average, check bits and copies among them.

    Args:
        layers: linear layers, faulty or not, all in one format.
        plain: the dtype of plain weights whose bits flip.
        spec: faults of all that is stored, whose protection counts.
    """
    bits = dict.fromkeys(("w", "code", "scale"), 0.0)
    weights = 0
    for layer in layers:
        shape = layer.out_features, layer.in_features
        weights += math.prod(shape)
        if not isinstance(layer, QuantisedLinear):
            bits["w"] += math.prod(shape) * ELEMENT_BITS[plain] * (1 + spec.pattern("w").overhead(plain))
            continue
        of = elements(layer.format)
        for name, operand in operands_of(layer.format, shape, layer.stored_dtype).items():
            pattern = spec.part(PART_OF[name]).pattern or Pattern()
            stored = operand.bits * math.prod(operand.shape)
            for site in bits.keys() & {"w", name}:
                bits[site] += stored * (1 + pattern.overhead(of[name] or dtype_name(operand.dtype)))
    return {site: n / weights for site, n in bits.items() if n}


def check_quantised(base: BitFlipSpec, sites: Iterable[str], bits: Sequence[str]) -> None:
    """Raises ConfigError for what a sweep cannot do where weights are quantised."""
    problems = []
    if list(bits) != ["all"]:
        problems.append(
            f"sweep.bits = {', '.join(bits)}: of quantised weights and inputs all bits flip, those of a weight's "
            "codes or scales alone by sweep.sites; leave it out"
        )
    rows = [spec.w_p_row for spec in base.variants() if spec.w_p_row]
    if rows and (alone := [site for site in sites if site in ("code", "scale")]):
        problems.append(
            f"bitflip.w_p_row = {rows[0]}: a bad row is one of any operand, and sweep.sites = {', '.join(alone)} "
            "leaves the others alone; say --sites w"
        )
    if problems:
        raise ConfigError(problems)
