"""Formats of weights side by side: ``flipproof sweep --formats``.

Each format is a sweep of its own, in a directory of its name: the same checkpoint, quantised so, under the same
probabilities, fault seeds and text. So a point equals ``flipproof eval`` of its config, each sweep goes on where it
was, and one model is in memory at a time. ``formats.json`` says which formats there are and what they have in common;
``flipproof report`` draws them as one.

Weights are bfloat16 before they are quantised and while they are computed with, unless ``training.dtype`` says another
dtype; ``bf16`` are these weights themselves.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flipproof.config import RunConfig
from flipproof.config.sweep import PLAIN, STORED
from flipproof.errors import ConfigError
from flipproof.faults.spec import BitFlipSpec
from flipproof.files import check_writable, finite, is_temporary
from flipproof.measure.arms import Arm
from flipproof.models.load import model_config
from flipproof.models.weights import KEY
from flipproof.records import GUARDS, read_record, write_record
from flipproof.sweep.store import FORMATS, HEADER, depends_on, read_points, refuse_other

_KEYS = {"formats": list, "of": dict}
_COLUMNS = 6
"""Of probabilities, in a table for people."""
_RATES = ("_p_exp", "_p_frac", "_p_bits", "_code_p", "_zero_p", "_global_p")


def by_format(config: RunConfig) -> dict[str, RunConfig]:
    """Name of a format -> the config of its sweep, in the order of ``sweep.formats``.

    Raises:
        ConfigError: for keys that contradict, one line each.
    """
    sweep, bitflip, names = config.sweep, config.bitflip, config.sweep.format_names()
    said = f"sweep.formats = {', '.join(names)}"
    problems = [
        f"bitflip.{key} = {value!r}: {said} flips bits of stored weights at sweep.p; leave it out"
        for key, value in vars(bitflip).items()
        if key.endswith(_RATES) and value not in (None, 0, {})
    ]
    if config.model.quantize is not None:
        problems.append(f"model.quantize = {config.model.quantize!r}: {said} says how weights are stored; drop one")
    if (inputs := config.model.quantize_inputs) is not None:
        problems.append(f"model.quantize_inputs = {inputs!r}: {said} compares stored weights; leave it out")
    if config.model.init == "random":
        problems.append(f"model.init = 'random': has no weights that {said} could store; name a trained model")
    for key, value in (
        ("dtype", config.training.dtype),
        ("mixed_precision_param", config.training.mixed_precision_param),
    ):
        if PLAIN in names and value not in (None, "bfloat16"):
            problems.append(f"training.{key} = {value!r}: {said}, and bf16 is bfloat16; leave one of the two out")
    sites = sweep.site_names()
    if other := [site for site in sites if site not in ("w", *STORED)]:
        problems.append(f"sweep.sites = {', '.join(other)}: of {said} only stored weights flip: w, code and scale")
    elif PLAIN in names and "w" not in sites:
        problems.append(f"sweep.sites = {', '.join(sites)}: bf16 has no codes and scales; add w, or leave bf16 out")
    for key, values in (("layers", sweep.layer_names()), ("bits", sweep.bit_names())):
        if values != ["all"]:
            problems.append(f"sweep.{key} = {', '.join(values)}: {said} compares whole weights; leave it out")
    problems += _lacking(names, bitflip.guards)
    if problems:
        raise ConfigError(problems)
    training = replace(config.training, dtype=config.training.dtype or "bfloat16")
    found = {}
    for name in names:
        plain = name == PLAIN
        own = replace(sweep, formats=None, sites=",".join(site for site in sites if site == "w" or not plain))
        quantize: Any = None if plain else name
        model = replace(config.model, quantize=quantize)
        faults = replace(_without_scales(bitflip) if plain else bitflip, guards=_guards_of(name, bitflip.guards))
        found[name] = replace(config, sweep=own, model=model, training=training, bitflip=faults)
    return found


def _without_scales(spec: BitFlipSpec) -> BitFlipSpec:
    """What of guards holds for plain weights."""
    key = "w_scale_zero_out_t"
    layers = {
        pattern: {name: value for name, value in override.items() if name != key}
        if isinstance(override, Mapping)
        else override
        for pattern, override in spec.layer_name_to_config.items()
    }
    return replace(spec, w_scale_zero_out_t=None, layer_name_to_config=layers)


def _guards_of(name: str, guards: str | None) -> str | None:
    """Those of the format's own directory within this one, where it has some, else those that are named."""
    own = Path(guards or "") / name
    return str(own) if guards and (own.expanduser() / GUARDS).exists() else guards


