"""A run's result as files that other tools open: a merged Hugging Face model, or a PEFT adapter."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flipproof import parallel, runlog
from flipproof.adapter import save_adapter
from flipproof.build import build_model
from flipproof.checkpoint import list_checkpoints, load_trained_weights
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.model import load_tokenizer, save_model
from flipproof.runlog import logger


def export(run_dir: Path, to: Path, kind: Literal["model", "adapter"] = "model") -> Path:
    """Write the last checkpoint of a run, finished or not, into the new directory ``to``.

    Args:
        kind: "model" for a Hugging Face model with the adapters merged, "adapter" for PEFT.

    Raises:
        ConfigError: where there is no run or checkpoint, or ``to`` exists; nothing is written then.
    """
    if to.exists():
        raise ConfigError([f"--to {to} exists already; name a new directory"])
    if not (run_dir / runlog.CONFIG).exists():
        raise ConfigError([f"{run_dir} holds no run ({runlog.CONFIG} is missing)"])
    config = load_config([run_dir / runlog.CONFIG])
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise ConfigError([f"{run_dir} holds no complete checkpoint"])
    if kind == "adapter" and not config.lora.r:
        raise ConfigError([f"{run_dir} trained no adapter (lora.r = 0); export it with --format model"])
    # as many processes as there are, whatever trained it
    parallelism = replace(
        config.parallelism, fsdp_degree=None, replicas=None, sharding_strategy="full_shard", cpu_offload=False
    )
    config = replace(config, parallelism=parallelism)
    unfinished = to.with_name(f".{to.name}.unfinished")
    with parallel.start(parallelism) as world:
        tokenizer = load_tokenizer(config.model)
        model = build_model(config, tokenizer, world, config.lora)
        step = load_trained_weights(checkpoints[-1], model)
        if world.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        world.wait()
        if kind == "adapter":
            save_adapter(model, unfinished, config.model.hf_model_path, writes=world.first)
        else:
            save_model(model, unfinished, tokenizer, world)
        if world.first:
            os.rename(unfinished, to)
    logger.info("step %d of %s as a %s", step, run_dir, "PEFT adapter" if kind == "adapter" else "Hugging Face model")
    return to
