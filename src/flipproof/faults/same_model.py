"""Whether fitted guards are of a model: of its weights, of the dtype whose bits flip, and of its basis. And guards that
go with what training has made of its weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.dtensor import like, whole
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.fitted import ROTATION, Guards
from flipproof.faults.linear import FaultyLinear
from flipproof.faults.state import FaultSite, FaultState
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.quantise import dequantise

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def check_fitted(
    model: nn.Module,
    guards: Guards,
    state: FaultState,
    sites: Iterable[Any] | None = None,
    read: Mapping[str, Tensor] | None = None,
    near: bool = True,
) -> None:
    """Raises ConfigError where fitted guards are of another model, dtype or basis than this one.

    Args:
        state: that of its faulty parts.
        sites: as for ``dtype_that_flips``.
        read: of a model on the meta device, site -> a weight to look at all the same.
        near: as for ``Guards.check_model``.
    """
    format = format_of_weights(model)
    weights: dict[str, Callable[[], Tensor]] = {
        # where some are gathered all are, or a process that finds one of its own rows at fault would ask for no more
        site_name(name): partial(_weight_of, module, state.computed, format is not None)
        for name, module in _weighted(model)
    }
    weights |= {name: weight.detach for name, weight in (read or {}).items()}
    dtype = dtype_that_flips(model, state.computed, sites)
    basis = getattr(getattr(model, "config", None), ROTATION, None)
    guards.check_model(dtype, basis, weights, state.computed, near, format)
    state.fitting = guards


@torch.no_grad()
def with_own_weights(guards: Guards, model: nn.Module, state: FaultState) -> Guards:
    """Guards whose maxima of weights are those of this model's, adapters merged: what goes with it once it is written.
    Those of inputs, keys and values stay, as do those of quantised weights, which do not train. Of a sharded model all
    processes must call.

    Args:
        state: as for ``check_fitted``.
    """
    maxima = dict(guards.maxima)
    for name, module in _weighted(model):
        if isinstance(module, QuantisedLinear):
            continue
        adapted = isinstance(module, FaultyLinear) and module.lora_A is not None
        # merged, a head is tied to no embedding any more, so that guards need its own maxima
        if (key := f"{site_name(name)}/w") in maxima or adapted:
            weight = like(module.merged_weight(), module.weight) if adapted else module.weight
            largest = whole(weight.detach().abs().amax(1, keepdim=True))
            maxima[key] = largest.to(state.computed or largest.dtype).float().cpu()
    return replace(guards, maxima=maxima, moved=False).coarser(guards.by)


def _weighted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules that have a weight of rows, by name."""
    for name, module in model.named_modules():
        # a quantised one's is made anew for who asks
        quantised = isinstance(module, QuantisedLinear)
        if quantised or (isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1):
            yield name, module


def _weight_of(module: Any, computed: torch.dtype | None, all_of_it: bool) -> Tensor:
    """(out, in); of a quantised layer the one that is computed with, of which there is no part."""
    if isinstance(module, QuantisedLinear):
        return dequantise(module.stored(), computed or module.dtype)
    weight: Tensor = module.weight
    return whole(weight) if all_of_it else weight


def dtype_that_flips(model: nn.Module, computed: torch.dtype | None, sites: Iterable[Any] | None = None) -> str:
    """The name of the dtype whose bits flip: the one that is computed in, else that of the weights of what is faulty,
    or of the model where it has none. Where weights of several dtypes are faulty, all of them, as "bfloat16 and
    float32".

    Args:
        computed: the dtype that weights are cast to before their bits flip; None where they are not.
        sites: what is to be faulty; None is what ``inject`` has made so.
    """
    if sites is None:
        sites = (module for module in model.modules() if isinstance(module, FaultSite))
    held = {dtype_name(dtype) for site in sites if (dtype := _dtype_of(site)) is not None}
    if computed is None and held:
        return " and ".join(sorted(held))
    return dtype_name(computed or next(model.parameters()).dtype)


def format_of_weights(model: nn.Module) -> str | None:
    """The name of the format of a model's quantised weights, or of all of several; None where there are none."""
    names = {module.format.name for module in model.modules() if isinstance(module, QuantisedLinear)}
    return " and ".join(sorted(names)) or None


def _dtype_of(site: Any) -> torch.dtype | None:
    """Of its weight; of a quantised one the dtype that it is computed with in."""
    if isinstance(site, QuantisedLinear):
        return site.dtype
    return site.weight.dtype if isinstance(getattr(site, "weight", None), Tensor) else None


def site_name(name: str) -> str:
    """A module's name without what is wrapped around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
