"""Fitted guards: thresholds for each layer or channel, from the largest clean magnitudes that a text has shown.

``guards.safetensors`` holds these maxima, float32, by what they are of: ``model.layers.0.mlp.down_proj/x`` (in,), a
maximum for each feature; ``…/w`` (out, 1), for each row; ``model.embed_tokens/w`` (vocabulary, 1); an attention's
``…/k`` and ``…/v`` (heads, components). Of a quantised weight ``…/w`` is of what is computed with, and ``…/w_scale`` of
the numbers that its scales stand for, one for a layer. By layer and by tensor they have no dimensions. The margin comes
on top where they are used, so other margins and coarser guards need no other fit. Its metadata say what they were
fitted on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flipproof.dtensor import held, local
from flipproof.errors import ConfigError, first_of
from flipproof.faults.fault import GRANULARITIES, Fault, Fitted, Granularity
from flipproof.faults.guard import guard_of
from flipproof.files import named, replace_file
from flipproof.log import logger
from flipproof.records import GUARDS, sealed, unsealed

ROTATION = "flipproof_rotation"
"""What the config of a rotated model calls the record of it: {"how", "seed", "online": [names of layers]}."""
_ABOUT = "flipproof"
"""The key of the metadata."""
_FAR = 1.25
"""So many times as large, or as small, is far off for the largest value of a row."""
_STRAY = 0.01
"""Of a weight's rows, more than so many are not so far off: training moves some."""
_ROWS = 4096
"""Whose largest values are sought at a time."""


