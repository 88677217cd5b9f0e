"""A run's result as files that other tools open: a merged Hugging Face model, or a PEFT adapter."""

import os
import shutil
from pathlib import Path
from typing import Literal

from flipproof import runlog
from flipproof.checkpoint import list_checkpoints, load_trained_weights, save_adapter, save_model
from flipproof.config import ConfigError, load_config
from flipproof.inject import inject
from flipproof.model import load_model, load_tokenizer
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
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, tokenizer, config.training.dtype, config.training.seed)
    if config.faulty:
        inject(model, config.bitflip, config.lora)
    step = load_trained_weights(checkpoints[-1], model)
    unfinished = to.with_name(f".{to.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if kind == "adapter":
        save_adapter(model, unfinished, config.model.hf_model_path)
    else:
        save_model(model, unfinished, tokenizer)
    os.rename(unfinished, to)
    logger.info("step %d of %s as a %s", step, run_dir, "PEFT adapter" if kind == "adapter" else "Hugging Face model")
    return to
