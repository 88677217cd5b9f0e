"""Fitting guards, and what they are used for: maxima against those of plain hooks, thresholds against their formula."""

import json
import math
import shutil
from dataclasses import replace

import guards_by_hand
import pytest
import torch
from instructed import rows_of, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flipproof
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.instruct import Encoder
from flipproof.data.samples import read, whole_rows
from flipproof.data.sequences import load_text
from flipproof.data.source import open_source
from flipproof.errors import ConfigError
from flipproof.faults.fault import Fitted
from flipproof.faults.fitted import Guards, read_guards
from flipproof.measure import guards as measure_guards
from flipproof.measure.evaluate import evaluate
from flipproof.measure.guards import fit_guards
from flipproof.models import build
from flipproof.models.load import byte_tokenizer
from flipproof.models.rotate import rotate
from flipproof.sweep.run import sweep
from flipproof.train.loop import train

DOWN = "model.layers.1.mlp.down_proj"
SAMPLES, LENGTH = 80, 64


@pytest.fixture(scope="module")
def model_dir(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("guards") / "model"
    tiny_llama().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def settings(model_dir, **bitflip):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"seq_len": LENGTH, "local_batch_size": 8},
            "data": {"source": "stdlib", "max_tokens": 40_000},
            "eval": {"num_samples": SAMPLES, "trials": 2},
            "bitflip": bitflip,
        },
    )


@pytest.fixture(scope="module")
def fitted(model_dir, tmp_path_factory):
    """(directory, guards by channel)."""
    to = tmp_path_factory.mktemp("fitted")
    return to, fit_guards(settings(model_dir), "channel", to)


