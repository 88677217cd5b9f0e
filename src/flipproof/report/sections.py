"""The sections of a report: what there is to show, as findings, pictures, tables and captions.

One function makes each section, and ``sections_of`` puts them in the page's order. What was not measured has no
section, and nothing is drawn twice: what a figure shows of a sweep, a later section only tabulates.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from flipproof.faults.spec import BitFlipSpec
from flipproof.measure.arms import ARMS, Arm, Cost, costs
from flipproof.measure.card import configs_of
from flipproof.measure.points import Setting
from flipproof.report import figures, finding, formats, hardening, planned
from flipproof.report.analyse import (
    CEILING,
    CLIFF_THRESHOLD,
    CostMap,
    Curve,
    bits_in_words,
    cost_maps,
    cost_of,
    curves_of,
    labels_of,
    protection_in_words,
    sites_in_words,
)
from flipproof.report.read import Logged, Sources, Sweep, Validated
from flipproof.report.section import COST, PERPLEXITY, Drawing, Section, cost_cells, perplexity_cells
from flipproof.report.table import Table

_LONGEST_SLUG = 50
_MOST_FIGURES = 6
"""Of one section that has many views."""
_SETTING = Setting._fields
_OF_A_RUN = (
    ("model", "hf_model_path"), ("model", "flavor"), ("model", "init"), ("lora", "r"), ("training", "lr"),
    ("training", "steps"), ("training", "seq_len"), ("training", "local_batch_size"),
    ("training", "gradient_accumulation_steps"), ("training", "dtype"), ("eval", "trials"), ("eval", "num_samples"),
)  # fmt: skip
"""Keys that the table of configs has beside those of ``[bitflip]`` that are not as they are by default."""


def sections_of(sources: Sources) -> list[Section]:
    """What there is to show, in the page's order."""
    sections: list[Section] = []
    for name, hardened in sources.hardened.items():
        sections.append(_named(hardening.section(hardened), name, len(sources.hardened), sections))
    if sources.configs:
        sections.append(_configs(sources.configs))
    if sources.arms:
        sections.append(_arms(sources.arms, sources.configs))
    if sources.tasks:
        sections.append(_tasks(sources.tasks))
    of_formats = {
        name: {format: sweep for format, sweep in named.items() if sweep in sources.sweeps}
        for name, named in sources.formats.items()
    }
    curves = {name: curves_of(one.points, one.clean_loss, one.axes) for name, one in sources.sweeps.items()}
    for name, named in of_formats.items():
        compared = {format: (sources.sweeps[sweep], curves[sweep]) for format, sweep in named.items()}
        if section := formats.section(compared):
            sections.append(_named(section, name, len(of_formats), sections))
    told = {sweep for named in of_formats.values() for sweep in named.values()}
    sweeps = {name: sweep for name, sweep in sources.sweeps.items() if name not in told}
    findings = {name: finding.of_sweep(one, curves[name]) for name, one in sweeps.items()}
    for make in (_perplexity, _sensitivity, _protection, _voltage):
        for name, sweep in sweeps.items():
            if section := make(sweep, curves[name]):
                section.finding = findings.pop(name, "")  # the first section of a sweep has it
                sections.append(_named(section, name, len(sweeps), sections))
    for name, found in findings.items():
        section = _one_point(sweeps[name], curves[name], found)
        sections.append(_named(section, name, len(sweeps), sections))
    for name, profile in sources.profiles.items():
        sections.append(_named(_magnitudes(profile), name, len(sources.profiles), sections))
    if sources.training:
        sections.append(_training(sources.training, sources.validation))
    made = ((name, planned.section(run, sources.training[name])) for name, run in sources.started.items())
    beside = {name: of_run for name, of_run in made if of_run}
    for name, of_run in beside.items():
        sections.append(_named(of_run, name, len(beside), sections))
    for name, texts in sources.texts.items():
        sections.append(_named(_texts(texts), name, len(sources.texts), sections))
    return sections


def _named(section: Section, name: str, of: int, before: Sequence[Section]) -> Section:
    """Sections of one kind are told apart by the directory they are from, which their ids are made of."""
    if of > 1:
        # a file's name has so many bytes; and "a b" is another directory than "a-b"
        slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())[-_LONGEST_SLUG:]
        slug = free_name(f"{section.id}-{slug}", {one.id for one in before}).removeprefix(f"{section.id}-")
        section.tables = [
            replace(one, file=one.file.replace(section.id, f"{section.id}-{slug}", 1)) for one in section.tables
        ]
        section.id, section.title = f"{section.id}-{slug}", f"{section.title} ({name})"
    return section


