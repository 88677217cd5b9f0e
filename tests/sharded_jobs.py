"""Runs several ``flipproof`` command lines one after the other in the processes of one launch, which is either

    preloaded.run_ranks(2, sharded_jobs.work, Path("jobs.json"))

or, where it is torchrun that is looked at, ``torchrun --nproc_per_node=2 sharded_jobs.py jobs.json``. jobs.json is a
list of {"name", "argv", "patch"}. The processes of a job meet in a file of its own. What a job says is left beside
jobs.json as ``NAME.RANK.out`` and ``NAME.RANK.err``, its exit code in ``NAME.RANK.json``.

``patch`` names a function below that is called first, with rank and directory. Such a job, which may kill its
process, has one of its own, forked before the others begin; -9 is SIGKILL's exit code. Where there is a single job,
it is not forked, so that torchrun sees all of it.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from meeting import meet_in

import flipproof.cli.main
import flipproof.train.checkpoint as checkpoint_module
import flipproof.train.loop as train_module
import flipproof.train.step as step_module
from flipproof.data import shards as shards_module
from flipproof.data.stream import StreamedText
from flipproof.models import save


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def rank_1_hangs_in_step_5(rank, directory):
    """Leaves its process id in ``reached``; the others wait for it in step 5."""
    learning_rate = train_module.learning_rate

    def hang(training, step):
        if step == 4 and rank == 1:
            (directory / "reached").write_text(str(os.getpid()))
            time.sleep(600)
        return learning_rate(training, step)

    train_module.learning_rate = hang


def rank_1_dies_while_it_writes_step_4(rank, _directory):
    """And leaves half a file."""
    fingerprint = checkpoint_module._fingerprint

    def die_at_step_4(file):
        if rank == 1 and file.parent.name.startswith(".step-4."):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            die()
        return fingerprint(file)

    checkpoint_module._fingerprint = die_at_step_4


def rank_0_dies_before_step_4_gets_its_name(rank, _directory):
    rename = os.rename

    def die_at_step_4(source, target):
        if rank == 0 and Path(target).name == "step-4":
            die()
        rename(source, target)

    os.rename = die_at_step_4


def rank_1_has_a_loss_that_is_not_finite_in_step_3(rank, _directory):
    """The number alone, of the first of two micro-batches: gradients are what they are."""
    loss_of, calls = step_module.next_token_loss, []

    def spoiled(*args, **more):
        calls.append(rank)
        return loss_of(*args, **more) + (float("nan") if rank == 1 and len(calls) == 5 else 0.0)

    step_module.next_token_loss = spoiled


def rank_1_gets_sigterm_in_step_3(rank, _directory):
    learning_rate = train_module.learning_rate

    def ask_to_stop(training, step):
        if step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(training, step)

    train_module.learning_rate = ask_to_stop


def step_3_waits_for_sigterm(rank, directory):
    """Leaves ``reached`` when rank 0 waits; the step goes on when a process has noted the signal."""
    learning_rate, note = train_module.learning_rate, train_module._StopRequest._note

    def wait(training, step):
        if step == 2:
            if rank == 0:
                (directory / "reached").write_text(str(os.getpid()))
            while not (directory / "noted").exists():
                time.sleep(0.05)
        return learning_rate(training, step)

    def note_and_tell(self, *args):
        note(self, *args)
        (directory / "noted").touch()

    train_module.learning_rate, train_module._StopRequest._note = wait, note_and_tell


def text_stays_away_after(shards, patch=setattr):
    """What packs text shows signs of life, and makes no more than so many shards; after a minute all, at once."""
    sequences, calls, end = shards_module.Reader.sequences, [], time.monotonic() + 60

    def sequences_that_stay_away(reader, count):
        calls.append(count)
        while len(calls) > shards and time.monotonic() < end:
            reader._alive()
            time.sleep(0.01)
        yield from sequences(reader, count)

    patch(shards_module.Reader, "sequences", sequences_that_stay_away)


def rank_1_gets_sigterm_while_text_stays_away(rank, _directory):
    """There is text of shards of 7 for two steps of 8; rank 1 takes its last part half a second before."""
    text_stays_away_after(3)
    batch, calls = StreamedText.batch, []

    def taken(*arguments):
        calls.append(rank)
        if rank == 1 and len(calls) == 4:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return batch(*arguments)

    StreamedText.batch = taken


def streamed_ids_are_kept(_rank, directory):
    """As ``ids-FIRST-COUNT.npy``."""
    batch = StreamedText.batch

    def kept(text, seed, first, count):
        made = batch(text, seed, first, count)
        np.save(directory / f"ids-{first}-{count}.npy", made.ids.numpy())
        return made

    StreamedText.batch = kept


def run(job, rank, directory):
    """The exit code of one job."""
    meet_in(directory / f"{job['name']}.store", rank, int(os.environ["WORLD_SIZE"]))
    save._FILE_BYTES = 16 * 2**10  # of which even a tiny model needs several
    if job["patch"]:
        globals()[job["patch"]](rank, directory)
    if job["argv"][0] == "load":
        from sharded_load import load

        return load(*job["argv"][1:])
    return flipproof.cli.main.main(job["argv"])


def redirect(stem):
    """Send what this process says from now on to the files of a job."""
    sys.stdout.flush()
    sys.stderr.flush()
    for stream, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{stem}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)


def run_forked(job, rank, directory):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # see ``preloaded.py``: a pool of threads does not outlive a fork
        redirect(directory / f"{job['name']}.{rank}")
        sys.exit(run(job, rank, directory))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write_jobs(directory, argvs, patches=None):
    """One job per name in ``argvs``; a new directory. Returns their file."""
    jobs = [{"name": name, "argv": argv, "patch": (patches or {}).get(name)} for name, argv in argvs.items()]
    directory.mkdir()
    (directory / "jobs.json").write_text(json.dumps(jobs))
    return directory / "jobs.json"


def work(rank, file):
    """Carry out the jobs of ``file`` as one of the ranks. Returns the exit code of a single job, else 0."""
    directory, jobs = file.parent, json.loads(file.read_text())
    torch.set_num_threads(1)
    for job in sorted(jobs, key=lambda job: job["patch"] is None):
        start = time.perf_counter()
        if job["patch"] and len(jobs) > 1:
            code = run_forked(job, rank, directory)
        else:
            if len(jobs) > 1:
                redirect(directory / f"{job['name']}.{rank}")
            code = run(job, rank, directory)
        result = {"code": code, "seconds": round(time.perf_counter() - start, 1)}
        (directory / f"{job['name']}.{rank}.json").write_text(json.dumps(result))
    return code if len(jobs) == 1 else 0


if __name__ == "__main__":
    sys.exit(work(int(os.environ["RANK"]), Path(sys.argv[1])))
