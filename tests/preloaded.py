"""Processes that need not import torch: they are forked from one that has done so, once for all tests of a worker.

What takes time in a small run is to start Python and to import torch and transformers, some seconds of each process.
How a user's own process starts is what tests with ``subprocess`` are about.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "accelerate",
        "datasets",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "flipproof.cli.main",
        "flipproof.measure.profile",
        "flipproof.measure.evaluate",
        "flipproof.train.loop",
    ]
)


def start(function, *arguments, environment=None, said=None) -> BaseProcess:
    """A process that ends with what ``function`` returns. ``said`` is the file that its stderr goes to.

    ``function`` is one of a module that can be imported by name, so not of a file of tests.
    """
    process = _CONTEXT.Process(target=_run, args=(function, arguments, environment or {}, said))
    process.start()
    return process


def _run(function, arguments, environment, said):
    os.environ |= environment
    import torch

    # torch makes its pool of threads anew after a fork, and ends the process where two threads come to do so at once
    torch.set_num_threads(1)
    if said is not None:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    sys.exit(function(*arguments))


def run_ranks(size, function, *arguments) -> list[int]:
    """The exit codes of ``function(rank, *arguments)`` in ``size`` processes with the names that torchrun gives."""
    names = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    ranks = [
        start(function, rank, *arguments, environment=names | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    for process in ranks:
        process.join()
    return [process.exitcode for process in ranks]
