"""Fake environments of SLURM, as its manual describes them (srun, OUTPUT ENVIRONMENT VARIABLES)."""

import json
import logging
import os
import subprocess
import sys

import by_devices
import preloaded
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flipproof import launch
from flipproof.config import ParallelismConfig
from flipproof.errors import ConfigError
from flipproof.launch import check_joined, first_host, join_srun, start_processes, tell_launcher
from flipproof.world import join_world

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch):
    """Sets nothing but what is given, and says what torch.distributed then sees."""

    def make(**values):
        fake = dict(values)
        monkeypatch.setattr(os, "environ", fake)
        join_srun()
        return {name: fake[name] for name in NAMES if name in fake}

    return make


def step(rank, tasks, **more):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks), "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", **more}


def test_two_tasks_of_one_node_are_two_ranks(environ):
    for rank in (0, 1):
        names = environ(**step(rank, 2, SLURM_LOCALID=str(rank), SLURM_NODEID="0", SLURM_STEP_NODELIST="n[1]"))
        assert names == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(15000 + 7 * 77),
        }
        check_joined()


def test_tasks_of_several_nodes(environ):
    nodes = {"SLURM_STEP_NODELIST": "gpu[003-004,9],b1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2,1"}
    seen = [
        environ(**step(rank, 11, SLURM_LOCALID=str(local), SLURM_NODEID=str(node), **nodes))
        for rank, (node, local) in enumerate((node, local) for node, n in enumerate((4, 4, 2, 1)) for local in range(n))
    ]
    assert [names["RANK"] for names in seen] == [str(rank) for rank in range(11)]
    assert [names["LOCAL_RANK"] for names in seen] == list("01230123010")
    assert [names["LOCAL_WORLD_SIZE"] for names in seen] == list("44444444221")
    assert {(names["WORLD_SIZE"], names["MASTER_ADDR"]) for names in seen} == {("11", "gpu003")}
    assert len({names["MASTER_PORT"] for names in seen}) == 1


