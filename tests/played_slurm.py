"""Slurm's commands, played as far as a batch script sees them: all nodes are this machine, all jobs one directory.

    srun            starts a task on each node, in a session of its own, and returns the highest exit code. SIGTERM
                    makes it kill its tasks at once. It must be told what clusters set up otherwise: a task that fails
                    or ends kills no other, and may use all cores
    scancel         with --signal: to the first process of each task, not to the batch script
    scontrol        ``show hostnames``, and ``requeue``, which ends the script, too

What they were asked for is in ``asked``, the tasks that run in ``tasks``.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples/slurm.sbatch"
LIMIT_S = 150
"""After so long what still runs is killed."""


class Job:
    """A job in the queue, its directory and its log."""

    def __init__(self, directory, nodes=1, per_node=1, **environment):
        """``environment`` is what the user has set."""
        self.directory, self.log, self.number = directory, directory / "log", os.getpid()
        commands = directory / "commands"
        commands.mkdir(parents=True)
        for name in ("srun", "scancel", "scontrol"):
            played = shlex.join([sys.executable, "-S", "-E", __file__, name, str(directory)])
            (commands / name).write_text(f'#!/bin/sh\nexec {played} "$@"\n')
            (commands / name).chmod(0o755)
        torchrun = shlex.join([sys.executable, "-m", "torch.distributed.run"])
        (commands / "torchrun").write_text(f'#!/bin/sh\nexec {torchrun} "$@"\n')
        (commands / "torchrun").chmod(0o755)
        self.script = directory / "slurm_script"  # Slurm runs a copy
        self.script.write_text(SCRIPT.read_text())
        names = {
            "SLURM_JOB_ID": str(self.number),
            "SLURM_JOB_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes),
            "SLURM_TASKS_PER_NODE": f"1(x{nodes})" if nodes > 1 else "1",
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
            "SLURM_LOCALID": "0",
            "NPROC_PER_NODE": str(per_node),
            "MASTER_PORT": str(10000 + self.number % 5000),  # below those that systems give out
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
        self.environment = kept | names | {"PATH": f"{commands}:{os.environ['PATH']}"} | environment

    def start(self, *arguments, **environment):
        """The process of the batch script; for a job that was requeued, with SLURM_RESTART_COUNT."""
        (self.directory / "tasks").unlink(missing_ok=True)
        with self.log.open("a") as log:
            return subprocess.Popen(
                ["bash", str(self.script), *map(str, arguments)],
                env=self.environment | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def patch(self, name):
        """The environment in which torchrun's processes call a function of ``sharded_jobs.py`` first."""
        code = (
            "import os, pathlib, sys, sharded_jobs, flipproof.cli.main\n"
            f"sharded_jobs.{name}(int(os.environ['RANK']), pathlib.Path({str(self.directory)!r}))\n"
            "sys.exit(flipproof.cli.main.main(sys.argv[1:]))"
        )
        python = self.directory / "commands/python"
        patched = shlex.join([sys.executable, "-u", "-c", code])
        python.write_text(f'#!/bin/sh\nshift 3  # -u -m flipproof\nexec {patched} "$@"\n')
        python.chmod(0o755)
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        return {"PYTHON_EXEC": str(python), "PYTHONPATH": path.rstrip(os.pathsep)}

    def wait_for(self, path, process):
        """What the file says, once it is there."""
        end = time.monotonic() + LIMIT_S
        while not (path.exists() and (text := path.read_text())):
            assert process.poll() is None, f"ended early: {self.log.read_text()}"
            assert time.monotonic() < end, f"{path} did not come: {self.log.read_text()}"
            time.sleep(0.02)
        return text

    def cancel(self, process):
        """As ``scancel JOB`` does, the first time: the script and the tasks get SIGTERM."""
        process.send_signal(signal.SIGTERM)
        for task in self.tasks():
            os.kill(task, signal.SIGTERM)

    def wait(self, process):
        """The exit code of a script, which leaves no task."""
        try:
            code = process.wait(LIMIT_S + 10)
        finally:
            process.kill()
        left = [task for task in self.tasks() if _runs(task)]
        assert not left, self.log.read_text()
        return code

    def asked(self):
        """The command lines of scancel and scontrol, without those that change nothing."""
        path = self.directory / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def tasks(self):
        path = self.directory / "tasks"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def _runs(task):
    try:
        os.kill(task, 0)
    except ProcessLookupError:
        return False
    return True


def srun(directory, arguments):
    options = []
    while arguments[0].startswith("-"):
        options.append(arguments.pop(0))
    assert {"--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"} <= set(options)  # not left to a cluster's set-up
    nodes, tasks = int(os.environ["SLURM_JOB_NUM_NODES"]), []
    for node in range(nodes):
        names = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_LOCALID": "0"}
        names |= {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(arguments, env=os.environ | names, start_new_session=True))
    (directory / "tasks").write_text("\n".join(str(task.pid) for task in tasks))

    def kill(*_):
        print("srun: forcing job termination", file=sys.stderr, flush=True)
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    end = time.monotonic() + LIMIT_S
    while any(task.poll() is None for task in tasks):
        if time.monotonic() > end:
            kill()
        time.sleep(0.02)
    return max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks))


def scancel(directory, arguments):
    (option, job) = arguments
    assert job == os.environ["SLURM_JOB_ID"]
    number = signal.Signals[f"SIG{option.removeprefix('--signal=')}"]
    _note(directory, "scancel", arguments)
    for task in (directory / "tasks").read_text().split():
        if _runs(int(task)):
            os.kill(int(task), number)
    return 0


def scontrol(directory, arguments):
    if arguments[:2] == ["show", "hostnames"]:
        (nodes,) = arguments[2:]
        begin, first, last = re.fullmatch(r"([\d.]+?)(?:\[(\d)-(\d)\])?", nodes).groups()
        print(*([begin] if first is None else [f"{begin}{n}" for n in range(int(first), int(last) + 1)]), sep="\n")
        return 0
    assert arguments == ["requeue", os.environ["SLURM_JOB_ID"]]
    _note(directory, "scontrol", arguments)
    os.kill(os.getppid(), signal.SIGTERM)
    return 0


def _note(directory, command, arguments):
    with (directory / "asked").open("a") as file:
        file.write(" ".join([command, *arguments]) + "\n")


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:]))
