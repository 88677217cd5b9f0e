"""What to flip, and which adapters to train: frozen, validated, with the TOML's own key names as fields.

``BitFlipSpec`` is the ``[bitflip]`` table and ``LoraSpec`` the ``[lora]`` table of a run's config, so a config file,
Python code and the papers' tables say the same words. A key of a fault begins with its operand: ``w_`` the weights,
``x_`` the inputs of linear layers, ``kv_`` the keys and values that attention reads.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args

from flipproof import regexes
from flipproof.faults.fault import Fault, Fitted, Granularity, Pattern, Protection
from flipproof.faults.layouts import is_bits
from flipproof.values import Between, Seed, Table, Texts

Persistence = Literal["transient", "persistent"]
Site = Literal["linear", "head", "embedding"]
Operand = Literal["w", "x", "kv"]

OPERANDS: tuple[Operand, ...] = ("w", "x", "kv")
Part = Literal["code", "scale", "zero", "global"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Of a quantised weight, as the keys of their faults call them (``quantised.py``)."""
INPUT_PARTS: tuple[Part, ...] = ("code", "scale")
"""Of quantised inputs."""


def _is_regular(expression: str) -> bool:
    regexes.check(expression)
    return True


Probability = Annotated[float, Between(0, 0.5), "a flip probability"]
Threshold = Annotated[float, lambda t: t >= 0, "a threshold of at least 0"]
Margin = Annotated[float, lambda margin: 1 <= margin < math.inf, "a number of at least 1"]
Burst = Annotated[int, Between(1, 4096), "a length in bits"]
"""A burst ends in the block of 8192 elements that it begins in, or in the next."""
Bits = Annotated[str, is_bits, "'sign', 'exp', 'frac', a bit ('15') or a range of bits ('7-14')"]
BitProbabilities = Annotated[Mapping[Bits, Probability], 'a table, such as { exp = 1e-5, "15" = 0 },']
BitNames = Annotated[tuple[Bits, ...], "a list of 'sign', 'exp', 'frac', bits ('15') and ranges of bits ('7-14')"]
Sites = Annotated[tuple[Site, ...], bool, "a list of one or more of 'linear', 'head' and 'embedding'"]
Regex = Annotated[str, _is_regular, "a regular expression"]


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


