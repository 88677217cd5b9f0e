"""What is known of a run before its model has weights: how long it is, how much it takes, whether it can begin.

A run says it at its start; ``check`` is ``flipproof train --dry-run``, which says the same and leaves nothing behind.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from flipproof.config import DataConfig, RunConfig, TrainingConfig
from flipproof.data.document import Part, pieces
from flipproof.data.packing import holds_no
from flipproof.data.samples import encoder, instruction_format, read
from flipproof.data.source import HubData, Source, check_apart, held_out_source, training_source, whole_rows
from flipproof.data.tokens import beginning
from flipproof.errors import ConfigError
from flipproof.faults.dtypes import dtype_name
from flipproof.faults.inject import inject
from flipproof.files import check_writable
from flipproof.formats.linear import quantised_weights
from flipproof.log import logger
from flipproof.models.build import check_computed_bits, check_length, check_use, with_trainable_weights
from flipproof.models.load import held_as, load_tokenizer, model_config, skeleton
from flipproof.models.parallelize import cast_to
from flipproof.models.quantised import check_training, quantise_as_said, without_compilation
from flipproof.train.checkpoint import find_checkpoint
from flipproof.train.metrics import check_trackers, log_in
from flipproof.train.resume import begun_with
from flipproof.train.rundir import check_run_dir
from flipproof.world import processes_of

DEFAULT_STEPS = 1000
Result = TypeVar("Result")


def resolve_batch(config: RunConfig, processes: int) -> RunConfig:
    """``config`` with the accumulation that gives its global batch, if it names one.

    Raises:
        ConfigError: where none does, or another is given. 1, the default, counts as not given.
    """
    training, total = config.training, config.training.global_batch_size
    if total is None:
        return config
    rows, given = training.local_batch_size * processes, training.gradient_accumulation_steps
    each = f"local_batch_size x processes = {training.local_batch_size} x {processes}"
    micro_batches, rest = divmod(total, rows)
    if rest:
        raise ConfigError([f"training.global_batch_size = {total}: a multiple of {each} = {rows} is allowed"])
    if given not in (1, micro_batches):
        raise ConfigError(
            [
                f"training.gradient_accumulation_steps = {given}: global_batch_size = {total} with {each} is "
                f"{micro_batches}; drop one of the two"
            ]
        )
    return replace(config, training=replace(training, gradient_accumulation_steps=micro_batches))


def resolve_steps(config: RunConfig, parameters: int, processes: int, sequences: int | None = None) -> RunConfig:
    """``config`` with its accumulation, its number of steps and its warm-up in steps, whatever they follow from.

    Args:
        sequences: of the training text; while they are not known, a length in epochs stays what it is.
    """
    config = resolve_batch(config, processes)
    training, steps = config.training, config.training.steps
    a_step = config.sequences_per_step(processes)
    if training.epochs is not None:
        if sequences is None:
            return config
        steps = max(1, math.ceil(round(training.epochs * sequences / a_step, 6)))
    elif steps is None and training.tokens_per_parameter is not None:
        steps = math.ceil(training.tokens_per_parameter * parameters / (a_step * training.seq_len))
    steps, warmup = steps or DEFAULT_STEPS, training.warmup_steps
    if training.warmup_ratio is not None:
        warmup = int(round(training.warmup_ratio * steps, 6))
    if warmup > steps:
        logger.warning("training.warmup_steps = %d: the run ends after %d steps, and its learning rate never reaches "
                       "training.lr", warmup, steps)  # fmt: skip
    resolved = replace(training, steps=steps, epochs=None, warmup_steps=warmup, warmup_ratio=None)
    return replace(config, training=resolved)


def held_dtype(config: RunConfig, tokenizer: Any) -> Any:
    """The name of the dtype that a run's weights have, as far as that is known without them, else None."""
    if config.training.dtype is not None or config.model.init == "random":
        return config.training.dtype or "float32"
    named = getattr(model_config(config.model, tokenizer), "dtype", None)
    return None if named is None else dtype_name(named)


def counted_parameters(model: nn.Module, of: str | int) -> int:
    """How many parameters ``training.tokens_per_parameter_of`` means, of a model without adapters."""
    if isinstance(of, int):
        return of
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    left_out = embedding.numel() if of == "non-embedding" else 0
    return sum(parameter.numel() for parameter in model.parameters()) + quantised_weights(model) - left_out


