"""Losses and gradients of quantised models in several processes, and of the same rows in one."""

import os
from pathlib import Path

import torch
from meeting import meet_in

from flipproof.config import load_config
from flipproof.dtensor import local
from flipproof.faults.inject import fault_state, set_tick
from flipproof.models.build import build_model
from flipproof.models.load import byte_tokenizer
from flipproof.models.loss import next_token_loss
from flipproof.models.parallelize import Gradients
from flipproof.world import join_world

ROWS, SEQ_LEN, TICKS = 2, 32, 3


def work(rank, directory: Path, trees, ranks):
    """Leaves, for each named config, ``NAME.RANK.pt``: of each tick the loss, the gradients, their means over the
    processes and logits that no gradient is asked of. A process alone leaves those of each of ``ranks``, as the row of
    a batch would be theirs, without means. ``NAME.held.pt`` is how many rows of each tensor a process holds."""
    size = int(os.environ["WORLD_SIZE"])
    for name, tree in trees.items():
        if size > 1:
            meet_in(directory / f"{name}.store", rank, size)
        config = load_config([], tree)
        with join_world(config.parallelism) as world:
            model = build_model(config, byte_tokenizer(), world, config.lora).train()
            for seed, (key, parameter) in enumerate(model.named_parameters()):
                if "lora_B" in key:  # not zero, as in training
                    parameter.data.normal_(std=1e-2, generator=torch.Generator().manual_seed(seed))
            held = {**dict(model.named_buffers()), **dict(model.named_parameters())}
            sizes = {key: len(local(tensor)) for key, tensor in held.items() if tensor.dim()}
            torch.save(sizes, directory / f"{name}.held.pt")
            for whose in [rank] if size > 1 else ranks:
                fault_state(model).rank = whose
                torch.save(_seen(model, config, world, whose), directory / f"{name}.{whose}.pt")
    return 0


def _seen(model, config, world, whose):
    gradients = Gradients(model, config.parallelism, world)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seen = []
    for tick in range(TICKS):
        set_tick(model, tick)
        ids = torch.randint(0, 256, (ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(10 * tick + whose))
        with gradients.micro_batch(last=True):
            loss = next_token_loss(model, ids)
            loss.backward()
            own = [parameter.grad.clone() for parameter in trained]
        means = [parameter.grad.clone() for parameter in trained]
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            logits = model(ids).logits
        seen.append((loss.detach(), own, means, logits))
    return seen
