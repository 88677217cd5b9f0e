"""A step on fake tensors against peaks that GPUs had, against the closed form, and its count against sizes known."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from planned import config_of, shape
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from transformers import Gemma2Config

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.plan.dry_run import _Allocated, dry_run
from flipproof.plan.estimate import Request, make_plan
from flipproof.plan.memory import Spread, in_all, memory

SEVERAL = {"gradient_accumulation_steps": 2, "mixed_precision_reduce": "bfloat16"}
ROWS = [
    # flavor, adapters, rows, how it lies, what blocks keep, strategy, keys of training, GiB (benchmarks/README.md)
    ("8B", True, 2, Spread(1, 1), "weights", "full_shard", {}, 52.4),
    ("8B", True, 2, Spread(4, 1), "everything", "shard_grad_op", {}, 38.2),
    ("clm-1.1B", False, 8, Spread(2, 2), "nothing", "hybrid_shard", SEVERAL, None),
    ("clm-60M", False, 48, Spread(1, 1), "products", "full_shard", {}, None),
]


@pytest.mark.parametrize(("flavor", "lora", "rows", "spread", "kept", "strategy", "training", "measured"), ROWS)
def test_it_finds_what_the_closed_form_finds(flavor, lora, rows, spread, kept, strategy, training, measured):
    config, sizes = config_of(flavor, rows, lora, strategy=strategy, **training), shape(flavor, lora)
    found = dry_run(config, spread, in_all(sizes, kept))
    assert memory(sizes, config, spread, in_all(sizes, kept)).allocated == pytest.approx(found, rel=0.05)
    if measured is not None:
        assert found / 2**30 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("capped", [True, False])
def test_whole_logits_are_counted_where_the_loss_holds_them(tiny_llama, tmp_path, capped, dtype):
    """With a soft cap on them, or a head that flips; they are nearly all that there is here."""
    if capped:
        model = Gemma2Config(
            vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, final_logit_softcapping=30.0,
        )  # fmt: skip
    else:
        model = tiny_llama(vocab_size=32000, tie_word_embeddings=False).config
        model.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(tmp_path)
    faults = {"x_p_frac": 0.001} | ({} if capped else {"sites": ["linear", "head"]})
    training = {"seq_len": 128, "local_batch_size": 16, "activation_checkpointing": "full", "dtype": dtype}
    tables = {"model": {"hf_model_path": str(tmp_path)}, "training": training, "bitflip": faults, "lora": {"r": 2}}
    plan = make_plan(load_config([], tables), Request(1))
    found = dry_run(plan.config, plan.spread, plan.kept)
    logits = 16 * 128 * 32000
    assert found > 10 * logits  # bytes
    assert plan.memory.allocated == pytest.approx(found, rel=0.07)


def test_what_the_dry_run_says_decides_whether_it_fits():
    plan = make_plan(config_of("8B", 2), Request(1))
    assert plan.fits
    assert not replace(plan, dry_run=80 * 2**30).fits


def counted(work):
    seen = _Allocated()
    with FakeTensorMode(), seen:
        work()
    return seen.most


def test_what_is_fused_takes_no_memory_until_it_is_read():
    """In matrices of 4 KiB: x, its product y, and z, which is made of y in one pass; then x, z and their product."""

    def work():
        x = torch.ones(32, 32)
        y = x @ x
        z = ((y + 1) * 2).float().clone()
        del y
        return z @ x

    assert counted(work) == 3 * 4096


def test_what_is_freed_and_taken_again_counts_while_it_is_there():
    def work():
        x = torch.ones(32, 32)
        x.untyped_storage().resize_(0)
        y = torch.ones(16, 32) @ torch.ones(32, 16)
        x.untyped_storage().resize_(2048)
        return x, y

    # both factors and their product; x lay there before them, and is half as large after them
    assert counted(work) == max(4096, 2048 + 2048 + 1024, 1024 + 2048)


def test_masks_are_bits():
    assert counted(lambda: torch.ones(64, 64, dtype=torch.bool)) == 64 * 64 // 8


def test_what_stays_was_written():
    seen = _Allocated()
    with FakeTensorMode(), seen:
        x = torch.ones(32, 32)
        y = x + 1
        assert seen.most == 4096
        seen.settle()
    assert seen.most == 2 * 4096
    assert y is not x


def test_a_plan_says_it(tiny_llama, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    training = {"seq_len": 32, "mixed_precision_param": "bfloat16"}
    plan = ["plan", str(tmp_path), *(word for k, v in training.items() for word in (f"--training.{k}", str(v)))]
    plan += ["--gpus", "1"]
    assert main([*plan, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    config = load_config([], {"model": {"hf_model_path": str(tmp_path)}, "training": training})
    planned = make_plan(config, Request(1))
    assert found["dry_run"] == dry_run(planned.config, planned.spread, planned.kept)
    assert main([*plan, "--dry-run"]) == 0
    assert f"by a dry run of a step{found['dry_run'] / 2**30:>14.1f}" in capsys.readouterr().out
    assert main([*plan, "--dry-run", "--recommend"]) == 2
    assert "--dry-run is of one way to run a training; leave out --recommend" in capsys.readouterr().err


def test_a_step_gathers_each_block_twice_and_what_backward_needs_no_weights_of_once(monkeypatch):
    """FSDP would gather the embedding for the first block's backward, as what ran before it."""
    gathered = Counter()

    def counting(parameters, *args, **kwargs):
        gathered[parameters[0]._param_fqn.partition(".self_attn")[0]] += 1
        return gather(parameters, *args, **kwargs)

    gather = _fsdp_param_group.foreach_all_gather
    monkeypatch.setattr(_fsdp_param_group, "foreach_all_gather", counting)
    plan = make_plan(config_of("8B", 1, dtype="float32", mixed_precision_param="bfloat16"), Request(4))
    dry_run(plan.config, Spread(4, 1), in_all(plan.shape, "everything"))
    steps, once = 2, ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert gathered == {f"model.layers.{i}": 2 * steps for i in range(32)} | dict.fromkeys(once, steps)
