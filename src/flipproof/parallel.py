"""Many processes: who they are, and how a model is spread over them.

The engine is PyTorch's: ``torchrun`` starts the processes, a DeviceMesh arranges them, FSDP2 (``fully_shard``) shards,
gathers and reduces; ``no_shard`` is DistributedDataParallel. ``parallelize`` reads as what happens to a model, in
order: recomputation, compilation, sharding. Each block is a unit of its own, gathered for its turn and freed after.

**The same run on any number of processes.** The global micro-batch is the local ones one after the other, rank 0's rows
first. Draws are keyed by the index in the whole tensor (``layers.py``), so a process draws for its own rows what one
process would have drawn for them, and all processes see the same faulty weights.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flipproof import recompute
from flipproof.config import ParallelismConfig, RunConfig, TrainingConfig
from flipproof.errors import ConfigError
from flipproof.inject import fault_state, is_faulty
from flipproof.launch import check_joined, end_with_launcher, join_srun

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """Dimensions "replicate" and "shard"; None where there is one process."""
    cpu_group: dist.ProcessGroup | None = None
    """All processes, for numbers on the CPU."""
    writers: dist.ProcessGroup | None = None
    """All processes again, for the threads that write checkpoints."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that logs and writes for all."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of all processes' values."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest of all processes' values."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def least(self, value: float) -> float:
        """The least of all processes' values."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def mean(self, value: Tensor) -> float:
        """The mean of all processes' scalars."""
        return self.total(float(value)) / self.size

    def _reduced(self, value: float, how: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.cpu_group)
        return float(tensor)

    def once(self, action: Callable[[], Result]) -> Result:
        """What ``action`` returns in the first process, the only one to run it. What it raises there ends all."""
        if self.size == 1:
            return action()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                answer[0] = action()
            except Exception as raised:  # told to the others, which would wait for ever, and raised again
                error, answer[1] = raised, getattr(raised, "problems", [str(raised)])
        dist.broadcast_object_list(answer, group=self.cpu_group)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise ConfigError(answer[1])
        result: Result = answer[0]
        return result

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)


