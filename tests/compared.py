"""``flipproof compare`` in several processes, with what it does looked at on its way: run by ``preloaded.run_ranks``.

Each rank leaves ``seen-RANK.json`` in the directory: for each row that was built, in order, what its steps received
through collectives, and how many models of rows before were still there when it was built.
"""

import gc
import json
import os
import sys
import weakref

import torch
import torch.distributed as dist
from meeting import meet_in

import flipproof.plan.compare as compare_module
from flipproof.cli.main import main
from flipproof.train.step import Training


def work(rank, directory, argv, short_of_memory=()):
    """The exit code of a command line. ``short_of_memory``: the strategies whose second step finds no memory."""
    torch.set_num_threads(1)
    meet_in(directory / "store", rank, int(os.environ["WORLD_SIZE"]))
    rows, models = [], []
    build_model, step = compare_module.build_model, Training.step

    def built(*args):
        gc.collect()
        rows.append({"models_before": sum(model() is not None for model in models), "gathered": [], "reduced": []})
        model = build_model(*args)
        models.append(weakref.ref(model))
        return model

    def stepped(training, number, lr):
        for kind in ("gathered", "reduced"):
            rows[-1][kind].append(0)
        result = step(training, number, lr)
        if number == 1 and training.config.parallelism.sharding_strategy in short_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return result

    def counted(kind, collective, received):
        def run(*args, **more):
            if rows and rows[-1][kind]:
                rows[-1][kind][-1] += received(*args, **more)
            return collective(*args, **more)

        return run

    def others(group):
        return 1 - 1 / dist.get_world_size(group)

    def gathered(output, input, group, **_):
        return output.nbytes * others(group)

    def shared(outputs, input, group=None, **_):
        return input.nbytes * (len(outputs) - 1)

    def scattered(output, input, group, **_):
        return input.nbytes * others(group)

    def summed(
        tensor, op=None, group=None, **_
    ):  # a reduce-scatter and a gather; the run itself sums numbers and flags
        return 2 * tensor.nbytes * others(group) if tensor.numel() > 1 and tensor.is_floating_point() else 0

    compare_module.build_model, Training.step = built, stepped
    dist.all_gather_single = counted("gathered", dist.all_gather_single, gathered)
    dist.all_gather = counted("gathered", dist.all_gather, shared)
    dist.reduce_scatter_single = counted("reduced", dist.reduce_scatter_single, scattered)
    dist.all_reduce = counted("reduced", dist.all_reduce, summed)
    sys.stdout.flush()
    os.dup2(os.open(directory / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 1)
    code = main(argv)
    (directory / f"seen-{rank}.json").write_text(json.dumps(rows))
    return code
