"""Runs that distil, against whole logits, runs of other kinds, and ones that were never stopped.

What the loss is: ``tests/models/test_loss.py``; several processes: ``test_sharded_training.py``.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_same_function
from tiny_runs import assert_same_run, metrics, settings, train_until_crash, weights
from transformers import AutoModelForCausalLM

import flipproof
import flipproof.train.step as step_module
from flipproof import BitFlipSpec
from flipproof.train.loop import train

SHARE = 0.6


@pytest.fixture(scope="module")
def distilled(base, tmp_path_factory):
    run = tmp_path_factory.mktemp("distilled") / "run"
    train(settings(base, run, distill=SHARE))
    return run


def test_the_first_step_is_that_of_whole_logits(base, tmp_path, monkeypatch):
    """Loss and gradient norm, the mean of two micro-batches, by ``F.kl_div`` from a model that was never injected."""
    config, seen, loss_of = settings(base, tmp_path / "run", distill=SHARE, steps=1), [], step_module.next_token_loss
    monkeypatch.setattr(
        step_module, "next_token_loss", lambda model, ids, **more: seen.append(ids) or loss_of(model, ids, **more)
    )
    train(config)
    (line,) = metrics(tmp_path / "run")
    clean, student = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    flipproof.inject(student, config.bitflip, config.lora)

    def first_step():
        flipproof.set_tick(student, 0)
        student.zero_grad()
        total = 0.0
        for ids in seen:
            with torch.no_grad():
                taught = clean(ids).logits[:, :-1].flatten(0, 1).double().softmax(1)
            own = student(ids).logits[:, :-1].flatten(0, 1).double()
            divergence = F.kl_div(own.log_softmax(1), taught, reduction="batchmean")
            loss = (1 - SHARE) * F.cross_entropy(own, ids[:, 1:].flatten()) + SHARE * divergence
            (loss / 2).backward()
            total += loss.item() / 2
        gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        return torch.tensor(total), torch.cat(gradients).norm()

    assert len(seen) == 2
    assert_same_function(
        (torch.tensor(line["loss"]), torch.tensor(line["grad_norm"])), first_step, student.parameters()
    )


def test_a_share_of_0_asks_no_teacher(base, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "ask_teacher", None)
    train(settings(base, tmp_path / "run", distill=0.0))
    assert_same_run(whole, tmp_path / "run")


def test_a_run_killed_and_resumed_equals_one_never_killed(base, distilled, whole, tmp_path):
    config = settings(base, tmp_path / "run", distill=SHARE, activation_checkpointing="full")
    train_until_crash(config, 3)
    train(config, resume="auto")
    assert_same_run(distilled, tmp_path / "run")
    assert any(not torch.equal(value, weights(whole)[name]) for name, value in weights(distilled).items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_is_near_float32(base, distilled, tmp_path, dtype):
    """float16 with a loss scale, which is out of the gradients again."""
    train(settings(base, tmp_path / "run", distill=SHARE, steps=1, warmup_steps=0, mixed_precision_param=dtype))
    got, expected = metrics(tmp_path / "run")[0], metrics(distilled)[0]
    assert got["loss"] != expected["loss"]
    assert got["loss"] == pytest.approx(expected["loss"], abs=2e-2)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.2)
    assert got["skipped_steps"] == 0


def test_its_control_is_the_run_without_faults_to_the_bit(base, tmp_path):
    train(settings(base, tmp_path / "run", distill=SHARE, steps=2, control=True))
    train(replace(settings(base, tmp_path / "without", distill=SHARE, steps=2), bitflip=BitFlipSpec()))
    control, without = tmp_path / "run/control", tmp_path / "without"
    assert metrics(control) == metrics(without)
    assert all(torch.equal(value, weights(without)[name]) for name, value in weights(control).items())


def test_without_faults_and_text_there_is_nothing_to_learn(base, tmp_path):
    train(replace(settings(base, tmp_path / "run", distill=1.0, steps=2), bitflip=BitFlipSpec()))
    assert [(line["loss"], line["grad_norm"]) for line in metrics(tmp_path / "run")] == [(0.0, 0.0)] * 2
    assert not any(value.any() for name, value in weights(tmp_path / "run").items() if "lora_B" in name)
