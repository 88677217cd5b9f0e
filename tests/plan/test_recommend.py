import json
import tomllib
from dataclasses import asdict

from planned import config_of

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.plan.estimate import Request, make_plan
from flipproof.plan.recommend import as_table, recommend

EIGHT = Request(8, gpu="h200")


def test_what_fits_comes_first_the_fastest_of_it_first_and_all_take_the_same_batch():
    options = recommend(config_of("70B", 2, gradient_accumulation_steps=4), EIGHT)
    fits = [option.plan.fits for option in options]
    assert fits == sorted(fits, reverse=True)
    assert True in fits
    assert False in fits
    speeds = [option.plan.pace.tokens_per_second for option in options if option.plan.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert {option.plan.pace.tokens for option in options} == {2 * 4 * 8 * 2048}
    ways = {(option.plan.spread.shards, option.config.parallelism.sharding_strategy) for option in options}
    assert ways == {(8, "full_shard"), (8, "shard_grad_op"), (2, "hybrid_shard"), (4, "hybrid_shard"), (1, "no_shard")}
    # of what does not fit, the least that it could need: weights alone are 131 GiB
    assert {o.config.training.local_batch_size for o in options if not o.plan.fits} == {1}
    for option in options:
        assert option.plan.fits == (option.plan.memory.needed <= 0.94 * option.plan.gpu.memory * 2**30)


def test_a_recommendation_is_a_config_of_which_a_plan_says_the_same():
    config = config_of("8B", 2, gradient_accumulation_steps=2)
    options = recommend(config, EIGHT)
    assert len(options) == (4 * 2 + 1) * 4  # all but no_shard with cpu_offload, too
    for option in options[::5]:
        tree = asdict(config)
        for table, keys in tomllib.loads(as_table([option]).partition("as TOML:")[2]).items():
            assert keys == option.settings[table]
            tree[table] |= keys
        tables = ("model", "training", "lora", "bitflip", "parallelism")
        again = make_plan(load_config([], {name: tree[name] for name in tables}), EIGHT)
        assert again.memory == option.plan.memory
        assert again.pace == option.plan.pace


def test_one_gpu_has_nothing_to_share(capsys):
    arguments = ["plan", "--config", "8b", "--gpus", "1", "--recommend"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [record["parallelism"] for record in found] == [{"sharding_strategy": "full_shard"}] * 4
    assert f"{found[0]['tokens_per_second']:,.0f}" in table.splitlines()[1]
