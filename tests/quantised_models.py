"""Models whose linear layers are quantised."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flipproof.formats.config import quantization_config
from flipproof.formats.fields import to_words
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.pack import pack
from flipproof.formats.quantise import quantise
from flipproof.formats.spec import format_of

GROUPS = {"int8": None, "int4": 32, "int4-asym": 32, "fp8": None, "fp8-e5m2": None, "nf4": None, "mxfp8": None,
          "mxfp4": None, "nvfp4": None}  # fmt: skip


def quantised(model, name, but=("lm_head",)):
    """The model, its linear layers but these quantised in place, in groups that small layers have."""
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if type(child) is nn.Linear and key not in but:
                setattr(module, key, QuantisedLinear.of(child, format_of(name, GROUPS[name])))
    return model


def as_gptq(stored):
    """The tensors of a GPTQ layer, of its second version."""
    code, scale, zero = (stored.operands[name] for name in ("code", "scale", "zero"))
    groups = torch.arange(code.shape[1]) // stored.format.group
    return {
        "qweight": to_words(code, 4).T.contiguous(),
        "qzeros": to_words(zero.T.contiguous(), 4),
        "scales": scale.T.contiguous(),
        "g_idx": groups.int(),
    }


def as_awq(stored):
    """The tensors of an AWQ layer: output 8 c + j in field 0, 4, 1, 5, 2, 6, 3, 7 of word c, for j from 0."""
    code, scale, zero = (stored.operands[name].T.contiguous() for name in ("code", "scale", "zero"))
    held_by = [0, 2, 4, 6, 1, 3, 5, 7]  # field -> output

    def packed(fields):
        return to_words(fields.unflatten(1, (-1, 8))[..., held_by].flatten(1), 4)

    return {"qweight": packed(code), "qzeros": packed(zero), "scales": scale}


def checkpoint(model, directory, method, format, group=None, without=()):
    """Write a model whose linear layers but the head and those of ``without`` (of compressed-tensors alone) are
    quantised, as this method's tools do; returns what is stored of each."""
    format = format_of(format, group)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    stored, packing = {}, {"gptq": as_gptq, "awq": as_awq}.get(method, pack)
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and name not in ("lm_head", *without):
            stored[name] = quantise(tensors.pop(f"{name}.weight"), format)
            tensors |= {f"{name}.{key}": tensor.contiguous() for key, tensor in packing(stored[name]).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    say(directory, {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": format.group, "checkpoint_format": "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": format.group, "version": "gemm"},
    }.get(method) or quantization_config(format, ("lm_head", *without)))  # fmt: skip
    return stored


def say(directory, quantised):
    """Write what a checkpoint's config.json says of its quantisation."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantised}))


TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def quantised_inputs(model, directory, format, **changes):
    """A checkpoint whose inputs are quantised, too, where it is served."""
    checkpoint(model, directory, "compressed-tensors", format)
    said = quantization_config(format_of(format))
    said["config_groups"]["group_0"]["input_activations"] = TOKENS | changes
    say(directory, said)
