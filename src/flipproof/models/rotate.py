"""A model in another basis, in place: the same function, and no channel that is an outlier.

A few channels of a trained model hold numbers a thousand times as large as the others, so a threshold that lets them
pass lets nearly every flipped bit pass. In a random basis (``basis.py``) what is large is spread over all channels. The
function stays what it is, since what stands between two layers passes a change of basis:

- **the residual stream**: an RMSNorm scales a vector as a whole, once its gains are folded into the layers that read
  it. Embeddings and what writes to the stream write it in the new basis, what reads it reads it so (``stream.py`` finds
  out what does). A head tied to the embedding takes over gains that the embedding must not have: it is untied.
- **values**: attention mixes the values of a head, component by component. So V may write them, and O read them, in a
  basis of each head's own; query heads that share a head of V share its basis.
- **inputs of down projections**: nothing passes the product before them, so they are rotated when the model runs
  (``online.py``).

The model may be in memory, or in files and only a block of it in memory at a time (``layerwise.py``).

The first two leave a model that plain ``transformers`` opens. This is the change of basis of QuaRot (Ashkboos et al.,
2024) and SpinQuant (Liu et al., 2024), made for guards instead of for quantisation.

What cannot be rotated is left as it is, and named. Whether the model is the same is not argued but computed: its logits
before and after.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flipproof.errors import ConfigError
from flipproof.faults.attention import attention_modules
from flipproof.faults.fitted import ROTATION
from flipproof.faults.inject import is_faulty
from flipproof.faults.ties import cut_ties
from flipproof.models import online
from flipproof.models.basis import Basis, fold, rotate_in, rotate_out
from flipproof.models.stream import Stream, quiet, trace
from flipproof.values import Seed, checked

How = Literal["none", "residual", "full"]
HOW = ("none", "residual", "full")
_TOLERANCE = 1e-4
"""How far logits of a float32 model may be off, relative to the largest where that is above 1."""
_COARSE = 0.5
"""The same for a 16-bit model, whose every rounding differs: it tells a model from noise, and no more."""


@dataclass(frozen=True)
class Rotation:
    """What ``rotate`` did. Its string is a report for people."""

    how: How
    seed: int
    stream: tuple[str, ...] = ()
    """Embeddings and layers that read or write the residual stream, whose basis is another now; () where it is not."""
    folded: tuple[str, ...] = ()
    """Norms whose gains are in the layers after them."""
    values: tuple[str, ...] = ()
    """Attention modules whose heads' values are in bases of their own."""
    online: tuple[str, ...] = ()
    """Linear layers whose input is rotated when the model runs."""
    left: dict[str, str] = field(default_factory=dict)
    """What could not be rotated, or stands in the way of the residual stream: name -> why."""
    untied: bool = False
    """Whether head and embedding were one weight and are two now."""
    difference: float = 0.0
    """The largest difference of a logit, relative to the largest logit where that is above 1."""

    def __str__(self) -> str:
        kept = "" if self.stream else " (left as it is)"
        lines = [
            f"rotated: the residual stream in {len(self.stream)} modules{kept}, the values of {len(self.values)} "
            f"attention modules, {len(self.online)} inputs at run time; logits moved by {self.difference:.1g}"
        ]
        if self.how == "none":
            lines = ["rotated: nothing"]
        if self.untied:
            lines.append("head and embedding were tied, and are two weights now")
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"not rotated: {names[0]}{more} ({why})")
        return "\n".join(lines)


Step = Callable[[Tensor], None]
"""What changes a weight (out, in) in place, in float64; a bias comes as (out, 1)."""


def changed(tensor: Tensor, steps: list[Step]) -> Tensor:
    """A weight, or a bias, after some steps; a new tensor, in float64."""
    wide = tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    for step in steps:
        step(wide.view(len(wide), -1))
    return wide


class Weights:
    """Where the weights of a model are that is rotated: in its modules, and they change there."""

    def __init__(self, model: Any) -> None:
        kind = type(model).__name__
        for name, parameter in model.named_parameters():
            if parameter.is_meta or type(parameter.data) is not Tensor or parameter.dtype.itemsize < 2:
                what = "on the meta device" if parameter.is_meta else f"a {type(parameter.data).__name__}"
                what = "quantised" if parameter.dtype.itemsize < 2 else what
                raise ConfigError([f"this {kind}'s {name} is {what}; rotate a model whose weights are in this process"])
        self.device: torch.device = model.get_input_embeddings().weight.device

    def change(self, steps: dict[nn.Parameter, list[Step]]) -> None:
        """Make each weight what its steps make of it, rounded once, to its own dtype."""
        for parameter, own in steps.items():
            parameter.copy_(changed(parameter, own))