@dataclass(frozen=True)
class Guards:
    """Maxima, and what they were fitted on."""

    maxima: Mapping[str, Tensor]
    """"SITE/OPERAND" -> float32."""
    by: Granularity
    """How fine they are."""
    model: str
    dtype: str
    """Of the values, such as "bfloat16"."""
    basis: Any = None
    """How the model's basis was rotated; None where it is its own."""
    format: str | None = None
    """Of quantised weights; None where they are plain."""
    texts: tuple[Mapping[str, Any], ...] = ()
    """What was run: for each text its ``source`` and how many ``tokens``."""
    path: str = ""
    """Where they were read."""
    moved: bool = False
    """Whether the model's weights have been trained behind them, from whatever they were: those have no largest values
    here to be compared with."""

    @cached_property
    def _of_all(self) -> dict[str, Tensor]:
        """Operand -> the largest maximum of all."""
        found: dict[str, Tensor] = {}
        for name, maxima in self.maxima.items():
            operand = _operand(name)
            found[operand] = torch.maximum(found.get(operand, torch.zeros(())), maxima.max())
        return found

    def thresholds(self, name: str, fitted: Fitted, shape: tuple[int, ...] | None = None) -> Tensor:
        """Thresholds as a guard: each the next float32 above ``margin`` times its maximum, so that what was seen is
        kept. Infinity where nothing but zeros was.

        Args:
            name: site and operand.
            shape: what thresholds by channel must have.

        Raises:
            ConfigError: where they were not fitted, or not so finely, or for another shape.
        """
        maxima, by = self.maxima.get(name), fitted.by or self.by
        if maxima is None:
            fits = f"fitted on {self.model}, they are for {first_of([*self.maxima])}"
            raise ConfigError([f"bitflip.guards: {self.path} has no thresholds for {name}; {fits}"])
        if GRANULARITIES.index(by) > GRANULARITIES.index(self.by):
            raise ConfigError([f"bitflip.guards_by = {by!r}: {self.path} holds thresholds by {self.by}"])
        if self.by == "channel" and shape is not None and tuple(maxima.shape) != shape:
            raise ConfigError(
                [
                    f"bitflip.guards: {self.path} has thresholds of shape {tuple(maxima.shape)} for {name}, which is "
                    f"{shape} here; they were fitted on {self.model}"
                ]
            )
        maxima = self._as_fine(name, by)
        if by == "channel" and fitted.floor:
            maxima = maxima.clamp(min=maxima.flatten().quantile(fitted.floor, interpolation="higher"))
        t = guard_of(maxima.double() * fitted.margin).nextafter(torch.tensor(torch.inf))
        return t if bool(maxima.any()) else torch.full_like(t, torch.inf)

    def _as_fine(self, name: str, by: Granularity) -> Tensor:
        if by == "channel":
            return self.maxima[name]
        return self._of_all[_operand(name)] if by == "tensor" else self.maxima[name].max()

    def coarser(self, by: Granularity) -> "Guards":
        """As fine as ``by``, from finer ones."""
        return replace(self, by=by, maxima={name: self._as_fine(name, by) for name in self.maxima})

    def check_model(
        self,
        dtype: str,
        basis: Any,
        weights: Mapping[str, Callable[[], Tensor]],
        computed: torch.dtype | None = None,
        near: bool = True,
        format: str | None = None,
    ) -> None:
        """See that they were fitted to this very model, whose weights' largest values they hold, unless these have
        moved. Where its weights are others but near, as training leaves them, a warning says so.

        Args:
            dtype: of the values that flip, such as "bfloat16".
            basis: how the model's was rotated.
            weights: site -> what gives its weight (out, in), of all modules that have one; they are looked at one
                after the other. Of a sharded one that is the part that this process holds, on the meta device none.
            computed: the dtype that weights are cast to before their bits flip, where that is another.
            near: whether they may be others at all.
            format: of its weights, where they are quantised.

        Raises:
            ConfigError: where dtype or basis are others, or a weight is not there; where in one of them the largest
                values of more than a hundredth of the rows are off by more than a quarter, or any at all; where the
                weights that they were fitted to were quantised, and these are not, or in another format.
        """
        same = set(dtype.split(" and ")) <= set(self.dtype.split(" and ")), self.basis == json.loads(json.dumps(basis))
        for fits, (what, its) in zip(same, (("dtype", dtype), ("basis", basis)), strict=True):
            if not fits:
                told = f"was fitted to a model of {what} {said(getattr(self, what))}; it is {said(its)} here"
                raise ConfigError([f"bitflip.guards: {self.path} {told}"])
        if self.format != format and (self.format or not near):  # weights may be near, but not their scales
            mine, its = (one or "not quantised" for one in (self.format, format))
            told = f"was fitted to weights that are {mine}; here they are {its} (model.quantize)"
            raise ConfigError([f"bitflip.guards: {self.path} {told}"])
        another = f"bitflip.guards: {self.path} was fitted to another model, {self.model}"
        sites = (name.removesuffix("/w") for name in self.maxima if _operand(name) == "w")
        if missing := [site for site in sites if site not in weights]:
            raise ConfigError([f"{another}: there is no {first_of(missing)} here"])
        moved = 0
        for site, weight in weights.items():
            if self.moved or f"{site}/w" not in self.maxima:
                continue
            far, differs = self._compared(site, weight(), computed)
            if far > _STRAY:
                raise ConfigError(
                    [f"{another}: {far:.0%} of the rows of {site} are far beyond or below those there; fit them anew"]
                )
            moved += differs
        if moved and not near:
            raise ConfigError([f"{another}: {moved} layers have other weights here"])
        if moved:
            logger.warning("bitflip.guards: %s was fitted to other weights, which are near: %d layers have been "
                           "trained or quantised since, or are of another model", self.path, moved)  # fmt: skip

    def _compared(self, site: str, weight: Tensor, computed: torch.dtype | None) -> tuple[float, bool]:
        """(which share of the maxima of a weight are far from those that were fitted, whether any differ)."""
        part, known = local(weight.detach()), self.maxima[f"{site}/w"]
        if part.device.type == "meta" or not part.numel():
            return 0.0, False
        own = torch.cat([rows.abs().amax(1, keepdim=True) for rows in part.split(_ROWS)])
        own = (own if computed is None else own.to(computed)).float().cpu()
        whole = part.shape == weight.shape
        if self.by == "channel":
            if len(known) != len(weight):  # tokens were added; where these thresholds are used, that is refused
                return 0.0, True
            known, whole = known[held(weight)[0]], part.shape[1] == weight.shape[1]
        else:  # the largest of all layers may be in another one
            own, whole = own.max(), whole and self.by == "layer"
        far = own > _FAR * known
        if not whole:  # and what is largest of a row or layer may be in another process's part
            return float(far.float().mean()), bool((own > known).any())
        return float((far | (known > _FAR * own)).float().mean()), not torch.equal(own, known)

    def check(self, names: Iterable[str], fault: Fault, shape: tuple[int, ...] | None = None) -> None:
        """Raises ConfigError where a fault wants thresholds that are missing, too coarse, or not of the ``shape``."""
        if fault.fitted:
            for name in names:
                self.thresholds(name, fault.fitted, shape)

    def merged(self, other: "Guards") -> "Guards":
        """The larger of both maxima. Raises ConfigError where they are not of one model: its weights tell, wherever it
        lay."""
        for what in ("dtype", "by", "basis", "format"):
            mine, its = getattr(self, what), getattr(other, what)
            if mine != its:
                told, here = (repr(one or "plain") if what == "format" else said(one) for one in (its, mine))
                raise ConfigError([f"{other.path}: guards of {what} {told} do not go with those of {what} {here}"])
        shapes, its_shapes = ({name: t.shape for name, t in one.maxima.items()} for one in (self, other))
        if shapes != its_shapes:
            raise ConfigError([f"{other.path}: its layers are others than those of {self.model} here"])
        of_weights = [name for name in self.maxima if _operand(name) in ("w", "w_scale")]
        others = [name for name in of_weights if not self.maxima[name].equal(other.maxima[name])]
        if others:
            its = f"{other.path}: it was fitted to another model, {other.model}"
            raise ConfigError([f"{its}, whose weights are not those of {self.model}: {first_of(others)} differs"])
        maxima = {name: torch.maximum(t, other.maxima[name]) for name, t in self.maxima.items()}
        return replace(self, maxima=maxima, texts=(*other.texts, *self.texts))

    @property
    def about(self) -> dict[str, Any]:
        """What they were fitted on, and the hash of the maxima, as JSON has it."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "by": self.by,
            "basis": self.basis,
            "texts": [dict(text) for text in self.texts],
            "moved": self.moved,
            "maxima": self.digest,
            **({"format": self.format} if self.format else {}),
        }

    @cached_property
    def digest(self) -> str:
        """Of the maxima."""
        found = hashlib.blake2b(digest_size=16)
        for name in sorted(self.maxima):
            found.update(name.encode() + self.maxima[name].contiguous().numpy().tobytes())
        return found.hexdigest()

    def write(self, directory: Path) -> None:
        """Write ``guards.safetensors``. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        maxima = {name: maxima.clone(memory_format=torch.contiguous_format) for name, maxima in self.maxima.items()}
        with named(directory / GUARDS), replace_file(directory / GUARDS) as file:
            file.write(save(maxima, {_ABOUT: json.dumps(sealed(self.about))}))


