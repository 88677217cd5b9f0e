"""Runs ``flipproof`` command lines one after the other in several processes.

    python sharded_profile.py 4 jobs.json

What takes time is to import torch, so the processes are forked from one that has done so. jobs.json is a list of the
command lines. The exit code is that of the first that fails.
"""

import json
import os
import sys
from pathlib import Path

import datasets  # noqa: F401 - before the fork, as the others
import transformers.models.llama.modeling_llama  # noqa: F401
from meeting import meet_in

import flipproof.cli.main
import flipproof.measure.profile


def run(rank, size, file):
    """The exit code of the first command line that fails, or 0."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    for number, argv in enumerate(json.loads(file.read_text())):
        meet_in(f"{file}.{number}.store", rank, size)
        if code := flipproof.cli.main.main(argv):
            return code
    return 0


def main():
    size, file = int(sys.argv[1]), Path(sys.argv[2])
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            sys.exit(run(rank, size, file))
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255 for child in children))


if __name__ == "__main__":
    main()
