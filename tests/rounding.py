"""How far the order of sums may take a result.

Which kernels sum, and in which order, depends on the processor, the number of threads and the shapes, so functions that
are equal on paper differ in their last bits; and what comes after may amplify that, Adam by dividing what is nearly
nothing by its size, a guard by having an edge. So no number stands here for how near is near. A test computes its
reference once more from weights that are moved in their last places, by more than the error of a sum, and two results
are the same function if they differ by no more than that moves one.
"""

from unittest import mock

import torch
from torch.utils._pytree import tree_map

import flipproof.measure.evaluate as evaluate_module
import flipproof.train.loop as train_module

ULPS = 8
"""By so many units in the last place of a float32 each weight is moved. A sum of n terms of all signs has an error of
about sqrt(n) / 2 of them, in whatever order; the longest here have 258."""
ROUNDED = ULPS * 2.0**-23
"""The same, relatively: for what is one sum and has nothing to amplify it."""


def move_(parameters, seed, by=ROUNDED):
    """Make each element larger or smaller by a share of ``by``, at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1 + by * (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1))


def assert_same_function(got, function, parameters, draws=3):
    """``got`` is what ``function()`` computes from ``parameters``, but for the order of sums.

    Both are tensors, or trees of them alike. No element of a tensor may be further off than any element of it goes when
    the parameters are moved, in several draws, or than the roundings of its largest element.
    """
    parameters = list(parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    got, expected = (tree_map(lambda x: x.detach().clone(), tree) for tree in (got, function()))
    bounds = tree_map(lambda x: ROUNDED * float(x.abs().max()), expected)
    for seed in range(draws):
        move_(parameters, seed)
        bounds = tree_map(lambda x, y, b: max(b, float((x - y).abs().max())), function(), expected, bounds)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    tree_map(lambda x, y, b: torch.testing.assert_close(x, y, rtol=0, atol=b), got, expected, bounds)


def training_moved(seed, by=ROUNDED):
    """Within the block ``train`` starts from moved weights."""
    build = train_module.build_model

    def build_moved(*args, **kwargs):
        model = build(*args, **kwargs)
        move_(model.parameters(), seed, by)
        return model

    return mock.patch.object(train_module, "build_model", build_moved)


def loading_moved(seed, by=ROUNDED):
    """Within the block ``eval`` measures an adapter and a base model whose weights are moved."""
    load = evaluate_module.load_adapter

    def load_moved(model, adapter):
        load(model, adapter)
        move_(model.parameters(), seed, by)

    return mock.patch.object(evaluate_module, "load_adapter", load_moved)
