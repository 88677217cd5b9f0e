"""The training loop. LoRA, full training and training from scratch are options of it, not loops of their own.

A run writes its directory as the README lists it. Everything that a step does is a function of the config and the step
number (data order, learning rate, fault ticks), so a checkpoint holds only what training changes, and a run that was
killed and resumed ends with the bits of one that never was.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from flipproof import runlog
from flipproof.checkpoint import list_checkpoints, load_checkpoint, save_adapter, save_checkpoint, save_model
from flipproof.config import ConfigError, RunConfig, TrainingConfig
from flipproof.data import PackedText, load_text, training_indices
from flipproof.evaluate import (
    BASE_ARMS,
    TRAINED_ARMS,
    Arm,
    arms_table,
    measure_config_arms,
    write_results,
)
from flipproof.inject import inject, is_faulty, set_tick
from flipproof.model import compute_context, load_model, load_tokenizer, to_device
from flipproof.runlog import Metrics, logger, peak_memory_gib, write_atomically


def train(config: RunConfig, resume: bool = False) -> Path:
    """Run a training from its config; returns the run directory.

    Args:
        config: the whole run.
        resume: continue from the last checkpoint of ``config.logging.run_dir``; where there is none, start.

    Raises:
        ConfigError: before anything is written, where the config, the data or the model is at fault.
    """
    check_processes(config)
    training, run_dir = config.training, Path(config.logging.run_dir)
    runlog.check_run_dir(run_dir, resume)
    tokenizer = load_tokenizer(config.model)
    needed = training.steps * training.gradient_accumulation_steps * training.local_batch_size
    text, held_out = load_text(config.data, tokenizer, training.seq_len, needed)
    model = to_device(load_model(config.model, tokenizer, training.dtype, training.seed))
    if config.faulty:
        logger.info("%s", inject(model, config.bitflip, config.lora))
    optimizer = make_optimizer(model, training)

    step = 0
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if checkpoints:
        step = load_checkpoint(checkpoints[-1], model, optimizer)
        logger.info("resumed from %s", checkpoints[-1])
    else:
        torch.manual_seed(training.seed)  # dropout, in the models that have it
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / runlog.CONFIG, config.to_toml())

    # What the model was before training; a model from scratch was nothing.
    base_arms = BASE_ARMS if config.faulty and config.model.init == "pretrained" else ()
    arms = _saved_arms(run_dir) if step else measure_config_arms(config, base_arms, model, held_out)
    write_results(run_dir, config, arms, model, held_out)

    _run_steps(config, model, optimizer, text, step)

    if config.lora.r:
        save_adapter(model, run_dir / "adapter", config.model.hf_model_path)
    else:
        save_model(model, run_dir / "model", tokenizer)
    arms |= measure_config_arms(config, TRAINED_ARMS if config.faulty else ("clean",), model, held_out)
    write_results(run_dir, config, arms, model, held_out)
    logger.info("%s", arms_table(arms))
    return run_dir


def check_processes(config: RunConfig) -> None:
    """Raises ConfigError where the processes started are not those that the config shards over."""
    world_size, degree = int(os.environ.get("WORLD_SIZE", "1")), config.parallelism.fsdp_degree
    if world_size > 1:
        raise ConfigError([f"{world_size} processes were started; sharded training is not there yet, start one"])
    if degree != 1:
        raise ConfigError(
            [f"parallelism.fsdp_degree = {degree}, but 1 process was started; set --parallelism.fsdp_degree 1"]
        )


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay for matrices, none for norms and biases."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.lr, betas=(0.9, 0.95), foreach=True
    )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of the ``step``-th step, counted from 0: linear warm-up, then the schedule down to 0."""
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.lr_scheduler == "constant":
        return training.lr
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    if training.lr_scheduler == "linear":
        return training.lr * (1 - progress)
    return training.lr * (1 + math.cos(math.pi * progress)) / 2


def _run_steps(
    config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, text: PackedText, first_step: int
) -> None:
    training, run_dir = config.training, Path(config.logging.run_dir)
    metrics = Metrics(run_dir, first_step)
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accumulation, rows = training.gradient_accumulation_steps, training.local_batch_size
    tokens_per_step = accumulation * rows * training.seq_len
    model.train()
    started, timed_from = time.perf_counter(), first_step
    with tqdm(total=training.steps, initial=first_step, unit="step", disable=None) as bar:
        for step in range(first_step, training.steps):
            lr = learning_rate(training, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss_sum = torch.zeros((), device=device)
            for micro in range(accumulation):
                micro_step = step * accumulation + micro
                if is_faulty(model):
                    set_tick(model, micro_step)
                ids = text.batch(training_indices(len(text), training.seed, micro_step * rows, rows)).to(device)
                with compute_context(training, model):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss / accumulation).backward()
                loss_sum += loss.detach()
            grad_norm = nn.utils.clip_grad_norm_(trainable, training.max_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            bar.update()
            if done % training.log_freq == 0 or done == training.steps:
                now = time.perf_counter()
                tokens_per_second = (done - timed_from) * tokens_per_step / (now - started)
                mean_loss = float(loss_sum) / accumulation
                metrics.write(
                    step=done,
                    tokens=done * tokens_per_step,
                    loss=mean_loss,
                    lr=lr,
                    grad_norm=float(grad_norm),
                    tokens_per_second=round(tokens_per_second, 1),
                    mfu=None,  # the peak rate of a CPU is not known
                    peak_memory_gib=round(peak_memory_gib(), 3),
                )
                bar.set_postfix_str(f"loss {mean_loss:.3f}, {tokens_per_second:,.0f} tokens/s")
                if bar.disable:
                    left = (training.steps - done) * tokens_per_step / tokens_per_second
                    logger.info(
                        "step %d/%d  loss %.4f  lr %.2e  %.0f tokens/s  %d:%02d left",
                        *(done, training.steps, mean_loss, lr, tokens_per_second, *divmod(int(left), 60)),
                    )
                started, timed_from = time.perf_counter(), done
            if done == training.steps or (training.save_freq and done % training.save_freq == 0):
                save_checkpoint(run_dir / "checkpoints", done, model, optimizer, config.checkpoint.keep_last)


def _saved_arms(run_dir: Path) -> dict[str, Arm]:
    """The arms that an interrupted run measured before it trained."""
    if not (run_dir / runlog.RESULTS).exists():
        logger.warning("%s is gone, and with it what was measured before training", run_dir / runlog.RESULTS)
        return {}
    arms = json.loads((run_dir / runlog.RESULTS).read_text())["arms"]
    return {name: Arm.from_dict(arm) for name, arm in arms.items() if name in BASE_ARMS}
