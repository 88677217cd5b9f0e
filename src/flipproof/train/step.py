"""One optimizer step: forward and backward of its micro-batches, and whether it may be taken.

Which sequences it sees, its learning rate, its flips and its dropout are functions of the config and of how far the run
is, so what training changes is all in ``Training``: weights, optimizer and ``progress``.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flipproof.config import RunConfig
from flipproof.data.sequences import Batch, PackedText, training_indices
from flipproof.data.shards import POLL_S
from flipproof.data.stream import StreamedText
from flipproof.dtensor import local, whole
from flipproof.errors import ConfigError
from flipproof.faults.inject import is_faulty, set_tick
from flipproof.faults.philox import derive_key
from flipproof.log import logger
from flipproof.models import recompute
from flipproof.models.build import unguarded
from flipproof.models.load import compute_context
from flipproof.models.loss import ask_teacher, next_token_loss
from flipproof.models.parallelize import Gradients, blocks
from flipproof.train.checkpoint import Progress, list_checkpoints
from flipproof.train.cuda_graph import Recorded
from flipproof.train.optimizer import LossScale, make_optimizer
from flipproof.world import World

MAX_SKIPPED = 10
"""So many steps in a row that are not finite end a run. One is bad luck; after ten nothing will come of it."""


class Diverged(ConfigError):
    """Training goes nowhere: its losses, gradients or weights are not finite. What was saved before is as it was."""


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


class Training:
    """What training changes, in one process of a run."""

    def __init__(
        self, config: RunConfig, model: nn.Module, world: World, text: PackedText | StreamedText, lengths: list[int]
    ) -> None:
        """``lengths``: of the segments of a text that is not streamed, as in ``chosen_sequences``."""
        self.config, self.model, self.world, self.text, self.lengths = config, model, world, text, lengths
        self.optimizer = make_optimizer(model, config.training)
        self.gradients = Gradients(model, config.parallelism, world)
        self.loss_scale = LossScale(config.training, next(model.parameters()).dtype)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        several = config.training.gradient_accumulation_steps > 1
        self.recorded = Recorded(self._micro_batch, model, blocks(model), several) if self._may_record() else None
        self.progress: Progress = {
            "sequences": torch.tensor(0),
            "micro_steps": torch.tensor(0),
            "loss_scale": self.loss_scale.scale,
            "good_steps": self.loss_scale.good_steps,
            "skipped": torch.tensor(0),
            "skipped_in_a_row": torch.tensor(0),
            "loss_sum": torch.zeros((), dtype=torch.float64),
            "loss_sequences": torch.tensor(0),
        }
        self._losses = 0.0
        """Of this process's sequences since ``progress`` has those of all."""

    def await_text(self, step: int, saved: Callable[[], None], stops: Callable[[], object]) -> bool:
        """Until the text of a step is there, where it is streamed; False where the run is to stop before it is. All
        processes ask for the same, and end alike.

        Args:
            saved: waits until the checkpoints that were begun are written.
            stops: whether the run is to stop, asked in all processes at once.

        Raises:
            ConfigError: where it will not come, with the step and what the run can go on from.
        """
        if not isinstance(self.text, StreamedText):
            return True
        a_step, problems = self.config.sequences_per_step(self.world.size), list[str]()
        coming, waits = self.text.coming(self.config.training.seed, step * a_step, a_step), False
        while True:
            try:
                waits = next(coming, False)
            except ConfigError as error:
                problems = error.problems
            state = self.world.largest(2 if problems else waits)
            if state == 0:
                return True
            if state == 2:  # another node may have another reason, or none
                told = next(found for found in self.world.gathered(problems) if found)
                saved()
                raise ConfigError(f"training stopped after step {step}: {problem}; {self._kept()}" for problem in told)
            if stops():  # a signal may have come to one process alone
                return False
            time.sleep(POLL_S)

    def step(self, step: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns (mean loss of this process's rows, global gradient norm)."""
        accumulation, rows = self.config.training.gradient_accumulation_steps, self.config.training.local_batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # dropout, in the models that have it, depends on the step and not on what ran before
        torch.manual_seed(derive_key(self.config.training.seed, f"step {step}, rank {self.world.rank}"))
        loss_sum = torch.zeros((), device=self.world.device)
        weights, weight = self._weights(int(self.progress["sequences"]))
        for micro in range(accumulation):
            batch = self._begin(int(self.progress["micro_steps"]), int(self.progress["sequences"]))
            factor = weights[micro] * float(self.loss_scale.scale) / accumulation
            with self.gradients.micro_batch(last=micro == accumulation - 1):
                loss = self.recorded(batch, factor) if self.recorded else self._micro_batch(batch, factor)
            loss_sum.add_(loss, alpha=weights[micro])
            self.progress["micro_steps"] += 1
            self.progress["sequences"] += rows * self.world.size
        self.loss_scale.unscale(self.trainable)
        grad_norm = whole(nn.utils.clip_grad_norm_(self.trainable, self.config.training.max_norm or math.inf))
        loss = loss_sum / accumulation
        if self._is_finite(step, loss, grad_norm, weight):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm

    def text_until(self, done: int) -> str | None:
        """The fingerprint of the streamed text that so many steps have taken; None where it is not streamed."""
        if not isinstance(self.text, StreamedText):
            return None
        return self.text.fingerprint(done * self.config.sequences_per_step(self.world.size))

    def saved(self) -> Progress:
        """``progress`` with what all processes have used. All call."""
        self.progress["loss_sum"] += self.world.total(self._losses)
        self._losses = 0.0
        return self.progress

    def mean_loss(self, last: Tensor) -> float:
        """The mean over the steps since the last call, and over the processes, which all call; of those whose loss was
        finite, else of the ``last`` one alone."""
        loss_sum, sequences = (self.saved()[name] for name in ("loss_sum", "loss_sequences"))
        mean = float(loss_sum) / int(sequences) if sequences else self.world.mean(last)
        loss_sum.zero_()
        sequences.zero_()
        return mean

    def release(self) -> None:
        """Give back what only training needs."""
        if self.recorded is not None:
            self.recorded.release()

    def _may_record(self) -> bool:
        """Whether a micro-batch may be recorded as a CUDA graph, as far as is known before."""
        drops_layers = getattr(getattr(self.model, "config", None), "layerdrop", 0)  # which is drawn on the CPU
        return self.world.device.type == "cuda" and self.gradients.apart and not drops_layers

    def _weights(self, sequence: int) -> tuple[list[float], int]:
        """Of the step that begins with the given sequence: (what the mean loss of each of this process's micro-batches
        counts for, what the step's loss does among other steps').

        The loss is the mean over the step's tokens that have one, in whichever process and micro-batch, and every
        process knows how many these are. Of text all tokens have one, and all sequences count alike.
        """
        training, world = self.config.training, self.world
        rows, accumulation = training.local_batch_size, training.gradient_accumulation_steps
        if isinstance(self.text, StreamedText) or self.text.marks is None:
            return [1.0] * accumulation, rows
        shape = accumulation, world.size, rows
        chosen = chosen_sequences(self.lengths, training.seed, sequence, math.prod(shape))
        tokens = self.text.trained_tokens(chosen).reshape(shape).sum(2)
        mean = float(tokens.mean())
        return [float(n) / mean for n in tokens[:, world.rank]], int(tokens.sum())

    def _begin(self, tick: int, sequence: int) -> Batch:
        """This process's rows of the global micro-batch that begins with the given sequence."""
        training, rows = self.config.training, self.config.training.local_batch_size
        if is_faulty(self.model):
            set_tick(self.model, tick)
        first = sequence + self.world.rank * rows
        if isinstance(self.text, StreamedText):
            return self.text.batch(training.seed, first, rows).to(self.world.device)
        chosen = chosen_sequences(self.lengths, training.seed, first, rows)
        return self.text.batch(chosen).to(self.world.device)

    def _micro_batch(self, batch: Batch, factor: float | Tensor) -> Tensor:
        """Add the gradients of the loss times a factor; returns the loss."""
        loss = self._loss(batch)
        (loss * factor).backward()
        return loss.detach()

    def _loss(self, batch: Batch) -> Tensor:
        training, (ids, labels, positions) = self.config.training, batch
        with compute_context(training, self.model):
            teacher = ask_teacher(self.model, ids, training.distill, positions) if training.distill else None
            return next_token_loss(self.model, ids, labels=labels, teacher=teacher, positions=positions)

    def _is_finite(self, step: int, loss: Tensor, grad_norm: Tensor, weight: int) -> bool:
        """Whether the step may be taken; all processes decide alike, whichever of them has the loss that is not.
        ``weight``: what its loss counts for among other steps'."""
        numbers = [math.isfinite(loss), math.isfinite(grad_norm)]
        # 2: the loss is not finite; 1: its gradient alone
        worst = self.world.largest(0 if all(numbers) else 1 if numbers[0] else 2)
        # at a scale above 1 the scale may be what is too much, and half of it enough
        scaled = worst == 1 and self.loss_scale.used and float(self.loss_scale.scale) > 1
        if worst < 2:  # no scale makes a loss finite
            self.loss_scale.update(worst == 0)
            # in float64 sums of float32 are exact, whatever their order, so that lines do not tell where a run stopped
            self._losses += weight * float(loss)
            self.progress["loss_sequences"] += weight * self.world.size
        if worst == 0:
            self.progress["skipped_in_a_row"].zero_()
            return True
        self.progress["skipped"] += 1
        if not scaled:
            self.progress["skipped_in_a_row"] += 1
        logger.warning("step %d is skipped: its %s not finite", step + 1, "loss is" if worst == 2 else "gradients are")
        return False

    @property
    def goes_nowhere(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return bool(self.progress["skipped_in_a_row"] >= MAX_SKIPPED)

    def diverged(self, done: int, loss: Tensor, grad_norm: Tensor) -> Diverged:
        """One line on why training goes nowhere."""
        training, guards = self.config.training, unguarded(self.config.bitflip)
        if guards:
            why = f"flips without a guard ({guards}), which make huge numbers of small ones"
        elif int(self.progress["skipped"]) >= done:
            why = "the text or the base model, since no step was finite from the start"
        else:
            why = f"the learning rate (training.lr = {training.lr:g}, warmup_steps = {training.warmup_steps})"
        return Diverged(
            [
                f"training stopped after step {done}: {MAX_SKIPPED} steps in a row were not finite (loss "
                f"{float(loss):g}, gradient norm {float(grad_norm):g}) and none of them was taken; the likely cause is "
                f"{why}; {self._kept()}"
            ]
        )

    def _kept(self) -> str:
        kept = list_checkpoints(Path(self.config.logging.run_dir) / "checkpoints")
        return f"the last checkpoint, {kept[-1].name}, is whole" if kept else "no checkpoint was written"

    def check_finite(self, done: int) -> None:
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

    def fit_memory(self) -> None:
        """activation_checkpointing = "auto": keep what the GPU's memory holds, tried with the first micro-batch."""
        if self.config.training.activation_checkpointing != "auto" or self.world.device.type != "cuda":
            return

        def trial() -> tuple[float, float]:
            for _ in range(2):  # the first may compile
                torch.cuda.reset_peak_memory_stats()
                with self.gradients.micro_batch(last=True):
                    loss = self._loss(self._begin(0, 0))
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
            stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
            later = 0 if self.optimizer.state else 2 * sum(local(p).nbytes for p in stepped)
            if self.config.training.gradient_accumulation_steps > 1:
                later += sum(4 * p.numel() for p in self.trainable)
            return self.world.least((0.94 * (free + torch.cuda.memory_reserved()) - later) / 2**30)

        recompute.fit(blocks(self.model), trial, room)
