"""Weights that do not train, shared out: each process of a group holds its rows of them, and has the rest for a while.

Frozen weights never change, so reading another's rows takes nobody's consent: no collective, and no buffer for one. On
the GPUs of a node each process has its neighbours' rows mapped into its own addresses, and the copy engines fetch a
block, over NVLink, straight to where it is used, beside the products of the block before. No multiprocessor takes part
in it, and no other process; so a micro-batch may be a CUDA graph. On CPUs it is an all-gather.

A block has a slot for its turn, which blocks share: block i has slot i mod n. Its whole weights are tensors that lie in
the slot for good, so what autograd keeps of them is right again once the block has been fetched for its backward pass,
which begins with a gradient of its output. Embedding and head have one slot for both, since the one is the first that
is used, and the other the last.

Each forward pass fetches all anew, whatever the slots may hold: what ran before may have been a recorded micro-batch,
of which Python sees nothing.
"""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from flipproof.dtensor import like, local, of_rows
from flipproof.formats.linear import QuantisedLinear

_ALIGNED = 256
"""Bytes; of a shard in the memory that a unit shares."""
_shared: dict[int, int] = {}
"""Bytes that models' shards take of a GPU outside of PyTorch's allocator, by the model's id."""


def shared_bytes() -> int:
    """Bytes of this process's GPU that shards take and ``torch.cuda.memory_allocated`` does not count."""
    return sum(_shared.values())


_Held = dict[str, Any]
"""The parameters of a module, or its buffers."""
ROWS = ("code", "scale", "zero")
"""Operands of a quantised weight whose rows are shared; what else there is of one is tiny, and whole in each."""


@dataclass(eq=False)
class _Weight:
    """A parameter, or an operand of a quantised weight, of which each process holds some rows."""

    sharded: Tensor
    """A DTensor."""
    whole: Tensor
    """All of it, in a slot; its values are there once it is fetched, until another is."""
    into: Tensor
    """The same memory: (processes, values of each one's rows)."""
    rows: list[Tensor]
    """Of each process, flat: in its memory on GPUs, elsewhere those of this process alone."""


@dataclass(eq=False)
class _Unit:
    """What is fetched together: a block, the embedding or the head."""

    module: nn.Module
    slot: int
    places: list[tuple[_Held, str, _Weight]] = field(default_factory=list)
    """The parameters or buffers of a module, and their names there."""
    ready: list[Callable[[], object]] = field(default_factory=list)
    """To be called before its weights are used, once they are being fetched."""

    @property
    def weights(self) -> list[_Weight]:
        return list(dict.fromkeys(weight for _, _, weight in self.places))


