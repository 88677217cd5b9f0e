"""Training on several processes that ends on its way and goes on, and what torchrun tells of it."""

import os
import re
import shutil
import signal
import time

import preloaded
import pytest
from sharded_runs import (
    arguments,
    assert_bitwise_the_same_run,
    exit_codes,
    finish,
    make_home,
    run_jobs,
    start,
    start_alone,
    start_job,
    stderr,
    stopped_after,
)

from flipproof.cli.main import main
from flipproof.train.checkpoint import checkpoint_problems, list_checkpoints

# -- the runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("sharded"))


KILLS = {"rank_1_dies_while_it_writes_step_4": [1, -9], "rank_0_dies_before_step_4_gets_its_name": [-9, 1]}
HANGS = "rank_1_hangs_in_step_5"
INTERRUPTED = [  # run, its checkpoints
    ("ended/killed", ["step-2", "step-4"]),
    ("ended/agent", ["step-2", "step-4"]),
    *((f"pair/{name}", ["step-2"]) for name in KILLS),
    ("pair/rank_1_gets_sigterm_in_step_3", ["step-2", "step-3"]),
    ("ended/told", ["step-2", "step-3"]),
]


def short(home, run, *flags):
    """A training in two processes, of a model of one layer, that measures little: only steps and files matter here."""
    little = ("--model.hf_model_path", f"{home}/shallow", "--eval.trials", "1", "--eval.num_samples", "2")
    return arguments(home, run, 2, *little, *flags)


@pytest.fixture(scope="module")
def pair(home):
    """Runs on two processes: one undisturbed, and some that are interrupted."""
    patched = (*KILLS, "rank_1_gets_sigterm_in_step_3")
    jobs = {name: short(home, f"pair/{name}") for name in ("full_shard", *patched)}
    codes = KILLS | {"rank_1_gets_sigterm_in_step_3": [75, 75]}
    run_jobs(home / "pair.jobs", 2, jobs, {name: name for name in patched}, codes)
    return home / "pair"


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not (path.exists() and (text := path.read_text())):
        assert process.poll() is None, f"ended early: {finish(process)}"
        assert time.monotonic() < deadline, f"{path} did not come: {finish(process, 1)}"
        time.sleep(0.05)
    return text


@pytest.fixture(scope="module")
def ended(home):
    """torchrun's (exit code, stderr) of runs that it sees end: one rank is killed, or it gets SIGTERM itself."""
    killed = start_job(home / "killed.jobs", short(home, "ended/killed"), HANGS)
    rank_1 = wait_for(home / "killed.jobs/reached", killed)
    wait_for(home / "ended/killed/checkpoints/step-4/manifest.json", killed)
    os.kill(int(rank_1), signal.SIGKILL)
    codes = {"killed": finish(killed)[::2]}
    orphaned = start_job(home / "agent.jobs", short(home, "ended/agent"), HANGS)
    wait_for(home / "agent.jobs/reached", orphaned)
    wait_for(home / "ended/agent/checkpoints/step-4/manifest.json", orphaned)
    orphaned.kill()
    finish(orphaned, 30)  # its ranks have the other ends of its pipes: this is when all of them have ended
    told = start_job(home / "told.jobs", short(home, "ended/told"), "step_3_waits_for_sigterm")
    rank_0 = int(wait_for(home / "told.jobs/reached", told))
    # so it is the same whether torchrun or its process group gets the signal
    assert os.getpgid(rank_0) != os.getpgid(told.pid) == told.pid
    os.killpg(told.pid, signal.SIGTERM)
    codes["told"] = finish(told)[::2]
    return codes


@pytest.fixture(scope="module")
def resumed(home, pair, ended):
    """Runs of two processes that go on from checkpoints of all kinds; (checkpoints, their problems) before, by run."""
    left = {}
    for run, _ in INTERRUPTED:
        found = list_checkpoints(home / run / "checkpoints")
        left[run] = [path.name for path in found], [checkpoint_problems(path) for path in found]
    for name in ("damaged", "missing"):
        shutil.copytree(pair / "full_shard", home / "resumed" / name)
    damaged = home / "resumed" / "damaged" / "checkpoints" / "step-6" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (home / "resumed" / "missing" / "checkpoints" / "step-6" / "__0_0.distcp").unlink()
    jobs = {run.replace("/", "_"): short(home, run, "--resume", "auto") for run, _ in INTERRUPTED}
    jobs["damaged_refused"] = short(home, "resumed/damaged", "--resume", "step-6")
    jobs["missing_refused"] = short(home, "resumed/missing", "--resume", "step-6")
    jobs["damaged_auto"] = short(home, "resumed/damaged", "--resume")
    codes = {"damaged_refused": [2, 2], "missing_refused": [2, 2]}
    run_jobs(home / "resumed.jobs", 2, jobs, codes=codes)
    return left


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "complete"), INTERRUPTED)
def test_an_interrupted_run_keeps_its_checkpoints_and_goes_on_to_the_same_bits(home, pair, resumed, run, complete):
    """Killed in mid-step and in mid-save, or stopped by SIGTERM."""
    found, problems = resumed[run]
    assert found == complete
    assert not any(problems)
    assert_bitwise_the_same_run(home / run, pair / "full_shard")


