"""The tensors of GPTQ and AWQ checkpoints of 4 bits, by the names that they have in a layer.

| | GPTQ | AWQ (gemm) |
|---|---|---|
| qweight int32 | (in / 8, out), words along the in-features | (in, out / 8), words along the out-features |
| qzeros int32 | (groups, out / 8), words along the out-features | the same |
| scales float16 | (groups, out) | the same |
| g_idx int32 | (in,), the group of each in-feature | |

AWQ has output 8 c + j in field 0, 4, 1, 5, 2, 6, 3, 7 of word c, for j from 0. GPTQ's first version stores zero points
less 1, and one that is stored as 15, which a flip makes of the usual 7, is 16, as AutoGPTQ has it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flipproof.errors import ConfigError
from flipproof.formats.fields import check_shape, from_words, part
from flipproof.formats.operands import FLOATS
from flipproof.formats.spec import Format
from flipproof.formats.stored import Stored

_AWQ_FIELDS = [0, 4, 1, 5, 2, 6, 3, 7]
_BITS = 4


def unpack_gptq(tensors: Mapping[str, Tensor], format: Format) -> Stored:
    """A layer's weight, of the dtype of its scales. Where ``g_idx`` says nothing but what the places of the in-features
    say, as without ``desc_act``, the stored weight has none.

    Args:
        tensors: qweight, qzeros, scales, and g_idx where there is one.
        format: int4-asym of the checkpoint's group size; its ``zero_plus`` is 1 for the first version, else 0.

    Raises:
        ConfigError: for a tensor that is missing, or of another dtype or shape than the format needs; for a group that
            there is not.
    """
    words = part(tensors, "qweight", torch.int32, 2)
    scales = part(tensors, "scales", FLOATS, 2)
    inputs, groups = len(words) * (32 // _BITS), len(scales)
    zeros = _zero_words(tensors, words.shape[1], groups)
    operands = {
        "code": from_words(words.T, _BITS),
        "scale": scales.T.contiguous(),
        "zero": from_words(zeros, _BITS)[:, : words.shape[1]].T.contiguous(),
    }
    g_idx = None
    if "g_idx" in tensors:
        g_idx = part(tensors, "g_idx", torch.int32, 1)
        check_shape("g_idx", g_idx, (inputs,), f"qweight is of shape {tuple(words.shape)}")
        places = torch.arange(inputs, dtype=torch.int32, device=g_idx.device)
        if torch.equal(g_idx, places // (format.group or inputs)):
            g_idx = None
        elif (low := int(g_idx.min())) < 0 or int(g_idx.max()) >= groups:
            raise ConfigError([f"g_idx goes from {low} to {int(g_idx.max())}: there are {groups} groups, from 0"])
    return Stored(format, operands, scales.dtype, g_idx)


def unpack_awq(tensors: Mapping[str, Tensor], format: Format) -> Stored:
    """A layer's weight, of the dtype of its scales.

    Args:
        tensors: qweight, qzeros, scales.
        format: int4-asym of the checkpoint's group size.

    Raises:
        ConfigError: for a tensor that is missing, or of another dtype or shape than the format needs.
    """
    words = part(tensors, "qweight", torch.int32, 2)
    scales = part(tensors, "scales", FLOATS, 2)
    zeros = _zero_words(tensors, scales.shape[1], len(scales))
    operands = {
        "code": _in_order(words).T.contiguous(),
        "scale": scales.T.contiguous(),
        "zero": _in_order(zeros).T.contiguous(),
    }
    return Stored(format, operands, scales.dtype)


def _zero_words(tensors: Mapping[str, Tensor], outputs: int, groups: int) -> Tensor:
    zeros = part(tensors, "qzeros", torch.int32, 2)
    needed = groups, -(-outputs * _BITS // 32)
    check_shape("qzeros", zeros, needed, f"there are {groups} groups and {outputs} out-features")
    return zeros


def _in_order(words: Tensor) -> Tensor:
    return from_words(words, _BITS).unflatten(1, (-1, 8))[..., _AWQ_FIELDS].flatten(1)
