"""What a line of metrics says of the steps since the last one, and how long a run by epochs is."""

import functools
import statistics

import pytest
from tiny_runs import assert_same_run, metrics, settings, train_until_crash

from flipproof.data.sequences import load_text
from flipproof.errors import ConfigError
from flipproof.models.load import load_tokenizer
from flipproof.train.loop import train
from flipproof.train.step import Training


def losses(run_dir):
    return {line["step"]: line["loss"] for line in metrics(run_dir)}


def test_a_loss_is_the_mean_since_the_last_line(base, whole, tmp_path):
    """Over the steps; what a step's is, the run that logs each says. The last line is of what is left."""
    train(settings(base, tmp_path / "run", log_freq=4))
    each = losses(whole)
    assert losses(tmp_path / "run") == {
        4: statistics.fmean(each[step] for step in (1, 2, 3, 4)),
        6: statistics.fmean(each[step] for step in (5, 6)),
    }


@pytest.mark.parametrize("crash", [3, 5])
def test_a_run_that_goes_on_between_two_lines_writes_those_of_one_never_stopped(base, tmp_path, crash):
    """From the checkpoints of steps 2 and 4, with lines after steps 3 and 6. The run that was never stopped has no
    checkpoint before its end."""
    train(settings(base, tmp_path / "whole", log_freq=3, save_freq=0))
    config = settings(base, tmp_path / "stopped", log_freq=3)
    train_until_crash(config, crash)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_steps_whose_loss_is_not_finite_are_left_out(base, whole, tmp_path, monkeypatch):
    """Of one line step 2, of another all steps."""
    real, calls = Training._micro_batch, []

    def broken(self, ids, factor):
        loss = real(self, ids, factor)
        calls.append(None)
        step = (len(calls) + 1) // 2  # of two micro-batches each
        return loss * float("nan") if step in (2, 5, 6) else loss

    monkeypatch.setattr(Training, "_micro_batch", broken)
    train(settings(base, tmp_path / "broken", log_freq=1))
    calls.clear()
    train(settings(base, tmp_path / "run", log_freq=2))
    each, found = losses(tmp_path / "broken"), losses(tmp_path / "run")
    assert each[2] is each[5] is each[6] is None
    assert found[2] == each[1] == losses(whole)[1]
    assert found[4] == (each[3] + each[4]) / 2
    assert found[6] is None


def test_a_run_takes_so_many_epochs_of_its_text(base, tmp_path):
    """A pass and a half; the control of the count is the text itself. What is resumed is as long, or longer."""
    config = settings(base, tmp_path / "run", steps=None, epochs=1.5, local_batch_size=64, save_freq=0)
    text, _ = load_text(config.data, load_tokenizer(config.model), 32)
    steps = -(-3 * len(text) // (2 * 64 * 2))
    train(config)
    assert [*losses(tmp_path / "run")] == list(range(1, steps + 1))
    by = functools.partial(settings, base, tmp_path / "run", local_batch_size=64, save_freq=0, steps=None)
    with pytest.raises(ConfigError, match=rf"training\.steps = \d+, but .*step-{steps} has done {steps}"):
        train(by(epochs=0.5), resume="auto")
    train(by(epochs=2.0), resume="auto")
    assert [*losses(tmp_path / "run")] == list(range(1, -(-4 * len(text) // (2 * 64 * 2)) + 1))


def test_a_warm_up_by_share_and_a_global_batch_are_what_they_stand_for(base, whole, tmp_path):
    train(settings(base, tmp_path / "run", warmup_steps=0, warmup_ratio=0.4, gradient_accumulation_steps=1,
                   global_batch_size=4))  # fmt: skip
    assert_same_run(whole, tmp_path / "run")
