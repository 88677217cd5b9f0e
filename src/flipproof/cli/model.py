"""MODEL on a command line: a directory, a Hub name, or the directory of a run, which stands for what it trained."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flipproof.config import RunConfig, load_config
from flipproof.errors import ConfigError
from flipproof.files import is_path
from flipproof.log import logger
from flipproof.records import CONFIG, GUARDS, check_toml

Overrides = dict[str, dict[str, Any]]


def config_of(
    model: str | None, files: Sequence[str], overrides: Overrides, resume: bool = False
) -> tuple[RunConfig, Path | None]:
    """(the config of a command line, the adapter of the run that it names as its model).

    A run's config comes first: files and flags count over it.

    Args:
        model: what is given as MODEL.
        files: what is given to --config.
        overrides: section -> key -> text, of the flags.
        resume: whether a run that is named goes on, so that it needs no result.

    Raises:
        ConfigError: with everything that is wrong, or where a run has no result.
    """
    if model is None:
        return load_config(files, overrides), None
    if not model:  # as a path it would be the directory here; mostly it is an unset variable of the shell
        raise ConfigError(["MODEL is empty"])
    run = Path(os.path.expanduser(model))
    if (run / CONFIG).is_file():
        check_toml(run / CONFIG)
        weights, adapter = ({}, None) if resume else _result(run)
        own = {"model": weights, "logging": {"run_dir": str(run)}}
        if (
            run / GUARDS
        ).is_file() and not resume:  # the thresholds that it was trained behind, whatever became of them
            own["bitflip"] = {"guards": str(run)}
        overrides = _under(own, overrides)
        config = load_config([run / CONFIG, *files], overrides)
        if not resume:
            _say_if_it_went_on(run)
        return config, adapter
    if is_path(model) and not run.exists():  # what may be a name on the Hub is asked for there
        what = "file" if run.suffix == ".gguf" else "directory"
        raise ConfigError([f"MODEL = {model!r}: there is no such {what}"])
    if "hf_model_path" in overrides.get("model", {}):
        logger.warning("MODEL is --model.hf_model_path, which is given as well; MODEL counts")
    return load_config(files, _under(overrides, {"model": {"hf_model_path": model}})), None


def _result(run: Path) -> tuple[dict[str, Any], Path | None]:
    """([model]'s keys of the model that a run has written, its adapter): one of the two, the adapter where it has
    written both."""
    if any((run / "adapter").glob("*.safetensors")):
        return {}, run / "adapter"
    if any((run / "model").glob("*.safetensors")):
        return {"hf_model_path": str(run / "model"), "init": "pretrained", "flavor": None}, None
    wrong = f"{run} holds a run that has written neither model/ nor adapter/; flipproof train {run} --resume goes on"
    if any((run / "checkpoints").glob("step-*")):
        wrong += f", and flipproof export {run} --to DIR makes a model of its last checkpoint"
    raise ConfigError([wrong])


def control_of(adapter: Path) -> Path | None:
    """The adapter of the control of the run whose adapter this is; None where it has trained none to the end."""
    control = adapter.parent / "control" / "adapter"
    return control if any(control.glob("*.safetensors")) else None


def _say_if_it_went_on(run: Path) -> None:
    """A finished run that is resumed with more steps has its old result until it is finished again."""
    steps = tomllib.loads((run / CONFIG).read_text("utf-8-sig")).get("training", {}).get("steps")
    names = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*")]
    done = max((int(name) for name in names if re.fullmatch("[0-9]+", name)), default=None)
    if done is not None and isinstance(steps, int) and done < steps:
        logger.warning("%s has gone on since it wrote its result, which is what counts here: its newest checkpoint is "
                       "step-%d of %d; flipproof train %s --resume finishes it", run, done, steps, run)  # fmt: skip


def _under(overrides: Mapping[str, Mapping[str, Any]], over: Mapping[str, Mapping[str, Any]]) -> Overrides:
    return {name: {**overrides.get(name, {}), **over.get(name, {})} for name in {**overrides, **over}}