class FrozenShards:
    """The frozen weights of one model; ``parallelize`` makes it while the model is on the meta device."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, ahead: int, behind: int) -> None:
        """Shard the model's frozen matrices, in place: they are DTensors, but for a module that runs.

        Args:
            model: on the meta device; or one whose layers are quantised and shared (``share_rows``), with its weights.
            blocks: of it.
            mesh: of the processes that share; where it has two dimensions the first is of replicas.
            ahead, behind: how many blocks are fetched before their turn in forward and in backward.
        """
        self.mesh, self._ahead, self._behind = mesh, ahead, behind
        self._group = mesh.get_group(mesh.ndim - 1)
        self._rank, self._size = self._group.rank(), self._group.size()
        self._blocks = [_Unit(block, i % (1 + max(1, ahead, behind))) for i, block in enumerate(blocks)]
        edges = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
        self._edges = [_Unit(edge, -1) for edge in edges if edge is not None]
        self.slots: list[Tensor] = []
        """What whole weights lie in, once there was a forward pass: bytes."""
        self._connected, self._key, self._device = False, id(model), torch.device(mesh.device_type)
        weakref.finalize(model, _shared.pop, self._key, None)
        self._held: dict[int, list[_Weight]] = {}
        self._streams: list[torch.cuda.Stream] = []
        share_rows([unit.module for unit in self._units], mesh)
        model.register_forward_pre_hook(self._begin)
        for i, unit in enumerate(self._blocks):
            unit.module.register_forward_pre_hook(lambda *_, i=i: self._enter(i, self._after(i)))
            unit.module.register_forward_hook(lambda _m, _a, output, i=i: self._leave(i, output))
        for unit in self._edges:
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: self._use(unit))
            unit.module.register_forward_hook(lambda *_, unit=unit: self._put_back(unit))

    @property
    def _units(self) -> list[_Unit]:
        return [*self._edges, *self._blocks]

    # -- a pass --------------------------------------------------------------------------------------------------------

    def _begin(self, *_: Any) -> None:
        if not self._connected:
            self._connect()
        for unit in self._units:  # which an exception may have left with weights of slots
            self._put_back(unit)
        self._held.clear()
        self._fetch(self._edges[0])
        self._fetch(self._blocks[0])

    def _after(self, i: int) -> list[_Unit]:
        coming = self._blocks[i + 1 : i + 1 + self._ahead]
        return coming if len(coming) == self._ahead else [*coming, *self._edges[1:]]

    def _before(self, i: int) -> list[_Unit]:
        return self._blocks[max(0, i - self._behind) : i][::-1]

    def _enter(self, i: int, coming: list[_Unit]) -> None:
        """Have a block's weights from here on, and fetch what comes after it."""
        self._use(self._blocks[i])
        for unit in coming:
            self._fetch(unit)

    def _leave(self, i: int, output: Any) -> None:
        """The end of a block's forward pass; its backward begins where an output's gradient is there."""
        self._put_back(self._blocks[i])
        if not torch.is_grad_enabled():
            return
        began: list[bool] = []

        def back(gradient: Tensor) -> None:
            if not began:
                began.append(True)
                torch.autograd.Variable._execution_engine.queue_callback(end)
                # what is computed anew in backward looks for weights in their modules
                self._enter(i, self._before(i))

        def end() -> None:
            began.clear()
            self._put_back(self._blocks[i])
            for unit in self._before(i):  # where no gradient reaches it nobody else waits for it
                for wait in unit.ready:
                    wait()

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(back)

    def _use(self, unit: _Unit) -> None:
        self._fetch(unit)
        for wait in unit.ready:
            wait()
        for held, key, weight in unit.places:
            held[key] = weight.whole

    def _put_back(self, unit: _Unit) -> None:
        for held, key, weight in unit.places:
            held[key] = weight.sharded

    # -- fetching ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _fetch(self, unit: _Unit) -> None:
        """Begin to fill the unit's slot with its weights, where others are there."""
        if self._held.get(unit.slot) == unit.weights:
            return
        self._held[unit.slot], unit.ready = unit.weights, []
        if not self._streams:
            for weight in unit.weights:
                work = dist.all_gather(list(weight.into), weight.rows[0], self._group, async_op=True)
                unit.ready.append(work.wait)
            return
        now = torch.cuda.current_stream()
        for i, stream in enumerate(self._streams):
            stream.wait_stream(now)  # what was in the slot has been used
            with torch.cuda.stream(stream):
                for weight in unit.weights:
                    whose = (self._rank + i) % self._size
                    weight.into[whose].copy_(weight.rows[whose], non_blocking=True)
                unit.ready.append(partial(_await, stream.record_event()))

    @torch.no_grad()
    def _connect(self) -> None:
        """Find the shards, which have memory by now, and make the slots. All processes of the group call."""
        self._connected = True
        with torch.inference_mode(False):  # slots are written in other modes, too
            self._make_slots()
            if self._device.type == "cuda":
                self._streams = [torch.cuda.Stream(priority=-1) for _ in range(self._size)]
                for unit in self._units:
                    self._share(unit)
                torch.cuda.reset_peak_memory_stats()  # the shards are counted by ``shared_bytes`` from here on

    def _make_slots(self) -> None:
        shared = {unit: {id(t): t for _, _, t in _sharded(unit.module)} for unit in self._units}
        sizes: dict[tuple[int, int], int] = {}
        for unit, of_unit in shared.items():
            for at, tensor in enumerate(of_unit.values()):
                sizes[unit.slot, at] = max(_bytes(tensor), sizes.get((unit.slot, at), 0))
        slots = {key: torch.empty(size, dtype=torch.uint8, device=self._device) for key, size in sizes.items()}
        self.slots, weights = list(slots.values()), dict[int, _Weight]()
        for unit, of_unit in shared.items():
            for at, (key, tensor) in enumerate(of_unit.items()):
                if key not in weights:  # the head's may be the embedding's
                    flat = slots[unit.slot, at][: _bytes(tensor)].view(tensor.dtype)
                    # .data, or all that lies in a slot would have one counter of changes, which autograd looks at
                    whole = _as(tensor, flat.view(tensor.shape).data)
                    rows = local(tensor.data).view(-1)
                    weights[key] = _Weight(tensor, whole, flat.view(self._size, -1), [rows])
            unit.places = [(held, name, weights[id(t)]) for held, name, t in _sharded(unit.module)]

    def _share(self, unit: _Unit) -> None:
        """Move this process's rows of a unit's weights into memory that its neighbours read, and find theirs."""
        from torch.distributed import _symmetric_memory as symmetric

        weights, starts, end = [weight for weight in unit.weights if len(weight.rows) == 1], [], 0
        for weight in weights:
            starts.append(end)
            end += math.ceil(local(weight.sharded).nbytes / _ALIGNED) * _ALIGNED
        if not weights:
            return
        memory = symmetric.empty(end, dtype=torch.uint8, device=self._device)
        _shared[self._key] = _shared.get(self._key, 0) + end
        for weight, start in zip(weights, starts, strict=True):
            rows = local(weight.sharded.data)
            mine = memory[start : start + rows.nbytes].view(rows.dtype).view(rows.shape)
            mine.copy_(rows)
            weight.rows = []  # which hold the memory that they were in
            weight.sharded = _as(weight.sharded, like(mine, weight.sharded.data))
        self._put_back(unit)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the rows were in
        reached = symmetric.rendezvous(memory, self._group)
        for weight, start in zip(weights, starts, strict=True):
            rows = local(weight.sharded)
            at = start // rows.element_size()
            weight.rows = [reached.get_buffer(rank, (rows.numel(),), rows.dtype, at) for rank in range(self._size)]
        reached.barrier()  # all have copied their rows


