"""lm-eval's tasks by arms, each metric with its interval over fault seeds.

Every task is run once for each arm, and in arms that flip bits once for each fault seed. Each run starts at tick 0 of
its seed and has one task alone, so a figure does not depend on what else was asked for. The metric's mean over seeds
has Student's t interval over them; lm-eval's own standard error, which says how far another sample of questions would
move one run, is given beside it.

**Answers are kept, if at all, by run.** ``TaskRequest.cache`` is a directory with one file for each run, under a hash
of all that its answer depends on: weights, adapter, tokenizer, dtype, task, its data, arm, faults, seed, batch size and
versions. A file holds what the whole run gave, never single responses: to answer some requests from a cache would move
the others to other ticks and batches, that is, to other flips.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flipproof.config import DataConfig, RunConfig
from flipproof.data.sequences import load_held_out
from flipproof.errors import ConfigError
from flipproof.faults.inject import iter_faulty
from flipproof.faults.spec import BitFlipSpec
from flipproof.files import check_new, check_writable, write_atomically
from flipproof.log import logger
from flipproof.measure.arms import FLIPPED_ARMS, GUARD_ARMS, TRAINED_ARMS, Arm, arms_table
from flipproof.measure.harness import (
    SEEDS,
    LoadedTask,
    TaskRequest,
    as_sha256,
    cause_of,
    check_chat_template,
    harness_model,
    load_tasks,
    one_process,
    run_task,
)
from flipproof.measure.intervals import MIN_TRIALS, narrow_enough, t_interval
from flipproof.measure.perplexity import arm_faults, fault_seeds, measure_config_arms, open_model, results
from flipproof.models.build import check_length
from flipproof.models.limits import check_ids
from flipproof.models.load import load_tokenizer
from flipproof.records import RESULTS, read_record, sealed, write_record
from flipproof.world import join_world


@dataclass(frozen=True)
class Metric:
    """A metric of one task in one arm."""

    mean: float
    """Over fault seeds."""
    interval: tuple[float, float] | None
    """95%, Student's t over fault seeds; None where there is one trial."""
    seed_sd: float | None
    """Standard deviation between fault seeds."""
    stderr: float | None
    """lm-eval's standard error, from its sample of questions, of one trial (the mean of the trials')."""
    trials: tuple[float, ...]
    """The value of each trial."""

    @classmethod
    def from_trials(cls, values: Sequence[float], stderrs: Sequence[float]) -> "Metric":
        interval = t_interval(values)
        return cls(
            mean=math.fsum(values) / len(values) if all(map(math.isfinite, values)) else float(np.mean(values)),
            interval=interval,
            seed_sd=None if interval is None else float(np.std(values, ddof=1)),
            stderr=float(np.mean(stderrs)) if stderrs else None,
            trials=tuple(values),
        )


@dataclass(frozen=True)
class TaskResult:
    """A task, or a part of one, in all arms."""

    shown: bool
    """Whether the table has it: the tasks of a group are in results.json alone."""
    questions: int | None
    """None for a group."""
    num_fewshot: int | None
    version: Any
    """The task's own."""
    arms: dict[str, dict[str, Metric]]
    """arm -> metric, as lm-eval calls it ("acc,none": metric and filter) -> values."""


def evaluate_tasks(
    config: RunConfig,
    request: TaskRequest,
    adapter: Path | None = None,
    to: Path | None = None,
    *,
    tell: Callable[[str], None] | None = None,
) -> tuple[dict[str, Arm], dict[str, TaskResult]]:
    """Measure a model's arms in tasks, and on held-out text where the config's [data] names one.

    ``results.json`` is written anew after each task, and says under "unfinished" which are still to come, so one that
    fails, or a process that is killed, loses nothing of those before it. A later start of the same faults and tasks
    takes such a file's place as soon as it has measured as much.

    Arguments and errors are those of ``evaluate.evaluate``; and a ConfigError for tasks that cannot be asked, for
    several processes, and for a task that fails.
    """
    before = _unfinished(to, config, request) if to else set()
    one_process("--tasks")
    manager, tasks = load_tasks(request, {"pretrained": config.model.hf_model_path})
    if config.training.compile is None:  # prompts have any length
        config = replace(config, training=replace(config.training, compile=False))
    with join_world(config.parallelism) as world:
        tokenizer = load_tokenizer(config.model)
        check_chat_template(request, tokenizer, str(config.model.tokenizer or config.model.hf_model_path or "bytes"))
        text = None
        if config.data != DataConfig():
            check_length(config, tokenizer)
            text = load_held_out(config.data, tokenizer, config.training.seq_len)
        model, names = open_model(config, tokenizer, world, adapter)
        if text:
            check_ids(model, tokenizer, text.sequences)
        arms = measure_config_arms(config, names, model, text, world) if text else {}
        if arms and tell:
            tell(arms_table(arms) + "\n")
        found: dict[str, TaskResult] = {}
        left = [task.name for task in tasks]

        def keep() -> None:
            written = {name: asdict(result) for name, result in found.items()}
            if to is not None and (before <= written.keys() or not left):
                to.mkdir(parents=True, exist_ok=True)
                more = {"asked": list(request.names), "unfinished": left} if left else {}
                write_record(to / RESULTS, results(config, arms, model, text, written) | more)

        def done(task: LoadedTask, measured: dict[str, TaskResult]) -> None:
            found.update(measured)
            left.remove(task.name)
            keep()

        if arms:
            keep()
        try:
            measure_tasks(config, names, model, tokenizer, manager, tasks, request.cache, done)
        finally:
            if tell and found:
                tell(tasks_table(found))
    return arms, found


