"""Swapping faulty layers into a model and out again, and saying what is covered.

``inject`` replaces each matching ``nn.Linear`` by a ``FaultyLinear`` that holds the same parameters, in place, also
on the meta device; likewise an embedding, and attention (``attention.py``), where they are asked for. They share one
``FaultState`` (``state.py``), which hooks on the root module advance. What can fail comes first: an ``inject`` that
raises leaves the model as it was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from flipproof.errors import ConfigError, first_of
from flipproof.faults import attention
from flipproof.faults.coverage import Coverage, coverage_of, nothing_matched
from flipproof.faults.dtypes import DTYPES, dtype_name
from flipproof.faults.embedding import FaultyEmbedding
from flipproof.faults.fault import Fault
from flipproof.faults.fitted import read_guards
from flipproof.faults.layouts import ELEMENT_BITS
from flipproof.faults.linear import FaultyLinear, keep_hooks
from flipproof.faults.matching import adapters_by_layer, check_layers_of_adapters, unmatched_patterns
from flipproof.faults.philox import check_tick
from flipproof.faults.quantised import FaultyQuantisedLinear, check_parts
from flipproof.faults.same_model import check_fitted, site_name
from flipproof.faults.spec import OPERANDS, BitFlipSpec, LoraSpec
from flipproof.faults.state import FaultSite, FaultState
from flipproof.faults.ties import merge_adapters
from flipproof.formats.linear import QuantisedLinear
from flipproof.log import logger
from flipproof.values import Seed, checked

_SPREADS = (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule)
_LINEAR = (nn.Linear, QuantisedLinear)
HEAD_NAMES = ("lm_head", "output", "embed_out", "head")


def inject(
    model: nn.Module,
    spec: BitFlipSpec,
    lora: LoraSpec | Mapping[str, LoraSpec] | None = None,
    *,
    computed: torch.dtype | None = None,
) -> Coverage:
    """Make the linear layers of ``model`` faulty, in place; and its head, embedding and KV cache, if ``spec`` says so.

    Every ``nn.Linear`` but the output head is swapped, unless ``spec`` says otherwise. With adapters (``lora.r`` > 0)
    everything else is frozen, as PEFT does; without, which parameters train is left as it is.

    Args:
        model: any module; its forward is what a tick counts. May be on the meta device.
        spec: what flips where.
        lora: adapters for the same linear layers, or for those that ``target_modules`` or a mapping by name chooses,
            which need have no faults. None or r = 0 is none.
        computed: the dtype that autocast or FSDP casts weights to, where that is another than theirs: bits flip in it,
            and fitted guards are to be of it.

    Returns:
        What was covered.

    Raises:
        ConfigError: where nothing matches, naming the patterns; where weights that no swap can reach would be left out
            without a word, naming their share of the FLOPs; where there is no linear layer that adapters are meant for;
            where fitted guards are of another model, dtype or basis.
        ValueError: where the model is injected already, or wrapped by what spreads it over processes.
    """
    if not isinstance(spec, BitFlipSpec):
        raise ConfigError([f"spec = {spec!r}: a BitFlipSpec is allowed, such as BitFlipSpec(w_p_exp=1e-5)"])
    _check_use(spec)
    lora = lora or LoraSpec()
    if is_faulty(model):
        raise ValueError("this model has faulty layers already; flipproof.remove(model) takes them out")
    _check_unwrapped(model)
    check_bits(spec, (parameter.dtype for parameter in model.parameters()))
    for line in unmatched_patterns(spec, _matchable(model, spec)):
        logger.warning("%s", line)
    head = output_head(model)
    plain = {site_name(name): module is head for name, module in model.named_modules() if type(module) in _LINEAR}
    lora = adapters_by_layer(lora, plain)
    planned: dict[int, tuple[str, str]] = {}  # id -> (site, kind)
    names: dict[str, int] = {}  # of linear layers to swap; one may have several
    adapted: dict[str, int] = {}  # those that get an adapter and no faults
    skipped: dict[str, str] = {}
    meant: list[nn.Module] = []  # of bitflip.sites, whether or not they have faults
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in _LINEAR:
            continue
        site = planned[id(module)][0] if id(module) in planned else site_name(name)
        kind = "head" if module is head or (head is None and site in HEAD_NAMES) else "linear"
        layer_spec = spec.for_layer(site)
        if kind in spec.sites and layer_spec is not None:
            meant.append(module)
        alone = (kind not in spec.sites or layer_spec is None) and isinstance(lora, Mapping) and lora.get(site)
        if name and alone:
            planned.setdefault(id(module), (site, kind))
            adapted[name] = id(module)
            skipped[name] = "an adapter, no faults"
        elif kind not in spec.sites:
            skipped[name] = "the output head" if kind == "head" else "not among bitflip.sites"
        elif layer_spec is None:
            skipped[name] = "skipped by the config"
        elif not (layer_spec.x.active or _weight_active(module, layer_spec) or _lora_of(lora, site)):
            skipped[name] = "no fault configured"
        elif not name:
            raise ValueError("the model itself is an nn.Linear; put it in a module to inject it")
        else:
            planned.setdefault(id(module), (site, kind))
            names[name] = id(module)
    if isinstance(lora, Mapping):
        check_layers_of_adapters(lora, {site for site, _ in planned.values()})
    elif lora and not names:
        nothing = nothing_matched(spec, skipped)
        raise ConfigError([f"lora.r = {lora.r}: adapters are made on linear layers of bitflip.sites; {nothing}"])
    coverage = coverage_of(model, names, skipped, spec)
    table, table_name = _embedding(model)
    table_spec = _table_spec(table, table_name, spec)
    kv_faults = attention.planned(model, spec)
    check_parts(spec, meant, bool(table_spec))
    if not (names or adapted or table_spec or kv_faults):
        raise ConfigError([nothing_matched(spec, skipped)])
    _check_layers(model, names | adapted)
    state = FaultState(spec.base_seed, spec.exact_gradient)
    state.computed = computed
    if spec.guards:
        state.guards = read_guards(spec.guards)
        for name, fault in kv_faults.items():
            state.guards.check([f"{name}/k", f"{name}/v"], fault)
        if table_spec:
            state.guards.check([f"{site_name(table_name)}/w"], table_spec.w, (table.num_embeddings, 1))
    swapped: dict[int, FaultyLinear] = {}
    for name, which in (names | adapted).items():
        if which in swapped:
            continue
        site, kind = planned[which]
        layer_spec, linear = spec.for_layer(site), model.get_submodule(name)
        layer_spec, own = None if name in adapted else layer_spec, _lora_of(lora, site)
        if isinstance(linear, QuantisedLinear):
            swapped[which] = FaultyQuantisedLinear(linear, site, layer_spec, own, state, kind)
            continue
        x_fault, w_fault = (layer_spec.x, layer_spec.w) if layer_spec else (Fault(), Fault())
        # tied weights are one memory
        w_site = site_name(table_name) if getattr(table, "weight", None) is linear.weight else None
        swapped[which] = FaultyLinear(linear, site, x_fault, w_fault, own, state, kind, w_site)  # type: ignore[arg-type]
    if state.guards is not None:
        faulty = [*swapped.values(), *([table] if table_spec else [])]
        check_fitted(model, state.guards, state, faulty)

    # Whatever can fail has not: from here on the model changes.
    for name, which in (names | adapted).items():
        _put(model, name, swapped[which])
    if table_spec is not None:
        FaultyEmbedding.make(table, site_name(table_name), table_spec.w, state)
    attention.install(model, kv_faults, state)
    if lora:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith((".lora_A", ".lora_B")))
    state.sites = list(fault_sites(model).values())
    state.watch(model)
    return replace(coverage, memories=(*([table_name] if table_spec else []), *kv_faults))


def _weight_active(module: nn.Module, spec: BitFlipSpec) -> bool:
    return any(fault.active for fault in (spec.stored if isinstance(module, QuantisedLinear) else [spec.w]))


def _check_use(spec: BitFlipSpec) -> None:
    if problems := spec.in_vain():
        raise ConfigError(problems)


def _check_unwrapped(model: nn.Module) -> None:
    """Raises ConfigError where something spreads the model over processes or memories already: it knows the parameters
    that it found, and would neither gather, average nor fetch those of layers that come later."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):  # accelerate fetches its weights when it runs
            placed = getattr(model, "hf_device_map", None)
            where = ", ".join(sorted({str(device) for device in placed.values()})) if placed else "elsewhere"
            raise ConfigError(
                [
                    f"{name or 'the model'}'s weights are where accelerate placed them ({where}); load it onto one "
                    'device, without device_map or with {"": device}'
                ]
            )
        if isinstance(module, _SPREADS):
            kind = "fully_shard" if isinstance(module, FSDPModule) else type(module).__name__
            where = f" at {name}" if name else ""
            raise ConfigError([f"{kind}{where} is around the model already; inject first, then wrap"])


