"""What the ``[sweep]`` table means for one model: a voltage table's rates, the layers and bits on the axes, and the
faults of each cell.

A sweep takes flip probabilities, sites, layers, bits and protection from its table, and everything else of
``[bitflip]`` (thresholds, persistence, bursts, rows, patterns of layers) from the run's config, for all points alike.
The config's own ``p_exp`` and ``p_frac`` count for nothing. Where else the two speak of the same, that is an error.
"""

import csv
import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from flipproof.config import RunConfig
from flipproof.config.sweep import MAX_POINTS, STORED, ProtectionParts, SweepConfig, operands_of, parse_protection
from flipproof.errors import ConfigError
from flipproof.faults.fault import Granularity
from flipproof.faults.fitted import read_guards
from flipproof.faults.inject import fault_sites, iter_faulty
from flipproof.faults.layouts import ELEMENT_BITS, bits_named
from flipproof.faults.quantised import check_parts
from flipproof.faults.spec import (
    DEFAULTS,
    FITTED_KEYS,
    OPERANDS,
    BitFlipSpec,
    Operand,
    Probability,
    Site,
    storage_overhead,
)
from flipproof.formats.spec import Format
from flipproof.measure.evaluate import fault_seeds
from flipproof.sweep.order import Cell, Plan, Rate
from flipproof.sweep.weights import (
    Flipping,
    check_quantised,
    format_of_layers,
    input_keys,
    inputs_of_layers,
    quantised_keys,
    stored_bits,
)
from flipproof.values import check_all

_SET_BY_A_SWEEP = {"p_bits": "bits", "protection": "protection", "protected_bits": "protection"}
"""Keys of an operand in [bitflip] -> the key of [sweep] that takes their place."""
_THRESHOLDS = (*(f"{operand}_zero_out_t" for operand in OPERANDS), "w_scale_zero_out_t")
_OF_PARTS = ("_code_p", "_zero_p", "_global_p")
_NO_RATE, _SOME_RATE = Rate(0.0, None, 0.0, 0.0), Rate(0.5, None, 0.5, 0.5)


def resolved(config: RunConfig) -> RunConfig:
    """The config with the default protection, after what can be known to be wrong without the model."""
    sweep, bitflip, problems = config.sweep, config.bitflip, []
    if config.eval.until_ci is not None:
        problems.append(
            f"eval.until_ci = {config.eval.until_ci:g}: a sweep has sweep.seeds for each cell, the most telling first; "
            "leave it out"
        )
    if sweep.p is None and sweep.voltage is None:
        problems.append("sweep.p is not set: give flip probabilities (--p 1e-7:1e-3:9), or --voltage FILE")
    for operand in OPERANDS:
        for key, instead in _SET_BY_A_SWEEP.items():
            if (value := getattr(bitflip, f"{operand}_{key}")) not in ("none", (), {}):
                problems.append(f"bitflip.{operand}_{key} = {value!r}: a sweep takes that from sweep.{instead}")
    for key in ("w_scale_protected_bits", "x_scale_protected_bits"):
        if bits := getattr(bitflip, key):
            problems.append(f"bitflip.{key} = {bits!r}: a sweep takes that from sweep.protection (tmr-BITS)")
    for pattern, override in bitflip.layer_name_to_config.items():
        keys = override if isinstance(override, Mapping) else {}
        if own := [
            key
            for key in keys
            if key.endswith(("_p_exp", "_p_frac", *_OF_PARTS, *(f"_{key}" for key in _SET_BY_A_SWEEP)))
        ]:
            problems.append(
                f"bitflip.layer_name_to_config {pattern!r}: sets {', '.join(own)}, which the sweep's points set; "
                "false leaves the layers alone"
            )
    if bitflip.include_patterns and sweep.layer_names() != ["all"]:
        problems.append(
            f"sweep.layers = {sweep.layers!r}: bitflip.include_patterns = {list(bitflip.include_patterns)} says "
            "something else; drop one"
        )
    flipping = sorted({operand for sites in sweep.site_names() for operand in operands_of(sites)}, key=OPERANDS.index)
    missing = [
        name
        for operand in flipping
        if getattr(bitflip, name := f"{operand}_zero_out_t") is None
        if not (operand == "w" and bitflip.w_scale_zero_out_t is not None)
    ]
    unguarded = len(missing) == len(flipping) and not bitflip.guards
    protections = sweep.protections() or ["none" if unguarded else "guard"]
    parts = [parse_protection(name) for name in protections]
    if not bitflip.guards and any(part.by for part in parts):
        problems.append(
            f"sweep.protection = {', '.join(protections)}: fitted guards are in bitflip.guards; set it to a directory "
            "that flipproof profile --guards channel has written"
        )
    if missing and not bitflip.guards and any(part.guard and not part.by for part in parts):
        problems.append(
            f"sweep.protection = {', '.join(protections)}: the guard needs bitflip.{' and bitflip.'.join(missing)}; "
            "set it, or say --protection none"
        )
    problems += _guards_in_vain(config, parts)
    if problems:
        raise ConfigError(problems)
    # what is kept for a backward pass does not matter here
    training = replace(config.training, activation_checkpointing="none")
    named = replace(sweep, sites=",".join(sweep.site_names()), protection=",".join(protections))
    return replace(config, sweep=named, training=training)


