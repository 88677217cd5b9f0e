import errno
import json
import math
from dataclasses import asdict, replace

import numpy as np
import preloaded
import pytest
import sharded_jobs
import torch
from rounding import ROUNDED, assert_same_function, move_
from scipy import stats
from texts import sentences
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec, LoraSpec, records
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.sequences import PackedText
from flipproof.errors import ConfigError
from flipproof.measure.arms import Arm, Cost, arms_table, costs
from flipproof.measure.evaluate import arms_of, evaluate, fault_seeds, mean_loss, measure_arms
from flipproof.measure.intervals import sure_enough, t_interval
from flipproof.models import loss
from flipproof.models.adapter import save_adapter
from flipproof.models.load import byte_tokenizer
from flipproof.models.loss import LossHead, fuse_loss, loss_by_row, next_token_loss

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
    assert loss == pytest.approx(-float(log_p.mean()), rel=ROUNDED)
    assert tokens == 7 * 23
    some = mean_loss(model, text, num_samples=2, batch_size=5)
    assert some == (pytest.approx(-float(log_p[[0, 3]].mean()), rel=ROUNDED), 2 * 23)  # spread over the seven


@pytest.mark.parametrize("fused", [False, True])
def test_losses_by_row_are_those_of_the_logits(tiny_llama, token_ids, fused, monkeypatch):
    model = tiny_llama().eval()
    with torch.no_grad():
        log_p = model(token_ids).logits.double()[:, :-1].log_softmax(-1).gather(-1, token_ids[:, 1:, None])
    if fused:
        fuse_loss(model)
        assert isinstance(model.get_output_embeddings(), LossHead)
        monkeypatch.setattr(loss, "HELD_LOGITS", 258 * 7)  # 46 tokens in chunks of 7
    got = loss_by_row(model, token_ids)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, -log_p.mean((1, 2)), rtol=ROUNDED, atol=0)
    assert not got.requires_grad
    # the head is as it was: logits, and a loss that trains
    torch.testing.assert_close(next_token_loss(model, token_ids).double(), got.mean(), rtol=ROUNDED, atol=0)
    assert model(token_ids).logits.shape == (2, 24, 258)


def test_an_arm_says_how_seeds_and_sequences_vary(tiny_llama, text):
    """Against losses from logits, one pass and one sequence at a time where the draws allow it: persistent weights."""
    model = tiny_llama()
    flipproof.inject(model, BitFlipSpec(w_p_frac=0.1, w_zero_out_t=4.0, w_faults="persistent"))
    seeds = [3, 1, 4]
    arms = measure_arms(model, ("clean", "flipped"), text, seeds=seeds, num_samples=5, batch_size=2)
    ids = torch.from_numpy(text.sequences[[0, 1, 2, 4, 5]].astype(np.int64))  # 5 of 7, evenly
    table = []
    for seed in seeds:
        with flipproof.faults(model, seed=seed), torch.no_grad():
            log_p = model(ids).logits.double()[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        table.append(-log_p.mean((1, 2)).numpy())
    arm, table = arms["flipped"], np.array(table)
    off = ROUNDED * table.max()  # how far a loss may be: a float32's rounding
    assert arm.trial_losses == pytest.approx(table.mean(1), abs=off)
    assert arm.sequence_losses == pytest.approx(table.mean(0), abs=off)
    assert arm.seed_sd == pytest.approx(np.std(table.mean(1), ddof=1), abs=2 * off)  # of three
    expected = stats.ttest_1samp(table.mean(0), 0).confidence_interval(0.95)
    assert arm.text_interval == pytest.approx(
        (expected.low, expected.high), abs=3 * off
    )  # t of four is 2.8, over sqrt 5
    assert (arm.tokens, arms["clean"].seed_sd) == (5 * 23, None)
    # what two sets of dummy variables leave of the table, by least squares
    rows, columns = np.indices(table.shape).reshape(2, -1)
    dummies = np.concatenate([np.eye(3)[rows], np.eye(5)[columns]], axis=1)
    rest = table.ravel() - dummies @ np.linalg.lstsq(dummies, table.ravel())[0]
    variance = (rest**2).sum() / (2 * 4)
    # the root of it is a norm over sqrt 8, and each of the 15 residuals is off by four losses at most
    assert arm.residual_variance**0.5 == pytest.approx(variance**0.5, abs=4 * off * (15 / 8) ** 0.5)
    assert Arm.from_dict(json.loads(json.dumps(asdict(arm)))) == arm


def test_until_ci_adds_seeds_until_the_perplexity_is_known(tiny_llama, text):
    model = tiny_llama()
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.01, w_p_frac=0.01, w_zero_out_t=0.06))
    options = {"num_samples": 3, "batch_size": 3, "seeds": range(1, 21)}
    every = measure_arms(model, ("flipped",), text, **options)["flipped"].trial_losses
    widths = {n: math.exp(t_interval(every[:n])[1] - np.mean(every[:n])) - 1 for n in range(5, 21)}
    wanted = widths[9] * 1.0001
    stops = next(n for n, width in widths.items() if width <= wanted)
    assert 5 < stops <= 9
    arms = measure_arms(model, ("clean", "flipped"), text, until_ci=wanted, **options)
    assert arms["flipped"].trial_losses == every[:stops]
    assert arms["clean"].trials == 1
    more = measure_arms(model, ("flipped",), text, until_ci=1e9, at_least=7, **options)["flipped"]
    assert more.trial_losses == every[:7]
    assert measure_arms(model, ("flipped",), text, until_ci=1e-9, **options)["flipped"].trial_losses == every
    assert sure_enough([1.0, math.inf, 1.0, 1.0, 1.0], 0.01)  # nothing will make that finite
    assert not sure_enough([1.0] * 4, 0.01)


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
    merged = mean_loss(model, text, 4, 4)[0]
    assert measure_arms(model, ("clean",), text, **options)["clean"].loss == merged
    found = torch.tensor(arms["recovered_clean"].loss)
    assert_same_function(found, lambda: torch.tensor(mean_loss(model, text, 4, 4)[0]), model.parameters())


