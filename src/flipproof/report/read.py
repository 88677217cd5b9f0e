"""What a report is made from: the files that runs, sweeps, profiles and generated texts leave in directories.

A directory is searched itself and two levels deep, so that ``runs/demo`` with ``base/`` and ``sweep/`` in it is one
report, and so is a study of several models. What is found is called after its path below the directory.

Files that are written whole (``results.json``, ``sweep.json``, …) must be whole. One that grows line by line
(``metrics.jsonl``) may end in half a line, which a killed process leaves; it is ignored with a note.
"""

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flipproof.config import RunConfig
from flipproof.config.read import load_written
from flipproof.errors import ConfigError
from flipproof.measure.arms import Arm, Cost
from flipproof.measure.points import Point
from flipproof.records import CONFIG, HARDENED, METRICS, RESULTS, check_toml, lines, read_record
from flipproof.sweep.store import FORMATS, POINTS, read_points
from flipproof.sweep.store import HEADER as SWEEP
from flipproof.train.checkpoint import list_checkpoints, planted
from flipproof.train.rundir import Record

PROFILE, GENERATED, SAMPLES = "profile.json", "generate.json", "samples.txt"
_KNOWN = (RESULTS, METRICS, SWEEP, PROFILE, GENERATED, SAMPLES, HARDENED, FORMATS)
_LEVELS = 2
_ARMS = ("clean", "flipped", "guarded", "hardened", "control", "recovered")
T = TypeVar("T")


class Logged(NamedTuple):
    """One line of ``metrics.jsonl``. What was not measured is None."""

    step: int
    loss: float
    """Nats per token; infinity where it was no number."""
    tokens: float | None
    tokens_per_second: float | None
    peak_memory_gib: float | None
    mfu: float | None
    """Share of the devices' peak FLOPs."""


class Validated(NamedTuple):
    """A line of ``metrics.jsonl`` that validation wrote: losses on held-out text, in nats per token; infinity where
    there was no number, None where the model has no such faults."""

    step: int
    flipped: float | None
    guard: float | None
    clean: float | None


@dataclass(frozen=True)
class About:
    """What was measured on what, as the foot of the page has it."""

    name: str
    """The file, relative to the report's directory."""
    model: str | None
    dtype: str | None
    text: str | None
    tokens: int | None
    date: date
    """Of the file's last change."""


@dataclass(frozen=True)
class Started:
    """With what a training on GPUs was begun."""

    config: RunConfig
    gpu: str
    """As CUDA calls it."""
    gpus: int
    """Of all nodes."""
    nodes: int


@dataclass(frozen=True)
class Hardened:
    """``hardened.json``."""

    model: str
    """The one that was hardened."""
    guards: str
    """How fine they are: "channel", "layer" or "tensor"."""
    rotation: Mapping[str, Any]
    """The fields of ``flipproof.models.rotate.Rotation``."""
    format: str | None
    """Of its weights, where they are quantised."""
    fitted: tuple[Mapping[str, Any], ...]
    """Of each text that guards were fitted to, its ``source`` and how many ``tokens``."""
    costs: Mapping[tuple[str, str], Mapping[float, Cost]]
    """("as it was" or "hardened", protection) -> p -> what flips cost, 95% over fault seeds; 0 is the guard alone."""

    @property
    def probabilities(self) -> list[float]:
        return sorted({p for costs in self.costs.values() for p in costs})