def _await(event: torch.cuda.Event) -> None:
    torch.cuda.current_stream().wait_event(event)


def _bytes(tensor: Tensor) -> int:
    """Of all of it."""
    return tensor.numel() * tensor.element_size()


def _as(tensor: Tensor, values: Tensor) -> Tensor:
    """A parameter where the other is one."""
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


@torch.no_grad()
def share_rows(modules: list[nn.Module], mesh: DeviceMesh) -> None:
    """Keep of frozen matrices, and of quantised weights, this process's rows alone, as DTensors.

    Args:
        modules: with their weights or on the meta device.
        mesh: as for ``FrozenShards``.
    """
    group = mesh.get_group(mesh.ndim - 1)
    made: dict[int, Tensor] = {}
    for held, key, tensor in _frozen(modules, group.size()):
        if id(tensor) not in made:
            mine = tensor.data.chunk(group.size())[group.rank()].clone()
            made[id(tensor)] = _as(tensor, of_rows(mine, tensor, mesh))
        held[key] = made[id(tensor)]


def may_share(model: nn.Module, blocks: list[nn.Module], shards: int) -> bool:
    """Whether nearly all of a model's frozen weights are matrices of its blocks, embedding and head that so many
    processes can share by rows, none of a block's is also in another or in these two, and all that trains are
    adapters."""
    edges = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    modules = [module for module in (*edges, *blocks) if module is not None]
    held = [id(p) for block in blocks for p in block.parameters()]  # of a block each once
    held += {id(p) for edge in edges if edge is not None for p in edge.parameters()}
    if len(set(held)) < len(held):
        return False
    shared = {id(p): p.numel() for _, _, p in _frozen(modules, shards) if isinstance(p, nn.Parameter)}
    rest = [p for name, p in model.named_parameters() if "lora_" not in name and id(p) not in shared]
    return bool(shared) and sum(p.numel() for p in rest) < 0.02 * sum(shared.values())


def _frozen(modules: list[nn.Module], shards: int) -> Iterator[tuple[_Held, str, Tensor]]:
    """What so many processes can share by rows and does not yet, and where it is."""
    for outer in modules:
        for module in outer.modules():
            for held, key, tensor in _held_by(module):
                operand = held is module._buffers and isinstance(module, QuantisedLinear) and key in ROWS
                matrix = held is module._parameters and not tensor.requires_grad and tensor.dim() > 1
                if (operand or matrix) and not isinstance(tensor, DTensor) and tensor.shape[0] % shards == 0:
                    yield held, key, tensor


def _sharded(outer: nn.Module) -> Iterator[tuple[_Held, str, Tensor]]:
    for module in outer.modules():
        yield from (found for found in _held_by(module) if isinstance(found[2], DTensor))


def _held_by(module: nn.Module) -> Iterator[tuple[_Held, str, Tensor]]:
    for held in (module._parameters, module._buffers):
        yield from ((held, key, tensor) for key, tensor in list(held.items()) if tensor is not None)
