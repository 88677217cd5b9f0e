import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.adapter import save_adapter
from flipproof.config import ConfigError, load_config
from flipproof.data import PackedText
from flipproof.evaluate import Arm, arms_table, evaluate, fault_seeds, gap_closed, mean_loss, measure_arms, t_interval
from flipproof.model import byte_tokenizer

SPEC = BitFlipSpec(w_p_exp=0.01, w_p_frac=0.01, w_zero_out_t=0.06, x_p_exp=0.01, x_zero_out_t=8.0)


@pytest.fixture
def text():
    rng = np.random.default_rng(0)
    return PackedText(rng.integers(0, 256, (7, 24), dtype=np.int32), "random bytes")


def test_loss_is_the_token_weighted_cross_entropy(tiny_llama, text):
    model = tiny_llama().train()
    loss, tokens = mean_loss(model, text, num_samples=7, batch_size=3)  # batches of 3, 3 and 1
    assert model.training
    ids = torch.from_numpy(text.sequences.astype(np.int64))
    with torch.no_grad():
        logits = model.eval()(ids).logits.double()
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    assert loss == pytest.approx(-float(log_p.mean()), abs=1e-6)
    assert tokens == 7 * 23
    some = mean_loss(model, text, num_samples=2, batch_size=5)
    assert some == (pytest.approx(-float(log_p[[0, 3]].mean()), abs=1e-6), 2 * 23)  # spread over the seven


def test_arms_switch_what_they_say(tiny_llama, text):
    model = tiny_llama()
    options = {"seeds": [1, 2, 3], "num_samples": 4, "batch_size": 4}
    clean = mean_loss(model, text, 4, 4)[0]
    flipproof.inject(model, SPEC, LoraSpec(r=2))
    for layer in flipproof.faulty_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    arms = measure_arms(model, ("clean", "guard", "flipped", "recovered", "recovered_clean"), text, **options)
    assert arms["clean"].loss == clean
    assert arms["guard"].loss not in (clean, arms["flipped"].loss)  # this threshold clips clean weights
    assert len(set(arms["flipped"].trial_losses)) == 3
    assert [arm.trials for arm in arms.values()] == [1, 1, 3, 3, 1]
    with flipproof.faults(model, adapters=False, seed=2):
        assert mean_loss(model, text, 4, 4)[0] == arms["flipped"].trial_losses[1]
    flipproof.merge(model)
    assert arms["recovered_clean"].loss == pytest.approx(mean_loss(model, text, 4, 4)[0], rel=1e-6)
    assert measure_arms(model, ("clean",), text, **options)["clean"].loss == pytest.approx(
        arms["recovered_clean"].loss, rel=1e-6
    )


def test_the_interval_is_students_t():
    values = [2.0, 2.5, 1.5, 2.2]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((expected.low, expected.high))
    assert t_interval([1.0]) is None
    assert t_interval([1.0, math.inf]) is None


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """4000 simulated experiments of 5 trials: coverage is Binomial(4000, 0.95); bound at a false alarm of 1e-6."""
    draws = np.random.default_rng(0).normal(3.0, 0.5, (4000, 5))
    covered = sum(low < 3.0 < high for low, high in map(t_interval, draws.tolist()))
    assert stats.binomtest(covered, 4000, 0.95).pvalue > 1e-6


def test_evaluation_seeds_are_never_the_training_seed():
    for base in (0, 7, 2**63 - 2):
        seeds = fault_seeds(base, 5)
        assert len(set(seeds)) == 5
        assert base not in seeds
        BitFlipSpec(base_seed=seeds[-1])


def test_gap_closed():
    arms = {name: Arm.from_losses([loss], 1) for name, loss in (("clean", 1.0), ("flipped", 3.0), ("recovered", 1.5))}
    assert gap_closed(arms) == 0.75
    assert gap_closed({"clean": arms["clean"]}) is None
    assert "flipped" in arms_table(arms)


def test_a_broken_model_has_infinite_perplexity():
    arm = Arm.from_losses([1.0, math.inf], 1)
    assert arm.perplexity == math.inf
    assert Arm.from_dict({"trial_losses": [1.0, None], "tokens": 1}) == arm  # as JSON has it
    assert arm.perplexity_interval is None
    assert "inf" in arms_table({"flipped": arm})


@pytest.fixture
def model_dir(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(model_dir, **bitflip):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"seq_len": 32, "local_batch_size": 4},
            "data": {"source": "stdlib", "max_tokens": 20_000},
            "eval": {"num_samples": 6, "trials": 2},
            "bitflip": bitflip,
        },
    )


def test_evaluate_writes_equal_files_for_equal_runs_and_never_over_one(model_dir, tmp_path):
    config = settings(model_dir, w_p_frac=0.1, x_p_frac=0.1)
    arms = evaluate(config, to=tmp_path / "one")
    evaluate(config, to=tmp_path / "two")
    one = (tmp_path / "one" / "results.json").read_text()
    assert one == (tmp_path / "two" / "results.json").read_text()
    results = json.loads(one)
    assert list(results["arms"]) == ["clean", "guard", "flipped"]
    assert results["arms"]["flipped"]["loss"] == arms["flipped"].loss
    assert results["dtype"] == "float32"
    assert results["fault_seeds"] == [1, 2]
    with pytest.raises(ConfigError, match="exists already"):
        evaluate(config, to=tmp_path / "one")


def test_evaluate_without_faults_measures_the_clean_arm_alone(model_dir):
    assert list(evaluate(settings(model_dir))) == ["clean"]


def test_evaluate_an_adapter(model_dir, tmp_path, tiny_llama):
    model = tiny_llama()
    flipproof.inject(model, SPEC, LoraSpec(r=2))
    save_adapter(model, tmp_path / "adapter", None)
    arms = evaluate(settings(model_dir, w_p_frac=0.1), adapter=tmp_path / "adapter")
    assert arms["recovered"].trial_losses == arms["flipped"].trial_losses  # B is still zero
    other = tiny_llama(intermediate_size=96)
    flipproof.inject(other, SPEC, LoraSpec(r=2))
    save_adapter(other, tmp_path / "other", None)
    with pytest.raises(ConfigError, match=r"does not fit this model: .*down_proj.*shape"):
        evaluate(settings(model_dir, w_p_frac=0.1), adapter=tmp_path / "other")