@dataclass(frozen=True)
class LayerFaults(Table):
    """What happens to a layer: the keys of ``BitFlipSpec`` that a single layer may override."""

    w_p_exp: Probability | None = None
    """Probability that a sign or exponent bit of a weight is inverted, 0 to 0.5."""
    w_p_frac: Probability | None = None
    """Probability that a mantissa bit of a weight is inverted, 0 to 0.5."""
    w_zero_out_t: Threshold | None = None
    """Guard on weights: after the flip, every value whose magnitude is not below this becomes 0."""
    x_p_exp: Probability | None = None
    """Probability that a sign or exponent bit of an input activation is inverted, 0 to 0.5."""
    x_p_frac: Probability | None = None
    """Probability that a mantissa bit of an input activation is inverted, 0 to 0.5."""
    x_zero_out_t: Threshold | None = None
    """Guard on input activations: after the flip, every value whose magnitude is not below this becomes 0."""
    kv_p_exp: Probability | None = None
    """Probability that a sign or exponent bit of a key or value is inverted when attention reads it, 0 to 0.5."""
    kv_p_frac: Probability | None = None
    """Probability that a mantissa bit of a key or value is inverted when attention reads it, 0 to 0.5."""
    kv_zero_out_t: Threshold | None = None
    """Guard on keys and values: after the flip, every value whose magnitude is not below this becomes 0."""
    w_margin: Margin = 1.25
    """Where guards are fitted, thresholds of weights stand so many times above the largest clean value. Clean weights
    are known, so what needs room are adapters."""
    x_margin: Margin = 2.0
    """The same for input activations, which other text may drive higher."""
    kv_margin: Margin = 2.0
    """The same for keys and values."""
    w_faults: Persistence = "transient"
    """transient: weights flip anew at every forward pass. persistent: one draw per seed (a defective memory), nested:
    at lower probabilities the same seed flips a subset of the bits."""
    x_faults: Persistence = "transient"
    """The same for input activations."""
    kv_faults: Persistence = "transient"
    """The same for keys and values; a persistent fault belongs to a place in the cache."""
    w_p_bits: BitProbabilities = field(default_factory=dict)
    """Own probabilities of bits of a weight, over w_p_exp and w_p_frac. Bits are "sign", "exp" (the exponent alone),
    "frac", a number ("15") or a range ("7-14"), 0 being the lowest of the mantissa: {exp: 1e-5, "15": 0}."""
    x_p_bits: BitProbabilities = field(default_factory=dict)
    """The same for input activations."""
    kv_p_bits: BitProbabilities = field(default_factory=dict)
    """The same for keys and values."""
    w_burst: Burst = 1
    """Flips of weights come in runs of so many neighbouring bits in memory; each bit's probability stays what it is,
    and must be the same for all bits."""
    x_burst: Burst = 1
    """The same for input activations."""
    kv_burst: Burst = 1
    """The same for keys and values."""
    w_p_row: Probability | None = None
    """Probability that a memory row (row_bytes) of a weight is bad: its every bit is inverted with probability 1/2."""
    x_p_row: Probability | None = None
    """The same for input activations."""
    kv_p_row: Probability | None = None
    """The same for keys and values."""
    w_protection: Protection = "none"
    """secded: each 64 bits of weights have 8 check bits, which flip too; one wrong bit is corrected, two are found and
    the word zeroed. parity: a bit for each value; where it does not fit, the value is zeroed."""
    x_protection: Protection = "none"
    """The same for input activations."""
    kv_protection: Protection = "none"
    """The same for keys and values."""
    w_protected_bits: BitNames = ()
    """Bits of a weight (named as in w_p_bits) that are stored three times, with a vote: p becomes 3p² - 2p³."""
    x_protected_bits: BitNames = ()
    """The same for input activations."""
    kv_protected_bits: BitNames = ()
    """The same for keys and values."""
    w_code_p: Probability | None = None
    """Of a quantised weight: probability that a bit of a code is inverted, 0 to 0.5. What w_faults, w_burst, w_p_row,
    row_bytes and w_protection say of a weight's memory holds for codes, scales, zero points and global scales alike;
    w_zero_out_t guards the weight that is computed with."""
    w_code_p_bits: BitProbabilities = field(default_factory=dict)
    """Own probabilities of bits of a code, over w_code_p: numbers and ranges, 0 being the lowest, and of codes that are
    floats "sign", "exp" and "frac"."""
    w_scale_p_exp: Probability | None = None
    """Of a quantised weight: probability that a sign or exponent bit of a scale is inverted, 0 to 0.5, in the scale's
    own dtype. E8M0 and the scales of nf4, which are places in a table, have nothing but such bits."""
    w_scale_p_frac: Probability | None = None
    """The same for mantissa bits of a scale."""
    w_scale_p_bits: BitProbabilities = field(default_factory=dict)
    """Own probabilities of bits of a scale, over w_scale_p_exp and w_scale_p_frac."""
    w_scale_protected_bits: BitNames = ()
    """Bits of a scale that are stored three times, with a vote: p becomes 3p² - 2p³."""
    w_scale_zero_out_t: Threshold | None = None
    """Guard on the scales of a quantised weight: one whose number is not below this in magnitude counts as 0, and its
    group of weights with it."""
    w_zero_p: Probability | None = None
    """Of a quantised weight: probability that a bit of a zero point is inverted, 0 to 0.5."""
    w_global_p: Probability | None = None
    """Of a quantised weight: probability that a bit of the float32 numbers that its scales are made with is inverted,
    0 to 0.5: the global scale of nvfp4; the nested scales, offset and map of nf4."""
    x_code_p: Probability | None = None
    """Of quantised inputs: probability that a bit of a code is inverted, 0 to 0.5. What x_faults, x_burst, x_p_row,
    row_bytes and x_protection say holds for codes and scales; x_zero_out_t guards the input that is computed with."""
    x_code_p_bits: BitProbabilities = field(default_factory=dict)
    """Own probabilities of bits of a code of inputs, over x_code_p."""
    x_scale_p_exp: Probability | None = None
    """Of quantised inputs: probability that a sign or exponent bit of a token's scale is inverted, 0 to 0.5."""
    x_scale_p_frac: Probability | None = None
    """The same for mantissa bits of a token's scale."""
    x_scale_p_bits: BitProbabilities = field(default_factory=dict)
    """Own probabilities of bits of a token's scale, over x_scale_p_exp and x_scale_p_frac."""
    x_scale_protected_bits: BitNames = ()
    """Bits of a token's scale that are stored three times, with a vote: p becomes 3p² - 2p³."""