@torch.no_grad()
def rotate(model: Any, how: How, seed: int, weights: Weights | None = None) -> Rotation:
    """Change the basis of a causal language model of ``transformers``, in place, and record it in its config.

    Each weight is changed in float64 and rounded once, to its own dtype. No global RNG is read or advanced.

    Args:
        model: neither faulty nor spread over processes; best in float32, where it is proven to be the same function,
            and to be rounded after. Its dropout is off for the proof.
        how: "residual" rotates what plain ``transformers`` can run, the residual stream and values; "full" also
            the inputs of down projections, by hooks; "none" nothing.
        seed: 0 to 2^63 - 1; of the bases.
        weights: where its weights are; None is in memory, in its modules.

    Raises:
        ConfigError: where the model is rotated, faulty or not in memory; where "full" finds no down projection; where
            the logits are not what they were: the model is of no use then.
    """
    if how not in HOW:
        raise ConfigError([f"rotate = {how!r}: allowed are {', '.join(HOW)}"])
    checked("seed", seed, Seed)
    if how == "none":
        return Rotation(how, seed)
    _check_model(model)
    weights = weights or Weights(model)
    ids = _ids(model).to(weights.device)
    with _inputs(model) as inputs:
        stream = trace(model, ids)
    before = stream.logits
    assert before is not None
    gains = {name: gain_of(model.get_submodule(name)) for name in stream.norms}
    trouble = _stream_trouble(model, stream, gains)
    values, left = _find_values(model, stream, ids, seed, inputs)
    inputs.clear()
    downs: tuple[str, ...] = ()
    if how == "full":
        downs, more = _find_downs(model, stream)
        left |= more
        if not downs:
            raise ConfigError(
                [f"rotate = 'full': {type(model).__name__} has no nn.Linear as down projection; try 'residual'"]
            )
    steps = _Steps()
    basis = Basis.of(_width(model), seed, "stream").to(weights.device)
    untied = not trouble and _rotate_stream(model, stream, gains, basis, steps)
    for heads in values.values():
        heads.rotate(model, steps)
    for name in downs:
        weight = model.get_submodule(name).weight
        steps.add(weight, partial(rotate_in, basis=online.inverse(weight.shape[1], seed).to(weights.device)))
    weights.change(steps.of)
    if not trouble or values or downs:
        setattr(model.config, ROTATION, {"how": how, "seed": seed} | ({"online": list(downs)} if downs else {}))
    online.attach(model)
    return Rotation(
        how,
        seed,
        () if trouble else tuple(sorted(stream.writers | stream.readers)),
        () if trouble else tuple(stream.norms),
        tuple(values),
        downs,
        trouble | left,
        untied,
        check(model, ids, before),
    )


def check(model: Any, ids: Tensor, before: Tensor) -> float:
    """The largest difference of a logit on token ids (rows, positions), relative to the largest of ``before``.

    Raises:
        ConfigError: where it is more than rounding explains: 1e-4 in float32, and in 16 bits, where each rounding
            differs, half.
    """
    after = _run(model, ids)
    scale = before.double().abs().max()
    difference = float((after.double() - before.double()).abs().max() / scale)
    allowed = _COARSE if after.dtype.itemsize < 4 else _TOLERANCE
    if not difference <= allowed:
        raise ConfigError(
            [
                f"{type(model).__name__} is another function when it is rotated: its logits moved by {difference:.2g} "
                f"of the largest, and {allowed:g} is allowed; rotate = 'none' leaves it as it is"
            ]
        )
    return difference


def _check_model(model: Any) -> None:
    kind = type(model).__name__
    if is_faulty(model):
        raise ConfigError([f"this {kind} has faulty layers; rotate it first, then inject"])
    if getattr(model.config, ROTATION, None) is not None:
        raise ConfigError([f"this {kind} is rotated already ({ROTATION} in its config); rotate the original"])


def _width(model: Any) -> int:
    width: int = model.get_input_embeddings().weight.shape[1]
    return width


def _ids(model: Any) -> Tensor:
    """Random tokens (2, 13), always the same."""
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, rows, (2, 13), generator=torch.Generator().manual_seed(0))


class _Steps:
    """What happens to each weight, step after step."""

    def __init__(self) -> None:
        self.of: dict[nn.Parameter, list[Step]] = {}

    def add(self, parameter: nn.Parameter | None, step: Step) -> None:
        if parameter is not None:
            self.of.setdefault(parameter, []).append(step)


# -- the residual stream -----------------------------------------------------------------------------------------------


Gains = dict[str, tuple[Tensor, float] | None]
"""Name of a norm -> what ``gain_of`` says of it."""


