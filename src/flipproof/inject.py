"""Swapping faulty layers into a model and out again, and saying what is covered.

``inject`` replaces each matching ``nn.Linear`` by a ``FaultyLinear`` that holds the same parameters, in place, also
on the meta device. The layers share one ``FaultState``, which two hooks on the root module advance: each forward pass
gets the next tick, so that HF Trainer, ``generate`` and lm-eval need not cooperate, and backward restores the tick of
its own pass before an activation checkpoint recomputes anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from flipproof.config import ConfigError
from flipproof.layers import FaultState, FaultyLinear
from flipproof.ops.philox import check_tick
from flipproof.spec import BitFlipSpec, Fault, LoraSpec, check_seed

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_HEAD_NAMES = ("lm_head", "output", "embed_out", "head")


@dataclass(frozen=True)
class Coverage:
    """What ``inject`` did. Its string is a report for people."""

    covered: tuple[str, ...]
    """Names of the layers that are faulty now."""
    skipped: dict[str, str]
    """Every other ``nn.Linear``: name -> why it was left alone."""
    uncovered: dict[str, str]
    """Other modules that multiply by weights which no Linear swap can see: name -> what they are."""
    flops_share: float
    """Covered share of the weight FLOPs of one token (two per weight; attention scores are not counted)."""

    def __str__(self) -> str:
        lines = [f"{len(self.covered)} faulty linear layers cover {self.flops_share:.1%} of the model's weight FLOPs"]
        for title, modules in (("left alone", self.skipped), ("out of reach", self.uncovered)):
            reasons: dict[str, list[str]] = {}
            for name, reason in modules.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"{title} ({reason}): {shown}")
        return "\n".join(lines)


def inject(model: nn.Module, spec: BitFlipSpec, lora: LoraSpec | None = None) -> Coverage:
    """Make the linear layers of ``model`` faulty, in place.

    Every ``nn.Linear`` but the output head is swapped, unless ``spec`` says otherwise. With adapters (``lora.r`` > 0)
    everything else is frozen, as PEFT does; without, which parameters train is left as it is.

    Args:
        model: any module; its forward is what a tick counts. May be on the meta device.
        spec: what flips where.
        lora: adapters for the same layers. None or r = 0 is none.

    Returns:
        What was covered.

    Raises:
        ConfigError: where no layer matches, naming the patterns. ValueError: where the model is injected already.
    """
    lora = lora or LoraSpec()
    if is_faulty(model):
        raise ValueError("this model has faulty layers already; flipproof.remove(model) takes them out")
    state = FaultState(spec.base_seed, spec.exact_gradient)
    head = _output_head(model)
    swapped: dict[int, FaultyLinear] = {}
    covered: list[str] = []
    skipped: dict[str, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear:
            continue
        if id(module) not in swapped:
            site = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            layer_spec = spec.for_layer(site)
            if module is head or (head is None and site in _HEAD_NAMES):
                skipped[name] = "the output head"
            elif layer_spec is None:
                skipped[name] = "skipped by the config"
            elif not (layer_spec.x.active or layer_spec.w.active or lora.r):
                skipped[name] = "no fault configured"
            elif not name:
                raise ValueError("the model itself is an nn.Linear; put it in a module to inject it")
            else:
                swapped[id(module)] = FaultyLinear(module, site, layer_spec.x, layer_spec.w, lora, state)
                covered.append(name)
        if id(module) in swapped:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, swapped[id(module)])
    if not covered:
        raise ConfigError([_nothing_matched(spec, skipped)])

    if lora.r:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith((".lora_A", ".lora_B")))
    state.hooks = (
        model.register_forward_pre_hook(state.before_forward),
        model.register_forward_hook(state.after_forward),
    )
    return _coverage(model, covered, skipped)


def _nothing_matched(spec: BitFlipSpec, skipped: dict[str, str]) -> str:
    if not skipped:
        return "no layer matched: the model has no nn.Linear"
    reasons = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
    return (
        f"no layer matched include_patterns = {list(spec.include_patterns)}, "
        f"skip_patterns = {list(spec.skip_patterns)}, "
        f"layer_name_to_config = {list(spec.layer_name_to_config)}; the model's linear layers are {reasons}"
        + (f" and {len(skipped) - 3} more" if len(skipped) > 3 else "")
    )


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get is not None else None
    except NotImplementedError:  # transformers models without a head
        head = None
    return head if isinstance(head, nn.Module) else None


def _coverage(model: nn.Module, covered: list[str], skipped: dict[str, str]) -> Coverage:
    total = inside = 0
    uncovered: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):  # a look-up, not a product
            continue
        if isinstance(module, FaultyLinear):
            inside += module.weight.numel()
        weights = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        if isinstance(module, FaultyLinear):
            weights = [module.weight]
        elif weights and name not in skipped:
            uncovered[name] = f"{type(module).__name__} is not an nn.Linear"
        total += sum(p.numel() for p in weights)
    return Coverage(tuple(covered), skipped, uncovered, inside / total)


def iter_faulty(model: nn.Module) -> Iterator[tuple[str, FaultyLinear]]:
    """(module name, layer) of each faulty layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FaultyLinear))