@dataclass(frozen=True)
class Sweep:
    """``sweep.json`` and its points; losses in nats per token."""

    axes: Mapping[str, list[Any]]
    overhead: Mapping[str, float]
    """protection -> extra bits stored over bits stored."""
    voltages: tuple[tuple[float, float], ...]
    """(volts, bit-error rate)."""
    clean_loss: float
    clean_perplexity: float
    points: tuple[Point, ...]
    guards: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Guard, such as "guard-channel" -> (loss, perplexity) behind it alone, before any bit flips."""
    stored_bits: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """protection -> site -> bits stored for a weight of the linear layers, those of the protection among them."""


@dataclass
class Sources:
    """Everything found, by the name of the directory it was found in."""

    about: list[About] = field(default_factory=list)
    arms: dict[str, dict[str, Arm]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Tasks of lm-eval, as ``flipproof.measure.tasks`` writes them."""
    hardened: dict[str, Hardened] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    formats: dict[str, dict[str, str]] = field(default_factory=dict)
    """Format of weights -> name of its sweep, of sweeps that were started as one."""
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``profile.json``, as ``flipproof.measure.magnitudes`` writes it."""
    configs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """The tables of a run's config, by their names."""
    training: dict[str, list[Logged]] = field(default_factory=dict)
    started: dict[str, Started] = field(default_factory=dict)
    """Trainings on GPUs, whose record says on which."""
    validation: dict[str, list[Validated]] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Arm -> sample of text."""
    notes: list[str] = field(default_factory=list)
    """What readers should know of the files."""


def read_sources(directory: Path) -> Sources:
    """Read a directory and those in it.

    Raises:
        ConfigError: where it holds nothing that a report could show, and for every file that is not as it was written.
    """
    if not directory.is_dir():
        raise ConfigError([f"{directory} is not a directory; a report is made of one with {', '.join(_KNOWN)}"])
    sources, problems = Sources(), []
    for place in _places(directory, sources.notes):
        held = {name: place / name for name in _KNOWN if (place / name).is_file()}
        for name, read in _READERS.items():
            if name in held:
                try:
                    read(sources, directory, held[name])
                except ConfigError as error:
                    problems += error.problems
        problems += _planted(place / "checkpoints")
        if SWEEP not in held and (place / POINTS).is_dir() and any(place.glob(f"{POINTS}/*.json")):
            problems.append(f"{place / POINTS}: there is no {SWEEP} beside it, which says what was measured")
    if problems:
        raise ConfigError(problems)
    if not (sources.about or sources.training or sources.texts):
        raise ConfigError([f"{directory} and the directories in it hold none of {', '.join(_KNOWN)}"])
    return sources


def _planted(checkpoints: Path) -> list[str]:
    """What stands in a run's checkpoints that would run something if it was opened with less care. A report needs none
    of them; but who makes one is the first to look at a run, and what else is in it deserves no trust then."""
    return [problem for path in list_checkpoints(checkpoints) for problem in planted(path)]


def _places(directory: Path, notes: list[str], levels: int = _LEVELS) -> Iterator[Path]:
    """The directory and those in it, each before what it holds; what cannot be read is a note."""
    yield directory
    if levels == 0:
        return
    try:
        inside = sorted(path for path in directory.iterdir() if path.name[0] != "." and path.is_dir())
    except OSError as error:
        notes.append(f"{directory}: {error.strerror}; what it holds is left out.")
        return
    for path in inside:
        yield from _places(path, notes, levels - 1)


@contextmanager
def _as_written(where: str) -> Iterator[None]:
    """What goes wrong in the block is the file's fault, and becomes one line."""
    try:
        yield
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError([f"{where}: {error} is missing"]) from error
    except OSError as error:
        raise ConfigError([f"{where}: {error.strerror}"]) from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # JSON's and UTF-8's are ValueErrors
        raise ConfigError([f"{where}: not as flipproof writes it ({' '.join(str(error).split())})"]) from error


def _json(path: Path) -> dict[str, Any]:
    with _as_written(str(path)):
        return read_record(path)


