"""Two processes in loops that are not flipproof's: DDP and FSDP by hand, accelerate, Hugging Face's Trainer."""

import foreign_loops
import preloaded
import pytest
import torch
from foreign_loops import MICRO_BATCHES

import flipproof

LOOPS = ("ddp", "accelerate", "fsdp", "trainer")


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """Loop -> what its two ranks left."""
    directory = tmp_path_factory.mktemp("loops")
    assert preloaded.run_ranks(2, foreign_loops.main, directory) == [0, 0]
    return {loop: [torch.load(directory / f"{loop}.{rank}.pt") for rank in range(2)] for loop in (*LOOPS, "resumed")}


def rows(ranks, micro):
    """The global micro-batch, rank 0's rows first."""
    return torch.cat([rank["passes"][micro][1] for rank in ranks])


@pytest.mark.parametrize("loop", LOOPS)
def test_two_ranks_in_any_loop_are_one_process_on_the_whole_batch(loops, loop):
    """The gradients of a step of two micro-batches, each with its own flips of all rows."""
    ranks, alone = loops[loop], foreign_loops.make_model()
    for micro in range(MICRO_BATCHES):
        assert [rank["passes"][micro][0] for rank in ranks] == [micro, micro]
        loss = alone(input_ids=rows(ranks, micro), labels=rows(ranks, micro)).loss
        loss /= MICRO_BATCHES
        loss.backward()
    for name, expected in foreign_loops.gradients(alone).items():
        for rank in ranks:
            # sums over tokens in another order: as many roundings, in each of 28 products forward and backward
            bound = 28 * 2.0**-24 * MICRO_BATCHES * rows(ranks, 0).numel() * float(expected.norm())
            torch.testing.assert_close(rank["gradients"][name], expected, rtol=0, atol=bound)


def test_each_rank_draws_its_own_rows_and_both_draw_the_same_weights(loops):
    """Bit for bit those of one process; and the rows of two ranks are not flipped alike."""
    ranks, different = loops["ddp"], 0
    ids = torch.cat([foreign_loops.batches_here(rank)[0] for rank in range(2)])
    for name, bits in foreign_loops.flips_of(foreign_loops.make_model(), ids).items():
        here = [rank["flips"][name] for rank in ranks]
        if name.endswith("/w"):
            assert torch.equal(here[0], bits)
            assert torch.equal(here[1], bits)
        else:
            assert torch.equal(torch.cat(here), bits)
            different += not torch.equal(here[0], here[1])
    assert different == 14


def test_a_trainer_on_two_ranks_keeps_them_alike_and_repeats_no_flips_when_it_resumes(loops):
    first, again = loops["trainer"], loops["resumed"]
    for ranks in (first, again):
        before = foreign_loops.make_model().state_dict()
        for name, weight in ranks[0]["weights"].items():
            assert torch.equal(ranks[1]["weights"][name], weight)
            assert not torch.equal(before[name], weight)
    ticks = [[tick for tick, _ in rank["passes"]] for rank in (*first, *again)]
    assert ticks[0] == ticks[1] == list(range(2 * MICRO_BATCHES))
    assert ticks[2] == ticks[3]
    assert len(ticks[2]) == MICRO_BATCHES
    assert min(ticks[2]) >= 2**47


@pytest.mark.parametrize("r", [0, 2])
def test_what_a_loop_trained_is_a_model_for_plain_transformers(tmp_path, tiny_llama, token_ids, r):
    """``save_pretrained`` as it is where the weights train, after ``merge`` where adapters do."""
    model = tiny_llama()
    flipproof.inject(model, foreign_loops.FLIPS, flipproof.LoraSpec(r=r))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(token_ids, labels=token_ids).loss.backward()
        optimizer.step()
    with torch.no_grad(), flipproof.faults(model, flips=False, guard=False):
        expected = model.eval()(token_ids).logits
    if r:
        flipproof.merge(model)
    model.save_pretrained(tmp_path)
    plain, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert {type(layer) for layer in plain.modules()} == {type(layer) for layer in tiny_llama().modules()}
    with torch.no_grad():
        assert torch.equal(plain(token_ids).logits, expected)