@torch.no_grad()
def test_maxima_are_those_that_plain_hooks_see(tiny_llama, model_dir, fitted):
    _, guards = fitted
    model, seen = tiny_llama(), {}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}

    def look(name):
        def hook(_module, args, y):
            for key, values in ((f"{name}/x", args[0]), (f"{name}/y", y)):
                largest = values.abs().flatten(0, -2).amax(0)
                seen[key] = torch.maximum(seen.get(key, largest), largest)

        return hook

    for name, module in linear.items():
        module.register_forward_hook(look(name))
    text, _ = load_text(settings(model_dir).data, byte_tokenizer(), LENGTH)
    for i in range(SAMPLES):  # as evaluation spreads them over the text
        model(text.batch([i * len(text) // SAMPLES]).ids)
    inputs = {name: maxima for name, maxima in guards.maxima.items() if name.endswith("/x")}
    assert inputs.keys() == {f"{name}/x" for name in linear}
    for name, maxima in inputs.items():
        torch.testing.assert_close(maxima, seen[name], rtol=1e-5, atol=1e-6)  # batches add up otherwise
    for name, module in linear.items():
        if name != "lm_head":
            assert torch.equal(guards.maxima[f"{name}/w"], module.weight.abs().amax(1, keepdim=True))
    table = model.get_input_embeddings().weight
    assert torch.equal(guards.maxima["model.embed_tokens/w"], table.abs().amax(1, keepdim=True))
    # values are what v_proj gives; keys are rotated by position
    values = seen["model.layers.0.self_attn.v_proj/y"]
    torch.testing.assert_close(guards.maxima["model.layers.0.self_attn/v"].flatten(), values, rtol=1e-5, atol=1e-6)
    assert guards.maxima["model.layers.0.self_attn/k"].shape == guards.maxima["model.layers.0.self_attn/v"].shape
    assert guards.texts == ({"source": "stdlib", "tokens": SAMPLES * LENGTH},)


@pytest.mark.parametrize("packing", [True, False])
@torch.no_grad()
def test_maxima_are_of_real_tokens_alone(tiny_llama, model_dir, tmp_path, monkeypatch, packing):
    """Against hooks that see each sample by itself, as the tokenizer has it. The token that pads is made a huge one."""
    model, count = tiny_llama(), 60
    pad = byte_tokenizer().pad_token_id
    model.get_input_embeddings().weight[pad] *= 100
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    path = write_rows(tmp_path / "rows.jsonl", rows_of("prompt_completion", count))
    config = settings(tmp_path / "model")
    config = replace(config, data=replace(config.data, source=str(path), packing=packing, max_tokens=None))
    with pytest.raises(ConfigError, match=r"are fitted to (\d+) tokens without padding; at least 4,096") as told:
        fit_guards(config, "channel", tmp_path / "guards")
    monkeypatch.setattr(measure_guards, "_LEAST_TOKENS", 100)
    guards = fit_guards(config, "channel", tmp_path / "guards")

    seen, tokens = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _m, args, _y, name=name: seen.setdefault(name, []).append(args[0].abs().flatten(0, -2).amax(0))
            )
    text, _ = load_text(config.data, byte_tokenizer(), LENGTH)
    encoder = Encoder("prompt_completion", byte_tokenizer(), (), None, True)
    for sample in read(whole_rows(open_source(str(path), "text")), "training", encoder):
        model(torch.from_numpy(sample.ids)[None].long())
        tokens += len(sample.ids)
    assert text.about.samples == len(seen[DOWN])
    assert tokens < 0.6 * len(text) * LENGTH if not packing else tokens < len(text) * LENGTH
    assert guards.texts[0]["tokens"] == tokens
    assert f"{tokens:,} tokens without padding" in str(told.value)
    for name, maxima in seen.items():
        if name != "lm_head":  # which is not asked about the last token
            expected = torch.stack(maxima).amax(0)
            torch.testing.assert_close(guards.maxima[f"{name}/x"], expected, rtol=1e-5, atol=1e-6)


def test_the_file_is_what_was_fitted_and_coarser_ones_follow_from_it(fitted):
    to, guards = fitted
    read = read_guards(str(to))
    assert read.maxima.keys() == guards.maxima.keys()
    assert all(torch.equal(read.maxima[name], maxima) for name, maxima in guards.maxima.items())
    assert (read.by, read.dtype, read.basis, read.texts) == ("channel", "float32", None, guards.texts)
    maxima = guards.maxima[f"{DOWN}/x"]
    next_up = torch.tensor(math.inf)
    assert torch.equal(read.thresholds(f"{DOWN}/x", Fitted(None, 1.0, 0.0)), maxima.nextafter(next_up))
    assert torch.equal(read.thresholds(f"{DOWN}/x", Fitted("channel", 2.0, 0.0)), (2 * maxima).nextafter(next_up))
    assert torch.equal(read.thresholds(f"{DOWN}/x", Fitted("layer", 2.0, 0.0)), (2 * maxima.max()).nextafter(next_up))
    of_all = max(float(one.max()) for name, one in guards.maxima.items() if name.endswith("/x"))
    assert read.thresholds(f"{DOWN}/x", Fitted("tensor", 1.0, 0.0)) == torch.tensor(of_all).nextafter(next_up)
    for by in ("layer", "tensor"):
        coarse = guards.coarser(by)
        for name in (f"{DOWN}/x", f"{DOWN}/w", "model.layers.0.self_attn/k"):
            assert torch.equal(
                coarse.thresholds(name, Fitted(None, 1.5, 0.0)), read.thresholds(name, Fitted(by, 1.5, 0.0))
            )
        with pytest.raises(ConfigError, match=f"guards_by = 'channel': .* holds thresholds by {by}"):
            coarse.thresholds(f"{DOWN}/x", Fitted("channel", 1.5, 0.0))


def test_no_channel_counts_for_less_than_the_floor():
    maxima = torch.tensor([0.5, 8.0, 1.0, 2.0, 0.25])
    guards = Guards({"a/x": maxima}, "channel", "m", "float32")
    found = guards.thresholds("a/x", Fitted(None, 2.0, 0.5))  # the third of five
    expected = torch.tensor([2.0, 16.0, 2.0, 4.0, 2.0]).nextafter(torch.tensor(math.inf))
    assert torch.equal(found, expected)
    spec = BitFlipSpec(guards="somewhere", guards_floor=0.25, kv_p_exp=0.1)
    assert (spec.x.fitted.floor, spec.kv.fitted.floor, spec.w.fitted.floor) == (0.25, 0.25, 0.0)


def test_what_was_never_seen_has_no_guard_but_against_infinity():
    guards = Guards({"a/x": torch.zeros(3), "b/x": torch.tensor([0.0, 1.0])}, "channel", "m", "float32")
    assert guards.thresholds("a/x", Fitted(None, 2.0, 0.0)).tolist() == [math.inf] * 3
    t = guards.thresholds("b/x", Fitted(None, 2.0, 0.0))
    assert 0 < t[0] < 1e-40
    assert t[1] > 2


@torch.no_grad()
def test_a_model_behind_its_guards(tiny_llama, fitted):
    """What was seen passes; by hand, a layer zeroes what its channel has not seen."""
    to, guards = fitted
    model = tiny_llama()
    ids = torch.arange(40)[None]
    clean = model(ids).logits
    p = {f"{operand}_p_{bits}": 1e-3 for operand in "wx" for bits in ("exp", "frac")}
    flipproof.inject(model, BitFlipSpec(guards=str(to), x_margin=1.0, w_margin=1.0, guards_floor=0, kv_p_exp=1e-3, **p))
    with flipproof.faults(model, flips=False):
        model(ids)
    layer = model.get_submodule(DOWN)
    x = torch.randn(2, 5, layer.in_features)
    maxima = guards.maxima[f"{DOWN}/x"]
    with flipproof.faults(model, flips=False):
        y = layer(x)
    kept = x.masked_fill(~(x.abs() <= maxima), 0)
    assert torch.equal(y, torch.nn.functional.linear(kept, layer.weight, layer.bias))
    assert not torch.equal(kept, x)
    assert "thresholds" in repr(layer)
    # other faults by layer, and none
    flipproof.set_faults(model, BitFlipSpec(guards=str(to), guards_by="layer", x_margin=1.0, **p))
    with flipproof.faults(model, flips=False):
        y = layer(x)
    kept = x.masked_fill(~(x.abs() <= maxima.max()), 0)
    assert torch.equal(y, torch.nn.functional.linear(kept, layer.weight, layer.bias))
    flipproof.set_faults(model, BitFlipSpec())
    assert torch.equal(model(ids).logits, clean)


def test_other_text_is_merged(model_dir, fitted, tmp_path):
    to, guards = fitted
    (tmp_path / "text.txt").write_text("Zebras QUIZ jolly foxes, §§ 123.\n\n" * 2000)
    config = settings(model_dir)
    config = load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"seq_len": LENGTH, "local_batch_size": 8},
            "data": {"source": str(tmp_path / "text.txt")},
            "eval": {"num_samples": SAMPLES},
        },
    )
    both = fit_guards(config, "channel", tmp_path / "both", [str(to)])
    alone = fit_guards(config, "channel", tmp_path / "alone")
    for name, maxima in guards.maxima.items():
        assert torch.equal(both.maxima[name], torch.maximum(maxima, alone.maxima[name]))
    assert any(not torch.equal(both.maxima[name], maxima) for name, maxima in guards.maxima.items())
    assert [text["source"] for text in both.texts] == ["stdlib", str(tmp_path / "text.txt")]


