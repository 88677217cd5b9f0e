"""A training's record, made up, and what a page says of it."""

import json
import re
from dataclasses import replace

import pytest
from planned import config_of

from flipproof.cli.main import main
from flipproof.plan.estimate import Request, make_plan
from flipproof.records import write_toml
from flipproof.report.page import report
from flipproof.report.read import read_sources
from flipproof.report.sections import sections_of
from flipproof.train.rundir import Record

CONFIG = config_of("8B", 2, activation_checkpointing="selective", steps=3)
H100 = "NVIDIA H100 80GB HBM3"


def write(directory, gpu=H100, gpus=1, config=CONFIG, nodes=1, rates=(1_000.0, 14_000.0, 15_000.0), peak=28.4):
    """A run of three steps, of which the first one compiles."""
    directory.mkdir(parents=True, exist_ok=True)
    write_toml(directory / "config.toml", config.to_toml())
    rows = config.training.local_batch_size * gpus
    Record(None, rows, ((10, "text"),), "held out", gpu=gpu, nodes=nodes).write(directory)
    (directory / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "loss": 2.0, "tokens_per_second": rate, "peak_memory_gib": peak}) + "\n"
            for i, rate in enumerate(rates, 1)
        )
    )


def planned_of(directory):
    return [section for section in sections_of(read_sources(directory)) if section.id.startswith("planned")]


def test_the_plan_stands_beside_what_was_measured(tmp_path):
    write(tmp_path / "run")
    (section,) = planned_of(tmp_path / "run")
    plan = make_plan(CONFIG, Request(1))
    (memory, speed), parts = section.tables[0].rows, section.tables[1].rows
    assert memory[1:] == [plan.memory.allocated / 2**30, 28.4, "-0.3%"]  # 28.3, as benchmarks/README.md has it
    assert speed[1:3] == [plan.pace.tokens_per_second, 14_000.0]  # the median: the first step compiled
    assert dict(parts) == {name: size / 2**30 for name, size in plan.memory.parts.items()}
    efficiency = float(re.search(r"--efficiency ([\d.]+) ", section.caption)[1])
    again = make_plan(CONFIG, Request(1, efficiency=efficiency))
    assert again.pace.tokens_per_second == pytest.approx(14_000, rel=0.01)


def test_what_trained_although_the_plan_says_that_it_cannot_is_told_too(tmp_path):
    config = config_of("70B", 1, activation_checkpointing="full")
    write(tmp_path / "run", config=config)
    (section,) = planned_of(tmp_path / "run")
    assert section.tables[0].rows[0][1] > 140  # GiB, of the 79.6 that there are


def test_the_page_has_the_section_and_its_picture(tmp_path, capsys):
    write(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    assert "Memory and speed: planned and measured" in text
    assert (tmp_path / "run" / "report" / "planned.png").read_bytes().startswith(b"\x89PNG")
    assert "28.4" in (tmp_path / "run" / "report" / "planned.csv").read_text()


def test_gpus_of_all_nodes_are_planned_for_and_runs_told_apart(tmp_path):
    sharded = config_of("70B", 2, activation_checkpointing="full", steps=3)
    write(tmp_path / "a", "NVIDIA H200", 16, sharded, nodes=2)
    write(tmp_path / "b")
    found = {section.id: section for section in planned_of(tmp_path)}
    assert found.keys() == {"planned-a", "planned-b"}
    plan = make_plan(sharded, Request(8, 2, "h200"))
    assert plan.spread.shards == 16
    assert found["planned-a"].tables[0].rows[0][1] == plan.memory.allocated / 2**30
    assert "16 x H200" in found["planned-a"].caption


@pytest.mark.parametrize(
    ("tokens_per_second", "why"), [(1e9, "faster than the peak"), (1.0, None), (float("inf"), "no time")]
)
def test_an_efficiency_is_one_by_which_that_speed_is_planned_or_none(tokens_per_second, why):
    plan = make_plan(CONFIG, Request(1))
    found = plan.efficiency_at(tokens_per_second)
    assert (found is None) == (why is not None)
    if found:
        again = make_plan(CONFIG, Request(1, efficiency=found))
        assert again.pace.tokens_per_second == pytest.approx(tokens_per_second)


def test_a_speed_that_communication_sets_tells_no_efficiency():
    plan = make_plan(config_of("70B", 1, activation_checkpointing="full"), Request(8, 4, "h200", node_link=1.0))
    assert plan.pace.communication > plan.pace.products + plan.pace.flips
    assert plan.efficiency_at(plan.pace.tokens_per_second / 2) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": ""},  # a CPU
        {"gpu": "NVIDIA H200 NVL"},  # which plan does not know
        {"config": replace(CONFIG, parallelism=replace(CONFIG.parallelism, cpu_offload=True))},
        {"config": replace(CONFIG, model=replace(CONFIG.model, flavor=None, init="pretrained",
                                                 hf_model_path="nobody/has-this"))},
        {"rates": ()},
    ],
)  # fmt: skip
def test_what_plan_does_not_know_has_no_section_and_is_no_error(changes, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    write(tmp_path / "run", **changes)
    (tmp_path / "run" / "generate.json").write_text(json.dumps({"model": "m", "prompt": "a", "texts": {"clean": "b"}}))
    assert planned_of(tmp_path / "run") == []
    report(tmp_path / "run")


def test_another_kind_of_model_whose_files_are_here_has_no_section(tmp_path):
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    MixtralConfig(vocab_size=256, num_key_value_heads=2, num_local_experts=2, **sizes).save_pretrained(tmp_path / "m")
    model = replace(CONFIG.model, flavor=None, init="pretrained", hf_model_path=str(tmp_path / "m"))
    write(tmp_path / "run", config=replace(CONFIG, model=model))
    assert planned_of(tmp_path / "run") == []


def test_a_model_whose_files_are_here_is_planned(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path / "m")
    model = replace(CONFIG.model, flavor=None, init="pretrained", hf_model_path=str(tmp_path / "m"))
    write(tmp_path / "run", config=replace(CONFIG, model=model))
    (section,) = planned_of(tmp_path / "run")
    assert section.tables[0].rows[1][0] == "tokens/s"


def test_a_damaged_record_is_a_note(tmp_path):
    write(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace("H100", "H200"))
    sources = read_sources(tmp_path / "run")
    assert sources.started == {}
    assert any("run.json is damaged" in note for note in sources.notes)
