"""The training loop. LoRA, full training and training from scratch are options of it, not loops of their own, and so is
the number of processes.

A run writes its directory as the README lists it. Everything that a step does is a function of the config and the step
number (data order, learning rate, fault ticks), so a checkpoint holds only what training changes, and a run that was
killed and resumed ends with the bits of one that never was.
"""

import json
import math
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from flipproof import parallel, recompute, runlog
from flipproof.adapter import save_adapter
from flipproof.arms import TRAINED_ARMS, Arm, arms_table
from flipproof.build import build_model, check_length, with_trainable_weights
from flipproof.checkpoint import Checkpointer, find_checkpoint, load_checkpoint, step_of
from flipproof.config import RunConfig, TrainingConfig
from flipproof.data import load_text, training_indices
from flipproof.errors import ConfigError
from flipproof.evaluate import arms_of, measure_config_arms, write_results
from flipproof.files import write_atomically
from flipproof.inject import is_faulty, set_tick
from flipproof.limits import check_ids
from flipproof.loss import next_token_loss
from flipproof.model import compute_context, load_tokenizer, save_model, skeleton
from flipproof.ops.philox import derive_key
from flipproof.parallel import Gradients, World
from flipproof.runlog import logger
from flipproof.shards import local, whole
from flipproof.steplog import StepLog
from flipproof.trackers import check_trackers

DEFAULT_STEPS = 1000
HANGS = "hangs"
"""Where in the run's directory NCCL's flight recorder writes, where a collective times out."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM), saved a checkpoint and can be resumed."""


def train(config: RunConfig, resume: str | None = None) -> Path:
    """Run a training from its config, in each of the processes that torchrun started; returns the run directory.

    Args:
        config: the whole run.
        resume: a checkpoint of ``config.logging.run_dir`` to continue from, as "step-N"; or "auto" for the last one,
            and for a start where there is none.

    Raises:
        ConfigError: before anything is written, where the config, the data or the model is at fault.
        Interrupted: after SIGTERM, when a checkpoint is written.
    """
    run_dir = Path(config.logging.run_dir)
    check_trackers(config.logging)
    _check_trainable(config)
    with parallel.start(config.parallelism, run_dir / HANGS) as world:
        runlog.check_run_dir(run_dir, resume is not None)
        checkpoint = find_checkpoint(run_dir / "checkpoints", resume)
        seen = -1 if checkpoint is None else step_of(checkpoint)
        if world.largest(seen) != world.least(seen):  # also until all have looked, before anything is written
            raise ConfigError([f"{run_dir}: the processes see different checkpoints there; it must be shared by all"])
        return _Run(config, world, checkpoint).run()


def resolve_steps(config: RunConfig, parameters: int, processes: int) -> RunConfig:
    """``config`` with its number of steps, which may follow from a budget of tokens per parameter."""
    training = config.training
    steps = training.steps
    if steps is None and training.tokens_per_parameter is not None:
        tokens_per_step = (
            processes * training.local_batch_size * training.gradient_accumulation_steps * training.seq_len
        )
        steps = math.ceil(training.tokens_per_parameter * parameters / tokens_per_step)
    return replace(config, training=replace(training, steps=steps or DEFAULT_STEPS))


