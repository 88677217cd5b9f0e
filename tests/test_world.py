import json
import re
import sys
import threading

import preloaded
import pytest
import stuck
import torch
import transformers
from torch import nn

from flipproof.config import ParallelismConfig, load_config
from flipproof.errors import ConfigError
from flipproof.models.parallelize import Gradients, blocks, parallelize
from flipproof.world import World, _leaving, join_world, layout


@pytest.mark.parametrize(
    ("parallelism", "size", "node_size", "expected"),
    [
        # sharded over all processes, unless something is said
        ({}, 1, 1, (1, 1)),
        ({}, 8, 8, (1, 8)),
        ({}, 16, 8, (1, 16)),
        ({"fsdp_degree": 4}, 4, 4, (1, 4)),
        ({"replicas": 2}, 8, 8, (2, 4)),
        ({"fsdp_degree": 2, "replicas": 4}, 8, 8, (4, 2)),
        ({"sharding_strategy": "shard_grad_op"}, 8, 8, (1, 8)),
        # over those of a node
        ({"sharding_strategy": "hybrid_shard"}, 16, 8, (2, 8)),
        ({"sharding_strategy": "hybrid_shard"}, 8, 8, (1, 8)),
        ({"sharding_strategy": "hybrid_shard"}, 1, 1, (1, 1)),
        ({"sharding_strategy": "hybrid_shard", "fsdp_degree": 4}, 16, 8, (4, 4)),
        ({"sharding_strategy": "hybrid_shard", "replicas": 2}, 8, 8, (2, 4)),
        ({"sharding_strategy": "hybrid_shard", "fsdp_degree": 16, "replicas": 1}, 16, 8, (1, 16)),
        # the whole model in each
        ({"sharding_strategy": "no_shard"}, 1, 1, (1, 1)),
        ({"sharding_strategy": "no_shard"}, 16, 8, (16, 1)),
        ({"sharding_strategy": "no_shard", "replicas": 4, "fsdp_degree": 1}, 4, 4, (4, 1)),
    ],
)
def test_layout(parallelism, size, node_size, expected):
    assert layout(ParallelismConfig(**parallelism), size, node_size) == expected


@pytest.mark.parametrize(
    ("parallelism", "size", "node_size", "words"),
    [
        (
            {"fsdp_degree": 4},
            1,
            1,
            "1 process was started, but parallelism.fsdp_degree x replicas = 4 x 1 = 4; "
            "start 4 (--devices, or torchrun --nproc_per_node) or set --parallelism.fsdp_degree 1",
        ),
        (
            {"fsdp_degree": 2, "replicas": 2},
            6,
            6,
            "6 processes were started, but parallelism.fsdp_degree x replicas = 2 x 2 = 4; "
            "start 4 (--devices, or torchrun --nproc_per_node) or set --parallelism.fsdp_degree 3",
        ),
        (  # no degree makes 4 processes 3 replicas
            {"replicas": 3},
            4,
            4,
            "4 processes were started, but parallelism.fsdp_degree x replicas = 1 x 3 = 3; "
            "start 3 (--devices, or torchrun --nproc_per_node)",
        ),
        (
            {"replicas": 4},
            2,
            2,
            "2 processes were started, but parallelism.fsdp_degree x replicas = 1 x 4 = 4; "
            "start 4 (--devices, or torchrun --nproc_per_node)",
        ),
        (
            {"sharding_strategy": "hybrid_shard", "fsdp_degree": 8},
            4,
            4,
            "4 processes were started, but parallelism.fsdp_degree x replicas = 8 x 1 = 8; "
            "start 8 (--devices, or torchrun --nproc_per_node) or set --parallelism.fsdp_degree 4",
        ),
        (
            {"sharding_strategy": "no_shard", "replicas": 4},
            2,
            2,
            "2 processes were started, but parallelism.replicas = 4; start 4",
        ),
    ],
)
def test_processes_that_do_not_fit_are_told_with_both_numbers_and_the_flag(parallelism, size, node_size, words):
    with pytest.raises(ConfigError) as error:
        layout(ParallelismConfig(**parallelism), size, node_size)
    assert error.value.problems == [words]


