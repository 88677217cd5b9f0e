"""How large the weights and the inputs of linear layers are in the clean model: where a guard may stand.

A guard (``zero_out_t``) sees clean values too, so its threshold belongs above all of them. ``profile`` runs the model
without faults over text and gives, for each layer that faults would reach and for all of them together, quantiles and
the maximum of |value|, what configured thresholds would clip, and thresholds that clip nothing.

**Counted, not kept.** Magnitudes of IEEE floats are ordered as their bit patterns are, so the top 15 bits of one are
the number of its bin. In bfloat16 and float16 these are all its bits, and the counts say everything; in float32 a bin
is 2⁻⁷ of its values wide. Each layer has 2 × 2¹⁵ integers on its device, however long the text is, and no activation is
kept. The maximum, and what a threshold clips, are found from all bits.

**Quantiles** are by nearest rank: the smallest value that at least so large a share of all values does not exceed. What
is reported is the largest value of its bin, but no more than the maximum; float32's lowest bin, below 2⁻¹³³, stands for
0. NaN and infinity are counted apart.

**The same on any number of processes.** Counts are integers, and are summed. A weight is counted where its shard lies,
and copies of a shard share the work. Of activations each process counts those of its own sequences, in batches that are
the same whichever process they come to, the last and smaller one too.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flipproof.config import RunConfig
from flipproof.data.sequences import PackedText, load_held_out
from flipproof.dtensor import local
from flipproof.faults.guard import guard_bits, magnitude_bits
from flipproof.faults.inject import faults, iter_faulty
from flipproof.faults.linear import FaultyLinear
from flipproof.faults.spec import BitFlipSpec
from flipproof.files import check_new
from flipproof.log import logger
from flipproof.measure.evaluate import run_over
from flipproof.models.build import build_model, check_length, flipped_dtype
from flipproof.models.load import compute_context, load_tokenizer
from flipproof.models.packed import check_text
from flipproof.models.parallelize import cast_to
from flipproof.records import write_new_record
from flipproof.world import World, join_world

PROFILE = "profile.json"
_BIN_BITS = 15
_BINS = 2**_BIN_BITS
_CHUNK = 2**24  # elements counted at a time, so that temporary memory stays bounded
_QUANTILES = {"p50": (1, 2), "p99": (99, 100), "p99.9": (999, 1000), "p99.99": (9999, 10000)}
"""As fractions: a rank among trillions of values has more digits than a float."""


@dataclass(frozen=True)
class Magnitudes:
    """|value| of one operand, of one layer or of all."""

    count: int
    """Finite values."""
    zeros: int
    nan: int
    infinite: int
    quantiles: dict[str, float]
    """p50, p99, p99.9 and p99.99 of the finite values; NaN where there are none."""
    maximum: float
    """The largest finite value, exactly; NaN where there is none."""
    proposed_t: float | None
    """``proposed_threshold`` of the maximum."""
    zero_out_t: float | None
    """The configured threshold; None where there is none, or where layers differ."""
    clipped: int | None
    """Values that configured thresholds zero before any bit flips; None where none is configured."""
    histogram: tuple[tuple[int, int], ...]
    """(e, how many values are at least 2^e and below 2^(e+1)), by e; zeros are not among them."""


@dataclass(frozen=True)
class LayerProfile:
    """The operands of one layer, or of all."""

    weights: Magnitudes
    inputs: Magnitudes


@dataclass(frozen=True)
class Profile:
    """What ``profile.json`` holds."""

    model: str
    dtype: str
    """The dtype that the model computes in, whose bits flip."""
    text: str
    tokens: int
    all: LayerProfile
    layers: dict[str, LayerProfile]
    """By module name."""


def proposed_threshold(maximum: float) -> float | None:
    """The smallest power of two that is at least twice ``maximum``: 256 for 126.5, 8192 for 3680. None where there is
    nothing above 0.
    """
    if not maximum > 0:
        return None
    mantissa, exponent = math.frexp(2 * maximum)  # 2·maximum = mantissa · 2^exponent, ½ ≤ mantissa < 1
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


# -- counting ----------------------------------------------------------------------------------------------------------


class Tally:
    """Counts of the magnitudes of one operand of one layer, in the dtype that flips and on the device that computes.

    Args:
        dtype: bfloat16, float16 or float32.
        zero_out_t: count what this threshold clips.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, zero_out_t: float | None = None) -> None:
        self.dtype, self.device, self.zero_out_t = dtype, device, zero_out_t
        self._infinity = guard_bits(dtype, math.inf)
        self._limit = None if zero_out_t is None else guard_bits(dtype, zero_out_t)
        self._bins = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._nan_clipped = torch.zeros(2, dtype=torch.int64, device=device)
        self._largest = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Count a tensor of any shape, which is cast to the dtype."""
        for part in values.detach().reshape(-1).split(_CHUNK):
            if not part.numel():  # a process may hold no row of a weight, an expert may get no token
                continue
            bits = magnitude_bits(part.to(self.device, self.dtype))
            self._bins += torch.bincount(bits >> self._shift, minlength=_BINS)
            self._nan_clipped[0] += (bits > self._infinity).sum()
            if self._limit is not None:
                self._nan_clipped[1] += (bits >= self._limit).sum()
            largest = bits.where(bits < self._infinity, 0).max()
            self._largest = torch.maximum(self._largest, largest)

    @property
    def _shift(self) -> int:
        return self.dtype.itemsize * 8 - 1 - _BIN_BITS

    def reduce(self, world: World) -> None:
        """Take in what the other processes counted; all must call, in the same order."""
        if world.size == 1:
            return
        for name, how in (("_bins", "SUM"), ("_nan_clipped", "SUM"), ("_largest", "MAX")):
            counted = getattr(self, name).cpu()
            dist.all_reduce(counted, getattr(dist.ReduceOp, how), group=world.cpu_group)
            setattr(self, name, counted)

    def histogram(self) -> "Histogram":
        """What was counted."""
        bins = self._bins.cpu().numpy()
        finite = self._infinity >> self._shift
        filled = np.flatnonzero(bins[:finite])
        nan, clipped = self._nan_clipped.tolist()
        integer = torch.int16 if self.dtype.itemsize == 2 else torch.int32
        return Histogram(
            values=_bin_values(self.dtype)[filled],
            counts=bins[filled],
            nan=nan,
            infinite=int(bins[finite:].sum()) - nan,
            maximum=float(self._largest.to("cpu", integer).view(self.dtype)) if len(filled) else math.nan,
            thresholds=frozenset([self.zero_out_t]),
            clipped=None if self.zero_out_t is None else clipped,
        )


@lru_cache(maxsize=3)
def _bin_values(dtype: torch.dtype) -> np.ndarray:
    """float64 (32768,): the largest value of each bin, 0 for the lowest; NaN where infinity and NaN are counted."""
    bins = torch.arange(_BINS, dtype=torch.int32)
    if dtype.itemsize == 2:
        return bins.to(torch.int16).view(dtype).double().numpy()
    values: np.ndarray = (bins << 16 | 0xFFFF).view(dtype).double().numpy()
    values[0] = 0.0
    return values


@dataclass(frozen=True)
class Histogram:
    """Counted magnitudes: ``counts`` (int64) of ascending ``values`` (float64), both (n,), and what is beside them."""

    values: np.ndarray
    counts: np.ndarray
    nan: int
    infinite: int
    maximum: float
    thresholds: frozenset[float | None]
    clipped: int | None

    @classmethod
    def pooled(cls, parts: Iterable["Histogram"]) -> "Histogram":
        """All of ``parts``, which may be of different dtypes, as one."""
        parts = list(parts)
        values, place = np.unique(np.concatenate([part.values for part in parts]), return_inverse=True)
        counts = np.zeros(len(values), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
        clipped = [part.clipped for part in parts if part.clipped is not None]
        return cls(
            values=values,
            counts=counts,
            nan=sum(part.nan for part in parts),
            infinite=sum(part.infinite for part in parts),
            maximum=max((part.maximum for part in parts if len(part.values)), default=math.nan),
            thresholds=frozenset().union(*(part.thresholds for part in parts)),
            clipped=sum(clipped) if clipped else None,
        )

    def quantile(self, numerator: int, denominator: int) -> float:
        """The value of rank ⌈count · numerator / denominator⌉, at most the maximum."""
        cumulative = np.cumsum(self.counts)
        if not len(cumulative):
            return math.nan
        rank = -(-int(cumulative[-1]) * numerator // denominator)
        return min(float(self.values[np.searchsorted(cumulative, rank)]), self.maximum)

    def summary(self) -> Magnitudes:
        zero = self.values == 0
        exponents = np.frexp(self.values[~zero])[1] - 1
        lowest = int(exponents.min(initial=0))
        by_exponent = np.zeros(int(exponents.max(initial=0)) - lowest + 1, dtype=np.int64)
        np.add.at(by_exponent, exponents - lowest, self.counts[~zero])
        return Magnitudes(
            count=int(self.counts.sum()),
            zeros=int(self.counts[zero].sum()),
            nan=self.nan,
            infinite=self.infinite,
            quantiles={name: self.quantile(*fraction) for name, fraction in _QUANTILES.items()},
            maximum=self.maximum,
            proposed_t=proposed_threshold(self.maximum),
            zero_out_t=next(iter(self.thresholds)) if len(self.thresholds) == 1 else None,
            clipped=self.clipped,
            histogram=tuple((lowest + i, int(n)) for i, n in enumerate(by_exponent) if n),
        )


@contextmanager
def _counted_inputs(layers: dict[str, FaultyLinear], tallies: dict[str, Tally]) -> Iterator[None]:
    """Within the block each layer's inputs are counted in the tally of its name."""

    def counting(tally: Tally) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _layer, args: tally.add(args[0])

    handles = [layer.register_forward_pre_hook(counting(tallies[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def count_magnitudes(
    model: nn.Module,
    text: PackedText,
    num_samples: int,
    batch_size: int,
    *,
    spec: BitFlipSpec | None = None,
    dtype: torch.dtype | None = None,
    world: World | None = None,
) -> tuple[dict[str, LayerProfile], LayerProfile, int]:
    """(each faulty layer's profile by name, that of all, tokens) over ``num_samples`` sequences spread evenly over the
    text, or all of it where it has fewer. All processes return the same; the model runs clean and stays as it is.

    Args:
        model: an injected one; what its layers' faults are does not matter.
        batch_size: sequences at a time in each process.
        spec: thresholds to count the clipped values of.
        dtype: what operands are cast to before they flip, where it is not the weights' own.
    """
    world = world or World(0, 1, next(model.parameters()).device)
    layers = dict(iter_faulty(model))
    weights: dict[str, Tally] = {}
    inputs: dict[str, Tally] = {}
    replica, replicas = _replica(world)
    for name, layer in layers.items():
        own = spec.for_layer(layer.site) if spec else None
        w_t, x_t = (own.w_zero_out_t, own.x_zero_out_t) if own else (None, None)
        weights[name], inputs[name] = (Tally(dtype or layer.weight.dtype, world.device, t) for t in (w_t, x_t))
        # Before any forward pass: after one, FSDP may keep a weight gathered, and every process would count it.
        weights[name].add(local(layer.weight).reshape(-1)[replica::replicas])

    with faults(model, flips=False, guard=False, adapters=False):
        tokens = run_over(model, text, num_samples, batch_size, world, lambda: _counted_inputs(layers, inputs))

    for tally in (*weights.values(), *inputs.values()):
        tally.reduce(world)
    w, x = ({name: tally.histogram() for name, tally in tallies.items()} for tallies in (weights, inputs))
    profiles = {name: LayerProfile(w[name].summary(), x[name].summary()) for name in layers}
    total = LayerProfile(Histogram.pooled(w.values()).summary(), Histogram.pooled(x.values()).summary())
    return profiles, total, tokens


def _replica(world: World) -> tuple[int, int]:
    """(which copy of its shards this process holds, how many there are)."""
    if world.mesh is None:
        return 0, 1
    replicas = world.mesh["replicate"]
    return replicas.get_local_rank(), replicas.size()


# -- the verb ----------------------------------------------------------------------------------------------------------


def profile(config: RunConfig, to: Path | None = None, tell: Callable[[str], None] | None = None) -> Profile:
    """Measure the magnitudes of a clean model on held-out text, and warn of thresholds that clip them.

    The layers are those that faults would reach: every ``nn.Linear`` but the output head, less what
    ``bitflip.include_patterns``, ``skip_patterns`` and ``layer_name_to_config`` leave alone.

    Args:
        config: model, text and number of samples; of ``bitflip`` the thresholds and patterns. ``lora`` counts for
            nothing.
        to: directory to write ``profile.json`` into; it must not hold one.
        tell: called by the first process with table and proposals, before anything is written to ``to``.

    Raises:
        ConfigError: where model, text, patterns or directory are at fault, before anything is measured.
    """
    if to is not None:
        check_new(to / PROFILE, "--to")
    # A compiled block may leave out hooks of its layers; nothing is kept for a backward pass.
    training = replace(config.training, compile=False, activation_checkpointing="none")
    config = replace(config, training=training)
    with join_world(config.parallelism) as world:
        tokenizer = load_tokenizer(config.model)
        check_length(config, tokenizer)
        text = load_held_out(config.data, tokenizer, training.seq_len)
        model = build_model(replace(config, bitflip=_everywhere(config.bitflip)), tokenizer, world)
        check_text(config.training, model, tokenizer, text)
        dtype = cast_to(training, model)
        with compute_context(training, model):
            layers, total, tokens = count_magnitudes(
                model,
                text,
                config.eval.num_samples,
                training.local_batch_size,
                spec=config.bitflip,
                dtype=dtype,
                world=world,
            )
        result = Profile(
            model=str(config.model.hf_model_path or config.model.flavor),
            dtype=flipped_dtype(training, model),
            text=text.source,
            tokens=tokens,
            all=total,
            layers=layers,
        )
        if world.first:
            for line in warnings_of(result):
                logger.warning("%s", line)
            if tell:
                tell(f"{profile_table(result)}\n\n{proposed_toml(result)}")
            if to is not None:
                write_new_record(to / PROFILE, asdict(result), "--to")
    return result


def _everywhere(spec: BitFlipSpec) -> BitFlipSpec:
    """A guard that is never on, in the layers that ``spec`` does not leave alone."""
    return BitFlipSpec(
        w_zero_out_t=math.inf,
        include_patterns=spec.include_patterns,
        skip_patterns=spec.skip_patterns,
        layer_name_to_config={
            name: None if override is None else {} for name, override in spec.layer_name_to_config.items()
        },
    )


# -- what people read --------------------------------------------------------------------------------------------------

_OPERANDS = {"w": "weights", "x": "inputs"}


def warnings_of(profile: Profile) -> list[str]:
    """A line for each operand with values that are not finite, and for each that configured thresholds clip."""
    lines = []
    for key, operand in _OPERANDS.items():
        total: Magnitudes = getattr(profile.all, operand)
        layers: dict[str, Magnitudes] = {name: getattr(layer, operand) for name, layer in profile.layers.items()}
        if total.nan or total.infinite:
            where = _worst({name: one.nan + one.infinite for name, one in layers.items()})
            lines.append(f"of the clean {operand} {total.nan:,} are NaN and {total.infinite:,} infinite: {where}")
        if total.clipped:
            count = total.count + total.nan + total.infinite
            value = "" if total.zero_out_t is None else f" = {total.zero_out_t:g}"
            where = _worst({name: one.clipped or 0 for name, one in layers.items()})
            lines.append(
                f"bitflip.{key}_zero_out_t{value} clips {total.clipped:,} of {count:,} clean {operand} "
                f"({total.clipped / count:.2g} of all): {where}"
            )
    return lines


def _worst(counts: dict[str, int]) -> str:
    """The layers with the highest counts by name, and how many more have any."""
    hit = sorted((name for name, n in counts.items() if n), key=lambda name: -counts[name])
    shown = ", ".join(f"{name} ({counts[name]:,})" for name in hit[:3])
    return shown + (f" and {len(hit) - 3} more" if len(hit) > 3 else "")


def profile_table(profile: Profile) -> str:
    """Two rows for each layer, w and x, and below them the tutorial's two for all layers."""
    rows = [
        (f"{name} {key}", getattr(layer, operand))
        for name, layer in profile.layers.items()
        for key, operand in _OPERANDS.items()
    ]
    totals = [("Activations (Linear inputs)", profile.all.inputs), ("Weights (.weight)", profile.all.weights)]
    width = max(len(name) for name, _ in (*rows, *totals))

    def line(name: str, one: Magnitudes) -> str:
        return f"{name:<{width}}" + "".join(f"{value:>11.4g}" for value in (*one.quantiles.values(), one.maximum))

    columns = "".join(f"{name:>11}" for name in (*_QUANTILES, "max"))
    what = f"{profile.tokens:,} tokens, {len(profile.layers)} layers, {profile.dtype}"
    return "\n".join(
        [
            f"{'layer':<{width}}{columns}",
            *(line(*row) for row in rows),
            "",
            f"{what:<{width}}{columns}",
            *(line(*row) for row in totals),
        ]
    )


def proposed_toml(profile: Profile) -> str:
    """The proposed thresholds as a table for a config."""
    lines = ["[bitflip]"]
    for key, operand in _OPERANDS.items():
        one: Magnitudes = getattr(profile.all, operand)
        if one.proposed_t is not None:
            lines.append(f"{key}_zero_out_t = {one.proposed_t!r}  # clean {operand} reach {one.maximum:.6g}")
    return "\n".join(lines)