def free_name(name: str, taken: Collection[str]) -> str:
    """``name``, with a number before its ending where it is taken, in whichever case."""
    stem, dot, ending = name.partition(".")
    folded = {other.casefold() for other in taken}
    numbered = (name, *(f"{stem}_{n}{dot}{ending}" for n in range(2, len(folded) + 3)))
    return next(one for one in numbered if one.casefold() not in folded)


def _configs(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Section:
    default = json.loads(json.dumps(asdict(BitFlipSpec())))
    keys = [("bitflip", key) for key in default]
    rows = []
    for table, key in (*keys, *_OF_A_RUN):
        values = [run.get(table, {}).get(key, default.get(key)) for run in runs.values()]
        if any(value != default.get(key) for value in values):
            plain = [json.dumps(value) if isinstance(value, dict | list) else value for value in values]
            rows.append([f"{table}.{key}", *plain])
    return Section(
        "settings",
        "How each run was configured",
        "Of [bitflip], the keys that are not as they are by default: p_exp and p_frac are "
        "the flip probabilities of each exponent and mantissa bit of weights (w), inputs (x) and keys and values (kv), "
        "and zero_out_t the threshold of the guard. lora.r = 0 trains all weights.",
        [Table("settings.csv", ["setting", *runs], rows, by_row=True)],
    )


def _arms(found: Mapping[str, Mapping[str, Arm]], configs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Section:
    rows = []
    drawn: dict[str, Cost] = {}
    for run, arms in found.items():
        of_run = costs(dict(arms))
        for name, arm in arms.items():
            kind = ARMS.get(name)  # None: of another version
            cost = of_run.get(name)
            what = (kind.bitflipped, kind.tuned) if kind else (None, None)
            of_config = configs_of(name, arms, configs.get(run, {}))
            rows.append([run, name, *what, *of_config, *perplexity_cells(arm), *cost_cells(cost), arm.loss, arm.trials,
                         arm.tokens])  # fmt: skip
        drawn |= {f"{run}: {name}" if len(found) > 1 else name: cost for name, cost in of_run.items()}
    columns = ["run", "arm", "Bitflipped", "Fine-tuned", "Bitflip config", "Fine-tune config", *PERPLEXITY, *COST,
               "loss", "seeds", "tokens"]  # fmt: skip
    clean = max((arms["clean"].loss for arms in found.values() if "clean" in arms), default=0.0)
    more = f" The first {figures.SHOWN_BARS} are drawn." if len(drawn) > figures.SHOWN_BARS else ""
    return Section(
        "arms",
        "Arms side by side",
        "Perplexity on the same held-out text without faults (clean), with the range guard alone (guard), with bit "
        "flips (flipped), after training without faults (control, control_clean), and after the same training with "
        "them: flips on (recovered) and off (recovered_clean). Its intervals are over fault seeds. The cost is the "
        "loss less that of the clean arm in nats per token, its interval over fault seeds and text together, or over "
        f"text where nothing flips.{more}",
        [Table("arms.csv", columns, rows, only_csv=_only_csv(found) | {"tokens"})],
        [Drawing(partial(figures.cost_bars, drawn, clean))] if drawn else [],
        finding.of_arms(found),
    )


def _only_csv(runs: Collection[str]) -> frozenset[str]:
    """One run needs no column that names it."""
    return frozenset() if len(runs) > 1 else frozenset({"run"})


def _tasks(found: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = [
        [run, task, metric.split(",")[0], arm, values["mean"], *(values["interval"] or (None, None)), values["stderr"],
         len(values["trials"]), result["questions"]]
        for run, tasks in found.items()
        for task, result in tasks.items()
        for arm, metrics in result["arms"].items()
        for metric, values in metrics.items()
    ]  # fmt: skip
    columns = ["run", "task", "metric", "arm", "mean", "95% low", "95% high", "standard error", "seeds", "questions"]
    return Section(
        "tasks",
        "Tasks",
        "Tasks of lm-eval in each arm: mean over fault seeds with its 95% interval, and beside it lm-eval's standard "
        "error, which is about the choice of questions.",
        [Table("tasks.csv", columns, rows, only_csv=_only_csv(found))],
        finding=finding.of_tasks(found),
    )


def _perplexity(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    measured = [curve for curve in curves if len(curve.positive) > 1]
    if not measured:
        return None
    views, more = _views(measured)
    about = ", ".join(_constant(measured))
    cliffs = [
        [*curve.setting, str(curve.cliff), curve.cliff.p, *(curve.cliff_interval or (None, None)), curve.cliff.above,
         curve.cliff.up_to]
        for curve in measured
    ]  # fmt: skip
    volts = " Along the top: the supply voltage that p stands for." if any(curve.voltages for curve in measured) else ""
    return Section(
        "perplexity",
        "Perplexity against the flip probability",
        f"Perplexity with bits flipping with probability p{f' ({about})' if about else ''}: mean over fault seeds, "
        f"95% intervals; dashed: clean; open markers at the top edge: a loss that is infinite, or above {CEILING:g} "
        "nats, which is worse than guessing. Dotted: the cliff, the smallest p at which perplexity exceeds the clean "
        f"one by more than {CLIFF_THRESHOLD:.0%}, interpolated in log p between measured points; shaded: where the "
        f"ends of the intervals do.{volts}{more}",
        [
            Table(
                "perplexity-cliffs.csv",
                [*_SETTING, "cliff", "cliff p", "95% low", "95% high", "measured below", "measured past"],
                cliffs,
                title=f"Cliffs (+{CLIFF_THRESHOLD:.0%} perplexity over {sweep.clean_perplexity:.5g})",
                only_csv=frozenset({"cliff p"}),
            ),
            replace(_points("perplexity.csv", sweep, curves), shown=False),
        ],
        [
            Drawing(partial(figures.perplexity_curves, group, labels, sweep.clean_perplexity, view))
            for view, (group, labels) in list(views.items())[:_MOST_FIGURES]
        ],
    )


def _points(file: str, sweep: Sweep, curves: Sequence[Curve]) -> Table:
    """Everything measured in a sweep."""
    clean = sweep.clean_loss
    points = [
        [*curve.setting, p, curve.voltages.get(p), *perplexity_cells(arm), arm.loss,
         *(arm.loss_interval or (None, None)), *cost_cells(cost_of(arm, clean) if math.isfinite(clean) else None),
         arm.trials, arm.tokens]
        for curve in curves
        for p, arm in curve.arms.items()
    ]  # fmt: skip
    columns = [*_SETTING, "p", "voltage", *PERPLEXITY, "loss", "loss low", "loss high", *COST, "seeds", "tokens"]
    return Table(file, columns, points)


def _one_point(sweep: Sweep, curves: Sequence[Curve], found: str) -> Section:
    """Of a sweep that has nothing to compare: its finding, and the point that it has, if any."""
    caption = "A curve takes two flip probabilities above 0, and a comparison two settings."
    return Section("sweep", "Sweep", caption, [_points("sweep.csv", sweep, curves)] if curves else [], finding=found)


def _views(curves: Sequence[Curve]) -> tuple[dict[str, tuple[list[Curve], list[str]]], str]:
    """(name -> curves and their labels, what the caption says of curves that are left out). One view for all; or where
    they are too many to be told apart, one for each sites, layers and bits, in which protections are compared, the
    best ones first."""
    chosen = _widest(curves)
    settings = {curve.setting._replace(protection="") for curve in chosen}
    split = len(chosen) > figures.SHOWN_CURVES and len(settings) < len(chosen)
    names = labels_of([curve.setting._replace(protection="") for curve in chosen])
    groups: dict[str, list[Curve]] = {}
    for curve in chosen:
        groups.setdefault(names[curve.setting._replace(protection="")] if split else "", []).append(curve)
    views = {}
    for name, group in groups.items():
        if len(group) > figures.SHOWN_CURVES:  # those that fall off first
            group.sort(key=lambda curve: curve.cliff.p or curve.cliff.up_to or math.inf)
        drawn = group[: figures.SHOWN_CURVES]
        labels = labels_of([curve.setting for curve in drawn])
        views[name] = (drawn, [labels[curve.setting] for curve in drawn])
    shown = sum(len(drawn) for drawn, _ in list(views.values())[:_MOST_FIGURES])
    return views, f" {shown} of {len(curves)} curves are drawn; the tables have all." if shown < len(curves) else ""


def _widest(curves: Sequence[Curve]) -> list[Curve]:
    """What flips everywhere is the story; single layers and bits are details, which the heat map shows."""
    everywhere = [curve for curve in curves if curve.setting.layers == "all" and curve.setting.bits == "all"]
    return (
        everywhere or [curve for curve in curves if "all" in (curve.setting.layers, curve.setting.bits)] or list(curves)
    )


def _constant(curves: Sequence[Curve]) -> list[str]:
    """In words, what all curves have in common and their labels therefore do not say."""
    words: dict[str, Callable[[str], str]] = {
        "sites": sites_in_words,
        "layers": lambda layers: "all layers but the output head" if layers == "all" else layers,
        "bits": bits_in_words,
        "protection": protection_in_words,
    }
    values = {name: {getattr(curve.setting, name) for curve in _widest(curves)} for name in _SETTING}
    return [words[name](min(found)) for name, found in values.items() if len(found) == 1 and min(found) != "head"]


def _sensitivity(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    maps = cost_maps(curves, sweep.clean_loss)
    if not maps:
        return None
    rows = [
        [of.p, of.sites, of.protection, layers, bits, *cost_cells(cost), of.arms[layers, bits].trials]
        for of in maps
        for (layers, bits), cost in of.costs.items()
    ]
    columns = ["p", "sites", "protection", "layers", "bits", *COST, "seeds"]
    more = f" {_MOST_FIGURES} of {len(maps)} views are drawn; the table has all." if len(maps) > _MOST_FIGURES else ""
    return Section(
        "sensitivity",
        "Sensitivity by layer and bit",
        "Mean loss less the clean loss, in nats per token, where flips hit only these layers and bits, at the same p; "
        f"95% intervals over fault seeds. A map's colour is logarithmic from {figures.COST_FLOOR:g} nats; ∞, or a "
        "hatched bar, is a model without finite loss, blank was not measured. Bit 0 is the lowest of the mantissa."
        f"{more}",
        [Table("sensitivity.csv", columns, rows, title="The worst first, in the order of the views")],
        [Drawing(partial(_draw_costs, of)) for of in maps[:_MOST_FIGURES]],
    )


def _draw_costs(of: CostMap) -> Figure:
    """A map where layers and bits both vary, else bars, which have room for intervals."""
    if len(of.layers) > 1 and len(of.bits) > 1:
        return figures.cost_heat_map(of)
    names = {(layers, bits): layers if len(of.layers) > 1 else bits_in_words(bits) for layers, bits in of.arms}
    return figures.cost_bars({names[cell]: cost for cell, cost in of.costs.items()}, of.clean_loss, of.label)


def _protection(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    groups: dict[Setting, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.setting._replace(protection=""), []).append(curve)
    rows = []
    for group in groups.values():
        bare = next((curve.cliff.p for curve in group if curve.setting.protection == "none"), None)
        for curve in group if len(group) > 1 else ():
            cliff, overhead = curve.cliff, sweep.overhead.get(curve.setting.protection)
            gain = cliff.p / bare if cliff.p and bare else None
            rows.append([*curve.setting, None if overhead is None else 100 * overhead, str(cliff), cliff.p, gain])
    columns = [*_SETTING, "extra storage (%)", "cliff", "cliff p", "cliff over none"]
    tables = [Table("protection.csv", columns, rows, only_csv=frozenset({"cliff p"}))] if rows else []
    if sweep.guards:
        tables.append(_guards_alone(sweep))
    if not tables:
        return None
    compared = "Where perplexity falls off under each protection, all else equal; p is the rate at which the memory "
    compared = f"{compared}itself flips bits, before any correction. " if rows else ""
    return Section(
        "protection",
        "What protects, and what it costs",
        f"{compared}Extra storage is in per cent of the bits stored. A guard sees clean values, too: its cost alone "
        "is loss over the clean one, in nats per token.",
        tables,
    )


def _guards_alone(sweep: Sweep) -> Table:
    """What thresholds cost where nothing flips, since they see clean values, too; in nats per token."""
    clean = sweep.clean_loss
    rows: list[list[Any]] = [["none (clean)", sweep.clean_perplexity, None, None]]
    for name, (loss, perplexity) in sweep.guards.items():
        cost, extra = loss - clean if math.isfinite(clean) else None, sweep.overhead.get(name)
        rows.append([name, perplexity, cost, None if extra is None else 100 * extra])
    columns = ["guard", "PPL", "cost", "extra storage (%)"]
    return Table("protection-guards.csv", columns, rows, title="The guard alone, where nothing flips")


def _voltage(sweep: Sweep, curves: Sequence[Curve]) -> Section | None:
    rows = [
        [volts, ber, *curve.setting, *perplexity_cells(curve.arms[ber]), curve.arms[ber].trials]
        for volts, ber in sorted(sweep.voltages, reverse=True)
        for curve in curves
        if curve.voltages and ber in curve.arms
    ]
    if not rows:
        return None
    return Section(
        "voltage",
        "From voltage to perplexity",
        "Bit-error rate of the memory at each supply voltage, as given to the sweep, and the perplexity of the model "
        "there; 95% intervals over fault seeds.",
        [Table("voltage.csv", ["voltage (V)", "bit-error rate", *_SETTING, *PERPLEXITY, "seeds"], rows)],
    )


def _magnitudes(profile: Mapping[str, Any]) -> Section:
    operands = ("weights", "inputs")
    quantiles = list(profile["all"]["weights"]["quantiles"])
    rows, histogram_rows = [], []
    for layer, both in {"all layers": profile["all"], **profile["layers"]}.items():
        for operand in operands:
            one = both[operand]
            rows.append([layer, operand, *(one["quantiles"].get(name) for name in quantiles), one["maximum"],
                         one["zero_out_t"], one["clipped"], one["proposed_t"], one["count"]])  # fmt: skip
            histogram_rows += [[layer, operand, exponent, count] for exponent, count in one["histogram"]]
    histograms = {operand: profile["all"][operand]["histogram"] for operand in operands}
    thresholds = {
        operand: {
            name: t
            for name, key in (("configured", "zero_out_t"), ("proposed", "proposed_t"))
            if (t := profile["all"][operand][key])
        }
        for operand in operands
    }
    columns = ["layer", "operand", *quantiles, "maximum", "configured t", "clipped", "proposed t", "values"]
    return Section(
        "magnitudes",
        "Magnitudes of weights and inputs",
        "How large the values of the clean model are, by power of two: weights and inputs of all linear layers, zeros "
        "left out. Lines: the guard threshold that is configured, and the one proposed, which stands clear of the "
        "maximum. The histograms of single layers are in the file.",
        [
            Table("magnitudes.csv", columns, rows),
            Table("magnitudes-histogram.csv", ["layer", "operand", "binary exponent", "values"], histogram_rows,
                  shown=False),
        ],
        [Drawing(partial(figures.magnitude_panels, histograms, thresholds))],
        finding.of_profile(profile),
    )  # fmt: skip


def _training(runs: Mapping[str, Sequence[Logged]], validation: Mapping[str, Sequence[Validated]]) -> Section:
    steps = [[run, *row] for run, rows in runs.items() for row in rows]
    took = [
        [run, rows[-1].step, rows[-1].tokens, _of(median, rows, "tokens_per_second"), _of(max, rows, "peak_memory_gib"),
         _percent(_of(median, rows, "mfu")), rows[-1].loss]
        for run, rows in runs.items()
    ]  # fmt: skip
    columns = ["run", "steps", "tokens", "tokens/s", "peak memory (GiB)", "MFU (%)", "last loss"]
    drawn = {run: rows for run, rows in runs.items() if len(rows) > 1}
    edge = f"; open markers at the top edge: infinite, or above {CEILING:g} nats" if drawn else ""
    more = (
        f" The first {figures.SHOWN_CURVES} of {len(drawn)} runs are drawn."
        if len(drawn) > figures.SHOWN_CURVES
        else ""
    )
    validated = [[run, *row] for run, rows in validation.items() for row in rows]
    dashed = (
        " Beside it the loss on held-out text at that step: dashed under the flips of one fault seed, dash-dotted "
        "behind the guard alone, dotted without faults."
        if validated and drawn
        else ""
    )
    return Section(
        "training",
        "Training",
        f"Training loss by optimizer step, as logged, with flips on where the run has them{edge}.{dashed}{more} "
        "Tokens per second and model FLOPs utilisation are medians over what was logged, and the memory is the largest "
        "that one device held.",
        [
            Table("training-took.csv", columns, took, only_csv=_only_csv(runs)),
            Table("training.csv", ["run", *Logged._fields], steps, shown=False),
            *([Table("validation.csv", ["run", *Validated._fields], validated, shown=False)] if validated else []),
        ],
        [Drawing(partial(figures.training_curves, drawn, validation))] if drawn else [],
        finding.of_training(runs),
    )


def _of(summary: Callable[[list[float]], float], rows: Sequence[Logged], name: str) -> float | None:
    """Of what was logged under a name; None where nothing was."""
    known = [value for row in rows if (value := getattr(row, name)) is not None]
    return summary(known) if known else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _texts(texts: Mapping[str, str]) -> Section:
    return Section(
        "texts",
        "Samples of text",
        "The same prompts continued with the same random numbers: without faults, with bit flips, and with flips after "
        "training, as far as each is there.",
        [Table("texts.csv", ["arm", "text"], list(texts.items()), shown=False)],
        finding=finding.of_texts(texts),
        texts=texts,
    )
