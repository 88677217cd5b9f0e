"""What the faulty parts of one model share, and what makes a module one of them.

**Ticks.** The root module's forward pre-hook takes the next tick, so that ``generate``, lm-eval and anyone's training
loop need not cooperate. Backward brings the tick of its own pass back before activation checkpointing runs anything
again: a hook on the pass's outputs does that, which leaves the outputs themselves as they are, to be changed in place.

**A loop that resumes** and knows nothing of ticks would count them from 0 again and repeat the flips of the run before
it. What every such loop restores is the weights (``load_state_dict``: Hugging Face ``Trainer``, ``accelerate``, plain
loops). So where that changes a trainable weight, the ticks of training passes move to the upper half of their range, to
a place that is a hash of these weights: the same flips for the same checkpoint, and none that was drawn before. Passes
in eval mode or without gradients are counted as ever. ``set_tick`` has the last word, and goes on exactly where the run
before was.

**Rows.** A draw is keyed by the index in the global micro-batch, the rows of rank 0 first. The rank is that of the
default process group where there is one, so under DDP or FSDP in any loop each process draws its own rows' flips; all
processes have as many rows.

**Runs.** A module that runs again within one pass reads its operands again, and draws again: the n-th further run has
the key + n·φ (mod 2^64, φ the odd integer next to 2^64 over the golden ratio). A persistent fault is the same memory at
every run. Where activation checkpointing runs such a module once more in backward, nothing says which run it repeats,
and that is refused. Compiled code cannot count (what it does must not depend on what ran before): there every run of a
pass has the first one's draw.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from flipproof.dtensor import whole
from flipproof.faults.draw import Draw, FaultData, run_name
from flipproof.faults.fault import Fault
from flipproof.faults.fitted import Guards
from flipproof.faults.op import apply_draw
from flipproof.faults.philox import MAX_TICK, derive_key
from flipproof.faults.spec import BitFlipSpec

FlipHook = Callable[[str, Tensor, Draw], Tensor]
"""(name of layer and operand, tensor, draw) -> the flipped tensor: stands in for a flip to log, count or replay it."""

_HASHED_ELEMENTS = 4096
"""Of each tensor, so many go into the hash of loaded weights: training changes a tensor everywhere."""
_HASHED_TENSOR = 2**24
"""Elements of the largest tensor that is gathered for that hash."""


class FaultState:
    """What the faulty layers of one model share: the tick of the current forward pass and which faults are on.

    ``tick`` is an int64 tensor made anew for each forward pass of the root module and never written again, so the
    backward of an earlier pass keeps its own. All of it stays on the device that the layers are on.
    """

    def __init__(self, base_seed: int, exact_gradient: bool = True) -> None:
        self.seed = base_seed
        self.exact_gradient = exact_gradient
        """Whether the adapters' gradients leave out the weights that the guard zeroed."""
        self.flips = True
        """Whether bits flip; False leaves the guard."""
        self.guard = True
        self.guards: Guards | None = None
        """Fitted ones, where faults have them."""
        self.computed: torch.dtype | None = None
        """The dtype that weights are cast to before their bits flip, where that is another than theirs."""
        self.fitting: Guards | None = None
        """The last that were found to be of this model."""
        self.adapters = True
        """Whether LoRA adapters are part of the weight."""
        self.flip_hook: FlipHook | None = None
        """Where given, all flips go through it; for passes without gradients, in blocks that are not compiled."""
        self.rank: int | None = None
        """Which slice of the global micro-batch this process holds; None is the rank in the default process group."""
        self.slice = _group_rank()
        """The same, looked up at every pass."""
        self.sites: list[FaultSite] = []
        """All that has faults."""
        self.running = False
        """Whether the root module's forward runs: then a module that is called twice runs twice."""
        self.hooks: tuple[RemovableHandle, ...] = ()
        """The root module's hooks that call the methods below."""
        self._next = torch.zeros((), dtype=torch.int64)
        self.resumed_at = 0
        """What is added to the ticks of training passes since weights were loaded."""
        self._to_be_filled = False
        """Whether the weights are still to come: the model was on the meta device."""
        self._held: bytes | None = None
        """Hash of the weights that train, while others are loaded."""
        self.tick = self._next.clone()

    def watch(self, root: nn.Module) -> None:
        """Take ticks from the forward passes of ``root``, and notice when it loads weights."""
        self.hooks = (
            root.register_forward_pre_hook(self.before_forward),
            root.register_forward_hook(self.after_forward),
            root.register_load_state_dict_pre_hook(self.before_load),
            root.register_load_state_dict_post_hook(self.after_load),
        )
        self._to_be_filled = any(parameter.device.type == "meta" for parameter in root.parameters())

    def set_tick(self, tick: int) -> None:
        """The next forward pass of the root module has this tick; the one after it the next, and so on. In place: a
        CUDA graph that advances the ticks goes on from here."""
        self.resumed_at = 0
        self._next.fill_(tick)
        self.tick = self._next.clone()

    @contextmanager
    def draws_apart(self) -> Iterator[None]:
        """Within the block ticks are counted apart, and the seed may be another. Afterwards they go on from where they
        were, with the very tensors, which a CUDA graph may read."""
        place = self._next, self.tick, self.resumed_at
        seed, keys = self.seed, [site.keys_held() for site in self.sites]
        self._next = self._next.clone()
        try:
            yield
        finally:
            self.seed = seed
            self._next, self.tick, self.resumed_at = place
            for site, held in zip(self.sites, keys, strict=True):
                vars(site).update(held)

    def move_to(self, device: torch.device) -> None:
        """Keep the ticks where the layers are."""
        if self._next.device != device:
            self._next, self.tick = self._next.to(device), self.tick.to(device)

    def before_forward(self, root: nn.Module, _args: Any) -> None:
        """Forward pre-hook of the root module: take the next tick. Device-side, so a CUDA graph may hold it."""
        self.tick = self._next + (self.resumed_at if root.training and torch.is_grad_enabled() else 0)
        self._next.add_(1)
        self.slice = _group_rank() if self.rank is None else self.rank
        self.running = True
        for site in self.sites:
            site.runs = 0

    def after_forward(self, _root: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook of the root module: make backward bring this pass's tick back before it recomputes anything."""
        self.running = False
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # what is compiled runs no Python again
            return
        tick = self.tick

        def bring_back(_grad: Tensor) -> None:
            self.tick = tick

        for leaf in torch.utils._pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(bring_back)

    def before_load(self, root: nn.Module, *_: Any) -> None:
        """Hook on the root module's ``load_state_dict``, which of a sharded model all processes call."""
        self._held = None if self._to_be_filled else _hash(root)

    def after_load(self, root: nn.Module, _incompatible: Any) -> None:
        """Hook on ``load_state_dict``: move the ticks of training where it changed what trains."""
        self._to_be_filled = False
        if self._held is not None and (now := _hash(root)) != self._held:
            half = MAX_TICK // 2
            self.resumed_at = half + int.from_bytes(now, "little") % (half // 2)

    def active(self, fault: FaultData) -> bool:
        """Whether a fault, as far as it is on, may change anything."""
        return (self.flips and fault.flips) or (self.guard and fault.guarded)


@torch.no_grad()
def _hash(root: nn.Module) -> bytes:
    """Of the weights that train, the same in every process."""
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    found = hashlib.blake2b(digest_size=8)
    for parameter in trained:
        if parameter.numel() <= _HASHED_TENSOR or not isinstance(parameter, DTensor):
            part = whole(parameter.detach()).flatten()[:_HASHED_ELEMENTS].cpu().contiguous()
            found.update(part.view(torch.uint8).numpy().tobytes())
    return found.digest()


def _group_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class FaultSite:
    """A module whose operands have faults: a linear layer, the output head, an embedding, the cache of an attention.

    Each operand has a Philox key, made of the state's seed and ``site``.
    """

    site: str
    """The module's name in the whole model."""
    kind: str
    """"linear", "head", "embedding" or "kv"."""
    keyed: ClassVar[tuple[str, ...]]
    """The attributes that hold keys, the tensors that draws read."""
    state: FaultState
    runs: int = 0
    """How often it has run in the root module's present or last pass."""

    def data_of(
        self, operand: str, fault: Fault, guards: Guards | None, shape: tuple[int, ...] | None = None
    ) -> FaultData:
        """The fault of an operand as data, with its thresholds where they were fitted.

        Raises:
            ConfigError: where fitted guards are not for this operand of this layer.
        """
        if fault.fitted is None:
            return FaultData(fault)
        assert guards is not None
        return FaultData(fault, guards.thresholds(self.draw_name(operand), fault.fitted, shape))

    def faults_of(self, spec: BitFlipSpec | None, guards: Guards | None) -> dict[str, Any]:
        """Attribute -> value, of what is set to take the faults of a spec for this very site; None is none.

        Raises as ``data_of`` does.
        """
        raise NotImplementedError

    def refresh_keys(self) -> None:
        """Derive the keys from the state's seed, on the device of what is flipped."""
        raise NotImplementedError

    def keys_held(self) -> dict[str, Any]:
        """Attribute -> key, or keys, as they are now."""
        return {name: getattr(self, name) for name in self.keyed}

    def next_run(self) -> int:
        """The number of the run that begins, 0 for the first of a pass; 0 outside of the root module's forward too.

        Raises:
            RuntimeError: in backward, where activation checkpointing repeats one of several runs.
        """
        if torch.compiler.is_compiling():
            return 0
        if self.state.running:
            self.runs += 1
            return self.runs - 1
        if self.runs > 1 and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{self.site} ran {self.runs} times in one forward pass, and activation checkpointing runs it again: "
                "which of its draws to repeat cannot be told; leave what calls it out of activation checkpointing"
            )
        return 0

    def _key(self, name: str, device: torch.device) -> Tensor:
        return torch.full((), derive_key(self.state.seed, name), dtype=torch.int64, device=device)

    def draw_name(self, operand: str, run: int = 0) -> str:
        """What names the draws of an operand, and the operand in a log."""
        return f"{self.site}{run_name(run)}/{operand}"

    def _draw(self, fault: FaultData, key: Tensor, x: Tensor, offset: int, run: int) -> Draw:
        """Key and tick are on x's device already, unless parameters are offloaded."""
        key, tick = fault.key_of_run(key, run).to(x.device), self.state.tick.to(x.device)
        return fault.draw(key, tick, offset, x, self.state.flips, self.state.guard)

    def _flipped(self, operand: str, x: Tensor, fault: FaultData, key: Tensor, offset: int, run: int) -> Tensor:
        """``x`` after flip and guard, with its gradient; under autocast in the dtype that is computed with."""
        if not self.state.active(fault):
            return x
        computed = x
        if torch.is_autocast_enabled(x.device.type):
            computed = x.to(torch.get_autocast_dtype(x.device.type))
        draw = self._draw(fault, key, computed, offset, run)
        # a name is asked for only here: a compiled block must not depend on its own
        if self.state.flip_hook is None:
            return apply_draw(computed, draw).to(x.dtype)
        return self.state.flip_hook(self.draw_name(operand, run), computed, draw).to(x.dtype)
