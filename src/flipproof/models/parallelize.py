"""How a model is spread over the processes of a run: recomputation, compilation, sharding, in this order.

PyTorch's FSDP2 (``fully_shard``) shards, gathers and reduces; each block is a unit of its own, gathered for its turn
and freed after. Where all but adapters is frozen, the processes of a node share the weights without it (``frozen.py``),
the only way in which quantised ones are shared. What trains is then whole in each process, as all is with ``no_shard``,
and gradients are averaged at a step's end; processes that share the weights share the optimizer's state too
(``train/optimizer.py``).

**The same run on any number of processes.** The global micro-batch is the local ones one after the other, rank 0's rows
first. Draws are keyed by the index in the whole tensor, so a process draws for its own rows what one process would have
drawn for them, and all processes see the same faulty weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flipproof.config import ParallelismConfig, RunConfig, TrainingConfig
from flipproof.faults.inject import fault_state, is_faulty
from flipproof.formats.linear import quantised_weights
from flipproof.models import recompute
from flipproof.models.frozen import FrozenShards, may_share
from flipproof.world import World, node_size

_SHARDS = "_frozen_shards"
_BUCKET = 2**24
"""Values that are sent at once; a larger tensor is by itself."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: of all its lists of modules the one with most parameters."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for module in found for p in module.parameters()), default=[])


def parallelize(model: nn.Module, config: RunConfig, world: World, compiler: Any = None) -> None:
    """Recomputation, compilation and sharding, in place; a model on the meta device stays there.

    Parameters that are sharded become DTensors. Faulty layers learn which rows of the global batch are theirs.

    Args:
        compiler: a backend of torch.compile to compile by, whatever the config says.
    """
    training, layers = config.training, blocks(model)
    compiled = training.compile if training.compile is not None else world.device.type == "cuda"
    compiled = compiled or compiler is not None
    recompute.prepare(layers, compiled, compiler)
    recompute.set_kept(layers, checkpointing_of(config, world))
    if is_faulty(model):
        fault_state(model).rank = world.rank
    computed = cast_to(training, model)
    if world.mesh is not None and config.parallelism.sharding_strategy != "no_shard":
        if quantised_weights(model) or _may_share(model, layers, config, world):
            ahead, behind = config.parallelism.forward_prefetch, config.parallelism.backward_prefetch
            vars(model)[_SHARDS] = FrozenShards(model, layers, mesh_of(world), ahead, behind)
        else:
            _shard(model, layers, config, world)
    # after FSDP's own, which where the output needs a gradient would gather a frozen embedding in backward, for nothing
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if computed == torch.bfloat16:
        embedding.register_forward_hook(_as_computed)
    if compiled:
        # The first block's input needs no gradient where the embedding is frozen. With one it is a block like the
        # others, and compiled with them.
        embedding.register_forward_hook(_require_grad)


def _may_share(model: nn.Module, layers: list[nn.Module], config: RunConfig, world: World) -> bool:
    shards, on_a_node = mesh_of(world)["shard"].size(), node_size(world.size)
    if not shares_frozen(config.parallelism, shards, on_a_node) or cast_to(config.training, model) is not None:
        return False
    return may_share(model, layers, shards) and reach_each_other(world)


def reach_each_other(world: World) -> bool:
    """Whether each process of a node reads the memory of its neighbours; the same in all, which must all call."""
    device, reached = world.device, True
    if device.type == "cuda":
        others = [other for other in range(node_size(world.size)) if other != device.index]
        reached = all(torch.cuda.can_device_access_peer(device, other) for other in others)
    return bool(world.least(float(reached)))


def shares_frozen(parallelism: ParallelismConfig, shards: int, on_a_node: int) -> bool:
    """Whether frozen weights that are computed with as they are held lie in the memories of several GPUs of a node."""
    stays = parallelism.sharding_strategy == "shard_grad_op" or parallelism.keep_gathered
    return shards > 1 and on_a_node % shards == 0 and not stays and not parallelism.cpu_offload


def slots(model: nn.Module) -> list[Tensor]:
    """What gathered frozen weights lie in, once there was a forward pass."""
    found = vars(model).get(_SHARDS)
    return [] if found is None else found.slots


def sharing(model: nn.Module) -> DeviceMesh | None:
    """The processes that share frozen weights; of a mesh of two dimensions the first is of replicas."""
    found = vars(model).get(_SHARDS)
    return None if found is None else found.mesh


