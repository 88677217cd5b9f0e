"""Guards that nobody had to fit."""

import torch
from torch import nn

from flipproof.faults.fitted import Guards
from flipproof.formats.linear import QuantisedLinear


def guards_of(model, dtype="float32", by="channel"):
    """Of weights what they are, of all else 30."""
    formats = {module.format.name for module in model.modules() if isinstance(module, QuantisedLinear)}
    maxima = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            maxima[f"{name}/w"] = module.weight.detach().abs().amax(1, keepdim=True).float()
        if isinstance(module, nn.Linear):
            maxima[f"{name}/x"] = torch.full((module.in_features,), 30.0)
        if isinstance(module, QuantisedLinear):
            maxima[f"{name}/w_scale"] = scales_of(module.stored()).abs().max().float()
        if name.endswith("self_attn"):
            maxima |= {f"{name}/{operand}": torch.full((1, module.head_dim), 30.0) for operand in "kv"}
    return Guards(maxima, "channel", "the-model", dtype, format=next(iter(formats), None)).coarser(by)


def scales_of(stored):
    """The numbers that the scales of a quantised weight stand for."""
    operands = stored.operands
    scale = operands["scale"]
    if stored.format.scale == "e8m0":
        return torch.tensor([2.0 ** (exponent - 127) for exponent in scale.flatten().tolist()])
    if stored.format.scale == "e4m3":
        return scale.view(torch.float8_e4m3fn).float() / operands["global"]
    if stored.format.scale == "nested":
        differences = torch.stack([operands["map"][place] for place in scale.tolist()])
        return differences * operands["nested"].repeat_interleave(256)[: len(scale)] + operands["offset"]
    return scale
