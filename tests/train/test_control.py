"""The control of a run against runs that know of no control: one without faults, and one that was never stopped."""

import json
import os
import shutil
import signal

import preloaded
import pytest
import sharded_jobs
import torch
from safetensors.torch import load_file
from texts import sentences

import flipproof.train.loop as loop
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure.evaluate import evaluate
from flipproof.models.load import byte_tokenizer
from flipproof.train.loop import train
from flipproof.train.optimizer import learning_rate
from flipproof.train.start import check

FAULTS = {"w_p_exp": 0.001, "w_p_frac": 0.005, "w_zero_out_t": 1.0, "x_p_exp": 0.001, "x_zero_out_t": 64.0}
NAMES = ["clean", "guard", "flipped", "control", "control_clean", "recovered", "recovered_clean"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    home = tmp_path_factory.mktemp("control")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=258, max_position_embeddings=64, bos_token_id=None, eos_token_id=256, **shape)
        )
        for parameter in model.parameters():
            if parameter.dim() == 2:  # large enough that flips cost something
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(home / "base")
    byte_tokenizer().save_pretrained(home / "base")
    (home / "text.txt").write_text(sentences())
    return home


def settings(home, run_dir, faults=FAULTS, lora_r=2, **training):
    small = {"seq_len": 32, "local_batch_size": 2, "steps": 4, "lr": 1e-2, "log_freq": 1, "save_freq": 2}
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(home / "base")},
            "training": small | {"control": True} | training,
            "lora": {"r": lora_r, "lora_alpha": 4},
            "bitflip": faults,
            "data": {"source": str(home / "text.txt"), "max_tokens": 20_000},
            "eval": {"num_samples": 4, "trials": 2},
            "logging": {"run_dir": str(run_dir)},
        },
    )


def weights(directory):
    (file,) = (*directory.glob("adapter/*.safetensors"), *directory.glob("model/*.safetensors"))
    return load_file(file)


def assert_equal_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def results(run):
    return json.loads((run / "results.json").read_text())


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(home):
    """One with a control, which nobody stopped."""
    train(settings(home, home / "run"))
    return home / "run"


def test_the_control_is_the_run_without_faults_to_the_bit(home, run, tmp_path):
    train(settings(home, tmp_path, {}, control=False))
    assert_equal_weights(run / "control", tmp_path)
    assert losses(run / "control") == losses(tmp_path)
    assert "flipped" not in results(tmp_path)["arms"]


def test_where_weights_train_the_control_is_a_model(home, tmp_path):
    train(settings(home, tmp_path / "run", lora_r=0, steps=2))
    train(settings(home, tmp_path / "without", {}, lora_r=0, steps=2, control=False))
    assert_equal_weights(tmp_path / "run/control", tmp_path / "without")
    assert list(results(tmp_path / "run")["arms"]) == NAMES
    # its model, under the same faults
    trained = {"model": {"hf_model_path": str(tmp_path / "run/control/model")}}
    measured = evaluate(load_config([tmp_path / "run/config.toml"], trained))
    assert list(measured["flipped"].trial_losses) == arms_of(tmp_path / "run")["control"]["trial_losses"]


def arms_of(run):
    return results(run)["arms"]


def test_its_arms_are_those_of_its_adapter(home, run):
    config = settings(home, run)
    arms = arms_of(run)
    assert list(arms) == NAMES
    alone = evaluate(config, run / "control/adapter")
    for name, of_control in (("recovered", "control"), ("recovered_clean", "control_clean")):
        assert list(alone[name].trial_losses) == arms[of_control]["trial_losses"]
        assert list(alone[name].sequence_losses) == arms[of_control]["sequence_losses"]
        assert alone[name].trial_losses != tuple(arms[name]["trial_losses"])
    both = evaluate(config, run / "adapter", control=run / "control/adapter")
    assert {name: list(arm.trial_losses) for name, arm in both.items()} == {
        name: arm["trial_losses"] for name, arm in arms.items()
    }


def test_what_training_with_faults_is_worth_is_measured_against_it(run):
    values, arms = results(run), arms_of(run)
    won = arms["control"]["loss"] - arms["recovered"]["loss"]
    assert values["worth"]["cost"] == pytest.approx(won)
    assert values["worth"]["interval"][0] <= won <= values["worth"]["interval"][1]
    assert values["gap_closed"] == pytest.approx(won / (arms["control"]["loss"] - arms["control_clean"]["loss"]))


