"""The training loop. LoRA, full training and training from scratch are options of it, not loops of their own, and so is
the number of processes.

A run writes its directory as the README lists it. Everything that a step does is a function of the config and the step
number (data order, learning rate, fault ticks), so a checkpoint holds only what training changes, and a run that was
killed and resumed ends with the bits of one that never was. ``start`` says what is known before, ``step`` what one step
is; here is the run around them.

After the run its **control** (``training.control``), in ``control/`` of its directory: the same model built again, and
trained with flips and guard switched off, else exactly as the run. What the run wins over it is what training with
faults is worth. Text, model and settings are the run's, so it has metrics and checkpoints of its own, and no record.
"""

import gc
import hashlib
import json
import math
import os
import shlex
import signal
import socket
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from flipproof.config import RunConfig
from flipproof.data.sequences import PackedText, load_held_out, load_text
from flipproof.data.stream import StreamedText, open_stream
from flipproof.errors import ConfigError, first_of
from flipproof.faults.fitted import read_guards
from flipproof.faults.inject import faults
from flipproof.faults.spec import BitFlipSpec
from flipproof.files import check_writable, discard
from flipproof.launch import started_by_devices
from flipproof.log import RunLog, logger
from flipproof.measure.arms import ARMS, Arm, arms_table, in_order
from flipproof.measure.evaluate import arms_of, measure_config_arms, results
from flipproof.models.build import build_model, with_trainable_weights
from flipproof.models.limits import checker_of_ids
from flipproof.models.load import load_tokenizer
from flipproof.models.packed import check_text
from flipproof.models.save import new_directory
from flipproof.records import CONFIG, RESULTS, read_record, write_record, write_toml
from flipproof.train.checkpoint import (
    Checkpointer,
    best_checkpoint,
    clear_unfinished,
    find_checkpoint,
    forget_after,
    list_checkpoints,
    load_checkpoint,
    step_of,
    text_of,
    whole_checkpoint,
)
from flipproof.train.ending import Kind, write_all_results, write_cards, write_weights
from flipproof.train.metrics import StepLog, check_trackers, log_in, logged_before, peak_memory_gib
from flipproof.train.optimizer import learning_rate
from flipproof.train.resume import begun_with, check_not_done, compare, examine_model, text_fingerprint, text_segments
from flipproof.train.rundir import Record, check_run_dir, forget_abandoned, held, placed
from flipproof.train.start import check_trainable, planned, resolve_steps, say_size
from flipproof.train.step import Training
from flipproof.train.validation import Validation
from flipproof.world import World, join_world

LOG = "run.log"
"""What was logged of all starts of a run, each line with its time."""
CONTROL = "control"
"""Directory in the run's: the control's metrics and checkpoints, and its adapter or model."""
_OF_CONTROL = tuple(name for name, kind in ARMS.items() if kind.weights == "control")
HANGS = "hangs"
"""Where in the run's directory NCCL's flight recorder writes, where a collective times out."""


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, or Ctrl-C), saved a checkpoint and can be resumed."""


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
        Interrupted: after SIGTERM or a first Ctrl-C while it trains, when a checkpoint is written; the command line
            then ends with exit code 75. A second Ctrl-C is a KeyboardInterrupt at once, and so is one before the first
            step and after the last: exit code 130.
    """
    run_dir = Path(config.logging.run_dir)
    check_trackers(config.logging)
    check_trainable(config)
    check_writable(run_dir, "logging.run_dir")
    with join_world(config.parallelism, run_dir / HANGS) as world, ExitStack() as stack:
        world.once(lambda: stack.enter_context(held(run_dir)))
        log = RunLog(run_dir / LOG)
        if world.first:
            stack.enter_context(log)
        world.once(lambda: check_run_dir(run_dir, resume is not None))
        world.once(lambda: log_in(config.logging))
        world.once(lambda: forget_abandoned(run_dir))
        world.once(lambda: clear_unfinished(run_dir / "checkpoints"))
        checkpoint = find_checkpoint(run_dir / "checkpoints", resume)
        seen = -1 if checkpoint is None else step_of(checkpoint)
        if world.largest(seen) != world.least(seen):  # also until all have looked, before anything is written
            raise ConfigError([f"{run_dir}: the processes see different checkpoints there; it must be shared by all"])
        if checkpoint is not None:
            checkpoint = whole_checkpoint(checkpoint, fall_back=resume == "auto", world=world)
        return _Run(config, world, checkpoint, log, stack).run()