def _unfinished(to: Path, config: RunConfig, request: TaskRequest) -> set[str]:
    """The tasks of an unfinished ``results.json``, which this start may go on from. Raises ConfigError where there is
    another one, or none could be."""
    path = to / RESULTS
    try:
        there = read_record(path) if path.is_file() else {}
    except (OSError, ValueError):
        there = {}
    if not there.get("unfinished"):
        check_new(path, "--to")
        return set()
    check_writable(path, "--to")
    if there.get("bitflip") != json.loads(json.dumps(asdict(config.bitflip))):
        raise ConfigError([f"{path} has unfinished results of other faults; name another with --to"])
    if missing := [name for name in there.get("asked", ()) if name not in request.names]:
        raise ConfigError(
            [f"{path} has unfinished results of {missing[0]}, too; ask for it, or name another with --to"]
        )
    return set(there.get("tasks", ()))


def measure_tasks(
    config: RunConfig,
    names: Sequence[str],
    model: nn.Module,
    tokenizer: Any,
    manager: Any,
    tasks: Sequence[LoadedTask],
    cache: Path | None = None,
    done: Callable[[LoadedTask, dict[str, TaskResult]], None] | None = None,
) -> dict[str, TaskResult]:
    """The tasks, and the parts of groups, in the named arms; ``done`` is called after each with what it gave.

    Where bits flip with ``eval.trials`` fault seeds; with ``eval.until_ci`` with the first that are enough for each
    metric of the task or group to be known to ± that share of its mean (``narrow_enough``).
    """
    lm = harness_model(model, tokenizer, config)
    key = _run_key(config, model, tokenizer) if cache else {}
    runs = _Runs(model, lm, manager, cache, key, config.bitflip)
    until_ci, trials = config.eval.until_ci, config.eval.trials
    seeds = fault_seeds(config.bitflip.base_seed, trials if until_ci is None else config.eval.max_trials)
    found: dict[str, TaskResult] = {}
    for task in tasks:
        answers: dict[str, list[dict[str, Any]]] = {}
        for name in names:
            answers[name] = []
            for seed in seeds if name in FLIPPED_ARMS else [None]:
                answers[name].append(runs.run(task, name, seed))
                if until_ci is not None and _known(answers[name], until_ci, max(MIN_TRIALS, trials)):
                    break
            if until_ci is not None and name in FLIPPED_ARMS and not _known(answers[name], until_ci, MIN_TRIALS):
                logger.warning("%s, %s: after eval.max_trials = %d seeds not within ±%g of each metric",
                               task.name, name, len(answers[name]), until_ci)  # fmt: skip
        measured = _results(answers)
        found |= measured
        if done:
            done(task, measured)
    return found


def _known(trials: Sequence[Mapping[str, Any]], until_ci: float, at_least: int) -> bool:
    """Whether all metrics that a task shows are known well enough."""
    if len(trials) < at_least:
        return False
    shown = [result for result in _results({"flipped": trials}).values() if result.shown]
    return all(narrow_enough(m.trials, until_ci, at_least) for result in shown for m in result.arms["flipped"].values())


