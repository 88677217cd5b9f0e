"""A run's result as files that other tools open: a merged Hugging Face model, or a PEFT adapter."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from flipproof.config import load_written
from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.fitted import Guards, read_guards
from flipproof.faults.quantised import cannot_merge
from flipproof.files import check_writable, write_atomically
from flipproof.formats.config import quantization_config
from flipproof.formats.spec import format_of
from flipproof.log import logger
from flipproof.measure.card import CARD
from flipproof.models.build import build_model
from flipproof.models.load import held_as, load_tokenizer
from flipproof.models.quantised import save_quantised
from flipproof.models.save import new_directory
from flipproof.records import CONFIG, GUARDS
from flipproof.train.checkpoint import list_checkpoints, load_trained_weights, step_of, whole_checkpoint
from flipproof.train.ending import card, rotates, write_weights
from flipproof.world import join_world


def export(
    run_dir: Path,
    to: Path,
    kind: Literal["model", "adapter"] = "model",
    step: int | None = None,
    quantize: str | None = None,
    quantize_inputs: str | None = None,
) -> Path:
    """Write the last checkpoint of a run, finished or not, or that of a step, into the new directory ``to``, which
    is whole or not there; with a card, and with the fitted guards that it was trained behind, if any; of merged weights
    with their own largest values.

    Args:
        kind: "model" for a Hugging Face model with the adapters merged, "adapter" for PEFT.
        quantize: a format by name, which the linear layers of a model are written in, all but the head; guards stay
            behind, being of other weights.
        quantize_inputs: int8 or fp8, in which inputs of these layers are quantised where it is served.

    Raises:
        ConfigError: where there is no run or checkpoint, ``to`` exists or cannot be written, or a weight is not
            finite; nothing is written then.
    """
    if os.path.lexists(to):
        raise ConfigError([f"--to {to} exists already; name a new directory"])
    check_writable(to, "--to")
    if not (run_dir / CONFIG).exists():
        raise ConfigError([f"{run_dir} holds no run ({CONFIG} is missing)"])
    config = load_written(run_dir / CONFIG)
    config = replace(config, bitflip=config.bitflip.without_vain())
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise ConfigError([f"{run_dir} holds no complete checkpoint"])
    if step is not None:
        chosen = [path for path in checkpoints if step_of(path) == step]
        if not chosen:
            there = ", ".join(str(step_of(path)) for path in checkpoints)
            raise ConfigError([f"--step {step}: {run_dir} has checkpoints of steps {there}"])
        checkpoints = chosen
    format = None if quantize is None else format_of(quantize)
    inputs = None if quantize_inputs is None else format_of(quantize_inputs)
    if inputs is not None and format is None:
        raise ConfigError(
            [f"--quantize-inputs {quantize_inputs}: the weights are plain; name their format (--quantize)"]
        )
    held = held_as(config.model)
    if format is not None:
        quantization_config(format, inputs=inputs)
        if held is not None:
            raise ConfigError([f"--quantize {quantize}: {cannot_merge(held)}"])
        if kind == "adapter":
            raise ConfigError([f"--quantize {quantize}: adapters are not quantised; leave out --format adapter"])
    if kind == "adapter" and not config.lora.r:
        raise ConfigError([f"{run_dir} trained no adapter (lora.r = 0); export it with --format model"])
    guards = None
    if (run_dir / GUARDS).is_file():  # the run's own copy, whatever became of those that it was begun with
        guards = read_guards(str(run_dir))
        config = replace(config, bitflip=replace(config.bitflip, guards=str(run_dir)))
    # as many processes as there are, whatever trained it
    strategy: Any = "full_shard" if held is None else "no_shard"
    parallelism = replace(
        config.parallelism, fsdp_degree=None, replicas=None, sharding_strategy=strategy, cpu_offload=False
    )
    config = replace(config, parallelism=parallelism)
    with join_world(parallelism) as world:
        if format is not None and world.size > 1:
            raise ConfigError([f"--quantize {quantize} works in one process; {world.size} were started"])
        whole_checkpoint(checkpoints[-1], world=world)
        tokenizer = load_tokenizer(config.model)
        model = build_model(config, tokenizer, world, config.lora)
        done = load_trained_weights(checkpoints[-1], model)
        what = f"checkpoint {checkpoints[-1]}"
        try:
            with new_directory(to, world) as new:
                if format is not None:
                    guards = None
                    save_quantised(model, new, tokenizer, format, what, inputs)
                else:
                    write_weights(new, kind, model, config, tokenizer, world, what, guards)
                text = card(config, run_dir, kind, to.name, done, model)
                world.once(lambda: write_atomically(new / CARD, text))
        except (OSError, SafetensorError) as error:
            raise ConfigError([f"--to {to} cannot be written: {error}"]) from error
    kind_of = "PEFT adapter" if kind == "adapter" else "Hugging Face model" + (f" in {quantize}" if quantize else "")
    kind_of += f", its inputs {quantize_inputs}" if quantize_inputs else ""
    opened = ", which flipproof opens, transformers alone does not" if rotates(model) else ""
    logger.info("step %d of %s as a %s%s", done, run_dir, kind_of, opened)
    if guards:
        logger.info("its guards came along: --bitflip.guards %s%s", to, _as_trained(model, guards))
    return to


def _as_trained(model: Any, guards: Guards) -> str:
    """The flag with which a model that is written in a wider dtype than the run flipped bits of flips those."""
    written = {dtype_name(parameter.dtype) for parameter in model.parameters()}
    return f" --training.dtype {guards.dtype}" if written == {"float32"} != {guards.dtype} else ""
