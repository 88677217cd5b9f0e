"""Where the metrics of a logged step go: ``metrics.jsonl`` always, TensorBoard and Weights & Biases if asked for.

All three must tell one story of a run that was killed and resumed. Steps beyond the checkpoint run again, with the same
bits, hence:

- ``metrics.jsonl`` drops their lines and gets them anew;
- TensorBoard cannot take back what it has, but an event file that begins with a session start at step n hides
  everything from n on in the files before it (``purge_step``);
- a W&B run goes on under its id, kept in ``wandb_id``; steps that its server has seen are ignored, and the values that
  come again are the values it has.
"""

import dataclasses
import json
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipproof.config import LoggingConfig, RunConfig
from flipproof.errors import ConfigError
from flipproof.files import write_atomically
from flipproof.train.metrics import Metrics

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

WANDB_ID = "wandb_id"


def check_trackers(logging: LoggingConfig) -> None:
    """Raises ConfigError where the config asks for a tracker whose package is not installed."""
    wanted: list[tuple[str, Any]] = []
    if logging.tensorboard:
        wanted.append(("tensorboard", logging.tensorboard))
    if logging.wandb != "disabled":
        wanted.append(("wandb", logging.wandb))
    problems = [
        f"logging.{package} = {json.dumps(value)} needs the package {package}; pip install 'flipproof[track]'"
        for package, value in wanted
        if not _installed(package)
    ]
    if problems:
        raise ConfigError(problems)


def log_in(logging: LoggingConfig) -> None:
    """Raises ConfigError where the config asks for Weights & Biases' server and it does not let this user in. Before
    anything is loaded or measured, where ``check_trackers`` has found nothing; for one process of the run."""
    if logging.wandb != "online":
        return
    import wandb

    try:
        wandb.login(verify=True)
    except (wandb.Error, OSError) as error:  # no key, a wrong one, no network
        raise ConfigError([_refused(logging, Path(logging.run_dir), error)]) from error


def _refused(logging: LoggingConfig, run_dir: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"logging.wandb = {json.dumps(logging.wandb)}: {reason}; offline logs into {run_dir / 'wandb'}"


def _installed(package: str) -> bool:
    # the folder ./wandb that W&B runs leave behind is found too, as a namespace package: that one has no origin
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


class Trackers:
    """Writes the metrics of logged steps to every tracker of the config. For one process of the run."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        """What trackers hold of steps after ``first_step``, the last one done, is dropped or hidden.

        The run's directory must exist, and ``check_trackers`` have found nothing.

        Raises:
            ConfigError: where Weights & Biases does not let the run in.
        """
        run_dir, logging = Path(config.logging.run_dir), config.logging
        self._metrics = Metrics(run_dir, first_step)
        self._tensorboard = _start_tensorboard(run_dir, first_step) if logging.tensorboard else None
        self._wandb = _start_wandb(config, run_dir) if logging.wandb != "disabled" else None

    def write(self, step: int, **values: float | None) -> None:
        """The metrics after ``step`` steps. None, for what was not measured, is null in ``metrics.jsonl`` and absent
        elsewhere."""
        self._metrics.write(step=step, **values)
        measured = {name: value for name, value in values.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in measured.items():
                self._tensorboard.add_scalar(name, value, step)
            # what a checkpoint covers is not logged again, so a kill right after it must lose nothing
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(measured, step=step)

    def sync(self) -> None:
        """Until ``metrics.jsonl`` is on the disk."""
        self._metrics.sync()

    def close(self) -> None:
        """Finish: flush files and wait for uploads."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_tensorboard(run_dir: Path, first_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)


def _start_wandb(config: RunConfig, run_dir: Path) -> "wandb.Run":
    import wandb

    try:
        return wandb.init(
            project=config.logging.wandb_project,
            name=run_dir.name,
            dir=run_dir,
            mode=config.logging.wandb,
            config=dataclasses.asdict(config),
            id=_wandb_id(run_dir),
            resume="allow",
        )
    except wandb.Error as error:  # no key, no network, no such entity
        raise ConfigError([_refused(config.logging, run_dir, error)]) from error


def _wandb_id(run_dir: Path) -> str:
    """The id of the W&B run that this directory belongs to, made at the first call."""
    path = run_dir / WANDB_ID
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex + "\n")
    return path.read_text().strip()