def _guards_in_vain(config: RunConfig, protections: Sequence[ProtectionParts]) -> list[str]:
    """What is said of guards that none of the protections has: of the keys that say how fitted ones are used, and where
    there are both kinds, of the kind that is not used."""
    base, named = config.bitflip, config.sweep.protection or "guard"
    if not base.guards:
        return base.in_vain()
    operands = [operands_of(sites) for sites in config.sweep.site_names()]
    fitted = {_is_fitted(base, part, flipping) for part in protections if part.guard for flipping in operands}
    if fitted == {True}:
        return base.in_vain()
    if fitted == {False}:
        keys = " and ".join(f"bitflip.{key}" for key in _THRESHOLDS if getattr(base, key) is not None)
        return [
            f"bitflip.guards = {base.guards!r}: sweep.protection = {named}: the guard is that of {keys}; leave these "
            "out, or name guard-tensor, guard-layer or guard-channel"
        ]
    return []


def rates_of(sweep: SweepConfig) -> list[Rate]:
    """The axis of the probability, in rising order."""
    if sweep.voltage is None:
        return [Rate(p, None, p, p) for p in sweep.probabilities()]
    rates = read_voltages(Path(sweep.voltage))
    others = [name for name in sweep.bit_names() if name not in ("all", "sign", "exp", "frac")]
    if others and any(rate.p_exp != rate.p_frac for rate in rates):
        raise ConfigError(
            [
                f"sweep.bits = {', '.join(others)}: {sweep.voltage} has p_exp and p_frac, which say what all, sign, "
                "exp and frac mean; drop these columns for other bits"
            ]
        )
    return sorted(rates)


