import datasets
import pytest

from flipproof.models.load import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test; where the packed files of this one are."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "flipproof"


@pytest.fixture
def tokenised(monkeypatch):
    """How many texts each call of a tokenizer was given."""
    calls = []
    kind = type(byte_tokenizer())
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, texts, **kw: calls.append(len(texts)) or call(self, texts, **kw))
    return calls
