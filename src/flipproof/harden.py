"""``flipproof harden``: a model in a basis without outliers, behind guards that fit it, and what that is worth.

Nothing is trained. What stands in the way of a guard are the few channels that hold numbers a thousand times as large
as the others: ``models/rotate.py`` spreads them over all channels, ``measure/guards.py`` fits a threshold to each, and
two sweeps say what flips cost before and after, on held-out text that neither has seen. Before is the same model in
its own basis behind one fitted threshold for all layers, and behind guards as fine as those after.

Weights that are to be quantised (``model.quantize``) are rotated first: the directory holds them plain, and what is
guarded and measured, before and after, is what they become. A checkpoint that is quantised already keeps its weights:
it is guarded and measured, and what was not tried is said.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from flipproof.config import ModelConfig, RunConfig
from flipproof.config.sweep import SweepConfig
from flipproof.errors import ConfigError
from flipproof.faults.fault import Granularity
from flipproof.files import check_writable, finite, write_atomically
from flipproof.formats.spec import Format
from flipproof.log import logger
from flipproof.measure.arms import Arm
from flipproof.measure.card import CARD, front_matter, markdown_table
from flipproof.measure.evaluate import evaluate
from flipproof.measure.guards import calibration_text, fit_guards
from flipproof.models.build import check_length, check_use
from flipproof.models.layerwise import rotate_into
from flipproof.models.load import load_tokenizer, model_config, skeleton
from flipproof.models.quantised import checkpoint_of, wanted_format, wanted_inputs
from flipproof.models.rotate import How
from flipproof.models.save import new_directory
from flipproof.records import GUARDS, HARDENED, RESULTS, read_record, write_record
from flipproof.report.hardening import cost_table, in_words
from flipproof.report.page import report
from flipproof.report.read import Hardened, read_hardened
from flipproof.sweep.run import sweep
from flipproof.sweep.store import HEADER, depends_on, read_points, refuse_other
from flipproof.sweep.table import resolved
from flipproof.sweep.weights import Flipping, input_keys, quantised_keys
from flipproof.world import World, join_world

CALIBRATE = 512
"""Sequences: with few, channels that they hardly used clip other text (``benchmarks/README.md``)."""
DEFAULT_P = "3.814697265625e-06:0.0009765625:5"
"""2⁻¹⁸, 2⁻¹⁶, … 2⁻¹⁰: from what a guard alone bears to where nothing helps."""
_BEFORE, _AFTER, _OLD_GUARDS = "before", "after", "before-guards"
_WHAT_COSTS = "what flips cost, in nats per token, with 95% over fault seeds"


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
    _check(config, to, by, calibrate)
    fitting = replace(config, eval=replace(config.eval, num_samples=calibrate))
    arguments = _arguments(config, how, by, calibrate)
    with join_world(config.parallelism) as world:
        say = tell if tell and world.first else (lambda _: None)
        about = world.once(lambda: _begun(to, arguments))
        check_use(config, world.size)
        tokenizer = load_tokenizer(config.model)
        check_length(config, tokenizer)
        format, inputs = _formats_of(config, tokenizer)
        if (there := len(calibration_text(fitting, tokenizer))) < calibrate:
            size = f"{there:,} sequences of {config.training.seq_len:,} tokens"
            say(f"--calibrate = {calibrate}: the text has {size}; all of them are used")
        if about is None:
            # with its record from the beginning, by which a run that is killed at any time goes on
            with new_directory(to, world, unfinished=[HARDENED]) as new:
                plain = replace(config.model, quantize=None, quantize_inputs=None)
                of = plain, tokenizer, config.training.dtype, how, config.training.seed
                rotation, dtype = rotate_into(new, *of, world)
                about = {"model": str(config.model.hf_model_path), "dtype": dtype, "rotation": asdict(rotation)}
                about |= {"guards": by, "arguments": arguments} | ({"format": format.name} if format else {})
                world.once(lambda: write_record(new / HARDENED, about))
            say(str(rotation))
        else:
            say(f"{to}: goes on where it was; the model is rotated")
        try:
            _guard_and_measure(config, fitting, to, by, about, (format, inputs), world, say)
        except BaseException:
            logger.warning("%s is not complete: the same command goes on", to)
            raise
    return to


def _check(config: RunConfig, to: Path, by: Granularity, calibrate: int) -> None:
    """Raises ConfigError for what can be known to be wrong without the model."""
    if calibrate < 1:
        raise ConfigError([f"--calibrate = {calibrate}: a whole number from 1 is allowed"])
    if config.bitflip.guards:
        raise ConfigError([f"bitflip.guards = {config.bitflip.guards!r}: harden fits guards of its own; leave it out"])
    if config.model.init == "random":
        raise ConfigError(["model.init = 'random': a model that knows nothing has nothing to lose; name a trained one"])
    if set_here := [f.name for f in fields(config.sweep) if f.name not in ("p", "seeds") and _is_set(config.sweep, f)]:
        names = " and ".join(f"sweep.{name}" for name in set_here)
        raise ConfigError([f"{names}: harden flips every bit of weights and inputs; of [sweep] it takes p and seeds"])
    if 0 in (measured := _measured(config, to, f"guard-{by}")).sweep.probabilities():
        raise ConfigError(
            ["sweep.p = 0: nothing flips there; the guard alone is measured in any case, so leave it out"]
        )
    resolved(measured)


def _formats_of(config: RunConfig, tokenizer: Any) -> tuple[Format | None, Format | None]:
    """Of the weights and of the inputs that are measured, where they are quantised. Raises ConfigError where they
    cannot be so."""
    checkpoint = checkpoint_of(config.model, model_config(config.model, tokenizer))
    inputs = wanted_inputs(config.model, checkpoint)
    if checkpoint is not None:
        return checkpoint.format, inputs
    if (format := wanted_format(config.model)) is not None:
        skeleton(config.model, tokenizer, config.training.dtype)  # whose layers its groups may not divide
    return format, inputs


def _arguments(config: RunConfig, how: How, by: Granularity, calibrate: int) -> dict[str, Any]:
    """All that a hardened directory depends on, as JSON has it."""
    points = depends_on(replace(config, sweep=replace(config.sweep, p=config.sweep.p or DEFAULT_P)))
    found = {"rotate": how, "guards": by, "calibrate": calibrate, "eval.trials": config.eval.trials, **points}
    return dict(json.loads(json.dumps(finite(found))))


def _begun(to: Path, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted start of the same arguments has written; None where there is nothing.

    Raises:
        ConfigError: where there is anything else.
    """
    check_writable(to, "--to")
    if not os.path.lexists(to):
        return None
    try:
        about = read_record(to / HARDENED)
    except (OSError, ValueError):
        about = {}
    if "arguments" not in about or (to / CARD).exists():
        raise ConfigError([f"--to {to} exists already; name a new directory"])
    refuse_other(to, "hardening", about["arguments"], arguments)
    return about