def test_what_is_merged_is_known_by_its_weights_not_by_its_path(model_dir, fitted, tmp_path, monkeypatch):
    """A copy, a link and a relative path are the same model."""
    to, guards = fitted
    shutil.copytree(model_dir, tmp_path / "copy")
    (tmp_path / "link").symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    for name in ("copy/", "./copy", "link"):
        again = fit_guards(settings(name), "channel", tmp_path / "to", [str(to)])
        assert again.digest == guards.digest  # it was the same text
        assert again.model == name
        (tmp_path / "to" / "guards.safetensors").unlink()


class ItWasRead(Exception):
    pass


@pytest.mark.parametrize("what", ["weights", "row", "layers", "dtype", "basis", "by", "each other"])
def test_guards_that_do_not_go_together_are_told_before_anything_is_read(
    tiny_llama, model_dir, fitted, tmp_path, monkeypatch, what
):
    to, guards = fitted
    others = guards_by_hand.guards_of(tiny_llama(num_hidden_layers=1)) if what == "layers" else guards
    maxima = dict(guards.maxima)
    small = min((name for name in maxima if name.endswith("_proj/w")), key=lambda name: maxima[name].numel())
    if what in ("weights", "each other"):
        maxima = {name: t * 1.1 if name.endswith("/w") else t for name, t in maxima.items()}
    if what == "row":  # of the smallest weight, and just so
        maxima[small] = maxima[small].index_fill(0, torch.tensor(3), float(maxima[small][3]) * 1.001)
    others = {
        "dtype": replace(guards, dtype="bfloat16"), "basis": replace(guards, basis={"how": "full", "seed": 0}),
        "by": guards.coarser("layer"), "layers": others,
    }.get(what, replace(guards, maxima=maxima))  # fmt: skip
    others.write(tmp_path / "other")
    words = {
        "weights": r"--merge: .*other.* was fitted to another model, .*: \d+ layers have other weights here",
        "row": r"--merge: .*other.* was fitted to another model, .*: 1 layers have other weights here",
        "each other": r"other.*: it was fitted to another model, .* differs",
        "layers": r"--merge: .*other.* has no thresholds for model\.layers\.1",
        "dtype": r"--merge: .*other.* was fitted to a model of dtype 'bfloat16'; it is 'float32' here",
        "basis": r"--merge: .*other.* a model of basis 'rotated \(full, seed 0\)'; it is 'not rotated' here",
        "by": r"other.*: guards of by 'layer' do not go with those of by 'channel'",
    }[what]

    def read(*_args, **_more):
        raise ItWasRead

    monkeypatch.setattr(build, "load_model", read)
    monkeypatch.setattr(measure_guards, "load_text", read)
    merge = [str(tmp_path / "other")]
    with pytest.raises(ConfigError, match=words) as raised:
        fit_guards(
            settings(model_dir), "channel", tmp_path / "to", [str(to), *merge] if what == "each other" else merge
        )
    assert len(raised.value.problems) == 1
    assert not (tmp_path / "to").exists()
    with pytest.raises(ItWasRead):
        fit_guards(settings(model_dir), "channel", tmp_path / "to", [str(to)])


