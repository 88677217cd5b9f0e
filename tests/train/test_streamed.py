"""Training on text that is packed meanwhile: the same run whatever stops it, and one line where it cannot go on."""

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import datasets
import numpy as np
import pytest
from rounding import training_moved
from sharded_jobs import text_stays_away_after
from sharded_runs import MOVED, alone, arguments, assert_same_run, make_home, run_jobs, stderr, stopped_after
from texts import sentences
from tiny_runs import assert_same_run as assert_same_bits
from tiny_runs import metrics, settings, train_until_crash

from flipproof.data.stream import StreamedText
from flipproof.errors import ConfigError
from flipproof.train.checkpoint import list_checkpoints
from flipproof.train.loop import Interrupted, train
from flipproof.train.start import check

# -- in one process ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test, in this process."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def documents(path, count=120):
    lines = sentences(60 * count).splitlines()
    path.write_text("".join(json.dumps({"text": f"{i} {lines[i % len(lines)]}"}) + "\n" for i in range(count)))
    return path


def streamed(base, run_dir, source, **training):
    config = settings(base, run_dir, **training)
    data = replace(config.data, source=str(source), streaming=True, buffer_size=5, max_tokens=None, held_out_tokens=256)
    return replace(config, data=data, eval=replace(config.eval, trials=1, num_samples=2))


def test_a_run_that_crashed_and_lost_its_cache_ends_with_the_bits_of_one_that_did_not(base, tmp_path, cache):
    source = documents(tmp_path / "text.jsonl")
    train(streamed(base, tmp_path / "whole", source))
    disturbed = streamed(base, tmp_path / "disturbed", source)
    train_until_crash(disturbed, 3)
    shutil.rmtree(cache)
    train(disturbed, resume="auto")
    assert_same_bits(tmp_path / "disturbed", tmp_path / "whole")
    for path in (tmp_path / "whole/checkpoints").glob("step-*"):
        other = tmp_path / "disturbed/checkpoints" / path.name / "manifest.json"
        texts = [json.loads(file.read_text())["text"] for file in (path / "manifest.json", other)]
        assert texts[0] == texts[1]


def test_a_run_and_its_control_take_the_same_text_more_than_once(base, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    taken, batch = [], StreamedText.batch

    def kept(*arguments):
        taken.append(batch(*arguments))
        return taken[-1]

    monkeypatch.setattr(StreamedText, "batch", kept)
    config = streamed(base, tmp_path / "run", documents(tmp_path / "text.jsonl", 12), control=True, steps=12)
    train(config)
    (line,) = {message for message in caplog.messages if "pass 2 over them begins" in message}
    count = int(line.split(" has ")[1].split()[0])
    rows = [row.numpy().tobytes() for batch in taken for row in batch.ids]
    assert len(rows) == 2 * 48
    assert rows[:48] == rows[48:]  # the control's
    assert max(Counter(rows[:count]).values()) == 1
    assert Counter(rows[:count])[rows[count]] == 1


def test_text_that_changed_is_one_line(base, tmp_path, cache):
    """By its content: a file that was moved is the same text."""
    source = documents(tmp_path / "text.jsonl")
    train_until_crash(streamed(base, tmp_path / "run", source), 4)
    moved = source.rename(tmp_path / "moved.jsonl")
    whole = moved.read_text()
    moved.write_text(whole.replace("a", "o"))
    with pytest.raises(ConfigError) as told:
        train(streamed(base, tmp_path / "run", moved), resume="auto")
    assert [line.startswith("--resume: data.source = ") for line in told.value.problems] == [True]
    assert told.value.problems[0].endswith("the training text is another")
    moved.write_text(whole)
    train(streamed(base, tmp_path / "run", moved), resume="auto")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_text_that_cannot_be_read_ends_a_run_after_its_last_checkpoint(base, tmp_path):
    source = documents(tmp_path / "text.jsonl", 60)
    good = source.read_text()
    train(streamed(base, tmp_path / "whole", source, steps=8))
    source.write_text(good[: good.rindex("{")] + "{broken\n")
    run = streamed(base, tmp_path / "run", source, steps=24)
    with pytest.raises(ConfigError) as told:
        train(run)
    (line,) = told.value.problems
    kept = max((tmp_path / "run/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:])).name
    assert line.startswith("training stopped after step ")
    assert "text.jsonl, line 60 is not one JSON object" in line
    assert line.endswith(f"; the last checkpoint, {kept}, is whole")
    source.write_text(good)
    train(run, resume="auto")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 25))
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0][:2] == losses[1][:2]  # of the warm-up, the same whatever comes after


