"""Validation while training against the final evaluation, and against a run that is not validated."""

import json
from dataclasses import replace

import preloaded
import pytest
import sharded_jobs
import torch
from tiny_runs import assert_same_run, metrics, settings, train_until_crash, weights

import flipproof.train.loop as loop
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure.evaluate import evaluate
from flipproof.train.checkpoint import best_checkpoint, list_checkpoints
from flipproof.train.export import export
from flipproof.train.loop import train
from flipproof.train.metrics import Trackers
from flipproof.train.validation import Validation

KEYS = {"step", "eval_loss_flipped", "eval_loss_clean", "blake2b"}


def validated(base, run_dir, keep_best=False, keep_last=2, **training):
    config = settings(base, run_dir, **{"eval_freq": 2, **training})
    return replace(config, checkpoint=replace(config.checkpoint, keep_best=keep_best, keep_last=keep_last))


def split(run_dir):
    """(lines of steps, lines of validations)."""
    lines = metrics(run_dir)
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def arms(run_dir):
    return json.loads((run_dir / "results.json").read_text())["arms"]


def names(checkpoints):
    return [path.name for path in list_checkpoints(checkpoints)]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Validated after steps 2, 4 and 6; with a control."""
    directory = tmp_path_factory.mktemp("validated") / "run"
    train(validated(base, directory, control=True))
    return directory


def test_training_is_the_same_to_the_bit_with_and_without(whole, run):
    steps, found = split(run)
    assert steps == split(whole)[0]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert all(line.keys() == KEYS for line in found)
    got, expected = weights(run), weights(whole)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    trained = ("recovered", "recovered_clean")
    assert {name: arms(run)[name] for name in trained} == {name: arms(whole)[name] for name in trained}


def test_each_point_is_what_the_final_evaluation_finds_of_such_a_model(base, run, tmp_path):
    last = split(run)[1][-1]
    assert last["eval_loss_flipped"] == arms(run)["recovered"]["trial_losses"][0]
    assert last["eval_loss_clean"] == arms(run)["recovered_clean"]["loss"]
    # the checkpoint of step 4, exported and measured by itself
    adapter = export(run, tmp_path / "adapter", "adapter", step=4)
    with pytest.raises(ConfigError, match=r"--step 5: .* has checkpoints of steps 4, 6"):
        export(run, tmp_path / "other", step=5)
    found = evaluate(settings(base, run), adapter)
    four = split(run)[1][1]
    assert four["eval_loss_flipped"] == found["recovered"].trial_losses[0] != last["eval_loss_flipped"]
    assert four["eval_loss_clean"] == found["recovered_clean"].loss


def test_the_control_has_validations_of_its_own(run):
    steps, found = split(run / "control")
    assert [line["step"] for line in found] == [2, 4, 6]
    assert found[-1]["eval_loss_flipped"] == arms(run)["control"]["trial_losses"][0]
    assert found[-1]["eval_loss_clean"] == arms(run)["control_clean"]["loss"]
    assert len(steps) == 6


@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_resumed_run_writes_the_same_lines_and_keeps_the_same_checkpoints(base, tmp_path, at):
    train(validated(base, tmp_path / "whole", keep_best=True, keep_last=1, eval_freq=3))
    config = validated(base, tmp_path / "crashed", keep_best=True, keep_last=1, eval_freq=3)
    train_until_crash(config, at)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "crashed")
    assert names(tmp_path / "whole/checkpoints") == names(tmp_path / "crashed/checkpoints")


@pytest.mark.parametrize("best", range(1, 7))
def test_the_best_checkpoint_stays_and_is_named(base, tmp_path, monkeypatch, best):
    """Losses that fall to step ``best`` and rise after it, also for a run killed on its way."""
    config = validated(base, tmp_path / "run", keep_best=True, keep_last=1, eval_freq=1, save_freq=0)
    done = []

    def losses(self):
        step = len(done)
        return {"eval_loss_flipped": 2.0 + abs(step - best), "eval_loss_clean": 9.0 - step}

    def rate(training, step):
        done[:] = range(step + 1)
        if step == 4 and "killed" not in kinds:
            kinds.append("killed")
            raise RuntimeError("power cut")
        return 1e-3

    kinds = []
    monkeypatch.setattr(Validation, "losses", losses)
    monkeypatch.setattr(loop, "learning_rate", rate)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config)
    train(config, resume="auto")
    assert names(tmp_path / "run/checkpoints") == sorted({f"step-{best}", "step-6"})
    assert best_checkpoint(tmp_path / "run/checkpoints", 6) == (tmp_path / f"run/checkpoints/step-{best}", 2.0)
    found = json.loads((tmp_path / "run/results.json").read_text())["best"]
    assert found == {"checkpoint": f"step-{best}", "eval_loss": 2.0}


def test_a_model_that_predicts_nothing_is_never_the_best(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Validation, "losses", lambda self: {"eval_loss_flipped": float("inf")})
    train(validated(base, tmp_path / "run", keep_best=True, keep_last=1))
    assert names(tmp_path / "run/checkpoints") == ["step-6"]
    assert "best" not in json.loads((tmp_path / "run/results.json").read_text())
    assert split(tmp_path / "run")[1][0]["eval_loss_flipped"] is None


@pytest.mark.parametrize(
    ("freq", "rows", "epoch", "expected"),
    [
        (0, 4, 10, []),
        (3, 4, 10, [3, 6, 7]),
        ("epoch", 4, 10, [3, 5, 7]),  # after 12, 20 and 28 of 10, 20 and 30
        ("epoch", 4, 100, [7]),
        ("epoch", 10, 10, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_when_it_is_due(freq, rows, epoch, expected):
    config = load_config(
        [], {"training": {"steps": 7, "local_batch_size": rows, "eval_freq": freq}, "model": {"hf_model_path": "m"}}
    )
    validation = Validation(config, (), None, None, type("World", (), {"size": 1}), epoch)
    assert [step for step in range(1, 8) if validation.due(step)] == expected


def test_nothing_is_validated_by_default(whole):
    assert split(whole)[1] == []


@pytest.mark.parametrize("value", [-1, 2.5, "epochs", True])
def test_what_is_no_frequency_is_refused(value):
    with pytest.raises(ConfigError, match=r"training.eval_freq = .*a whole number from 0 .* or 'epoch' is allowed"):
        load_config([], {"model": {"hf_model_path": "m"}, "training": {"eval_freq": value}})


def test_the_best_needs_a_validation(base, tmp_path):
    with pytest.raises(ConfigError, match=r"keep_best = True with training.eval_freq = 0: .* set eval_freq to a"):
        train(validated(base, tmp_path / "run", keep_best=True, eval_freq=0))
    assert not (tmp_path / "run").exists()


def test_without_faults_it_is_the_clean_loss_alone(base, tmp_path):
    config = replace(settings(base, tmp_path / "run", lora_r=0, eval_freq=6), bitflip=load_config([], {
        "model": {"hf_model_path": "m"}}).bitflip)  # fmt: skip
    train(config)
    (line,) = split(tmp_path / "run")[1]
    assert line.keys() == {"step", "eval_loss_clean", "blake2b"}
    assert line["eval_loss_clean"] == arms(tmp_path / "run")["recovered_clean"]["loss"]


def test_trackers_get_the_validations_and_the_final_arms(base, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Trackers, "track", lambda self, step, values: told.append((step, dict(values))))
    train(validated(base, tmp_path / "run", eval_freq=3))
    of_validation = [(step, set(values)) for step, values in told if "eval_loss_clean" in values]
    assert of_validation == [(step, KEYS - {"step", "blake2b"}) for step in (3, 6)]
    expected = {f"arm_loss_{name}": arm["loss"] for name, arm in arms(tmp_path / "run").items()}
    assert told[-1] == (6, expected)
    assert {"arm_loss_recovered", "arm_loss_flipped", "arm_loss_clean"} <= expected.keys()


def test_the_progress_line_shows_it(base, tmp_path, caplog):
    caplog.set_level("INFO", "flipproof")
    train(validated(base, tmp_path / "run", eval_freq=3))
    line = split(tmp_path / "run")[1][0]
    assert (
        f"step 3/6  validation loss {line['eval_loss_flipped']:.4f} flipped, {line['eval_loss_clean']:.4f} clean"
        in caplog.text
    )
    assert "validation every 3 steps and at the last one, on 4 held-out sequences, flips of fault seed 1" in caplog.text


def test_in_two_processes_training_is_the_same_with_and_without(base, tmp_path):
    """Sharded and not, with the control, of which the points are those of its arms again."""
    argvs = {}
    for strategy in ("full_shard", "shard_grad_op", "no_shard"):
        for freq in (0, 1):
            config = settings(base, tmp_path / strategy / str(freq), local_batch_size=1, steps=3, eval_freq=freq,
                              control=strategy == "full_shard")  # fmt: skip
            config = replace(config, parallelism=replace(config.parallelism, sharding_strategy=strategy))
            (tmp_path / f"{strategy}{freq}.toml").write_text(config.to_toml())
            argvs[f"{strategy}{freq}"] = ["train", "--config", str(tmp_path / f"{strategy}{freq}.toml")]
    jobs = sharded_jobs.write_jobs(tmp_path / "jobs", argvs)
    assert preloaded.run_ranks(2, sharded_jobs.work, jobs) == [0, 0]
    for name in argvs:
        said = (tmp_path / f"jobs/{name}.0.err").read_text()
        assert json.loads((tmp_path / f"jobs/{name}.0.json").read_text())["code"] == 0, said
    for strategy in ("full_shard", "shard_grad_op", "no_shard"):
        without, run = tmp_path / strategy / "0", tmp_path / strategy / "1"
        assert split(run)[0] == split(without)[0]
        assert all(torch.equal(tensor, weights(without)[name]) for name, tensor in weights(run).items())
        assert arms(run) == arms(without)
        found = split(run)[1]
        assert [line["step"] for line in found] == [1, 2, 3]
        assert found[-1]["eval_loss_flipped"] == arms(run)["recovered"]["trial_losses"][0]
    control = split(tmp_path / "full_shard/1/control")[1]
    assert control[-1]["eval_loss_flipped"] == arms(tmp_path / "full_shard/1")["control"]["trial_losses"][0]


def test_a_checkpoint_of_a_step_says_what_was_found(base, run):
    """So that the best is known to whoever goes on from there, whatever became of the metrics."""
    for path, line in zip(list_checkpoints(run / "checkpoints"), split(run)[1][1:], strict=True):
        assert json.loads((path / "manifest.json").read_text())["validated"] == line["eval_loss_flipped"]
