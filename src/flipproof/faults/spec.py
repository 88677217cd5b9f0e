"""What to flip, and which adapters to train: frozen, validated, with the TOML's own key names as fields.

``BitFlipSpec`` is the ``[bitflip]`` table and ``LoraSpec`` the ``[lora]`` table of a run's config, so a config file,
Python code and the papers' tables say the same words. A key of a fault begins with its operand: ``w_`` the weights,
``x_`` the inputs of linear layers, ``kv_`` the keys and values that attention reads.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from flipproof import regexes
from flipproof.errors import ConfigError

Persistence = Literal["transient", "persistent"]
Protection = Literal["none", "secded", "parity"]
PROTECTIONS: tuple[Protection, ...] = get_args(Protection)
Site = Literal["linear", "head", "embedding"]
Granularity = Literal["tensor", "layer", "channel"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
Operand = Literal["w", "x", "kv"]

OPERANDS: tuple[Operand, ...] = ("w", "x", "kv")
ELEMENT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
SECDED_CHECK_BITS = 8
"""Of a word of 64 bits."""


def bits_named(name: str, dtype: str) -> range:
    """The bits that "sign", "exp" (the exponent), "frac", "15" or "7-14" means; bit 0 is the lowest of the mantissa.

    Raises:
        ValueError: for a bit that the dtype does not have.
    """
    mantissa, bits = MANTISSA_BITS[dtype], ELEMENT_BITS[dtype]
    named = {"sign": range(bits - 1, bits), "exp": range(mantissa, bits - 1), "frac": range(mantissa)}
    if name in named:
        return named[name]
    low, _, high = name.partition("-")
    if int(high or low) >= bits:
        raise ValueError(f"bit {name!r}: {dtype} has bits 0 to {bits - 1}")
    return range(int(low), int(high or low) + 1)


def _bit_name_problem(name: str) -> str | None:
    low, _, high = name.partition("-")
    if name in ("sign", "exp", "frac") or (re.fullmatch(r"\d+(-\d+)?", name) and int(low) <= int(high or low) < 32):
        return None
    return f"{name!r}: bits are called 'sign', 'exp', 'frac', by number ('15') or by range ('7-14')"


@dataclass(frozen=True)
class Pattern:
    """How faults of one operand depart from new, independent flips at ``p_exp`` and ``p_frac`` in each pass."""

    persistent: bool = False
    """One draw per seed instead of one per forward pass."""
    p_bits: tuple[tuple[str, float], ...] = ()
    """(bits, probability): these bits' own."""
    burst: int = 1
    """Flips come in runs of so many neighbouring bits."""
    p_row: float = 0.0
    """Probability that a memory row is bad."""
    row_bytes: int = 1024
    protection: Protection = "none"
    protected_bits: tuple[str, ...] = ()
    """Bits that are stored three times."""

    @property
    def independent(self) -> bool:
        """Whether there is nothing of all this."""
        return replace(self, row_bytes=Pattern.row_bytes) == Pattern()

    def bit_probabilities(self, p_exp: float, p_frac: float, dtype: str) -> tuple[float, ...]:
        """The probability that each bit of a stored value is inverted, from the lowest bit up; without bad rows.

        Raises:
            ValueError: for a bit that the dtype does not have.
        """
        mantissa, bits = MANTISSA_BITS[dtype], ELEMENT_BITS[dtype]
        p = [p_frac] * mantissa + [p_exp] * (bits - mantissa)
        for name, own in self.p_bits:
            for bit in bits_named(name, dtype):
                p[bit] = own
        for bit in self.protected(dtype):
            p[bit] = p[bit] ** 2 * (3 - 2 * p[bit])  # two of three copies, or all, are wrong
        return tuple(p)

    def protected(self, dtype: str) -> set[int]:
        """The bits that are stored three times."""
        return {bit for name in self.protected_bits for bit in bits_named(name, dtype)}

    def overhead(self, dtype: str) -> float:
        """Bits stored beyond those of the values, over those of the values."""
        bits = ELEMENT_BITS[dtype]
        checks = {"none": 0.0, "secded": SECDED_CHECK_BITS / 64, "parity": 1 / bits}[self.protection]
        return checks + 2 * len(self.protected(dtype)) / bits


