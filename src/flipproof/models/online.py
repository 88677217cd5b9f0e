"""The rotation that no weight can take over: of the input of a down projection, when the model runs.

Between a down projection and the layers before it stands a product of activations, which a change of basis does not
pass. So the input x is rotated where it is made, x·T, and the weight holds W·T⁻ᵀ. T = L ⊗ R is a ``Basis`` of two small
matrices whose entries are rounded to bfloat16's eight bits: they are the same numbers in every dtype, and the weight's
inverse is that of the rounded ones.

It is a hook in front of the layer, so an injected model rotates before bits flip, and no checkpoint key and no buffer
is added. The config lists the layers under ``flipproof_rotation``, and a model that is read from it gets them back.

Without the hooks such weights are those of no model. So the config that is written says ``flipproof_llama`` where the
model is a Llama: plain ``transformers``, and whatever goes by its configs, refuses it by that name; ``read_config``
knows it.
"""

import json
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.faults.fitted import ROTATION
from flipproof.models.basis import Basis, kronecker, signs, split, spread
from flipproof.values import Seed, checked

_MARK = "flipproof_"
_MARKED = ("model_type", "hidden_act", "hidden_activation", "activation_function")
"""Keys of a written config whose value is marked. By the first ``AutoModelForCausalLM`` refuses it; by the activation,
whatever it is called, so does the model's own class."""
_LARGEST = 1024
"""Rows of the larger factor: a T of more is not worth its time."""


def can_rotate(n: int) -> bool:
    """Whether n values have factors small enough to be rotated at run time."""
    return max(split(n)) <= _LARGEST


@cache
def _factors(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """L (a, a) and R (b, b) in float64, of bfloat16's numbers."""
    made = (
        signs(size, seed, f"online/{side}")[:, None] * spread(size) for side, size in zip("lr", split(n), strict=True)
    )
    left, right = (factor.bfloat16().double() for factor in made)
    return left, right


def inverse(n: int, seed: int) -> Basis:
    """T⁻ᵀ, which ``rotate_in`` multiplies the weight by whose input x·T is."""
    left, right = (torch.linalg.inv(factor).T.contiguous() for factor in _factors(n, seed))
    return Basis(torch.ones(n, dtype=torch.float64), left, right)


@lru_cache(maxsize=64)
def _placed(n: int, seed: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = (factor.to(device, dtype) for factor in _factors(n, seed))
    return left, right


# -- the operator: whole, so that compilers, autocast and fake tensors know nothing of the factors -------------------

_LIBRARY = torch.library.Library("flipproof", "FRAGMENT")
_LIBRARY.define("rotate_online(Tensor x, int seed, bool back) -> Tensor")


def _rotate_online(x: Tensor, seed: int, back: bool) -> Tensor:
    left, right = _placed(x.shape[-1], seed, x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return kronecker(x, left.T, right.T) if back else kronecker(x, left, right)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("rotate_online", _rotate_online, _key)


@torch.library.register_fake("flipproof::rotate_online")
def _rotate_online_fake(x: Tensor, _seed: int, _back: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _RotateOnline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: int) -> Tensor:
        ctx.seed = seed
        y: Tensor = torch.ops.flipproof.rotate_online.default(x, seed, False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.flipproof.rotate_online.default(grads[0], ctx.seed, True), None


class RotateInput:
    """A hook in front of a linear layer: its input x (…, n) becomes x·T."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _RotateOnline.apply(args[0], self.seed), *args[1:]


# -- a model that has it, and its config -------------------------------------------------------------------------------


def attach(model: nn.Module) -> None:
    """Put the hooks in front of the layers that the model's config lists; of a model without such a list nothing.

    Raises:
        ConfigError: where the list is not of this model.
    """
    entry: Any = getattr(model.config, ROTATION, None)
    if entry is None or (isinstance(entry, dict) and not entry.get("online")):
        return
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        strange = [name for name in entry["online"] if not can_rotate(linear[name].in_features)]
        hook = RotateInput(checked("seed", entry["seed"], Seed))
    except (TypeError, ValueError) as error:
        raise ConfigError([f"config.json: {ROTATION} is damaged ({error})"]) from error
    except KeyError as error:
        strange = [error.args[0]]
    if strange:
        raise ConfigError([f"config.json: {ROTATION} lists {strange[0]!r}, which is no linear layer of this model"])
    for name in entry["online"]:
        linear[name].register_forward_pre_hook(hook)
        parent = model.get_submodule(name.rpartition(".")[0])
        parent.__class__ = _rotating(type(parent), hook.seed)  # type: ignore[arg-type]
    model.config.__class__ = _marked(type(model.config))  # type: ignore[arg-type]


@cache
def _rotating(parent: type[nn.Module], _seed: int) -> type[nn.Module]:
    """The same class once more. What torch.compile made of one model it uses for another of the same types, whatever
    hooks that has; so what holds a layer with a hook is of a type of its own."""
    return type(parent.__name__, (parent,), {})


@cache
def _marked(config: type[Any]) -> type[Any]:
    """A config that is written as one that plain ``transformers`` does not take for its own."""

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        written = json.loads(config.to_json_string(self, use_diff))
        written |= {key: _MARK + written[key] for key in _MARKED if isinstance(written.get(key), str)}
        written["architectures"] = [_MARK + name for name in written.get("architectures") or []]
        return json.dumps(written, indent=2, sort_keys=True) + "\n"

    return type(config.__name__, (config,), {"to_json_string": to_json_string})


def marked_config(name: str, **how: Any) -> Any:
    """The config of a directory or Hub name whose model has inputs that are rotated at run time, as the model itself
    has it; None for any other, and for what holds no readable config.

    Raises:
        ConfigError: where it does not say which inputs.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        written, _ = PreTrainedConfig.get_config_dict(name, **how)
    except (OSError, ValueError):  # said by whoever needs one
        return None
    kind = str(written.get("model_type"))
    if not kind.startswith(_MARK) or kind.removeprefix(_MARK) not in CONFIG_MAPPING:
        return None
    if ROTATION not in written:
        raise ConfigError([f"{name}: its config.json is of a rotated model, and {ROTATION} is missing there"])
    written |= {key: written[key].removeprefix(_MARK) for key in _MARKED if isinstance(written.get(key), str)}
    written["architectures"] = [name.removeprefix(_MARK) for name in written.get("architectures") or []]
    return CONFIG_MAPPING[written["model_type"]].from_dict(written, name_or_path=name)


def read_config(name: str, **how: Any) -> Any:
    """``AutoConfig.from_pretrained``, and ``marked_config`` where it is one."""
    from transformers import AutoConfig

    config = marked_config(name, **how)
    return AutoConfig.from_pretrained(name, **how) if config is None else config
