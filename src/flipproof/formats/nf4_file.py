"""The tensors of a 4-bit bitsandbytes checkpoint as ``transformers`` saves it, by the names that they have in a layer.

| tensor | |
|---|---|
| weight | uint8 (ceil(out · in / 2), 1), two codes a byte, **the first in the high half**; or these bytes as floats |
| weight.absmax | the scales, uint8 (blocks,); float32 where they are not quantised once more |
| weight.quant_map | the 16 numbers of nf4, float32 (16,) |
| weight.nested_absmax, weight.nested_quant_map | ``nested`` and ``map``, float32 |
| weight.quant_state.bitsandbytes__nf4 | JSON as bytes: shape, dtype, block sizes, and ``offset`` |

Kernels have the 16 numbers as constants, so they are no operand; those of ``map`` are read from memory.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.formats.codes import NF4
from flipproof.formats.fields import check_shape, from_bytes, part, to_bytes
from flipproof.formats.operands import FLOATS, NESTED_GROUP
from flipproof.formats.spec import Format
from flipproof.formats.stored import Stored

_STATE = "weight.quant_state.bitsandbytes__nf4"
_PAD = NF4.index(0)
"""The code behind the last of an odd number."""
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def pack_nf4(stored: Stored) -> dict[str, Tensor]:
    """The tensors of a layer."""
    operands = stored.operands
    flat = operands["code"].reshape(1, -1)
    pairs = torch.nn.functional.pad(flat, (0, flat.numel() % 2), value=_PAD).view(-1, 2).flip(1)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": stored.format.group,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    found = {
        "weight": to_bytes(pairs, 4),
        "weight.absmax": operands["scale"],
        "weight.quant_map": torch.tensor(NF4, device=flat.device),
    }
    if stored.format.scale == "nested":
        found |= {"weight.nested_absmax": operands["nested"], "weight.nested_quant_map": operands["map"]}
        offset = operands["offset"].item()
        state |= {"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": offset}
    return found | {_STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}


def unpack_nf4(tensors: Mapping[str, Tensor], format: Format) -> Stored:
    """A layer's weight.

    Raises:
        ConfigError: for a tensor that is missing, or of another dtype or shape than the format needs; for another type
            than nf4, blocks of another size, or another table of 16 numbers.
    """
    state = _state(tensors)
    rows, columns = state["shape"]
    count = rows * columns
    problems = []
    if state.get("blocksize") != format.group:
        problems.append(f"{_STATE} has blocks of {state.get('blocksize')}: {format.group} is needed")
    if not torch.equal(part(tensors, "weight.quant_map", torch.float32, 1).cpu(), torch.tensor(NF4)):
        problems.append("weight.quant_map is not the table of nf4")
    nested = format.scale == "nested"
    if nested and state.get("nested_blocksize") != NESTED_GROUP:
        problems.append(
            f"{_STATE} has nested blocks of {state.get('nested_blocksize')}: {NESTED_GROUP} is needed for scales that "
            "are quantised once more"
        )
    if problems:
        raise ConfigError(problems)
    if "weight" not in tensors:
        raise ConfigError([f"weight is missing; there are {', '.join(sorted(tensors))}"])
    packed = tensors["weight"].reshape(-1).contiguous().view(torch.uint8)[None]
    check_shape("weight, in bytes,", packed[0], (math.ceil(count / 2),), f"its shape is ({rows}, {columns})")
    code = from_bytes(packed, 4).view(-1, 2).flip(1).reshape(-1)[:count].view(rows, columns)
    operands = {"code": code, "scale": part(tensors, "weight.absmax", torch.uint8 if nested else torch.float32, 1)}
    if nested:
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=code.device)
        operands |= {
            "nested": part(tensors, "weight.nested_absmax", torch.float32, 1),
            "offset": offset,
            "map": part(tensors, "weight.nested_quant_map", torch.float32, 1),
        }
    return Stored(format, operands, _DTYPES[state["dtype"]])


def _state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the JSON says, with shape, dtype and the offset, where there is one, known to be some."""
    data = bytes(part(tensors, _STATE, torch.uint8, 1).tolist())
    try:
        state = json.loads(data)
        good = (
            state["quant_type"] == "nf4"
            and state["dtype"] in _DTYPES
            and len(state["shape"]) == 2
            and all(type(size) is int and size > 0 for size in state["shape"])
            and isinstance(state.get("nested_offset", 0.0), (int, float))
            and ("nested_blocksize" in state) == ("nested_offset" in state)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        shown = data[:200].decode(errors="replace")
        raise ConfigError([f"{_STATE} is not what is needed of an nf4 weight (out, in), its dtype and offset: {shown}"])
    return state