def said(value: Any) -> str:
    """A model's name, dtype or basis in words: the last is what a config says of a rotation, or None."""
    if isinstance(value, Mapping):
        return f"'rotated ({value.get('how')}, seed {value.get('seed')})'"
    return repr("not rotated" if value is None else value)


def _operand(name: str) -> str:
    return name.rpartition("/")[2]


def read_guards(path: str) -> Guards:
    """The guards of a directory that has a ``guards.safetensors``, or of such a file.

    Raises:
        ConfigError: where there are none, or they are damaged.
    """
    file = Path(path).expanduser()
    file = file / GUARDS if file.is_dir() else file
    try:
        stat = os.stat(file)
        return _read(str(file), stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        reason = f"no {GUARDS} is there" if missing else str(error.strerror or error)
        fit = "flipproof profile MODEL --guards channel --to DIR fits some"
        raise ConfigError([f"bitflip.guards = {path!r}: {reason}; {fit}"]) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        why = "the guards or their description are missing" if isinstance(error, KeyError) else error
        raise ConfigError([f"bitflip.guards = {path!r}: damaged, or no guards of flipproof ({why})"]) from error


@lru_cache(maxsize=8)
def _read(path: str, _changed: int, _size: int) -> Guards:
    with safe_open(path, framework="pt") as file:
        about = unsealed((file.metadata() or {})[_ABOUT], needs_hash=True)
        maxima = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    texts = tuple(about["texts"])
    moved = about.get("moved", False)  # which versions before this one did not say
    model, dtype, basis, format = about["model"], about["dtype"], about["basis"], about.get("format")
    found = Guards(maxima, about["by"], model, dtype, basis, format, texts, path, moved)
    if about["maxima"] != found.digest:
        raise ValueError("the thresholds are not those that were written")
    return found
