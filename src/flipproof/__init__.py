"""What random hardware bit flips do to language models, and how to train models that survive them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flipproof.faults.fault import Fault, Pattern
from flipproof.faults.spec import BitFlipSpec, LoraSpec

if TYPE_CHECKING:  # what needs torch is imported when it is asked for: the command line answers long before
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

# Importing the subpackage ``faults``, which happens once and has happened above, made it an attribute of this package,
# where the function ``faults`` belongs.
del globals()["faults"]

_HOMES = {"FaultyLinear": "linear", "flip": "op", "flip_": "op"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"flipproof.faults.{_HOMES.get(name, 'inject')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
