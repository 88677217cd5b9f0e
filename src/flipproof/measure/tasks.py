"""lm-eval's tasks by arms, each metric with its interval over fault seeds. Needs the extra ``flipproof[eval]``.

Every task is run once for each arm, and in arms that flip bits once for each fault seed. A **run** is
``lm_eval.simple_evaluate`` with one task alone, on lm-eval's own Hugging Face model around ours, from tick 0 of its
seed: without faults its figures are lm-eval's to the last digit, and none depends on what else was asked for. The
metric's mean over seeds has Student's t interval over them; lm-eval's own standard error, which says how far another
sample of questions would move one run, is given beside it.

What equal runs gave before may be kept (``answers.py``); ``flipproof.harness`` is the other way round, flipproof as a
model of lm-eval.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from flipproof.config import DataConfig, RunConfig
from flipproof.data.sequences import load_held_out
from flipproof.errors import ConfigError
from flipproof.files import check_new, check_writable
from flipproof.log import bar, logger
from flipproof.measure.answers import SEEDS, Answers, as_sha256, cause_of
from flipproof.measure.arms import ARMS, Arm, arms_table
from flipproof.measure.evaluate import arm_faults, arm_seeds, fault_seeds, measure_config_arms, open_model, results
from flipproof.measure.intervals import MIN_TRIALS, narrow_enough, t_interval
from flipproof.models.build import check_length
from flipproof.models.hub import cache_where_unreachable
from flipproof.models.load import load_tokenizer
from flipproof.models.packed import check_text
from flipproof.models.parallelize import cast_to
from flipproof.records import RESULTS, read_record, write_record
from flipproof.world import join_world

try:
    from lm_eval import evaluator
    from lm_eval.api import metrics as lm_eval_metrics
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError([f"tasks need lm-eval ({error}); pip install 'flipproof[eval]'"]) from error


@dataclass(frozen=True)
class TaskRequest:
    """Tasks of lm-eval, and how to ask them."""

    names: tuple[str, ...]
    """Tasks, groups or tags."""
    include_path: Path | None = None
    """A directory with task files of one's own."""
    num_fewshot: int | None = None
    """Examples in the prompt. None: the task's own number."""
    limit: float | None = None
    """Questions of each task, or below 1 their share. None: all."""
    cache: Path | None = None
    """A directory that keeps answers, one file for each task, arm and seed."""
    apply_chat_template: bool = False
    """Ask in the tokenizer's chat template, which instruct models know."""
    fewshot_as_multiturn: bool | None = None
    """Examples as turns of the conversation, not as one. None: where the chat template is applied."""
    system_instruction: str | None = None
    """What comes before every prompt, in the template's system role where it is applied."""

    @property
    def chat(self) -> dict[str, Any]:
        """The last three, as lm-eval calls them."""
        multiturn = self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn
        return {
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": multiturn,
            "system_instruction": self.system_instruction,
        }

    def problems(self) -> list[str]:
        problems = []
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            problems.append("--fewshot-as-multiturn: turns are those of a chat template; add --apply-chat-template")
        if not self.names:
            problems.append("--tasks: no task is named")
        if self.include_path is not None and not self.include_path.is_dir():
            problems.append(f"--include-path {self.include_path}: no such directory")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            problems.append(f"--num-fewshot {self.num_fewshot}: at least 0 is allowed")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit % 1 == 0)):
            problems.append(f"--limit {self.limit:g}: a whole number of questions, or a share below 1, is allowed")
        if self.cache is not None:
            try:
                check_writable(self.cache / "answer.json", "--cache")
            except ConfigError as error:
                problems += error.problems
        return problems


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data, as lm-eval loads it."""

    name: str
    parts: list[Any]
    """What ``simple_evaluate`` takes: the group, or the tasks that the name stands for."""
    key: dict[str, Any]
    """Config and data of all its tasks, as JSON."""


def load_tasks(request: TaskRequest, metadata: Mapping[str, Any] | None = None) -> tuple[Any, list[LoadedTask]]:
    """(lm-eval's task manager, the tasks).

    Raises:
        ConfigError: for a request that cannot be, a task of an unknown name, or data that cannot be read.
    """
    if problems := request.problems():
        raise ConfigError(problems)
    manager = TaskManager(include_path=str(request.include_path) if request.include_path else None, metadata=metadata)
    problems = []
    for name in request.names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "--include-path DIR adds tasks of your own"
            problems.append(f"--tasks {name}: lm-eval knows no such task; {hint}")
    if problems:
        raise ConfigError(problems)
    return manager, [_load_task(manager, name, request) for name in dict.fromkeys(request.names)]


def _load_task(manager: Any, name: str, request: TaskRequest) -> LoadedTask:
    try:
        with cache_where_unreachable():
            loaded = manager.load([name])
    except Exception as error:  # lm-eval, datasets and the tasks' own code raise any kind
        raise ConfigError([f"--tasks {name}: its questions cannot be read ({cause_of(error)})"]) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    own_files = sorted(request.include_path.rglob("*")) if request.include_path else []
    own = [file.read_bytes() for file in own_files if file.suffix in (".py", ".yaml", ".yml")]
    key = {
        "name": name,
        "groups": {group: groups[group].child_names for group in groups},
        "tasks": {task: [tasks[task].dump_config(), _data_key(tasks[task])] for task in tasks},
        # functions of a task call others beside them
        "files": [hashlib.sha256(content).hexdigest() for content in own],
        "num_fewshot": request.num_fewshot,
        "limit": request.limit,
        "chat": request.chat,
    }
    return LoadedTask(name, [groups[name]] if name in groups else list(tasks.values()), key)


def _data_key(task: Any) -> Any:
    """Of each split what ``datasets`` knows it by: another one wherever the questions might be others."""
    splits = task.dataset
    if not isinstance(splits, Mapping):
        return as_sha256(list(task.eval_docs))
    return {name: getattr(split, "_fingerprint", None) or as_sha256(list(split)) for name, split in splits.items()}


@contextmanager
def overflow_is_infinity() -> Iterator[None]:
    """The perplexity of a model that flips have broken is infinite; lm-eval's ``math.exp`` would raise."""

    def exp(x: float) -> float:
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf

    with _set(lm_eval_metrics, math=SimpleNamespace(**vars(math) | {"exp": exp})):
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """lm-eval within the block is not noticed outside: it seeds the global generators; looks for compilers, packages
    and git repositories, for seconds; and logs the same for every arm and seed, unless it errs."""
    log = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(_set(evaluator, add_env_info=_nothing, get_git_commit_hash=_nothing))
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        yield


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def _set(module: Any, **values: Any) -> Iterator[None]:
    """Within the block names of a module stand for other values."""
    held = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(held)


def one_process(what: str) -> None:
    """Raises ConfigError where torchrun started several processes."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError([f"{what}: {size} processes were started; tasks run in one (no torchrun, no --devices)"])


def harness_model(model: nn.Module, tokenizer: Any, config: RunConfig) -> Any:
    """lm-eval's Hugging Face model around ``model``, in the config's batch size and compute dtype."""
    mixed = cast_to(config.training, model)
    with _alone():
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=config.training.local_batch_size,
            # lm-eval switches an outer autocast off, and does its own
            mixed_precision_dtype=None if mixed is None else str(mixed).removeprefix("torch."),
        )


def run_task(lm: Any, manager: Any, task: LoadedTask) -> dict[str, Any]:
    """What lm-eval says about one task: its "results", "groups", "n-samples", "n-shot" and "versions"."""
    with overflow_is_infinity(), _alone():
        found = evaluator.simple_evaluate(
            lm,
            tasks=list(task.parts),
            task_manager=manager,
            num_fewshot=task.key["num_fewshot"],
            limit=task.key["limit"],
            **task.key["chat"],
            use_cache=None,
            log_samples=False,
            **SEEDS,
        )
    return {key: found.get(key, {}) for key in ("results", "groups", "n-samples", "n-shot", "versions")}


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

    Arguments and errors are those of ``evaluate``; and a ConfigError for tasks that cannot be asked, for
    several processes, and for a task that fails.
    """
    before = _unfinished(to, config, request) if to else set()
    one_process("--tasks")
    manager, tasks = load_tasks(request, {"pretrained": config.model.hf_model_path})
    if config.training.compile is None:  # prompts have any length
        config = replace(config, training=replace(config.training, compile=False))
    with join_world(config.parallelism) as world:
        tokenizer = load_tokenizer(config.model)
        if request.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            name = str(config.model.tokenizer or config.model.hf_model_path or "bytes")
            raise ConfigError(
                [f"--apply-chat-template: the tokenizer of {name!r} has no chat template; leave the flag out"]
            )
        text = None
        if config.data != DataConfig():
            check_length(config, tokenizer)
            text = load_held_out(config.data, tokenizer, config.training.seq_len)
        model, names = open_model(config, tokenizer, world, adapter)
        if text:
            check_text(config.training, model, tokenizer, text)
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
    answers = Answers(cache, config, model, tokenizer) if cache else None
    until_ci, trials = config.eval.until_ci, config.eval.trials
    seeds = fault_seeds(config.bitflip.base_seed, trials if until_ci is None else config.eval.max_trials)
    found: dict[str, TaskResult] = {}
    with bar(len(tasks) * sum(len(arm_seeds(name, seeds)) for name in names), "run") as shown:
        for task in tasks:
            given: dict[str, list[dict[str, Any]]] = {}
            for name in names:
                given[name] = []
                for seed in arm_seeds(name, seeds):
                    given[name].append(_run(model, lm, manager, task, name, seed, answers))
                    shown.update()
                    if until_ci is not None and _known(given[name], until_ci, max(MIN_TRIALS, trials)):
                        break
                if until_ci is not None and ARMS[name].flips and not _known(given[name], until_ci, MIN_TRIALS):
                    logger.warning("%s, %s: after eval.max_trials = %d seeds not within ±%g of each metric",
                                   task.name, name, len(given[name]), until_ci)  # fmt: skip
            measured = _results(given)
            found |= measured
            if done:
                done(task, measured)
    return found


def _run(
    model: nn.Module, lm: Any, manager: Any, task: LoadedTask, arm: str, seed: int | None, answers: Answers | None
) -> dict[str, Any]:
    """What lm-eval says about one task with the model as an arm has it, or what an equal run gave before."""
    what = f"{task.name}, {arm}" + ("" if seed is None else f", fault seed {seed}")
    key = answers.key(task.key, arm, seed) if answers else {}
    if answers and (kept := answers.read(key)):
        logger.info("%s: answered before (%s)", what, answers.path(key))
        return kept
    logger.info("%s", what)
    try:
        with arm_faults(model, arm, seed):
            answer = run_task(lm, manager, task)
    except Exception as error:  # the task's own code, its data, the device: any kind
        raise ConfigError([f"--tasks {what}: {cause_of(error)}"]) from error
    if answers:
        answers.write(key, answer)
    return answer


def _known(trials: Sequence[Mapping[str, Any]], until_ci: float, at_least: int) -> bool:
    """Whether all metrics that a task shows are known well enough."""
    if len(trials) < at_least:
        return False
    shown = [result.arms[""] for result in _results({"": trials}).values() if result.shown]
    return all(narrow_enough(metric.trials, until_ci, at_least) for metrics in shown for metric in metrics.values())


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