def _check_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ConfigError for linear layers whose weights are not two plain parameters of a dtype whose bits flip."""
    problems = []
    for name in names:
        if isinstance(layer := model.get_submodule(name), QuantisedLinear):
            continue
        own = dict(layer.named_parameters(recurse=False))
        if more := own.keys() - {"weight", "bias"}:
            problems.append(f"{name} computes its weight from {', '.join(sorted(more))}: make it a plain one first")
        elif own["weight"].dtype not in DTYPES:
            allowed = ", ".join(map(dtype_name, DTYPES))
            problems.append(f"{name}: its weights are {dtype_name(own['weight'].dtype)}; allowed are {allowed}")
    if problems:
        raise ConfigError([first_of(problems)])


def _lora_of(lora: LoraSpec | Mapping[str, LoraSpec], site: str) -> LoraSpec:
    return lora.get(site, LoraSpec()) if isinstance(lora, Mapping) else lora


def _matchable(model: nn.Module, spec: BitFlipSpec) -> list[str]:
    """Names of all that patterns may be about. What an output head is called elsewhere is always known: leaving it
    alone is no slip."""
    attentions = attention.attention_modules(model) if spec.any_kv_fault else {}
    return [
        *HEAD_NAMES,
        *(
            site_name(name)
            for name, module in model.named_modules(remove_duplicate=False)
            if name in attentions
            or isinstance(module, QuantisedLinear)
            or any(weight.dim() >= 2 for weight in module.parameters(recurse=False))
        ),
    ]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def check_bits(spec: BitFlipSpec, dtypes: Iterable[torch.dtype]) -> None:
    """Raises ConfigError for bits in ``spec`` that values of these dtypes do not have."""
    problems = []
    for dtype in sorted({dtype_name(dtype) for dtype in dtypes} & ELEMENT_BITS.keys()):
        for changed in spec.variants():
            for operand in OPERANDS:
                try:
                    changed.pattern(operand).bit_probabilities(0.0, 0.0, dtype)
                except ValueError as problem:
                    problems.append(f"bitflip.{operand}_p_bits or {operand}_protected_bits, {problem}")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def _embedding(model: Any) -> tuple[Any, str]:
    """(the input embedding, its name), or (None, "")."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:
        embedding = None
    return embedding, next((name for name, module in model.named_modules() if module is embedding), "")


