"""Validation while training: the arms of the model as it is at a step, on held-out text.

It is the final evaluation with its first fault seed alone: same text, sequences and flips, so that the last point of a
curve stands in the final arms too. It changes nothing that training reads: ticks are counted apart, the model's mode
comes back, and what dropout draws is set anew by each step.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from flipproof.config import RunConfig
from flipproof.data.sequences import PackedText
from flipproof.log import logger
from flipproof.measure.arms import ARMS
from flipproof.measure.evaluate import fault_seeds, measure_config_arms
from flipproof.world import World


class Validation:
    """When a training is validated, and in which arms."""

    def __init__(
        self,
        config: RunConfig,
        names: Sequence[str],
        model: nn.Module,
        text: PackedText,
        world: World,
        epoch: int,
    ) -> None:
        """
        Args:
            config: of the run; that of a control is its run's, whose faults its arms have.
            names: of the trained arms, that under faults first.
            model: the one that trains.
            text: held out.
            epoch: sequences of the text that it trains on.
        """
        self.config, self.names, self.model, self.text, self.world, self.epoch = (
            config, names, model, text, world, epoch
        )  # fmt: skip

    def due(self, done: int) -> bool:
        """Whether it comes after the ``done``-th step: every so many, or where a pass over the text ends; and last."""
        training = self.config.training
        if training.eval_freq == 0:
            return False
        if done == training.steps:
            return True
        if training.eval_freq == "epoch":
            rows = self.config.sequences_per_step(self.world.size)
            return done * rows // self.epoch > (done - 1) * rows // self.epoch
        return done % training.eval_freq == 0

    def losses(self) -> dict[str, float]:
        """Key of the metrics -> nats per token; the first decides which checkpoint is best. All processes must call."""
        once = replace(self.config.eval, trials=1, until_ci=None)
        config = replace(self.config, eval=once)
        arms = measure_config_arms(config, self.names, self.model, self.text, self.world)
        return {metric_of(name): arm.loss for name, arm in arms.items()}

    def announce(self) -> None:
        """Log what will be measured, and when."""
        training, spec = self.config.training, self.config.bitflip
        if training.eval_freq == 0:
            return
        when = "at the end of every epoch" if training.eval_freq == "epoch" else f"every {training.eval_freq} steps"
        seed = f", flips of fault seed {fault_seeds(spec.base_seed, 1)[0]}" if self._flips else ""
        sequences = min(self.config.eval.num_samples, len(self.text))
        logger.info("validation %s and at the last one, on %d held-out sequences%s", when, sequences, seed)

    @property
    def _flips(self) -> bool:
        return any(ARMS[name].flips for name in self.names)


def metric_of(arm: str) -> str:
    """What the loss of a trained arm is called in the metrics: after its faults, the same for a run and its control."""
    kind = ARMS[arm]
    return f"eval_loss_{'flipped' if kind.flips else 'guard' if kind.guard else 'clean'}"