def is_faulty(model: nn.Module) -> bool:
    """Whether any layer of the model is faulty."""
    return any(True for _ in iter_faulty(model))


def faulty_layers(model: nn.Module) -> dict[str, FaultyLinear]:
    """Module name -> faulty layer. Raises ValueError where there is none."""
    layers = dict(iter_faulty(model))
    if not layers:
        raise ValueError("this model has no faulty layers; flipproof.inject(model, spec) makes them")
    return layers


def fault_state(model: nn.Module) -> FaultState:
    """The state that the model's faulty layers share. Raises ValueError where there is none."""
    return next(iter(faulty_layers(model).values())).state


def set_tick(model: nn.Module, tick: int) -> None:
    """The next forward pass draws with this tick (0 to 2^48 - 1), the one after it with the next, and so on."""
    fault_state(model).set_tick(check_tick(tick))


def set_seed(model: nn.Module, seed: int) -> None:
    """Draw with another fault seed from now on, starting again at tick 0."""
    fault_state(model).seed = check_seed(seed)
    for layer in faulty_layers(model).values():
        layer.refresh_keys()
    set_tick(model, 0)


def set_faults(model: nn.Module, spec: BitFlipSpec) -> None:
    """Give the faulty layers other faults, adapters unchanged; layers that ``spec`` leaves alone become clean.

    The seed is ``spec.base_seed``, from tick 0.
    """
    for layer in faulty_layers(model).values():
        layer_spec = spec.for_layer(layer.site)
        layer.x_fault, layer.w_fault = (layer_spec.x, layer_spec.w) if layer_spec else (Fault(), Fault())
    fault_state(model).exact_gradient = spec.exact_gradient
    set_seed(model, spec.base_seed)


@contextmanager
def faults(
    model: nn.Module,
    *,
    flips: bool = True,
    guard: bool = True,
    adapters: bool = True,
    seed: int | None = None,
) -> Iterator[None]:
    """Within the block, with flips, guard and adapters on or off and, where given, another fault seed from tick 0.

    Seed and tick go on afterwards from where they were.
    """
    state = fault_state(model)
    before = (state.flips, state.guard, state.adapters)
    seed_before, next_before, tick_before = state.seed, state._next, state.tick
    state.flips, state.guard, state.adapters = flips, guard, adapters
    state._next = next_before.clone()
    try:
        if seed is not None:
            set_seed(model, seed)
        yield
    finally:
        state.flips, state.guard, state.adapters = before
        if state.seed != seed_before:
            set_seed(model, seed_before)
        state._next, state.tick = next_before, tick_before


def remove(model: nn.Module) -> None:
    """Put plain ``nn.Linear`` layers back, with the weights as they are; adapters are dropped."""
    _restore(model, merge_adapters=False)


def merge(model: nn.Module) -> None:
    """Put plain ``nn.Linear`` layers back, with the adapters merged into the weights: W + s·B·A."""
    _restore(model, merge_adapters=True)


@torch.no_grad()
def _restore(model: nn.Module, merge_adapters: bool) -> None:
    for hook in fault_state(model).hooks:
        hook.remove()
    plain: dict[int, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, FaultyLinear):
            continue
        if id(module) not in plain:
            if merge_adapters and module.lora_A is not None:
                module.weight.copy_(module.merged_weight())
            # on meta: no memory is taken for parameters that are replaced at once
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight, linear.bias = module.weight, module.bias
            linear.train(module.training)
            plain[id(module)] = linear
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain[id(module)])
