"""The training loop. LoRA, full training and training from scratch are options of it, not loops of their own, and so is
the number of processes.

A run writes its directory as the README lists it. Everything that a step does is a function of the config and the step
number (data order, learning rate, fault ticks), so a checkpoint holds only what training changes, and a run that was
killed and resumed ends with the bits of one that never was.
"""

import hashlib
import json
import math
import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn

from flipproof.config import RunConfig, load_written
from flipproof.data.sequences import PackedText, load_text, training_indices
from flipproof.dtensor import local, whole
from flipproof.errors import ConfigError, first_of
from flipproof.faults.inject import is_faulty, set_tick
from flipproof.faults.philox import derive_key
from flipproof.files import check_writable
from flipproof.log import logger
from flipproof.measure.arms import TRAINED_ARMS, Arm, arms_table
from flipproof.measure.perplexity import arms_of, measure_config_arms, write_results
from flipproof.models import recompute
from flipproof.models.adapter import save_adapter
from flipproof.models.build import build_model, check_length, unguarded, with_trainable_weights
from flipproof.models.limits import check_ids
from flipproof.models.load import compute_context, load_tokenizer, save_model, skeleton
from flipproof.models.loss import next_token_loss
from flipproof.models.parallelize import Gradients, blocks
from flipproof.models.save import new_directory
from flipproof.records import CONFIG, METRICS, RESULTS, read_record, write_toml
from flipproof.train.checkpoint import (
    Checkpointer,
    clear_unfinished,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    logged_lines,
    step_of,
    whole_checkpoint,
)
from flipproof.train.metrics import kept_metrics
from flipproof.train.optimizer import LossScale, learning_rate, make_optimizer
from flipproof.train.progress import StepLog
from flipproof.train.resume import check_fixed, compare, examine_model, text_fingerprint, text_segments
from flipproof.train.rundir import Record, check_run_dir, forget_abandoned, held
from flipproof.train.trackers import check_trackers, log_in
from flipproof.world import World, join_world

DEFAULT_STEPS = 1000
MAX_SKIPPED = 10
"""So many steps in a row that are not finite end a run. One is bad luck; after ten nothing will come of it."""
HANGS = "hangs"
"""Where in the run's directory NCCL's flight recorder writes, where a collective times out."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM), saved a checkpoint and can be resumed."""


class Diverged(ConfigError):
    """Training goes nowhere: its losses, gradients or weights are not finite. What was saved before is as it was."""


def train(config: RunConfig, resume: str | None = None) -> Path:
    """Run a training from its config, in each of the processes that torchrun started; returns the run directory.

    Args:
        config: the whole run.
        resume: a checkpoint of ``config.logging.run_dir`` to continue from, as "step-N"; or "auto" for the last one,
            and for a start where there is none.

    Raises:
        ConfigError: before anything is written, where the config, the data or the model is at fault, another process
            writes into the directory, or what is resumed is another run (``resume.py``).
        Diverged: after ``MAX_SKIPPED`` steps in a row that are not finite.
        Interrupted: after SIGTERM, when a checkpoint is written.
    """
    run_dir = Path(config.logging.run_dir)
    check_trackers(config.logging)
    _check_trainable(config)
    check_writable(run_dir, "logging.run_dir")
    with join_world(config.parallelism, run_dir / HANGS) as world, ExitStack() as stack:
        world.once(lambda: stack.enter_context(held(run_dir)))
        world.once(lambda: check_run_dir(run_dir, resume is not None))
        world.once(lambda: log_in(config.logging))
        world.once(lambda: forget_abandoned(run_dir))
        world.once(lambda: clear_unfinished(run_dir / "checkpoints"))
        checkpoint = find_checkpoint(run_dir / "checkpoints", resume)
        seen = -1 if checkpoint is None else step_of(checkpoint)
        if world.largest(seen) != world.least(seen):  # also until all have looked, before anything is written
            raise ConfigError([f"{run_dir}: the processes see different checkpoints there; it must be shared by all"])
        if checkpoint is not None:
            checkpoint = whole_checkpoint(checkpoint, fall_back=resume == "auto")
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


def counted_parameters(model: nn.Module, of: str | int) -> int:
    """How many parameters ``training.tokens_per_parameter_of`` means, of a model without adapters."""
    if isinstance(of, int):
        return of
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    left_out = embedding.numel() if of == "non-embedding" else 0
    return sum(parameter.numel() for parameter in model.parameters()) - left_out


