"""Weights that several modules hold together, as head and embedding do, and how such a tie is cut.

An adapter belongs to one module. Merged into a weight that others hold too, it would change those as well; so the
module gets a weight of its own. But ``transformers`` ties again by a model's config, whenever it loads a model or is
asked to, and other readers go by the config alone. So the config has to say that nothing is tied; and since one flag
stands for all ties of a model (Zamba's shared blocks, Bert's bias of the head), all of them are cut.
"""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.dtensor import like
from flipproof.faults.linear import FaultyLinear


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """W + s·B·A into the weights of all faulty layers; one that other modules hold too stays, and is tied no more."""
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for layer in [module for module in model.modules() if isinstance(module, FaultyLinear)]:
        if layer.lora_A is None:
            continue
        weight, merged = layer.weight, like(layer.merged_weight(), layer.weight)
        if holders[id(weight)] > 1:
            layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
        else:
            weight.copy_(merged)
    if merging_cuts(model):
        cut_ties(model)


@torch.no_grad()
def cut_ties(model: nn.Module) -> None:
    """Give each module that shares a weight by a config one of its own, of the same values; the config says so."""
    for name in declared_ties(model):
        holder, attribute, tensor = _find(model, name)
        own = tensor.detach().clone()
        setattr(holder, attribute, nn.Parameter(own, tensor.requires_grad) if _is_parameter(tensor) else own)
    for part in _transformers_models(model).values():
        _say_untied(part.config)
        part.all_tied_weights_keys = {}


def declared_ties(model: nn.Module) -> dict[str, str]:
    """The weights that are tied by the configs of the ``transformers`` models in here: name -> name of the other."""
    found: dict[str, str] = {}
    for prefix, part in _transformers_models(model).items():
        dot = f"{prefix}." if prefix else ""
        found |= {f"{dot}{one}": f"{dot}{other}" for one, other in part.get_expanded_tied_weights_keys().items()}
    return {name: other for name, other in found.items() if not name.endswith((".lora_A", ".lora_B"))}


def merging_cuts(model: nn.Module) -> bool:
    """Whether a config declares a tie that is none, or is none once adapters are merged."""
    for names in declared_ties(model).items():
        (one, _, tensor), (other, _, same) = (_find(model, name) for name in names)
        if tensor is not same:
            return True
        if one is not other and any(getattr(holder, "lora_A", None) is not None for holder in (one, other)):
            return True
    return False


def untied_config(model: Any) -> Any:
    """A copy of the model's config that ties nothing."""
    config = copy.deepcopy(model.config)
    _say_untied(config)
    return config


def _say_untied(config: Any) -> None:
    config.tie_word_embeddings = False
    for name in config.sub_configs:
        part: Any = getattr(config, name, None)
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _transformers_models(model: nn.Module) -> dict[str, Any]:
    """Name -> each module that ties weights by its config."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_expanded_tied_weights_keys")}


def _find(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """(the module that holds a tensor, what it calls it, the tensor)."""
    parent, _, attribute = name.rpartition(".")
    holder = model.get_submodule(parent)
    return holder, attribute, getattr(holder, attribute)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)
