"""Kernels that Triton has compiled, by what they were compiled for, and their launch."""

from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    programs: int,
    warps: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    **options: Any,
) -> None:
    """kernel[programs](*arguments, *constants), on the device of the first argument.

    Triton's own launch looks up the compiled kernel by everything it knows of the arguments, which takes 15 µs; here it
    is looked up by what compilation depends on.
    """
    device = arguments[0].device
    if INTERPRETED:
        kernel[(programs,)](*arguments, *constants)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, warps, arguments, constants, **options)
        return
    key = (kernel, device.index, warps, constants, *map(_specialization, arguments))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(programs,)](*arguments, *constants, num_warps=warps, **options)
    else:
        compiled[(programs, 1, 1)](*arguments, *constants)


def _specialization(argument: Tensor | float) -> Any:
    """What Triton compiles for: of a tensor the dtype and whether it is aligned; of a number its type, whether it is a
    multiple of 16 and whether it is 1."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, -(2**31) <= argument < 2**31
    return None