def chosen_sequences(lengths: Sequence[int], seed: int, first: int, count: int) -> np.ndarray:
    """Which sequences are the first-th to (first+count)-th of a run whose text has segments of these lengths: int64,
    shape (count,). Segments come one after the other, each in an order of its own; then the whole text again."""
    start, end, parts = 0, first + count, []
    for length in lengths:
        here = range(max(first, start), min(end, start + length))
        if here:
            parts.append(start + training_indices(length, seed, here[0] - start, len(here)))
        start += length
    if end > start:
        again = max(first, start)
        parts.append(training_indices(start, seed, again, end - again))
    return np.concatenate(parts)


def _check_trainable(config: RunConfig) -> None:
    dtype = config.training.dtype
    if not config.lora.r and dtype in ("float16", "bfloat16"):
        raise ConfigError(
            [
                f"training.dtype = {dtype!r} with lora.r = 0: AdamW cannot train {dtype} weights, coarser than its "
                f"steps; use float32 with training.mixed_precision_param = {dtype!r}, or adapters (lora.r)"
            ]
        )


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
            counted = counted_parameters(shape, config.training.tokens_per_parameter_of)
            config = resolve_steps(config, counted, world.size)
        self.config = config = resolve_steps(config, 0, world.size)
        training = config.training
        assert training.steps is not None
        if training.warmup_steps > training.steps:
            logger.warning("training.warmup_steps = %d: the run ends after %d steps, and its learning rate never "
                           "reaches training.lr", training.warmup_steps, training.steps)  # fmt: skip
        self.checkpoint = checkpoint
        self.first_step = 0 if checkpoint is None else step_of(checkpoint)
        self.rows = training.local_batch_size * world.size
        """Sequences of a global micro-batch."""
        was, record = (None, None) if checkpoint is None else self._before()
        begins = 0 if record is None else record.metrics_from
        self.logged, self.metrics_from = world.once(lambda: self._logged_before(begins))
        self.text, self.held_out = self._load_text(() if record is None else tuple(count for count, _ in record.text))
        self.model = build_model(config, tokenizer, world, config.lora)
        check_ids(self.model, tokenizer, self.text.sequences, self.held_out.sequences)
        dtype = next(self.model.parameters()).dtype
        self.record = self._record(() if record is None else tuple(count for count, _ in record.text))
        self.differences = None if was is None else compare(was, config, record, self.record, self.run_dir)
        self.measured_before = record is not None and record.measured == self.record.measured
        if record is None and self.differences is not None:  # of a version that left no record
            logger.warning(
                "%s has no record of its text and model: whether they are the same is not known", self.run_dir
            )
            self.measured_before = not self.differences.measured
        self.optimizer = make_optimizer(self.model, training)
        self.gradients = Gradients(self.model, config.parallelism, world)
        self.loss_scale = LossScale(training, dtype)
        self.progress = {
            "sequences": torch.tensor(0),
            "micro_steps": torch.tensor(0),
            "loss_scale": self.loss_scale.scale,
            "good_steps": self.loss_scale.good_steps,
            "skipped": torch.tensor(0),
            "skipped_in_a_row": torch.tensor(0),
        }
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _before(self) -> tuple[RunConfig, Record | None]:
        """Config and record of the run that this one goes on with."""
        path = self.run_dir / CONFIG
        if not path.exists():
            raise ConfigError([f"--resume: {path} is gone, and with it what the checkpoints there were trained with"])
        was, steps = load_written(path), self.config.training.steps
        check_fixed(was, self.config, self.run_dir)
        if steps is not None and steps < self.first_step:
            raise ConfigError(
                [
                    f"--resume: training.steps = {steps}, but {self.checkpoint} has done {self.first_step}; name an "
                    "earlier one with --resume, or more steps"
                ]
            )
        return was, Record.read(self.run_dir)

    def _logged_before(self, begins: int) -> tuple[int, int]:
        """(lines of metrics that there are of the steps that are done, the step after which they begin); in the
        run's record they began after step ``begins``. Raises ConfigError where lines are gone."""
        if self.checkpoint is None:
            return 0, 0
        path, kept = self.run_dir / METRICS, kept_metrics(self.run_dir, self.first_step)
        written = logged_lines(self.checkpoint) if self.first_step > begins else 0
        if kept is None:
            logger.warning("%s is gone: metrics are logged from step %d on", path, self.first_step + 1)
            return 0, self.first_step
        if len(kept) < written:
            raise ConfigError(
                [
                    f"{path} has {len(kept)} lines up to step {self.first_step}, and {written} were written; without "
                    "the file a run goes on, and logs anew from there"
                ]
            )
        return len(kept), min(begins, self.first_step)

    def _load_text(self, lengths: tuple[int, ...]) -> tuple[PackedText, PackedText]:
        """(training text of at least these segments, held-out text)."""
        training = self.config.training
        assert training.steps is not None
        needed, tokenizer = training.steps * training.gradient_accumulation_steps * self.rows, self.tokenizer
        text, held_out = load_text(self.config.data, tokenizer, training.seq_len, needed)
        if len(text) < sum(lengths):  # the run was begun with more steps, hence with more text in another order
            text, held_out = load_text(self.config.data, tokenizer, training.seq_len, sum(lengths))
            text = replace(text, sequences=text.sequences[: sum(lengths)])
        return text, held_out

    def _record(self, lengths: tuple[int, ...]) -> Record:
        """What later starts are compared with. Raises ConfigError where the base model is not finite."""
        model = None
        if self.config.model.init == "pretrained":
            model, broken = examine_model(self.model, self.world)
            if broken:
                raise ConfigError(
                    [
                        f"model.hf_model_path = {self.config.model.hf_model_path!r}: the weights are not finite before "
                        f"any training (NaN or infinity), in {first_of(broken)}"
                    ]
                )

        def of_text() -> tuple[tuple[tuple[int, str], ...], str]:
            return text_segments(self.text.sequences, lengths), text_fingerprint(self.held_out.sequences)

        text, held_out = self.world.once(of_text)
        measured = hashlib.sha256(json.dumps([asdict(self.config.eval), held_out]).encode()).hexdigest()[:32]
        return Record(model, self.rows, text, held_out, measured, metrics_from=self.metrics_from)

    def run(self) -> Path:
        config, run_dir = self.config, self.run_dir
        # What the model was before training; a model from scratch was nothing.
        names, scratch = arms_of(self.model, config.bitflip, trained=True), config.model.init == "random"
        base_arms = () if scratch else tuple(name for name in names if name not in TRAINED_ARMS)
        trained_arms = tuple(name for name in names if name in TRAINED_ARMS)
        if scratch and not config.faulty:
            trained_arms = ("clean",)  # made without faults, it is what others are measured against
        arms = _saved_arms(run_dir) if self.measured_before else None
        if arms is None or set(base_arms) - set(arms):
            arms = self._measure(base_arms)
        if arms:
            logger.info("before training:\n%s", arms_table(arms))
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint, self.model, self.optimizer, self.progress)
            logger.info("resumed from %s", self.checkpoint)
        self._begin(arms)
        self._train(StepLog(run_dir, config, self.model, self.world, self.first_step))
        with new_directory(run_dir / ("adapter" if config.lora.r else "model"), self.world, replace=True) as new:
            if config.lora.r:
                save_adapter(self.model, new, config.model.hf_model_path, writes=self.world.first)
            else:
                save_model(self.model, new, self.tokenizer, self.world)
        arms |= self._measure(trained_arms)
        self._write_results(arms)
        logger.info("%s", arms_table(arms))
        return run_dir

    def _begin(self, arms: dict[str, Arm]) -> None:
        """Make what this start has decided durable, before its first step: from which checkpoint, with what."""
        for change in [] if self.differences is None else self.differences.said:
            logger.info("resumed with %s", change)
        for change in [] if self.differences is None else self.differences.measured:
            logger.info("resumed with %s: the arms before training were measured anew", change)

        def write() -> None:
            there = list_checkpoints(self.run_dir / "checkpoints")
            abandoned = tuple(path.name for path in there if step_of(path) > self.first_step)
            replace(self.record, measured=None, abandoned=abandoned).write(self.run_dir)
            forget_abandoned(self.run_dir)
            self._write_results(arms)
            write_toml(self.run_dir / CONFIG, self.config.to_toml())
            self.record.write(self.run_dir)
            if self.world.device.type == "cuda" and self.world.size > 1:
                (self.run_dir / HANGS).mkdir(exist_ok=True)

        self.world.once(write)

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
                    tokens, skipped = (int(self.progress[name]) for name in ("sequences", "skipped"))
                    tokens *= training.seq_len
                    log.write(done, tokens, world.mean(loss), lr, float(grad_norm), skipped)
                    self.logged += 1
                if self.progress["skipped_in_a_row"] >= MAX_SKIPPED:
                    checkpoints.wait()
                    raise Diverged([self._why_not_finite(done, loss, grad_norm)])
                if (training.save_freq and done % training.save_freq == 0) or done == training.steps or stopping:
                    self._check_finite(done)
                    log.sync()
                    checkpoints.save(done, self.model, self.optimizer, self.progress, self.logged)
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
        if self._is_finite(step, loss_sum, grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum / accumulation, grad_norm

    def _is_finite(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the step may be taken; all processes decide alike, whichever of them has the loss that is not."""
        numbers = [math.isfinite(loss), math.isfinite(grad_norm)]
        # 2: the loss is not finite; 1: its gradient alone
        worst = self.world.largest(0 if all(numbers) else 1 if numbers[0] else 2)
        # at a scale above 1 the scale may be what is too much, and half of it enough
        scaled = worst == 1 and self.loss_scale.used and float(self.loss_scale.scale) > 1
        if worst < 2:  # no scale makes a loss finite
            self.loss_scale.update(worst == 0)
        if worst == 0:
            self.progress["skipped_in_a_row"].zero_()
            return True
        self.progress["skipped"] += 1
        if not scaled:
            self.progress["skipped_in_a_row"] += 1
        logger.warning("step %d is skipped: its %s not finite", step + 1, "loss is" if worst == 2 else "gradients are")
        return False

    def _why_not_finite(self, done: int, loss: Tensor, grad_norm: Tensor) -> str:
        """One line on why training goes nowhere."""
        training, guards = self.config.training, unguarded(self.config.bitflip)
        if guards:
            why = f"flips without a guard ({guards}), which make huge numbers of small ones"
        elif int(self.progress["skipped"]) >= done:
            why = "the text or the base model, since no step was finite from the start"
        else:
            why = f"the learning rate (training.lr = {training.lr:g}, warmup_steps = {training.warmup_steps})"
        kept = list_checkpoints(self.run_dir / "checkpoints")
        way_out = f"the last checkpoint, {kept[-1].name}, is whole" if kept else "no checkpoint was written"
        return (
            f"training stopped after step {done}: {MAX_SKIPPED} steps in a row were not finite (loss {float(loss):g}, "
            f"gradient norm {float(grad_norm):g}) and none of them was taken; the likely cause is {why}; {way_out}"
        )

    def _check_finite(self, done: int) -> None:
        """Raises Diverged where weights or optimizer are not finite: such a checkpoint would push out a good one."""
        tensors = [local(parameter).detach() for parameter in self.trainable]
        tensors += [
            local(value) for state in self.optimizer.state.values() for value in state.values() if value.dim() > 0
        ]
        bad = any(not tensor.isfinite().all() for tensor in tensors)
        if self.world.largest(float(bad)):
            raise Diverged(
                [
                    f"training stopped after step {done}: the trained weights or Adam's moments are not finite; they "
                    f"are not saved; the likely cause is the learning rate (training.lr = {self.config.training.lr:g})"
                ]
            )

    def _forward(self, tick: int, sequence: int) -> Tensor:
        """Loss of this process's rows of the global micro-batch that begins with the given sequence."""
        training, rows = self.config.training, self.config.training.local_batch_size
        if is_faulty(self.model):
            set_tick(self.model, tick)
        lengths = [length for length, _ in self.record.text]
        chosen = chosen_sequences(lengths, training.seed, sequence + self.world.rank * rows, rows)
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

        recompute.fit(blocks(self.model), trial, room)


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


def _saved_arms(run_dir: Path) -> dict[str, Arm] | None:
    """The arms that an interrupted run measured before it trained; None where they cannot be read."""
    try:
        arms = read_record(run_dir / RESULTS)["arms"]
        return {name: Arm.from_dict(arm) for name, arm in arms.items() if name not in TRAINED_ARMS}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        logger.warning("%s cannot be read (%s): the arms before training are measured anew",
                       run_dir / RESULTS, error)  # fmt: skip
        return None
