"""The faulty linear layer: ``Y = flip(X) · flip(W + s·B·A)ᵀ + bias``.

``FaultyLinear`` is an ``nn.Linear`` with the same parameter names, plus ``lora_A`` (r, in) and ``lora_B`` (out, r)
where r > 0.

**Forward** is one matrix product on the merged, flipped weight; there is no separate LoRA branch.

**Backward** draws the flips again, since a draw is a function of its key: what is kept between forward and backward
is X, W, A and B, as for a clean LoRA layer. (Where activation checkpointing runs forward again just before backward,
that run's X̃ and W̃ are kept for it: ``checkpointed``.) Write X̃ and W̃ for the operands after flip and guard, dY for the
incoming gradient and ⊙ keep for zeroing what the guard zeroed. Then

    dX = (dY · W̃) ⊙ keep_x        dW = (dYᵀ · X̃) ⊙ keep_w        dA = s · Bᵀ · dW        dB = s · dW · Aᵀ

Where W is frozen, the (out, in) matrix dYᵀ·X̃ is not formed: dA = s·(dY·B)ᵀ·X̃ and dB = s·dYᵀ·(X̃·Aᵀ), and what the few
positions (o, i) zeroed by the guard contributed, g = Σ dY[:, o]·X̃[:, i], is taken back: s·B[o]·g from dA[:, i], and
s·A[:, i]·g from dB[o]. The result is exact (on a GPU as long as they fit a list: ``triton_launch.new_zeroed``).
``exact_gradient = false`` in the config leaves that step out: the gradient then passes straight through the weights
that the guard zeroed, some 15 in a million at p = 2⁻¹⁶, and a layer on a GPU saves 3 to 9% of its time
(``benchmarks/README.md``).

**Dropout** of an adapter (``lora.dropout``). PEFT computes X·Wᵀ + s·drop(X)·Aᵀ·Bᵀ, with a draw for each feature of each
row of X. A merged weight is the same for all rows, so here a feature is dropped for all rows of a micro-batch at once:
drop(X) = X·diag(m), hence W + s·B·(A·diag(m)), where each mⱼ is 0 with probability p and else 1/(1 − p). Every row's
drop(X) is distributed as PEFT's, with the same mean and variance; rows are not independent (dropout with one mask for
all, as Gal & Ghahramani, arXiv:1512.05287, have it for all steps of a sequence). It is so in layers without faults too:
a control must differ from its run by faults alone. m is drawn as flips are, as a function of (seed, site, tick) alone:
equal on all ranks, so that a weight is one weight wherever its rows are; new for each micro-batch; and the same when
backward computes forward again, or a CUDA graph launches it.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flipproof.dtensor import assign_, held, local, whole
from flipproof.faults.draw import Draw, FaultData, run_name
from flipproof.faults.fault import Fault
from flipproof.faults.fitted import Guards
from flipproof.faults.philox import derive_key
from flipproof.faults.spec import BitFlipSpec, LoraSpec
from flipproof.faults.state import FaultSite, FaultState

ops = torch.ops.flipproof


def key_device(weight: Tensor) -> torch.device:
    # forward cannot run on the meta device, which holds no keys
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)
"""Where a module keeps the hooks that others have put on it."""


def keep_hooks(module: nn.Module, before: nn.Module) -> None:
    """Give ``module`` the hooks of the one whose place it takes; whoever put them there can still remove them."""
    for hooks in _HOOKS:
        setattr(module, hooks, getattr(before, hooks))


class FaultyLinear(FaultSite, nn.Linear):
    """``nn.Linear`` whose input and weight suffer bit flips at every forward pass.

    Made by ``flipproof.inject``; ``weight`` and ``bias`` are the very parameters of the layer that it replaces.
    """

    keyed: ClassVar[tuple[str, ...]] = ("x_key", "w_key", "dropout_key")
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    dropout_key: Tensor
    checkpointed = False
    """Whether activation checkpointing is around this layer, so that what forward saves lives for a moment only."""

    def __init__(
        self,
        linear: nn.Linear,
        site: str,
        x_fault: Fault,
        w_fault: Fault,
        lora: LoraSpec,
        state: FaultState,
        kind: str = "linear",
        w_site: str | None = None,
    ) -> None:
        """``w_site``: the site of the module that holds the same weight, where there is one."""
        nn.Module.__init__(self)  # the parameters come from ``linear``: nothing is allocated twice
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._take(linear)
        self.training = linear.training
        keep_hooks(self, linear)
        self.site, self.kind = site, kind
        self.w_site = w_site or site
        self.lora, self.state = lora, state
        self.x_fault, self.w_fault = self._data_of(x_fault, w_fault, state.guards)
        # a bit of a mantissa is inverted with a probability of up to ½: of features that drop, or of those that stay
        self.dropped = FaultData(Fault(p_frac=min(lora.dropout, 1 - lora.dropout)))
        if lora.r:
            # Adapters are trained, so they are fp32 whatever the dtype of the frozen weight.
            device = self._home().device
            self.lora_A = nn.Parameter(torch.empty(lora.r, self.in_features, dtype=torch.float32, device=device))
            self.lora_B = nn.Parameter(torch.empty(self.out_features, lora.r, dtype=torch.float32, device=device))
            self.reset_lora_parameters()
        else:
            self.register_parameter("lora_A", None)
            self.register_parameter("lora_B", None)
        self.refresh_keys()

    def _take(self, linear: nn.Linear) -> None:
        """Hold what ``linear`` does."""
        self.weight, self.bias = linear.weight, linear.bias

    def _home(self) -> Tensor:
        """A tensor that is where the weight is."""
        return self.weight

    def plain(self) -> nn.Linear:
        """A layer without faults and adapters, of the same weight and bias."""
        # on meta: no memory is taken for parameters that are replaced at once
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def reset_lora_parameters(self) -> None:
        """A uniform in ±1/√in (what ``nn.Linear`` and PEFT use), B zero. A is a function of the site alone, so
        the order of the layers and their placement do not matter. On the meta device: call again once materialised.
        """
        if self.lora_A is None or self.lora_B is None or self.lora_A.device.type == "meta":
            return
        generator = torch.Generator().manual_seed(derive_key(0, f"{self.site}/lora_A"))
        bound = self.in_features**-0.5
        assign_(self.lora_A, torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
        with torch.no_grad():
            self.lora_B.zero_()

    def draw_name(self, operand: str, run: int = 0) -> str:
        return f"{self.w_site if operand == 'w' else self.site}{run_name(run)}/{operand}"

    def faults_of(self, spec: BitFlipSpec | None, guards: Guards | None) -> dict[str, Any]:
        x_fault, w_fault = self._data_of(*((spec.x, spec.w) if spec else (Fault(), Fault())), guards)
        return {"x_fault": x_fault, "w_fault": w_fault}

    def _data_of(self, x_fault: Fault, w_fault: Fault, guards: Guards | None) -> tuple[FaultData, FaultData]:
        x = self.data_of("x", x_fault, guards, (self.in_features,))
        return x, self.data_of("w", w_fault, guards, (self.out_features, 1))

    def refresh_keys(self) -> None:
        device = key_device(self._home())
        self.x_key, self.w_key = (self._key(self.draw_name(operand), device) for operand in "xw")
        self.dropout_key = self._key(f"{self.site}/lora_dropout", device)
        for fault in (self.x_fault, self.w_fault):
            fault.move_to(device)
        self.state.move_to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> "FaultyLinear":
        # .to(), .cuda(), .to_empty(): keys are derived anew rather than moved, so that nothing can lose them.
        super()._apply(fn, recurse)
        self.refresh_keys()
        return self

    def _replicate_for_data_parallel(self) -> "FaultyLinear":
        raise RuntimeError(
            "nn.DataParallel runs copies of a faulty layer that share its ticks; start one process for each GPU "
            "(torchrun), or show this one a single GPU (CUDA_VISIBLE_DEVICES)"
        )

    def merged_weight(self) -> Tensor:
        """W + s·B·A in W's dtype, computed in the adapters'; W itself where there are no adapters.

        Of a sharded layer the rows that this process holds; all processes must call.
        """
        weight: Tensor = local(self.weight)
        if self.lora_A is None or self.lora_B is None:
            return weight
        rows, *_ = held(self.weight)
        lora_A, lora_B = whole(self.lora_A), whole(self.lora_B)[rows]
        return torch.addmm(weight.to(lora_A.dtype), lora_B, lora_A, alpha=self.lora.scaling).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state
        lora_A: Tensor | None
        lora_A, lora_B = (self.lora_A, self.lora_B) if state.adapters else (None, None)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            # Bits flip in the dtype that is computed with.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if not (state.active(self.x_fault) or state.active(self.w_fault) or lora_A is not None):
            return F.linear(x, weight, bias)
        run, x_offset = self.next_run(), state.slice * x.numel()
        x_draw = self._draw(self.x_fault, self.x_key, x, x_offset, run)
        w_draw = self._draw(self.w_fault, self.w_key, x, 0, run)
        if lora_A is not None and self.lora.dropout and self.training:
            lora_A = lora_A * self._kept_features(lora_A, run)
        if state.flip_hook is not None:
            if lora_A is not None:
                weight = ops.merge(weight, lora_A, lora_B, self.lora.scaling, *w_draw.of_nothing().arguments)
            if x_draw.active:
                x = state.flip_hook(self.draw_name("x", run), x, x_draw)
            if w_draw.active:
                weight = state.flip_hook(self.draw_name("w", run), weight, w_draw)
            return F.linear(x, weight, bias)
        checkpointed = self.checkpointed and torch.is_grad_enabled()
        product = Product(self.lora.scaling, state.exact_gradient, checkpointed)
        y: Tensor = _FaultyMatmul.apply(x, weight, bias, lora_A, lora_B, x_draw, w_draw, product)
        return y

    def _kept_features(self, lora_A: Tensor, run: int) -> Tensor:
        """(in,) in A's dtype: 0 for the features that the adapter does not see in this pass, else 1/(1 − p)."""
        p, ones = self.lora.dropout, torch.ones(self.in_features, dtype=torch.bfloat16, device=lora_A.device)
        key, tick = self.dropped.key_of_run(self.dropout_key, run), self.state.tick
        draw = self.dropped.draw(key.to(ones.device), tick.to(ones.device), 0, ones)
        inverted = ops.flip(ones, *draw.arguments).view(torch.int16) & 1
        return (inverted ^ (p <= 0.5)).to(lora_A.dtype) / (1 - p)

    def extra_repr(self) -> str:
        lora = f", r={self.lora.r}, lora_alpha={self.lora.lora_alpha}" if self.lora.r else ""
        lora += f", dropout={self.lora.dropout}" if self.lora.dropout else ""
        return f"{super().extra_repr()}, x={self.x_fault}, w={self.w_fault}{lora}"