def mesh_of(world: World) -> DeviceMesh:
    """Of the processes that share a model; where it has two dimensions the first is of replicas."""
    assert world.mesh is not None
    return world.mesh if world.mesh["replicate"].size() > 1 else world.mesh["shard"]


def _shard(model: nn.Module, layers: list[nn.Module], config: RunConfig, world: World) -> None:
    training, parallelism = config.training, config.parallelism
    options: dict[str, Any] = {
        "mesh": mesh_of(world),
        "mp_policy": MixedPrecisionPolicy(
            # None where the weights have that dtype already: adapters and their gathering stay float32
            param_dtype=cast_to(training, model),
            reduce_dtype=_dtype(training.mixed_precision_reduce),
        ),
        # pinned for the sake of copies to a GPU; without one there is nothing that pins
        "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
        if parallelism.cpu_offload
        else OffloadPolicy(),
        "reshard_after_forward": parallelism.sharding_strategy != "shard_grad_op",
    }
    for layer in layers:
        fully_shard(layer, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not embedding.weight:
        fully_shard(embedding, **options)
        # its backward needs no weights (loss.py), and comes right after its forward
        fully_shard(head, **options | {"reshard_after_forward": False})
    fully_shard(model, **options | {"reshard_after_forward": False})
    _prefetch(layers, parallelism)


def _require_grad(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad or not torch.is_grad_enabled() else output.requires_grad_()


def _as_computed(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    """Of autocast to bfloat16, which casts at products alone: what passes between them is bfloat16 then, as FSDP has
    it, and half as much to read and write. (float16 has too few exponents for the sums that a residual stream is.)"""
    return output.bfloat16() if torch.is_autocast_enabled(output.device.type) else output


def cast_to(training: TrainingConfig, model: nn.Module) -> torch.dtype | None:
    """The dtype that weights are cast to for computing; None where they are computed with as they are."""
    # the first parameter is the embedding, of the model's dtype; adapters come later
    held, name = next(model.parameters()).dtype, training.mixed_precision_param
    return None if name is None or _dtype(name) == held else _dtype(name)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def checkpointing_of(config: RunConfig, world: World) -> str | int:
    """``training.activation_checkpointing`` as it is meant on this device."""
    mode = config.training.activation_checkpointing
    return "none" if mode == "auto" and world.device.type == "cpu" else mode


def _prefetch(layers: list[nn.Module], config: ParallelismConfig) -> None:
    ahead, behind = config.forward_prefetch, config.backward_prefetch
    for i, layer in enumerate(layers):
        assert isinstance(layer, FSDPModule)
        if ahead:
            layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])  # type: ignore[arg-type]
        if behind:
            # where there is none FSDP would gather the embedding, whose backward needs no weights; itself is there
            layer.set_modules_to_backward_prefetch(layers[max(0, i - behind) : i][::-1] or [layer])  # type: ignore[arg-type]


class Gradients:
    """When processes exchange gradients: after the last micro-batch of a step, not before."""

    def __init__(self, model: nn.Module, config: ParallelismConfig, world: World) -> None:
        self._keep, self._world = config.keep_gathered, world
        self._model = model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @property
    def apart(self) -> bool:
        """Whether a micro-batch asks nothing of other processes."""
        return not isinstance(self._model, FSDPModule)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Forward and backward of a micro-batch run within this context."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
            self._model.set_is_last_backward(last)
            if self._keep:
                self._model.set_reshard_after_backward(last)
                self._model.set_reshard_after_forward(False)
        yield
        if last and self.apart and self._world.size > 1:
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        """Give each parameter's gradient the mean over the processes; where none has one it stays without."""
        mine = torch.tensor([parameter.grad is not None for parameter in self._trained], dtype=torch.int32)
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._world.cpu_group)
        gradients = []
        for parameter, found in zip(self._trained, mine.tolist(), strict=True):
            if found:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        for bucket in buckets(gradients):
            together = torch.cat([gradient.flatten() for gradient in bucket]) if len(bucket) > 1 else bucket[0]
            dist.all_reduce(together)
            together /= self._world.size
            if len(bucket) > 1:
                parts = together.split([gradient.numel() for gradient in bucket])
                torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """What is sent at once: small tensors of a dtype together, as they come, large ones by themselves."""
    gathered: list[Tensor] = []
    for tensor in tensors:
        if gathered and (
            tensor.dtype != gathered[0].dtype or sum(t.numel() for t in gathered) + tensor.numel() > _BUCKET
        ):
            yield gathered
            gathered = []
        gathered.append(tensor)
    if gathered:
        yield gathered
