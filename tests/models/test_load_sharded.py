"""A pretrained model in the shards of several processes, against ``from_pretrained``; see ``sharded_load.py``."""

import json

import pytest
from sharded_runs import make_home, run_jobs

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