def _table_spec(table: Any, name: str, spec: BitFlipSpec) -> BitFlipSpec | None:
    """The spec of the input embedding, where it is to be faulty."""
    if "embedding" not in spec.sites:
        return None
    layer_spec = spec.for_layer(site_name(name))
    if layer_spec is None or not layer_spec.w.active:
        return None
    if not isinstance(table, nn.Embedding):
        raise ConfigError([f"bitflip.sites: the input embedding is a {type(table).__name__}, not an nn.Embedding"])
    if table.max_norm is not None:
        raise ConfigError(["bitflip.sites: an embedding with max_norm changes its own weights and cannot be faulty"])
    return layer_spec


def output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get is not None else None
    except NotImplementedError:  # transformers models without a head
        head = None
    return head if isinstance(head, nn.Module) else None


def fault_sites(model: nn.Module) -> dict[str, FaultSite]:
    """Module name -> whatever has faults."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FaultSite)}


def iter_faulty(model: nn.Module) -> Iterator[tuple[str, FaultyLinear]]:
    """(module name, layer) of each faulty layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, FaultyLinear))


def is_faulty(model: nn.Module) -> bool:
    """Whether anything in the model is faulty."""
    return any(isinstance(module, FaultSite) for module in model.modules())


def faulty_layers(model: nn.Module) -> dict[str, FaultyLinear]:
    """Module name -> faulty layer. Raises ValueError where there is none."""
    layers = dict(iter_faulty(model))
    if not layers:
        raise ValueError("this model has no faulty layers; flipproof.inject(model, spec) makes them")
    return layers


