"""Configs of models that are too large to be made, and their shapes, each worked out once."""

from functools import cache

from flipproof.config import load_config
from flipproof.plan.memory import Spread
from flipproof.plan.shape import shape_of

FAULTS = {key: value for o in "wx" for key, value in ((f"{o}_p_exp", 2**-16), (f"{o}_p_frac", 2**-16))}
FAULTS |= {"w_zero_out_t": 256.0, "x_zero_out_t": 8192.0}


def config_of(flavor, rows, lora=True, faults=True, seq_len=2048, strategy="full_shard", **training):
    dtypes = {"dtype": "bfloat16"} if lora else {"dtype": "float32", "mixed_precision_param": "bfloat16"}
    return load_config(
        [],
        {
            "model": {"flavor": flavor, "init": "random", "tokenizer": "bytes"},
            "training": {"seq_len": seq_len, "local_batch_size": rows, **dtypes, **training},
            "lora": {"r": 32 if lora else 0, "lora_alpha": 32},
            "bitflip": FAULTS if faults else {},
            "parallelism": {"sharding_strategy": strategy},
        },
    )


SHARDED = [  # 8B, 2 rows, faults, everything kept: strategy, how it lies on H200s, GiB of each, tokens a second of all
    ("no_shard", Spread(1, 4), 33.9, 57_120),
    ("full_shard", Spread(4, 1), 24.3, 53_964),
    ("full_shard", Spread(2, 1), 28.4, 27_270),
    # by FSDP2: the one as it is, the others where GPUs do not share a node
    ("shard_grad_op", Spread(4, 1), 38.2, 52_024),
    ("hybrid_shard", Spread(2, 2, node=1), 27.9, 48_062),
    ("full_shard", Spread(4, 1, node=1), 23.9, 47_723),
    ("full_shard", Spread(2, 1, node=1), 27.9, 23_884),
]
"""As benchmarks/README.md has them; no term of memory.py was chosen by their memory. (FSDP2: on one node.)"""


@cache
def shape(flavor, lora=True, faults=True):
    """Of sequences of 2048."""
    return shape_of(config_of(flavor, 1, lora, faults))
