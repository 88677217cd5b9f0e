"""What is rotated from files to files, against the same model rotated in memory and saved: the same bits."""

import copy
import json

import pytest
import torch
from bumpy import bumpy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flipproof.config import ModelConfig
from flipproof.errors import ConfigError
from flipproof.models import layerwise, save
from flipproof.models.layerwise import Layerwise, rotate_into
from flipproof.models.load import byte_tokenizer, save_model
from flipproof.models.rotate import rotate
from flipproof.world import ALONE, World


def untied(kind):
    return lambda: bumpy(kind, tie_word_embeddings=False)


def tied_without_a_gain():
    model = bumpy("Llama", tie_word_embeddings=True)
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
    return model


MODELS = {
    "Llama with biases": untied("Llama"),
    "Qwen3": untied("Qwen3"),
    "Gemma, tied": lambda: bumpy("Gemma", tie_word_embeddings=True),
    "tied, and stays so": tied_without_a_gain,
    "in 16 bits": lambda: bumpy("Phi3", tie_word_embeddings=False).bfloat16(),
    "no basis for its stream": lambda: bumpy("Gemma2"),
    "experts, in memory": lambda: bumpy("Mixtral"),
}


def from_files(directory, to, how="residual", seed=3, world=ALONE):
    to.mkdir()
    return rotate_into(to, ModelConfig(hf_model_path=str(directory)), byte_tokenizer(), None, how, seed, world)


def tensors(directory):
    found = [load_file(file) for file in directory.glob("*.safetensors")]
    assert sum(map(len, found)) == len({key for each in found for key in each})
    return {key: tensor for each in found for key, tensor in each.items()}


def settings(directory):
    """All other files, by name."""
    return {file.name: file.read_text() for file in directory.iterdir() if "safetensors" not in file.name}


@pytest.mark.parametrize("how", ["none", "residual", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_files_hold_the_bits_of_a_model_that_is_rotated_in_memory(name, how, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_FILE_BYTES", 50_000)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    if (name, how) == ("experts, in memory", "full"):
        with pytest.raises(ConfigError, match=r"MixtralForCausalLM has no nn\.Linear as down projection"):
            from_files(tmp_path / "model", tmp_path / "files", how)
        return
    said, dtype = from_files(tmp_path / "model", tmp_path / "files", how)
    assert dtype == str(model.dtype).removeprefix("torch.")
    wanted = rotate(model, how, 3)
    save_model(model, tmp_path / "memory", byte_tokenizer())
    one, two = tensors(tmp_path / "files"), tensors(tmp_path / "memory")
    assert one.keys() == two.keys()
    for key, tensor in two.items():
        assert one[key].dtype == tensor.dtype, key
        assert torch.equal(one[key], tensor), key
    assert settings(tmp_path / "files") == settings(tmp_path / "memory")
    for key in ("stream", "folded", "values", "online", "left", "untied"):
        assert getattr(said, key) == getattr(wanted, key), key
    assert said.difference < 1e-5  # computed in float32, whatever is written
    if name != "experts, in memory":
        files = list((tmp_path / "files").glob("*.safetensors"))
        assert len(files) > 2
        assert all(file.stat().st_size < 60_000 or len(load_file(file)) == 1 for file in files)
        index = json.loads((tmp_path / "files/model.safetensors.index.json").read_text())
        assert index["weight_map"] == {key: file.name for file in files for key in load_file(file)}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in two.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="is about a GPU")
@pytest.mark.parametrize("how", ["residual", "full"])
def test_a_gpu_gives_what_a_cpu_does_up_to_the_order_of_sums_in_float64(how, tmp_path):
    model = bumpy("Llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    said, _ = from_files(tmp_path / "model", tmp_path / "gpu", how, world=World(0, 1, torch.device("cuda", 0)))
    rotate(model, how, 3)
    got = tensors(tmp_path / "gpu")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(got[name], tensor, rtol=2**-22, atol=1e-12)
    assert said.difference < 1e-5


def test_one_small_file_has_no_index_and_plain_transformers_opens_it(tmp_path, token_ids):
    model = bumpy("Llama")
    model.save_pretrained(tmp_path / "model")
    from_files(tmp_path / "model", tmp_path / "files")
    assert {file.name for file in (tmp_path / "files").glob("model*")} == {"model.safetensors"}
    with torch.no_grad():
        got, wanted = (
            each(token_ids).logits for each in (AutoModelForCausalLM.from_pretrained(tmp_path / "files"), model)
        )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * max(1.0, float(wanted.abs().max())))


def test_one_block_is_in_memory_at_a_time_and_each_pass_reads_all_once(tmp_path, monkeypatch):
    model = bumpy("Llama", num_hidden_layers=5, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    read, held = Layerwise.read, []

    def look(self, name):
        held.append((name, sum(p.numel() for p in self._model.parameters() if p.dim() > 1 and not p.is_meta)))
        return read(self, name)

    monkeypatch.setattr(Layerwise, "read", look)
    from_files(tmp_path / "model", tmp_path / "files")
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1)
    largest = max(p.numel() for p in model.parameters())
    assert max(held for _, held in held) <= max(block, largest)
    names = [name for name, _ in held]
    # the run that is traced, the one that tries where values are, and the one that rotates, writes and proves
    for name, parameter in model.named_parameters():
        assert names.count(name) == (3 if parameter.dim() > 1 else 2), name


@pytest.mark.parametrize("spoiled", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_what_is_written_is_what_is_proven(spoiled, tmp_path, monkeypatch):
    """A weight that is rotated wrongly, by a hundredth, is found out by the pass that writes it."""
    bumpy("Llama").save_pretrained(tmp_path / "model")
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "model").get_parameter(spoiled).detach()
    changed = layerwise.changed

    def change(tensor, steps):
        wide = changed(tensor, steps)
        return wide * 1.01 if tensor.shape == weight.shape and torch.equal(tensor, weight) else wide

    monkeypatch.setattr(layerwise, "changed", change)
    with pytest.raises(ConfigError, match="another function when it is rotated: its logits moved by"):
        from_files(tmp_path / "model", tmp_path / "files")


def test_what_is_no_number_and_what_is_damaged_is_named(tmp_path):
    model = bumpy("Llama")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"not finite and is not written: model\.layers\.1\.mlp\.up_proj\.weight"):
        from_files(tmp_path / "broken", tmp_path / "one", "none")
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged or cut short"):
        from_files(tmp_path / "cut", tmp_path / "two")