def test_without_a_control_nothing_is_said_of_it(home, run, tmp_path, capsys):
    config = settings(home, run)
    evaluate(config, run / "adapter", tmp_path / "out", tell=print)
    said = capsys.readouterr().out
    assert "No control was measured (training.control, eval --control)" in said
    assert not {"worth", "gap_closed"} & results(tmp_path / "out").keys()


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_killed_in_its_control_goes_on_there(home, run, tmp_path, monkeypatch, at):
    config, seen = settings(home, tmp_path / "run"), []

    def crash(training, step):
        seen.append(step)
        if len(seen) == 4 + at + 1:
            raise RuntimeError("power cut")
        return learning_rate(training, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    assert list(arms_of(tmp_path / "run")) == [name for name in NAMES if "control" not in name]
    seen.clear()
    monkeypatch.setattr(loop, "learning_rate", crash)
    train(config, resume="auto")
    assert seen == [*range(at - at % 2, 4)]  # of the control alone, from its last checkpoint
    assert (tmp_path / "run/results.json").read_text() == (run / "results.json").read_text()
    assert losses(tmp_path / "run/control") == losses(run / "control")
    assert_equal_weights(tmp_path / "run/control", run / "control")
    # finished, it is neither trained nor measured again
    monkeypatch.setattr(loop, "learning_rate", None)
    monkeypatch.setattr(loop, "measure_config_arms", None)
    train(config, resume="auto")
    assert (tmp_path / "run/results.json").read_text() == (run / "results.json").read_text()


def test_a_finished_run_gets_a_control_later(home, run, tmp_path):
    train(settings(home, tmp_path / "run", control=False))
    assert not (tmp_path / "run/control").exists()
    train(settings(home, tmp_path / "run"), resume="auto")
    assert (tmp_path / "run/results.json").read_text() == (run / "results.json").read_text()


def test_a_run_that_goes_back_or_on_takes_its_control_along(home, run, tmp_path):
    """Back with another learning rate, then on with more steps: as the same was done to a run without faults."""
    shutil.copytree(run, tmp_path / "run")
    train(settings(home, tmp_path / "without", {}, control=False))
    for name, faults, control in (("run", FAULTS, True), ("without", {}, False)):
        train(settings(home, tmp_path / name, faults, control=control, lr=2e-2), resume="step-2")
        train(settings(home, tmp_path / name, faults, control=control, lr=2e-2, steps=6), resume="auto")
    assert losses(tmp_path / "run/control") == losses(tmp_path / "without")
    assert_equal_weights(tmp_path / "run/control", tmp_path / "without")
    assert list(arms_of(tmp_path / "run")) == NAMES


def test_sigterm_in_the_control_names_the_run_that_goes_on(home, tmp_path, monkeypatch):
    seen = []

    def stop(training, step):
        seen.append(step)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(training, step)

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(
        loop.Interrupted, match=f"after step 2; flipproof train --config {tmp_path}/run/config.toml --res"
    ):
        train(settings(home, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run/control/checkpoints").iterdir()] == ["step-2"]


def test_where_nothing_flips_a_run_is_its_own_control(home, tmp_path, caplog):
    caplog.set_level("INFO")
    train(settings(home, tmp_path, {"w_zero_out_t": 1.0}, steps=1))
    assert "nothing flips here, so that the run would be its own control" in caplog.text
    assert not (tmp_path / "control").exists()


def test_a_dry_run_says_what_it_costs(home, tmp_path, caplog):
    caplog.set_level("INFO")
    check(settings(home, tmp_path / "a", control=False))
    assert "takes as much again" not in caplog.text
    check(settings(home, tmp_path / "a"))
    assert "its control, trained without faults, takes as much again (training.control)" in caplog.text


def test_the_command_line_measures_and_writes_texts_with_it(home, run, tmp_path, capsys):
    assert main(["eval", str(run), "--to", str(tmp_path / "again")]) == 0
    assert arms_of(tmp_path / "again") == arms_of(run)
    assert "Training with faults is worth" in capsys.readouterr().out
    assert main(["generate", str(run), "--prompt", "ba do", "--max-new-tokens", "3", "--to", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "generate.json").read_text())["texts"]) == [
        "clean", "guard", "flipped", "control", "recovered"
    ]  # fmt: skip


def test_what_is_no_control_is_refused(home, run, tmp_path, capsys):
    other = settings(home, tmp_path / "other", lora_r=4, steps=1, control=False)
    train(other)
    config = settings(home, run)
    wrong = r"down_proj has r = 4, scaled by 1 there and r = 2, scaled by 2 in .*run/adapter; a control is trained"
    with pytest.raises(ConfigError, match=wrong):
        evaluate(config, run / "adapter", control=tmp_path / "other/adapter")
    with pytest.raises(ConfigError, match=r"--control .*: is compared with the adapter trained with faults; name it"):
        evaluate(config, control=run / "control/adapter")
    asked = ["eval", str(run), "--tasks", "wikitext", "--control", str(run / "control/adapter")]
    assert main(asked) == 2
    assert "--control is about held-out text" in capsys.readouterr().err
    shutil.copytree(run / "control", tmp_path / "left/control")
    with pytest.raises(ConfigError, match=r"holds a run already \(control"):
        train(settings(home, tmp_path / "left"))


def test_in_several_processes_it_is_the_same(home, tmp_path):
    """The run without faults to the bit, sharded or not; and what is finished is left as it is."""
    common, without = settings(home, tmp_path / "run", steps=2), tmp_path / "without.toml"
    (tmp_path / "run.toml").write_text(common.to_toml())
    without.write_text(settings(home, tmp_path / "without", {}, steps=2, control=False).to_toml())
    argvs = {}
    for strategy in ("full_shard", "no_shard"):
        for name in ("run", "without"):
            place = ["--logging.run_dir", f"{tmp_path}/{strategy}/{name}", "--parallelism.sharding_strategy", strategy]
            argvs[f"{strategy}-{name}"] = ["train", "--config", f"{tmp_path}/{name}.toml", *place]
    argvs["again"] = [*argvs["full_shard-run"], "--resume"]
    jobs = sharded_jobs.write_jobs(tmp_path / "jobs", argvs)
    assert preloaded.run_ranks(2, sharded_jobs.work, jobs) == [0, 0]
    for name in argvs:
        said = (tmp_path / f"jobs/{name}.0.err").read_text()
        assert json.loads((tmp_path / f"jobs/{name}.0.json").read_text())["code"] == 0, said
    assert "step 1/2" not in said
    for strategy in ("full_shard", "no_shard"):
        assert_equal_weights(tmp_path / strategy / "run/control", tmp_path / strategy / "without")
        assert losses(tmp_path / strategy / "run/control") == losses(tmp_path / strategy / "without")
        assert list(arms_of(tmp_path / strategy / "run")) == NAMES
