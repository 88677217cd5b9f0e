"""How this process was started (alone, by ``torchrun``, by ``srun``), and what its launcher is told.

torch.distributed knows processes by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
``torchrun`` sets them; SLURM says the same in words of its own. Without them each of the N tasks of a plain ``srun``
would be a whole run.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping

from flipproof.errors import ConfigError


def join_srun() -> None:
    """Where this process is one of several tasks of ``srun``, give it the variables that torchrun would."""
    if _several_tasks(os.environ) and (names := _srun_names(os.environ)) is not None:
        os.environ.update(names)


def check_joined() -> None:
    """Raises ConfigError where SLURM speaks of several tasks and this process cannot know itself as one of them."""
    if _several_tasks(os.environ):
        raise ConfigError(
            [
                f"SLURM_NTASKS = {_tasks(os.environ)}, SLURM_PROCID = {os.environ['SLURM_PROCID']}: one of several "
                "tasks, but not of a step of srun, so where the others are is not known; start them with srun or "
                "torchrun, or set SLURM_NTASKS=1 for a process alone"
            ]
        )


def _several_tasks(environ: Mapping[str, str]) -> bool:
    return "WORLD_SIZE" not in environ and "SLURM_PROCID" in environ and _tasks(environ) > 1


def _tasks(environ: Mapping[str, str]) -> int:
    return int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)


def _srun_names(environ: Mapping[str, str]) -> dict[str, str] | None:
    """What torchrun calls what srun says; None outside of a step of srun, and where no node is named that all reach."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    # a batch script is task 0 of a job of many tasks, too; its step, where it has one, has one of the highest numbers
    in_step = step.isdecimal() and int(step) < 2**32 - 16
    if not (in_step or "SLURM_STEP_NUM_TASKS" in environ or "SLURM_STEP_NODELIST" in environ):
        return None
    tasks, node = _tasks(environ), int(environ.get("SLURM_NODEID", "0"))
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "")
    on_this = counts[node] if node < len(counts) else tasks
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if on_this < tasks and not nodes:
        return None
    job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or ""
    numbers = [int(text) if text.isdecimal() else 0 for text in (job, step)]
    # another port for each step; below those that systems give out
    port = 15000 + (7 * numbers[0] + numbers[1]) % 15000
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", environ["SLURM_PROCID"]),
        "LOCAL_WORLD_SIZE": str(on_this),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or (first_host(nodes) if nodes and on_this < tasks else "127.0.0.1"),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" as [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first of SLURM's "gpu[003-007,9],login1": "gpu003"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else nodes)


def end_with_launcher() -> None:
    """On Linux, end this process when the torchrun agent that started it dies: an orphan would go on writing into the
    directory of the run that was started in its place."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def tell_launcher(reason: str) -> None:
    """Why this process ends, for the summary with which torchrun ends: else the reason stands 100 lines above."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        # the first counts, by whole seconds: one that only follows from the end of another process is not it
        follows = any(words in reason for words in ("by peer", "remote process exited"))
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": reason, "timestamp": int(time.time()) + follows}, file)
