"""What random hardware bit flips do to language models, and how to train models that survive them."""

from flipproof.faults.inject import (
    Coverage,
    faults,
    faulty_layers,
    inject,
    merge,
    remove,
    set_faults,
    set_seed,
    set_tick,
)
from flipproof.faults.linear import FaultyLinear
from flipproof.faults.op import flip, flip_
from flipproof.faults.spec import BitFlipSpec, Fault, LoraSpec, Pattern

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