def _lacking(names: Sequence[str], guards: str | None) -> Iterator[str]:
    """A line where a directory has guards of some formats, and neither of all nor of the others."""
    lacking = [name for name in names if _guards_of(name, guards) == guards]
    if guards and len(lacking) < len(names) and lacking and not (Path(guards).expanduser() / GUARDS).exists():
        first = lacking[0]
        quantize = "" if first == PLAIN else f" --model.quantize {first}"
        fit = f"flipproof profile MODEL{quantize} --guards channel --to {Path(guards) / first}"
        yield f"bitflip.guards = {guards!r}: has none of {', '.join(lacking)}; {fit} fits those of {first}"


def check_plain(config: RunConfig) -> None:
    """Raises ConfigError where the checkpoint is quantised already."""
    said = getattr(model_config(config.model, None), "quantization_config", None)
    if said is not None:
        method = (said if isinstance(said, Mapping) else said.to_dict()).get("quant_method")
        raise ConfigError(
            [
                f"sweep.formats = {', '.join(config.sweep.format_names())}: {KEY} = {config.model.hf_model_path!r} is "
                f"quantised already ({method}); name the checkpoint that it was made of"
            ]
        )


def check_directory(to: Path, config: RunConfig) -> None:
    """Raises ConfigError where a directory holds anything but this sweep, of whichever formats, or could not be
    written."""
    check_writable(to / FORMATS, "--to")
    if there := _there(to):
        refuse_other(to, "sweep", there["of"], _alike(config))


def _alike(config: RunConfig) -> dict[str, Any]:
    """What the sweeps of all formats depend on, as JSON has it."""
    return dict(json.loads(json.dumps(finite(depends_on(config)))))


def _there(to: Path) -> dict[str, Any]:
    """What ``formats.json`` says; nothing where the directory is new."""
    names = sorted(path.name for path in to.iterdir()) if to.exists() else []
    if FORMATS in names:
        try:
            return {key: kind(values[key]) for values in [read_record(to / FORMATS)] for key, kind in _KEYS.items()}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError([f"{to / FORMATS}: not as a sweep writes it ({error}); name another --to"]) from error
    if other := [name for name in names if not is_temporary(name, FORMATS)]:
        raise ConfigError([f"--to {to}: holds something that is no sweep of formats ({other[0]}); name another one"])
    return {}


def begin(to: Path, config: RunConfig) -> None:
    """Write down which formats there are, those of earlier starts among them."""
    to.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys([*_there(to).get("formats", ()), *config.sweep.format_names()])
    write_record(to / FORMATS, {"formats": list(names), "of": _alike(config)})


def with_share_of_budget(own: RunConfig, configs: Mapping[str, RunConfig], name: str, used_s: float) -> RunConfig:
    """The config of a format's sweep with its share of the minutes that are left: those after it get as much."""
    if own.sweep.budget_minutes is None:
        return own
    left = max(own.sweep.budget_minutes - used_s / 60, 1e-6)
    share = left / (len(configs) - list(configs).index(name))
    return replace(own, sweep=replace(own.sweep, budget_minutes=share))


def table(to: Path) -> str:
    """Mean perplexities: a row for each format, site and protection, a column for each flip probability as far as they
    fit a line."""
    rows: list[list[str]] = []
    done = planned = 0
    for name in _there(to)["formats"]:
        if not (to / name / HEADER).exists():
            continue  # another start's, which was stopped before it
        header, losses = read_record(to / name / HEADER), dict[tuple[str, str, float], list[float]]()
        points = dict(read_points(to / name)).values()
        for point in points:
            losses.setdefault((point.setting.protection, point.setting.sites, point.p), []).append(point.loss)
        done, planned, axes = done + len(points), planned + header["planned"], header["axes"]
        ps = axes["p"] if len(axes["p"]) <= _COLUMNS else [axes["p"][i * (len(axes["p"]) - 1) // (_COLUMNS - 1)]
                                                           for i in range(_COLUMNS)]  # fmt: skip
        if not rows:
            rows.append(["format", "what flips", "protection", "bits/weight", "clean", *(f"{p:.3g}" for p in ps)])
        for protection in axes["protection"]:
            for site in axes["sites"]:
                found = [losses.get((protection, site, p)) for p in ps]
                cells = [f"{Arm.from_losses(own, header['tokens']).perplexity:.4g}" if own else "-" for own in found]
                bits = header["stored_bits"][protection][site]
                what = {"w": "all", "code": "codes", "scale": "scales"}[site]
                rows.append([name, what, protection, f"{bits:.4g}", f"{header['clean']['perplexity']:.4g}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if i < 3 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += ["", f"perplexity by flip probability of each stored bit; {done} of {planned} points"]
    if done < planned:
        lines.append("the rest is with other processes, or left for the same command again")
    return "\n".join([*lines, f"{to}: see flipproof report {to}"])
