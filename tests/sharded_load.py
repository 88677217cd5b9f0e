"""A pretrained model, loaded into shards, against ``from_pretrained``; called by ``sharded_jobs.py``."""

import json
import os
from pathlib import Path

import safetensors
import torch
from transformers import AutoModelForCausalLM

from flipproof.config import load_config
from flipproof.dtensor import local, whole
from flipproof.models.build import build_model
from flipproof.models.load import load_tokenizer
from flipproof.world import join_world

REAL_OPEN = safetensors.safe_open
READ = 0
"""Elements that ``weights.py`` read from the files."""


class CountingFile:
    """``safetensors.safe_open``, which counts."""

    def __init__(self, *args, **kwargs):
        self.opened = REAL_OPEN(*args, **kwargs)

    def __enter__(self):
        self.opened.__enter__()
        return self

    def __exit__(self, *args):
        return self.opened.__exit__(*args)

    def __getattr__(self, name):
        return getattr(self.opened, name)

    def get_slice(self, name):
        whole_slice = self.opened.get_slice(name)

        class Slice:
            def get_shape(self):
                return whole_slice.get_shape()

            def get_dtype(self):
                return whole_slice.get_dtype()

            def __getitem__(self, index):
                global READ
                part = whole_slice[index]
                READ += part.numel()
                return part

        return Slice()


def load(directory, dtype, to):
    """Leaves ``TO.RANK.json``: the names of tensors that differ in value, shape or dtype, and element counts."""
    global READ
    READ, safetensors.safe_open = 0, CountingFile
    config = load_config([], {"model": {"hf_model_path": directory}, "training": {"dtype": dtype}})
    with join_world(config.parallelism) as world:
        model = build_model(config, load_tokenizer(config.model), world)
        read, safetensors.safe_open = READ, REAL_OPEN
        expected = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
        mine = dict(model.named_parameters()) | dict(model.named_buffers())
        gathered = {name: whole(tensor.detach()) for name, tensor in mine.items()}
        differ = [
            name
            for name, tensor in theirs.items()
            if name not in gathered
            or gathered[name].dtype != tensor.dtype
            or not torch.equal(gathered[name], tensor.detach())
        ]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        result = {
            "differ": differ + sorted(mine.keys() - theirs.keys()),
            "names": sorted(mine),
            "tied": head.weight is embedding.weight,
            "total": sum(p.numel() for p in model.parameters()),
            "held": sum(local(p).numel() for p in model.parameters()),
            "rows": sum(p[0].numel() for p in theirs.values() if p.requires_grad),  # one of each parameter
            "read": read,
        }
        Path(f"{to}.{os.environ['RANK']}.json").write_text(json.dumps(result))
    return 0
