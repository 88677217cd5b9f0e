"""What was found, in two sentences: of arms, of a sweep, of a profile, of texts, of tasks, of a training.

Each says what was measured and how sure it is, and where nothing can be said, that and why. What training with faults
is worth is what it wins over a **control**, trained alike without them. Where none was measured, what it wins over the
model before training is told instead, which plain fine-tuning on the text is part of.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flipproof.measure.arms import Arm, Cost, costs, gain, gap_closed
from flipproof.report.analyse import (
    CLIFF_THRESHOLD,
    Cliff,
    Curve,
    apart,
    bits_in_words,
    cost_maps,
    cost_of,
    p_text,
    protection_in_words,
    sites_in_words,
)
from flipproof.report.read import Hardened, Logged, Sweep


def of_arms(found: Mapping[str, Mapping[str, Arm]]) -> str:
    """Of runs by name: what flips cost, and what training with them is worth."""
    return f"{_what_flips_cost(found)} {_what_training_is_worth(found)}"


def _what_flips_cost(found: Mapping[str, Mapping[str, Arm]]) -> str:
    for who, clean, flipped in (
        ("the model", "clean", "flipped"),
        ("the trained model", "recovered_clean", "recovered"),
    ):
        pairs = {run: (arms[clean], arms[flipped]) for run, arms in found.items() if {clean, flipped} <= arms.keys()}
        of_runs = {run: costs({"clean": one, flipped: other}).get(flipped) for run, (one, other) in pairs.items()}
        known = {run: cost for run, cost in of_runs.items() if cost}
        if len(known) > 1:
            return f"Over {len(known)} runs, bit flips cost {who} {_spread(known)}."
        for run, cost in known.items():
            one, other = pairs[run]
            if not math.isfinite(cost.cost):
                return f"Bit flips break {who}: under at least one of {_seeds(other)} its loss is infinite."
            return (
                f"Bit flips cost {who} {_told(cost, other)}: perplexity is {one.perplexity:.4g} without them and "
                f"{other.perplexity:.4g} with them."
            )
    return "What bit flips cost cannot be said, since no model was measured both without them and with them."


def _what_training_is_worth(found: Mapping[str, Mapping[str, Arm]]) -> str:
    trained = {run: arms for run, arms in found.items() if "recovered" in arms}
    if not trained:
        return "Nothing here was trained with flips, so what training is worth cannot be said."
    for control in ("control", "flipped"):
        known = {run: gain(arms, control, "recovered") for run, arms in trained.items() if control in arms}
        finite = {run: won for run, won in known.items() if math.isfinite(won.cost)}
        if not known:
            continue
        over = "its control, trained alike without them" if control == "control" else "the model before training"
        if not finite:
            return f"What training with flips wins over {over}, is no number: a loss is infinite."
        only = next(iter(finite))
        gains = _spread(finite) if len(finite) > 1 else _told(finite[only], trained[only]["recovered"])
        some = f" (in {len(finite)} of {len(trained)} trained runs)" if len(finite) < len(trained) else ""
        part = "; without a control, plain fine-tuning on the text is part of that" if control == "flipped" else ""
        share = gap_closed(trained[only]) if control == "control" and len(trained) == 1 else None
        back = "" if share is None else f", {share:.0%} of what flips cost that"
        return (
            f"Under flips, training with them wins {gains} over {over}{some}{back}{part}{_clean_gain(trained, part)}."
        )
    return (
        "What training with flips is worth cannot be said: neither the model before it nor a control, trained alike "
        "without them, was measured."
    )


def _clean_gain(trained: Mapping[str, Mapping[str, Arm]], part: str) -> str:
    """What one run that has no control won without flips, which says how much of its gain may be fine-tuning."""
    arms = next(iter(trained.values()))
    if not part or len(trained) > 1 or not {"clean", "recovered_clean"} <= arms.keys():
        return ""
    won = gain(arms, "clean", "recovered_clean")
    return f", which without flips won {_number(won.cost)}{_interval(won)}" if math.isfinite(won.cost) else ""


_GUARDS = {
    "guard-tensor": "one fitted threshold for all layers",
    "guard-layer": "guards by layer",
    "guard-channel": "guards by channel",
}


def of_hardening(of: Hardened) -> str:
    """What flips cost before and after at the middle probability, and where intervals tell the rotation's part."""
    probabilities = [p for p in of.probabilities if p]
    if not probabilities:
        return "No probability was measured. So nothing can be said of what hardening is worth."
    p = probabilities[len(probabilities) // 2]
    told = {of_: costs[p] for of_, costs in of.costs.items() if p in costs}
    before = " and ".join(f"{_much(cost)} behind {_GUARDS.get(guard, guard)}"
                          for (model, guard), cost in told.items() if model == "as it was")  # fmt: skip
    after = next((_much(cost) for (model, _), cost in told.items() if model == "hardened"), "an unknown number")
    first = f"At p = {p_text(p)} of every bit, flips cost the hardened model {after}, and the model as it was {before}."
    own, hard = (of.costs.get((model, f"guard-{of.guards}"), {}) for model in ("as it was", "hardened"))
    return f"{first} {_rotation_is_worth(own, hard)}"


def _rotation_is_worth(own: Mapping[float, Cost], hard: Mapping[float, Cost]) -> str:
    """Of the same guards before (``own``) and after the rotation."""
    both = [p for p in hard if p and p in own]
    differ = [p for p in both if apart(hard[p].interval, own[p].interval)]
    lower = sum(hard[p].cost < own[p].cost for p in differ)
    of_all = f"of {len(both)} probabilities"
    if not differ:
        return f"Behind the same guards the two cannot be told apart at any of the {len(both)} probabilities."
    counts = ((lower, "less"), (len(differ) - lower, "more"))
    told = " and ".join(f"{word} at {count} {of_all}" for count, word in counts if count)
    rest = len(both) - len(differ)
    others = "" if not rest else f"; intervals at the other {'one' if rest == 1 else rest} cannot tell them apart"
    return f"Behind the same guards the hardened model costs {told} than the model as it was{others}."


def _much(cost: Cost) -> str:
    return f"{_number(cost.cost)} nats per token{_interval(cost)}" if math.isfinite(cost.cost) else "an infinite loss"


def of_sweep(sweep: Sweep, curves: Sequence[Curve]) -> str:
    """Where the worst of these curves falls off, and what moves that."""
    if not math.isfinite(sweep.clean_loss):
        return "The clean model is broken itself: its loss is infinite. So nothing can be said of what flips cost it."
    measured = [curve for curve in curves if curve.positive]
    if not measured:
        return "No point with flips is measured yet. So nothing can be said of what flips cost."
    everywhere = [one for one in measured if one.setting.layers == one.setting.bits == "all"] or measured
    bare = [curve for curve in everywhere if curve.setting.protection == "none"] or everywhere
    worst = min(bare, key=lambda one: (one.cliff.p or one.cliff.up_to or math.inf, -one.arms[one.positive[0]].loss))
    return f"{_cliff_of(worst)} {_what_protects(sweep, curves, worst) or _what_hurts(sweep, curves, worst)}"


def _cliff_of(curve: Curve) -> str:
    sites, layers, bits, protection = curve.setting
    place = "all layers" if layers == "all" else layers
    where = f"flips in {sites_in_words(sites)} ({place}, {bits_in_words(bits)}, {protection_in_words(protection)})"
    more = f"{CLIFF_THRESHOLD:.0%} above the clean one"
    raised = f"perplexity is {more}"
    cliff = curve.cliff
    if cliff.p is not None:
        ends = curve.cliff_interval
        sure = f"95% {ends[0]:.2g} to {ends[1]:.2g}" if ends else "no interval"
        return f"With {where}, {raised} at p = {cliff.p:.2g} ({sure})."
    if cliff.up_to is None:
        return f"With {where}, perplexity is never {more}, up to the largest p measured, {p_text(curve.positive[-1])}."
    if cliff.above is None:
        return f"With {where}, {raised} already at the smallest p measured, {p_text(cliff.up_to)}."
    return f"With {where}, {raised} somewhere between p = {p_text(cliff.above)} and {p_text(cliff.up_to)}."


def _what_protects(sweep: Sweep, curves: Sequence[Curve], worst: Curve) -> str | None:
    alike = [
        curve for curve in curves if curve.setting._replace(protection="") == worst.setting._replace(protection="")
    ]
    others = [curve for curve in alike if curve is not worst and curve.positive]
    tried = len([curve for curve in alike if curve.positive and curve.setting.protection != "none"])
    if not others:
        return None
    best = max(others, key=lambda curve: curve.cliff.p or curve.cliff.above or 0.0)
    tied = [one for one in alike if one.setting.protection != "none" and one.positive and not falls_before(one, best)]
    where = places_of([one.cliff for one in tied])
    gain = best.cliff.p / worst.cliff.p if best.cliff.p and worst.cliff.p else None
    if len(tied) > 1:
        names = " and ".join(one.setting.protection for one in tied)
        if gain is not None and gain <= 1:
            return (
                f"None of the {tried} protections tried helps: {names} cannot be told apart, and with them this is "
                f"{where}."
            )
        most = ", and do most: there" if len(tied) < tried else ":"
        return f"Of the {tried} protections tried, {names} cannot be told apart{most} this is {where}."
    protection = best.setting.protection
    extra = sweep.overhead.get(protection)
    price = "" if extra is None else f", for {100 * extra:.3g}% more storage"
    there = f"this is {where}{'' if gain is None else f', {gain:.3g} times that'}{price}."
    if gain is not None and gain <= 1:
        if tried == 1:
            return f"The one protection tried, {protection}, does not help: there {there}"
        return f"None of the {tried} protections tried helps: with {protection}, the best of them, {there}"
    if tried == 1:
        return f"With {protection}, the one protection tried, {there}"
    return f"Of the {tried} protections tried, {protection} does most: there {there}"


def falls_before(one: Curve, best: Curve) -> bool:
    """Whether a curve surely falls off at a smaller p: by the intervals of the cliffs, or what is known of these."""
    own, its = (
        curve.cliff_interval or (curve.cliff.above or 0.0, curve.cliff.up_to or math.inf) for curve in (one, best)
    )
    return own != its and own[1] <= its[0]


def places_of(cliffs: Sequence[Cliff]) -> str:
    """Where curves fall off: "at p = 1.00e-03", "between p = 1.00e-03 and 1.00e-02", "above p = 1.00e-02"."""
    if all(cliff.p is not None for cliff in cliffs):
        return f"at p = {' and '.join(map(str, cliffs))}"
    places = []
    for text, cliff in zip(map(str, cliffs), cliffs, strict=True):
        if cliff.p is not None:
            places.append(f"at p = {text}")
        elif cliff.above and cliff.up_to:
            places.append(f"between p = {text.replace(' to ', ' and ')}")
        else:
            places.append(text.replace("above", "above p =").replace("below", "below p ="))
    return " and ".join(dict.fromkeys(places))


def _what_hurts(sweep: Sweep, curves: Sequence[Curve], worst: Curve) -> str:
    maps = cost_maps([curve for curve in curves if curve.setting.layers != "all"], sweep.clean_loss)
    if maps:
        ((layers, bits), cost), *others = maps[0].costs.items()
        arm = maps[0].arms[layers, bits]
        much = _nats(cost, arm) if math.isfinite(cost.cost) else "an infinite loss"
        tied = sum(bool(cost.interval and other.interval) and not apart(cost.interval, other.interval)
                   for _, other in others)  # fmt: skip
        rest = f"; intervals of {tied} {'other overlaps' if tied == 1 else 'others overlap'} with that" if tied else ""
        return (
            f"Of single layers, those in {layers} ({bits_in_words(bits)}) cost most at {maps[0].label}: {much}{rest}."
        )
    p, arm = max(worst.arms.items())
    cost = cost_of(arm, sweep.clean_loss)
    if not math.isfinite(cost.cost):
        return f"At the largest p measured, {p_text(p)}, the loss is infinite under at least one of {_seeds(arm)}."
    return f"At the largest p measured, {p_text(p)}, they cost {_nats(cost, arm)}."


def of_profile(profile: Mapping[str, Any]) -> str:
    """How large values get, and what a guard would do to them."""
    both = {operand: profile["all"][operand] for operand in ("weights", "inputs")}
    if any(one["maximum"] is None for one in both.values()):
        return "Not all operands have finite values. So no guard can be proposed for this model."
    sizes = " and ".join(f"{operand} {one['maximum']:.3g}" for operand, one in both.items())
    fitted = " and ".join(f"{one['proposed_t']:g} for {operand}" for operand, one in both.items() if one["proposed_t"])
    cut = ", ".join(f"the configured {one['zero_out_t']:g} zeroes {one['clipped']:,} {operand}"
                    for operand, one in both.items() if one["zero_out_t"] and one["clipped"] is not None)  # fmt: skip
    second = f"Guards at {fitted} zero none of these values" if fitted else "No guard is proposed"
    return (
        f"The largest magnitudes of the clean model over {profile.get('tokens') or 'all'} tokens are {sizes}. "
        f"{second}{f'; {cut}' if cut else ''}; other text may have larger inputs."
    )


def of_texts(texts: Mapping[str, str]) -> str:
    """Where a text with flips parts from the clean one."""
    if not {"clean", "flipped"} <= texts.keys():
        return "These are samples of single arms. What flips do to a text takes a clean one and one with flips."
    clean, flipped = texts["clean"], texts["flipped"]
    same = next((i for i, (one, other) in enumerate(zip(clean, flipped, strict=False)) if one != other), None)
    place = min(len(clean), len(flipped)) if same is None else same
    first = "is the clean one" if clean == flipped else f"parts from the clean one at letter {place + 1}"
    return f"With bit flips the text {first}. That is one sample under one fault seed, and says nothing of how often."


def of_tasks(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the first task that was measured both clean and with flips."""
    for tasks in found.values():
        for task, result in tasks.items():
            arms = result["arms"]
            for metric, clean in arms.get("clean", {}).items():
                flipped = arms.get("flipped", {}).get(metric)
                if flipped and None not in (clean["mean"], flipped["mean"]):
                    ends = flipped["interval"]
                    sure = f"95% {ends[0]:.3g} to {ends[1]:.3g}" if ends else "no interval"
                    return (
                        f"In the task {task}, {metric.split(',')[0]} is {clean['mean']:.3g} without bit flips and "
                        f"{flipped['mean']:.3g} with them ({sure} over fault seeds). The choice of questions adds its "
                        "own error, which the table has for each task."
                    )
    return "No task was measured both without bit flips and with them. So nothing can be said of what they cost."


def of_training(runs: Mapping[str, Sequence[Logged]]) -> str:
    """How the training loss went."""
    lengths = {run: rows[-1].step for run, rows in runs.items()}
    if len(runs) > 1:
        first = f"{len(runs)} runs trained for {min(lengths.values()):,} to {max(lengths.values()):,} steps."
    else:
        rows = next(iter(runs.values()))
        start, end = (f"{_loss(row.loss)} at step {row.step}" for row in (rows[0], rows[-1]))
        first = f"The training loss {f'went from {start} to {end}' if len(rows) > 1 else f'was {end}'}."
    return f"{first} It is of single batches, under flips where the run has them, and says nothing of held-out text."


def _loss(loss: float) -> str:
    return f"{loss:.3g}" if math.isfinite(loss) else "infinite"


def _spread(known: Mapping[str, Cost]) -> str:
    """From the smallest to the largest, each with its interval and its run."""
    ends = [find(known.items(), key=lambda item: item[1].cost) for find in (min, max)]
    return "from " + " to ".join(
        (f"{_number(cost.cost)} nats per token{_interval(cost)}" if math.isfinite(cost.cost) else "all they know")
        + f" in {run}"
        for run, cost in ends
    )


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _interval(cost: Cost, arm: Arm | None = None) -> str:
    if cost.interval:
        return " (95% {} to {})".format(*map(_number, cost.interval))
    return " (one fault seed, so no interval)" if arm and arm.trials == 1 else " (no interval)"


def _nats(cost: Cost, arm: Arm) -> str:
    return f"{_number(cost.cost)} nats per token{_interval(cost, arm)}"


def _told(cost: Cost, arm: Arm) -> str:
    """A cost, and first whether it is one."""
    zero = cost.interval is not None and cost.interval[0] <= 0 <= cost.interval[1]
    return f"{'nothing that can be told from zero, ' if zero else ''}{_nats(cost, arm)}"


def _seeds(arm: Arm) -> str:
    return f"{arm.trials} fault seeds" if arm.trials > 1 else "1 fault seed"
