"""The two ways in which a model comes to memory, and the comparison of what they give."""

import torch

from flipproof.models.load import byte_tokenizer, load_model, materialise, model_on_meta

CPU = torch.device("cpu")


def materialised(config, dtype=None, seed=0, prepare=lambda model: None):
    model = model_on_meta(config, byte_tokenizer(), dtype)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    prepare(model)
    materialise(model, config, seed, CPU)
    return model


def assert_equal_models(model, expected):
    """Parameters, all buffers, those in no checkpoint included, and the logits."""
    for kind in ("named_parameters", "named_buffers"):
        got, wanted = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert got[name].dtype == tensor.dtype, name
            assert got[name].device == tensor.device, name
            assert torch.equal(got[name], tensor), name
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)


def in_one_process(config):
    return load_model(config, byte_tokenizer(), None, 0)