class _Run:
    """One training run in one of its processes."""

    def __init__(self, config: RunConfig, world: World, checkpoint: Path | None, log: RunLog, stack: ExitStack) -> None:
        """``stack``: what is to be closed when the run ends."""
        self.world, self.run_dir, self.checkpoint, self.log = world, Path(config.logging.run_dir), checkpoint, log
        self.first_step = 0 if checkpoint is None else step_of(checkpoint)
        self.tokenizer = load_tokenizer(config.model)
        self.config = config = with_trainable_weights(planned(config, self.tokenizer, world.size))
        was, record = (None, None) if checkpoint is None else begun_with(config, checkpoint)
        begins = 0 if record is None else record.metrics_from
        self.logged, self.metrics_from = 0, 0
        if checkpoint is not None:
            self.logged, self.metrics_from = world.once(lambda: logged_before(self.run_dir, checkpoint, begins))
        lengths = () if record is None else tuple(count for count, _ in record.text)
        self.used = self.first_step * config.sequences_per_step(world.size)
        self.text: PackedText | StreamedText
        self.text, self.held_out = self._stream(stack) if config.data.streaming else self._load_text(sum(lengths))
        self.known = None if isinstance(self.text, StreamedText) else len(self.text)
        if config.training.steps is None:  # which follow from epochs of this text
            self.config = config = resolve_steps(config, 0, world.size, self.known)
            if checkpoint is not None:
                check_not_done(config.training.steps, checkpoint)
        self.model = build_model(config, self.tokenizer, world, config.lora)
        if isinstance(self.text, StreamedText):
            check_text(config.training, self.model, self.tokenizer, self.held_out)
            self.text.check = checker_of_ids(self.model, self.tokenizer)
            self.text.need(config.training.seed, self.used, 1)
            if record is not None and checkpoint is not None:  # compared is what was used until then
                text = text_of(checkpoint)
                record = replace(record, text=() if text is None else ((self.used, text),))
        else:
            check_text(config.training, self.model, self.tokenizer, self.text, self.held_out)
        self.record = self._record(lengths)
        self.differences = None if was is None else compare(was, config, record, self.record, self.run_dir)
        self.measured_before = record is not None and record.measured == self.record.measured
        if record is None and self.differences is not None:  # of a version that left no record
            logger.warning(
                "%s has no record of its text and model: whether they are the same is not known", self.run_dir
            )
            self.measured_before = not self.differences.measured
        say_size(config, self.model, world.size, self.known)
        names = arms_of(self.model, config.bitflip, trained=True)
        self.trained_arms = tuple(name for name in names if ARMS[name].trained)
        if config.model.init == "random" and not config.faulty:
            self.trained_arms = ("clean",)  # made without faults, it is what others are measured against
        self.course = self._course(config, self.trained_arms, checkpoint, self.logged)

    def _course(self, config: RunConfig, names: Sequence[str], checkpoint: Path | None, logged: int) -> "_Course":
        segments = [count for count, _ in self.record.text]
        training = Training(config, self.model, self.world, self.text, segments)
        # under the run's faults, in a control too
        validation = Validation(self.config, names, self.model, self.held_out, self.world, self.known or 0)
        return _Course(config, self.world, training, validation, checkpoint, logged)

    def _stream(self, stack: ExitStack) -> tuple[StreamedText, PackedText]:
        """(training text, of which one process of each node packs more from now on; held-out text)."""
        seq_len, here = self.config.training.seq_len, (socket.gethostname(), os.getpid())
        held_out = load_held_out(self.config.data, self.tokenizer, seq_len)
        open_with = partial(open_stream, self.config.data, self.tokenizer, seq_len, held_out)
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        text, problems = None, list[str]()
        try:
            text = stack.enter_context(open_with(os.getpid())) if leads else None
        except ConfigError as error:
            problems = error.problems
        told = self.world.gathered((here if leads else None, problems))
        if found := next((problems for _, problems in told if problems), None):
            raise ConfigError(found)
        if text is None:
            leaders = (leader for leader, _ in told if leader)
            text = stack.enter_context(open_with(next(process for host, process in leaders if host == here[0])))
        return text, held_out

    def _load_text(self, at_least: int) -> tuple[PackedText, PackedText]:
        """(training text of at least so many sequences, held-out text)."""
        training = self.config.training
        a_step, tokenizer = self.config.sequences_per_step(self.world.size), self.tokenizer
        needed = None if training.steps is None else training.steps * a_step
        text, held_out = load_text(self.config.data, tokenizer, training.seq_len, needed)
        if len(text) < at_least:  # the run was begun with more steps, hence with more text in another order
            text, held_out = load_text(self.config.data, tokenizer, training.seq_len, at_least)
            text = text.first(at_least)
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
            text, held_out = self.text, text_fingerprint(self.held_out.sequences, self.held_out.marks)
            if isinstance(text, PackedText):
                return text_segments(text.sequences, lengths, text.marks), held_out
            return ((self.used, text.fingerprint(self.used)),) if self.used else (), held_out

        text, held_out = self.world.once(of_text)
        measured = hashlib.sha256(json.dumps([asdict(self.config.eval), held_out]).encode()).hexdigest()[:32]
        rows = self.config.training.local_batch_size * self.world.size  # of a global micro-batch
        return Record(model, rows, text, held_out, measured, metrics_from=self.metrics_from, **placed(self.world))

    def run(self) -> Path:
        config, run_dir = self.config, self.run_dir
        # What the model was before training; a model from scratch was nothing.
        names, scratch = arms_of(self.model, config.bitflip, trained=True), config.model.init == "random"
        base_arms = () if scratch else tuple(name for name in names if not ARMS[name].trained)
        arms = _saved_arms(run_dir) if self.measured_before else None
        if arms is not None and self.first_step != config.training.steps:  # else they are of these very weights
            arms = {name: arm for name, arm in arms.items() if name in base_arms}
        if arms is None or set(base_arms) - set(arms):
            arms = self._measure(base_arms)
        if base_arms:
            logger.info("before training:\n%s", arms_table({name: arms[name] for name in base_arms}))
        self.course.load()
        self._begin(arms)
        self._finish(self.course, run_dir, self.trained_arms, arms)
        if config.training.control and "recovered" not in names:
            logger.info("training.control: nothing flips here, so that the run would be its own control")
        elif config.training.control:
            self._train_control(arms)
        self.world.once(lambda: write_cards(config, run_dir, self.model))
        logger.info("after training:\n%s", arms_table(in_order(arms)))
        return run_dir

    def _finish(self, course: "_Course", directory: Path, names: Iterable[str], arms: dict[str, Arm]) -> None:
        """Train to the end, write adapter or model into the directory, and add those of the named arms that are not
        measured yet."""
        config, model = self.config, course.model
        with StepLog(course.config, model, self.world, course.first_step) as log:
            course.train(log, self._goes_on())
            kind: Kind = "adapter" if config.lora.r else "model"
            with new_directory(directory / kind, self.world, replace=True) as new:
                write_weights(new, kind, model, config, self.tokenizer, self.world)
            if config.lora.r and config.checkpoint.export_merged and directory == self.run_dir:
                guards = read_guards(config.bitflip.guards) if config.bitflip.guards else None
                with new_directory(directory / "model", self.world, replace=True) as new:
                    write_weights(new, "model", model, config, self.tokenizer, self.world, guards=guards)
            if missing := tuple(name for name in names if name not in arms):
                arms |= self._measure(missing)
                self.world.once(lambda: self._write_results(arms))
                log.measured({name: arm.loss for name, arm in in_order(arms).items()})

    def _train_control(self, arms: dict[str, Arm]) -> None:
        """Train the control, or go on with it, and add its arms; nothing where they are there already."""
        config, directory = self.config, self.run_dir / CONTROL
        if set(_OF_CONTROL) <= arms.keys():
            return
        del self.model, self.course  # its memory is needed
        gc.collect()
        if self.world.device.type == "cuda" or config.training.compile:
            torch.compiler.reset()  # what was compiled holds the model
            torch.cuda.empty_cache()
        logger.info("the control: the same training without faults, into %s", directory)
        self.model = build_model(config, self.tokenizer, self.world, config.lora)
        # its settings as a step, the log and the trackers see them
        logging = replace(config.logging, run_dir=str(directory))
        without = replace(config, bitflip=BitFlipSpec(), logging=logging)
        checkpoint, logged = self._control_checkpoint(directory), 0
        if checkpoint is not None:
            logged, _ = self.world.once(lambda: logged_before(directory, checkpoint, 0))
        course = self._course(without, _OF_CONTROL, checkpoint, logged)
        course.load()
        with faults(self.model, flips=False, guard=False):  # which its arms switch themselves
            self._finish(course, directory, _OF_CONTROL, arms)

    def _control_checkpoint(self, directory: Path) -> Path | None:
        """The last whole checkpoint of the control that the run has as many steps as."""
        checkpoints, steps = directory / "checkpoints", self.config.training.steps
        assert steps is not None

        def look() -> Path | None:
            directory.mkdir(exist_ok=True)
            clear_unfinished(checkpoints)
            forget_after(checkpoints, steps)
            return find_checkpoint(checkpoints, "auto")

        last = self.world.once(look)
        return None if last is None else whole_checkpoint(last, fall_back=True, world=self.world)

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
            control = self.run_dir / CONTROL
            if self.checkpoint is None or (self.differences and self.differences.said):
                forget_after(control / "checkpoints", self.first_step)  # it trained otherwise
            if self.first_step != self.config.training.steps:  # else it is of as many steps
                for result in ("adapter", "model"):
                    discard(control / result)
                if self.config.lora.r:  # merged, of fewer steps
                    discard(self.run_dir / "model")
            self._write_results(arms)
            if path := self.config.bitflip.guards:
                replace(read_guards(path), moved=not self.config.lora).write(self.run_dir)
            write_toml(self.run_dir / CONFIG, self.config.to_toml())
            self.record.write(self.run_dir)
            self.log.begin()
            if self.world.device.type == "cuda" and self.world.size > 1:
                (self.run_dir / HANGS).mkdir(exist_ok=True)

        self.world.once(write)

    def _measure(self, names: tuple[str, ...]) -> dict[str, Arm]:
        return measure_config_arms(self.config, names, self.model, self.held_out, self.world)

    def _write_results(self, arms: dict[str, Arm]) -> None:
        best: dict[str, Any] = {}
        if self.config.checkpoint.keep_best and self.config.training.steps is not None:
            found = best_checkpoint(self.run_dir / "checkpoints", self.config.training.steps)
            best = {} if found is None else {"best": {"checkpoint": found[0].name, "eval_loss": found[1]}}
        values = results(self.config, in_order(arms), self.model, self.held_out)
        if isinstance(self.text, PackedText) and self.text.about is not None:
            values["trained_on"] = asdict(self.text.about)
        write_record(self.run_dir / RESULTS, values | best)
        write_all_results(self.run_dir, arms, self.trained_arms[0], self.metrics_from)

    def _goes_on(self) -> str:
        start = "flipproof" if self.world.size == 1 or started_by_devices() else "torchrun … -m flipproof"
        devices = f" --devices {self.world.size}" if started_by_devices() else ""
        path = shlex.quote(str(self.run_dir / CONFIG))
        return f"{start} train --config {path}{devices} --resume goes on from there"


