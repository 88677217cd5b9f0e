"""One run's configuration: what its keys are (``schema.py``) and how files and flags become it (``read.py``)."""

from flipproof.config.read import add_overrides, load_config, preset_names, preset_text, split_overrides
from flipproof.config.schema import (
    SECTIONS,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoggingConfig,
    ModelConfig,
    ParallelismConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "SECTIONS",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LoggingConfig",
    "ModelConfig",
    "ParallelismConfig",
    "RunConfig",
    "TrainingConfig",
    "add_overrides",
    "load_config",
    "preset_names",
    "preset_text",
    "split_overrides",
]
