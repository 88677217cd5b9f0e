"""What random hardware bit flips do to language models, and how to train models that survive them."""

from flipproof.inject import Coverage, faults, faulty_layers, inject, merge, remove, set_faults, set_seed, set_tick
from flipproof.layers import FaultyLinear
from flipproof.ops.flip import flip, flip_
from flipproof.spec import BitFlipSpec, Fault, LoraSpec, Pattern

__version__ = "0.1.0"

__all__ = [
    "BitFlipSpec",
    "Coverage",
    "Fault",
    "FaultyLinear",
    "LoraSpec",
    "Pattern",
    "faults",
    "faulty_layers",
    "flip",
    "flip_",
    "inject",
    "merge",
    "remove",
    "set_faults",
    "set_seed",
    "set_tick",
]
