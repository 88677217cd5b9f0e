"""Fitted guards: thresholds for each layer or channel, from the largest clean magnitudes that a text has shown.

``guards.safetensors`` holds these maxima, float32, by what they are of: ``model.layers.0.mlp.down_proj/x`` (in,), a
maximum for each feature; ``…/w`` (out, 1), for each row; ``model.embed_tokens/w`` (vocabulary, 1); an attention's
``…/k`` and ``…/v`` (heads, components). By layer and by tensor they have no dimensions. The margin comes on top where
they are used, so other margins and coarser guards need no other fit. Its metadata say what they were fitted on.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flipproof.errors import ConfigError, first_of
from flipproof.faults.guard import guard_of
from flipproof.faults.spec import GRANULARITIES, Fault, Fitted, Granularity
from flipproof.files import named, replace_file
from flipproof.records import GUARDS, sealed, unsealed

_ABOUT = "flipproof"
"""The key of the metadata."""


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
    texts: tuple[Mapping[str, Any], ...] = ()
    """What was run: for each text its ``source`` and how many ``tokens``."""
    path: str = ""
    """Where they were read."""

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

    def check_model(self, dtype: str, basis: Any, weights: Mapping[str, Tensor]) -> None:
        """Raises ConfigError where they were fitted to a model of another dtype, in another basis, or other than one
        with these ``weights``, site -> (out, in): where more than a hundredth of a layer's rows reach beyond their
        maxima by a quarter. (Training may move some.)"""
        for what, its in (("dtype", dtype), ("basis", json.loads(json.dumps(basis)))):
            if (mine := getattr(self, what)) != its:
                told = f"was fitted to a model of {what} {said(mine)}; it is {said(its)} here"
                raise ConfigError([f"bitflip.guards: {self.path} {told}"])
        for site, weight in weights.items():
            if (maxima := self.maxima.get(f"{site}/w")) is not None:
                own = weight.detach().abs().amax(1, keepdim=True).float().cpu()
                beyond = float((own > 1.25 * maxima).float().mean())
                if beyond > 0.01:
                    raise ConfigError(
                        [
                            f"bitflip.guards: {self.path} was fitted to another model, {self.model}: {beyond:.0%} of "
                            f"the rows of {site} are far beyond what was seen there; fit them anew"
                        ]
                    )

    def check(self, names: Iterable[str], fault: Fault, shape: tuple[int, ...] | None = None) -> None:
        """Raises ConfigError where a fault wants thresholds that are missing, too coarse, or not of the ``shape``."""
        if fault.fitted:
            for name in names:
                self.thresholds(name, fault.fitted, shape)

    def merged(self, other: "Guards") -> "Guards":
        """The larger of both maxima. Raises ConfigError where they are not of one model."""
        for what in ("model", "dtype", "by", "basis"):
            mine, its = getattr(self, what), getattr(other, what)
            if mine != its:
                raise ConfigError(
                    [f"{other.path}: guards of {what} {said(its)} do not go with those of {what} {said(mine)}"]
                )
        shapes, its_shapes = ({name: t.shape for name, t in one.maxima.items()} for one in (self, other))
        if shapes != its_shapes:
            raise ConfigError([f"{other.path}: its layers are others than those of {self.model} here"])
        maxima = {name: torch.maximum(t, other.maxima[name]) for name, t in self.maxima.items()}
        return Guards(maxima, self.by, self.model, self.dtype, self.basis, (*other.texts, *self.texts))

    @property
    def about(self) -> dict[str, Any]:
        """What they were fitted on, and the hash of the maxima, as JSON has it."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "by": self.by,
            "basis": self.basis,
            "texts": [dict(text) for text in self.texts],
            "maxima": self.digest,
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
        maxima = {name: maxima.contiguous() for name, maxima in self.maxima.items()}
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
    found = Guards(maxima, about["by"], about["model"], about["dtype"], about["basis"], texts, path)
    if about["maxima"] != found.digest:
        raise ValueError("the thresholds are not those that were written")
    return found
