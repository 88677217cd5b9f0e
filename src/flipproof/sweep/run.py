"""A grid of faults, measured: ``flipproof sweep``.

The model is built once, with every layer faulty that the grid needs. A trial then is other faults in the same layers
(``set_faults``), a fault seed, and one evaluation, and the point equals what ``flipproof eval`` says of the same faults
and seed. What the grid is, is said in ``table``; which trial comes next, in ``order``; what processes share, in
``store``.

Processes that torchrun started are one worker: the first claims trials and writes points down, all measure them.
"""

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from flipproof.config import RunConfig
from flipproof.data.sequences import PackedText, load_held_out
from flipproof.errors import about
from flipproof.faults.fitted import read_guards
from flipproof.faults.inject import faults, inject, set_faults
from flipproof.faults.spec import OPERANDS
from flipproof.log import bar, logger
from flipproof.measure.arms import Arm, guard_warning
from flipproof.measure.evaluate import mean_loss, measure_arms
from flipproof.models.build import (
    build_model,
    check_computed_bits,
    check_guards,
    check_length,
    check_use,
    flipped_dtype,
)
from flipproof.models.load import compute_context, load_tokenizer, model_config, model_on_meta
from flipproof.models.packed import check_text
from flipproof.models.parallelize import cast_to
from flipproof.models.quantised import checkpoint_of
from flipproof.models.recompute import expect_variants
from flipproof.sweep import formats
from flipproof.sweep.order import Cell, Rate, Trial, next_trial
from flipproof.sweep.store import SweepDirectory
from flipproof.sweep.table import Grid, all_that_flips, rates_of, resolved
from flipproof.world import World, join_world

_LOG_EVERY_S = 30.0
_TABLE_COLUMNS = 6
_VARIANTS = 8
"""Of a compiled block, for each curve: kinds of blocks, with its faults and without."""


def sweep(config: RunConfig, to: Path) -> str:
    """Measure the grid of ``config.sweep``, or what is left of it, into a directory.

    Args:
        config: model, text, and the faults that all points share.
        to: the directory: new, or one that holds the same sweep, which then goes on.

    Returns:
        A table for people: perplexities by flip probability.

    Raises:
        ConfigError: where grid, model, text or directory are at fault, before anything is measured or written.
    """
    if config.sweep.formats is not None:
        return _sweep_formats(config, to)
    return _report(*_sweep(config, to, time.monotonic()))


def _sweep_formats(config: RunConfig, to: Path) -> str:
    """A sweep of each format, one after another: one model is in memory at a time."""
    started, configs = time.monotonic(), formats.by_format(config)
    with join_world(config.parallelism) as world:
        world.once(lambda: formats.check_directory(to, config))
        formats.check_plain(config)
        for name, own in configs.items():
            with about(name):
                _check(resolved(own), SweepDirectory(to / name), world)
        world.once(lambda: formats.begin(to, config))
    for name, own in configs.items():
        logger.info("%s", name)
        with about(name):
            share = formats.with_share_of_budget(own, configs, name, time.monotonic() - started)
            _sweep(share, to / name, time.monotonic())
        gc.collect()  # hooks of a model know it, so it would stay until the next one is there
    return formats.table(to)


def _check(config: RunConfig, directory: SweepDirectory, world: World) -> tuple[list[Rate], Any]:
    """(rates, tokenizer) of a resolved config, after all that can be checked before weights and text are read."""
    rates = rates_of(config.sweep)
    known = _known_before(config, rates, world)
    world.once(lambda: directory.check(config, known))
    check_use(config, world.size)
    tokenizer = load_tokenizer(config.model)
    check_length(config, tokenizer)
    _check_grid(config, rates, tokenizer)
    return rates, tokenizer


def _sweep(config: RunConfig, to: Path, started: float) -> tuple[Grid, SweepDirectory, dict[str, Any]]:
    """Measure what is left of one model's grid; its header comes last."""
    config = resolved(config)
    directory = SweepDirectory(to)
    with join_world(config.parallelism) as world:
        rates, tokenizer = _check(config, directory, world)
        text = load_held_out(config.data, tokenizer, config.training.seq_len)
        model = build_model(replace(config, bitflip=all_that_flips(config)), tokenizer, world)
        check_text(config.training, model, tokenizer, text)
        check_guards(config.bitflip.guards, model, world)
        grid = Grid(config, rates, model, flipped_dtype(config.training, model))
        expect_variants(_VARIANTS * len(grid.plan.curves))
        with compute_context(config.training, model):
            header = _begin(grid, directory, model, text, world)
            _measure(grid, directory, model, text, world, started)
    return grid, directory, header


