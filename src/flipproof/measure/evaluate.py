"""Perplexity by arms: the same held-out text with and without faults, guard and training, each with its interval.

Faulty arms are measured once per fault seed, with seeds that training never uses. Perplexity is exp of the
token-weighted mean cross-entropy. All sequences of text have as many tokens, so it is the plain mean over sequences
too; those of instruction data count by their tokens that have a loss.

Which arms there are is said in ``arms.py``, and how sure they are in ``intervals.py``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from flipproof.config import RunConfig
from flipproof.data.sequences import PackedText, load_held_out
from flipproof.errors import ConfigError
from flipproof.faults.flip_log import FlipLog, Replay, hooked
from flipproof.faults.inject import fault_sites, fault_state, faults, is_faulty
from flipproof.faults.quantised import FaultyQuantisedLinear
from flipproof.faults.spec import BitFlipSpec
from flipproof.files import check_new
from flipproof.log import bar, logger
from flipproof.measure.arms import ARMS, Arm, arm_names, arms_table, costs, gap_closed, guard_warning, worth
from flipproof.measure.intervals import MIN_TRIALS, sure_enough, weighted_mean, weights_of
from flipproof.models.adapter import adapter_spec, load_adapter
from flipproof.models.build import build_model, check_length, flipped_dtype
from flipproof.models.load import compute_context, load_tokenizer
from flipproof.models.loss import loss_by_row, next_token_loss
from flipproof.models.packed import check_text
from flipproof.records import RESULTS, write_new_record
from flipproof.world import World, join_world

_NO_FAULTS = "no faults are configured (bitflip.*), so there is nothing to log or to replay"


def arms_of(model: nn.Module, spec: BitFlipSpec, trained: bool, control: bool = False) -> tuple[str, ...]:
    """``arm_names`` of a model that has the faults of ``spec`` wherever something in it is faulty."""
    found = []
    for site in fault_sites(model).values():
        if (own := spec.for_layer(site.site)) is not None:
            if isinstance(site, FaultyQuantisedLinear):
                found += [own.x, *own.stored]
                continue
            found += {"kv": [own.kv], "embedding": [own.w]}.get(site.kind, [own.w, own.x])
    flips, guard = any(fault.flips for fault in found), any(fault.guarded for fault in found)
    return arm_names(flips, guard, trained, control)


def fault_seeds(base_seed: int, trials: int) -> list[int]:
    """Seeds for evaluation; ``base_seed``, which training uses, is not among them."""
    return [(base_seed + 1 + i) % 2**63 for i in range(trials)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in its mode of evaluation."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def passes_of(text: PackedText, num_samples: int, batch_size: int, world: World) -> list[tuple[int, np.ndarray]]:
    """Of each pass (the place of its first sequence among all, which sequences of the text this process has in it):
    ``batch_size`` of ``num_samples`` that are spread evenly over the text, or of all where it has fewer."""
    chosen = _chosen(text, num_samples)
    firsts = range(world.rank * batch_size, len(chosen) + world.rank * batch_size, batch_size * world.size)
    return [(first, chosen[first:][:batch_size]) for first in firsts]


@torch.no_grad()
def run_over(
    model: nn.Module,
    text: PackedText,
    num_samples: int,
    batch_size: int,
    world: World,
    looking: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Run the sequences of ``passes_of`` through a model, for who looks at all that it makes of them; returns how many
    tokens they have, in all processes together.

    What is made of padding is of no text. So a sequence that may end in some has a pass of its own, without it.

    Args:
        looking: around each pass but those for which this process has no sequence left: a sharded model needs it there.
    """
    passes = passes_of(text, num_samples, batch_size if text.marks is None else 1, world)
    with evaluating(model), bar(len(passes), "batch", world.first) as shown:
        for _, here in passes:
            batch = text.without_padding(here if len(here) else np.array([0])).to(world.device)
            with looking() if len(here) else nullcontext():
                next_token_loss(model, batch.ids, positions=batch.positions)
            shown.update()
    return unpadded_tokens(text, num_samples)


def mean_loss(
    model: nn.Module, text: PackedText, num_samples: int, batch_size: int, world: World | None = None
) -> tuple[float, int]:
    """(mean of ``sequence_losses`` over tokens, predicted tokens)."""
    losses, tokens = sequence_losses(model, text, num_samples, batch_size, world), tokens_of(text, num_samples)
    return weighted_mean(losses, weights_of(tokens)), sum(tokens)


