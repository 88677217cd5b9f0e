"""What ``flipproof plan`` says: text for a terminal, or JSON."""

import json
from dataclasses import replace
from pathlib import Path

from flipproof.config import RunConfig
from flipproof.errors import ConfigError
from flipproof.plan.estimate import Request, as_record, as_text, make_plan
from flipproof.plan.memory import scores
from flipproof.plan.recommend import as_records, as_table, recommend


def this_way(config: RunConfig, request: Request, as_json: bool, picture: Path | None, dry: bool) -> str:
    """Of the config as it is. ``picture`` is a file to write as well; ``dry``: with a dry run.

    Raises:
        ConfigError: as ``make_plan`` does, or where the picture cannot be written.
    """
    if picture:
        from flipproof.plan.picture import check_picture, write_picture

        check_picture(picture)
    if dry and config.parallelism.cpu_offload:
        raise ConfigError(["--dry-run counts a GPU's memory alone; leave out parallelism.cpu_offload"])
    plan = make_plan(config, request)
    if dry and scores(plan.shape, plan.config):
        raise ConfigError(
            [
                "--dry-run: in float32 a GPU attends otherwise than a CPU where heads share keys; leave it out, or "
                "compute in bfloat16 (training.mixed_precision_param)"
            ]
        )
    if dry:
        from flipproof.plan.dry_run import dry_run

        plan = replace(plan, dry_run=dry_run(plan.config, plan.spread, plan.kept))
    if picture:
        write_picture(plan, picture)
    return json.dumps(as_record(plan), indent=2) if as_json else as_text(plan)


def all_ways(config: RunConfig, request: Request, as_json: bool) -> str:
    """Of all ways to run it. Raises ConfigError as ``recommend`` does."""
    options = recommend(config, request)
    return json.dumps(as_records(options), indent=2) if as_json else as_table(options)