def _check_trainable(config: RunConfig) -> None:
    dtype = config.training.dtype
    if not config.lora.r and dtype in ("float16", "bfloat16"):
        raise ConfigError(
            [
                f"training.dtype = {dtype!r} with lora.r = 0: AdamW cannot train {dtype} weights, coarser than its "
                f"steps; use float32 with training.mixed_precision_param = {dtype!r}, or adapters (lora.r)"
            ]
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
    assert training.steps is not None  # resolve_steps
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    if training.lr_scheduler == "constant":
        return training.lr
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    if training.lr_scheduler == "linear":
        return training.lr * (1 - progress)
    return training.lr * (1 + math.cos(math.pi * progress)) / 2


class LossScale:
    """A factor on the loss that keeps float16 gradients in range; 1 and out of the way for other dtypes.

    Steps whose gradients are not finite are skipped and halve it, 2000 good ones in a row double it (Micikevicius et
    al., Mixed Precision Training, 2018).
    """

    def __init__(self, training: TrainingConfig, weights: torch.dtype | None = None) -> None:
        """``weights``: their dtype, where the config leaves it to the checkpoint."""
        self.used = weights == torch.float16 or "float16" in (training.dtype, training.mixed_precision_param)
        self.scale = torch.tensor(2.0**16 if self.used else 1.0, dtype=torch.float64)
        self.good_steps = torch.tensor(0)

    def unscale(self, parameters: list[nn.Parameter]) -> None:
        """Divide the gradients by it."""
        if self.used:
            torch._foreach_div_([local(p.grad) for p in parameters if p.grad is not None], float(self.scale))

    def update(self, grad_norm: Tensor) -> bool:
        """Whether the step with this gradient norm is to be taken."""
        if not self.used:
            return True
        if not math.isfinite(grad_norm):
            self.scale.div_(2)
            self.good_steps.zero_()
            return False
        self.good_steps.add_(1)
        if self.good_steps >= 2000:
            self.scale.mul_(2)
            self.good_steps.zero_()
        return True


class _Run:
    """One training run in one of its processes."""

    def __init__(self, config: RunConfig, world: World, checkpoint: Path | None) -> None:
        self.world, self.run_dir = world, Path(config.logging.run_dir)
        tokenizer = load_tokenizer(config.model)
        self.tokenizer = tokenizer
        check_length(config, tokenizer)
        config = with_trainable_weights(config)
        if config.training.steps is None and config.training.tokens_per_parameter is not None:
            shape = skeleton(config.model, tokenizer, config.training.dtype)
            config = resolve_steps(config, sum(p.numel() for p in shape.parameters()), world.size)
        self.config = config = resolve_steps(config, 0, world.size)
        training = config.training
        assert training.steps is not None
        self.rows = training.local_batch_size * world.size
        """Sequences of a global micro-batch."""
        needed = training.steps * training.gradient_accumulation_steps * self.rows
        self.text, self.held_out = load_text(config.data, tokenizer, training.seq_len, needed)
        self.model = build_model(config, tokenizer, world, config.lora)
        check_ids(self.model, tokenizer, self.text.sequences, self.held_out.sequences)
        dtype = next(self.model.parameters()).dtype
        self.optimizer = make_optimizer(self.model, training)
        self.gradients = Gradients(self.model, config.parallelism, world)
        self.loss_scale = LossScale(training, dtype)
        self.progress = {
            "sequences": torch.tensor(0),
            "micro_steps": torch.tensor(0),
            "loss_scale": self.loss_scale.scale,
            "good_steps": self.loss_scale.good_steps,
        }
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.first_step = 0
        if checkpoint is not None:
            self.first_step = load_checkpoint(checkpoint, self.model, self.optimizer, self.progress)
            logger.info("resumed from %s", checkpoint)

    def run(self) -> Path:
        config, run_dir, first = self.config, self.run_dir, self.world.first
        if first:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(run_dir / runlog.CONFIG, config.to_toml())
        log = StepLog(run_dir, config, self.model, self.world, self.first_step)

        # What the model was before training; a model from scratch was nothing.
        names, scratch = arms_of(self.model, config.bitflip, trained=True), config.model.init == "random"
        base_arms = () if scratch else tuple(name for name in names if name not in TRAINED_ARMS)
        trained_arms = tuple(name for name in names if name in TRAINED_ARMS)
        if scratch and not config.faulty:
            trained_arms = ("clean",)  # made without faults, it is what others are measured against
        arms = _saved_arms(run_dir) if self.first_step else self._measure(base_arms)
        self._write_results(arms)
        if base_arms and not self.first_step:
            logger.info("before training:\n%s", arms_table(arms))
        self._train(log)
        if config.lora.r:
            save_adapter(self.model, run_dir / "adapter", config.model.hf_model_path, writes=first)
        else:
            save_model(self.model, run_dir / "model", self.tokenizer, self.world)
        arms |= self._measure(trained_arms)
        self._write_results(arms)
        logger.info("%s", arms_table(arms))
        return run_dir

    def _measure(self, names: tuple[str, ...]) -> dict[str, Arm]:
        return measure_config_arms(self.config, names, self.model, self.held_out, self.world)

    def _write_results(self, arms: dict[str, Arm]) -> None:
        if self.world.first:
            write_results(self.run_dir, self.config, arms, self.model, self.held_out)

    def _train(self, log: StepLog) -> None:
        config, training, world = self.config, self.config.training, self.world
        assert training.steps is not None
        checkpoints = Checkpointer(self.run_dir / "checkpoints", config.checkpoint, world)
        self.model.train()
        self._fit_memory()
        done = self.first_step
        with _StopRequest() as stop, log:
            for step in range(self.first_step, training.steps):
                lr = learning_rate(training, step)
                with log.step(step):
                    loss, grad_norm = self._step(step, lr)
                done = step + 1
                checkpoints.check()
                stopping = world.largest(float(stop.requested)) > 0
                if done % training.log_freq == 0 or done == training.steps:
                    tokens = int(self.progress["sequences"]) * training.seq_len
                    log.write(done, tokens, loss=world.mean(loss), lr=lr, grad_norm=float(grad_norm))
                if (training.save_freq and done % training.save_freq == 0) or done == training.steps or stopping:
                    checkpoints.save(done, self.model, self.optimizer, self.progress)
                if stopping:
                    break
            checkpoints.wait()
            if world.largest(float(stop.requested)) > 0:
                raise Interrupted(f"stopped by SIGTERM after step {done}; --resume goes on from there")

    def _step(self, step: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns (mean loss of this process's rows, global gradient norm)."""
        accumulation = self.config.training.gradient_accumulation_steps
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # dropout, in the models that have it, depends on the step and not on what ran before
        torch.manual_seed(derive_key(self.config.training.seed, f"step {step}, rank {self.world.rank}"))
        loss_sum = torch.zeros((), device=self.world.device)
        for micro in range(accumulation):
            with self.gradients.micro_batch(last=micro == accumulation - 1):
                loss = self._forward(int(self.progress["micro_steps"]), int(self.progress["sequences"]))
                (loss * (float(self.loss_scale.scale) / accumulation)).backward()
            loss_sum += loss.detach()
            self.progress["micro_steps"] += 1
            self.progress["sequences"] += self.rows
        self.loss_scale.unscale(self.trainable)
        grad_norm = whole(nn.utils.clip_grad_norm_(self.trainable, self.config.training.max_norm or math.inf))
        if self.loss_scale.update(grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum / accumulation, grad_norm

    def _forward(self, tick: int, sequence: int) -> Tensor:
        """Loss of this process's rows of the global micro-batch that begins with the given sequence."""
        training, rows = self.config.training, self.config.training.local_batch_size
        if is_faulty(self.model):
            set_tick(self.model, tick)
        chosen = training_indices(len(self.text), training.seed, sequence + self.world.rank * rows, rows)
        ids = self.text.batch(chosen).to(self.world.device)
        with compute_context(training, self.model):
            return next_token_loss(self.model, ids, forward=self.gradients.forward)

    def _fit_memory(self) -> None:
        """activation_checkpointing = "auto": keep what the GPU's memory holds, tried with the first micro-batch."""
        if self.config.training.activation_checkpointing != "auto" or self.world.device.type != "cuda":
            return

        def trial() -> tuple[float, float]:
            for _ in range(2):  # the first may compile
                torch.cuda.reset_peak_memory_stats()
                with self.gradients.micro_batch(last=True):
                    loss = self._forward(0, 0)
                    held = torch.cuda.memory_allocated()
                    loss.backward()
                self.optimizer.zero_grad(set_to_none=True)
            return (
                self.world.largest(held / 2**30),
                self.world.largest(torch.cuda.max_memory_allocated() / 2**30),
            )

        def room() -> float:
            free, _ = torch.cuda.mem_get_info()
            # what later steps need beside: Adam's two moments, and gradients that wait for the last micro-batch
            later = 0 if self.optimizer.state else 2 * sum(local(p).nbytes for p in self.trainable)
            if self.config.training.gradient_accumulation_steps > 1:
                later += sum(4 * p.numel() for p in self.trainable)
            return self.world.least((0.94 * (free + torch.cuda.memory_reserved()) - later) / 2**30)

        recompute.fit(parallel.blocks(self.model), trial, room)


class _StopRequest:
    """Notes SIGTERM instead of dying of it, for as long as the context lasts."""

    requested = False

    def __enter__(self) -> "_StopRequest":
        self._before = None
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


def _saved_arms(run_dir: Path) -> dict[str, Arm]:
    """The arms that an interrupted run measured before it trained."""
    if not (run_dir / runlog.RESULTS).exists():
        logger.warning("%s is gone, and with it what was measured before training", run_dir / runlog.RESULTS)
        return {}
    arms = json.loads((run_dir / runlog.RESULTS).read_text())["arms"]
    return {name: Arm.from_dict(arm) for name, arm in arms.items() if name not in TRAINED_ARMS}
