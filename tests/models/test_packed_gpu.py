"""Samples in one row by FlexAttention, which has a backward on GPUs alone."""

import copy

import pytest
import torch

import flipproof
from flipproof.faults.attention import attend_with
from flipproof.faults.inject import set_tick
from flipproof.models import recompute
from flipproof.models.loss import IGNORED, fuse_loss, last_states, next_token_loss
from flipproof.models.packed import can_attend_by_blocks, check_packing
from flipproof.models.parallelize import blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on GPUs alone")

# activations are read and none changes: a bit of a number that differs in its last place may stand for much more
SPEC = flipproof.BitFlipSpec(w_p_exp=0.001, w_p_frac=0.005, w_zero_out_t=1.0, x_zero_out_t=1e9, kv_zero_out_t=1e9)


def rows(seed, seq_len=256):
    """(ids, labels, positions) of two rows of samples of 5 to 80 tokens."""
    random = torch.Generator().manual_seed(seed)
    positions = torch.empty(2, seq_len, dtype=torch.int64)
    for row in positions:
        at = 0
        while at < seq_len:
            size = min(seq_len - at, int(torch.randint(5, 81, (), generator=random)))
            row[at : at + size] = torch.arange(size)
            at += size
    ids = torch.randint(0, 256, positions.shape, generator=random)
    labels = ids.where(positions > 0, IGNORED)
    return ids.cuda(), labels.cuda(), positions.cuda()


def answers(model, batch):
    """Loss and gradients."""
    loss = next_token_loss(model, batch[0], batch[1], positions=batch[2])
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize(
    ("dtype", "faulty", "keep"),
    [
        ("float32", True, "everything"),
        ("bfloat16", False, "everything"),
        ("autocast", False, "everything"),
        ("float32", True, "nothing"),
        ("float32", True, "products"),
        ("float32", True, "weights"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_with_the_whole_mask(tiny_llama, faulty, dtype, keep, compiled):
    model = tiny_llama(hidden_size=64).cuda()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(torch.bfloat16) if dtype == "bfloat16" else model
    if faulty:
        flipproof.inject(model, SPEC, flipproof.LoraSpec(r=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    fuse_loss(model)
    blockwise = copy.deepcopy(model)
    assert can_attend_by_blocks(blockwise)
    attend_with(blockwise, "flex_attention")
    recompute.prepare(blocks(blockwise), compiled)
    for block in blocks(blockwise):
        recompute.keep(block, keep)
    tolerance = 2e-5 if dtype == "float32" else 3e-2
    torch._dynamo.reset()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        check_packing(blockwise, rows=2, seq_len=256)
        for seed in range(2):
            if faulty:
                for each in (model, blockwise):
                    set_tick(each, seed)
            expected_loss, expected = answers(model, rows(seed))
            loss, got = answers(blockwise, rows(seed))
            torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                error = float((got[name].double() - value.double()).norm() / value.double().norm())
                assert error < tolerance, (name, error)


@pytest.mark.parametrize("kv", [False, True])
def test_a_neighbour_is_of_no_matter_to_the_bit(tiny_llama, kv):
    model = tiny_llama(hidden_size=64).cuda()
    if kv:
        flipproof.inject(model, flipproof.BitFlipSpec(kv_zero_out_t=1e9))
    attend_with(model, "flex_attention")
    ids, _, positions = rows(0)
    other, second = ids.clone(), int((positions[0] == 0).nonzero()[1])
    other[:, :4] += 1
    before, after = (last_states(model, each, positions) for each in (ids, other))
    assert not torch.equal(before[0, :second], after[0, :second])
    assert torch.equal(before[0, second:], after[0, second:])


def test_new_places_of_samples_compile_nothing(tiny_llama):
    model = tiny_llama(hidden_size=64).cuda()
    attend_with(model, "flex_attention")
    recompute.prepare(blocks(model), True)
    answers(model, rows(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            answers(model, rows(seed))
