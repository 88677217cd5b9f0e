"""From a config to a model that runs: built or loaded, made faulty, spread over the processes, on its device."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flipproof.config import RunConfig, TrainingConfig
from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.fitted import read_guards
from flipproof.faults.inject import check_bits, fault_state, inject
from flipproof.faults.op import BACKENDS
from flipproof.faults.same_model import check_fitted, dtype_that_flips
from flipproof.faults.spec import OPERANDS, BitFlipSpec, LoraSpec
from flipproof.log import logger
from flipproof.models.frozen import may_share, share_rows
from flipproof.models.gguf import plain_directory
from flipproof.models.limits import check_positions, watch_ids
from flipproof.models.load import held_as, load_model, materialise, model_config, model_on_meta, skeleton
from flipproof.models.loss import fuse_loss
from flipproof.models.parallelize import blocks, cast_to, mesh_of, parallelize, reach_each_other
from flipproof.models.quantised import Part, check_spread, check_training, unshared, without_compilation
from flipproof.models.weights import KEY, own_dtype
from flipproof.world import World, node_size


def check_length(config: RunConfig, tokenizer: Any) -> None:
    """Raises ConfigError where ``training.seq_len`` is more than the model's positions, or there is no such model; for
    before text is read. Needs no weights."""
    check_positions(model_config(config.model, tokenizer), config.training.seq_len)


def check_use(config: RunConfig, processes: int) -> str | None:
    """The name of the format that the model's weights are held in, None of plain ones. Raises ConfigError where so many
    processes cannot have it so. Needs no weights."""
    name = held_as(config.model)
    check_spread(config.parallelism, processes, node_size(processes), name)
    return name


def _shares_of(config: RunConfig, tokenizer: Any, world: World, name: str) -> Part | None:
    """What leaves this process's part of a layer whose weight is in the format of this name; None where each process
    has all. Raises ConfigError, before weights are read, where they cannot be shared; all processes must call."""
    if world.size == 1 or config.parallelism.sharding_strategy == "no_shard":
        return None
    mesh = mesh_of(world)
    plain = skeleton(replace(config.model, quantize=None, quantize_inputs=None), tokenizer, config.training.dtype)
    shards = mesh["shard"].size()
    if not may_share(plain.requires_grad_(False), blocks(plain), shards):
        raise unshared(config.parallelism, name, f"over {shards} processes, by which its rows do not divide")
    if not reach_each_other(world):
        raise unshared(config.parallelism, name, "on GPUs that do not read each other's memory")
    return lambda layer: share_rows([layer], mesh)


def with_trainable_weights(config: RunConfig) -> RunConfig:
    """The config of a training, with weights that can train: where they themselves do (lora.r = 0), those of a 16-bit
    checkpoint become float32, and the model computes, and flips bits, in the checkpoint's dtype."""
    training, path = config.training, config.model.hf_model_path
    if name := held_as(config.model):
        check_training(config, name)
        return config
    if config.lora.r or training.dtype is not None or path is None or config.model.init == "random":
        return config
    own = dtype_name(own_dtype(plain_directory(path, KEY)))
    if own not in ("bfloat16", "float16"):
        return config
    computed: Any = training.mixed_precision_param or own
    logger.info(
        "lora.r = 0: %s weights are coarser than AdamW's steps; they train in float32 (training.dtype), and the model "
        "computes in %s (training.mixed_precision_param)",
        own,
        computed,
    )
    return replace(config, training=replace(training, dtype="float32", mixed_precision_param=computed))


