"""Runs ``flipproof`` command lines one after the other in several processes, under the variables that torchrun sets.

    python sharded_profile.py 4 jobs.json

What takes time is to import torch, so the processes are forked from one that has done so. jobs.json is a list of
{"argv", "port"}; the processes of a job meet at a port of its own. The exit code is that of the first job that fails.
"""

import json
import os
import sys
from pathlib import Path

import datasets  # noqa: F401 - before the fork, as the others
import transformers.models.llama.modeling_llama  # noqa: F401

import flipproof.cli
import flipproof.magnitudes


def run(rank, size, jobs):
    """The exit code of the first job that fails, or 0."""
    for job in jobs:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(job["port"])}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        if code := flipproof.cli.main(job["argv"]):
            return code
    return 0


def main():
    size, jobs = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            sys.exit(run(rank, size, jobs))
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255 for child in children))


if __name__ == "__main__":
    main()
