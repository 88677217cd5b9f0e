import pytest


@pytest.fixture(autouse=True)
def _dry_runs_look_for_nothing(monkeypatch):
    """Tests here are about the config that a dry run prints; ``train/test_start.py`` is about the rest."""
    monkeypatch.setattr("flipproof.train.start.check", lambda *_: None)
