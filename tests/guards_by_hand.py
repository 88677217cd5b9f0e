"""Guards that nobody had to fit."""

import torch
from torch import nn

from flipproof.faults.fitted import Guards


def guards_of(model, dtype="float32", by="channel"):
    """Of weights what they are, of all else 30."""
    maxima = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            maxima[f"{name}/w"] = module.weight.detach().abs().amax(1, keepdim=True).float()
        if isinstance(module, nn.Linear):
            maxima[f"{name}/x"] = torch.full((module.in_features,), 30.0)
        if name.endswith("self_attn"):
            maxima |= {f"{name}/{operand}": torch.full((1, module.head_dim), 30.0) for operand in "kv"}
    return Guards(maxima, "channel", "the-model", dtype).coarser(by)
