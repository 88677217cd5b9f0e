"""``flipproof harden``: a model in a basis without outliers, behind guards that fit it, and what that is worth.

Nothing is trained. What stands in the way of a guard are the few channels that hold numbers a thousand times as large
as the others: ``models/rotate.py`` spreads them over all channels, ``measure/guards.py`` fits a threshold to each, and
two sweeps say what flips cost before and after, on held-out text that neither has seen. Before is the same model in
its own basis behind one fitted threshold for all layers, and behind guards as fine as those after.
"""

import os
from collections.abc import Callable
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from flipproof.config import RunConfig
from flipproof.config.sweep import SweepConfig
from flipproof.errors import ConfigError
from flipproof.faults.spec import Granularity
from flipproof.files import check_writable, discard
from flipproof.log import logger
from flipproof.measure.arms import Arm
from flipproof.measure.evaluate import evaluate
from flipproof.measure.guards import calibration_text, fit_guards
from flipproof.models.build import check_length
from flipproof.models.layerwise import rotate_into
from flipproof.models.load import load_tokenizer
from flipproof.models.rotate import How
from flipproof.models.save import new_directory
from flipproof.records import read_record, write_new_record
from flipproof.report.page import report
from flipproof.sweep.run import sweep
from flipproof.sweep.store import HEADER, read_points
from flipproof.sweep.table import resolved
from flipproof.world import World, join_world

HARDENED = "hardened.json"
CALIBRATE = 512
"""Sequences: with few, channels that they hardly used clip other text (``benchmarks/README.md``)."""
DEFAULT_P = "3.814697265625e-06:0.0009765625:5"
"""2⁻¹⁸, 2⁻¹⁶, … 2⁻¹⁰: from what a guard alone bears to where nothing helps."""
_BEFORE, _AFTER, _OLD_GUARDS = "before", "after", "before-guards"