def _guard_and_measure(
    config: RunConfig,
    fitting: RunConfig,
    to: Path,
    by: Granularity,
    about: dict[str, Any],
    stored: tuple[Format | None, Format | None],
    world: World,
    say: Callable[[str], None],
) -> None:
    """What follows on the rotated model that ``to`` holds, but for what is there already."""

    def missing(path: Path) -> bool:
        return world.once(lambda: not path.exists())

    after = replace(config, model=replace(config.model, hf_model_path=str(to)))
    if missing(to / GUARDS):
        fit_guards(replace(fitting, model=after.model), by, to, tell=say)
    if missing(to / _OLD_GUARDS / GUARDS):
        fit_guards(fitting, by, to / _OLD_GUARDS)
    one_for_all = dict.fromkeys(["guard-tensor", f"guard-{by}"])
    sweep(_measured(config, to / _OLD_GUARDS, ",".join(one_for_all)), to / _BEFORE)
    measured = _measured(after, to, f"guard-{by}")
    sweep(measured, to / _AFTER)
    if missing(to / RESULTS):
        probabilities = measured.sweep.probabilities()
        evaluate(_flipping(measured, probabilities[len(probabilities) // 2], *stored), to=to)
    if not world.first:
        return
    header = read_record(to / _AFTER / HEADER)
    about |= {"text": header["text"], "tokens": header["tokens"], "fitted": header["fitted"]["texts"]}
    clean = read_record(to / _BEFORE / HEADER)["clean"]["loss"]
    points = {name: _points(to / name, clean) for name in (_BEFORE, _AFTER)}
    write_record(to / HARDENED, {**about, **points})
    found = read_hardened(to / HARDENED)
    page = report(to)
    # last: a directory without it is not complete
    write_atomically(to / CARD, _card(to, found, header, config.model, stored[1] is not None))
    use = _how_to_use(to, found.rotation, config.model)
    say(f"{_table(found)}\n\n{use}; {page} shows what was measured")


def _is_set(table: SweepConfig, key: Field[Any]) -> bool:
    return bool(getattr(table, key.name) != key.default)


def _flipping(config: RunConfig, p: float, format: Format | None, inputs: Format | None) -> RunConfig:
    """With every bit of weights and inputs, as they are stored, flipping at ``p``."""
    rates: dict[str, Any] = {f"{operand}_{key}": p for operand in "wx" for key in ("p_exp", "p_frac")}
    if format is not None:
        rates |= quantised_keys(format, Flipping("w", p, ()))
    if inputs is not None:
        rates |= input_keys(p, ())
    return replace(config, bitflip=replace(config.bitflip, **rates))


def _measured(config: RunConfig, guards: Path, protection: str) -> RunConfig:
    """The config of a sweep behind fitted guards."""
    sweep_config = replace(config.sweep, p=config.sweep.p or DEFAULT_P, protection=protection)
    return replace(config, bitflip=replace(config.bitflip, guards=str(guards)), sweep=sweep_config)


def _points(directory: Path, clean: float) -> list[dict[str, Any]]:
    """What flips cost in each cell of a sweep, in nats above the clean loss of the model as it was, with its 95%
    interval over seeds; the guard alone at p = 0, with what another basis costs where weights are rounded in it."""
    header = read_record(directory / HEADER)
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


def _table(of: Hardened) -> str:
    """``cost_table`` in columns of a terminal."""
    columns, rows = cost_table(of)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in (columns, *rows)]  # fmt: skip
    return "\n".join([_WHAT_COSTS, *lines])


def _how_to_use(to: Path, rotation: Mapping[str, Any], model: ModelConfig) -> str:
    opens = "flipproof opens it, transformers alone does not" if rotation["online"] else "transformers opens it"
    left = "" if rotation["stream"] or rotation["how"] == "none" else "; its residual stream could not be rotated"
    plain = f"; its weights are plain, and it was measured with {_as_stored(model)}" if model.quantize else ""
    return f"{to}: {opens}{left}{plain}; its guards: --bitflip.guards {to}"


def _as_stored(model: ModelConfig) -> str:
    """The flags by which weights and inputs are quantised."""
    given = {key: getattr(model, key) for key in ("quantize", "quantize_inputs")}
    return " ".join(f"--model.{key} {name}" for key, name in given.items() if name)


def _opening(to: Path, of: Hardened, model: ModelConfig, inputs: bool) -> tuple[str, str]:
    """(how the model is opened, in words, a command that opens it), for the directory's README. ``inputs``: whether
    they are quantised."""
    thresholds = "The thresholds in `guards.safetensors` are flipproof's, which puts them in front of what flips:"
    if online := len(of.rotation["online"]):
        kind = json.loads((to / "config.json").read_text("utf-8"))["model_type"]
        opens = (
            f"**Plain `transformers` does not compute this function**: the inputs of {online} layers are rotated when "
            f"the model runs, and only flipproof does that. So `config.json` says `{kind}`, which `transformers` "
            "refuses; under another name the weights are those of no model. Its own commands open it:"
        )
    elif of.format and not model.quantize:
        opens = (
            "`AutoModelForCausalLM` opens it, with the library that has its layout: its weights are the original's, "
            f"bit by bit. {thresholds}"
        )
    else:
        opens = f"`AutoModelForCausalLM` opens it: it is the function of the original, up to rounding. {thresholds}"
    as_stored = _as_stored(model)
    if as_stored:
        opens = (
            f"Its weights are plain. What was measured, and what the guards fit, is what they are as {model.quantize}, "
            f"to which flipproof rounds them while it reads them (`{as_stored}`). {opens}"
        )
    flips = (
        f"--bitflip.{'w_code_p' if of.format else 'w_p_exp'} 1e-5 --bitflip.{'x_code_p' if inputs else 'x_p_exp'} 1e-5"
    )
    words = ["flipproof eval", to.name, *([as_stored] if as_stored else []), "--bitflip.guards", to.name, flips]
    return opens, " ".join(words)


def _card(to: Path, of: Hardened, header: Mapping[str, Any], model: ModelConfig, inputs: bool) -> str:
    """The directory's README: what the model is, how to open it, and what it bears."""
    opens, command = _opening(to, of, model, inputs)
    left = "".join(f"\n- `{name}`: {why}" for name, why in of.rotation["left"].items())
    texts = [text["source"] for text in of.fitted]
    head = front_matter(of.model, "transformers", ["flipproof", "bit-flips"], texts)
    return f"""{head}# {Path(of.model).name}, hardened against bit flips

`flipproof harden` made this of `{of.model}` ({header["dtype"]}), without training. {in_words(of)}
{f"{chr(10)}Left as they are:{chr(10)}{left}{chr(10)}" if left else ""}
## Opening it

{opens}

```
{command}
```

## What flips cost

{_WHAT_COSTS.capitalize()}, on {header["tokens"]:,} tokens of {header["text"]}. `report.html` shows more.

{markdown_table(*cost_table(of))}
"""