def layout(config: ParallelismConfig, size: int, on_a_node: int) -> tuple[int, int]:
    """(replicas, processes over which each is sharded) for ``size`` processes, ``on_a_node`` of them on each node.

    Raises:
        ConfigError: where that is not what the config says, naming both numbers and the flag to change.
    """
    started = f"{size} process was started" if size == 1 else f"{size} processes were started"
    if config.sharding_strategy == "no_shard":
        if config.replicas not in (None, size):
            raise ConfigError([f"{started}, but parallelism.replicas = {config.replicas}; start {config.replicas}"])
        return size, 1
    degree, replicas = config.fsdp_degree, config.replicas
    if config.sharding_strategy == "hybrid_shard":
        degree = degree or (max(1, size // replicas) if replicas else min(size, on_a_node))
        replicas = replicas or max(1, size // degree)
    replicas = replicas or 1
    degree = degree or max(1, size // replicas)
    if degree * replicas != size:
        fitting, rest = divmod(size, replicas)
        mend = f" or set --parallelism.fsdp_degree {fitting}" if not rest else ""
        raise ConfigError(
            [
                f"{started}, but parallelism.fsdp_degree x replicas = {degree} x {replicas} = {degree * replicas}; "
                f"start {degree * replicas} (torchrun --nproc_per_node){mend}"
            ]
        )
    return replicas, degree


@contextmanager
def start(config: ParallelismConfig, dumps: Path | None = None) -> Iterator[World]:
    """Join the processes that torchrun or srun started, for as long as the context lasts; without, be the only one.

    Args:
        dumps: directory for what NCCL's flight recorder writes when a collective hangs; None is NCCL's own choice. It
            is not made here.

    Raises:
        ConfigError: where the processes are not those that the config shards over, or have no GPU each.
    """
    join_srun()
    check_joined()
    end_with_launcher()
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    layout(config, size, node_size(size))  # before anything is started
    on_gpu = torch.cuda.is_available()
    if on_gpu and node_size(size) > (gpus := torch.cuda.device_count()):
        raise ConfigError([f"{node_size(size)} processes were started on a node of {gpus} GPUs; start one for each"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        # blocks of all sizes come and go; what is free must not lie in pieces that fit nothing
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    if size == 1:
        if config.cpu_offload:
            raise ConfigError(["parallelism.cpu_offload = True: 1 process was started; it needs several (torchrun)"])
        yield World(0, 1, device)
        return
    # What was under way when a collective hangs: each process writes its last collectives when one times out.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if dumps is not None:
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(dumps / "nccl-rank-")
    timeout = timedelta(minutes=config.timeout_minutes)
    dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", timeout=timeout)
    try:
        # a disk may be slow
        groups = [dist.new_group(backend="gloo", timeout=limit) for limit in (timeout, timedelta(days=1))]
        world = arrange(World(dist.get_rank(), size, device, None, *groups), config)
        yield world
        world.wait()  # a process that leaves while others still talk to it takes them down
    finally:
        dist.destroy_process_group()


def arrange(world: World, config: ParallelismConfig) -> World:
    """The processes of ``world``, arranged as another config shards over them."""
    if world.size == 1:
        return world
    replicas, degree = layout(config, world.size, node_size(world.size))
    mesh = init_device_mesh(world.device.type, (replicas, degree), mesh_dim_names=("replicate", "shard"))
    return replace(world, mesh=mesh)


def node_size(size: int) -> int:
    """How many of ``size`` processes torchrun started on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: of all its lists of modules the one with most parameters."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for module in found for p in module.parameters()), default=[])


def parallelize(model: nn.Module, config: RunConfig, world: World) -> None:
    """Recomputation, compilation and sharding, in place; a model on the meta device stays there.

    Parameters that are sharded become DTensors. Faulty layers learn which rows of the global batch are theirs.
    """
    training, parallelism = config.training, config.parallelism
    layers = blocks(model)
    compiled = training.compile if training.compile is not None else world.device.type == "cuda"
    recompute.prepare(layers, compiled)
    recompute.set_kept(layers, _mode(config, world))
    if compiled:
        # The first block's input needs no gradient where the embedding is frozen. With one it is a block like the
        # others, and compiled with them.
        model.get_input_embeddings().register_forward_hook(_require_grad)  # type: ignore[operator]
    if is_faulty(model):
        fault_state(model).rank = world.rank
    if world.mesh is None or parallelism.sharding_strategy == "no_shard":
        return

    options: dict[str, Any] = {
        "mesh": world.mesh if world.mesh["replicate"].size() > 1 else world.mesh["shard"],
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


def cast_to(training: TrainingConfig, model: nn.Module) -> torch.dtype | None:
    """The dtype that weights are cast to for computing; None where they are computed with as they are."""
    # the first parameter is the embedding, of the model's dtype; adapters come later
    held, name = next(model.parameters()).dtype, training.mixed_precision_param
    return None if name is None or _dtype(name) == held else _dtype(name)


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _mode(config: RunConfig, world: World) -> str | int:
    mode = config.training.activation_checkpointing
    return "none" if mode == "auto" and world.device.type == "cpu" else mode


def _prefetch(layers: list[nn.Module], config: ParallelismConfig) -> None:
    ahead, behind = config.forward_prefetch, config.backward_prefetch
    for i, layer in enumerate(layers):
        assert isinstance(layer, FSDPModule)
        if ahead:
            layer.set_modules_to_forward_prefetch(layers[i + 1 : i + 1 + ahead])  # type: ignore[arg-type]
        if behind:
            layer.set_modules_to_backward_prefetch(layers[max(0, i - behind) : i][::-1])  # type: ignore[arg-type]


class Gradients:
    """When processes exchange gradients: after the last micro-batch of a step, not before.

    ``forward`` is what to call for a training forward pass: the model, or with ``no_shard`` what wraps it.
    """

    def __init__(self, model: nn.Module, config: ParallelismConfig, world: World) -> None:
        self._keep = config.keep_gathered
        self._model = model
        self.forward: Callable[..., Any] = model
        if world.size > 1 and not isinstance(model, FSDPModule):
            devices = [world.device] if world.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Forward and backward of a micro-batch run within this context."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(last)
            self._model.set_is_last_backward(last)
            if self._keep:
                self._model.set_reshard_after_backward(last)
                self._model.set_reshard_after_forward(False)
        elif isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            return self.forward.no_sync()
        return nullcontext()
