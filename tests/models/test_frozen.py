"""Which models' frozen weights the processes of a node share, and what is fetched when. That they compute with the bits
of the whole model: tests/train/test_sharded_training.py, and test_frozen_gpu.py."""

from collections import Counter
from dataclasses import replace

import pytest
import torch.distributed as dist
from planned import config_of, shape
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from flipproof.dtensor import local
from flipproof.models import frozen
from flipproof.models.parallelize import blocks, parallelize
from flipproof.plan.dry_run import _pretended, dry_run
from flipproof.plan.estimate import Request, make_plan
from flipproof.plan.memory import Spread, in_all, shares
from flipproof.plan.shape import make_faulty, without_weights
from flipproof.world import arrange


def parallelized(config, spread):
    """The config's model on the meta device, as the first of that many processes has it."""
    with _pretended(spread) as world:
        degrees = replace(config.parallelism, fsdp_degree=spread.shards, replicas=spread.replicas)
        model = without_weights(config)
        make_faulty(model, config)
        parallelize(model, config, arrange(world, degrees))
        return model


FOUR = Spread(4, 1)
WAYS = [
    # the config's keys, how it lies on processes, whether they share
    ({}, {}, FOUR, True),
    ({}, {"sharding_strategy": "hybrid_shard"}, Spread(2, 2), True),
    ({}, {"sharding_strategy": "hybrid_shard"}, Spread(2, 2, node=2), True),
    ({}, {}, Spread(4, 1, node=2), False),  # over nodes
    ({}, {}, Spread(8, 1, node=12), False),
    ({}, {"sharding_strategy": "shard_grad_op"}, FOUR, False),
    ({}, {"keep_gathered": True}, FOUR, False),
    ({}, {"cpu_offload": True}, FOUR, False),
    ({"dtype": "float32", "mixed_precision_param": "bfloat16"}, {}, FOUR, False),  # what is gathered is cast
    ({"dtype": "float32"}, {}, FOUR, True),
]


@pytest.mark.parametrize(("training", "parallelism", "spread", "shared"), WAYS)
def test_processes_of_a_node_share_what_is_frozen_and_computed_with_as_it_is(training, parallelism, spread, shared):
    config = config_of("clm-60M", 1, **training)
    config = replace(config, parallelism=replace(config.parallelism, **parallelism))
    model = parallelized(config, spread)
    assert isinstance(model, FSDPModule) != shared
    assert shares(shape("clm-60M"), config, spread) == shared
    for name, parameter in model.named_parameters():
        if shared and ("lora_" in name or "norm" in name):
            assert not isinstance(parameter, DTensor)
            assert parameter.requires_grad == ("lora_" in name)
        else:
            assert isinstance(parameter, DTensor)
            assert local(parameter).shape[0] == parameter.shape[0] // spread.shards
            assert parameter.placements == ((Replicate(), Shard(0)) if spread.replicas > 1 else (Shard(0),))


def test_what_trains_as_a_whole_is_sharded_by_fsdp():
    assert isinstance(parallelized(config_of("clm-60M", 1, lora=False), FOUR), FSDPModule)


def test_rows_that_do_not_divide_are_left_to_fsdp():
    assert isinstance(parallelized(config_of("clm-200M", 1), Spread(5, 1)), FSDPModule)
    assert not shares(shape("clm-200M"), config_of("clm-200M", 1), Spread(5, 1))


def test_a_weight_that_two_blocks_hold_is_not_shared(tiny_llama):
    """The slot of the one may be in use by another block when the other's turn comes."""
    model = tiny_llama(num_hidden_layers=3).requires_grad_(False)
    assert frozen.may_share(model, blocks(model), 2)
    tied = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[2].mlp.up_proj.weight = tied
    assert not frozen.may_share(model, blocks(model), 2)


def test_a_weight_of_a_block_and_of_the_head_is_not_shared(tiny_llama):
    model = tiny_llama(vocab_size=64, hidden_size=64, tie_word_embeddings=False).requires_grad_(False)
    model.lm_head.weight = model.model.layers[0].self_attn.o_proj.weight
    assert not frozen.may_share(model, blocks(model), 2)


@pytest.fixture
def fetched(monkeypatch):
    """How often weights of so many values were gathered."""
    counts, gather = Counter(), dist.all_gather

    def counted(into, rows, *args, **kwargs):
        if kwargs:  # the optimizer waits for what it gathers
            counts[len(into) * rows.numel()] += 1
        return gather(into, rows, *args, **kwargs)

    monkeypatch.setattr(frozen.dist, "all_gather", counted)
    return counts


@pytest.mark.parametrize(("ahead", "behind"), [(1, 1), (0, 0), (2, 3)])
def test_a_block_is_fetched_once_for_each_pass_unless_it_is_there(fetched, ahead, behind):
    """The last blocks of forward are the first of backward."""
    config = config_of("8B", 1)
    prefetch = replace(config.parallelism, forward_prefetch=ahead, backward_prefetch=behind)
    plan = make_plan(replace(config, parallelism=prefetch), Request(4))
    dry_run(plan.config, FOUR, in_all(plan.shape, "everything"))
    steps, turns = 2, 1 + max(1, ahead, behind)
    passes = steps * (2 * 32 - turns)
    matrices = {4096 * 4096: 2, 4096 * 1024: 2, 4096 * 14336: 3}
    assert fetched == {size: passes * n for size, n in matrices.items()} | {128256 * 4096: 2 * steps}


def test_a_tied_head_is_fetched_with_the_embedding(fetched, tiny_llama, tmp_path):
    tiny_llama(tie_word_embeddings=True, vocab_size=1024).save_pretrained(tmp_path)
    config = config_of("8B", 1, seq_len=16)
    model = replace(config.model, flavor=None, hf_model_path=str(tmp_path), init="pretrained")
    plan = make_plan(replace(config, model=model), Request(2))
    dry_run(plan.config, Spread(2, 1), in_all(plan.shape, "everything"))
    assert fetched[1024 * plan.shape.hidden] == 2