def harden(
    config: RunConfig,
    to: Path,
    how: How = "residual",
    by: Granularity = "channel",
    calibrate: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Rotate a model, fit guards, measure before and after, and write all that.

    Args:
        config: the model; ``data.source``, to whose training part guards are fitted and whose held-out part is
            measured; of ``sweep`` the probabilities and seeds; of ``bitflip`` margins and patterns. ``training.seed``
            is that of the bases.
        to: a new directory: the model, which ``AutoModelForCausalLM`` opens unless ``how`` is "full",
            ``guards.safetensors``; ``results.json`` of it behind them, at the middle one of the probabilities;
            ``hardened.json``, the table; ``report.html``; and the sweeps in ``before/`` and ``after/``.
        how: as ``rotate`` takes it.
        by: how fine guards are.
        calibrate: sequences of training text that guards are fitted to; ``CALIBRATE`` where it is not said.
        tell: called with what was done and the table.

    Raises:
        ConfigError: where model, text or directory are at fault, or the model cannot be rotated so; before anything is
            written.
    """
    calibrate = CALIBRATE if calibrate is None else calibrate
    if calibrate < 1:
        raise ConfigError([f"--calibrate = {calibrate}: a whole number from 1 is allowed"])
    if config.bitflip.guards:
        raise ConfigError([f"bitflip.guards = {config.bitflip.guards!r}: harden fits guards of its own; leave it out"])
    if config.model.init == "random":
        raise ConfigError(["model.init = 'random': a model that knows nothing has nothing to lose; name a trained one"])
    if set_here := [f.name for f in fields(config.sweep) if f.name not in ("p", "seeds") and _is_set(config.sweep, f)]:
        names = " and ".join(f"sweep.{name}" for name in set_here)
        raise ConfigError([f"{names}: harden flips every bit of weights and inputs; of [sweep] it takes p and seeds"])
    if os.path.lexists(to):
        raise ConfigError([f"--to {to} exists already; name a new directory"])
    check_writable(to, "--to")
    resolved(_measured(config, to, f"guard-{by}"))
    fitting = replace(config, eval=replace(config.eval, num_samples=calibrate))
    with join_world(config.parallelism) as world:
        say = tell if tell and world.first else (lambda _: None)
        tokenizer = load_tokenizer(config.model)
        check_length(config, tokenizer)
        calibration_text(fitting, tokenizer)
        with new_directory(to, world) as new:
            of = config.model, tokenizer, config.training.dtype, how, config.training.seed
            rotation, dtype = rotate_into(new, *of, world)
        say(str(rotation))
        about = {"model": str(config.model.hf_model_path), "dtype": dtype, "rotation": asdict(rotation)}
        try:
            _guard_and_measure(config, fitting, to, by, about, world, say)
        except ConfigError:
            if world.first:
                discard(to)  # what was wrong with it would stand in the way of the next try
            raise
        except BaseException:
            logger.warning("%s is not complete: a rotated model without all that was to be measured; delete it", to)
            raise
    return to


def _guard_and_measure(
    config: RunConfig,
    fitting: RunConfig,
    to: Path,
    by: Granularity,
    about: dict[str, Any],
    world: World,
    say: Callable[[str], None],
) -> None:
    """What follows on the rotated model that ``to`` holds."""
    after = replace(config, model=replace(config.model, hf_model_path=str(to)))
    fit_guards(replace(fitting, model=after.model), by, to, tell=say)
    fit_guards(fitting, by, to / _OLD_GUARDS)
    one_for_all = dict.fromkeys(["guard-tensor", f"guard-{by}"])
    sweep(_measured(config, to / _OLD_GUARDS, ",".join(one_for_all)), to / _BEFORE)
    measured = _measured(after, to, f"guard-{by}")
    sweep(measured, to / _AFTER)
    probabilities = measured.sweep.probabilities()
    evaluate(_flipping(measured, probabilities[len(probabilities) // 2]), to=to)
    if not world.first:
        return
    points = {name: _points(to / name) for name in (_BEFORE, _AFTER)}
    write_new_record(to / HARDENED, {**about, "guards": by, **points}, "--to")
    page = report(to)
    say(f"{_table(points)}\n\n{_how_to_use(to, about['rotation'])}; {page} shows what was measured")


def _is_set(table: SweepConfig, key: Field[Any]) -> bool:
    return bool(getattr(table, key.name) != key.default)


def _flipping(config: RunConfig, p: float) -> RunConfig:
    """With every bit of weights and inputs flipping at ``p``."""
    rates: dict[str, Any] = {f"{operand}_{key}": p for operand in "wx" for key in ("p_exp", "p_frac")}
    return replace(config, bitflip=replace(config.bitflip, **rates))


def _measured(config: RunConfig, guards: Path, protection: str) -> RunConfig:
    """The config of a sweep behind fitted guards."""
    sweep_config = replace(config.sweep, p=config.sweep.p or DEFAULT_P, protection=protection)
    return replace(config, bitflip=replace(config.bitflip, guards=str(guards)), sweep=sweep_config)


def _points(directory: Path) -> list[dict[str, Any]]:
    """What flips cost in each cell of a sweep, in nats above the clean loss, with its 95% interval over seeds; the
    guard alone at p = 0."""
    header = read_record(directory / HEADER)
    clean = header["clean"]["loss"]
    found = [
        {"protection": name, "sites": "", "p": 0.0, "cost": alone["loss"] - clean, "interval": None}
        for name, alone in header["guards"].items()
    ]
    losses: dict[tuple[str, str, float], list[float]] = {}
    for _, point in read_points(directory):
        losses.setdefault((point.setting.protection, point.setting.sites, point.p), []).append(point.loss)
    for (protection, sites, p), measured in sorted(losses.items()):
        arm = Arm.from_losses(measured, header["tokens"])
        interval = arm.loss_interval and tuple(bound - clean for bound in arm.loss_interval)
        cost = {"cost": arm.loss - clean, "interval": interval}
        found.append({"protection": protection, "sites": sites, "p": p, **cost})
    return found


def _table(points: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each probability, a column for each model and guard."""
    columns = list(dict.fromkeys((name, one["protection"]) for name, of in points.items() for one in of))
    cells = {(name, one["protection"], one["sites"], one["p"]): one for name, of in points.items() for one in of}
    rows = sorted({(sites, p) for _, _, sites, p in cells})
    words = {_BEFORE: "as it was", _AFTER: "hardened"}
    titles = [f"{words[name]}, {protection}" for name, protection in columns]
    lines = ["what flips cost, in nats per token, with 95% over fault seeds"]
    lines.append(f"{'p of every bit':<22}" + "".join(f"{title:>30}" for title in titles))
    for sites, p in rows:
        row = [cells.get((*column, sites, p)) for column in columns]
        what = f"{p:.3g} ({sites})" if p else "0, the guard alone"
        lines.append(f"{what:<22}" + "".join(f"{_cell(one):>30}" for one in row))
    return "\n".join(lines)


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "-"
    interval = f" ({one['interval'][0]:.4f} to {one['interval'][1]:.4f})" if one["interval"] else ""
    return f"{one['cost']:.4f}{interval}"


def _how_to_use(to: Path, rotation: dict[str, Any]) -> str:
    opens = "flipproof opens it, transformers alone does not" if rotation["online"] else "transformers opens it"
    left = "" if rotation["stream"] or rotation["how"] == "none" else "; its residual stream could not be rotated"
    return f"{to}: {opens}{left}; its guards: --bitflip.guards {to}"
