import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planned import SHARDED, config_of, shape
from transformers import LlamaConfig

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.models.build import build_model, with_trainable_weights
from flipproof.models.load import byte_tokenizer
from flipproof.plan.estimate import Request, make_plan, offloading, sized
from flipproof.plan.gpus import GPUS
from flipproof.plan.memory import Spread, in_all, memory
from flipproof.plan.pace import pace
from flipproof.plan.shape import shape_of
from flipproof.train.throughput import flops_per_token
from flipproof.world import World


def test_a_shape_is_that_of_the_model(tiny_llama, tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    config = load_config([], {"model": {"hf_model_path": str(tmp_path)}, "training": {"seq_len": 16}})
    found = shape_of(replace(config, lora=replace(config.lora, r=4)))
    layer = model.model.layers[0]
    linear = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.blocks == len(model.model.layers)
    assert found.products == sum(module.weight.numel() for module in linear)
    assert found.adapters == sum(4 * (module.in_features + module.out_features) for module in linear)
    assert found.faulty == 0
    flipped = replace(config, bitflip=replace(config.bitflip, w_p_frac=0.1, skip_patterns=("self_attn",)))
    assert shape_of(replace(flipped, lora=replace(config.lora, r=0))).faulty == sum(
        module.weight.numel() for module in layer.mlp.modules() if isinstance(module, torch.nn.Linear)
    )
    assert found.forward_flops * 3 == flops_per_token(model, 16)
    tied = tmp_path / "tied"
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tied)
    found = shape_of(load_config([], {"model": {"hf_model_path": str(tied)}, "training": {"seq_len": 16}}))
    assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_weights_without_a_dtype_have_that_of_training(tiny_llama, tmp_path, held, rank):
    tiny_llama().to(getattr(torch, held)).save_pretrained(tmp_path)
    tree = {"model": {"hf_model_path": str(tmp_path)}, "training": {"seq_len": 16}, "lora": {"r": rank}}
    config = load_config([], tree)
    _, planned = sized(config, 1)
    trained = with_trainable_weights(config)
    model = build_model(trained, byte_tokenizer(), World(0, 1, torch.device("cpu")), trained.lora)
    assert planned.training.dtype == str(next(model.parameters()).dtype).removeprefix("torch.")
    assert planned.training.mixed_precision_param == trained.training.mixed_precision_param


@pytest.mark.parametrize(("rank", "dtypes"), [(0, ("float32", "bfloat16")), (4, ("bfloat16", "bfloat16"))])
def test_a_flavors_checkpoint_is_taken_to_be_bfloat16_without_asking_a_network(monkeypatch, rank, dtypes):
    monkeypatch.setattr("flipproof.models.load.from_hub", None)
    tree = {"model": {"flavor": "8B", "hf_model_path": "someone/8B"}, "training": {"seq_len": 16}, "lora": {"r": rank}}
    training = sized(load_config([], tree), 1)[1].training
    assert (training.dtype, training.mixed_precision_param) == dtypes


MEASURED = [
    # flavor, GPUs, GPU, rows, what blocks keep, faults, tokens a second (benchmarks/README.md)
    ("8B", 1, "h100", 2, "everything", True, 14_208),
    ("8B", 1, "h100", 2, "everything", False, 15_560),
    ("8B", 1, "h100", 2, "weights", True, 14_958),
    ("8B", 1, "h200", 2, "nothing", True, 11_728),
    ("8B", 1, "h200", 2, "products", True, 14_465),
    ("8B", 1, "h200", 2, "everything", True, 14_917),
    ("8B", 1, "h200", 2, "weights", True, 15_642),
    ("8B", 4, "h200", 2, "weights", True, 54_556),
    ("70B", 4, "h200", 2, "nothing", True, 5_315),
    ("70B", 4, "h200", 2, "nothing", False, 5_609),
    ("70B", 4, "h200", 2, "products", True, 6_725),
    ("70B", 4, "h200", 2, "products", False, 7_213),
]


