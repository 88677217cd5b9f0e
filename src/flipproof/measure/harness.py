"""lm-eval as flipproof uses it: tasks loaded, one run of a task, and flipproof as a model of lm-eval's own command
line. Needs the extra ``flipproof[eval]``.

**A run** is ``lm_eval.simple_evaluate`` with one task alone, on lm-eval's own Hugging Face model around ours: without
faults its figures are lm-eval's to the last digit, and with them no other task has moved the ticks. lm-eval sets the
seeds of ``random``, NumPy and torch; afterwards they are as they were. ``tasks.py`` runs all arms and seeds.

**As a model of lm-eval.** lm-eval 0.4.13 finds only models that are imported, so this module is also its command line
with the model ``flipproof`` added:

    python -m flipproof.measure.harness --model flipproof --tasks arc_easy \\
        --model_args pretrained=DIR,w_p_exp=1e-5,w_zero_out_t=256,seed=3

There ticks go on through all tasks of a run. lm-eval's own cache of responses is refused: it knows neither weights nor
faults, so that a faulty model would be given a clean one's answers, and what it does answer moves the other requests to
other ticks and batches, that is, to other flips.
"""

import difflib
import hashlib
import json
import logging
import math
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flipproof.config import RunConfig, load_config
from flipproof.errors import ConfigError
from flipproof.faults.inject import inject
from flipproof.faults.spec import BitFlipSpec, field_names
from flipproof.files import check_writable
from flipproof.log import logger, set_up_logging
from flipproof.models.adapter import adapter_spec, load_adapter
from flipproof.models.load import byte_tokenizer
from flipproof.models.parallelize import cast_to

try:
    from lm_eval import evaluator
    from lm_eval.api import metrics as lm_eval_metrics
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    _MISSING = f"tasks need lm-eval ({error}); pip install 'flipproof[eval]'"
    if __name__ == "__main__":
        sys.exit(f"flipproof: error: {_MISSING}")
    raise ConfigError([_MISSING]) from error

_CAUSE = 500  # characters
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's own defaults, named so that no later version changes them."""


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
        if self.cache is not None and self.cache.exists() and not self.cache.is_dir():
            problems.append(f"--cache {self.cache}: not a directory")
        elif self.cache is not None:
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
        loaded = manager.load([name])
    except Exception as error:  # lm-eval, datasets and the tasks' own code raise any kind
        raise ConfigError([f"--tasks {name}: its questions cannot be read ({cause_of(error)})"]) from error
    groups, tasks = loaded.get("groups", {}), loaded["tasks"]
    own_files = sorted(request.include_path.rglob("*")) if request.include_path else []
    key = {
        "name": name,
        "groups": {group: groups[group].child_names for group in groups},
        "tasks": {task: [tasks[task].dump_config(), _data_key(tasks[task])] for task in tasks},
        # functions of a task call others beside them
        "files": [
            hashlib.sha256(file.read_bytes()).hexdigest()
            for file in own_files
            if file.suffix in (".py", ".yaml", ".yml")
        ],
        "num_fewshot": request.num_fewshot,
        "limit": request.limit,
        "chat": request.chat,
    }
    return LoadedTask(name, [groups[name]] if name in groups else list(tasks.values()), key)


def cause_of(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if not text or isinstance(error, KeyError):  # which says its key alone
        text = f"{name}: {text}" if text else name
    return text if len(text) <= _CAUSE else f"{text[:_CAUSE]} …"


def check_chat_template(request: TaskRequest, tokenizer: Any, name: str) -> None:
    """Raises ConfigError where a chat template is to be applied that the tokenizer called ``name`` lacks."""
    if request.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            [f"--apply-chat-template: the tokenizer of {name!r} has no chat template; leave the flag out"]
        )


def _data_key(task: Any) -> Any:
    """Of each split what ``datasets`` knows it by: another one wherever the questions might be others."""
    splits = task.dataset
    if not isinstance(splits, Mapping):
        return as_sha256(list(task.eval_docs))
    return {name: getattr(split, "_fingerprint", None) or as_sha256(list(split)) for name, split in splits.items()}


