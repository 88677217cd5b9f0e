"""AdamW whose rows three processes share, beside one that has all: run by ``preloaded.run_ranks``.

Each rank leaves ``RANK.json`` in the directory: after which steps it had other bits than AdamW, and of how many values
it holds moments. ``steps`` gives what both had.
"""

import json

import torch
from meeting import meet_in
from torch import nn

from flipproof.config import CheckpointConfig, ParallelismConfig
from flipproof.train.checkpoint import Checkpointer, load_checkpoint
from flipproof.train.optimizer import ShardedAdamW
from flipproof.world import arrange, join_world

RANKS, SAVED, STEPS = 3, 3, 5
SHAPES = {"seven": (7, 5), "two": (2, 3), "vector": (4,), "nine": (9, 4)}  # of two rows the third process has none


def model_of(seed):
    model, generator = nn.Module(), torch.Generator().manual_seed(seed)
    for name, shape in SHAPES.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
    return model


def groups_of(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [{"params": matrices, "weight_decay": 0.3}, {"params": [model.vector], "weight_decay": 0.0}]


def steps(model, optimizer, first, last):
    """Take them; the second leaves out a parameter."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (step, name) == (1, "seven") else gradient
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        yield step


def same(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def progress():
    return {"sequences": torch.tensor(7)}


def work(rank, directory):
    meet_in(directory / "store", rank, RANKS)
    different = []
    with join_world(ParallelismConfig()) as world:
        world = arrange(world, ParallelismConfig())
        model, twin, fresh = model_of(0), model_of(0), model_of(1)
        optimizer, plain, other = (
            ShardedAdamW(groups_of(model), world.mesh["shard"], lr=0.1),
            torch.optim.AdamW(groups_of(twin), lr=0.1),
            ShardedAdamW(groups_of(fresh), world.mesh["shard"], lr=0.1),
        )
        saver = Checkpointer(directory, CheckpointConfig(), world)
        for step in steps(model, optimizer, 0, SAVED):
            list(steps(twin, plain, step, step + 1))
            different += [] if same(model, twin) else [step]
        moments = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
        saver.save(SAVED, model, optimizer, progress())
        saver.wait()
        load_checkpoint(directory / f"step-{SAVED}", fresh, other, progress())
        different += [] if same(model, fresh) else ["loaded"]
        for going_on, by in ((model, optimizer), (twin, plain), (fresh, other)):
            list(steps(going_on, by, SAVED, STEPS))
        different += [] if same(model, twin) and same(fresh, twin) else ["went on"]
        held = sum(moment.to_local().numel() for moment in moments)
        (directory / f"{rank}.json").write_text(json.dumps([different, held]))
    return 0