def read_voltages(path: Path) -> list[Rate]:
    """The rows of a CSV file with the columns ``voltage`` (in volts) and ``ber``, the flip probability, or ``p``, and
    maybe ``p_exp`` and ``p_frac``; other columns do not count.

    Raises:
        ConfigError: naming each bad line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or []]
            columns = rows.fieldnames
            numbered = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"sweep.voltage = {str(path)!r}: cannot be read ({error})"]) from error
    ber = next((name for name in ("ber", "p") if name in columns), None)
    if "voltage" not in columns or ber is None:
        seen = ", ".join(columns)
        raise ConfigError(
            [f"sweep.voltage = {str(path)!r}: the first line names columns, voltage and ber among them; it is {seen!r}"]
        )
    rates: list[Rate] = []
    problems: list[str] = []
    lines: dict[tuple[str, float | None], int] = {}
    wanted = ["voltage", ber, *(name for name in ("p_exp", "p_frac") if name in columns)]
    for number, row in numbered:
        values: dict[str, float] = {}
        found = []
        for name in wanted:
            try:
                values[name] = float(row[name] or "")
            except ValueError:
                found.append(f"{name} = {row[name]!r}: a number is allowed")
        if not found:
            found = check_all({name: (name, values[name], Probability) for name in wanted[1:]})[1]
        problems += [f"{path} line {number}: {problem}" for problem in found]
        if found:
            continue
        rate = Rate(values[ber], values["voltage"], values.get("p_exp", values[ber]), values.get("p_frac", values[ber]))
        if not math.isfinite(values["voltage"]):
            problems.append(f"{path} line {number}: voltage = {values['voltage']}: a number of volts is allowed")
        for name, value in (("voltage", rate.voltage), (ber, rate.p)):
            if (other := lines.setdefault((name, value), number)) != number:
                problems.append(f"{path} line {number}: {name} = {value} is that of line {other}, too")
        rates.append(rate)
    if not numbered:
        problems.append(f"sweep.voltage = {str(path)!r}: holds no rows")
    if problems:
        raise ConfigError(problems)
    return rates


def all_that_flips(config: RunConfig) -> BitFlipSpec:
    """A guard that is never on, wherever the grid needs faults: what the model is built with."""
    sites = config.sweep.site_names()
    operands = "".join(operand for operand in OPERANDS if any(operand in operands_of(name) for name in sites))
    spec = cell_spec(config.bitflip, Cell(_NO_RATE, operands, "all", "all", "none"))
    never: dict[str, Any] = {f"{operand}_zero_out_t": math.inf for operand in OPERANDS if operand in operands}
    spec = replace(spec, **never)
    alone = _alone(sites)
    if not alone:
        return spec
    together = spec.sites if len(alone) < len(sites) else ()
    kinds = tuple(dict.fromkeys((*together, *alone)))
    # what is asked for by name is not among what the config leaves alone
    skipped = spec.skip_patterns if together else ()
    return replace(spec, sites=kinds, include_patterns=(), skip_patterns=skipped)


def _alone(sites: Sequence[str]) -> list[Site]:
    """The sites that are modules of their own."""
    kinds: tuple[Site, ...] = ("head", "embedding")
    return [kind for kind in kinds if kind in sites]


_THRESHOLD_BITS = 32
"""Of a stored threshold."""


class Grid:
    """A sweep's table on one model: its plan, and the faults of each cell.

    Raises:
        ConfigError: where the model has no such layers, or its dtype no such bits.
    """

    def __init__(self, config: RunConfig, rates: list[Rate], model: nn.Module, dtype: str) -> None:
        self.config, self.dtype, self.rates = config, dtype, rates
        sweep, base = config.sweep, config.bitflip
        self.sites, self.protections = sweep.site_names(), sweep.protections()
        self._narrowest = min(dtype.split(" and "), key=ELEMENT_BITS.__getitem__)  # whose bits all values have
        self.bits = _bits(sweep, self._narrowest)
        there = {site.kind for site in fault_sites(model).values()}
        if absent := [kind for kind in _alone(self.sites) if kind not in there]:
            raise ConfigError(
                [f"sweep.sites = {', '.join(absent)}: the model has none that bitflip does not leave alone"]
            )
        layers = dict(iter_faulty(model))
        self._shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
        reached = _reached(model, base)
        alone = _alone(self.sites)
        self._stored = [layer for layer in layers.values() if layer.site in reached["w"]]
        self.format = self._format_of_weights()
        self.inputs = inputs_of_layers(self._stored)
        operands = {operand for sites in self.sites if sites not in alone for operand in operands_of(sites)}
        names = list(dict.fromkeys(name for operand in OPERANDS if operand in operands for name in reached[operand]))
        self._skip = _layers(sweep, names) if names else {}
        curves = [
            (sites, layers, bits, protection)
            for protection in self.protections
            for bits in self.bits
            for layers in self._skip
            for sites in self.sites
            if sites not in alone and any(self._meant(layers, reached[operand]) for operand in operands_of(sites))
        ]
        curves += [
            (sites, "all", bits, protection) for protection in self.protections for bits in self.bits for sites in alone
        ]
        if not curves:
            raise ConfigError([f"sweep: no layer of the model has {' or '.join(self.sites)}"])
        self.layers = list(dict.fromkeys(layers for _, layers, _, _ in curves))
        if (planned := len(curves) * len(rates) * sweep.seeds) > MAX_POINTS:
            raise ConfigError([f"sweep: {planned:,} points; at most {MAX_POINTS:,} are allowed"])
        cells = [Cell(rate, *curve) for curve in curves for rate in rates]
        self.plan = Plan(tuple(cells), tuple(fault_seeds(base.base_seed, sweep.seeds)))
        self.stored_bits = {name: self._stored_bits(name) for name in self.protections}
        try:
            for curve in self.plan.curves:
                self.spec(curve[-1])
            self.overhead = {name: self._overhead(name) for name in self.protections}
        except ValueError as error:
            raise ConfigError([f"sweep: {problem}" for problem in str(error).split("; ")]) from error
        if self.format is not None:
            for curve in self.plan.curves:
                check_parts(self.spec(curve[-1]), self._stored, table=False)

    def _format_of_weights(self) -> Format | None:
        """That of the linear layers that may be faulty; None of plain ones."""
        linear = [site for site in self.sites if site not in ("head", "embedding")]
        stored = [site for site in linear if "w" in operands_of(site)]
        format = format_of_layers(self._stored)
        if format is None and (parts := [site for site in stored if site in STORED]):
            raise ConfigError(
                [f"sweep.sites = {', '.join(parts)}: the weights are not quantised (model.quantize, sweep.formats)"]
            )
        coded = inputs_of_layers(self._stored) and any("x" in operands_of(site) for site in linear)
        if format is not None and (stored or coded):
            check_quantised(self.config.bitflip, stored, self.bits)
            if any(rate.p_exp != rate.p_frac for rate in self.rates):
                raise ConfigError(
                    [
                        f"sweep.voltage = {self.config.sweep.voltage!r}: has p_exp and p_frac, and bits of codes are "
                        "neither; drop these columns"
                    ]
                )
        return format

    def _meant(self, layers: str, names: Sequence[str]) -> bool:
        """Whether a value of the layers' axis means any of the names."""
        return any(layers == "all" or (layers in name and name not in self._skip[layers]) for name in names)

    def spec(self, cell: Cell) -> BitFlipSpec:
        """The faults of a cell."""
        return cell_spec(self.config.bitflip, cell, self._skip.get(cell.layers, ()), self.format, self.inputs)

    def _stored_bits(self, protection: str) -> dict[str, float]:
        """Site -> bits that are stored for a weight of the linear layers, those of the protection among them."""
        if not self._stored:
            return {}
        everything = Cell(_SOME_RATE, "w", "all", "all", protection)
        try:
            return stored_bits(self._stored, self._narrowest, cell_spec(BitFlipSpec(), everything, format=self.format))
        except ValueError as error:
            raise ConfigError([f"sweep.protection = {protection}: {error}"]) from error

    def _overhead(self, protection: str) -> float:
        """Bits stored beyond those of the values, over those of the values; of fitted guards the thresholds of weights,
        inputs and scales, over the bits of the weights."""
        if self.format is not None:
            each = self._stored_bits("none")["w"]
            codes = self.stored_bits[protection]["w"] / each - 1
        else:
            each = ELEMENT_BITS[self._narrowest]
            everything = Cell(self.rates[-1], "".join(OPERANDS), "all", "all", protection)
            codes = max(storage_overhead(cell_spec(BitFlipSpec(), everything), self._narrowest).values())
        bits = each * sum(map(math.prod, self._shapes))
        by, layers = self._fineness(protection), len(self._shapes)
        thresholds = {"channel": sum(map(sum, self._shapes)), "layer": 2 * layers, "tensor": 2}.get(by or "", 0)
        if by and read_guards(str(self.config.bitflip.guards)).format:  # a threshold for the scales of each, too
            thresholds += 1 if by == "tensor" else layers
        return codes + (thresholds * _THRESHOLD_BITS / bits if bits else 0.0)

    def _fineness(self, protection: str) -> Granularity | None:
        """How fine the fitted guard of a protection is; None where it has none."""
        base, parts = self.config.bitflip, parse_protection(protection)
        flipping = {operand for sites in self.sites for operand in operands_of(sites)}
        if base.guards is None or not _is_fitted(base, parts, flipping):
            return None
        return parts.by or base.guards_by or read_guards(base.guards).by

    @property
    def guards(self) -> dict[str, BitFlipSpec]:
        """Each guard of the protections, such as "guard" and "guard-channel": its thresholds alone, on all layers."""
        off: dict[str, Any] = {f"{operand}_{key}": None for operand in OPERANDS for key in ("p_exp", "p_frac", "p_row")}
        flipping = {operand for sites in self.sites for operand in operands_of(sites)}
        base, found = self.config.bitflip, {}
        for protection in map(parse_protection, self.protections):
            if protection.guard:
                name = f"guard-{protection.by}" if protection.by else "guard"
                guard = _guard_of(base, protection, flipping)
                if "kv" in flipping and _is_fitted(base, protection, flipping):
                    guard["kv_zero_out_t"] = math.inf  # which says that keys and values have a guard
                sites = tuple(dict.fromkeys((*base.sites, *_alone(self.sites))))
                found[name] = replace(base, **off, **guard, sites=sites)
        return found


