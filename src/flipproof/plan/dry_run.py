"""A training step that takes place without numbers, to see what memory it takes: the other way to a plan's figure.

The model of the config is built, made faulty, compiled, sharded and trained for a step by the code that trains, on fake
tensors, which have shapes and no memory, in a process group that exchanges nothing (PyTorch's own; ``FakeTensorMode``
and the ``fake`` backend). ``memory.py`` has the same figure from a formula; ``tests/plan`` holds the two together.

What a GPU would hold and this machine would not, or the other way round, is counted as on the GPU: blocks are compiled
up to the point where kernels are made, so what they keep is what the compiler keeps; results of operators that it fuses
with those that read them (pointwise ones, sums, copies) are nothing until something reads them that is not fused; and
the masks of what guards zeroed are bits. Blocks of quantised layers are not compiled, and all that their operators give
counts.
"""

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flipproof.config import RunConfig
from flipproof.dtensor import local
from flipproof.models import recompute
from flipproof.models.load import compute_context
from flipproof.models.loss import next_token_loss
from flipproof.models.parallelize import Gradients, blocks, parallelize, slots
from flipproof.models.quantised import without_compilation
from flipproof.plan.memory import WORKSPACES, Kept, Spread
from flipproof.plan.shape import make_faulty, without_weights
from flipproof.train.optimizer import make_optimizer
from flipproof.world import World, arrange

_aten = torch.ops.aten
_FUSED = {
    _aten._to_copy.default,
    _aten.amax.default,
    _aten.cat.default,
    _aten.clone.default,
    _aten.expand.default,
    _aten.gather.default,
    _aten.mean.dim,
    _aten.slice_scatter.default,
    _aten.sum.default,
    _aten.sum.dim_IntList,
}
"""Beside pointwise operators. (AdamW's ``_foreach`` are one kernel on a GPU.)"""


def dry_run(config: RunConfig, spread: Spread, kept: Kept) -> int:
    """Bytes that PyTorch allocates at most on the first GPU in a step, AdamW's moments being there already.

    Args:
        config: of a training whose dtypes are resolved (``estimate.sized``).
        kept: how many blocks keep what, from the last to the first.
    """
    seen = _Allocated()
    with warnings.catch_warnings(), _pretended(spread) as world:
        warnings.simplefilter("ignore")  # of what looks at a fake tensor's address
        world = arrange(world, replace(config.parallelism, fsdp_degree=spread.shards, replicas=spread.replicas))
        model = _model_of(config, world, kept, seen)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            step = _step_of(config, model, world, seen)
            step()  # compiles, and makes AdamW's moments
            with seen:
                step()
    return seen.most + WORKSPACES