def test_evaluation_seeds_are_never_the_training_seed():
    for base in (0, 7, 2**63 - 2):
        seeds = fault_seeds(base, 5)
        assert len(set(seeds)) == 5
        assert base not in seeds
        BitFlipSpec(base_seed=seeds[-1])


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
    assert list(results["arms"]) == ["clean", "flipped"]  # without a threshold, no guard
    assert results["arms"]["flipped"]["loss"] == arms["flipped"].loss
    assert results["costs"]["flipped"]["cost"] == arms["flipped"].loss - arms["clean"].loss
    assert results["dtype"] == "float32"
    assert results["fault_seeds"] == [1, 2]
    with pytest.raises(ConfigError, match="exists already"):
        evaluate(config, to=tmp_path / "one")


@pytest.mark.parametrize(
    ("bitflip", "names"),
    [
        ({}, ["clean"]),
        ({"w_p_frac": 0.1, "layer_name_to_config": {".*": {"w_p_frac": 0.0, "x_zero_out_t": 8.0}}}, ["clean", "guard"]),
        ({"w_p_frac": 0.1, "w_zero_out_t": 8.0, "skip_patterns": ["mlp"]}, ["clean", "guard", "flipped"]),
        ({"kv_p_frac": 0.1}, ["clean", "flipped"]),
        ({"kv_zero_out_t": 8.0}, ["clean", "guard"]),
        ({"w_p_row": 0.1, "sites": ["embedding"]}, ["clean", "flipped"]),
        ({"x_p_frac": 0.1, "sites": ["embedding"], "w_zero_out_t": 8.0}, ["clean", "guard"]),  # a table has no inputs
    ],
)
def test_a_model_has_the_arms_of_what_is_faulty_in_it(model_dir, tiny_llama, bitflip, names):
    config = settings(model_dir, **bitflip)
    model = tiny_llama()
    if bitflip:
        flipproof.inject(model, config.bitflip)
    assert list(arms_of(model, config.bitflip, trained=False)) == names


def test_a_run_without_flips_has_no_flipped_arm(model_dir, tmp_path):
    arms = evaluate(settings(model_dir, w_zero_out_t=0.02), to=tmp_path)
    assert list(arms) == ["clean", "guard"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (list(results["arms"]), list(results["costs"])) == (["clean", "guard"], ["guard"])
    assert results["fault_seeds"] == []


def test_a_guard_that_cuts_clean_values_is_warned_of(learned_llama_dir, caplog):
    with caplog.at_level("WARNING", logger="flipproof"):
        evaluate(settings(learned_llama_dir, w_p_frac=0.1, w_zero_out_t=1e3))
        assert not caplog.messages
        arms = evaluate(settings(learned_llama_dir, w_p_frac=0.1, w_zero_out_t=0.03))
    (line,) = caplog.messages
    cost = arms["guard"].loss - arms["clean"].loss
    assert f"the guard alone, before any bit flips, costs {cost:.4g} nats" in line
    assert "bitflip.w_zero_out_t = 0.03 zeroes clean values; flipproof profile" in line


@pytest.mark.parametrize(
    ("training", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "mixed_precision_param": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "mixed_precision_param": "float16"}, "float16"),
    ],
)
def test_the_dtype_is_that_of_the_bits_that_flip(model_dir, tmp_path, training, dtype):
    """In results.json as in the log of what flipped, whose bits say it themselves."""
    config = settings(model_dir, w_p_frac=0.01)
    config = replace(config, training=replace(config.training, **training))
    evaluate(config, to=tmp_path, flip_log=tmp_path / "new" / "flips.jsonl")
    header, *entries = map(json.loads, (tmp_path / "new" / "flips.jsonl").read_text().splitlines())
    mantissa = {"float32": 23, "float16": 10, "bfloat16": 7}[dtype]
    assert max(entry["bit"] for entry in entries) == mantissa - 1
    assert header["dtype"] == json.loads((tmp_path / "results.json").read_text())["dtype"] == dtype
    assert evaluate(config, replay=tmp_path / "new" / "flips.jsonl")["replayed"].trials == 1