def flip_again(x: Tensor, grad: Tensor | None, after: Tensor, draw: Draw) -> Tensor:
    """x̃ as forward had it, drawn again ``after`` a gradient has arrived, so that no compiler keeps forward's for it.
    ``grad``, where given, becomes 0 where the guard zeroed."""
    arguments = draw.arguments
    y: Tensor = ops.flip_again(x, after, *arguments) if grad is None else ops.flip_grad_(x, grad, after, *arguments)
    return y


class Product(NamedTuple):
    """How a faulty product is made."""

    scaling: float
    """Of the adapters."""
    exact: bool
    """Whether the adapters' gradients leave out the weights that the guard zeroed."""
    checkpointed: bool
    """Whether what forward saves lives for a moment only."""


class _FaultyMatmul(torch.autograd.Function):
    """flip(X) · flip(W + s·B·A)ᵀ + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        weight: Tensor,  # (out, in)
        bias: Tensor | None,
        lora_A: Tensor | None,  # (r, in)
        lora_B: Tensor | None,  # (out, r)
        x_draw: Draw,
        w_draw: Draw,
        product: Product,
    ) -> Tensor:
        need_w, _, need_A, need_B = ctx.needs_input_grad[1:5]
        ctx.corrects = w_draw.zeroes and product.exact and (need_A or need_B) and not need_w
        ctx.x_draw, ctx.w_draw, ctx.product = x_draw, w_draw, product
        flipped_x, flipped_w, merged, zeroed, zeroed_x = x, weight, None, None, None
        ctx.keeps_x = x_draw.active and product.checkpointed
        if ctx.keeps_x and x_draw.zeroes:
            flipped_x, zeroed_x = ops.flip_marked(x, *x_draw.arguments)
        elif x_draw.active:
            flipped_x = ops.flip(x, *x_draw.arguments)
        if lora_A is not None and product.checkpointed and not need_w:
            flipped_w, zeroed = ops.merge_grad(
                weight, lora_A, lora_B, product.scaling, x, ctx.corrects, *w_draw.arguments
            )
            merged = flipped_w
        elif lora_A is not None:
            flipped_w = ops.merge(weight, lora_A, lora_B, product.scaling, *w_draw.arguments)
        elif w_draw.active:
            flipped_w = ops.flip(weight, *w_draw.arguments)
        kept_x = flipped_x if ctx.keeps_x else x
        ctx.save_for_backward(kept_x, weight, lora_A, lora_B, *x_draw[:4], *w_draw[:3], merged, zeroed, zeroed_x)
        return F.linear(flipped_x, flipped_w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, *drawn, merged, zeroed, zeroed_x = ctx.saved_tensors
        x_rates, x_limits, x_key, tick, w_rates, w_limits, w_key = drawn
        x_draw = ctx.x_draw._replace(rates=x_rates, limits=x_limits, key=x_key, tick=tick)
        w_draw = ctx.w_draw._replace(rates=w_rates, limits=w_limits, key=w_key, tick=tick)
        scaling = ctx.product.scaling
        need_x, need_w, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        grad_y = grads[0].reshape(-1, weight.shape[0])  # (n, out)
        grad_x = grad_w = grad_bias = grad_A = grad_B = None

        flipped_w, kept = weight, None
        if need_w:
            if lora_A is not None:
                flipped_w = ops.merge(weight, lora_A, lora_B, scaling, *w_draw.of_nothing().arguments)
            if w_draw.zeroes:
                kept = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
            if w_draw.active:
                flipped_w = flip_again(flipped_w, kept, grad_y, w_draw)
        elif merged is not None:
            flipped_w = merged
        elif lora_A is not None:
            flipped_w, zeroed = ops.merge_grad(weight, lora_A, lora_B, scaling, grad_y, ctx.corrects, *w_draw.arguments)
        elif w_draw.active:
            flipped_w = flip_again(weight, None, grad_y, w_draw)
        if need_x:
            grad_x = (grad_y @ flipped_w).view(x.shape)
        flipped_x = x
        if zeroed_x is not None and grad_x is not None:
            ops.zero_marked_(zeroed_x, grad_x)
        if x_draw.active and not ctx.keeps_x:
            flipped_x = flip_again(x, grad_x, grad_y, x_draw)
        flipped_x = flipped_x.reshape(-1, x.shape[-1])  # (n, in)
        if need_bias:
            grad_bias = grad_y.sum(0)

        if need_w:
            grad_w = grad_y.T @ flipped_x  # (out, in)
            if kept is not None:
                grad_w = grad_w * kept
            if lora_A is not None:
                wide = grad_w.to(lora_A.dtype)
                grad_A, grad_B = scaling * (lora_B.T @ wide), scaling * (wide @ lora_A.T)
        elif need_A or need_B:
            a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
            grad_A = ((grad_y @ b).T @ flipped_x).to(lora_A.dtype) * scaling
            grad_B = (grad_y.T @ (flipped_x @ a.T)).to(lora_B.dtype) * scaling
            if ctx.corrects:
                more_A, more_B = ops.zeroed_correction(zeroed, w_draw.rates, grad_y, flipped_x, lora_A, lora_B, scaling)
                grad_A, grad_B = (grad_A + more_A).to(lora_A.dtype), (grad_B + more_B).to(lora_B.dtype)
        return grad_x, grad_w, grad_bias, grad_A, grad_B, None, None, None
