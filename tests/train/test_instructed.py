"""Runs on instruction data, against each sample alone in float64, one process against two, and stopped ones."""

import json
import math
from dataclasses import replace

import pytest
import torch
from instructed import CHAT_TEMPLATE, rows_of, samples_in, tokenizer_with, write_rows
from sharded_runs import curve, run_jobs
from tiny_runs import assert_same_run, metrics, settings, train_until_crash
from transformers import AutoModelForCausalLM

from flipproof import BitFlipSpec
from flipproof.config import DataConfig
from flipproof.data.sequences import load_text
from flipproof.errors import ConfigError
from flipproof.models.tokenizer import byte_tokenizer, load_tokenizer
from flipproof.train.loop import train
from flipproof.train.start import check
from flipproof.train.step import chosen_sequences

LENGTH = {"alpaca": 384, "prompt_completion": 32, "chat": 96}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Rows of each format, a tokenizer with a chat template, and beside it a model without."""
    home = tmp_path_factory.mktemp("instructed")
    for kind in LENGTH:
        write_rows(home / f"{kind}.json", rows_of(kind, 120))
    tokenizer_with(CHAT_TEMPLATE).save_pretrained(home / "tokenizer")
    return home


@pytest.fixture(scope="module")
def base(home, tiny_llama):
    tiny_llama(num_hidden_layers=1, max_position_embeddings=512).save_pretrained(home / "base")
    byte_tokenizer().save_pretrained(home / "base")
    return home / "base"


def instructed(home, base, run, kind="prompt_completion", data=None, **training):
    config = settings(base, run, **{"seq_len": LENGTH[kind], **training})
    return replace(
        config,
        model=replace(config.model, tokenizer=str(home / "tokenizer")),
        data=DataConfig(source=str(home / f"{kind}.json"), **(data or {})),
    )


def alone(model, text, rows):
    """(summed loss of each sample alone, its tokens), with a gradient."""
    part = replace(text, sequences=text.sequences[rows], marks=text.marks[rows])
    for ids, counts in samples_in(part):
        ids, counts = torch.tensor([ids]), torch.tensor(counts)
        logs = model(ids, use_cache=False).logits[0, :-1].log_softmax(1)
        yield -(logs.gather(1, ids[0, 1:, None])[:, 0] * counts[1:]).sum(), int(counts.sum())


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", list(LENGTH))
def test_a_step_and_the_arms_are_those_of_each_sample_alone(home, base, tmp_path, kind, packing):
    """The loss over all tokens of a step's four sequences in two micro-batches, and its gradient; of what is held out
    the loss over all tokens."""
    config = instructed(home, base, tmp_path / "run", kind, {"packing": packing}, steps=1, lora_r=0)
    config = replace(config, bitflip=BitFlipSpec())
    train(config)
    text, held_out = load_text(config.data, load_tokenizer(config.model), config.training.seq_len, needed=4)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    chosen = chosen_sequences([len(text)], config.training.seed, 0, 4)
    losses, tokens = zip(*alone(model, text, chosen), strict=True)
    total = sum(losses) / sum(tokens)
    total.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    (line,) = metrics(tmp_path / "run")
    assert len(losses) > 4 if packing else len(losses) == 4
    assert line["loss"] == pytest.approx(float(total), rel=2e-6)
    assert line["grad_norm"] == pytest.approx(norm, rel=2e-5)

    results = json.loads((tmp_path / "run/results.json").read_text())
    with torch.no_grad():
        used = min(len(held_out), config.eval.num_samples)
        places = torch.arange(used) * len(held_out) // used
        losses, tokens = zip(*alone(model, held_out, places), strict=True)
    clean = results["arms"]["clean"]
    assert clean["loss"] == pytest.approx(float(sum(losses)) / sum(tokens), rel=2e-6)
    assert clean["perplexity"] == pytest.approx(math.exp(clean["loss"]))
    assert clean["tokens"] == sum(tokens)
    assert results["measured_on"]["format"] == results["trained_on"]["format"] == kind
    assert results["trained_on"]["trained_tokens"] == text.about.trained_tokens
    assert results["measured_on"]["samples"] == 12


def test_a_logged_loss_is_the_mean_over_the_tokens_of_its_steps(home, base, tmp_path):
    train(instructed(home, base, tmp_path / "each", steps=3))
    train(instructed(home, base, tmp_path / "all", steps=3, log_freq=3))
    config = instructed(home, base, tmp_path)
    text, _ = load_text(config.data, load_tokenizer(config.model), 32, needed=12)
    chosen = chosen_sequences([len(text)], config.training.seed, 0, 12)
    tokens = text.trained_tokens(chosen).reshape(3, 4).sum(1)
    expected = sum(n * line["loss"] for n, line in zip(tokens.tolist(), metrics(tmp_path / "each"), strict=True))
    assert metrics(tmp_path / "all")[0]["loss"] == pytest.approx(expected / tokens.sum(), rel=1e-12)


def test_a_run_killed_and_resumed_equals_one_never_killed(home, base, tmp_path):
    """With faults, distilled, validated, and logged every other step, so that a checkpoint comes between lines."""
    options = {"distill": 0.5, "eval_freq": 3, "log_freq": 2, "save_freq": 1, "steps": 5}
    train(instructed(home, base, tmp_path / "whole", "chat", **options))
    config = instructed(home, base, tmp_path / "run", "chat", **options)
    train_until_crash(config, 3)
    train(config, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_what_may_not_change_on_resume(home, base, tmp_path):
    run = tmp_path / "run"
    train(instructed(home, base, run, "chat", steps=2))
    tokenizer_with(CHAT_TEMPLATE.replace("'] }}{% if", "'] }}.{% if")).save_pretrained(tmp_path / "other")
    config = instructed(home, base, run, "chat", steps=4)
    other = replace(config, model=replace(config.model, tokenizer=str(tmp_path / "other")))
    unmasked = replace(config, data=replace(config.data, mask_prompt=False))
    for changed, key in ((other, "model.tokenizer"), (unmasked, "data.mask_prompt")):
        with pytest.raises(ConfigError, match=f"--resume: {key} = .*the training text is another") as error:
            train(changed, resume="auto")
        assert len(error.value.problems) == 1


def test_refusals_before_anything_is_trained(home, base, tmp_path):
    chat = instructed(home, base, tmp_path / "run", "chat")
    bare = replace(chat, model=replace(chat.model, tokenizer=str(base)))
    rows = rows_of("chat", 12)
    rows[3]["messages"][1]["role"] = "bot"
    broken = replace(chat, data=DataConfig(source=str(write_rows(tmp_path / "broken.jsonl", rows))))
    for config, said in (
        (bare, "data.format = 'chat': the tokenizer has no chat template"),
        (broken, f"{tmp_path}/broken.jsonl, line 4, message 2: role = 'bot'; system, user"),
    ):
        for begin in (train, check):
            with pytest.raises(ConfigError) as error:
                begin(config)
            (line,) = error.value.problems
            assert line.startswith(said)
            assert "\n" not in line
    check(chat)
    assert not (tmp_path / "run/checkpoints").exists()


def test_two_processes_are_one(home, base, tmp_path):
    """Of which each has other numbers of tokens; without faults, where rounding is all that differs."""
    argvs = {}
    for rows in (2, 4):
        config = instructed(home, base, tmp_path / f"rows{rows}", local_batch_size=rows, steps=3)
        path = tmp_path / f"rows{rows}.toml"
        path.write_text(replace(config, bitflip=BitFlipSpec()).to_toml())
        argvs[rows] = ["train", "--config", str(path)]
        if rows == 4:
            train(replace(config, bitflip=BitFlipSpec()))
    run_jobs(tmp_path / "jobs", 2, {"rows2": argvs[2]})
    got, expected = curve(tmp_path / "rows2"), curve(tmp_path / "rows4")
    assert len(got) == 3
    for one, other in zip(got, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    measured, of_one = (json.loads((tmp_path / f"rows{n}/results.json").read_text())["arms"] for n in (2, 4))
    for name, arm in of_one.items():
        assert measured[name]["loss"] == pytest.approx(arm["loss"], rel=1e-5)
        assert measured[name]["sequence_tokens"] == arm["sequence_tokens"] != []