def _known_before(config: RunConfig, rates: list[Rate], world: World) -> dict[str, Any]:
    """What of the sweep's header is known before the model is."""
    return {
        "voltages": None if config.sweep.voltage is None else [[rate.voltage, rate.p] for rate in rates],
        "sequences_per_pass": config.training.local_batch_size * world.size,
        **({"fitted": read_guards(path).about} if (path := config.bitflip.guards) else {}),
    }


def _check_grid(config: RunConfig, rates: list[Rate], tokenizer: Any) -> None:
    """Raises ConfigError for layers that the model does not have, or bits that its dtype lacks: on its skeleton, before
    weights and text are read."""
    if checkpoint_of(config.model, model_config(config.model, tokenizer)) is not None:
        return  # it has no skeleton without its files: told when they are read
    skeleton = model_on_meta(config.model, tokenizer, config.training.dtype)
    check_computed_bits(config, skeleton)
    inject(skeleton, all_that_flips(config), computed=cast_to(config.training, skeleton))
    grid = Grid(config, rates, skeleton, flipped_dtype(config.training, skeleton))
    for spec in grid.guards.values():
        set_faults(skeleton, spec)


def _begin(grid: Grid, directory: SweepDirectory, model: nn.Module, text: PackedText, world: World) -> dict[str, Any]:
    """The header of the sweep: what is there already, or measured and written now."""
    config, bitflip = grid.config, grid.config.bitflip
    thresholds = {operand: getattr(bitflip, f"{operand}_zero_out_t") for operand in (*OPERANDS, "w_scale")}
    header: dict[str, Any] = {
        "model": config.model.hf_model_path or config.model.flavor,
        "dtype": grid.dtype,
        "text": text.source,
        "tokens": min(config.eval.num_samples, len(text)) * (config.training.seq_len - 1),
        "axes": {
            "p": [rate.p for rate in grid.rates],
            "sites": grid.sites,
            "layers": grid.layers,
            "bits": grid.bits,
            "protection": grid.protections,
            "seeds": config.sweep.seeds,
        },
        "overhead": grid.overhead,
        **_known_before(config, grid.rates, world),
        "thresholds": {name: t for name, t in thresholds.items() if name in "wx" or t is not None},
        "planned": len(grid.plan.trials),
    }
    lock: FileLock | None = None

    def open_directory() -> dict[str, Any] | None:
        nonlocal lock
        lock = directory.begin(config, _known_before(config, grid.rates, world))
        return directory.header(header)

    try:
        if (there := world.once(open_directory)) is not None:
            return dict(there)
        arms: dict[str, Arm] = {}
        alone: dict[str, Any] = {}
        warnings = []
        for name, spec in {"": None, **grid.guards}.items():
            if spec is not None:
                set_faults(model, spec)
            arms |= measure_arms(
                model,
                ("clean",) if spec is None else ("guard",),
                text,
                seeds=(),
                num_samples=config.eval.num_samples,
                batch_size=config.training.local_batch_size,
                world=world,
            )
            arm = arms["clean" if spec is None else "guard"]
            alone[name] = {"loss": arm.loss, "perplexity": arm.perplexity}
            if spec is not None and (line := guard_warning(arms, spec)):
                warnings.append(line)
        header["clean"] = alone.pop("")
        header["guard"] = next(iter(alone.values()), None)
        if any(name != "guard" for name in alone):
            header["guards"] = alone
        header |= {"format": grid.format.name if grid.format else grid.dtype, "stored_bits": grid.stored_bits}
        logger.info("%s", _base_in_words(header))
        for line in warnings:
            logger.warning("%s", line)
        world.once(lambda: directory.write_header(header))
    finally:
        if lock is not None:
            lock.release()
    return header


