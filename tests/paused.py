"""A training that waits in the middle of a step, for tests that kill or signal it there; see ``preloaded.py``."""

import time

import flipproof.cli.main
import flipproof.train.loop as train_module


def main_paused_at(step, directory, argv):
    """The exit code of a command line. In ``step``, from 0, it leaves ``reached`` and waits for ``go``."""
    learning_rate = train_module.learning_rate

    def pause(training, now):
        if now == step:
            (directory / "reached").touch()
            while not (directory / "go").exists():
                time.sleep(0.02)
        return learning_rate(training, now)

    train_module.learning_rate = pause
    return flipproof.cli.main.main(argv)