def _reached(model: nn.Module, base: BitFlipSpec) -> dict[Operand, list[str]]:
    """Operand -> the names of the modules where ``base`` leaves it to be faulty."""
    sites = [site for site in fault_sites(model).values() if base.for_layer(site.site) is not None]
    linear = [site.site for site in sites if site.kind in base.sites]
    return {"w": linear, "x": linear, "kv": [site.site for site in sites if site.kind == "kv"]}


def _bits(sweep: SweepConfig, dtype: str) -> list[str]:
    names: list[str] = []
    for name in sweep.bit_names():
        names += [str(bit) for bit in range(ELEMENT_BITS[dtype])] if name == "each" else [name]
    try:
        for name in set(names) - {"all"}:
            bits_named(name, dtype)
    except ValueError as error:
        raise ConfigError([f"sweep.bits: {error}"]) from error
    return list(dict.fromkeys(names))


def _layers(sweep: SweepConfig, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The axis of the layers: "all" or a pattern -> names that the pattern matches beyond what it means.

    Args:
        names: of the modules that may be faulty.
    """
    axis: dict[str, tuple[str, ...]] = {}
    problems = []
    for pattern in sweep.layer_names():
        if pattern == "block":
            for block in filter(None, map(_block_of, names)):
                axis[block] = ()
        elif pattern == "kind":
            for kind in (name.rpartition(".")[2] for name in names):
                # "dense" is part of "dense_h_to_4h", too
                axis[kind] = tuple(name for name in names if kind in name and name.rpartition(".")[2] != kind)
        elif pattern == "all" or any(pattern in name for name in names):
            axis[pattern] = ()
        else:
            near = difflib.get_close_matches(pattern, {part for name in names for part in name.split(".")}, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are called {', '.join(names[:3])}, …"
            problems.append(f"sweep.layers = {pattern!r}: no faulty layer has that in its name; {hint}")
    if problems:
        raise ConfigError(problems)
    return axis


def _block_of(site: str) -> str | None:
    """``model.layers.3.`` of ``model.layers.3.mlp.up_proj``; None outside of the repeated blocks."""
    parts = site.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) + "." if numbers else None


def _is_fitted(base: BitFlipSpec, protection: ProtectionParts, flipping: Collection[Operand]) -> bool:
    """Whether a protection has fitted guards: those that it names; "guard" is what is configured, the thresholds where
    all that flips has one."""
    configured = all(getattr(base, f"{operand}_zero_out_t") is not None for operand in flipping)
    return protection.guard and bool(base.guards) and (protection.by is not None or not configured)


def _guard_of(base: BitFlipSpec, protection: ProtectionParts, flipping: Collection[Operand]) -> dict[str, Any]:
    """The keys of a protection's guard: fitted ones, thresholds, or neither."""
    if _is_fitted(base, protection, flipping):
        changes: dict[str, Any] = {"guards_by": protection.by or base.guards_by, **dict.fromkeys(_THRESHOLDS)}
    else:
        changes = {key: DEFAULTS[key] for key in ("guards", *FITTED_KEYS)}
        changes |= {} if protection.guard else dict.fromkeys(_THRESHOLDS)
    return changes | {"layer_name_to_config": _without(base, changes)}


def _without(base: BitFlipSpec, keys: Collection[str]) -> dict[str, Any]:
    """The overrides of single layers, less some keys."""
    return {
        pattern: {key: value for key, value in override.items() if key not in keys}
        if isinstance(override, Mapping)
        else override
        for pattern, override in base.layer_name_to_config.items()
    }


def cell_spec(
    base: BitFlipSpec,
    cell: Cell,
    skip: Sequence[str] = (),
    format: Format | None = None,
    inputs: Format | None = None,
) -> BitFlipSpec:
    """The faults of a cell: those of ``base`` with other probabilities, sites, layers and protection; persistence,
    bursts, rows and thresholds stay.

    Args:
        skip: more patterns of layers to leave alone.
        format: of the weights of linear layers, where they are quantised.
        inputs: of their inputs, where these are.

    Raises:
        ValueError: where ``base`` does not go with the cell, such as bursts with single bits.
    """
    protection = parse_protection(cell.protection)
    flipping = operands_of(cell.sites)
    changes: dict[str, Any] = {}
    for operand in OPERANDS:
        flips = operand in flipping
        everywhere = flips and cell.bits == "all"
        changes[f"{operand}_p_exp"] = cell.rate.p_exp if everywhere else None
        changes[f"{operand}_p_frac"] = cell.rate.p_frac if everywhere else None
        bits_p = cell.rate.p_frac if cell.bits == "frac" else cell.rate.p_exp
        changes[f"{operand}_p_bits"] = {cell.bits: bits_p} if flips and not everywhere else {}
        changes[f"{operand}_protection"] = protection.code if flips else "none"
        changes[f"{operand}_protected_bits"] = protection.tripled if flips else ()
        if not flips:
            changes[f"{operand}_p_row"] = None
    if format is not None and cell.sites not in ("head", "embedding"):
        site = cell.sites if cell.sites in STORED else "w" if "w" in flipping else ""
        changes |= quantised_keys(format, Flipping(site, cell.rate.p, protection.tripled))
        if inputs is not None:
            changes |= input_keys(cell.rate.p if "x" in flipping else None, protection.tripled)
    guard = _guard_of(base, protection, flipping)
    still = {f"{operand}_p_row" for operand in OPERANDS if operand not in flipping}
    changes |= guard | {"layer_name_to_config": _without(base, guard.keys() | still)}
    if cell.sites in ("head", "embedding"):  # asked for by name
        changes |= {"sites": (cell.sites,), "include_patterns": (), "skip_patterns": ()}
    elif cell.layers != "all":
        changes |= {"include_patterns": (cell.layers,), "skip_patterns": (*base.skip_patterns, *skip)}
    return replace(base, **changes)