@pytest.mark.parametrize("strategy", ["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 16, 24])
def test_any_answer_is_all_processes_and_mending_as_told_works(strategy, size):
    """Of every config: replicas x degree are the processes, or what the message says to set makes it so."""
    for degree in (None, 1, 2, 3, 8) if strategy != "no_shard" else (None, 1):
        for replicas in (None, 1, 2, 3, 8):
            options = {"sharding_strategy": strategy, "fsdp_degree": degree, "replicas": replicas}
            try:
                got = layout(ParallelismConfig(**options), size, min(size, 8))
            except ConfigError as error:
                (problem,) = error.problems
                _, set_degree, mended = problem.partition("set --parallelism.fsdp_degree ")
                if set_degree:
                    options["fsdp_degree"] = int(mended)
                    got = layout(ParallelismConfig(**options), size, min(size, 8))
                else:  # no degree would do
                    assert f"= {replicas}; " in problem if strategy == "no_shard" else size % _replicas(problem)
                    continue
            assert got[0] * got[1] == size
            assert replicas in (None, got[0])
            assert options["fsdp_degree"] in (None, got[1])


def _replicas(problem):
    return int(re.search(r"= \d+ x (\d+) = ", problem)[1])


def test_the_70b_seed_on_two_processes():
    """Its config says fsdp_degree = 4."""
    config = load_config(["70b"]).parallelism
    assert layout(config, 4, 4) == (1, 4)
    with pytest.raises(ConfigError, match=r"^2 processes .* = 4 x 1 = 4; start 4 .*--parallelism\.fsdp_degree 2$"):
        layout(config, 2, 2)


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with join_world(ParallelismConfig()) as world:
        assert (world.rank, world.size, world.first, world.mesh) == (0, 1, True, None)
        assert (world.total(2.5), world.largest(-1.0), world.mean(torch.tensor(0.25))) == (2.5, -1.0, 0.25)
        world.wait()
        assert not torch.distributed.is_initialized()


SHAPE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
GATED = SHAPE | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize(
    ("kind", "config", "path"),
    [
        ("Llama", GATED, "model.layers"),
        ("GPTNeoX", SHAPE | {"intermediate_size": 64}, "gpt_neox.layers"),
        ("OPT", SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers"),
        ("Phi", SHAPE | {"intermediate_size": 64}, "model.layers"),
        ("Gemma", GATED, "model.layers"),
        ("Qwen2", GATED, "model.layers"),
        # experts are lists of modules as well, within each block
        ("Mixtral", GATED | {"num_local_experts": 4}, "model.layers"),
    ],
)
def test_blocks_are_a_transformers_layers(kind, config, path):
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    found = blocks(model)
    assert len(found) == 3
    assert all(one is other for one, other in zip(found, model.get_submodule(path), strict=True))


def test_a_model_without_lists_has_no_blocks():
    assert blocks(nn.Sequential(nn.Linear(2, 2))) == []


def test_in_one_process_nothing_is_sharded_or_wrapped(tiny_llama, token_ids):
    model = tiny_llama()
    expected, names = model(token_ids).logits, list(model.state_dict())
    world, config = World(0, 1, torch.device("cpu")), load_config([], {"model": {"hf_model_path": "m"}})
    parallelize(model, config, world)
    assert list(model.state_dict()) == names
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    gradients = Gradients(model, config.parallelism, world)
    assert gradients.apart
    with gradients.micro_batch(last=False):
        assert torch.equal(model(token_ids).logits, expected)


def test_offloading_needs_several_processes():
    config = ParallelismConfig(cpu_offload=True)
    with pytest.raises(ConfigError, match=r"cpu_offload = True: 1 process .*--devices"), join_world(config):
        pass


def test_who_waits_for_what_may_take_long_waits_in_the_group_that_may(monkeypatch):
    asked = []
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda _answer, group: asked.append(group))
    world = World(0, 2, torch.device("cpu"), None, "ten minutes", "a day")
    assert (world.once(lambda: 3), world.once(lambda: 4, patient=True)) == (3, 4)
    assert asked == ["ten minutes", "a day"]


def test_a_process_that_fails_ends_though_leaving_the_others_does_not(tmp_path):
    said = [tmp_path / f"said-{rank}" for rank in range(2)]
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        preloaded.start(
            stuck.work,
            rank,
            tmp_path,
            environment=names
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_ERROR_FILE": f"{tmp_path}/{rank}.json"},
            said=said[rank],
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [1, 1]
    for rank in range(2):
        assert f"RuntimeError: the loss of {rank}" in said[rank].read_text()
        assert json.loads((tmp_path / f"{rank}.json").read_text())["message"] == f"RuntimeError: the loss of {rank}"


def test_no_thread_outlives_the_leaving_of_a_process_that_fails():
    """It would free the error, and with it process groups: while Python ends, that aborts a run that was only stopped,
    and its exit code is no longer 75."""
    before, interval = set(threading.enumerate()), sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that a thread that is not waited for is still there
    try:
        with _leaving(RuntimeError("stopped")):
            assert set(threading.enumerate()) - before
        left = set(threading.enumerate()) - before
    finally:
        sys.setswitchinterval(interval)
    assert not left
