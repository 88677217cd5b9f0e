"""Where processes that run one ``flipproof`` command after another meet: in a file of each command.

A port that was free when the commands were listed need not be free when its turn comes: gloo itself takes many.
"""

from functools import partial

import torch.distributed as dist

_INIT = dist.init_process_group


def meet_in(file, rank, size):
    """The next process group of this process is that of the ``size`` processes that name the same new file."""
    dist.init_process_group = partial(_INIT, store=dist.FileStore(str(file), size), rank=rank, world_size=size)
