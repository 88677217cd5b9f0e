"""Fake environments of SLURM, as its manual describes them (srun, OUTPUT ENVIRONMENT VARIABLES)."""

import json
import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flipproof import launch
from flipproof.config import ParallelismConfig
from flipproof.errors import ConfigError
from flipproof.launch import check_joined, first_host, join_srun, tell_launcher
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