def _measure(
    grid: Grid, directory: SweepDirectory, model: nn.Module, text: PackedText, world: World, started: float
) -> None:
    """Measure trials until all are measured or claimed by others, or the budget is used."""
    trials = grid.plan.trials
    budget_s = math.inf if (minutes := grid.config.sweep.budget_minutes) is None else minutes * 60
    claimed: tuple[Trial, FileLock] | None = None
    measured: tuple[float, int, float] | None = None
    said = time.monotonic()

    def finish_and_choose() -> str | None:
        """Write down the point that was measured; the id of the next."""
        nonlocal claimed
        if claimed is not None and measured is not None:
            directory.write(claimed[0], *measured)
            directory.refresh(trials)
            directory.clear(claimed[1])
        claimed = _claim_next(grid, directory, budget_s, started)
        return None if claimed is None else claimed[0].id

    world.once(lambda: directory.refresh(trials))
    with bar(len(trials), "point", world.first, initial=len(directory.measured)) as shown:
        while (name := world.once(finish_and_choose)) is not None:
            shown.update(len(directory.measured) - shown.n)
            if shown.disable and world.first and time.monotonic() - said > _LOG_EVERY_S:
                said = time.monotonic()
                logger.info("%d of %d points, %s", len(directory.measured), len(trials), _time_left(directory, trials))
            trial, since = trials[name], time.monotonic()
            set_faults(model, grid.spec(trial.cell))
            with faults(model, adapters=False, seed=trial.seed):
                loss, tokens = mean_loss(
                    model, text, grid.config.eval.num_samples, grid.config.training.local_batch_size, world
                )
            measured = loss, tokens, time.monotonic() - since


def _claim_next(
    grid: Grid, directory: SweepDirectory, budget_s: float, started: float
) -> tuple[Trial, FileLock] | None:
    """The next trial that no other process has; None where there is none, or no time for it."""
    if time.monotonic() - started + _mean_seconds(directory) > budget_s:
        return None
    busy: set[str] = set()
    while True:
        trial = next_trial(grid.plan, {name: point.loss for name, point in directory.measured.items()}, busy)
        if trial is None:
            return None
        if (lock := directory.claim(trial)) is None:
            busy.add(trial.id)
            continue
        directory.refresh(grid.plan.trials)  # it may have been finished since
        if trial.id not in directory.measured:
            return trial, lock
        directory.clear(lock)


def _mean_seconds(directory: SweepDirectory) -> float:
    """Seconds that a point takes; 0 where none was measured yet."""
    seconds = [point.seconds for point in directory.measured.values()]
    return math.fsum(seconds) / max(1, len(seconds))


def _time_left(directory: SweepDirectory, trials: Mapping[str, Trial]) -> str:
    left = _mean_seconds(directory) * (len(trials) - len(directory.measured))
    return f"{int(left) // 60}:{int(left) % 60:02d} left for one process"


def _report(grid: Grid, directory: SweepDirectory, header: dict[str, Any]) -> str:
    """Mean perplexities by flip probability, one column for each curve as far as they fit a page, and what to do
    next."""
    directory.refresh(grid.plan.trials)
    done, planned = len(directory.measured), len(grid.plan.trials)
    curves = grid.plan.curves
    shown = curves[:_TABLE_COLUMNS]
    differ = [i for i in range(4) if len({curve[0].setting[i] for curve in curves}) > 1] or [0]
    names = [" ".join(curve[0].setting[i] for i in differ) for curve in shown]
    widths = [max(10, len(name)) for name in names]
    voltages = grid.config.sweep.voltage is not None
    lines = [
        f"{'voltage':>8}  " * voltages
        + f"{'p':>10}  "
        + "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    ]
    for i, rate in enumerate(grid.rates):
        texts = [
            f"{_mean_perplexity(grid, directory, curve[i], header['tokens']):>{width}}"
            for curve, width in zip(shown, widths, strict=True)
        ]
        lines.append((f"{rate.voltage:>8.4g}  " if voltages else "") + f"{rate.p:>10.3g}  " + "  ".join(texts))
    if len(curves) > len(shown):
        lines.append(f"(perplexity; {len(curves) - len(shown)} more curves in the report)")
    lines += ["", f"{_base_in_words(header)}; {done} of {planned} points"]
    if done < planned:
        lines.append("the rest is with other processes, or left for the same command again")
    lines.append(f"{directory.path}: see flipproof report {directory.path}")
    return "\n".join(lines)


def _base_in_words(header: dict[str, Any]) -> str:
    """What the model is without flips."""
    guards = header.get("guards") or {"guard": header["guard"]}  # the one that sweeps of before have
    named = {"clean perplexity": header["clean"]}
    named |= {f"behind {name.replace('guard', 'the guard', 1)} alone": one for name, one in guards.items()}
    found = {words: one["perplexity"] for words, one in named.items() if one}
    return ", ".join(f"{words} {math.inf if value is None else value:.4g}" for words, value in found.items())


def _mean_perplexity(grid: Grid, directory: SweepDirectory, cell: Cell, tokens: int) -> str:
    names = (cell.point_id(seed) for seed in grid.plan.seeds)
    losses = [directory.measured[name].loss for name in names if name in directory.measured]
    return f"{Arm.from_losses(losses, tokens).perplexity:.4g}" if losses else "-"
