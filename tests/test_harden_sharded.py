"""A model hardened by two processes that share it, against the same by one: the same files, guards and costs."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import alone, exit_codes, make_home, run_jobs, stderr
from transformers import AutoModelForCausalLM

FLAGS = [
    *("--training.seq_len", "32", "--num-samples", "6", "--calibrate", "130", "--sweep.seeds", "2", "--p", "1e-4,3e-3"),
]


def argv(home, model, to, rows):
    text = ["--data.source", str(home / "text.txt"), "--training.local_batch_size", str(rows)]
    return ["harden", str(home / model), *text, *FLAGS, "--to", str(to)]


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    """(what one process made, what two made, the directory of their jobs)."""
    home = make_home(tmp_path_factory.mktemp("hardened"))
    AutoModelForCausalLM.from_pretrained(home / "base").save_pretrained(home / "pickled")
    (home / "pickled" / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    torch.save(model.state_dict(), home / "pickled" / "pytorch_model.bin")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (home / "pickled" / file).write_bytes((home / "base" / file).read_bytes())
    jobs = {
        "two": argv(home, "tied", home / "two", 4),
        "pickled": argv(home, "pickled", home / "refused", 4),
        "again": argv(home, "tied", home / "base", 4),
    }
    run_jobs(home / "jobs", 2, jobs, codes={"pickled": [2, 2], "again": [2, 2]})
    alone(*argv(home, "tied", home / "one", 8))
    return home / "one", home / "two", home / "jobs"


def tensors(directory):
    return {key: tensor for file in directory.glob("model*.safetensors") for key, tensor in load_file(file).items()}


def test_the_model_has_the_same_bits(hardened):
    one, two, _ = hardened
    assert len(list(two.glob("model-*.safetensors"))) > 1
    got, wanted = tensors(two), tensors(one)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())
    assert (one / "config.json").read_text() == (two / "config.json").read_text()


@pytest.mark.parametrize("of", ["guards.safetensors", "before-guards/guards.safetensors"])
def test_guards_are_those_of_whole_weights_and_of_all_processes_rows(hardened, of):
    """Weights' to the bit: a shard holds some of the rows. Activations may differ in their last bits: a process has
    half of a batch."""
    one, two, _ = hardened
    got, wanted = load_file(two / of), load_file(one / of)
    assert got.keys() == wanted.keys()
    for name, maxima in wanted.items():
        tolerance = {"rtol": 0, "atol": 0} if name.endswith("/w") else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got[name], maxima, **tolerance)
    model = AutoModelForCausalLM.from_pretrained(two if of == "guards.safetensors" else two.parent / "tied")
    for name in ("model.layers.1.mlp.down_proj", "model.embed_tokens"):
        assert torch.equal(got[f"{name}/w"], model.get_submodule(name).weight.abs().amax(1, keepdim=True))


def test_costs_are_the_same(hardened):
    one, two, _ = hardened
    found = [json.loads((each / "hardened.json").read_text()) for each in (two, one)]
    for which in ("before", "after"):
        got, wanted = (each[which] for each in found)
        assert len(got) == len(wanted) == (6 if which == "before" else 3)
        for a, b in zip(got, wanted, strict=True):
            assert {**a, "cost": 0, "interval": 0} == {**b, "cost": 0, "interval": 0}
            assert a["cost"] == pytest.approx(b["cost"], abs=1e-4)
    assert found[0]["rotation"]["difference"] == pytest.approx(found[1]["rotation"]["difference"], abs=1e-6)
    assert (two / "report.html").exists()


def test_one_process_speaks_and_what_cannot_be_is_one_line(hardened):
    one, _, jobs = hardened
    said = [(jobs / f"two.{rank}.out").read_text() for rank in (0, 1)]
    assert "what flips cost, in nats per token" in said[0].lower()
    assert "rotated: the residual stream" in said[0]
    assert said[1] == ""
    assert exit_codes(jobs, "pickled") == [2, 2]
    assert "its weights are in pytorch_model.bin, and several processes read safetensors" in stderr(jobs, "pickled")
    assert "exists already; name a new directory" in stderr(jobs, "again")
    assert {path.name for path in one.parent.iterdir()} == {
        *("base", "shallow", "tied", "pickled", "text.txt", "run.toml", "jobs", "one", "two"),
    }