@dataclass(frozen=True)
class _Runs:
    """Runs of one model: ``simple_evaluate`` with the model as an arm has it, or what an equal run gave before."""

    model: nn.Module
    lm: Any
    manager: Any
    cache: Path | None
    key: dict[str, Any]
    bitflip: BitFlipSpec

    def run(self, task: LoadedTask, arm: str, seed: int | None) -> dict[str, Any]:
        """What lm-eval says about one task in one arm under one fault seed."""
        what = f"{task.name}, {arm}" + ("" if seed is None else f", fault seed {seed}")
        path, key = None, self._key(task, arm, seed)
        if self.cache is not None:
            path = self.cache / f"{as_sha256(key)[:32]}.json"
            if path.exists():
                logger.info("%s: answered before (%s)", what, path)
                return _kept(path, key)
        logger.info("%s", what)
        try:
            with arm_faults(self.model, arm, seed):
                answer = run_task(self.lm, self.manager, task)
        except Exception as error:  # the task's own code, its data, the device: any kind
            raise ConfigError([f"--tasks {what}: {cause_of(error)}"]) from error
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # unlike results.json this file is read back: infinity must stay infinity
            written = json.loads(json.dumps({"key": key, "answer": answer}, default=float))
            write_atomically(path, json.dumps(sealed(written), indent=1) + "\n")
        return answer

    def _key(self, task: LoadedTask, arm: str, seed: int | None) -> dict[str, Any]:
        """All that the answer depends on, as JSON. The clean arms know nothing of faults, nor untrained ones of
        adapters: their answers serve other faults and adapters too."""
        trained, faulty = arm in TRAINED_ARMS, arm in (*FLIPPED_ARMS, *GUARD_ARMS)
        return {
            **{name: value for name, value in self.key.items() if name != "adapter" or trained},
            "task": task.key,
            "arm": arm,
            # the seed of the draws is not base_seed but the trial's
            "bitflip": asdict(self.bitflip) | {"base_seed": seed} if faulty else None,
        }


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """The answer that a file of the cache holds. Raises ConfigError where it holds none, or another run's."""
    try:
        written = read_record(path, needs_hash=True)
        answer: dict[str, Any] = written["answer"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError([f"--cache: {path} is no answer that was kept ({cause_of(error)}); delete it"]) from error
    if written["key"] != json.loads(json.dumps(key, default=float)):
        raise ConfigError([f"--cache: {path} is the answer of another run under this one's name; delete it"])
    return answer


def _results(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, TaskResult]:
    """Of arm -> what each trial gave."""
    first = next(iter(answers.values()))[0]
    groups = first["groups"]
    results = {}
    for name, values in first["results"].items():
        metrics = [key for key, value in values.items() if "," in key and "_stderr," not in key and _is_number(value)]
        arms = {}
        for arm, trials in answers.items():
            arms[arm] = {
                key: Metric.from_trials(
                    [float(trial["results"][name][key]) for trial in trials],
                    [
                        float(error)
                        for trial in trials
                        if _is_number(error := trial["results"][name].get(key.replace(",", "_stderr,")))
                    ],
                )
                for key in metrics
            }
        results[name] = TaskResult(
            shown=name in groups or not groups,
            questions=first["n-samples"].get(name, {}).get("effective"),
            num_fewshot=first["n-shot"].get(name),
            version=first["versions"].get(name),
            arms=arms,
        )
    return results


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def tasks_table(results: Mapping[str, TaskResult]) -> str:
    """Each metric of each task, or of its group, arm by arm: mean and 95% interval over fault seeds, lm-eval's own
    standard error, and trials."""
    lines = [
        f"{'task':<20} {'metric':<22} {'arm':<16} {'mean':>10}  {'95% over fault seeds':<22}  {'stderr, questions':<17}"
        "  trials"
    ]
    for name, result in results.items():
        if not result.shown:
            continue
        for key in next(iter(result.arms.values())):
            metric = key.removesuffix(",none").replace(",", ", ")
            for arm, metrics in result.arms.items():
                found = metrics[key]
                interval = f"{found.interval[0]:.4g} to {found.interval[1]:.4g}" if found.interval else "-"
                error = "-" if found.stderr is None else f"{found.stderr:.4g}"
                lines.append(
                    f"{name:<20} {metric:<22} {arm:<16} {found.mean:>10.4g}  {interval:<22}  {error:<17}  "
                    f"{len(found.trials)}"
                )
    return "\n".join(lines)


def _run_key(config: RunConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    """All that answers depend on beside task, arm and faults, as JSON."""
    shape = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        shape.pop(name, None)
    return {
        "kept": 2,  # to be raised when files are written in another way
        "weights": _tensors_sha256(model, adapters=False),
        "adapter": [
            _tensors_sha256(model, adapters=True),
            {name: str(layer.lora) for name, layer in iter_faulty(model) if layer.lora},
        ],
        "model": shape,
        "generation": json.loads(model.generation_config.to_json_string(use_diff=False)),
        "tokenizer": _tokenizer_sha256(tokenizer),
        "dtype": [str(next(model.parameters()).dtype), config.training.mixed_precision_param],
        "device": model.device.type,
        "batch_size": config.training.local_batch_size,
        "seeds": SEEDS,
        "versions": {name: version(name) for name in ("flipproof", "lm_eval", "torch", "transformers")},
    }


def _tensors_sha256(model: nn.Module, adapters: bool) -> str:
    """A hash of the names, dtypes, shapes and bytes of the model's weights, or of its adapters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith((".lora_A", ".lora_B")) == adapters:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_sha256(tokenizer: Any) -> str:
    from datasets.fingerprint import Hasher

    if not tokenizer.is_fast:
        return str(Hasher.hash(tokenizer))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # each call of a tokenizer sets these two anew: here they only tell what its last call was
    del state["truncation"], state["padding"]
    return as_sha256(
        [
            state,
            type(tokenizer).__qualname__,
            {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            tokenizer.chat_template,
        ]
    )