def _lines(sources: Sources, name: str, path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Each line of a JSONL file parsed; half a line at the end is a note."""
    with _as_written(str(path)):
        text = path.read_bytes()
    last = text.count(b"\n") + 1
    parsed = []
    for number, line in lines(text):
        if isinstance(line, ValueError) and number == last:  # no line break ends it
            sources.notes.append(f"{name}: the last line is half written and was ignored.")
            continue
        with _as_written(f"{path} line {number}"):
            if isinstance(line, ValueError):
                raise line
            parsed.append(parse(line))
    return parsed


def _name(directory: Path, path: Path) -> str:
    """The name of a file's directory, which no other one has: what sections are called after."""
    if path.parent != directory:
        return path.parent.relative_to(directory).as_posix()
    name = directory.resolve().name or "/"
    return f"{name} (itself)" if (directory / name).is_dir() else name


def _about(directory: Path, path: Path, values: Mapping[str, Any], model: str | None = None) -> About:
    for key in ("model", "dtype", "text"):
        if not isinstance(values.get(key), str | None):
            raise ValueError(f"{key} = {values[key]!r} is no name")
    return About(
        name=path.relative_to(directory).as_posix(),
        model=values.get("model") or model,
        dtype=values.get("dtype"),
        text=values.get("text"),
        tokens=values.get("tokens"),
        date=date.fromtimestamp(path.stat().st_mtime),
    )


def _number(value: Any) -> float:
    """A loss: null is infinite."""
    return math.inf if value is None else float(value)


def _config(path: Path) -> dict[str, Any]:
    """The tables of the config beside a file of a run."""
    config = path.with_name(CONFIG)
    if not config.is_file():
        return {}
    check_toml(config)
    with _as_written(str(config)):
        tables = tomllib.loads(config.read_text("utf-8"))
        if other := [key for key, table in tables.items() if not isinstance(table, dict)]:
            raise ValueError(f"{other[0]} is no table")
    return tables


def _read_results(sources: Sources, directory: Path, path: Path) -> None:
    values, name = _json(path), _name(directory, path)
    with _as_written(str(path)):
        arms = {arm: Arm.from_dict(measured) for arm, measured in values["arms"].items()}
        config = _config(path)
        model = config.get("model", {}).get("hf_model_path") or config.get("model", {}).get("flavor")
        tokens = max((arm.tokens for arm in arms.values()), default=None)
        sources.about.append(_about(directory, path, {"tokens": tokens} | values, model))
        if bitflip := values.get("bitflip"):
            config["bitflip"] = dict(bitflip)
    if config:
        sources.configs[name] = config
    if left := values.get("unfinished"):
        sources.notes.append(f"{path.relative_to(directory).as_posix()}: {', '.join(map(str, left))} was not measured.")
    if arms:
        sources.arms[name] = arms
    if tasks := values.get("tasks"):
        sources.tasks[name] = tasks


def read_hardened(path: Path) -> Hardened:
    """What ``flipproof harden`` has written. Raises ConfigError where it is anything else, or not measured to the
    end."""
    values = _json(path)
    with _as_written(str(path)):
        rotation = values["rotation"]
        for key in ("stream", "folded", "values", "online", "left"):
            len(rotation[key])
        costs: dict[tuple[str, str], dict[float, Cost]] = {}
        for side, model in (("before", "as it was"), ("after", "hardened")):
            for one in values[side]:
                ends = one["interval"] and (float(one["interval"][0]), float(one["interval"][1]))
                cost = Cost(_number(one["cost"]), ends)
                costs.setdefault((model, str(one["protection"])), {})[float(one["p"])] = cost
        fitted = tuple(
            {"source": str(text["source"]), "tokens": int(text["tokens"])} for text in values.get("fitted") or ()
        )
        format = values.get("format") and str(values["format"])
        return Hardened(str(values["model"]), str(values["guards"]), rotation, format, fitted, costs)


def _read_hardened(sources: Sources, directory: Path, path: Path) -> None:
    values = _json(path)
    if {"before", "after"} <= values.keys():
        sources.hardened[_name(directory, path)] = read_hardened(path)
    else:
        name = path.relative_to(directory).as_posix()
        sources.notes.append(f"{name}: it is not measured to the end; the same flipproof harden goes on.")
    with _as_written(str(path)):
        sources.about.append(_about(directory, path, values))


def _read_sweep(sources: Sources, directory: Path, path: Path) -> None:
    values = _json(path)
    name = path.relative_to(directory).as_posix()
    points = dict(read_points(path.parent))
    with _as_written(str(path)):
        clean, planned = values["clean"], int(values["planned"])
        sources.sweeps[_name(directory, path)] = Sweep(
            axes={key: axis if isinstance(axis, list) else [axis] for key, axis in values["axes"].items()},
            overhead={key: float(share) for key, share in (values.get("overhead") or {}).items()},
            voltages=tuple((float(volts), float(ber)) for volts, ber in values.get("voltages") or ()),
            clean_loss=_number(clean["loss"]),
            clean_perplexity=_number(clean["perplexity"]),
            guards={key: (_number(one["loss"]), _number(one["perplexity"])) for key, one in _alone(values).items()},
            stored_bits={
                protection: {site: float(bits) for site, bits in of_sites.items()}
                for protection, of_sites in (values.get("stored_bits") or {}).items()
            },
            points=tuple(points.values()),
        )
        sources.about.append(_about(directory, path, values))
    if len(points) < planned:
        sources.notes.append(f"{name}: {len(points)} of {planned} points are measured so far.")


def _read_formats(sources: Sources, directory: Path, path: Path) -> None:
    values = _json(path)
    with _as_written(str(path)):
        named = {str(name): _name(directory, path.parent / str(name) / SWEEP) for name in values["formats"]}
    sources.formats[_name(directory, path)] = named


def _alone(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Guard -> what the model is behind it alone; sweeps of a single guard have it under "guard"."""
    return values.get("guards") or ({"guard": values["guard"]} if values.get("guard") else {})


def _size(value: Any) -> float | int | None:
    """A number that is not negative, or null."""
    if value is None:
        return None
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{value!r} is no magnitude")
    return value


def _exponent(value: Any) -> int:
    if not -2000 < int(value) < 2000:
        raise ValueError(f"2^{value!r} is no number of a computer")
    return int(value)


def _read_profile(sources: Sources, directory: Path, path: Path) -> None:
    values = _json(path)
    with _as_written(str(path)):
        for layer in (values["all"], *values["layers"].values()):
            for operand in ("weights", "inputs"):
                one = layer[operand]
                one["histogram"] = [(_exponent(e), int(_size(count) or 0)) for e, count in one["histogram"]]
                one["quantiles"] = {str(name): _size(value) for name, value in one["quantiles"].items()}
                for key in ("maximum", "count", "proposed_t", "zero_out_t", "clipped"):
                    one[key] = _size(one[key])
        sources.about.append(_about(directory, path, values))
    sources.profiles[_name(directory, path)] = values


def _read_metrics(sources: Sources, directory: Path, path: Path) -> None:
    name = path.relative_to(directory).as_posix()
    read = _lines(sources, name, path, _logged)
    rows = [line for line in read if isinstance(line, Logged)]
    with _as_written(str(path.with_name(CONFIG))):
        if config := _config(path):
            sources.configs.setdefault(_name(directory, path), config)
        steps = config.get("training", {}).get("steps")
        last = rows[-1].step if rows else 0
        if steps is not None and last < int(steps):
            sources.notes.append(f"{name}: it ends at step {last} of {steps}.")
    if rows:
        sources.training[_name(directory, path)] = rows
        try:
            if started := _started(path.parent):
                sources.started[_name(directory, path)] = started
        except ConfigError as error:
            sources.notes.append(f"{error.problems[0]}. What flipproof plan says of that training is left out.")
    if validated := [line for line in read if isinstance(line, Validated)]:
        sources.validation[_name(directory, path)] = validated


def _started(run_dir: Path) -> Started | None:
    """None for what ran on a CPU, or began before records named the GPU."""
    record = Record.read(run_dir)
    if record is None or not record.gpu:
        return None
    config = load_written(run_dir / CONFIG)
    return Started(config, record.gpu, record.rows // config.training.local_batch_size, record.nodes)


def _logged(values: dict[str, Any]) -> Logged | Validated:
    keys = [f"eval_loss_{name}" for name in Validated._fields[1:]]
    if "loss" not in values and any(key in values for key in keys):
        return Validated(int(values["step"]), *(_number(values[key]) if key in values else None for key in keys))
    measured = [_size(values.get(key)) for key in Logged._fields[2:]]
    return Logged(int(values["step"]), _number(values["loss"]), *measured)


def _read_generated(sources: Sources, directory: Path, path: Path) -> None:
    values = _json(path)
    with _as_written(str(path)):
        sources.texts[_name(directory, path)] = {
            str(arm): f"{values['prompt']}{text}" for arm, text in values["texts"].items()
        }
        sources.about.append(_about(directory, path, values))


def _read_samples(sources: Sources, directory: Path, path: Path) -> None:
    """The demo's samples: each arm's name in brackets on a line of its own, then its text."""
    with _as_written(str(path)):
        text = path.read_text("utf-8", errors="replace")
    texts: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line[1:-1] in _ARMS and line == f"[{line[1:-1]}]":
            texts[line[1:-1]] = []
        elif texts:
            texts[next(reversed(texts))].append(line)
    if texts:
        name = _name(directory, path)
        name = f"{name} ({SAMPLES})" if name in sources.texts else name  # beside generate.json
        sources.texts[name] = {arm: "\n".join(rows).strip() for arm, rows in texts.items()}


_READERS: dict[str, Callable[[Sources, Path, Path], None]] = {
    HARDENED: _read_hardened,
    RESULTS: _read_results,
    METRICS: _read_metrics,
    SWEEP: _read_sweep,
    FORMATS: _read_formats,
    PROFILE: _read_profile,
    GENERATED: _read_generated,
    SAMPLES: _read_samples,
}