def test_speed_is_that_which_was_measured_after_one_run_says_how_efficient_products_are():
    """The first row calibrates all of them."""

    def speed(row, efficiency):
        flavor, gpus, gpu, rows, kept, faults, _ = row
        config = config_of(flavor, rows, faults=faults)
        found = pace(
            shape(flavor, faults=faults),
            config,
            Spread(gpus, 1),
            in_all(shape(flavor), kept),
            GPUS[gpu],
            (GPUS[gpu].link, GPUS[gpu].link),
            efficiency,
        )
        return found.tokens_per_second

    low, high = 0.1, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if speed(MEASURED[0], middle) < MEASURED[0][-1] else (low, middle)
    errors = {row[:-1]: speed(row, low) / row[-1] - 1 for row in MEASURED[1:]}
    for strategy, spread, _, measured in SHARDED:
        config = config_of("8B", 2, strategy=strategy)
        found = pace(shape("8B"), config, spread, in_all(shape("8B"), "everything"), GPUS["h200"], (450, 450), low)
        errors[strategy, spread] = found.tokens_per_second / measured - 1
    assert max(map(abs, errors.values())) < 0.2, errors
    assert statistics.median(map(abs, errors.values())) < 0.1, errors


@pytest.mark.parametrize(
    ("strategy", "spread", "gathers", "reductions"),
    [
        # over nodes, so by FSDP: forward and backward of both micro-batches
        ("full_shard", Spread(4, 1, node=2), 2 * 2 * 0.75, 0.75),
        ("shard_grad_op", Spread(4, 1), 2 * 0.75, 0.75),
        ("hybrid_shard", Spread(4, 2, node=2), 2 * 2 * 0.75, 0.75 + 2 * 0.25 * 0.5),
        ("no_shard", Spread(1, 4), 0, 2 * 0.75),
    ],
)
def test_what_is_gathered_and_reduced_follows_from_the_strategy(strategy, spread, gathers, reductions):
    config = config_of("8B", 2, strategy=strategy, gradient_accumulation_steps=2)
    found = pace(shape("8B"), config, spread, in_all(shape("8B"), "everything"), GPUS["h100"], (450, 450), 0.5)
    adapters = 4 * shape("8B").adapters * shape("8B").blocks  # float32
    assert found.gathered_bytes == pytest.approx(gathers * (2 * shape("8B").parameters + adapters))
    assert found.reduced_bytes == pytest.approx(reductions * adapters)
    assert found.tokens == 2 * 2 * 2048 * spread.gpus


def test_the_largest_batch_is_the_last_that_fits():
    config = config_of("8B", 2)
    plan = make_plan(config, Request(1, gpu="h100"))
    room = 0.94 * GPUS["h100"].memory * 2**30
    for level, rows in plan.rows.items():
        assert rows > 0
        at = [
            memory(shape("8B"), config_of("8B", n), Spread(1, 1), in_all(shape("8B"), level)).needed
            for n in (rows, rows + 1)
        ]
        assert at[0] <= room < at[1]
    assert (plan.kept, plan.fits) == ({"weights": 32}, True)  # as "auto" ended there with on a GPU


def test_auto_keeps_what_fits_and_a_fixed_level_what_it_is():
    tight = make_plan(config_of("70B", 2, strategy="full_shard", seq_len=1536), Request(4, gpu="h200"))
    assert tight.kept.keys() == {"everything", "weights"}
    assert sum(tight.kept.values()) == 80
    assert tight.needed <= tight.room < tight.needed + 2 * 2**30
    full = make_plan(config_of("70B", 2, activation_checkpointing="full"), Request(4, gpu="h200"))
    assert full.kept == {"nothing": 80}
    every_fourth = make_plan(config_of("8B", 2, activation_checkpointing=4), Request(1))
    assert every_fourth.kept == {"nothing": 8, "everything": 24}


def test_what_crosses_nodes_takes_their_link_and_what_does_not_takes_the_gpus_own():
    config = config_of("8B", 1, lora=False, strategy="hybrid_shard", gradient_accumulation_steps=1)
    plan = make_plan(config, Request(8, 4, "h200", node_link=25.0))
    assert (plan.spread.shards, plan.spread.replicas) == (8, 4)
    within = (2 * 2 + 4) * plan.shape.parameters * 7 / 8  # gathered twice in bfloat16, reduced in float32
    among = 2 * 4 * plan.shape.parameters / 8 * 3 / 4
    assert plan.pace.communication == pytest.approx((within / 450e9 + among / 25e9) / 0.75)
    assert plan.pace.reduced_bytes == pytest.approx(4 * plan.shape.parameters * 7 / 8 + among)
    over_all = make_plan(config_of("8B", 1, lora=False), Request(8, 4, "h200", node_link=25.0))
    assert over_all.pace.communication == pytest.approx((2 * 2 + 4) * plan.shape.parameters * 31 / 32 / 25e9 / 0.75)