def test_sigterm_ends_the_ranks_with_the_code_for_queues(home, ended):
    """torchrun itself ends with 1, whatever its ranks end with. They are not in its process group: it tells them."""
    code, err = ended["told"]
    assert code == 1, err
    assert exit_codes(home / "told.jobs", "run") == [75, 75], err
    assert "stopped by SIGTERM after step 3; torchrun" in err


def test_a_killed_rank_ends_torchrun(ended):
    code, err = ended["killed"]
    assert code == 1, err
    assert "SIGKILL" in err


@pytest.mark.parametrize(
    ("name", "problem"), [("damaged", r"__1_0\.distcp is damaged"), ("missing", r"__0_0\.distcp is missing")]
)
def test_a_broken_checkpoint_is_refused_by_name_in_one_line(home, resumed, name, problem):
    """The exit code is 2, as ``resumed`` has checked."""
    said = stderr(home / "resumed.jobs", f"{name}_refused")
    errors = [line for line in said.splitlines() if "error" in line]
    assert len(errors) == 1, said
    assert re.fullmatch(rf"flipproof train: error: .*/step-6: {problem}.*; train --resume step-4 goes on .*", errors[0])


def test_the_checkpoint_before_a_damaged_one_goes_on(home, pair, resumed):
    said = stderr(home / "resumed.jobs", "damaged_auto")
    assert re.search(r"step-6: __1_0\.distcp is damaged .*; goes on from step-4", said), said
    assert_bitwise_the_same_run(home / "resumed/damaged", pair / "full_shard")
    found = list_checkpoints(home / "resumed/damaged/checkpoints")
    assert [path.name for path in found] == ["step-2", "step-4", "step-6"]
    assert not any(map(checkpoint_problems, found))


# -- the command line under torchrun -----------------------------------------------------------------------------------


def test_train_as_users_start_it(home, pair):
    """By torchrun, and without the driver that the runs above share."""
    stopped_after(2, pair / "full_shard", home / "cli")
    code, out, err = finish(start(2, "-m", "flipproof", *short(home, "cli", "--resume")))
    assert code == 0, err
    assert out == f"{home}/cli\n"
    assert_bitwise_the_same_run(home / "cli", pair / "full_shard")


def test_tasks_of_srun_are_one_run_in_one_directory(home, pair):
    """Two processes that know nothing but what SLURM calls them; another port than that of another test run."""
    names = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": str(os.getpid()), "CUDA_VISIBLE_DEVICES": ""}
    tasks = [
        preloaded.start(
            main,
            short(home, "srun"),
            environment=names | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            said=home / f"srun.{rank}.err",
        )
        for rank in (0, 1)
    ]
    for task in tasks:
        task.join(300)
    assert [task.exitcode for task in tasks] == [0, 0], (home / "srun.0.err").read_text()
    assert (home / "srun.1.err").read_text() == ""  # one of them speaks for both
    assert_bitwise_the_same_run(home / "srun", pair / "full_shard")


def test_devices_start_a_run_that_sigterm_stops_with_its_checkpoint(home):
    """It has more steps than time, and says how to go on."""
    argv = short(home, "devices", "--devices", "2")
    process = start_alone(*argv, "--steps", "100000", "--training.lr_scheduler", "constant")
    wait_for(home / "devices/metrics.jsonl", process)
    process.terminate()
    code, out, err = finish(process)
    assert code == 75, err
    assert out == ""
    (told,) = re.findall(r"stopped by SIGTERM after step (\d+); flipproof (train .*) goes on from there", err)
    assert [path.name for path in list_checkpoints(home / "devices/checkpoints")][-1] == f"step-{told[0]}"
    assert told[1] == f"train --config {home}/devices/config.toml --devices 2 --resume"


def test_devices_go_on_to_the_same_bits(home, pair):
    stopped_after(2, pair / "full_shard", home / "devices_2")
    code, out, err = finish(start_alone(*short(home, "devices_2", "--devices", "2", "--resume")))
    assert code == 0, err
    assert out == f"{home}/devices_2\n"
    assert_bitwise_the_same_run(home / "devices_2", pair / "full_shard")


def test_the_wrong_number_of_processes_is_told_before_anything_is_written(home):
    run = home / "70b"
    code, out, err = finish(start(2, "-m", "flipproof", "train", "--config", "70b", "--logging.run_dir", str(run)))
    assert code == 1  # torchrun's, whose summary tells that of the processes
    assert re.search(r"exitcode +: 2 ", err), err
    errors = [line for line in err.splitlines() if line.startswith("flipproof train: error: ")]
    assert len(errors) == 1, err
    assert "2 processes were started" in errors[0]
    assert "fsdp_degree x replicas = 4 x 1 = 4" in errors[0]
    assert "--parallelism.fsdp_degree 2" in errors[0]
    # torchrun's own words come after it, some hundred lines; the last of them are it again
    assert any(line.endswith(f": {errors[0]}") for line in err.strip().splitlines()[-3:]), err
    assert out == ""
    assert not run.exists()
