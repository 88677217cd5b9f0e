"""What to flip, and which adapters to train: frozen, validated, with the TOML's own key names as fields.

``BitFlipSpec`` is the ``[bitflip]`` table and ``LoraSpec`` the ``[lora]`` table of a run's config, so a config file,
Python code and the papers' tables say the same words.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

Persistence = Literal["transient", "persistent"]


class Fault(NamedTuple):
    """What happens to one operand (``x`` or ``w``) of one layer: the argument of a flip, less its key."""

    p_exp: float = 0.0
    """Probability that a sign or exponent bit is inverted."""
    p_frac: float = 0.0
    """Probability that a mantissa bit is inverted."""
    zero_out_t: float | None = None
    """Guard threshold: after the flip, whatever is not of magnitude below it becomes 0. None: no guard."""
    persistent: bool = False
    """One draw per seed instead of one per forward pass."""

    @property
    def flips(self) -> bool:
        return self.p_exp > 0 or self.p_frac > 0

    @property
    def active(self) -> bool:
        return self.flips or self.zero_out_t is not None

    @property
    def draw(self) -> tuple[float, float, float | None]:
        """The operators' first arguments."""
        return self.p_exp, self.p_frac, self.zero_out_t

    def guard_only(self) -> "Fault":
        return self._replace(p_exp=0.0, p_frac=0.0)


def probability_problem(name: str, p: Any) -> str | None:
    """One line naming what is wrong with a flip probability, or None where it is fine."""
    if p is None:
        return None
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 0.5:
        return f"{name} = {p!r}: a flip probability is a number from 0 to 0.5 (None or 0 is off)"
    return None


def threshold_problem(name: str, t: Any) -> str | None:
    """One line naming what is wrong with a guard threshold, or None where it is fine."""
    if t is None:
        return None
    if isinstance(t, bool) or not isinstance(t, int | float) or math.isnan(t) or t < 0:
        return f"{name} = {t!r}: a zero_out threshold is a number of at least 0 (None is no guard)"
    return None


_PROBABILITIES = ("w_p_exp", "w_p_frac", "x_p_exp", "x_p_frac")
_THRESHOLDS = ("w_zero_out_t", "x_zero_out_t")
_PERSISTENCES = ("w_faults", "x_faults")
LAYER_KEYS = (*_PROBABILITIES, *_THRESHOLDS, *_PERSISTENCES)
"""The keys of ``BitFlipSpec`` that a single layer may override."""


def _layer_problems(values: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for name, value in values.items():
        if name in _PROBABILITIES:
            problems.append(probability_problem(prefix + name, value))
        elif name in _THRESHOLDS:
            problems.append(threshold_problem(prefix + name, value))
        elif name in _PERSISTENCES:
            if value not in ("transient", "persistent"):
                problems.append(f"{prefix}{name} = {value!r}: allowed are 'transient' and 'persistent'")
        else:
            problems.append(f"{prefix}{name}: no such key; a layer's keys are {', '.join(LAYER_KEYS)}")
    return [problem for problem in problems if problem]


def _false_as_none(value: Any) -> Any:
    return None if value is False else value


@dataclass(frozen=True)
class BitFlipSpec:
    """Which bits flip, how often, and in which layers (the ``[bitflip]`` table).

    Raises:
        ValueError: naming every bad field with its value and what is allowed.
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
    w_faults: Persistence = "transient"
    """transient: weights flip anew at every forward pass. persistent: one draw per seed (a defective memory)."""
    x_faults: Persistence = "transient"
    """The same for input activations."""
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
        # TOML and the command line bring lists; a frozen value wants tuples.
        for name in ("include_patterns", "skip_patterns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        layers = {
            pattern: {key: _false_as_none(value) for key, value in override.items()}
            if isinstance(override, Mapping)
            else _false_as_none(override)
            for pattern, override in self.layer_name_to_config.items()
        }
        object.__setattr__(self, "layer_name_to_config", layers)
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        problems = _layer_problems({name: getattr(self, name) for name in LAYER_KEYS}, "")
        if seed_problem := _seed_problem("base_seed", self.base_seed):
            problems.append(seed_problem)
        for pattern, override in self.layer_name_to_config.items():
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"layer_name_to_config {pattern!r}: not a regular expression ({error})")
            if override is True:
                problems.append(f"layer_name_to_config {pattern!r} = true: a table of keys, or false, is allowed")
            elif isinstance(override, Mapping):
                problems += _layer_problems(override, f"layer_name_to_config {pattern!r}.")
        return problems

    def for_layer(self, name: str) -> "BitFlipSpec | None":
        """The spec of the module called ``name``, overrides applied; None where it is to be left alone."""
        if any(pattern in name for pattern in self.skip_patterns):
            return None
        if self.include_patterns and not any(pattern in name for pattern in self.include_patterns):
            return None
        for pattern, override in self.layer_name_to_config.items():
            if re.fullmatch(pattern, name):
                return replace(self, **override) if isinstance(override, Mapping) else None
        return self

    @property
    def any_fault(self) -> bool:
        """Whether any layer flips bits or has a guard."""
        return self.x.active or self.w.active or any(self.layer_name_to_config.values())

    @property
    def x(self) -> Fault:
        """The fault of the input activations."""
        return Fault(self.x_p_exp or 0.0, self.x_p_frac or 0.0, self.x_zero_out_t, self.x_faults == "persistent")

    @property
    def w(self) -> Fault:
        """The fault of the weight."""
        return Fault(self.w_p_exp or 0.0, self.w_p_frac or 0.0, self.w_zero_out_t, self.w_faults == "persistent")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on every faulty layer (the ``[lora]`` table): W + (lora_alpha / r) · B · A.

    Raises:
        ValueError: for a negative rank or a non-finite ``lora_alpha``.
    """

    r: int = 0
    """Rank of the adapters; 0 is none, and then training changes the weights themselves."""
    lora_alpha: float = 32.0
    """Scaling: the adapters' product is multiplied by lora_alpha / r."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        problems = []
        if self.r < 0:
            problems.append(f"r = {self.r!r}: a LoRA rank is at least 0 (0 is no adapter)")
        if not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            problems.append(f"lora_alpha = {self.lora_alpha!r}: a positive number is allowed")
        return problems

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r if self.r else 0.0


def _seed_problem(name: str, seed: int) -> str | None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        return f"{name} = {seed!r}: a seed is an integer from 0 to 2^63 - 1"
    return None


def check_seed(seed: int, name: str = "seed") -> int:
    """``seed`` itself, or a ValueError that says what a seed is."""
    if problem := _seed_problem(name, seed):
        raise ValueError(problem)
    return seed


def field_names(spec: type) -> list[str]:
    return [f.name for f in fields(spec)]
