import logging
from dataclasses import replace

import pytest
from tiny_runs import settings

from flipproof.models.load import byte_tokenizer
from flipproof.train.loop import train


@pytest.fixture(scope="session")
def base(tiny_llama, tmp_path_factory):
    """A model of one layer, with a tokenizer; the text that runs of it read lies beside it. For reading alone."""
    base = tmp_path_factory.mktemp("of_all_runs") / "base"
    tiny_llama(num_hidden_layers=1).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    return base


def undisturbed(base, run_dir, **options):
    config = settings(base, run_dir, **options)
    logger = logging.getLogger("flipproof")
    level = logger.level
    logger.setLevel("INFO")  # as the command line does, for run.log
    try:
        train(replace(config, checkpoint=replace(config.checkpoint, keep_last=9)))
    finally:
        logger.setLevel(level)
    return run_dir


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory):
    """The directory of a run of six steps, with checkpoints of steps 2, 4 and 6: for reading, and to be copied."""
    return undisturbed(base, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="session")
def whole_of_all_weights(base, tmp_path_factory):
    """The same without adapters."""
    return undisturbed(base, tmp_path_factory.mktemp("whole_of_all_weights") / "run", lora_r=0)