def check_trainable(config: RunConfig) -> None:
    """Raises ConfigError for weights that AdamW could not train, and where there is no clean model to distil from or no
    validation that says which checkpoint is best."""
    problems, dtype, distill = [], config.training.dtype, config.training.distill
    if not config.lora.r and dtype in ("float16", "bfloat16"):
        problems.append(
            f"training.dtype = {dtype!r} with lora.r = 0: AdamW cannot train {dtype} weights, coarser than its "
            f"steps; use float32 with training.mixed_precision_param = {dtype!r}, or adapters (lora.r)"
        )
    if distill and not (config.lora.r and config.model.init == "pretrained"):
        seen = "model.init = 'random'" if config.lora.r else "lora.r = 0"
        problems.append(
            f"training.distill = {distill:g} with {seen}: it learns from pretrained weights without their adapters; "
            "0 is allowed, or lora.r above 0 and model.init = 'pretrained'"
        )
    if config.checkpoint.keep_best and config.training.eval_freq == 0:
        problems.append(
            "checkpoint.keep_best = True with training.eval_freq = 0: the best checkpoint is the one of the least "
            "validation loss; set eval_freq to a number of steps or 'epoch'"
        )
    if config.data.streaming:
        unknown = "is not known before its end; give a number of steps"
        if config.training.epochs is not None:
            problems.append(
                f"data.streaming = True with training.epochs = {config.training.epochs:g}: its length {unknown}"
            )
        if config.training.eval_freq == "epoch":
            problems.append(f"data.streaming = True with training.eval_freq = 'epoch': a pass's length {unknown}")
    if problems:
        raise ConfigError(problems)


def planned(config: RunConfig, tokenizer: Any, processes: int) -> RunConfig:
    """``config`` as ``resolve_steps`` has it, before its text is read.

    Raises:
        ConfigError: where there is no such model, its sequences have more positions than it, or so many processes
            cannot have it; and as ``resolve_batch`` does.
    """
    check_length(config, tokenizer)
    check_use(config, processes)
    training, counted = config.training, 0
    if training.steps is None and training.tokens_per_parameter is not None:
        shape = skeleton(config.model, tokenizer, training.dtype)
        counted = counted_parameters(shape, training.tokens_per_parameter_of)
    return resolve_steps(config, counted, processes)


