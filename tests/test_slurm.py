"""examples/slurm.sbatch as it is, under bash and torchrun, with Slurm's commands played by ``played_slurm.py``."""

import os
import shutil
import signal

import pytest
from played_slurm import Job
from sharded_runs import arguments, assert_bitwise_the_same_run, make_home, run_jobs

from flipproof.train.checkpoint import list_checkpoints

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash, which runs the script")

# -- the runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory whose name has a blank, and what is in it is passed to the script."""
    home = tmp_path_factory.mktemp("slurm") / "a home"
    home.mkdir()
    return make_home(home)


def flags(home, run):
    """The command line of a short training in two processes, without its verb.

    ``no_shard`` adds up in the same order whether the processes are of one node or of two.
    """
    little = ("--model.hf_model_path", f"{home}/shallow", "--eval.trials", "1", "--eval.num_samples", "2")
    return arguments(home, run, 2, *little, "--parallelism.sharding_strategy", "no_shard")[1:]


@pytest.fixture(scope="module")
def plain(home):
    """The run without the script."""
    run_jobs(home / "plain.jobs", 2, {"plain": ["train", *flags(home, "plain")]})
    return home / "plain"


def make_job(home, name, nodes):
    return Job(home / f"{name}.job", nodes, 2 // nodes, RUN_DIR=str(home / name))


def checkpoints(home, run):
    return [path.name for path in list_checkpoints(home / run / "checkpoints")]


# -- to the end --------------------------------------------------------------------------------------------------------


def test_a_job_that_ends_in_its_time_is_the_plain_run(home, plain):
    job = make_job(home, "undisturbed", nodes=1)
    assert job.wait(job.start(*flags(home, "not this one"))) == 0, job.log.read_text()
    assert job.asked() == []
    assert_bitwise_the_same_run(home / "undisturbed", plain)
    assert not (home / "not this one").exists()


def test_a_job_of_two_nodes_saves_at_its_limit_and_comes_back_to_the_same_bits(home, plain):
    job = make_job(home, "limited", nodes=2)
    script = job.start(*flags(home, "limited"), **job.patch("step_3_waits_for_sigterm"))
    job.wait_for(job.directory / "reached", script)
    script.send_signal(signal.SIGUSR1)
    assert job.wait(script) != 0
    assert job.asked() == [f"scancel --signal=TERM {job.number}", f"scontrol requeue {job.number}"], job.log.read_text()
    assert checkpoints(home, "limited") == ["step-2", "step-3"]
    assert "step 3 is saved; back into the queue" in job.log.read_text()
    assert job.wait(job.start(*flags(home, "limited"), SLURM_RESTART_COUNT="1")) == 0, job.log.read_text()
    assert len(job.asked()) == 2
    assert_bitwise_the_same_run(home / "limited", plain)


# -- not back into the queue -------------------------------------------------------------------------------------------


def test_a_cancelled_job_saves_and_leaves_the_queue_to_slurm(home):
    job = make_job(home, "cancelled", nodes=1)
    script = job.start(*flags(home, "cancelled"), **job.patch("step_3_waits_for_sigterm"))
    job.wait_for(job.directory / "reached", script)
    job.cancel(script)
    assert job.wait(script) != 0
    assert job.asked() == []
    assert checkpoints(home, "cancelled") == ["step-2", "step-3"], job.log.read_text()


def test_a_killed_process_ends_the_job_with_its_error(home):
    """Though the job has written a checkpoint."""
    job = make_job(home, "killed", nodes=2)
    script = job.start(*flags(home, "killed"), **job.patch("rank_1_hangs_in_step_5"))
    rank_1 = job.wait_for(job.directory / "reached", script)
    job.wait_for(home / "killed/checkpoints/step-4/manifest.json", script)
    os.kill(int(rank_1), signal.SIGKILL)
    assert job.wait(script) not in (0, None)
    assert job.asked() == []
    assert "SIGKILL" in job.log.read_text()


def test_a_wrong_config_ends_the_job_with_its_error(home):
    job = make_job(home, "wrong", nodes=1)
    assert job.wait(job.start(*flags(home, "wrong"), "--stpes", "7")) != 0
    assert job.asked() == []
    assert "flipproof train: error: " in job.log.read_text()
    assert not (home / "wrong").exists()


def test_a_job_whose_limit_comes_before_any_checkpoint_is_not_started_for_ever(home):
    job = make_job(home, "early", nodes=1)
    script = job.start(*flags(home, "early"))
    job.wait_for(job.directory / "tasks", script)
    script.send_signal(signal.SIGUSR1)
    assert job.wait(script) != 0
    assert job.asked() == [f"scancel --signal=TERM {job.number}"]
    assert "not requeued" in job.log.read_text()