class Stored(NamedTuple):
    """A pattern in a memory of one dtype: every bit with its probability."""

    p_bits: tuple[float, ...]
    """From the lowest bit up; without bad rows."""
    persistent: bool = False
    burst: int = 1
    p_row: float = 0.0
    row_bytes: int = 1024
    protection: str = "none"


class Fitted(NamedTuple):
    """How thresholds are made of the maxima that ``profile`` has found (``fitted.py``)."""

    by: Granularity | None
    """None: as finely as they were fitted."""
    margin: float


class Fault(NamedTuple):
    """What happens to one operand of one layer: the argument of a flip, less its key."""

    p_exp: float = 0.0
    """Probability that a sign or exponent bit is inverted."""
    p_frac: float = 0.0
    """Probability that a mantissa bit is inverted."""
    zero_out_t: float | None = None
    """Guard threshold: after the flip, whatever is not of magnitude below it becomes 0. None: no guard."""
    pattern: Pattern | None = None
    """None where flips are independent and new in each pass, or where there are none."""
    fitted: Fitted | None = None
    """Where given, thresholds that were fitted take the place of ``zero_out_t``."""

    @property
    def persistent(self) -> bool:
        """Whether the flips are those of one map for all passes."""
        return self.pattern is not None and self.pattern.persistent

    @property
    def flips(self) -> bool:
        return self.p_exp > 0 or self.p_frac > 0 or self.pattern is not None

    def stored(self, dtype: str) -> Stored | None:
        """The pattern, where there is one, in values of a dtype such as "bfloat16"."""
        if (pattern := self.pattern) is None:
            return None
        p_bits = pattern.bit_probabilities(self.p_exp, self.p_frac, dtype)
        return Stored(p_bits, pattern.persistent, pattern.burst, pattern.p_row, pattern.row_bytes, pattern.protection)

    @property
    def active(self) -> bool:
        return self.flips or self.guarded

    @property
    def guarded(self) -> bool:
        return self.zero_out_t is not None or self.fitted is not None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def probability_problem(name: str, p: Any) -> str | None:
    """One line naming what is wrong with a flip probability, or None where it is fine."""
    if p is None:
        return None
    if not _is_number(p) or not 0 <= p <= 0.5:
        return f"{name} = {p!r}: a flip probability is a number from 0 to 0.5 (None or 0 is off)"
    return None


def threshold_problem(name: str, t: Any) -> str | None:
    """One line naming what is wrong with a guard threshold, or None where it is fine."""
    if t is None:
        return None
    if not _is_number(t) or math.isnan(t) or t < 0:
        return f"{name} = {t!r}: a zero_out threshold is a number of at least 0 (None is no guard)"
    return None


_FAULT_KEYS = ("p_exp", "p_frac", "zero_out_t", "faults", "p_bits", "burst", "p_row", "protection", "protected_bits")
LAYER_KEYS = tuple(f"{operand}_{key}" for operand in OPERANDS for key in _FAULT_KEYS)
"""The keys of ``BitFlipSpec`` that a single layer may override."""


def _key_problems(name: str, value: Any) -> list[str | None]:
    """What is wrong with the value of one key of a fault; ``name`` is for the message."""
    key = re.split(r"(?:^|\.)(?:w|x|kv)_", name)[-1]
    if key in ("p_exp", "p_frac", "p_row"):
        return [probability_problem(name, value)]
    if key == "zero_out_t":
        return [threshold_problem(name, value)]
    if key == "faults":
        return [_choice_problem(name, value, "transient", "persistent")]
    if key == "protection":
        return [_choice_problem(name, value, "none", "secded", "parity")]
    if key == "burst":
        fine = _is_whole(value) and 1 <= value <= MAX_BURST
        return [None if fine else f"{name} = {value!r}: a length in bits from 1 to {MAX_BURST} is allowed"]
    if key == "p_bits":
        if not isinstance(value, Mapping):
            return [f"{name} = {value!r}: a table of bits and probabilities is allowed, such as {{'7-14' = 1e-5}}"]
        named = [f"{name} {problem}" for bits in value if (problem := _bit_name_problem(str(bits)))]
        return [*named, *(probability_problem(f"{name} {bits!r}", p) for bits, p in value.items())]
    if problem := _list_problem(name, value):
        return [problem]
    return [f"{name} {problem}" for bits in value if (problem := _bit_name_problem(str(bits)))]


