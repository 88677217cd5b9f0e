"""Samples in one row against each sample alone, in float64."""

import copy

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

import flipproof
from flipproof.errors import ConfigError
from flipproof.models import recompute
from flipproof.models.loss import IGNORED, Teacher, ask_teacher, fuse_loss, last_states, loss_by_row, next_token_loss
from flipproof.models.packed import check_packing
from flipproof.models.parallelize import blocks

SIZES = [[7, 11, 6], [20, 4]]  # of the samples in each row
# which reads keys and values, and changes none
KV = flipproof.BitFlipSpec(kv_zero_out_t=1e9)


@pytest.fixture
def rows():
    """(ids, labels, positions) of two rows of samples, whose first tokens have no loss."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (2, 24), generator=random)
    labels = ids.where(torch.rand(2, 24, generator=random) < 0.6, IGNORED)
    positions = torch.tensor([[i for size in row for i in range(size)] for row in SIZES])
    labels[positions == 0] = IGNORED
    return ids, labels, positions


def samples(ids, labels):
    """Each alone, (1, n)."""
    for row, sizes in enumerate(SIZES):
        at = 0
        for size in sizes:
            yield ids[row : row + 1, at : at + size], labels[row : row + 1, at : at + size]
            at += size


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def kinds():
    for attention in ("eager", "sdpa"):
        for how in ("plain", "kv", "recomputed", "compiled"):
            if (attention, how) != ("eager", "compiled"):
                yield pytest.param(attention, how, id=f"{attention}-{how}")


@pytest.mark.parametrize(("attention", "how"), kinds())
def test_gradients_are_those_of_the_samples_weighted_by_their_tokens(telling_llama, rows, attention, how):
    """With the plain loss of logits, in float64 but for faults, of whose bits there are at most 32."""
    plain = telling_llama if how == "kv" else telling_llama.double()
    model = copy.deepcopy(plain)
    model.set_attn_implementation(attention)
    if how == "kv":
        flipproof.inject(model, KV)
    recompute.prepare(blocks(model), compiled=how == "compiled")
    recompute.set_kept(blocks(model), "full" if how == "recomputed" else "none")
    model.train()
    ids, labels, positions = rows

    def of_logits(logits, labels, total):
        return (
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            / total
        )

    total = (labels != IGNORED).sum()
    of_logits(model(input_ids=ids, position_ids=positions, use_cache=False).logits, labels, total).backward()
    got = gradients(model)
    for own, own_labels in samples(ids, labels):
        of_logits(plain(input_ids=own, use_cache=False).logits, own_labels, total).backward()
    expected = gradients(plain)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # transformers computes norms and the angles of positions in float32
        close = (2e-5 if how == "kv" else 2e-6) * float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=0, atol=close, msg=name)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_the_loss_is_the_mean_over_the_tokens_of_all_samples(telling_llama, rows, fused, share):
    model = telling_llama
    flipproof.inject(model, KV, flipproof.LoraSpec(r=2))
    if fused:
        fuse_loss(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)

    def loss_of(ids, labels, positions=None):
        teacher: Teacher | None = ask_teacher(model, ids, share, positions) if share else None
        return next_token_loss(model, ids, labels, teacher=teacher, positions=positions)

    ids, labels, positions = rows
    loss = loss_of(ids, labels, positions)
    loss.backward()
    got, total, whole = gradients(model), (labels != IGNORED).sum(), 0.0
    for own, own_labels in samples(ids, labels):
        part = loss_of(own, own_labels) * (own_labels != IGNORED).sum() / total
        part.backward()
        whole += float(part)
    assert float(loss) == pytest.approx(whole, rel=1e-5)
    for name, value in gradients(model).items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-5 * float(value.abs().max()), msg=name)
    by_row = loss_by_row(model, ids, labels, positions)
    for row in range(2):
        own = next_token_loss(model, ids[row : row + 1], labels[row : row + 1], positions=positions[row : row + 1])
        assert float(by_row[row]) == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_masked_has_exactly_no_gradient(telling_llama, rows, fused):
    model, (ids, labels, positions), seen = telling_llama.double(), rows, []
    if fused:
        fuse_loss(model)

    def keep(_module, args):
        args[0].retain_grad()
        seen.append(args[0])

    model.get_output_embeddings().register_forward_pre_hook(keep)
    next_token_loss(model, ids, labels, positions=positions).backward()
    has_one = seen[0].grad.abs().sum(2) > 0
    assert torch.equal(has_one[:, :-1], labels[:, 1:] != IGNORED)
    assert not has_one[:, -1].any()
    model.zero_grad(set_to_none=True)
    nothing = next_token_loss(model, ids, torch.full_like(ids, IGNORED), positions=positions)
    nothing.backward()
    assert float(nothing) == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_neighbour_is_of_no_matter_to_the_bit(telling_llama, rows, attention, dtype):
    """Also under autocast, with keys and values read on the way."""
    flipproof.inject(telling_llama, KV)
    telling_llama.set_attn_implementation(attention)
    ids, _, positions = rows
    other = ids.clone()
    other[:, :4] += 1
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        before, after = (last_states(telling_llama, each, positions) for each in (ids, other))
    for row, sizes in enumerate(SIZES):
        assert not torch.equal(before[row, : sizes[0]], after[row, : sizes[0]])
        assert torch.equal(before[row, sizes[0] :], after[row, sizes[0] :])


def test_padding_on_the_right_is_not_seen(telling_llama, rows):
    fuse_loss(telling_llama)
    ids, labels, _ = rows
    short = loss_by_row(telling_llama, ids[:, :15], labels[:, :15])
    labels[:, 15:] = IGNORED
    for padding in (0, 257):
        ids[:, 15:] = padding
        torch.testing.assert_close(loss_by_row(telling_llama, ids, labels), short, rtol=1e-5, atol=0)


def test_models_that_keep_samples_apart_pass(telling_llama):
    check_packing(telling_llama, rows=2, seq_len=33)
    flipproof.inject(telling_llama, flipproof.BitFlipSpec(x_p_exp=0.1, w_p_frac=0.1))
    fuse_loss(telling_llama)
    telling_llama.train()
    check_packing(telling_llama, rows=1, seq_len=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_packing(telling_llama, rows=1, seq_len=32)
    assert telling_llama.training


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_that_lets_them_leak_is_refused(telling_llama, monkeypatch, dtype):
    forward = telling_llama.model.forward
    fuse_loss(telling_llama)
    monkeypatch.setattr(telling_llama.model, "forward", lambda *a, position_ids=None, **how: forward(*a, **how))
    with (
        torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
        pytest.raises(ConfigError, match=r"LlamaForCausalLM says something else .*data\.packing = false") as error,
    ):
        check_packing(telling_llama, rows=1, seq_len=32)
    assert len(error.value.problems) == 1


def test_one_without_positions_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"BloomForCausalLM takes no positions .*data\.packing = false"):
        check_packing(model, rows=1, seq_len=32)
