"""Weights that tell formats apart, and what compressed-tensors makes of them."""

from dataclasses import replace

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from flipproof.formats.spec import FORMATS

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
COMPRESSED = [name for name in FORMATS if name not in ("nf4", "fp8-e5m2")]
PLAIN_NF4 = replace(FORMATS["nf4"], scale="float32")

_ARGS = {
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
    "int4-asym": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    },
}


def scheme(name, group=None):
    """compressed-tensors' own description of a format; ``group`` -1 is a whole row."""
    args = _ARGS[name]
    if group is not None:
        args = args | ({"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group})
        args = {key: value for key, value in args.items() if key != "group_size" or group != -1}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def compressor(scheme):
    return BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)


def compressed(weight, name, group=None):
    """The tensors of a layer, by compressed-tensors, with the scales of plain minima and maxima."""
    by = scheme(name, group)
    args = by.weights
    size = args.group_size if args.strategy in ("group", "tensor_group") else weight.shape[1]
    groups = weight.unflatten(1, (-1, size))
    whole = {}
    if name == "nvfp4":
        whole["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, whole.get("weight_global_scale"))
    given = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero} | whole
    return compressor(by).compress(given, by)


def decompressed(tensors, name, group=None):
    by = scheme(name, group)
    return compressor(by).decompress(dict(tensors), by)["weight"]


def sample(shape, dtype, kind="normal", seed=0):
    """Weights of which some groups are 0, some begin with −0, one has an outlier; or ties, tiny, of one sign."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=g) * 0.05
    if kind == "ties":  # quarters over scales of 1: 127.5, 7.5, 448 and 6 are in every group
        largest = torch.tensor([127.5, 7.5, 256.0, 6.0, 4.0])[torch.arange(shape[0]) % 5, None]
        weight = (torch.randint(-1800, 1801, shape, generator=g) / 4).clamp(-largest, largest)
        weight[:, ::16] = largest
    if kind == "positive":
        weight = weight.abs() + 0.01
    if kind == "tiny":
        weight = weight * 2e-5
    weight[0, : min(40, shape[1])] = 0
    weight[-1] = 0
    weight[-1, :3] = -0.0
    if kind == "normal":
        weight.view(-1)[77 % weight.numel()] = 3.0
    return weight.to(dtype)


def same(x, y):
    """Of one dtype and shape, and the same bits, but for NaN, which equals NaN."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.dtype.itemsize == 1:
        return torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    if not x.is_floating_point():
        return torch.equal(x, y)
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(
        x.nan_to_num(0).view(_INTEGERS[x.dtype.itemsize]), y.nan_to_num(0).view(_INTEGERS[x.dtype.itemsize])
    )


_INTEGERS = {2: torch.int16, 4: torch.int32}