def test_an_address_of_the_users_own_stays(environ):
    names = environ(**step(0, 2, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500"))
    assert (names["MASTER_ADDR"], names["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    "alone",
    [
        {},
        step(0, 1),
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"},  # a shell of salloc
        {"RANK": "1", "WORLD_SIZE": "4"} | step(0, 2),  # torchrun, which srun started
    ],
)
def test_nothing_changes_for_a_process_alone_and_under_torchrun(environ, alone):
    assert environ(**alone) == {name: value for name, value in alone.items() if name in NAMES}
    check_joined()


@pytest.mark.parametrize(
    "unclear",
    [
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "77"},  # a batch script
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": str(2**32 - 5)},  # the step of a batch script
        step(0, 2, SLURM_TASKS_PER_NODE="1(x2)"),  # two nodes, without their names
    ],
)
def test_tasks_that_cannot_find_each_other_are_refused_with_the_way_out(environ, unclear):
    assert environ(**unclear) == {}
    with pytest.raises(ConfigError, match=r"^SLURM_NTASKS = 2, SLURM_PROCID = \d: .*srun or torchrun.*SLURM_NTASKS=1"):
        check_joined()
    with pytest.raises(ConfigError, match="SLURM_NTASKS"), join_world(ParallelismConfig()):
        pass


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3,7]", "n3"),
        ("n[08-11]", "n08"),
        ("r1-n[2-3]-ib,x", "r1-n2-ib"),
        ("n1,m[2-3]", "n1"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_two_tasks_of_srun_are_one_run(tmp_path):
    """Two processes, with nothing but SLURM's names for them, add up their ranks plus one."""
    code = (
        "from flipproof.world import join_world\nfrom flipproof.config import ParallelismConfig\n"
        "with join_world(ParallelismConfig()) as world: print(world.rank, world.size, world.total(world.rank + 1.0))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in NAMES and not name.startswith("SLURM")}
    job = str(os.getpid())  # another port than that of another test run
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=clean | step(rank, 2, SLURM_LOCALID=str(rank), SLURM_JOB_ID=job, CUDA_VISIBLE_DEVICES=""),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert [task.communicate(timeout=120)[0] for task in tasks] == ["0 2 3.0\n", "1 2 3.0\n"]


def test_torchrun_ends_with_the_first_reason_that_it_was_told(tmp_path, monkeypatch):
    """As its agent reads it; a later reason of the same process, which follows from the first, does not replace it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher("flipproof train: error: lr = -1.0: a positive number is allowed")
    tell_launcher("flipproof train: RuntimeError: connection closed")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.timestamp == json.loads((tmp_path / "error.json").read_text())["timestamp"]
    last = str(ChildFailedError("train", {0: failure})).strip().splitlines()[-2]
    assert last == "  traceback : flipproof train: error: lr = -1.0: a positive number is allowed"


def test_what_follows_from_the_end_of_another_process_is_not_the_reason(tmp_path, monkeypatch):
    """Also where both come in one second, and the other has a higher rank."""
    monkeypatch.setattr(launch.time, "time", lambda: 1e9)
    failures = {}
    for rank, reason in enumerate(["[pair.cc:553] Connection closed by peer [127.0.0.1]:51350", "power cut"]):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        tell_launcher(reason)
        failures[rank] = ProcessFailure(rank, pid=1, exitcode=1, error_file=str(tmp_path / f"{rank}.json"))
    assert ChildFailedError("train", failures).get_first_failure()[0] == 1


def test_without_torchrun_nobody_is_told(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    tell_launcher("nothing")


def test_a_process_that_the_user_started_outlives_its_shell(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda *_: pytest.fail("no signal was asked for"))
    launch.end_with_launcher()


# -- --devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many GPUs, and what is started there in the place of processes."""

    def make(gpus, **environ):
        monkeypatch.setattr(os, "environ", environ)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(launch, "_run_agent", lambda verb, argv, size, told: size)

    return make


@pytest.mark.parametrize(
    ("gpus", "devices", "started"),
    [(0, 2, 2), (0, "auto", None), (0, 1, None), (4, "auto", 4), (4, 3, 3), (4, 1, None), (1, "auto", None)],
)
def test_a_process_for_each_gpu_or_as_many_as_are_asked_for(machine, caplog, gpus, devices, started):
    machine(gpus)
    assert start_processes("train", ["train", "m"], devices) == started
    assert caplog.text == ""


@pytest.mark.parametrize(("gpus", "said"), [(0, []), (1, []), (8, ["8 GPUs are here and one is used"])])
def test_idle_gpus_are_told_of_once(machine, monkeypatch, caplog, gpus, said):
    machine(gpus)
    with caplog.at_level(logging.INFO, "flipproof"):
        monkeypatch.setattr(launch, "_could_start", False)
        for _ in range(2):  # as a program that calls train
            with join_world(ParallelismConfig()):
                assert caplog.messages == []
        assert start_processes("train", ["train", "m"], None) is None
        for _ in range(2):
            with join_world(ParallelismConfig()):
                pass
    assert [message.partition(";")[0] for message in caplog.messages] == said


def test_more_processes_than_gpus_are_refused(machine):
    machine(4)
    with pytest.raises(ConfigError, match=r"^--devices 5: at most 4 is allowed here, one for each GPU$"):
        start_processes("train", ["train", "m"], 5)


@pytest.mark.parametrize("devices", [None, "auto", 2, 3])
def test_what_was_started_by_others_is_not_started_again(machine, devices):
    machine(8, WORLD_SIZE="6", LOCAL_WORLD_SIZE="2")
    if devices == 3:
        with pytest.raises(ConfigError, match=r"^--devices 3: torchrun or srun has started 2 processes here"):
            start_processes("train", ["train", "m"], devices)
    else:
        assert start_processes("train", ["train", "m"], devices) is None


PROGRAM = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

names = "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE", "MASTER_ADDR"
here, rank = Path({home!r}), int(os.environ["RANK"])
(here / f"{{rank}}.json").write_text(json.dumps([sys.argv[1:], [os.environ[name] for name in names]]))

def end(message, at, code):
    told = {{"message": message, "timestamp": at, "exit_code": code}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(told))
    os._exit(code)

def save_at(number):
    signal.signal(number, lambda *_: end("saved", 1, 75))

def both_are_here():
    (here / f"ready {{rank}}").touch()
    while not all((here / f"ready {{other}}").exists() for other in (0, 1)):
        time.sleep(0.01)

def stop_all(number):
    both_are_here()
    os.kill(os.getppid(), number)
    time.sleep(600)

{job}
"""
FAIL, ENDED = "flipproof train: error: the disk is full", "flipproof train: error: process 1 ended with"


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "code", "last"),
    [
        ("both_are_here()", "both_are_here()", 0, []),
        # the first of two reasons counts, and a process that waits is not waited for
        (f"both_are_here(); end({FAIL!r}, 1, 2)", "both_are_here(); end('closed by peer', 2, 1)", 2, [FAIL]),
        ("stop_all(0)", "both_are_here(); sys.exit(3)", 3, [f"{ENDED} exit code 3, and so did all"]),
        ("stop_all(0)", "both_are_here(); os.kill(os.getpid(), 9)", 1, [f"{ENDED} SIGKILL, and so did all"]),
        # saved, after a signal of their own or after one to the process that the user sees
        ("both_are_here(); end('saved', 1, 75)", "both_are_here(); end('saved', 1, 75)", 75, []),
        ("save_at(15); stop_all(15)", "save_at(15); both_are_here(); time.sleep(600)", 75, []),
        ("save_at(2); stop_all(2)", "save_at(2); both_are_here(); time.sleep(600)", 75, []),
        # in the middle of what cannot be saved
        ("stop_all(15)", "save_at(15); both_are_here(); time.sleep(600)", 143, ["flipproof train: ended by SIGTERM"]),
    ],
)
def test_started_processes_end_as_one(tmp_path, rank_0, rank_1, code, last):
    """Real ones, by torchrun's own agent; each leaves its arguments and names, and then does as told."""
    program, said = tmp_path / "program", tmp_path / "said"
    job = f"if rank == 0:\n    {rank_0}\nelse:\n    {rank_1}\n"
    program.write_text(PROGRAM.format(python=sys.executable, home=str(tmp_path), job=job))
    program.chmod(0o755)
    process = preloaded.start(by_devices.main, program, ["train", "m", "--devices", "2"], 2, said=said)
    process.join(120)
    assert process.exitcode == code, said.read_text()
    assert said.read_text().splitlines() == last
    for rank in (0, 1):
        argv, names = json.loads((tmp_path / f"{rank}.json").read_text())
        assert argv == ["-u", "-P", "-m", "flipproof", "train", "m", "--devices", "2"]
        assert names == [str(rank), "2", str(rank), "2", "localhost"]