def _stream_trouble(model: Any, stream: Stream, gains: Gains) -> dict[str, str]:
    """Why the basis of the residual stream cannot change: name -> reason; {} where it can."""
    trouble = dict(stream.trouble)
    for name, gain in gains.items():
        if gain is None:
            trouble.setdefault(name, "is no RMSNorm: it does more than scale a vector as a whole and by a gain")
    if trouble:
        return trouble
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    holders: dict[int, list[str]] = {}
    for module, name in names.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
    pair = {names[embedding], names.get(head, "")}
    for name in (*stream.writers, *stream.readers, *stream.norms):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            held = set(holders[id(parameter)])
            if len(held) > 1 and not (held == pair and names[head] in stream.readers):
                trouble.setdefault(name, "shares its weight with another layer")
    return trouble


def gain_of(norm: nn.Module) -> tuple[Tensor, float] | None:
    """The gain of a norm in float64, (n,), and the value of its weight that makes every gain 1; None where it is no
    RMSNorm. Which function of the weight the gain is, w or 1 + w (Gemma), is asked of the norm itself."""
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return None
    weight: Tensor = norm.weight.detach().to(torch.float64, copy=True)  # type: ignore[operator]
    probe = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) * 8
    probe = probe.to(weight.device)
    given = copy.deepcopy(norm).float()(probe).double()
    unit = probe.double()
    unit = unit / unit.square().mean(1, keepdim=True).sqrt()
    for gain, neutral in ((weight, 1.0), (1 + weight, 0.0)):
        if torch.allclose(given, unit * gain, rtol=1e-3, atol=1e-3 * float(gain.abs().max())):
            return gain, neutral
    return None


