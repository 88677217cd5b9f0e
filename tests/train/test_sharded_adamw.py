"""AdamW whose moments processes share; what whole runs give: test_sharded_training.py."""

import json

import preloaded
import pytest
import stepped
import torch

from flipproof.train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stepped")
    assert preloaded.run_ranks(stepped.RANKS, stepped.work, directory) == [0] * stepped.RANKS
    return directory


def test_it_steps_to_the_bits_of_adamw_and_goes_on_from_its_checkpoint(directory):
    found = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(stepped.RANKS)]
    assert [different for different, _ in found] == [[], [], []]
    # two moments of a third of the rows, rounded up: 3 of 7, 1 of 2, 2 of 4, 3 of 9
    assert [held for _, held in found] == [2 * (15 + 3 + 2 + 12), 2 * (15 + 3 + 2 + 12), 2 * (5 + 0 + 0 + 12)]


def test_one_process_goes_on_from_what_three_saved(directory):
    model, expected = stepped.model_of(1), stepped.model_of(0)
    optimizer, plain = (torch.optim.AdamW(stepped.groups_of(m), lr=0.1) for m in (model, expected))
    list(stepped.steps(expected, plain, 0, stepped.STEPS))
    load_checkpoint(directory / f"step-{stepped.SAVED}", model, optimizer, stepped.progress())
    list(stepped.steps(model, optimizer, stepped.SAVED, stepped.STEPS))
    assert stepped.same(model, expected)