def _list_problem(name: str, value: Any) -> str | None:
    """A text is no list: its letters would be the items."""
    if isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value):
        return None
    example = f"['{value}']" if value and isinstance(value, str) else "['q_proj', 'k_proj']"
    return f"{name} = {value!r}: a list of texts, none of them empty, is allowed, such as {example}"


MAX_BURST = 4096
"""A burst ends in the block of 8192 elements that it begins in, or in the next."""


def _choice_problem(name: str, value: Any, *allowed: str) -> str | None:
    return None if value in allowed else f"{name} = {value!r}: allowed are {' and '.join(map(repr, allowed))}"


def _burst_problems(values: Mapping[str, Any], prefix: str) -> list[str]:
    return [
        f"{prefix}{operand}_burst = {values[f'{operand}_burst']!r}: runs of bits need one probability for all, so "
        f"{operand}_p_exp = {operand}_p_frac and neither {operand}_p_bits nor {operand}_protected_bits"
        for operand in OPERANDS
        if values[f"{operand}_burst"] != 1
        and (
            (values[f"{operand}_p_exp"] or 0) != (values[f"{operand}_p_frac"] or 0)
            or values[f"{operand}_p_bits"]
            or values[f"{operand}_protected_bits"]
        )
    ]


def _layer_problems(values: Mapping[str, Any], prefix: str) -> list[str]:
    problems: list[str | None] = []
    for name, value in values.items():
        if name in LAYER_KEYS:
            problems += _key_problems(prefix + name, value)
        else:
            problems.append(f"{prefix}{name}: no such key; a layer's keys are {', '.join(LAYER_KEYS)}")
    return [problem for problem in problems if problem]


_LISTS = ("include_patterns", "skip_patterns", "sites", *(f"{operand}_protected_bits" for operand in OPERANDS))


def _false_as_none(value: Any) -> Any:
    return None if value is False else value