def build_model(
    config: RunConfig,
    tokenizer: Any,
    world: World,
    lora: LoraSpec | Mapping[str, LoraSpec] | None = None,
) -> nn.Module:
    """The run's model on this process's device, with the faults of ``config.bitflip`` and adapters as ``inject`` takes
    them.

    Several processes build it on the meta device and read their own shards; a single one reads it as ``transformers``
    does, which also knows older formats. Of one whose layers are quantised each process reads one layer after the other
    and keeps its rows, or all of it.

    Raises:
        ConfigError: for a model that cannot be built, or faults that match no layer.
    """
    quantised = check_use(config, world.size)
    dtype, seed = config.training.dtype, config.training.seed
    in_one_piece = config.model.init == "pretrained" and (world.size == 1 or quantised is not None)
    if in_one_piece:
        part = _shares_of(config, tokenizer, world, quantised) if quantised else None
        model = load_model(config.model, tokenizer, dtype, seed, world.device, part)
        config = without_compilation(config, model)
        if quantised:
            model.requires_grad_(False)  # what is beside its weights, too: adapters alone train
    else:
        model = model_on_meta(config.model, tokenizer, dtype)
    watch_ids(model, tokenizer)
    if keys := unguarded(config.bitflip):
        logger.warning("flips without a guard (%s): a flipped exponent bit makes up to 1e38 of a small number; "
                       "flipproof profile proposes thresholds", keys)  # fmt: skip
    check_computed_bits(config, model)
    if lora or config.bitflip.any_fault:
        logger.info("%s", inject(model, config.bitflip, lora, computed=cast_to(config.training, model)))
    fuse_loss(model)
    parallelize(model, config, world)
    if in_one_piece:
        if part is None:  # else it is there
            model.to(world.device)
    else:
        materialise(model, config.model, seed, torch.device("cpu") if config.parallelism.cpu_offload else world.device)
        # ``inject`` saw no weights
        check_guards(config.bitflip.guards, model, world, from_scratch=config.model.init == "random")
    # no backend is chosen silently
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "the CPU"
    spread = f" in each of {world.size} processes" if world.size > 1 else ""
    logger.info("the model runs on %s%s; its bits are flipped by: %s", name, spread, BACKENDS[world.device.type])
    return model


def check_guards(
    path: str | None, model: nn.Module, world: World, near: bool = True, from_scratch: bool = False
) -> None:
    """Raises ConfigError, in all processes, where the fitted guards of a directory, if there is one, are of another
    model, dtype or basis. Of a sharded model each looks at its part.

    Args:
        near: as for ``Guards.check_model``.
        from_scratch: whether the weights are still to be trained, behind guards that were fitted to a model of this
            shape.
    """
    problems: list[str] = []
    if path:
        try:
            guards = read_guards(path)
            guards = replace(guards, moved=True) if from_scratch else guards
            check_fitted(model, guards, fault_state(model), near=near)
        except ConfigError as error:
            problems = error.problems
    for found in world.gathered(problems):
        if found:
            raise ConfigError(found)


def check_computed_bits(config: RunConfig, model: nn.Module) -> None:
    """Raises ConfigError where the model cannot be computed with in the config's dtype, or faults name bits that this
    dtype does not have."""
    if computed := cast_to(config.training, model):
        _check_computed(computed, model)
        check_bits(config.bitflip, [computed])


def _check_computed(dtype: torch.dtype, model: nn.Module) -> None:
    """Raises ConfigError for float32, which autocast would silently not compute 16-bit weights in."""
    if dtype == torch.float32:
        held = dtype_name(next(model.parameters()).dtype)
        raise ConfigError(
            [
                f"training.mixed_precision_param = 'float32': the weights are {held}; set training.dtype = 'float32' "
                "to compute in it"
            ]
        )


def flipped_dtype(training: TrainingConfig, model: nn.Module) -> str:
    """The name of the dtype whose bits flip, as ``dtype_that_flips`` has it."""
    return dtype_that_flips(model, cast_to(training, model))


def unguarded(spec: BitFlipSpec) -> str:
    """The keys by which exponent bits flip where no guard zeroes what comes of it, with their values; "" without."""
    found: dict[str, None] = {}
    for variant in spec.variants():
        for operand in OPERANDS:
            t, of = f"{operand}_zero_out_t", vars(variant)
            if of[t] is None and not spec.guards:
                bits = {name: p for name, p in of[f"{operand}_p_bits"].items() if p and name not in ("sign", "frac")}
                keys = {f"{operand}_p_exp": of[f"{operand}_p_exp"], f"{operand}_p_row": of[f"{operand}_p_row"]}
                keys[f"{operand}_p_bits"] = bits
                if operand == "w" and of["w_scale_zero_out_t"] is None:
                    keys |= {key: of[key] for key in ("w_scale_p_exp", "w_global_p")}
                if operand == "x":
                    keys["x_scale_p_exp"] = of["x_scale_p_exp"]
                found |= {f"bitflip.{key} = {value!r} and no {t}": None for key, value in keys.items() if value}
    return ", ".join(found)
