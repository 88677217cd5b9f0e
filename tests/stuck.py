"""A process that fails while NCCL, which is played here, waits for another: started by test_world.py."""

import threading

from meeting import meet_in

from flipproof import world as world_module
from flipproof.config import ParallelismConfig


def work(rank, directory):
    meet_in(directory / "store", rank, 2)
    world_module._LEAVES_S = 0.5
    world_module.dist.destroy_process_group = lambda: threading.Event().wait(300)
    with world_module.join_world(ParallelismConfig()):
        raise RuntimeError(f"the loss of {rank}")