def one_process(what: str) -> None:
    """Raises ConfigError where torchrun started several processes."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError([f"{what}: {size} processes were started; tasks run in one process (without torchrun)"])


def harness_model(model: nn.Module, tokenizer: Any, config: RunConfig) -> Any:
    """lm-eval's Hugging Face model around ``model``, in the config's batch size and compute dtype."""
    mixed = cast_to(config.training, model)
    with _quiet():
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
    with _rng_as_found(), _overflow_is_infinity(), _no_inventory(), _quiet():
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


@contextmanager
def _rng_as_found() -> Iterator[None]:
    """lm-eval seeds the global generators; nobody outside is to notice."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _MathWithInfinity:
    """``math``, with an exponential that overflows to infinity."""

    def __getattr__(self, name: str) -> Any:
        return getattr(math, name)

    @staticmethod
    def exp(x: float) -> float:
        try:
            return math.exp(x)
        except OverflowError:
            return math.inf


@contextmanager
def _overflow_is_infinity() -> Iterator[None]:
    """The perplexity of a model that flips have broken is infinite; lm-eval's ``math.exp`` would raise."""
    before, lm_eval_metrics.math = lm_eval_metrics.math, _MathWithInfinity()
    try:
        yield
    finally:
        lm_eval_metrics.math = before


@contextmanager
def _no_inventory() -> Iterator[None]:
    """After each run lm-eval looks for compilers, packages and git repositories, for seconds; nobody reads it here."""
    held = {name: getattr(evaluator, name) for name in ("add_env_info", "get_git_commit_hash")}
    for name in held:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, function in held.items():
            setattr(evaluator, name, function)


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's log from errors on: the rest is the same for every arm and seed."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def as_sha256(value: Any) -> str:
    """A hash of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@register_model("flipproof")
class FlipproofLM(HFLM):
    """lm-eval's Hugging Face model with faulty layers.

    Args:
        pretrained: directory or Hub name.
        config: a TOML or YAML file, or a preset's name, whose [bitflip] counts.
        seed: the fault seed, from tick 0; the same as ``base_seed``.
        adapter: directory of a PEFT adapter, merged under faults as in training.
        tokenizer: a Hub name or a directory, or "bytes".
        **more: the keys of [bitflip]; and whatever ``hf`` takes, a batch size of "auto" excepted.

    Raises:
        ConfigError: for keys or values that do not belong to [bitflip], several processes, or lm-eval's own cache.
    """

    def __init__(
        self,
        pretrained: str,
        config: str | None = None,
        seed: int | None = None,
        adapter: str | None = None,
        tokenizer: Any = None,
        batch_size: int | str | None = 1,
        **more: Any,
    ) -> None:
        one_process("--model flipproof")
        if str(batch_size).startswith("auto"):
            raise ConfigError([f"batch_size = {batch_size!r}: a number is allowed; which bits flip depends on it"])
        keys = [key for key in more if key in field_names(BitFlipSpec) or re.match(r"(w|x|kv)_", key)]
        bitflip = {key: more.pop(key) for key in keys} | ({} if seed is None else {"base_seed": seed})
        self._faults = load_config(
            [config] if config else [], {"bitflip": bitflip, "model": {"hf_model_path": pretrained}}
        )
        self._adapter = Path(adapter) if adapter else None
        tokenizer = byte_tokenizer() if tokenizer == "bytes" else tokenizer
        super().__init__(pretrained, tokenizer=tokenizer, batch_size=batch_size, **more)

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        spec, adapter = self._faults.bitflip, self._adapter
        if adapter or spec.any_fault:
            logger.info("%s", inject(self._model, spec, adapter_spec(adapter) if adapter else None))
        if adapter:
            load_adapter(self._model, adapter)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """lm-eval's, but that a tokenizer without one is refused."""
        if chat_template and not self.tokenizer.chat_template:
            raise ConfigError(["--apply_chat_template: the tokenizer has no chat template; leave the flag out"])
        template: str | None = super().chat_template(chat_template)
        return template

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refused: lm-eval's cache would answer for a faulty model what another one said."""
        raise ConfigError(["--use_cache: its answers know neither weights nor faults; leave it out"])


def main() -> int:
    """lm-eval's command line; returns the exit code."""
    from lm_eval.__main__ import cli_evaluate

    set_up_logging()
    try:
        with _overflow_is_infinity():
            cli_evaluate()
    except ConfigError as error:
        for problem in error.problems:
            print(f"flipproof.harness: error: {problem}", file=sys.stderr)
        return 2
    return 0
