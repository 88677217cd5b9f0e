"""Whether fitted guards are of a model: of its weights, of the dtype whose bits flip, and of its basis."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.faults.dtypes import dtype_name
from flipproof.faults.fitted import ROTATION, Guards
from flipproof.faults.state import FaultSite, FaultState

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
    weights = {
        site_name(name): module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1
    }
    dtype = dtype_that_flips(model, state.computed, sites)
    basis = getattr(getattr(model, "config", None), ROTATION, None)
    guards.check_model(dtype, basis, {**weights, **(read or {})}, state.computed, near)
    state.fitting = guards


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
    weights = (getattr(site, "weight", None) for site in sites)
    held = {dtype_name(weight.dtype) for weight in weights if weight is not None}
    if computed is None and held:
        return " and ".join(sorted(held))
    return dtype_name(computed or next(model.parameters()).dtype)


def site_name(name: str) -> str:
    """A module's name without what is wrapped around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
