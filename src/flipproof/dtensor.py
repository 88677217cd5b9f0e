"""Which part of a tensor this process holds: of a plain tensor the whole, of a sharded one (DTensor) its own shard."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of all of ``tensor`` this process holds, as an index."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


@torch.no_grad()
def assign_(tensor: Tensor, full: Tensor) -> None:
    """Write ``full``, which every process has, into ``tensor``: each process its own part, nothing is sent."""
    local(tensor).copy_(full[held(tensor)])


def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on every process; for a sharded one all of them must call. A plain tensor is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, tensor: Tensor) -> Tensor:
    """``part``, this process's, as a tensor that is sharded as ``tensor`` is."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )


def of_rows(part: Tensor, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """``part``, this process's rows of ``tensor``, as a tensor whose rows are shared over the last dimension of a mesh,
    with replicas over the first where it has two."""
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return DTensor.from_local(part, mesh, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False)