def _rotate_stream(model: Any, stream: Stream, gains: Gains, basis: Basis, steps: _Steps) -> bool:
    """Whether head and embedding had to be untied for it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    folded: dict[str, Tensor] = {}
    for name, readers in stream.norms.items():
        norm: Any = model.get_submodule(name)
        gain, neutral = gains[name]  # type: ignore[misc]
        steps.add(norm.weight, partial(_fill, value=neutral))
        if not (gain == 1).all():
            folded |= dict.fromkeys(readers, gain)
    names = {module: name for name, module in model.named_modules()}
    untied = head.weight is embedding.weight and names[head] in folded
    if untied:
        cut_ties(model)
    for name in sorted(stream.readers):
        layer: Any = model.get_submodule(name)
        if name in folded:
            steps.add(layer.weight, partial(fold, gain=folded[name]))
        if layer.weight is not embedding.weight:
            steps.add(layer.weight, partial(rotate_in, basis=basis))
    for name in sorted(stream.writers):
        layer = model.get_submodule(name)
        out = isinstance(layer, nn.Linear)
        steps.add(layer.weight, partial(rotate_out if out else rotate_in, basis=basis))
        if out:
            steps.add(layer.bias, partial(rotate_out, basis=basis))
    return untied


def _fill(weight: Tensor, value: float) -> None:
    weight.fill_(value)


# -- values ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """Where an attention module's values are written and read."""

    v: str
    """The linear layer that writes them."""
    starts: tuple[int, ...]
    """The first row there of each head."""
    o: str
    """The linear layer that reads what attention made of them."""
    bases: tuple[Basis, ...]
    """Of each head of ``v``; neighbours in ``o`` share one."""

    def _pieces(self, inputs: int) -> Iterator[tuple[slice, Basis]]:
        """Which columns of ``o`` (of so many) are in which basis."""
        size = self.bases[0].size
        group = inputs // size // len(self.bases)
        for i in range(inputs // size):
            yield slice(i * size, (i + 1) * size), self.bases[i // group]

    def written(self, x: Tensor) -> Tensor:
        """What ``v`` gives (…, out), in the new bases."""
        x = x.double()
        for start, basis in zip(self.starts, self.bases, strict=True):
            rows = slice(start, start + basis.size)
            x[..., rows] = basis.apply(x[..., rows])
        return x

    def read(self, x: Tensor) -> Tensor:
        """What ``o`` gets (…, in), back in the old bases."""
        x = x.double()
        for columns, basis in self._pieces(x.shape[-1]):
            x[..., columns] = basis.undo(x[..., columns])
        return x

    def rotate(self, model: nn.Module, steps: _Steps) -> None:
        v, o = model.get_submodule(self.v), model.get_submodule(self.o)
        for parameter in (v.weight, v.bias):
            steps.add(parameter, self._write)  # type: ignore[arg-type]
        steps.add(o.weight, self._read)  # type: ignore[arg-type]

    def _write(self, weight: Tensor) -> None:
        for start, basis in zip(self.starts, self.bases, strict=True):
            rotate_out(weight[start : start + basis.size], basis)

    def _read(self, weight: Tensor) -> None:
        for columns, basis in self._pieces(weight.shape[1]):
            rotate_in(weight[:, columns], basis)


def _find_values(
    model: Any, stream: Stream, ids: Tensor, seed: int, inputs: dict[str, Tensor]
) -> tuple[dict[str, _Heads], dict[str, str]]:
    """(attention module -> its heads, attention module whose values stay as they are -> why).

    Which of a module's linear layers writes values, and in which order of rows, is found by trying: where the rotation
    of what one gives comes out at the module's last layer, head by head, it is that.
    """
    found: dict[str, _Heads] = {}
    left: dict[str, str] = {}
    tries: dict[str, list[_Heads]] = {}
    for name, own in _attention_layers(model).items():
        ran = [call for call in dict.fromkeys(stream.calls) if call in own]
        tries[name] = _possible(model, name, ran, seed, ids.device) if len(ran) > 1 else []
        left[name] = "its values do not go from one nn.Linear to another, head by head"
    while any(tries.values()):
        trial = {name: tried.pop(0) for name, tried in tries.items() if tried}
        for name in _holding(model, ids, trial, inputs):
            found[name] = trial[name]
            tries[name] = []
            del left[name]
    return {name: found[name] for name in tries if name in found}, left


def _attention_layers(model: Any) -> dict[str, list[str]]:
    """Attention module -> its linear layers."""
    return {
        name: [f"{name}.{child}" for child, part in module.named_children() if type(part) is nn.Linear]
        for name, module in attention_modules(model).items()
    }


def _possible(model: Any, name: str, ran: list[str], seed: int, device: torch.device) -> list[_Heads]:
    """Each way in which a linear layer of an attention module may write values for its last one."""
    module, o = model.get_submodule(name), ran[-1]
    config = model.config.get_text_config()
    inputs = model.get_submodule(o).in_features
    size = getattr(module, "head_dim", None) or inputs // config.num_attention_heads
    heads, uneven = divmod(inputs, size)
    possible: list[_Heads] = []
    for v in ran[-2::-1]:
        rows = model.get_submodule(v).out_features
        whole, fused = rows // size, (rows // size - heads) // 2
        ways = []
        if whole and heads % whole == 0:
            ways.append(range(0, rows, size))
        if fused > 0 and heads % fused == 0:  # queries, keys, values: each of all heads, or head by head
            ways += [range((heads + fused) * size, rows, size), range(2 * size, rows, 3 * size)]
        for starts in ways:
            if uneven or rows % size or heads % len(starts):
                continue
            bases = (Basis.of(size, seed, f"{name}/v{i}").to(device) for i in range(len(starts)))
            possible.append(_Heads(v, tuple(starts), o, tuple(bases)))
    return possible


@contextmanager
def _inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """What the linear layers of attention modules get from a run in the block."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, args: seen.__setitem__(name, args[0])

    with ExitStack() as hooks:
        for layers in _attention_layers(model).values():
            for name in layers:
                hooks.callback(model.get_submodule(name).register_forward_pre_hook(keep(name)).remove)
        yield seen


def _holding(model: Any, ids: Tensor, trial: dict[str, _Heads], plain: dict[str, Tensor]) -> list[str]:
    """Names of the attention modules where values that are written in other bases are read in them."""
    held: list[str] = []

    def write(heads: _Heads) -> Any:
        return lambda _module, _args, y: heads.written(y).to(y.dtype)

    def read(name: str, heads: _Heads) -> Any:
        def compare(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            before = plain[heads.o].double()
            error = float((heads.read(args[0]) - before).norm() / before.norm())
            if error <= 16 * torch.finfo(args[0].dtype).eps:
                held.append(name)
            return plain[heads.o], *args[1:]  # whatever it was, the layers after it are not misled

        return compare

    with ExitStack() as hooks:
        for name, heads in trial.items():
            v, o = model.get_submodule(heads.v), model.get_submodule(heads.o)
            hooks.callback(v.register_forward_hook(write(heads)).remove)
            hooks.callback(o.register_forward_pre_hook(read(name, heads)).remove)
        _run(model, ids)
    return held


def _run(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad(), quiet(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


# -- down projections --------------------------------------------------------------------------------------------------


def _find_downs(model: Any, stream: Stream) -> tuple[tuple[str, ...], dict[str, str]]:
    """(linear layers outside of attention that give hidden states and read what is inside of a block, those of them
    that cannot be rotated -> why)."""
    hidden, head = model.config.get_text_config().hidden_size, model.get_output_embeddings()
    attentions = tuple(f"{name}." for name in attention_modules(model))
    found, left = [], {}
    for name in dict.fromkeys(stream.calls):
        layer = model.get_submodule(name)
        if layer is head or name not in stream.inside or name.startswith(attentions) or layer.out_features != hidden:
            continue
        if online.can_rotate(layer.in_features):
            found.append(name)
        else:
            left[name] = f"its input of {layer.in_features} has no small factors"
    return tuple(found), left
