"""``flipproof compare`` on several gloo processes, beside ``flipproof plan`` and beside what FSDP2 really moves."""

import json
import re
from dataclasses import replace

import compared
import preloaded
import pytest
from planned import config_of
from sharded_runs import save_llama
from texts import sentences

import flipproof.plan.compare as compare_module
from flipproof.cli.main import main
from flipproof.plan.compare import STRATEGIES, Comparison, Measured, Row, as_records, as_table, measure_steps
from flipproof.plan.estimate import Request, as_record, make_plan
from flipproof.plan.gpus import GPUS
from flipproof.plan.memory import Spread
from flipproof.world import ALONE

ACCUMULATION, ROWS, SEQ_LEN, STEPS, RANK = 2, 2, 32, 1, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of which every dimension divides by 4, so that nothing is padded."""
    home = tmp_path_factory.mktemp("compared")
    save_llama(home / "base", vocab_size=260)
    (home / "text.txt").write_text(sentences())
    return home


def flags(home, *more):
    training = {"seq_len": SEQ_LEN, "local_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATION}
    named = [part for key, value in training.items() for part in (f"--training.{key}", str(value))]
    return [f"{home}/base", *named, "--lora.r", str(RANK), "--bitflip.w_p_frac", "0.001", *more]


def run(home, directory, processes, *more, short_of_memory=()):
    """(the records that are printed, what was seen of each row that was built, in rank 0, what was said on stderr)."""
    directory.mkdir()
    argv = ["compare", *flags(home, "--data.source", f"{home}/text.txt", "--parallelism.timeout_minutes", "1")]
    argv += ["--steps", str(STEPS), "--json", *more]
    codes = preloaded.run_ranks(processes, compared.work, directory, argv, short_of_memory)
    assert codes == [0] * processes
    assert [(directory / f"said-{rank}").read_text() for rank in range(1, processes)] == [""] * (processes - 1)
    return json.loads((directory / "said-0").read_text()), json.loads((directory / "seen-0.json").read_text())


@pytest.fixture(scope="module")
def all_of_them(home):
    return run(home, home / "all", 4, "--training.activation_checkpointing", "selective")


def test_there_is_a_row_for_each_strategy_as_the_config_says_else(all_of_them):
    records, _ = all_of_them
    degrees = {"full_shard": (4, 1), "shard_grad_op": (4, 1), "hybrid_shard": (2, 2), "no_shard": (1, 4)}
    assert [record["sharding_strategy"] for record in records] == list(STRATEGIES)
    for record in records:
        assert record["why"] is None
        assert record["activation_checkpointing"] == "selective"
        assert (record["shards"], record["replicas"]) == degrees[record["sharding_strategy"]]


def test_numbers_of_a_row_agree_with_each_other_and_leave_out_what_a_cpu_cannot_say(all_of_them):
    for record in all_of_them[0]:
        measured, planned = record["measured"], record["planned"]
        tokens = measured["tokens_per_second"] * measured["seconds"]
        assert tokens == pytest.approx(4 * ROWS * ACCUMULATION * SEQ_LEN)
        assert 0 < measured["communication_share"] < 1
        assert 0 < measured["communication_seconds"] < measured["seconds"]
        assert measured["allocated"] is measured["exposed_communication_share"] is None
        assert planned["tokens_per_second"] is planned["seconds"] is planned["communication_seconds"] is None


def test_what_is_planned_is_what_plan_says(home, all_of_them, capsys):
    for record in all_of_them[0]:
        of = ["--training.activation_checkpointing", record["activation_checkpointing"]]
        of += ["--parallelism.sharding_strategy", record["sharding_strategy"]]
        if record["sharding_strategy"] == "hybrid_shard":
            of += ["--parallelism.fsdp_degree", "2"]
        argv = flags(home, "--training.dtype", "float32", "--training.steps", "1", *of)
        assert main(["plan", *argv, "--gpus", "4", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert record["planned"]["allocated"] == said["memory"]["allocated"]
        for kind in ("gathered_bytes", "reduced_bytes"):
            assert record["planned"][kind] == said["step"][kind]


def test_bytes_that_are_moved_are_those_that_plan_says(all_of_them):
    records, seen = all_of_them
    for record, row in zip(records, seen, strict=True):
        assert len(row["gathered"]) == len(row["reduced"]) == 3 + STEPS + 2  # warm-up, measured, for the profiler
        (gathered,), (reduced,) = set(row["gathered"]), set(row["reduced"])
        planned = record["planned"]
        assert (gathered, reduced) == (planned["gathered_bytes"], planned["reduced_bytes"])


def test_what_does_not_fit_or_is_refused_says_why_and_leaves_the_others_as_they_are(home):
    more = ("--parallelism.cpu_offload", "true", "--checkpointing", "full", "1", "full")
    records, seen = run(home, home / "refused", 2, *more, short_of_memory=("full_shard",))
    why = {
        "full_shard": "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "shard_grad_op": None,
        "hybrid_shard": "hybrid_shard: 2 processes do not divide into groups of several",
        "no_shard": "parallelism.cpu_offload = True: no_shard keeps the whole model on the device",
    }
    rows = [(record["sharding_strategy"], record["activation_checkpointing"], record["why"]) for record in records]
    assert rows == [(strategy, mode, reason) for strategy, reason in why.items() for mode in ("full", 1)]
    for record in records:
        assert (record["measured"] is None) == (record["why"] is not None)
        assert (record["planned"] is None) == (record["sharding_strategy"] in ("hybrid_shard", "no_shard"))
    assert [row["models_before"] for row in seen] == [0, 0, 0, 0]  # what had no memory holds none


def test_one_process_compares_what_blocks_keep(home, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["compare", *flags(home, "--data.source", f"{home}/text.txt"), "--steps", "1"]
    assert main([*argv, "--checkpointing", "selective", "2", "selective"]) == 0
    title, _, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "1 process on CPU, each with 2 x 2 sequences of 32 tokens a step; means of 1 steps"
    assert [re.split("  +", row)[:2] for row in rows] == [["no_shard", "selective"], ["no_shard", "2"]]
    assert not list(tmp_path.iterdir())
    assert main([*argv, "--strategies", "full_shard", "no_shard", "hybrid_shard"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "--strategies full_shard hybrid_shard: 1 process was started" in err
    for flag, allowed in (("--strategies", "'hybrid_shard' or 'no_shard'"), ("--checkpointing", "'auto'")):
        assert main([*argv, flag, "ful"]) == 2
        assert re.search(rf"error: {flag} = 'ful': .*{allowed}.* is allowed", capsys.readouterr().err)


def test_one_process_compares_what_blocks_of_quantised_layers_keep(home, capsys):
    """Beside what plan says of each."""
    argv = ["compare", *flags(home, "--data.source", f"{home}/text.txt"), "--steps", "1", "--json"]
    quantised = ["--model.quantize", "nf4", "--bitflip.w_p_frac", "None", "--bitflip.w_code_p", "0.001"]
    modes = ["none", "full", "selective", "1"]
    assert main([*argv, *quantised, "--checkpointing", *modes]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["activation_checkpointing"] for record in records] == [*modes[:3], 1]
    allocated = {}
    for record in records:
        assert record["why"] is None
        assert record["measured"]["seconds"] > 0
        mode = str(record["activation_checkpointing"])
        said = [*flags(home), *quantised, "--training.dtype", "float32", "--training.steps", "1", "--gpus", "1"]
        assert main(["plan", *said, "--training.activation_checkpointing", mode, "--json"]) == 0
        allocated[mode] = json.loads(capsys.readouterr().out)["memory"]["allocated"]
        assert record["planned"]["allocated"] == allocated[mode]
    assert len(set(allocated.values())) > 1
    assert main([*argv, *quantised, "--lora.r", "0"]) == 2
    assert "lora.r = 0: the weights are nf4, which do not train" in capsys.readouterr().err


def test_two_processes_compare_quantised_layers_that_they_share_or_have_whole(home):
    quantised = ["--model.quantize", "nf4", "--bitflip.w_p_frac", "None", "--bitflip.w_code_p", "0.001"]
    records, seen = run(home, home / "quantised", 2, *quantised, "--checkpointing", "none")
    assert "'shard_grad_op' over 2 processes, 2 on a node: the weights are nf4" in records[1]["why"]
    assert records[1]["planned"] is None
    assert "do not divide into groups" in records[2]["why"]
    for record, row in zip((records[0], records[3]), seen, strict=True):  # full_shard and no_shard
        assert record["planned"]["allocated"] > 0
        for kind in ("gathered", "reduced"):
            assert set(row[kind]) == {record["planned"][f"{kind}_bytes"]}


def test_steps_that_warm_up_and_the_one_that_is_profiled_do_not_count(monkeypatch):
    now, ran = [0.0], []

    def step(number):
        ran.append(number)
        now[0] += 2.0 if 3 <= number < 8 else 100.0

    monkeypatch.setattr(compare_module.time, "perf_counter", lambda: now[0])
    assert measure_steps(step, ALONE, 5) == Measured(2.0, None, None, None)
    assert ran == list(range(8))


def test_a_table_has_both_sides_and_the_reason_of_what_has_none():
    config = config_of("8B", 2, steps=1)
    full, offloaded = (replace(config.parallelism, cpu_offload=offload) for offload in (False, True))
    plan = make_plan(config, Request(4, gpu="h200"))
    measured = Measured(0.5, 3.25 * 2**30, 0.2, 0.125)
    rows = [
        Row(replace(config, parallelism=full), Spread(4, 1), measured, plan, None),
        Row(replace(config, parallelism=full), Spread(2, 2), None, plan, "CUDA out of memory."),
        Row(replace(config, parallelism=offloaded), None, None, None, "not here"),
    ]
    comparison = Comparison(rows, 4, "NVIDIA H200", GPUS["h200"], 6)
    _, _, _, first, second, third = (re.split("  +", line) for line in as_table(comparison).splitlines())
    said = as_record(plan)
    planned = [f"{said['step']['tokens_per_second']:,.0f}", f"{said['memory']['allocated'] / 2**30:.2f}"]
    assert first == ["full_shard", "auto", "32,768", "500.0", "3.25", "100.0", "20%", "12%", *planned]
    assert second == ["full_shard 2 x 2", "auto", *["–"] * 6, *planned, "CUDA out of memory."]
    assert third == ["full_shard", "auto", *["–"] * 8, "not here"]
    record = as_records(comparison)[0]
    assert record["measured"]["tokens_per_second"] == 2 * 2048 * 4 / 0.5
    pace = said["step"]
    assert record["planned"]["communication_share"] == pace["communication"] / pace["seconds"]