@contextmanager
def _pretended(spread: Spread) -> Iterator[World]:
    """The first of so many processes, of which there is no other. Replicas of a whole model are as one."""
    if spread.shards == 1:
        yield World(0, 1, torch.device("cpu"))
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=spread.gpus)
    on_a_node = str(spread.node or spread.gpus)
    try:
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=on_a_node):
            yield World(0, spread.gpus, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _model_of(config: RunConfig, world: World, kept: Kept, seen: "_Allocated") -> torch.nn.Module:
    """On the meta device, ready to be trained."""
    model = without_weights(config)
    make_faulty(model, config)
    plain = config.model.quantize is None  # quantised layers are not compiled
    parallelize(model, without_compilation(config, model), world, compiler=_compiler(seen) if plain else None)
    levels = [level for level, n in kept.items() for _ in range(n)]
    for block, level in zip(reversed(blocks(model)), levels, strict=True):
        recompute.keep(block, level)
        block.register_forward_pre_hook(_without_mask, with_kwargs=True)
        if not plain:
            block.register_forward_pre_hook(partial(seen.fuse, False))
            block.register_forward_hook(partial(seen.fuse, True))
    return model.train()


def _step_of(config: RunConfig, model: torch.nn.Module, world: World, seen: "_Allocated") -> Callable[[], None]:
    training = config.training
    optimizer, gradients = make_optimizer(model, training), Gradients(model, config.parallelism, world)
    ids = torch.zeros(training.local_batch_size, training.seq_len, dtype=torch.int64)

    def step() -> None:
        held = [*model.parameters(), *model.buffers(), *slots(model)]
        held += [value for state in optimizer.state.values() for value in state.values()]
        seen.hold([local(tensor) for tensor in held])
        for last in [False] * (training.gradient_accumulation_steps > 1) + [True]:
            # what is averaged at the end has a buffer of 64 MiB
            with nullcontext() if gradients.apart else gradients.micro_batch(last):
                with compute_context(training, model):
                    loss = next_token_loss(model, ids)
                seen.fuses = config.model.quantize is None  # the loss has made its gradient with itself
                loss.backward()
            seen.fuses = True
            seen.settle()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _without_mask(_block: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """``transformers`` makes a mask where it sees fake tensors, and none for a GPU's kernels of causal attention."""
    return args, kwargs | {"attention_mask": None}


def _compiler(seen: "_Allocated") -> Any:
    """A backend of torch.compile that ends where inductor begins to make kernels."""

    def run_by_operators(graph: torch.fx.GraphModule, _examples: Any) -> Any:
        def run(*args: Any) -> Any:
            results = graph(*args)
            seen.hold(tree_leaves(results))  # a graph's results are written, whatever made them
            return results

        return make_boxed_func(run)

    return aot_autograd(
        fw_compiler=run_by_operators,
        bw_compiler=run_by_operators,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and keeps the most; within it alone."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # else what is compiled would not be called

    fuses = True
    """Whether what runs now is compiled where there is a GPU, so that its pointwise operators are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._sizes: dict[int, tuple[int, bool]] = {}
        """Of storages: (bytes, whether they are written)."""
        self._counting = ExitStack()
        self._counts = False

    def __enter__(self) -> Any:
        storage: Any = torch.UntypedStorage
        resize = storage.resize_

        def resized(own: torch.UntypedStorage, size: int) -> Any:
            given = resize(own, size)
            if own._cdata in self._sizes:
                self._resize(own._cdata, own.nbytes())
            return given

        storage.resize_ = resized  # as FSDP frees what it gathered
        self._counting.callback(setattr, storage, "resize_", resize)
        self._counts = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._counting.close()
        self._counts = False

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        of_several = isinstance(func, torch._ops.HigherOrderOperator)
        pointwise = not of_several and (torch.Tag.pointwise in func.tags or func in _FUSED)
        fused = (pointwise and self.fuses) or (not of_several and func._schema.name.startswith("aten::_foreach"))
        if not fused and not of_several:
            self.hold(tree_leaves((args, kwargs)))
        self.hold(tree_leaves(results), written=not fused)
        return results

    def fuse(self, now: bool, *_of_hooks: Any) -> None:
        self.fuses = now

    def settle(self) -> None:
        """What is still there was written, whatever made it."""
        for key, (size, written) in self._sizes.items():
            if not written:
                self._sizes[key] = size, True
                self._add(size)

    def hold(self, values: list[Any], written: bool = True) -> None:
        for tensor in values if self._counts else ():
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                size = storage.nbytes()
                self._sizes[key] = size // 8 if tensor.dtype == torch.bool else size, False
                weakref.finalize(storage, self._free, key)
            size, was_written = self._sizes[key]
            if written and not was_written:
                self._sizes[key] = size, True
                self._add(size)

    def _resize(self, key: int, size: int) -> None:
        before, written = self._sizes[key]
        self._sizes[key] = size, written
        if written:
            self._add(size - before)

    def _free(self, key: int) -> None:
        size, written = self._sizes.pop(key)
        self._now -= size * written

    def _add(self, size: int) -> None:
        self._now += size
        self.most = max(self.most, self._now)
