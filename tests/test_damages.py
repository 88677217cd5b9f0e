"""A few damages of every kind of file that flipproof leaves; ``python tests/damages.py`` tries many more."""

import damages
import pytest
import torch

from flipproof import pictures


@pytest.fixture(scope="module", autouse=True)
def as_in_the_script():
    import datasets

    threads, cache = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        damages.only_our_tasks(patch.setattr)
        patch.setattr(pictures, "DPI", 20)  # pictures of few points, of which a page has a dozen
        yield
    torch.set_num_threads(threads)
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.mark.parametrize("kind", damages.KINDS)
def test_what_is_damaged_is_refused_by_name_or_gives_the_same(kind, tmp_path):
    counts, problems = damages.try_damages(kind, tmp_path / "place", flips=2, each=29)
    assert not problems
    assert {damage for damage, _ in counts} >= {"bit flipped", "cut", "emptied"}