@dataclass(frozen=True)
class BitFlipSpec:
    """Which bits flip, how often, and in which layers (the ``[bitflip]`` table).

    Raises:
        ConfigError: naming every bad field with its value and what is allowed.
    """

    w_p_exp: float | None = None
    """Probability that a sign or exponent bit of a weight is inverted, 0 to 0.5."""
    w_p_frac: float | None = None
    """Probability that a mantissa bit of a weight is inverted, 0 to 0.5."""
    w_zero_out_t: float | None = None
    """Guard on weights: after the flip, every value whose magnitude is not below this becomes 0."""
    x_p_exp: float | None = None
    """Probability that a sign or exponent bit of an input activation is inverted, 0 to 0.5."""
    x_p_frac: float | None = None
    """Probability that a mantissa bit of an input activation is inverted, 0 to 0.5."""
    x_zero_out_t: float | None = None
    """Guard on input activations: after the flip, every value whose magnitude is not below this becomes 0."""
    kv_p_exp: float | None = None
    """Probability that a sign or exponent bit of a key or value is inverted when attention reads it, 0 to 0.5."""
    kv_p_frac: float | None = None
    """Probability that a mantissa bit of a key or value is inverted when attention reads it, 0 to 0.5."""
    kv_zero_out_t: float | None = None
    """Guard on keys and values: after the flip, every value whose magnitude is not below this becomes 0."""
    w_faults: Persistence = "transient"
    """transient: weights flip anew at every forward pass. persistent: one draw per seed (a defective memory), nested:
    at lower probabilities the same seed flips a subset of the bits."""
    x_faults: Persistence = "transient"
    """The same for input activations."""
    kv_faults: Persistence = "transient"
    """The same for keys and values; a persistent fault belongs to a place in the cache."""
    w_p_bits: Mapping[str, float] = field(default_factory=dict)
    """Own probabilities of bits of a weight, over w_p_exp and w_p_frac. Bits are "sign", "exp" (the exponent alone),
    "frac", a number ("15") or a range ("7-14"), 0 being the lowest of the mantissa: {exp: 1e-5, "15": 0}."""
    x_p_bits: Mapping[str, float] = field(default_factory=dict)
    """The same for input activations."""
    kv_p_bits: Mapping[str, float] = field(default_factory=dict)
    """The same for keys and values."""
    w_burst: int = 1
    """Flips of weights come in runs of so many neighbouring bits in memory; each bit's probability stays what it is,
    and must be the same for all bits."""
    x_burst: int = 1
    """The same for input activations."""
    kv_burst: int = 1
    """The same for keys and values."""
    w_p_row: float | None = None
    """Probability that a memory row (row_bytes) of a weight is bad: its every bit is inverted with probability 1/2."""
    x_p_row: float | None = None
    """The same for input activations."""
    kv_p_row: float | None = None
    """The same for keys and values."""
    w_protection: Protection = "none"
    """secded: each 64 bits of weights have 8 check bits, which flip too; one wrong bit is corrected, two are found and
    the word zeroed. parity: a bit for each value; where it does not fit, the value is zeroed."""
    x_protection: Protection = "none"
    """The same for input activations."""
    kv_protection: Protection = "none"
    """The same for keys and values."""
    w_protected_bits: tuple[str, ...] = ()
    """Bits of a weight (named as in w_p_bits) that are stored three times, with a vote: p becomes 3p² - 2p³."""
    x_protected_bits: tuple[str, ...] = ()
    """The same for input activations."""
    kv_protected_bits: tuple[str, ...] = ()
    """The same for keys and values."""
    row_bytes: int = 1024
    """Length of a memory row."""
    sites: tuple[Site, ...] = ("linear",)
    """Whose weights and inputs are faulty: linear (every linear layer but the output head), head, embedding."""
    base_seed: int = 0
    """Seed of the draws. Evaluation uses seeds of its own, never this one."""
    exact_gradient: bool = True
    """Whether the gradients of LoRA adapters leave out the weights that the guard zeroed, as they should. false lets
    them pass straight through there, which saves a few per cent of a training step on a GPU."""
    include_patterns: tuple[str, ...] = ()
    """Substrings of module names: where given, only layers that contain one of them are touched."""
    skip_patterns: tuple[str, ...] = ()
    """Substrings of module names to leave alone, on top of the output head."""
    layer_name_to_config: Mapping[str, Mapping[str, Any] | bool | None] = field(default_factory=dict)
    """Per-layer overrides: regular expression for the whole module name -> the keys to change, or null (in TOML: false)
    to leave the layer alone. The first expression that matches counts."""

    def __post_init__(self) -> None:
        # TOML and the command line bring lists; a frozen value wants tuples. Others are told of below.
        for name in _LISTS:
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.layer_name_to_config, Mapping):
            layers = {
                pattern: {key: _false_as_none(value) for key, value in override.items()}
                if isinstance(override, Mapping)
                else _false_as_none(override)
                for pattern, override in self.layer_name_to_config.items()
            }
            object.__setattr__(self, "layer_name_to_config", layers)
        if problems := self.problems():
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        problems = _layer_problems({name: getattr(self, name) for name in LAYER_KEYS}, "")
        problems += [] if problems else _burst_problems(vars(self), "")
        problems += [
            problem for name in _LISTS[:3] if (problem := _list_problem(name, getattr(self, name))) is not None
        ]
        if seed_problem := _seed_problem("base_seed", self.base_seed):
            problems.append(seed_problem)
        if not _is_whole(self.row_bytes) or self.row_bytes < 8 or self.row_bytes % 8:
            problems.append(f"row_bytes = {self.row_bytes!r}: a multiple of 8 is allowed")
        if not isinstance(self.exact_gradient, bool):
            problems.append(f"exact_gradient = {self.exact_gradient!r}: True or False is allowed")
        if isinstance(self.sites, tuple) and (unknown := set(self.sites or [""]) - set(get_args(Site))):
            problems.append(f"sites = {min(unknown, key=str)!r}: allowed are 'linear', 'head' and 'embedding'")
        if not isinstance(self.layer_name_to_config, Mapping):
            allowed = "a table of regular expressions and the keys to change is allowed"
            return [*problems, f"layer_name_to_config = {self.layer_name_to_config!r}: {allowed}"]
        for pattern, override in self.layer_name_to_config.items():
            where = f"layer_name_to_config {pattern!r}"
            try:
                regexes.check(pattern)
            except ValueError as error:
                problems.append(f"{where}: not a regular expression ({error})")
            if isinstance(override, Mapping):
                wrong = _layer_problems(override, f"{where}.")
                problems += wrong or problems or _burst_problems({**vars(self), **override}, f"{where}.")
            elif override is not None:
                seen = "true" if override is True else repr(override)
                problems.append(f"{where} = {seen}: a table of keys, or false, is allowed")
        return problems

    def for_layer(self, name: str) -> "BitFlipSpec | None":
        """The spec of the module called ``name``, overrides applied; None where it is to be left alone."""
        if any(pattern in name for pattern in self.skip_patterns):
            return None
        if self.include_patterns and not any(pattern in name for pattern in self.include_patterns):
            return None
        for pattern, override in self.layer_name_to_config.items():
            if regexes.fullmatch(pattern, name):
                return replace(self, **override) if isinstance(override, Mapping) else None
        return self

    def variants(self) -> list["BitFlipSpec"]:
        """Itself, and what each override of single layers makes of it."""
        overrides = self.layer_name_to_config.values()
        return [self, *(replace(self, **override) for override in overrides if isinstance(override, Mapping))]

    @property
    def any_kv_fault(self) -> bool:
        """Whether any attention reads faulty keys and values."""
        return any(spec.kv.active for spec in self.variants())

    @property
    def any_fault(self) -> bool:
        """Whether any layer flips bits or has a guard."""
        return self.x.active or self.w.active or self.kv.active or any(self.layer_name_to_config.values())

    @property
    def w(self) -> Fault:
        """The fault of the weight."""
        return self.fault("w")

    @property
    def x(self) -> Fault:
        """The fault of the input activations."""
        return self.fault("x")

    @property
    def kv(self) -> Fault:
        """The fault of the keys and values that attention reads."""
        return self.fault("kv")

    def fault(self, operand: Operand) -> Fault:
        """The fault of one operand."""
        pattern = self.pattern(operand)
        p_exp, p_frac = self._of(operand, "p_exp") or 0.0, self._of(operand, "p_frac") or 0.0
        t = self._of(operand, "zero_out_t")
        if not (p_exp or p_frac or pattern.p_row or any(p for _, p in pattern.p_bits)):
            return Fault(zero_out_t=t)
        return Fault(p_exp, p_frac, t, None if pattern.independent else pattern)

    def pattern(self, operand: Operand) -> Pattern:
        """How the faults of one operand come, apart from how often."""
        return Pattern(
            persistent=self._of(operand, "faults") == "persistent",
            p_bits=tuple((str(bits), float(p)) for bits, p in self._of(operand, "p_bits").items()),
            burst=self._of(operand, "burst"),
            p_row=self._of(operand, "p_row") or 0.0,
            row_bytes=self.row_bytes,
            protection=self._of(operand, "protection"),
            protected_bits=self._of(operand, "protected_bits"),
        )

    def _of(self, operand: Operand, key: str) -> Any:
        return getattr(self, f"{operand}_{key}")