class _Course:
    """One training to its last step, of the run or of its control, in one of its processes."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        training: Training,
        validation: Validation,
        checkpoint: Path | None,
        logged: int,
    ) -> None:
        """
        Args:
            config: ``logging.run_dir`` is where metrics and checkpoints go.
            checkpoint: what ``load`` goes on from.
            logged: lines of metrics that there are until then.
        """
        self.config, self.world, self.training, self.validation, self.checkpoint, self.logged = (
            config, world, training, validation, checkpoint, logged
        )  # fmt: skip
        self.model = training.model
        self.first_step = self.kept = 0 if checkpoint is None else step_of(checkpoint)  # kept: the last that is saved

    def load(self) -> None:
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint, self.model, self.training.optimizer, self.training.progress)
            logger.info("resumed from %s", self.checkpoint)

    def train(self, log: StepLog, goes_on: str) -> None:
        """``goes_on``: what an interrupted one says at last."""
        config, run, world = self.config.training, self.training, self.world
        assert config.steps is not None
        self.model.train()
        run.fit_memory()
        self.validation.announce()
        best, done, validated = self._best_so_far(), self.first_step, None
        writer = Checkpointer(self._checkpoints, self.config.checkpoint, world)
        with _StopRequest() as stop, log.training(), writer as checkpoints:
            for step in range(self.first_step, config.steps):
                if not run.await_text(step, checkpoints.wait, lambda: stop.asked(world)):
                    break
                lr = learning_rate(config, step)
                with log.step(step):
                    loss, grad_norm = run.step(step, lr)
                done = step + 1
                checkpoints.check()
                if done % config.log_freq == 0 or done == config.steps:
                    tokens, skipped = (int(run.progress[name]) for name in ("sequences", "skipped"))
                    tokens *= config.seq_len
                    peak = peak_memory_gib(run.recorded)
                    log.write(done, tokens, run.mean_loss(loss), lr, float(grad_norm), skipped, peak)
                    self.logged += 1
                if run.goes_nowhere:
                    raise run.diverged(done, loss, grad_norm)
                validated = self._validated(done, log)
                is_best = validated is not None and validated < best
                best = validated if validated is not None and is_best else best
                due = (config.save_freq and done % config.save_freq == 0) or done == config.steps
                if due or (is_best and self.config.checkpoint.keep_best):
                    self._save(done, validated, log, checkpoints)
                if stop.asked(world):
                    break
            if done > self.kept:  # it was asked to stop
                self._save(done, validated, log, checkpoints)
            checkpoints.wait()
            run.release()
            if by := stop.asked(world):
                raise Interrupted(f"stopped by {_SAID[by]} after step {done}; {goes_on}")

    def _save(self, done: int, validated: float | None, log: StepLog, checkpoints: Checkpointer) -> None:
        run, self.kept = self.training, done
        run.check_finite(done)
        log.sync()
        checkpoints.save(done, self.model, run.optimizer, run.saved(), self.logged, validated, run.text_until(done))

    @property
    def _checkpoints(self) -> Path:
        return Path(self.config.logging.run_dir) / "checkpoints"

    def _best_so_far(self) -> float:
        """The least validation loss of the checkpoints that it goes on from, which all processes know alike."""
        found = self.world.once(lambda: best_checkpoint(self._checkpoints, self.first_step))
        return math.inf if found is None else found[1]

    def _validated(self, done: int, log: StepLog) -> float | None:
        """The validation loss that says which checkpoint is best, logged with the others; None where none is due."""
        if not self.validation.due(done):
            return None
        with log.paused():
            losses = self.validation.losses()
        log.validated(done, losses)
        self.logged += 1
        return next(iter(losses.values()))


_SAID = {int(signal.SIGTERM): "SIGTERM", int(signal.SIGINT): "Ctrl-C"}


class _StopRequest:
    """Notes SIGTERM and the first Ctrl-C instead of ending by them, for as long as the context lasts."""

    came = 0
    """The number of the signal that came; 0 for none."""

    def __enter__(self) -> "_StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            self._before = {number: signal.signal(number, self._note) for number in _SAID}
        return self

    def asked(self, world: World) -> int:
        """The number of the signal that came to any process, which all must call; 0 for none."""
        return int(world.largest(self.came))

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.came = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # the second ends at once
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # no log line, since it may be one that the signal interrupts
                    os.write(2, b"\na step that has begun is finished, and all is saved; Ctrl-C again ends at once\n")

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _saved_arms(run_dir: Path) -> dict[str, Arm] | None:
    """The arms that stand in the results of an interrupted run; None where they cannot be read."""
    try:
        arms = read_record(run_dir / RESULTS)["arms"]
        return {name: Arm.from_dict(arm) for name, arm in arms.items() if name in ARMS}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        logger.warning("%s cannot be read (%s): the arms before training are measured anew",
                       run_dir / RESULTS, error)  # fmt: skip
        return None