def test_bad_input_is_one_line_and_nothing_is_written(tiny_llama, model_dir, fitted, tmp_path, capsys):
    to, _ = fitted
    small = ["--data.source", "stdlib", "--data.max_tokens", "40000", "--training.seq_len", "64"]
    start = ["profile", str(model_dir), *small]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "guards.safetensors").write_bytes((to / "guards.safetensors").read_bytes()[:-100])
    changed = tmp_path / "changed"
    changed.mkdir()
    maxima = load_file(to / "guards.safetensors")
    save_file(maxima, changed / "guards.safetensors")
    for flags, words in (
        (["--guards", "channel"], "--guards: name a directory to write them into with --to"),
        (["--guards", "block", "--to", "x"], "--guards"),
        (["--merge", str(to), "--to", "x"], "--merge is about guards: say --guards, too"),
        (["--guards", "layer", "--to", str(to)], "guards.safetensors exists already"),
        (["--guards", "layer", "--to", "x", "--num-samples", "8"], "guards are fitted to 512 tokens; at least 4,096"),
        (["--guards", "layer", "--to", "x", "--merge", str(damaged)], "damaged, or no guards of flipproof"),
        (
            ["--guards", "layer", "--to", "x", "--merge", str(to), "--num-samples", "80"],
            "guards of by 'channel' do not",
        ),
    ):
        assert main([*start, *flags]) == 2, flags
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        assert words in lines[0]
        assert not (tmp_path / "x").exists()
    for path, words in (
        (tmp_path / "none", r"no guards\.safetensors is there"),
        (damaged, "damaged, or no guards of flipproof"),
        (changed, "the guards or their description are missing"),
    ):
        model = tiny_llama()
        with pytest.raises(ConfigError, match=words):
            flipproof.inject(model, BitFlipSpec(guards=str(path)))
        assert type(model.get_submodule(DOWN)) is torch.nn.Linear
    wider = tiny_llama(intermediate_size=160)
    with pytest.raises(
        ConfigError, match=r"has thresholds of shape .* for model\.layers\.0\.mlp.*; they were fitted on"
    ):
        flipproof.inject(wider, BitFlipSpec(guards=str(to)))
    deeper = tiny_llama(num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"has no thresholds for model\.layers\.2\.self_attn\.q_proj"):
        flipproof.inject(deeper, BitFlipSpec(guards=str(to), w_p_frac=0.1))