def storage_overhead(spec: BitFlipSpec, dtype: str) -> dict[Operand, float]:
    """Operand -> bits stored for its protection, over those of its values, in a dtype such as "bfloat16"."""
    return {operand: spec.pattern(operand).overhead(dtype) for operand in OPERANDS}


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on every faulty layer (the ``[lora]`` table): W + (lora_alpha / r) · B · A.

    Raises:
        ConfigError: for a rank that is no whole number of at least 0, or a ``lora_alpha`` that is not positive.
    """

    r: int = 0
    """Rank of the adapters; 0 is none, and then training changes the weights themselves."""
    lora_alpha: float = 32.0
    """Scaling: the adapters' product is multiplied by lora_alpha / r."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ConfigError(problems)

    def __bool__(self) -> bool:
        """Whether there are adapters."""
        return self.r > 0

    def problems(self) -> list[str]:
        problems = []
        if not _is_whole(self.r) or not 0 <= self.r < 2**31:
            problems.append(f"r = {self.r!r}: a LoRA rank is a whole number from 0 (no adapter) to 2^31 - 1")
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha < 2**127:  # which float32 and bfloat16 have
            problems.append(f"lora_alpha = {self.lora_alpha!r}: a positive number below 2^127 is allowed")
        return problems

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r if self.r else 0.0


def _seed_problem(name: str, seed: int) -> str | None:
    if not _is_whole(seed) or not 0 <= seed < 2**63:
        return f"{name} = {seed!r}: a seed is an integer from 0 to 2^63 - 1"
    return None


def check_seed(seed: int, name: str = "seed") -> int:
    """``seed`` itself, or a ValueError that says what a seed is."""
    if problem := _seed_problem(name, seed):
        raise ValueError(problem)
    return seed


def field_names(spec: type) -> list[str]:
    return [f.name for f in fields(spec)]