def test_a_model_lies_on_gpus_as_training_lays_it():
    hybrid = config_of("8B", 1, strategy="hybrid_shard")
    four = replace(hybrid, parallelism=replace(hybrid.parallelism, replicas=4))
    assert make_plan(four, Request(8)).spread == Spread(2, 4, 8)
    assert make_plan(hybrid, Request(4, 2)).spread == Spread(4, 2, 4)
    quarter = replace(four, parallelism=replace(four.parallelism, sharding_strategy="full_shard", fsdp_degree=2))
    assert make_plan(quarter, Request(8)).spread == Spread(2, 4, 8)


def test_what_is_offloaded_lies_in_the_cpu_s_memory_and_comes_over_pci_express():
    config = config_of("8B", 16, lora=False, activation_checkpointing="full")
    here, there = (make_plan(each, Request(4, gpu="h200")) for each in (config, offloading(config)))
    sizes, parts = here.shape, there.memory.parts
    assert there.memory.host == 16 * sizes.parameters / 4  # weights, gradients and two moments, in float32
    assert not parts.keys() & {"weights", "AdamW's moments"}
    # a block's gradients, as computed and as reduced; gathered are two blocks, and a shard that was copied in
    assert parts["gradients"] == 6 * sizes.block
    assert parts["gathered"] == 2 * 2 * sizes.block + 4 * sizes.block / 4
    moved = (2 * 4 * sizes.parameters + 4 * sizes.parameters) / 4  # to the GPU for forward and backward; gradients back
    assert there.pace.communication - here.pace.communication == pytest.approx(moved / (64e9 * 0.75))
    assert here.pace.adam == 0
    assert there.pace.adam == pytest.approx(28 * sizes.parameters / 4 / 40e9)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpus", "0"], "--gpus = '0': a whole number from 1"),
        (["--gpus", "1", "--gpu", "h300"], "--gpu h300: known are a100-40, a100-80, h100"),
        (
            ["--gpus", "8", "--parallelism.fsdp_degree", "3"],
            "parallelism.fsdp_degree = 3 with full_shard: 8 GPUs (1 x 8) do not divide so",
        ),
        (["--gpus", "1", "--model.flavor", "70B"], "even one sequence with activation_checkpointing = 'full' needs"),
        (["--gpus", "1", "--efficiency", "1.5"], "--efficiency = '1.5': a share above 0, up to 1 is allowed"),
        (
            ["--gpus", "1", "--model.flavor", "clm-60M", "--bitflip.include_patterns", "layers.0."],
            "blocks that are all alike; here patterns give adapters to some alone",
        ),
        (["--gpus", "1", "--model.flavor", "9B"], "model.flavor = '9B': known are 1B"),
        (
            ["--gpus", "1", "--parallelism.cpu_offload", "true"],
            "parallelism.cpu_offload = True: one GPU shares with no other; it needs several",
        ),
        (
            ["--gpus", "8", "--parallelism.cpu_offload", "true", "--dry-run"],
            "--dry-run counts a GPU's memory alone; leave out parallelism.cpu_offload",
        ),
        (
            [
                "--gpus",
                "1",
                "--model.flavor",
                "1B",
                "--training.dtype",
                "float32",
                "--training.mixed_precision_param",
                "None",
                "--dry-run",
            ],
            "--dry-run: in float32 a GPU attends otherwise than a CPU where heads share keys; leave it out, or",
        ),
        (
            ["--gpus", "2", "--gpu", "4090", "--model.flavor", "70B"],
            "on each; parallelism.cpu_offload = true would do",
        ),
    ],
)
def test_what_cannot_be_is_one_line(flags, said, capsys):
    assert main(["plan", "--config", "8b", *flags]) != 0
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_products_in_float32_take_as_much_longer_as_its_peak_is_lower():
    """Those of a model whose heads share no keys, and so of both dtypes alike in all else."""
    halves, whole = (
        make_plan(config_of("demo", 2, lora=False, mixed_precision_param=dtype), Request(1, gpu="h100"))
        for dtype in ("bfloat16", None)
    )
    assert whole.pace.products / halves.pace.products == pytest.approx(989.4 / 66.9)


