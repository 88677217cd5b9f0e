"""How a model is spread over the processes of a run: recomputation, compilation, sharding, in this order.

The engine is PyTorch's: FSDP2 (``fully_shard``) shards, gathers and reduces; ``no_shard`` is DistributedDataParallel.
Each block is a unit of its own, gathered for its turn and freed after.

**The same run on any number of processes.** The global micro-batch is the local ones one after the other, rank 0's rows
first. Draws are keyed by the index in the whole tensor, so a process draws for its own rows what one process would have
drawn for them, and all processes see the same faulty weights.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flipproof.config import ParallelismConfig, RunConfig, TrainingConfig
from flipproof.faults.inject import fault_state, is_faulty
from flipproof.models import recompute
from flipproof.world import World


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
        _shard(model, layers, config, world)
    # after FSDP's own, which where the output needs a gradient would gather a frozen embedding in backward, for nothing
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if computed == torch.bfloat16:
        embedding.register_forward_hook(_as_computed)
    if compiled:
        # The first block's input needs no gradient where the embedding is frozen. With one it is a block like the
        # others, and compiled with them.
        embedding.register_forward_hook(_require_grad)


def _shard(model: nn.Module, layers: list[nn.Module], config: RunConfig, world: World) -> None:
    training, parallelism = config.training, config.parallelism
    assert world.mesh is not None
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
    """When processes exchange gradients: after the last micro-batch of a step, not before.

    ``forward`` is what to call for a training forward pass: the model, or with ``no_shard`` what wraps it.
    """

    def __init__(self, model: nn.Module, config: ParallelismConfig, world: World) -> None:
        self._keep = config.keep_gathered
        self._model = model
        self.forward: Callable[..., Any] = model
        if world.size > 1 and not isinstance(model, FSDPModule):
            devices = [world.device] if world.device.type == "cuda" else None
            # else gradients take their memory twice
            self.forward = nn.parallel.DistributedDataParallel(model, devices, gradient_as_bucket_view=True)

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
