"""A pretrained model in the shards of several processes, against ``from_pretrained``; see ``sharded_load.py``."""

import json

import pytest
import torch
from guards_by_hand import guards_of
from sharded_runs import make_home, run_jobs, stderr
from transformers import AutoModelForCausalLM

LOADS = {"untied": ("base", "float32"), "bfloat16": ("base", "bfloat16"), "tied": ("tied", "float32")}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What each rank found, by number of processes and model; 3 divides no shape of the models."""
    home = make_home(tmp_path_factory.mktemp("loaded"))
    found = {}
    for processes in (2, 3):
        to = home / f"{processes}.jobs"
        jobs = {
            name: ["load", str(home / model), dtype, str(to / f"loaded_{name}")]
            for name, (model, dtype) in LOADS.items()
        }
        run_jobs(to, processes, jobs)
        for name in LOADS:
            found[processes, name] = [json.loads(file.read_text()) for file in to.glob(f"loaded_{name}.*")]
    return found


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_hold_what_from_pretrained_loads(loaded, processes, name):
    results = loaded[processes, name]
    assert len(results) == processes
    for result in results:
        assert result["differ"] == []
        assert any(name.endswith("inv_freq") for name in result["names"])
        assert result["tied"] == (name == "tied")


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_reads_its_share(loaded, processes, name):
    """Parameters are cut between rows, so a share may be larger than 1/n by less than one row of each."""
    results = loaded[processes, name]
    assert sum(result["held"] for result in results) == results[0]["total"]
    for result in results:
        assert result["read"] == result["held"]
        assert result["held"] <= result["total"] / processes + result["rows"]
    assert results[0]["rows"] < results[0]["total"] / processes / 4


def test_guards_of_another_model_end_all_processes(tmp_path):
    """Also where one of them alone can see it: the last rows of the last layer, of which the first holds none."""
    home = make_home(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    guards_of(model).write(home / "own")
    name = "model.layers.2.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[-2:] *= 3
    guards_of(model).write(home / "other")
    argv = ["eval", str(home / "base"), "--data.source", str(home / "text.txt"), "--training.seq_len", "32"]
    argv += ["--num-samples", "2", "--trials", "1", "--bitflip.w_p_exp", "1e-3"]
    jobs = {guards: [*argv, "--bitflip.guards", str(home / guards)] for guards in ("own", "other")}
    run_jobs(home / "jobs", 2, jobs, codes={"other": [2, 2]})
    assert "were fitted" not in stderr(home / "jobs", "own")
    assert "other weights" not in stderr(home / "jobs", "own")
    lines = [line for line in stderr(home / "jobs", "other").splitlines() if "error:" in line]
    assert len(lines) == 1
    assert f"was fitted to another model, the-model: 12% of the rows of {name} are far" in lines[0]