@pytest.fixture
def asked_to_stop():
    """Sends this process a signal once training has taken it over and a run has so many lines of metrics."""
    threads = []

    def send(number, run_dir, lines):
        def sent():
            taken_over = signal.getsignal(number)
            while signal.getsignal(number) is taken_over or len(metrics_so_far(run_dir)) < lines:
                time.sleep(0.01)
            time.sleep(0.1)  # in which the wait begins; where it has not, the end is the same
            os.kill(os.getpid(), number)

        threads.append(threading.Thread(target=sent, daemon=True))
        threads[-1].start()

    yield send
    for thread in threads:
        thread.join(timeout=10)


def metrics_so_far(run_dir):
    return metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []


@pytest.mark.parametrize(
    ("number", "shards", "size", "done", "save_freq"),
    [(signal.SIGTERM, 2, 5, 2, 5), (signal.SIGINT, 2, 5, 2, 2), (signal.SIGTERM, 1, 2, 0, 2)],
)
def test_a_run_that_waits_for_text_is_asked_to_stop(
    base, tmp_path, cache, asked_to_stop, number, shards, size, done, save_freq
):
    """It ends as between two steps: with a checkpoint of those that it has taken, from which it goes on."""
    source = documents(tmp_path / "text.jsonl")
    run = streamed(base, tmp_path / "run", source, save_freq=save_freq)
    run = replace(run, data=replace(run.data, buffer_size=size))
    with pytest.MonkeyPatch.context() as patch:
        text_stays_away_after(shards, patch.setattr)
        asked_to_stop(number, tmp_path / "run", done)
        with pytest.raises(Interrupted, match=f"after step {done}; flipproof train .* --resume goes on from there"):
            train(run)
    assert len(metrics_so_far(tmp_path / "run")) == done
    kept = [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")]
    assert kept == [f"step-{done}"] * (done > 0)
    train(run, resume="auto")
    whole = streamed(base, tmp_path / "whole", source, save_freq=save_freq)
    train(replace(whole, data=run.data))
    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_what_cannot_be_is_told_at_once(base, tmp_path):
    config = streamed(
        base, tmp_path / "run", documents(tmp_path / "text.jsonl"), steps=None, epochs=2, eval_freq="epoch"
    )
    for begin in (train, check):
        with pytest.raises(ConfigError) as told:
            begin(config)
        assert [line.split(":")[0] for line in told.value.problems] == [
            "data.streaming = True with training.epochs = 2",
            "data.streaming = True with training.eval_freq = 'epoch'",
        ]
    assert not (tmp_path / "run").exists()


def test_a_run_is_streamed_or_not(base, tmp_path):
    config = streamed(base, tmp_path / "run", documents(tmp_path / "text.jsonl"))
    train_until_crash(config, 3)
    with pytest.raises(ConfigError, match=r"--resume: data\.streaming = False, but the run in .* was begun with True"):
        train(replace(config, data=replace(config.data, streaming=False)), resume="auto")


# -- in several --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("streamed"))
    documents(home / "text.jsonl")
    return home


def command(home, run, rows, *flags, source=None):
    text = ("--data.source", str(source or home / "text.jsonl"), "--data.streaming", "true", "--data.buffer_size", "7")
    little = ("--model.hf_model_path", f"{home}/shallow", "--eval.trials", "1", "--eval.num_samples", "2")
    return arguments(home, run, rows, *text, *little, "--checkpoint.keep_last", "9", *flags)


def kept(home, jobs):
    """Token ids by (first sequence of the run, how many), of all ranks of a job."""
    return {
        tuple(map(int, path.stem.split("-")[1:])): np.load(path) for path in (home / f"{jobs}.jobs").glob("ids-*.npy")
    }


def test_a_run_goes_on_in_two_processes_and_in_one_again(home):
    """Sums are taken in another order in two processes; what is summed is the same to the bit."""
    run_jobs(home / "one.jobs", 1, {"run": command(home, "single/run", 4)}, {"run": "streamed_ids_are_kept"})
    for seed in range(MOVED):
        with training_moved(seed):
            alone(*command(home, f"single/run.moved{seed}", 4))
    stopped_after(2, home / "single/run", home / "two")
    run_jobs(home / "two.jobs", 2, {"run": command(home, "two", 2, "--resume")}, {"run": "streamed_ids_are_kept"})
    stopped_after(4, home / "two", home / "last")
    run_jobs(home / "last.jobs", 1, {"run": command(home, "last", 4, "--resume")}, {"run": "streamed_ids_are_kept"})
    assert_same_run(home / "last", home / "single/run")

    one, two, last = kept(home, "one"), kept(home, "two"), kept(home, "last")
    assert sorted(one) == [(first, 4) for first in range(0, 48, 4)]
    assert sorted(two) == [(first, 2) for first in range(16, 48, 2)]  # of both ranks: none twice, and none left out
    assert sorted(last) == [(first, 4) for first in range(32, 48, 4)]
    for (first, _), ids in one.items():
        if first >= 16:
            np.testing.assert_array_equal(np.concatenate([two[first, 2], two[first + 2, 2]]), ids)
        if first >= 32:
            np.testing.assert_array_equal(last[first, 4], ids)
    rows = Counter(row.tobytes() for ids in two.values() for row in ids)
    assert max(rows.values()) == 1


def test_two_processes_that_wait_for_text_stop_alike(home):
    """Whichever of them the signal came to."""
    source = documents(home / "away.jsonl")  # of which nothing is in the cache
    argv = command(home, "away", 2, "--training.save_freq", "5", source=source)
    patches = {"stopped": "rank_1_gets_sigterm_while_text_stays_away"}
    run_jobs(
        home / "away.jobs", 2, {"stopped": argv, "resumed": [*argv, "--resume"]}, patches, codes={"stopped": [75, 75]}
    )
    (line,) = (line for line in stderr(home / "away.jobs", "stopped").splitlines() if "stopped by" in line)
    assert "stopped by SIGTERM after step 2; " in line
    assert [path.name for path in list_checkpoints(home / "away/checkpoints")] == ["step-2", "step-5", "step-6"]


def test_two_processes_end_alike_where_text_cannot_be_read(home):
    broken = home / "broken.jsonl"
    lines = (home / "text.jsonl").read_text().splitlines(keepends=True)
    broken.write_text("".join([*lines[:50], "{broken\n"]))
    argv = command(home, "broken", 2, "--training.steps", "40", source=broken)
    jobs = {"begun": argv, "resumed": [*argv, "--resume"]}
    run_jobs(home / "broken.jobs", 2, jobs, codes={name: [2, 2] for name in jobs})
    last = max(int(path.name.removeprefix("step-")) for path in (home / "broken/checkpoints").glob("step-*"))
    assert last > 0
    for name in jobs:
        told = [(home / f"broken.jobs/{name}.{rank}.err").read_text().splitlines() for rank in range(2)]
        (line,) = (line for line in told[0] if "error: " in line)
        assert "broken.jsonl, line 51 is not one JSON object" in line
        assert line.endswith(f"the last checkpoint, step-{last}, is whole")
        assert not any("error: " in line for line in told[1])
