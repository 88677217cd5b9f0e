"""The processes of a run: who they are, what one does for all, and how they are arranged.

``torchrun`` or ``srun`` starts them, a DeviceMesh arranges them; ``models/parallelize.py`` spreads a model over them.
"""

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flipproof.config import ParallelismConfig
from flipproof.errors import ConfigError
from flipproof.launch import check_joined, end_with_launcher, join_srun, tell_launcher, tell_of_idle

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
    """All processes again, for what may take long: the threads that write checkpoints, and who waits for a disk."""

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

    def mean(self, value: Tensor | float) -> float:
        """The mean of all processes' scalars."""
        return self.total(float(value)) / self.size

    def _reduced(self, value: float, how: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, how, group=self.cpu_group)
        return float(tensor)

    def once(self, action: Callable[[], Result], patient: bool = False) -> Result:
        """What ``action`` returns in the first process, the only one to run it. What it raises there ends all.

        Args:
            patient: whether it may take longer than ``parallelism.timeout_minutes``.
        """
        if self.size == 1:
            return action()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                answer[0] = action()
            except Exception as raised:  # told to the others, which would wait for ever, and raised again
                error, answer[1] = raised, getattr(raised, "problems", [f"{type(raised).__name__}: {raised}"])
        dist.broadcast_object_list(answer, group=self.writers if patient else self.cpu_group)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise ConfigError(answer[1])
        result: Result = answer[0]
        return result

    def gathered(self, value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
        """All processes' values, by rank. ``group``: the one to talk in, for threads."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.cpu_group)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)


ALONE = World(0, 1, torch.device("cpu"))
"""One process, which has no others to ask."""


def processes_of(config: ParallelismConfig) -> int:
    """How many processes a run has: those that were started, or for one alone those that its config asks for.

    Raises as ``layout`` does.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        size = (config.fsdp_degree or 1) * (config.replicas or 1)
    replicas, degree = layout(config, size, node_size(size))
    return replicas * degree


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
                f"start {degree * replicas} (--devices, or torchrun --nproc_per_node){mend}"
            ]
        )
    return replicas, degree


_LEAVES_S = 60.0
"""How long a process that fails may take to leave the others."""
_joined: list[World] = []
"""The processes that this one has joined, while it has."""


@contextmanager
def join_world(config: ParallelismConfig, dumps: Path | None = None) -> Iterator[World]:
    """Join the processes that torchrun or srun started, for as long as the context lasts; without, be the only one.
    Within it another one is the same again.

    Args:
        dumps: directory for what NCCL's flight recorder writes when a collective hangs; None is NCCL's own choice. It
            is not made here.

    Raises:
        ConfigError: where the processes are not those that the config shards over, or have no GPU each.
    """
    if _joined:
        yield _joined[0]
        _joined[0].wait()
        return
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
            raise ConfigError(["parallelism.cpu_offload = True: 1 process was started; it needs several (--devices)"])
        tell_of_idle(torch.cuda.device_count())
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
        _joined.append(world)
        yield world
        world.wait()  # a process that leaves while others still talk to it takes them down
    except BaseException as error:
        with _leaving(error):
            _leave()
        raise
    else:
        _leave()


def _leave() -> None:
    _joined.clear()
    dist.destroy_process_group()


@contextmanager
def _leaving(error: BaseException) -> Iterator[None]:
    """Within, a process that fails leaves the others; where one of them has stopped NCCL may wait for it for ever, and
    nobody would learn of the error. So it ends in any case."""

    def end() -> None:
        traceback.print_exception(error)
        tell_launcher(f"{type(error).__name__}: {error}")
        os._exit(1)

    timer = threading.Timer(_LEAVES_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it has the error, and with it process groups: freed by a thread while Python ends, they abort it


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