def fault_state(model: nn.Module) -> FaultState:
    """The state that all that is faulty in the model shares. Raises ValueError where there is nothing."""
    sites = fault_sites(model) or faulty_layers(model)  # which says what is wrong
    return next(iter(sites.values())).state


def set_tick(model: nn.Module, tick: int) -> None:
    """The next forward pass draws with this tick (0 to 2^48 - 1), the one after it with the next, and so on."""
    fault_state(model).set_tick(check_tick(tick))


def set_seed(model: nn.Module, seed: int) -> None:
    """Draw with another fault seed from now on, starting again at tick 0."""
    fault_state(model).seed = checked("seed", seed, Seed)
    for site in fault_sites(model).values():
        site.refresh_keys()
    set_tick(model, 0)


def set_faults(model: nn.Module, spec: BitFlipSpec) -> None:
    """Give what ``inject`` made faulty other faults, adapters unchanged; what ``spec`` leaves alone becomes clean.

    The seed is ``spec.base_seed``, from tick 0.

    Raises:
        ConfigError: where ``spec`` has guards that are not of this model, as ``inject`` does; the faults stay as they
            were then.
    """
    _check_use(spec)
    state, guards = fault_state(model), read_guards(spec.guards) if spec.guards else None
    there = [site for site in fault_sites(model).values() if site.kind in spec.sites and spec.for_layer(site.site)]
    check_parts(
        spec,
        [site for site in there if isinstance(site, nn.Linear)],
        table=any(isinstance(site, FaultyEmbedding) for site in there),
    )
    if guards is not None and (state.fitting is None or guards.digest != state.fitting.digest):
        check_fitted(model, guards, state)
    found = [
        (site, site.faults_of(spec.for_layer(site.site) if site.kind in (*spec.sites, "kv") else None, guards))
        for site in fault_sites(model).values()
    ]
    # Whatever can fail has not.
    for site, own in found:
        for name, value in own.items():
            setattr(site, name, value)
    state.guards, state.exact_gradient = guards, spec.exact_gradient
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
    for name, value in (("flips", flips), ("guard", guard), ("adapters", adapters)):
        if not isinstance(value, bool):
            raise ConfigError([f"{name} = {value!r}: True or False is allowed"])
    before = (state.flips, state.guard, state.adapters)
    state.flips, state.guard, state.adapters = flips, guard, adapters
    with state.draws_apart():
        try:
            if seed is not None:
                set_seed(model, seed)
            yield
        finally:
            state.flips, state.guard, state.adapters = before


def remove(model: nn.Module) -> None:
    """Put plain ``nn.Linear`` layers back, with the weights as they are; adapters are dropped.

    Raises:
        ValueError: where nothing is faulty, or FSDP or accelerate hold the weights of the faulty layers.
    """
    _check_restorable(model)
    _restore(model)


def merge(model: nn.Module) -> None:
    """Put plain ``nn.Linear`` layers back, with the adapters merged into the weights: W + s·B·A.

    A layer with an adapter whose weight other modules hold too, as a head tied to the embedding, gets one of its own;
    the config of a ``transformers`` model says then that its weights are not tied.

    Raises:
        ValueError: as ``remove`` does.
    """
    _check_restorable(model)
    for layer in model.modules():
        if isinstance(layer, FaultyQuantisedLinear) and layer.lora_A is not None:
            layer.merged_weight()  # which says why there is none
    merge_adapters(model)
    _restore(model)


def _check_restorable(model: nn.Module) -> None:
    fault_state(model)
    # FSDP may have gathered its weights, and shared ones are DTensors without it
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if sharded or any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in model.modules()):
        raise ConfigError(
            ["this model is sharded: its faulty layers stay; flipproof export writes a run's model without them"]
        )
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConfigError(
            [
                "accelerate fetches this model's weights when it runs; take its hooks off first: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            ]
        )


def _restore(model: nn.Module) -> None:
    for hook in fault_state(model).hooks:
        hook.remove()
    if any(site.kind == "kv" for site in fault_sites(model).values()):
        attention.uninstall(model)
    plain: dict[int, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FaultyEmbedding):
            module.unmake()
        if not isinstance(module, FaultyLinear):
            continue
        if id(module) not in plain:
            linear = module.plain()
            linear.train(module.training)
            keep_hooks(linear, module)
            plain[id(module)] = linear
        _put(model, name, plain[id(module)])