def tokens_of(text: PackedText, num_samples: int) -> list[int]:
    """How many tokens each of the sequences of ``passes_of`` is measured on."""
    tokens: list[int] = text.trained_tokens(_chosen(text, num_samples)).tolist()
    return tokens


def unpadded_tokens(text: PackedText, num_samples: int) -> int:
    """How many tokens the sequences of ``passes_of`` have together, without padding."""
    return int(text.sizes(_chosen(text, num_samples)).sum())


def _chosen(text: PackedText, num_samples: int) -> np.ndarray:
    n = min(num_samples, len(text))
    return np.arange(n) * len(text) // n


@torch.no_grad()
def sequence_losses(
    model: nn.Module,
    text: PackedText,
    num_samples: int,
    batch_size: int,
    world: World | None = None,
    done: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Mean cross-entropy in nats per token of each of ``num_samples`` sequences spread evenly over the text, or of all
    where it has fewer; infinity where the model predicts nothing.

    ``batch_size`` sequences at a time in each process, after which ``done`` is called; all processes return the same.
    """
    world = world or World(0, 1, next(model.parameters()).device)
    losses = torch.zeros(min(num_samples, len(text)), dtype=torch.float64)
    with evaluating(model):
        for first, here in passes_of(text, num_samples, batch_size, world):
            # Every process runs as many passes on as many rows, so that rows keep their place in the whole batch.
            short = batch_size - len(here) if world.size > 1 else 0
            batch = text.batch(np.concatenate([here, np.zeros(short, dtype=here.dtype)])).to(world.device)
            losses[first : first + len(here)] = loss_by_row(model, *batch)[: len(here)].cpu()
            done()
    if world.size > 1:  # the others have 0 there: the sum is exact, in any order
        dist.all_reduce(losses, group=world.cpu_group)
    # NaN, too, is a model that flips have broken: it predicts nothing.
    return losses.where(losses.isfinite(), math.inf).tolist()


def arm_faults(model: nn.Module, name: str, seed: int | None) -> AbstractContextManager[None]:
    """The model as the named arm has it, within the block: from tick 0 of the fault seed, where the arm flips bits."""
    if not is_faulty(model):
        return nullcontext()
    kind = ARMS[name]
    return faults(model, flips=kind.flips, guard=kind.guard, adapters=kind.trained, seed=seed)


def arm_seeds(name: str, seeds: Sequence[int]) -> Sequence[int | None]:
    """Those of ``seeds`` that the named arm has a trial for each of: all where it flips bits, else none but one without
    a seed."""
    return seeds if ARMS[name].flips else [None]


def measure_arms(
    model: nn.Module,
    names: Sequence[str],
    text: PackedText,
    *,
    seeds: Sequence[int],
    num_samples: int,
    batch_size: int,
    world: World | None = None,
    until_ci: float | None = None,
    at_least: int = MIN_TRIALS,
) -> dict[str, Arm]:
    """The named arms of a model; one without faulty layers has the arm ``clean`` alone.

    An arm that flips bits is measured with all ``seeds``; with ``until_ci`` with the first of them that are enough
    (``sure_enough``), ``at_least`` so many. All processes stop at the same seed, having the same losses.
    """
    arms = {}
    world = world or World(0, 1, next(model.parameters()).device)
    passes, tokens = len(passes_of(text, num_samples, batch_size, world)), tokens_of(text, num_samples)
    for name in names:
        trials, table = arm_seeds(name, seeds), list[list[float]]()
        with bar(len(trials) * passes, "batch", world.first) as shown:
            for seed in trials:
                shown.set_description(name if seed is None else f"{name}, fault seed {seed}")
                with arm_faults(model, name, seed):
                    table.append(sequence_losses(model, text, num_samples, batch_size, world, shown.update))
                means = [weighted_mean(row, weights_of(tokens)) for row in table]
                if until_ci is not None and sure_enough(means, until_ci, at_least):
                    break
        arms[name] = Arm.from_table(np.array(table), tokens)
    return arms


def evaluate(
    config: RunConfig,
    adapter: Path | None = None,
    to: Path | None = None,
    *,
    control: Path | None = None,
    flip_log: Path | None = None,
    replay: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Arm]:
    """Measure a model's arms on held-out text.

    Args:
        config: model, text, faults and trials. ``lora`` counts for nothing here: an adapter brings its own.
        adapter: directory of a PEFT adapter; adds the trained arms of ``arm_names``.
        to: directory to write ``results.json`` into; it must not hold one.
        control: directory of another one, trained without faults and else as ``adapter``; adds the arms of the control.
        flip_log: file for every flip of the first trial of the last arm with faults (``faulty_arm``).
        replay: such a file; adds the arm ``replayed``, that arm with the file's flips in the place of draws.
        tell: called by the first process with the table, before anything is written to ``to``.

    Raises:
        ConfigError: where model, text, adapter, directory or file are at fault, before anything is measured.
    """
    check_free(to)
    if flip_log or replay:
        check_log(config, flip_log, replay)
        config = replace(config, training=replace(config.training, compile=False))  # which hooks need
    with join_world(config.parallelism) as world, ExitStack() as stack:
        if world.size > 1 and (flip_log or replay):
            raise ConfigError([f"--flip-log and --replay work in one process; {world.size} were started"])
        tokenizer = load_tokenizer(config.model)
        check_length(config, tokenizer)
        text = load_held_out(config.data, tokenizer, config.training.seq_len)
        model, names = open_model(config, tokenizer, world, adapter, control)
        check_text(config.training, model, tokenizer, text)
        seed = fault_seeds(config.bitflip.base_seed, 1)[0]
        replayed = []
        if flip_log or replay:
            flip_hook: FlipLog | Replay
            name, dtype = faulty_arm(names), flipped_dtype(config.training, model)
            if flip_log:
                what = {"dtype": dtype, "seed": seed, "text": text.source, "arm": name, "eval": asdict(config.eval)}
                flip_log.parent.mkdir(parents=True, exist_ok=True)
                flip_hook = stack.enter_context(FlipLog(flip_log, **what, bitflip=asdict(config.bitflip)))
            elif replay:
                flip_hook = Replay(replay, dtype)
            with compute_context(config.training, model), arm_faults(model, name, seed), hooked(model, flip_hook):
                replayed = sequence_losses(model, text, config.eval.num_samples, config.training.local_batch_size)
            if isinstance(flip_hook, Replay):
                flip_hook.check_all_done()
        arms = measure_config_arms(config, names, model, text, world, adapters_by_arm(adapter, control))
        if replay:
            arms["replayed"] = Arm.from_table(np.array([replayed]), tokens_of(text, config.eval.num_samples))
        if tell and world.first:
            tell(arms_table(arms))
        if to is not None and world.first:
            write_new_record(to / RESULTS, results(config, arms, model, text), "--to")
    return arms


def faulty_arm(names: Sequence[str]) -> str:
    """The one that a log of flips is of: the last with faults. Raises ConfigError where there is none."""
    faulty = [name for name in names if ARMS[name].guard]
    if not faulty:
        raise ConfigError([_NO_FAULTS])
    return faulty[-1]


def check_log(config: RunConfig, flip_log: Path | None, replay: Path | None) -> None:
    """Raises ConfigError where a run of this config can neither write nor replay a log."""
    if flip_log and replay:
        raise ConfigError(["--flip-log and --replay: a replay draws nothing that a log could say; drop one"])
    if not config.bitflip.any_fault:
        raise ConfigError([_NO_FAULTS])
    if flip_log:
        check_new(flip_log, "--flip-log", "file")


def check_free(to: Path | None) -> None:
    """Raises ConfigError where the directory holds results already, or could not."""
    if to is not None:
        check_new(to / RESULTS, "--to")


def adapters_by_arm(adapter: Path | None, control: Path | None) -> dict[str, Path]:
    """``ArmKind.weights`` -> the adapter that the arm has, where there are two and they take turns in one model."""
    return {} if adapter is None or control is None else {"trained": adapter, "control": control}


def check_alike(adapter: Path | None, control: Path) -> None:
    """Raises ConfigError where a control is not one of this adapter: not of the same layers, ranks and scalings."""
    if adapter is None:
        raise ConfigError(
            [f"--control {control}: is compared with the adapter trained with faults; name it: --adapter"]
        )
    own, other = adapter_spec(adapter), adapter_spec(control)
    for layer in sorted(own.keys() | other.keys()):
        one, two = own.get(layer), other.get(layer)
        if (one and (one.r, one.scaling)) != (two and (two.r, two.scaling)):
            has, wants = (f"r = {it.r}, scaled by {it.scaling:g}" if it else "no adapter" for it in (two, one))
            raise ConfigError(
                [f"--control {control}: {layer} has {has} there and {wants} in {adapter}; a control is trained alike"]
            )


def open_model(
    config: RunConfig, tokenizer: Any, world: World, adapter: Path | None, control: Path | None = None
) -> tuple[nn.Module, tuple[str, ...]]:
    """(a config's model with its adapter, ready to be measured; the arms that it has, with a ``control`` more).

    Raises:
        ConfigError: where model or adapters are at fault.
    """
    if control:
        check_alike(adapter, control)
    # what is kept for a backward pass does not matter here
    config = replace(config, training=replace(config.training, activation_checkpointing="none"))
    model = build_model(config, tokenizer, world, adapter_spec(adapter) if adapter else None)
    if not config.bitflip.any_fault:
        logger.info("no faults are configured (bitflip.*): the model is measured without")
    for each in (control, adapter):  # the last stays
        if each:
            load_adapter(model, each)
    return model, arms_of(model, config.bitflip, adapter is not None, control is not None)


def measure_config_arms(
    config: RunConfig,
    names: Sequence[str],
    model: nn.Module,
    text: PackedText,
    world: World,
    adapters: Mapping[str, Path] | None = None,
) -> dict[str, Arm]:
    """``measure_arms`` with the config's seeds, samples, batch and compute dtype; and a warning where the guard alone
    costs much. ``adapters``: those of ``adapters_by_arm``."""
    trials, until_ci = config.eval.trials, config.eval.until_ci
    arms: dict[str, Arm] = {}
    with compute_context(config.training, model):
        for name in names:
            wear(model, name, adapters or {})
            arms |= measure_arms(
                model,
                (name,),
                text,
                seeds=fault_seeds(config.bitflip.base_seed, trials if until_ci is None else config.eval.max_trials),
                num_samples=config.eval.num_samples,
                batch_size=config.training.local_batch_size,
                world=world,
                until_ci=until_ci,
                at_least=max(MIN_TRIALS, trials),
            )
            if name == "guard" and (line := guard_warning(arms, config.bitflip)):
                logger.warning("%s", line)
    if until_ci is not None:
        for name, arm in arms.items():
            if ARMS[name].flips and not sure_enough(arm.trial_losses, until_ci):
                logger.warning("%s: after eval.max_trials = %d seeds not within ±%g of its perplexity",
                               name, arm.trials, until_ci)  # fmt: skip
    return arms


def wear(model: nn.Module, name: str, adapters: Mapping[str, Path]) -> None:
    """Load the adapter that the named arm has, of those of ``adapters_by_arm``."""
    if adapter := adapters.get(ARMS[name].weights or ""):
        load_adapter(model, adapter)


def results(
    config: RunConfig,
    arms: dict[str, Arm],
    model: nn.Module,
    text: PackedText | None,
    tasks: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``results.json`` holds: the arms and what they were measured with, on text and (``tasks.py``) in tasks. No
    times and no machine: equal runs write equal files.
    """
    trials = [arm.trials for name, arm in arms.items() if ARMS[name].flips]
    for task in (tasks or {}).values():
        of_flipped = [metrics.values() for name, metrics in task["arms"].items() if ARMS[name].flips]
        trials += [len(metric["trials"]) for metrics in of_flipped for metric in metrics]
    return {
        "arms": {name: asdict(arm) for name, arm in arms.items()},
        "costs": {name: asdict(cost) for name, cost in costs(arms).items()},
        **({} if (won := worth(arms)) is None else {"worth": asdict(won), "gap_closed": gap_closed(arms)}),
        **({} if tasks is None else {"tasks": tasks}),
        "fault_seeds": fault_seeds(config.bitflip.base_seed, max(trials, default=0)),
        "bitflip": asdict(config.bitflip),
        **({"fitted": fitted.about} if is_faulty(model) and (fitted := fault_state(model).guards) else {}),
        "dtype": flipped_dtype(config.training, model),
        "text": text.source if text else None,
        **({"measured_on": asdict(text.about)} if text and text.about else {}),
    }