def test_what_autocast_does_not_compute_in_is_refused(model_dir):
    config = settings(model_dir, w_p_frac=0.2)
    training = replace(config.training, dtype="bfloat16", mixed_precision_param="float32")
    with pytest.raises(ConfigError, match=r"mixed_precision_param = 'float32': the weights are bfloat16; set training"):
        evaluate(replace(config, training=training))


@pytest.mark.parametrize("flag", ["--to", "--flip-log"])
def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path, capsys, flag):
    (tmp_path / "file").write_text("")
    assert main(["eval", "no/model", "--bitflip.w_p_frac", "0.1", flag, str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file'} is not a directory" in capsys.readouterr().err


def test_what_was_measured_is_printed_though_it_cannot_be_written(model_dir, tmp_path, capsys, monkeypatch):
    """A disk that fills while the model is measured; and a file that somebody else wrote in the meantime."""
    config = settings(model_dir, w_p_frac=0.1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "write_record", full)
    with pytest.raises(ConfigError, match=r"--to: .*results\.json could not be written \(No space left"):
        evaluate(config, to=tmp_path, tell=print)
    assert "flipped" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"results\.json has been written by somebody else since"):
        evaluate(config, to=tmp_path, tell=lambda _: (tmp_path / "results.json").write_text("theirs"))
    assert (tmp_path / "results.json").read_text() == "theirs"


def test_until_ci_is_the_same_in_two_processes(model_dir, tmp_path):
    (tmp_path / "text.txt").write_text(sentences())
    flags = ["--until-ci", "0.001", "--eval.max_trials", "20", "--num-samples", "5", "--training.seq_len", "32",
             "--data.source", str(tmp_path / "text.txt"), "--bitflip.w_p_frac", "0.1",
             "--bitflip.w_zero_out_t", "1", "--bitflip.x_p_frac", "0.1"]  # fmt: skip
    assert main(["eval", str(model_dir), *flags, "--batch-size", "4", "--to", str(tmp_path / "1")]) == 0
    command = ["eval", str(model_dir), *flags, "--batch-size", "2", "--to", str(tmp_path / "2")]
    jobs = sharded_jobs.write_jobs(tmp_path / "jobs", {"two": command})
    assert preloaded.run_ranks(2, sharded_jobs.work, jobs) == [0, 0]
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("1", "2"))
    arm, other = one["arms"]["flipped"], two["arms"]["flipped"]
    assert 5 < arm["trials"] < 20  # else this tells nothing
    assert one["fault_seeds"] == two["fault_seeds"] == list(range(1, 1 + arm["trials"]))
    assert costs({name: Arm.from_dict(each) for name, each in two["arms"].items()}) == {
        name: Cost(each["cost"], tuple(each["interval"])) for name, each in two["costs"].items()
    }
    # as near as weights that are moved in their last places take the losses of one process
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    move_(model.parameters(), seed=0)
    model.save_pretrained(model_dir)
    flags = ["--until-ci", "1e-9", "--eval.max_trials", str(arm["trials"]), *flags[4:]]
    assert main(["eval", str(model_dir), *flags, "--batch-size", "4", "--to", str(tmp_path / "moved")]) == 0
    moved = json.loads((tmp_path / "moved" / "results.json").read_text())["arms"]["flipped"]
    for losses in ("trial_losses", "sequence_losses"):
        allowed = np.abs(np.subtract(moved[losses], arm[losses])).max() + ROUNDED * max(arm[losses])
        assert other[losses] == pytest.approx(arm[losses], rel=0, abs=allowed)


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


def test_a_logged_evaluation_replays(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("All that flips is not lost. " * 400)
    settings = {
        "model": {"hf_model_path": str(tmp_path / "model"), "tokenizer": "bytes"},
        "data": {"eval_source": str(tmp_path / "text.txt")},
        "training": {"seq_len": 32, "local_batch_size": 2},
        "eval": {"trials": 2, "num_samples": 4},
        "bitflip": {"w_p_exp": 1e-3, "w_p_frac": 0.005, "w_zero_out_t": 2.0, "x_p_frac": 0.005, "kv_p_frac": 0.005},
    }
    log = tmp_path / "flips.jsonl.gz"
    first = evaluate(load_config([], settings), flip_log=log)["flipped"].trial_losses[0]
    settings["bitflip"] |= {"base_seed": 40}
    arms = evaluate(load_config([], settings), replay=log)
    assert arms["replayed"].trial_losses == (first,)
    assert first not in arms["flipped"].trial_losses
    assert "from a log" in arms_table(arms)
    with pytest.raises(ConfigError, match=r"flips\.jsonl\.gz exists already"):
        evaluate(load_config([], settings), flip_log=log)
    settings["data"]["eval_source"] = str(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("Other text. " * 400)
    different = evaluate(load_config([], settings), replay=log)["replayed"].trial_losses
    assert different != (first,)  # the log's flips on other text
    settings["eval"] |= {"num_samples": 2}
    with pytest.raises(ConfigError, match=r"in pass 1 was not reached.* same model, faulty sites, text and batch"):
        evaluate(load_config([], settings), replay=log)
