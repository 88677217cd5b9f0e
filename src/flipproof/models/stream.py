"""Which parts of a model read and write its residual stream: found by running it once, not by what they are called.

A basis of the residual stream can change if all that touches it is known: embeddings and linear layers that write to
it, sums of these, norms that scale it as a whole, and the linear layers that read what such a norm gives. ``trace``
runs the model on a few tokens and follows each tensor through every operator between these modules. What it may do on
the way and still be the same vector in another basis (a sum, a multiple, a slice of tokens) is listed here; whatever
else touches it is named, with the reason why the basis has to stay: a norm on the way from a layer to the stream (Gemma
2), a norm that takes off the mean (GPT-2), experts that are no ``nn.Linear`` (Mixtral), gains on a branch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_SAME = {
    *(_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default, _aten.alias.default),
    *(_aten.clone.default, _aten._to_copy.default, _aten.detach.default, _aten.contiguous.default),
    *(_aten.slice.Tensor, _aten.select.int, _aten.unsqueeze.default, _aten.squeeze.dim),
}
"""Operators that give the same vectors, or some of them, as long as their length stays."""
_MULTIPLES = {_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.mul_.Tensor}
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor}
_LOOKS = {_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default,
          _aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default}  # fmt: skip
"""Operators that ask a tensor for its shape and dtype alone."""


@dataclass(frozen=True)
class _Written:
    """A sum of what these modules wrote."""

    by: frozenset[str]


@dataclass(frozen=True)
class _Normed:
    """What this norm gave."""

    by: str


@dataclass
class Stream:
    """What a run has shown. Names are those of modules."""

    writers: set[str] = field(default_factory=set)
    """Embeddings and linear layers of which the residual stream is the sum."""
    norms: dict[str, list[str]] = field(default_factory=dict)
    """Norms that read it -> the linear layers that read what they give."""
    readers: set[str] = field(default_factory=set)
    """Linear layers that read it, by a norm or without."""
    trouble: dict[str, str] = field(default_factory=dict)
    """Modules for which its basis cannot change -> why."""
    calls: list[str] = field(default_factory=list)
    """Linear layers in the order in which they ran."""
    inside: set[str] = field(default_factory=set)
    """Linear layers whose input is neither the stream nor what a norm made of it."""
    logits: Tensor | None = None
    """(rows, positions, vocabulary), of the run."""


def trace(model: Any, ids: Tensor) -> Stream:
    """Run ``model`` on token ids (rows, positions), and say what touches its residual stream."""
    embedding = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    follow = _Follow(embedding.weight.shape[1])
    with torch.no_grad(), quiet(model), follow.hooks(names), follow:
        logits = model(input_ids=ids, use_cache=False).logits
    stream = follow.stream_from(names[embedding])
    stream.logits = logits
    ran = {*stream.calls, *follow.embeddings}
    for module, name in names.items():
        if name not in ran and follow.width in _widths(module):
            stream.trouble[name] = "did not run on text"
    return stream


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Without dropout; each module's mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _widths(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.embedding_dim,) if isinstance(module, nn.Embedding) else ()


def _kind(module: nn.Module) -> str | None:
    """What a module is taken for as a whole; None where its operators are followed instead."""
    if type(module) is nn.Linear:
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    own = list(module.parameters(recurse=False))
    if not own or any(True for _ in module.children()):
        return None
    return "norm" if all(parameter.dim() == 1 for parameter in own) else "other"


class _Follow(TorchDispatchMode):
    """Follows hidden states of ``width`` components through a forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._tags: dict[int, tuple[Tensor, Any]] = {}  # id -> (the tensor, kept so that the id stays its own, tag)
        self._made: dict[int, tuple[Tensor, str]] = {}  # which module gave a tensor
        self._where: list[str] = []  # the modules that run, the innermost last
        self._whole = 0  # how many of them are taken as a whole
        self._sums: list[frozenset[str]] = []
        self._norm_reads: dict[str, set[Any]] = {}
        self._reads: dict[str, set[Any]] = {}
        self._trouble: list[tuple[Any, str, str]] = []  # (tag, module, why)
        self.embeddings: set[str] = set()
        self.calls: list[str] = []

    # -- tags ----------------------------------------------------------------------------------------------------------

    def _tag(self, tensor: Any) -> Any:
        found = self._tags.get(id(tensor))
        return found and found[1]

    def _set(self, tensor: Any, tag: Any) -> None:
        if isinstance(tensor, Tensor):
            self._tags[id(tensor)] = (tensor, tag)

    # -- modules -------------------------------------------------------------------------------------------------------

    @contextmanager
    def hooks(self, names: dict[nn.Module, str]) -> Iterator[None]:
        handles = []
        for module, name in names.items():
            kind = _kind(module)
            handles.append(module.register_forward_pre_hook(self._entering(name, kind), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name, kind), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str, kind: str | None) -> Any:
        def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            self._where.append(name)
            self._whole += kind is not None

        return enter

    def _leaving(self, name: str, kind: str | None) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._where.pop()
            self._whole -= kind is not None
            if isinstance(output, Tensor):
                self._made.setdefault(id(output), (output, name))
            if kind is None or self._whole:
                return
            tags = [tag for value in (*args, *kwargs.values()) if (tag := self._tag(value))]
            if kind == "linear":
                self.calls.append(name)
                self._reads.setdefault(name, set()).add(tags[0] if tags else None)
            elif kind == "embedding":
                self.embeddings.add(name)
            elif kind == "norm" and tags:
                self._norm_reads.setdefault(name, set()).add(tags[0])
                self._set(output, _Normed(name))
            elif tags:
                self._trouble += [(tag, name, f"is a {type(module).__name__}, no nn.Linear") for tag in tags]
            if kind in ("linear", "embedding") and output.shape[-1] == self.width:
                self._set(output, _Written(frozenset([name])))

        return leave

    # -- operators -----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._whole or func in _LOOKS:
            return output
        values = [part for value in args for part in (value if isinstance(value, list | tuple) else [value])]
        tagged = [(value, tag) for value in values if isinstance(value, Tensor) and (tag := self._tag(value))]
        if not tagged:
            return output
        others = [value for value in values if isinstance(value, Tensor) and not self._tag(value)]
        tags = [tag for _, tag in tagged]
        same_length = isinstance(output, Tensor) and output.shape[-1:] == tagged[0][0].shape[-1:]
        multiple = func in _MULTIPLES and all(value.numel() == 1 for value in others)
        if len(tags) == 1 and (multiple or (func in _SAME and same_length)):
            self._set(output, tags[0])
        elif func in _SUMS and len(tags) == 2 and all(isinstance(tag, _Written) for tag in tags):
            written = _Written(tags[0].by | tags[1].by)
            self._sums.append(written.by)
            self._set(output, written)
        elif func in _SUMS and any(isinstance(tag, _Written) for tag in tags):
            self._stranger(tagged, others)
            self._set(
                output, next(tag for tag in tags if isinstance(tag, _Written))
            )  # so that what comes after is named as well
        else:
            self._trouble += [(tag, self._here(), f"has {func.__name__.split('.')[0]} of it") for tag in tags]
        return output

    def _stranger(self, tagged: list[tuple[Tensor, Any]], others: list[Tensor]) -> None:
        """A sum with what no linear layer wrote."""
        norm = next((tag for _, tag in tagged if isinstance(tag, _Normed)), None)
        if norm is not None:
            name, why = norm.by, "is a norm between a layer and the residual stream"
        else:
            made = self._made.get(id(others[0])) if others else None
            name = made[1] if made else self._here()
            why = "adds to the residual stream what no nn.Linear gave"
        self._trouble += [(tag, name, why) for _, tag in tagged if isinstance(tag, _Written)]

    def _here(self) -> str:
        return self._where[-1] if self._where else ""

    # -- what came of it -----------------------------------------------------------------------------------------------

    def stream_from(self, embedding: str) -> Stream:
        writers = {embedding}
        while more := {name for names in self._sums if names & writers for name in names} - writers:
            writers |= more

        def is_stream(tag: Any) -> bool:
            return isinstance(tag, _Written) and bool(tag.by & writers)

        norms: dict[str, list[str]] = {}
        trouble: dict[str, str] = {}
        for name, tags in self._norm_reads.items():
            if any(map(is_stream, tags)):
                norms[name] = []
                if len(tags) > 1 and not all(map(is_stream, tags)):
                    trouble[name] = "reads other things too"
        readers, inside = set(), set()
        for name, tags in self._reads.items():
            ours = {tag for tag in tags if is_stream(tag) or (isinstance(tag, _Normed) and tag.by in norms)}
            if not ours:
                inside.add(name)
                continue
            readers.add(name)
            if len({tag.by if isinstance(tag, _Normed) else "" for tag in ours}) > 1 or ours != tags:
                trouble[name] = "reads more than one thing"
            for tag in ours:
                if isinstance(tag, _Normed):
                    norms[tag.by].append(name)
        for tag, name, why in self._trouble:
            if is_stream(tag) or (isinstance(tag, _Normed) and tag.by in norms):
                trouble.setdefault(name, why)
        return Stream(writers, norms, readers, trouble, self.calls, inside)
