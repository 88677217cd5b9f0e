"""One run's configuration: its keys (``schema.py``), what a text may stand for (``texts.py``), how files (``read.py``)
and flags (``flags.py``) become it, and what was meant by a name that nobody knows (``names.py``),
which other tools may (``aliases.py``)."""

from flipproof.config.flags import described_keys, sections_help, split_overrides, warn_of_two
from flipproof.config.read import changed_preset, load_config, load_written, preset_names, preset_text
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
    "changed_preset",
    "described_keys",
    "load_config",
    "load_written",
    "preset_names",
    "preset_text",
    "sections_help",
    "split_overrides",
    "warn_of_two",
]