def say_size(config: RunConfig, model: nn.Module, processes: int, sequences: float | None) -> None:
    """Log what a run takes and where it writes, and which keys say nothing.

    Args:
        model: with its adapters; may be on the meta device.
        sequences: that the training text has, as far as the run needs them; None where that is not known.
    """
    training = config.training
    total = sum(parameter.numel() for parameter in model.parameters()) + quantised_weights(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%s parameters, of which %s train (%.3g%%)", f"{total:,}", f"{trained:,}", 100 * trained / total)
    if config.lora.r and not config.bitflip.any_fault:
        logger.warning("no faults are configured (bitflip.w_p_exp and more): the adapters train without any")
    for line in config.in_vain():
        logger.warning("%s", line)
    a_step = config.sequences_per_step(processes)
    logger.info(
        "a step takes %d sequences of %d tokens (local_batch_size %d x processes %d x gradient_accumulation_steps %d); "
        "%s",
        a_step, training.seq_len, training.local_batch_size, processes, training.gradient_accumulation_steps,
        _length(training, a_step, sequences, config.data.streaming),
    )  # fmt: skip
    if training.control and config.bitflip.any_fault:
        logger.info("its control, trained without faults, takes as much again (training.control)")
    if training.distill:
        logger.info("a step runs the model once more, without faults, to distil from it (training.distill)")
    logger.info("all of it is written into %s", config.logging.run_dir)


def _length(training: TrainingConfig, a_step: int, sequences: float | None, streamed: bool) -> str:
    """Of a run whose steps take so many sequences of a text that has so many."""
    if training.steps is None:
        return f"it takes {training.epochs:g} passes over the text; the steps are known once it is tokenised"
    needed = a_step * training.steps
    if streamed:
        passes = "of text that is tokenised meanwhile"
    elif sequences is None:
        passes = "passes over the text are known once it is tokenised"
    elif needed > sequences:
        passes = f"{needed / sequences:.1f} passes over the text"
    else:
        passes = "at most one pass over the text"
    return f"{training.steps} steps take {needed * training.seq_len:,} tokens, {passes}"


# -- a dry run ---------------------------------------------------------------------------------------------------------


def check(config: RunConfig, resume: str | None = None) -> None:
    """Say what a run takes, and look for what would keep it from beginning. Nothing is written, other than what the
    Hub's client keeps of a model's config, its tokenizer and a data set's description, and what a GGUF file becomes.
    The weights, the text behind its beginning and the ids of its tokens, the directory's lock and the number of GPUs
    are looked at by the run itself.

    Args:
        resume: as for ``train``.

    Raises:
        ConfigError: for all that is wrong, at once.
    """
    run_dir, problems = Path(config.logging.run_dir), []

    def tried(action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except ConfigError as error:
            problems.extend(error.problems)
            return None

    def directory() -> None:
        check_writable(run_dir, "logging.run_dir")
        check_run_dir(run_dir, resume is not None)
        if (checkpoint := find_checkpoint(run_dir / "checkpoints", resume)) is not None:
            begun_with(with_trainable_weights(config), checkpoint)

    def trackers() -> None:
        check_trackers(config.logging)
        log_in(config.logging)

    processes = tried(lambda: processes_of(config.parallelism)) or 1
    config = tried(lambda: resolve_batch(config, processes)) or replace(
        config, training=replace(config.training, global_batch_size=None)
    )
    tried(lambda: check_trainable(config))
    tried(directory)
    tried(trackers)
    tokenizer = tried(lambda: load_tokenizer(config.model))
    if tokenizer is None:
        raise ConfigError(problems)
    tokens = tried(lambda: _check_text(config.data, tokenizer))
    model = tried(lambda: _without_weights(config, tokenizer))
    if model is not None and (plan := tried(lambda: planned(config, tokenizer, processes))) is not None:
        say_size(plan, model, processes, None if tokens is None else tokens / config.training.seq_len)
    if problems:
        raise ConfigError(problems)


def _without_weights(config: RunConfig, tokenizer: Any) -> nn.Module:
    """The run's model on the meta device, with its faults and adapters, in the dtype that its config names."""
    if name := held_as(config.model):
        check_training(config, name)
    model = skeleton(config.model, tokenizer, held_dtype(config, tokenizer))
    quantise_as_said(model, config.model, model_config(config.model, tokenizer))
    config = without_compilation(config, model)
    check_computed_bits(config, model)
    if config.faulty:
        logger.info("%s", inject(model, config.bitflip, config.lora, computed=cast_to(config.training, model)))
    return model


def _check_text(data: DataConfig, tokenizer: Any) -> float | None:
    """Read the beginning of the training and of the held-out text; about how many tokens there are to train on, where
    that takes no more reading. Raises ConfigError where there is none."""
    beginning(data.bos, tokenizer)
    measured, part = held_out_source(data)
    check_apart(data)
    tokens: float | None = None
    all_text = True
    parts: list[tuple[Source, Part]] = [(training_source(data), "training"), (measured, part)]
    for source, part in parts:
        if isinstance(source, HubData):
            source.check()
            all_text = False  # for all that is known
            continue
        if (format := instruction_format(data, source, part)) is not None:
            all_text = False
            samples = read(whole_rows(source), part, encoder(data, format, tokenizer))
            if next((sample for sample in samples if sample is not None), None) is None:
                raise holds_no("sample with an answer", source.name, part)
            continue
        piece = next((piece for span in source.spans(part) for piece in pieces(span)), None)
        if piece is None:
            raise holds_no("text", source.name, part)
        if part == "training" and source.is_text:
            size = sum(span.end - span.start for span in source.spans(part))
            tokens = size * len(tokenizer.encode(piece.text)) / len(piece.text.encode(errors="replace"))
    for line in data.in_vain_of_text() if all_text else ():
        logger.warning("%s", line)
    return tokens if data.max_tokens is None or tokens is None else min(tokens, data.max_tokens)