LAYER_KEYS = tuple(LayerFaults.declared())
FITTED_KEYS = (*(f"{operand}_margin" for operand in OPERANDS), "guards_by", "guards_floor")
"""Keys that say how fitted guards are used."""
Override = Annotated[Annotated[Mapping[str, Any], LayerFaults] | Literal[False] | None, "a table of keys, or false,"]
Layers = Annotated[Mapping[Regex, Override], "a table of regular expressions and the keys to change"]


@dataclass(frozen=True)
class BitFlipSpec(LayerFaults):
    """Which bits flip, how often, and in which layers (the ``[bitflip]`` table).

    Raises:
        ConfigError: naming every bad field with its value and what is allowed.
    """

    guards: str | None = None
    """Fitted guards: a directory with guards.safetensors, which flipproof profile --guards writes, of this very model.
    Their thresholds take the place of w_zero_out_t, w_scale_zero_out_t, x_zero_out_t and kv_zero_out_t, which are left
    out."""
    guards_by: Granularity | None = None
    """How fine fitted guards are: one threshold for a whole tensor of all layers (tensor), for each layer, or for each
    channel: a feature of inputs, an output row of weights, a component of a head's keys and values. Default: as fine as
    they were fitted."""
    guards_floor: Annotated[float, Between(0, 1)] = 0.9
    """Where guards are by channel, inputs, keys and values: no channel's largest value counts for less than this
    quantile of those of its layer, since other text may use channels that calibration hardly did. 0 is no floor."""
    row_bytes: Annotated[int, lambda n: n >= 8 and n % 8 == 0, "a multiple of 8"] = 1024
    """Length of a memory row."""
    sites: Sites = ("linear",)
    """Whose weights and inputs are faulty: linear (every linear layer but the output head), head, embedding."""
    base_seed: Seed = 0
    """Seed of the draws. Evaluation uses seeds of its own, never this one."""
    exact_gradient: bool = True
    """Whether the gradients of LoRA adapters leave out the weights that the guard zeroed, as they should. false lets
    them pass straight through there, which saves a few per cent of a training step on a GPU."""
    include_patterns: Texts = ()
    """Substrings of module names: where given, only layers that contain one of them are touched."""
    skip_patterns: Texts = ()
    """Substrings of module names to leave alone, on top of the output head."""
    layer_name_to_config: Layers = field(default_factory=dict)
    """Per-layer overrides: regular expression for the whole module name -> the keys to change, or null (in TOML: false)
    to leave the layer alone. The first expression that matches counts."""

    def __post_init__(self) -> None:
        self.check()

    def problems(self) -> list[str]:
        problems = _burst_problems(vars(self), "")
        for pattern, override in self.layer_name_to_config.items():
            if isinstance(override, Mapping) and not problems:
                problems = _burst_problems({**vars(self), **override}, f"layer_name_to_config {pattern!r}.")
        return problems

    def in_vain(self) -> list[str]:
        """A line for each key that says nothing beside the others: how fitted guards are used where there are none, or
        a threshold where they take its place. Not among ``problems``, since a sweep chooses between the two and harden
        fits its own."""
        return [line for _, _, line in self._in_vain()]

    def without_vain(self) -> "BitFlipSpec":
        """The same without keys that say nothing, for runs from before they were refused."""
        changes: dict[str, Any] = {}
        layers = dict(self.layer_name_to_config)
        for layer, key, _ in self._in_vain():
            if layer is None:
                changes[key] = DEFAULTS[key]
            else:
                layers[layer] = {name: value for name, value in (layers[layer] or {}).items() if name != key}
        return replace(self, **changes, layer_name_to_config=layers)

    def _in_vain(self) -> Iterator[tuple[str | None, str, str]]:
        """(expression of an override or None, key, line) of each."""
        for layer, keys in (None, vars(self)), *self.layer_name_to_config.items():
            where = "bitflip." if layer is None else f"bitflip.layer_name_to_config {layer!r}: "
            given = {key: value for key, value in keys.items() if value != DEFAULTS.get(key)} if keys else {}
            for key, value in given.items():
                if key in FITTED_KEYS and not self.guards:
                    why = "it says how fitted guards are used; set bitflip.guards to the directory that holds some, or "
                    yield layer, key, f"{where}{key} = {value!r}: {why}leave it out"
                elif key.endswith("_zero_out_t") and self.guards and value != math.inf:
                    off = f" (--bitflip.{key} None overrides a file)" if layer is None else ""
                    why = f"bitflip.guards = {self.guards!r} has thresholds in its place; leave one of the two out"
                    yield layer, key, f"{where}{key} = {value!r}: {why}{off}"

    def for_layer(self, name: str) -> "BitFlipSpec | None":
        """The spec of the module called ``name``, overrides applied; None where it is to be left alone."""
        if any(pattern in name for pattern in self.skip_patterns):
            return None
        if self.include_patterns and not any(pattern in name for pattern in self.include_patterns):
            return None
        for pattern, override in self.layer_name_to_config.items():
            if regexes.fullmatch(pattern, name):
                return self._overridden(override) if isinstance(override, Mapping) else None
        return self

    def variants(self) -> list["BitFlipSpec"]:
        """Itself, and what each override of single layers makes of it."""
        overrides = self.layer_name_to_config.values()
        return [self, *(self._overridden(override) for override in overrides if isinstance(override, Mapping))]

    def _overridden(self, override: Mapping[str, Any]) -> "BitFlipSpec":
        # without the overrides, which every new spec would check again: of n layers n times
        return replace(self, layer_name_to_config={}, **override)

    @property
    def any_kv_fault(self) -> bool:
        """Whether any attention reads faulty keys and values."""
        return any(spec.kv.active for spec in self.variants())

    @property
    def any_fault(self) -> bool:
        """Whether any layer flips bits or has a guard."""
        own = self.x.active or self.w.active or self.kv.active or any(fault.active for fault in self.stored)
        return own or any(self.layer_name_to_config.values())

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
        flips = bool(p_exp or p_frac or pattern.p_row or any(p for _, p in pattern.p_bits))
        fitted = None
        if self.guards and (operand != "kv" or flips or t is not None):  # else attention is left alone
            floor = 0.0 if operand == "w" else self.guards_floor  # weights hold no surprise
            fitted, t = Fitted(self.guards_by, self._of(operand, "margin"), floor), None
        if not flips:
            return Fault(zero_out_t=t, fitted=fitted)
        return Fault(p_exp, p_frac, t, None if pattern.independent else pattern, fitted)

    def part(self, part: Part, operand: Operand = "w") -> Fault:
        """The fault of one part of a quantised weight, or of quantised inputs."""
        own = self._of_part(operand, part)
        p = own["p"] or 0.0
        p_exp, p_frac = own["p_exp"] or p, own["p_frac"] or p
        bits = tuple(own["p_bits"].items())
        pattern = replace(self.pattern(operand), p_bits=bits, protected_bits=own["protected_bits"])
        if not (p_exp or p_frac or pattern.p_row or any(p for _, p in bits)):
            return Fault()
        return Fault(p_exp, p_frac, None, None if pattern.independent else pattern)

    def _of_part(self, operand: Operand, part: Part) -> dict[str, Any]:
        """What the keys of one part say: rest of the key -> value."""
        keys: dict[str, Any] = {"p": None, "p_exp": None, "p_frac": None, "p_bits": {}, "protected_bits": ()}
        return {key: getattr(self, f"{operand}_{part}_{key}", none) for key, none in keys.items()}

    @property
    def stored(self) -> list[Fault]:
        """The faults of a quantised weight, where there is one: of its parts, the guards of scales and of what is
        computed with, and those of the parts of its inputs."""
        guards = Fault(zero_out_t=self.w_scale_zero_out_t), Fault(zero_out_t=self.w.zero_out_t, fitted=self.w.fitted)
        return [*map(self.part, PARTS), *guards, *(self.part(part, "x") for part in INPUT_PARTS)]

    def pattern(self, operand: Operand) -> Pattern:
        """How the faults of one operand come, apart from how often."""
        return Pattern(
            persistent=self._of(operand, "faults") == "persistent",
            p_bits=tuple(self._of(operand, "p_bits").items()),
            burst=self._of(operand, "burst"),
            p_row=self._of(operand, "p_row") or 0.0,
            row_bytes=self.row_bytes,
            protection=self._of(operand, "protection"),
            protected_bits=self._of(operand, "protected_bits"),
        )

    def _of(self, operand: Operand, key: str) -> Any:
        return getattr(self, f"{operand}_{key}")


DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(BitFlipSpec)}
"""Of a ``BitFlipSpec``'s keys."""


def storage_overhead(spec: BitFlipSpec, dtype: str) -> dict[Operand, float]:
    """Operand -> bits stored for its protection, over those of its values, in a dtype such as "bfloat16"."""
    return {operand: spec.pattern(operand).overhead(dtype) for operand in OPERANDS}


@dataclass(frozen=True)
class LoraSpec(Table):
    """Low-rank adapters on linear layers (the ``[lora]`` table): W + (lora_alpha / r) · B · A. The keys are PEFT's.

    Raises:
        ConfigError: for a value that its key does not allow.
    """

    r: Annotated[int, Between(0, 2**31 - 1)] = 0
    """Rank of the adapters; 0 is none, and then training changes the weights themselves."""
    lora_alpha: Annotated[float, lambda alpha: 0 < alpha < 2**127, "a positive number below 2^127"] = 32.0
    """Scaling: the adapters' product is multiplied by lora_alpha / r."""
    target_modules: Annotated[tuple[Annotated[str, _is_regular], ...], "a list of texts"] | None = None
    """Which linear layers have adapters, with faults or without: "all-linear" for all but the output head, or whole
    parts of their names ("q_proj", "self_attn", "layers.0"), or a regular expression of a whole name. Faulty layers
    that none names have no adapter. Default: every faulty layer."""
    dropout: Annotated[float, lambda p: 0 <= p < 1, "a number of at least 0, below 1,"] = 0.0
    """Probability that an adapter does not see a feature of its input, while it trains: one draw for all rows of a
    micro-batch, where PEFT's lora_dropout draws for each, since the adapter is merged into the weight."""
    use_rslora: bool = False
    """Rank-stabilised scaling: lora_alpha / √r (arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str):  # as PEFT takes one
            object.__setattr__(self, "target_modules", (self.target_modules,))
        self.check()

    def problems(self) -> list[str]:
        if self.r == 0 and self.target_modules is not None:
            return [f"target_modules = {list(self.target_modules)}: lora.r = 0 makes no adapters; set it, or drop one"]
        return []

    def __bool__(self) -> bool:
        """Whether there are adapters."""
        return self.r > 0

    @property
    def scaling(self) -> float:
        """What the adapters' product is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r) if self.r else 0.0


def field_names(spec: type) -> list[str]:
    return [f.name for f in fields(spec)]