def test_guards_of_another_model_dtype_or_basis_are_refused(tiny_llama, model_dir, fitted, tmp_path):
    to, _ = fitted
    p = {"w_p_frac": 1e-3, "guards": str(to)}
    other = tmp_path / "other"
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    with pytest.raises(ConfigError, match=r"was fitted to another model, .*: 100% of the rows of .* are far beyond"):
        evaluate(settings(other, **p))
    with pytest.raises(ConfigError, match="was fitted to a model of dtype 'float32'; it is 'bfloat16' here"):
        evaluate(replace(settings(model_dir, **p), training=replace(settings(model_dir).training, dtype="bfloat16")))
    model = tiny_llama()
    rotate(model, "residual", 0)
    model.save_pretrained(tmp_path / "rotated")
    byte_tokenizer().save_pretrained(tmp_path / "rotated")
    with pytest.raises(ConfigError, match=r"of basis 'not rotated'; it is 'rotated \(residual, seed \d+\)' here"):
        evaluate(settings(tmp_path / "rotated", **p))


def test_a_run_goes_on_behind_the_guards_that_it_was_begun_with(model_dir, fitted, tmp_path):
    _, guards = fitted
    used = tmp_path / "guards"
    guards.write(used)
    argv = [
        "train",
        str(model_dir),
        "--training.seq_len",
        "32",
        "--data.source",
        "stdlib",
        "--data.max_tokens",
        "20000",
    ]
    argv += [
        "--lora.r",
        "2",
        "--eval.num_samples",
        "2",
        "--eval.trials",
        "1",
        "--logging.run_dir",
        str(tmp_path / "run"),
    ]
    argv += ["--bitflip.guards", str(used), "--bitflip.w_p_exp", "1e-3"]
    assert main([*argv, "--training.steps", "1"]) == 0
    kept = read_guards(str(tmp_path / "run"))
    assert kept.digest == guards.digest
    assert json.loads((tmp_path / "run" / "results.json").read_text())["fitted"] == guards.about
    (used / "guards.safetensors").unlink()
    replace(guards, maxima={name: 2 * maxima for name, maxima in guards.maxima.items()}).write(used)
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"not the thresholds that .*run was begun with: .*run/guards\.safetensors has"
    ):
        train(load_config([tmp_path / "run" / "config.toml"], {"training": {"steps": 2}}), resume="auto")
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    # what is named as a model brings its own
    assert main(["eval", str(tmp_path / "run"), "--to", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text())["fitted"] == guards.about


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_weights_that_train_are_not_compared_with_those_that_guards_were_fitted_to(init, model_dir, fitted, tmp_path):
    """From scratch in the model's shape, or away from where it began, by more than any model is near to another."""
    to, guards = fitted
    run = tmp_path / "run"
    argv = [*("train", str(model_dir), "--model.init", init, "--training.seq_len", "32", "--data.source", "stdlib")]
    argv += ["--data.max_tokens", "20000", "--lora.r", "0", "--training.lr", "0.1", "--training.warmup_steps", "0"]
    argv += ["--eval.num_samples", "2", "--eval.trials", "1", "--logging.run_dir", str(run)]
    argv += ["--bitflip.guards", str(to), "--bitflip.w_p_exp", "1e-3"]
    assert main([*argv, "--training.steps", "2"]) == 0
    with pytest.raises(ConfigError, match="fitted to another model"):
        evaluate(settings(run / "model", guards=str(to), w_p_exp=1e-3))
    assert read_guards(str(run)).digest == guards.digest
    assert main(["eval", str(run), "--to", str(tmp_path / "again")]) == 0
    assert main(["train", "--config", str(run / "config.toml"), "--training.steps", "3", "--resume"]) == 0
    assert main([*argv, "--training.steps", "2", "--training.dtype", "bfloat16"]) == 2  # of the same dtype all the same
    # what is written has its own weights' largest values, and is compared
    assert main(["export", str(run), "--to", str(tmp_path / "new")]) == 0
    own = read_guards(str(tmp_path / "new"))
    weight = load_file(tmp_path / "new" / "model.safetensors")[f"{DOWN}.weight"]
    assert torch.equal(own.maxima[f"{DOWN}/w"], weight.abs().amax(1, keepdim=True))
    assert not own.moved


def model_of(path):
    return AutoModelForCausalLM.from_pretrained(path)


def test_eval_and_sweep_use_them(model_dir, fitted, tmp_path, caplog):
    to, _ = fitted
    p = {f"{operand}_p_{bits}": 1e-3 for operand in "wx" for bits in ("exp", "frac")}
    arms = evaluate(settings(model_dir, guards=str(to), **p))
    assert list(arms) == ["clean", "guard", "flipped"]
    config = load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"seq_len": LENGTH, "local_batch_size": 8},
            "data": {"source": "stdlib", "max_tokens": 40_000},
            "eval": {"num_samples": 8},
            "bitflip": {"guards": str(to), "w_zero_out_t": 0.01, "x_zero_out_t": 0.01},
            "sweep": {
                "p": "1e-3",
                "seeds": 1,
                "protection": "none,guard,guard-layer,guard-channel,guard-channel+parity",
            },
        },
    )
    sweep(config, tmp_path / "sweep")
    header = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    # two thresholds for each layer; or one for each row and each feature
    linear = [m for n, m in model_of(model_dir).named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    weights = 32 * sum(module.weight.numel() for module in linear)
    channels = sum(module.in_features + module.out_features for module in linear)
    assert header["overhead"]["guard-channel"] == pytest.approx(32 * channels / weights)
    assert header["overhead"]["guard-layer"] == pytest.approx(32 * 2 * len(linear) / weights)
    assert header["overhead"]["guard-channel+parity"] == pytest.approx(32 * channels / weights + 1 / 32)
    assert header["overhead"]["guard"] == 0  # thresholds that are configured
    alone = {name: one["loss"] for name, one in header["guards"].items()}
    assert list(alone) == ["guard", "guard-layer", "guard-channel"]
    clean = header["clean"]["loss"]
    # the thresholds are far too low, those that were fitted are not
    assert abs(alone["guard"] - clean) > 1e-3
    assert abs(alone["guard-layer"] - clean) < 1e-3
    assert abs(alone["guard-channel"] - clean) < 1e-3
    found = {}
    for file in (tmp_path / "sweep" / "points").iterdir():
        point = json.loads(file.read_text())
        found[point["id"]] = point["loss"]
    assert len(found) == len(set(found.values())) == 5
    # what flips has a guard, or is asked for without
    assert not [line for line in caplog.messages if "without a guard" in line]
