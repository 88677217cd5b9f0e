"""From a config to a model that runs: built or loaded, made faulty, spread over the processes, on its device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flipproof.config import RunConfig
from flipproof.inject import check_bits, inject
from flipproof.limits import check_positions, watch_ids
from flipproof.loss import fuse_loss
from flipproof.model import load_model, materialise, model_config, model_on_meta
from flipproof.ops.flip import BACKENDS
from flipproof.parallel import World, cast_to, parallelize
from flipproof.runlog import logger
from flipproof.spec import LoraSpec


def check_length(config: RunConfig, tokenizer: Any) -> None:
    """Raises ConfigError where ``training.seq_len`` is more than the model's positions, or there is no such model; for
    before text is read. Needs no weights."""
    check_positions(model_config(config.model, tokenizer), config.training.seq_len)


def build_model(
    config: RunConfig,
    tokenizer: Any,
    world: World,
    lora: LoraSpec | Mapping[str, LoraSpec] | None = None,
) -> nn.Module:
    """The run's model on this process's device, with the faults of ``config.bitflip`` and adapters as ``inject`` takes
    them.

    Several processes build it on the meta device and read their own shards; a single one reads it as ``transformers``
    does, which also knows older formats.

    Raises:
        ConfigError: for a model that cannot be built, or faults that match no layer.
    """
    dtype, seed = config.training.dtype, config.training.seed
    in_one_piece = world.size == 1 and config.model.init == "pretrained"
    if in_one_piece:
        model = load_model(config.model, tokenizer, dtype, seed)
    else:
        model = model_on_meta(config.model, tokenizer, dtype)
    watch_ids(model, tokenizer)
    if computed := cast_to(config.training, model):
        check_bits(config.bitflip, [computed])
    if lora or config.bitflip.any_fault:
        logger.info("%s", inject(model, config.bitflip, lora))
    fuse_loss(model)
    parallelize(model, config, world)
    if in_one_piece:
        model.to(world.device)
    else:
        materialise(model, config.model, seed, torch.device("cpu") if config.parallelism.cpu_offload else world.device)
    # no backend is chosen silently
    name = torch.cuda.get_device_name() if world.device.type == "cuda" else "the CPU"
    spread = f" in each of {world.size} processes" if world.size > 1 else ""
    logger.info("the model runs on %s%s; its bits are flipped by: %s", name, spread, BACKENDS[world.device.type])
    return model
