"""A hardened model: the same function, opened by plain transformers, and costs that are those of a plain evaluation."""

import json
from functools import partial

import pytest
import torch
from huggingface_hub import ModelCard

import flipproof
import flipproof.harden as harden_module
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.sequences import load_held_out, load_text
from flipproof.files import put_in_place
from flipproof.measure.evaluate import measure_arms
from flipproof.models import save
from flipproof.models.load import byte_tokenizer, load_model

SMALL = [
    *("--data.source", "stdlib", "--data.max_tokens", "100000", "--training.seq_len", "64"),
    *(
        "--training.local_batch_size",
        "16",
        "--num-samples",
        "64",
        "--calibrate",
        "96",
        "--sweep.seeds",
        "2",
        "--p",
        "1e-4,1e-3,3e-3",
    ),
]


@pytest.fixture(scope="module")
def original(tiny_llama, tmp_path_factory):
    """A model with a channel a hundred times as large as others, and gains that are not one."""
    path = tmp_path_factory.mktemp("harden") / "model"
    model = tiny_llama(tie_word_embeddings=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
        model.model.embed_tokens.weight[:, 7] *= 100
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hardened(original, tmp_path_factory):
    to = tmp_path_factory.mktemp("hardened") / "out"
    assert main(["harden", str(original), *SMALL, "--to", str(to)]) == 0
    return to


@torch.no_grad()
def test_plain_transformers_opens_the_same_function(original, hardened):
    from transformers import AutoModelForCausalLM

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (original, hardened))
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    expected = before(ids).logits
    assert (after(ids).logits - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert before.config.tie_word_embeddings
    assert not after.config.tie_word_embeddings
    assert float(after.model.embed_tokens.weight.abs().max()) < float(before.model.embed_tokens.weight.abs().max()) / 3


def test_the_costs_are_those_of_a_plain_evaluation(hardened):
    found = json.loads((hardened / "hardened.json").read_text())
    assert {one["protection"] for one in found["before"]} == {"guard-tensor", "guard-channel"}
    assert {one["protection"] for one in found["after"]} == {"guard-channel"}
    assert [one["p"] for one in found["after"]] == [0.0, 1e-4, 1e-3, 3e-3]
    model_config = load_config([], {"model": {"hf_model_path": str(hardened)}, "data": {"source": "stdlib"}})
    data = load_config([], {"model": {"hf_model_path": "x"}, "data": {"source": "stdlib", "max_tokens": 100_000}}).data
    model = load_model(model_config.model, byte_tokenizer(), None, 0)
    p = {f"{operand}_p_{bits}": 1e-3 for operand in "wx" for bits in ("exp", "frac")}
    flipproof.inject(model, BitFlipSpec(guards=str(hardened), **p))
    text = load_held_out(data, byte_tokenizer(), 64)
    arms = measure_arms(model, ("clean", "guard", "flipped"), text, seeds=(1, 2), num_samples=64, batch_size=16)
    clean = json.loads((hardened / "before" / "sweep.json").read_text())["clean"]["loss"]  # of the model as it was
    assert clean == pytest.approx(arms["clean"].loss, rel=1e-6)
    costs = {one["p"]: one for one in found["after"]}
    assert costs[1e-3]["cost"] == pytest.approx(arms["flipped"].loss - clean, rel=1e-9)
    assert costs[1e-3]["interval"] == pytest.approx([b - clean for b in arms["flipped"].loss_interval])
    assert costs[0.0]["cost"] == pytest.approx(arms["guard"].loss - clean, abs=1e-9)
    results = json.loads((hardened / "results.json").read_text())
    assert results["arms"]["flipped"]["trial_losses"][:2] == pytest.approx(arms["flipped"].trial_losses, rel=1e-9)
    assert (hardened / "report.html").exists()


def test_a_hardened_model_cannot_be_hardened_without_a_word(original, hardened, tmp_path, capsys):
    for argv, words in (
        ([str(original), *SMALL, "--to", str(hardened)], "exists already; name a new directory"),
        ([str(original), *SMALL, "--to", str(tmp_path / "x"), "--rotate", "all"], "--rotate"),
        ([str(hardened), *SMALL, "--to", str(tmp_path / "x")], "rotat"),
        ([str(original), *SMALL, "--to", str(tmp_path / "x"), "--calibrate", "0"], "--calibrate = 0"),
        ([str(original), *SMALL, "--to", str(tmp_path / "x"), "--bitflip.guards", str(hardened)], "fits guards of its"),
        ([str(original), *SMALL, "--to", str(tmp_path / "x"), "--sweep.bits", "sign"], "sweep.bits"),
        ([str(original), *SMALL, "--to", str(tmp_path / "x"), "--calibrate", "8"], "at least 4,096"),
        ([str(original), *SMALL, "--to", str(tmp_path / "x"), "--p", "0,1e-3"], "sweep.p = 0: nothing flips there"),
    ):
        assert main(["harden", *argv]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert words in line
        assert not (tmp_path / "x").exists()


def test_what_was_interrupted_goes_on_where_it_was(original, hardened, tmp_path, monkeypatch, capsys):
    """Killed after each of its parts in turn, and started again: the same numbers, and no part is done twice."""
    to = tmp_path / "out"
    argv = ["harden", str(original), *SMALL, "--to", str(to)]
    done = []
    for name in ("rotate_into", "fit_guards", "sweep", "evaluate", "report"):
        monkeypatch.setattr(harden_module, name, partial(counted, done, name, getattr(harden_module, name)))
    # before guards are fitted, before those of the original, between the sweeps, before the report
    for enough in (1, 2, 4, 7):
        monkeypatch.setattr(harden_module, "_ENOUGH", enough, raising=False)
        assert main(argv) == 130
        assert "the same command goes on" in capsys.readouterr().err
    assert main([*argv, "--calibrate", "80"]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert "holds another hardening, of calibrate = 96; here it is 80" in err
    monkeypatch.delattr(harden_module, "_ENOUGH")
    assert main(argv) == 0
    # sweeps look whether all is measured, and find that it is
    assert done == ["rotate_into", *["fit_guards"] * 2, *["sweep"] * 3, "evaluate", *["sweep"] * 2, "report"]
    out = capsys.readouterr().out
    assert "goes on where it was" in out
    for name in ("hardened.json", "results.json"):
        once, again = ((path / name).read_text().replace(str(path), "") for path in (hardened, to))
        once, again = (json.loads(text) for text in (once, again))
        once.pop("blake2b"), again.pop("blake2b")
        assert once == again
    assert main(argv) == 2  # it is finished
    assert "exists already" in capsys.readouterr().err


def test_a_kill_in_the_instant_of_the_rename_leaves_what_goes_on(original, tmp_path, monkeypatch, capsys):
    argv = ["harden", str(original), *SMALL, "--to", str(tmp_path / "out")]

    def killed_after(new, to, replace):
        put_in_place(new, to, replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "put_in_place", killed_after)
    assert main(argv) == 130
    monkeypatch.undo()
    monkeypatch.setattr(harden_module, "_guard_and_measure", lambda *_: None)
    assert main(argv) == 0
    assert "goes on where it was; the model is rotated" in capsys.readouterr().out


def test_the_directory_says_what_it_is(original, hardened):
    card = (hardened / "README.md").read_text()
    assert f"of `{original}`" in card
    assert set(ModelCard(card).data.tags) >= {"flipproof", "bit-flips"}
    assert "`AutoModelForCausalLM` opens it" in card
    assert "6,144 tokens of stdlib" in card  # 96 x 64
    found = json.loads((hardened / "hardened.json").read_text())
    for one in (*found["before"], *found["after"]):
        assert f"{one['cost']:.4f}".replace("-", "−") in card
    assert "flipproof eval out --bitflip.guards out" in card
    assert 'id="hardening"' in (hardened / "report.html").read_text()


def test_a_model_that_is_rotated_when_it_runs_says_so_to_who_opens_it(original, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    to = tmp_path / "full"
    few = ["--calibrate", "70", "--p", "1e-3", "--sweep.seeds", "1", "--num-samples", "8", "--eval.trials", "1"]
    assert main(["harden", str(original), *SMALL, *few, "--rotate", "full", "--to", str(to)]) == 0
    out, card = capsys.readouterr().out, (to / "README.md").read_text()
    assert "transformers alone does not" in out
    assert "Plain `transformers` does not compute this function" in card
    assert "flipproof_llama" in card
    assert "opens it" not in card.replace("flipproof opens it", "")
    with pytest.raises(ValueError, match="flipproof_llama"):
        AutoModelForCausalLM.from_pretrained(to)
    assert main(["eval", str(to), *SMALL[:6], "--num-samples", "8", "--bitflip.guards", str(to)]) == 0


def test_more_calibration_than_there_is_text_is_said(original, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harden_module, "rotate_into", interrupted)
    argv = [str(original), *SMALL, "--to", str(tmp_path / "x"), "--calibrate", "5000"]
    assert main(["harden", *argv]) == 130
    out = capsys.readouterr().out
    assert "--calibrate = 5000: the text has" in out
    count = int(out.partition("the text has ")[2].partition(" sequences")[0].replace(",", ""))
    config = load_config([], {"model": {"hf_model_path": "x"}, "data": {"source": "stdlib", "max_tokens": 100_000}})
    text, _ = load_text(config.data, byte_tokenizer(), 64)
    assert count == len(text) < 5000
    assert main(["harden", *argv[:-2], "--calibrate", "70"]) == 130
    assert "the text has" not in capsys.readouterr().out


def counted(done, name, real, *args, **how):
    """The real function, which is written down; or Ctrl-C where enough was done."""
    if len(done) == getattr(harden_module, "_ENOUGH", None):
        raise KeyboardInterrupt
    done.append(name)
    return real(*args, **how)


def interrupted(*_, **__):
    raise KeyboardInterrupt