def test_what_would_fit_is_said_and_does():
    with pytest.raises(ConfigError, match=r"full_shard over (\d+) of them would do") as caught:
        make_plan(config_of("70B", 2), Request(1, gpu="a100-80"))
    enough = int(str(caught.value).split("full_shard over ")[1].split()[0])
    assert make_plan(config_of("70B", 1), Request(enough, gpu="a100-80")).rows["nothing"] >= 1
    with pytest.raises(ConfigError, match="even one sequence"):
        make_plan(config_of("70B", 2), Request(enough // 2, gpu="a100-80"))


def test_a_budget_counts_the_parameters_that_the_config_says():
    """The second tutorial's: 1% of 8,000,000,000 tokens, 8 GPUs x 2 micro-batches x 2048 tokens a step."""
    config = load_config(["8b"], {"training": {"steps": None}})
    assert make_plan(config, Request(8)).steps == -(-80_000_000 // (8 * 2 * 2048)) == 2442


def test_json_is_what_the_table_says(capsys):
    arguments = ["plan", "--config", "clm-60m", "--gpus", "2", "--efficiency", "0.3", "--price", "2"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 7075  # the third tutorial's
    assert f"{found['step']['tokens_per_second']:,.0f} tokens/s; 7,075 steps take {found['hours']:,.2f} hours" in table
    assert found["cost"] == pytest.approx(2 * 2 * found["hours"])
    assert found["memory"]["allocated"] == pytest.approx(sum(found["memory"]["parts"].values()))
    assert f"{found['memory']['needed'] / 2**30:8.1f}  of 79.6" in table


def test_the_figures_of_the_documents_page_are_what_is_planned(tmp_path):
    """docs/planning.md, "The documents' formulas, and the right ones": its LLaMA of 7 billion parameters."""
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text("utf-8")
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    training = {"seq_len": 2048, "local_batch_size": 4, "dtype": "float32", "mixed_precision_param": "bfloat16"}

    def planned(mode="full", strategy="full_shard", nodes=1, **more):
        values = {
            "model": {"hf_model_path": str(tmp_path)},
            "training": training | {"activation_checkpointing": mode} | more,
            "parallelism": {"sharding_strategy": strategy},
            "lora": {"r": 0},
        }
        return make_plan(load_config([], values), Request(8, nodes, "a100-80", node_link=25.0))

    def gib(plan, *parts):
        return sum(plan.memory.parts[part] for part in parts) / 2**30 if parts else plan.memory.allocated / 2**30

    full, by_grad = planned(), planned(strategy="shard_grad_op")
    kept = gib(planned("selective"), "activations"), gib(planned("none"), "activations")
    assert f"{kept[0]:.1f} of {kept[1]:.1f} GiB stay" in text
    assert f"plan: {gib(by_grad):.1f} GiB with activations, {gib(full):.1f} under `full_shard`" in text
    assert f"a buffer of its size, {gib(full, 'gathered'):.1f} GiB in bfloat16" in text
    moments = gib(full, "AdamW's moments")
    assert f"weights {gib(full, 'weights'):.2f}, gradients 3.14, moments {moments:.2f} GiB" in text
    gathered, reduced = full.pace.gathered_bytes / 1e9, full.pace.reduced_bytes / 1e9
    assert f"plan: {gathered:.1f} GB gathered and {reduced:.1f} reduced" in text
    assert f"against twice: {by_grad.pace.gathered_bytes / 1e9:.1f} and {gathered:.1f} GB" in text
    assert f"with 4, {planned(gradient_accumulation_steps=4).pace.gathered_bytes / 1e9:.1f} GB" in text
    assert f"plan: {full.pace.products:.2f} s against {planned('selective').pace.products:.2f}" in text
    assert f"`--node-link 25`: {planned(nodes=4).pace.communication:.1f} s" in text
    assert f"4 bytes × P: {gib(planned(gradient_accumulation_steps=4)):.1f} GiB and {gib(full):.1f}" in text
    hybrid, over_all = (gib(planned(strategy=s, nodes=4, local_batch_size=2)) for s in ("hybrid_shard", "full_shard"))
    assert f"plan: {hybrid:.1f} GiB, {over_all:.1f} under `full_shard`" in text
