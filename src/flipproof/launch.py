"""How this process was started (alone, by ``torchrun``, ``srun`` or ``--devices``), and what its launcher is told.

torch.distributed knows processes by RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
``torchrun`` sets them; SLURM says the same in words of its own. Without them each of the N tasks of a plain ``srun``
would be a whole run.

``--devices N`` is torchrun's own agent in the process that the user started: it runs the same command line N times.
What is said at last is one line, and the exit code is that of the processes.
"""

import ctypes
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flipproof.errors import ConfigError

logger = logging.getLogger("flipproof")

EXIT_REQUEUE = 75
"""sysexits.h's EX_TEMPFAIL: stopped by SIGTERM or Ctrl-C with a checkpoint, so starting again with --resume goes on."""
_OURS = "flipproof-"
"""How torchrun's run id begins where it was ``--devices`` that started the processes."""
_could_start = False
"""Whether the command line could have asked for more processes, and has not."""


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


def tell_launcher(reason: str, code: int = 1) -> None:
    """Why this process ends, and with which exit code, for what the launcher says at last: torchrun's summary, without
    which the reason stands 100 lines above, or the one line of ``--devices``."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and not os.path.exists(path):
        # the first counts, by whole seconds: one that only follows from the end of another process is not it
        follows = any(words in reason for words in ("by peer", "remote process exited"))
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": reason, "timestamp": int(time.time()) + follows, "exit_code": code}, file)


def started_by_devices() -> bool:
    """Whether this is one of the processes that ``--devices`` started, which says at last why they end."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_OURS)


def start_processes(verb: str, argv: Sequence[str], devices: int | str | None) -> int | None:
    """Run a command line in the processes that ``--devices`` asks for, and wait for them.

    Args:
        argv: all of it, with the verb.
        devices: a number, "auto" for one process on each GPU (one process where there is none), or None where nothing
            was asked for.

    Returns:
        Their exit code; None where this process is to do it: it is one of several already, or the only one.

    Raises:
        ConfigError: where other processes were started already, or more are asked for than there are GPUs.
    """
    if "WORLD_SIZE" in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        if devices in (None, "auto", here):
            return None
        raise ConfigError([f"--devices {devices}: torchrun or srun has started {here} processes here; leave it out"])
    if devices is None:
        global _could_start
        _could_start = True
        return None
    import torch  # not before the command line and the config are found to be right

    gpus = torch.cuda.device_count()
    size = max(1, gpus) if devices == "auto" else int(devices)
    if 0 < gpus < size:
        raise ConfigError([f"--devices {size}: at most {gpus} is allowed here, one for each GPU"])
    if size == 1:
        return None
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // size)))
    with tempfile.TemporaryDirectory(prefix=_OURS, ignore_cleanup_errors=True) as told:
        return _run_agent(verb, argv, size, Path(told))


def tell_of_idle(gpus: int) -> None:
    """Say once that a process alone uses one of several GPUs, where its command line has ``--devices``."""
    global _could_start
    if _could_start and gpus > 1:
        logger.info("%d GPUs are here and one is used; --devices auto uses all", gpus)
        _could_start = False


def _run_agent(verb: str, argv: Sequence[str], size: int, told: Path) -> int:
    """As ``torchrun --standalone`` does; its own log, hundreds of lines about one error, is not shown."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=f"{_OURS}{uuid.uuid4()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(told)),
    )
    logging.disable(logging.ERROR)
    try:
        # -P: as for the command itself, a file in the working directory is not what an import finds
        elastic_launch(config, sys.executable)("-u", "-P", "-m", "flipproof", *argv)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 1
        if code != EXIT_REQUEUE:
            print(_reason(verb, failure), file=sys.stderr)
        return code
    except SignalException as stop:
        codes = [json.loads(file.read_text("utf-8")).get("exit_code") for file in told.rglob("error.json")]
        if codes == [EXIT_REQUEUE] * size:
            return EXIT_REQUEUE
        print(f"flipproof {verb}: ended by {stop.sigval.name}", file=sys.stderr)
        return 128 + stop.sigval
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _reason(verb: str, failure: Any) -> str:
    """Of a torch ``ProcessFailure``: what the process told, or else how it ended."""
    if os.path.isfile(failure.error_file):
        return str(failure.message)
    ended = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
    return f"flipproof {verb}: error: process {failure.local_rank} ended with {ended}, and so did all"
