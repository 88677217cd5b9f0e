"""The tensors of a compressed-tensors checkpoint (llm-compressor's, vLLM's), by the names that they have in a layer.

| format | tensors |
|---|---|
| int8, int4 | weight_packed int32, in words along a row; weight_scale; weight_shape int64 (2,) |
| int4-asym | the same; weight_zero_point int32, in words along the out-features of a group |
| fp8 | weight float8_e4m3fn; weight_scale (out, 1) |
| mxfp8 | weight float8_e4m3fn; weight_scale uint8, E8M0 |
| mxfp4 | weight_packed uint8, two codes a byte, the first in the low half; weight_scale uint8, E8M0 |
| nvfp4 | the same, weight_scale float8_e4m3fn; weight_global_scale float32 (1,) |

Where inputs are quantised, too, int8 and int4 have a plain layout: weight int8 in two's complement, of int4 from −8 to
7, and weight_scale. Nothing else of a layer is looked at: scales of inputs, which some checkpoints have, are the
caller's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.formats.fields import check_shape, from_bytes, from_words, part, to_bytes, to_words
from flipproof.formats.operands import FLOATS
from flipproof.formats.spec import Format
from flipproof.formats.stored import Stored

_E4M3 = torch.float8_e4m3fn


def pack_compressed(stored: Stored, plain: bool = False) -> dict[str, Tensor]:
    """The tensors of a layer.

    Args:
        plain: integers in the plain layout.

    Raises:
        ConfigError: for what compressed-tensors has no layout for: e5m2, groups that ``g_idx`` says, a zero point of
            16, which GPTQ's first version can have.
    """
    format, operands = stored.format, stored.operands
    if format.code == "e5m2":
        raise ConfigError([f"{format.name} has no layout in compressed-tensors: its float of 8 bits is e4m3"])
    if stored.g_idx is not None:
        raise ConfigError(
            ["a layer with g_idx (desc_act) has no layout in compressed-tensors, where groups are in order"]
        )
    code, scale = operands["code"], operands["scale"]
    match format.code:
        case "int":
            if plain:
                return {"weight": (code - 2 ** (format.bits - 1)).view(torch.int8), "weight_scale": scale}
            shape = torch.tensor(stored.shape, dtype=torch.int64)
            found = {"weight_packed": to_words(code, format.bits), "weight_scale": scale, "weight_shape": shape}
            return found | ({"weight_zero_point": _packed_zeros(stored)} if format.zero else {})
        case "e4m3":
            return {"weight": code.view(_E4M3), "weight_scale": scale}
    packed = to_bytes(code, format.bits)
    if format.scale != "e4m3":
        return {"weight_packed": packed, "weight_scale": scale}
    return {"weight_packed": packed, "weight_scale": scale.view(_E4M3), "weight_global_scale": operands["global"]}


def _packed_zeros(stored: Stored) -> Tensor:
    zero = stored.operands["zero"] + stored.format.zero_plus
    if int(zero.max()) >= 2**stored.format.bits:
        raise ConfigError([f"a zero point is {int(zero.max())}: compressed-tensors holds up to 15"])
    return to_words(zero.T.contiguous(), stored.format.bits).T.contiguous()


def unpack_compressed(tensors: Mapping[str, Tensor], format: Format) -> Stored:
    """A layer's weight. Its dtype is that of its scales where they are floats of the weight's own dtype, and else
    bfloat16, which compressed-tensors makes of them.

    Raises:
        ConfigError: for a tensor that is missing, or of another dtype or shape than the format needs.
    """
    match format.code:
        case "int":
            return _integers(tensors, format)
        case "e4m3":
            code = part(tensors, "weight", _E4M3, 2).view(torch.uint8)
        case "e2m1":
            code = from_bytes(part(tensors, "weight_packed", torch.uint8, 2), format.bits)
        case _:
            raise ConfigError([f"{format.name} has no layout in compressed-tensors"])
    if format.scale == "e8m0":
        return Stored(format, {"code": code, "scale": part(tensors, "weight_scale", torch.uint8, 2)}, torch.bfloat16)
    if format.scale == "float":
        scale = part(tensors, "weight_scale", FLOATS, 2)
        return Stored(format, {"code": code, "scale": scale}, scale.dtype)
    scale = part(tensors, "weight_scale", _E4M3, 2).view(torch.uint8)
    whole = part(tensors, "weight_global_scale", torch.float32, 1)
    return Stored(format, {"code": code, "scale": scale, "global": whole}, torch.bfloat16)


def _integers(tensors: Mapping[str, Tensor], format: Format) -> Stored:
    scale = part(tensors, "weight_scale", FLOATS, 2)
    if not format.zero and "weight" in tensors:
        half = 2 ** (format.bits - 1)
        weight = part(tensors, "weight", torch.int8, 2)
        if format.bits < 8 and bool(((weight < -half) | (weight >= half)).any()):
            raise ConfigError([f"weight holds numbers beyond −{half} to {half - 1}, those of {format.name}"])
        code = weight.view(torch.uint8) + half
    else:
        words = part(tensors, "weight_packed", torch.int32, 2)
        rows, columns = _shape(part(tensors, "weight_shape", torch.int64, 1))
        said = f"weight_shape says ({rows}, {columns})"
        check_shape("weight_packed", words, (rows, -(-columns * format.bits // 32)), said)
        code = from_words(words, format.bits)[:, :columns].contiguous()
    operands = {"code": code, "scale": scale}
    if format.zero:
        words = part(tensors, "weight_zero_point", torch.int32, 2)
        needed = -(-len(code) * format.bits // 32), scale.shape[1]
        check_shape("weight_zero_point", words, needed, f"weight_scale is of shape {tuple(scale.shape)}")
        operands["zero"] = from_words(words.T, format.bits)[:, : len(code)].T.contiguous()
    return Stored(format, operands, scale.dtype)


def _shape(tensor: Tensor) -> tuple[int, int]:
    sizes = tensor.tolist()
    if len(sizes) != 2 or min(sizes) < 1:
        raise ConfigError([f"weight_shape is {sizes}: the sizes (out, in) are needed"])
    return sizes[0], sizes[1]
