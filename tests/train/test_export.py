import errno
import json
import math
import os
import shutil

import pytest
import torch
from peft import PeftModel
from rounding import assert_same_function
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import flipproof.train.export as export_module
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.faults.spec import LoraSpec
from flipproof.models.load import byte_tokenizer
from flipproof.records import write_toml
from flipproof.train import ending
from flipproof.train.checkpoint import list_checkpoints, load_trained_weights
from flipproof.train.export import export
from flipproof.train.loop import train
from flipproof.train.resume import begun_with


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """A directory with a base model and a run, for reading."""
    directory = tmp_path_factory.mktemp("trained")
    tiny_llama().save_pretrained(directory / "base")
    byte_tokenizer().save_pretrained(directory / "base")
    config = load_config(
        [],
        {
            "model": {"hf_model_path": str(directory / "base")},
            "training": {"seq_len": 32, "local_batch_size": 4, "steps": 4, "lr": 1e-2},
            "lora": {"r": 2},
            "bitflip": {"w_p_frac": 0.05, "x_p_frac": 0.05},
            "data": {"source": "stdlib", "max_tokens": 20_000},
            "eval": {"num_samples": 8, "trials": 2},
            "logging": {"run_dir": str(directory / "run")},
        },
    )
    train(config)
    return directory


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, with its base model beside it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def test_the_exported_model_has_the_perplexity_of_recovered_clean(run, tmp_path):
    from flipproof.data.sequences import load_held_out
    from flipproof.measure.evaluate import mean_loss

    export(run, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = load_config([run / "config.toml"])
    text = load_held_out(config.data, AutoTokenizer.from_pretrained(tmp_path / "model"), 32)
    recorded = json.loads((run / "results.json").read_text())["arms"]["recovered_clean"]["perplexity"]
    expected = torch.tensor(math.log(recorded))
    assert_same_function(expected, lambda: torch.tensor(mean_loss(model, text, 8, 4)[0]), model.parameters())


def test_adapter_and_model_are_the_same_function(run, tmp_path, token_ids):
    export(run, tmp_path / "model")
    export(run, tmp_path / "adapter", "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert_same_function(adapted(token_ids).logits, lambda: merged(token_ids).logits, merged.parameters())


def test_what_is_rotated_at_run_time_is_trained_and_exported_so(tiny_llama, tmp_path):
    from flipproof.config import ModelConfig
    from flipproof.data.sequences import load_held_out
    from flipproof.measure.evaluate import mean_loss
    from flipproof.models.load import load_model
    from flipproof.models.rotate import rotate

    model = tiny_llama()
    rotate(model, "full", 0)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = {
        "model": {"hf_model_path": str(tmp_path / "base")},
        "training": {"seq_len": 32, "local_batch_size": 4, "steps": 4, "lr": 1e-2},
        "lora": {"r": 2},
        "bitflip": {"x_p_frac": 0.05},
        "data": {"source": "stdlib", "max_tokens": 20_000},
        "eval": {"num_samples": 8, "trials": 2},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    config = load_config([], settings)
    train(config)
    export(tmp_path / "run", tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["model_type"] == "flipproof_llama"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = load_held_out(config.data, tokenizer, 32)
    opened = load_model(ModelConfig(hf_model_path=str(tmp_path / "model")), tokenizer, None, 0)
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert mean_loss(opened, text, 8, 4)[0] == pytest.approx(math.log(recorded["recovered_clean"]["perplexity"]))
    assert recorded["recovered_clean"]["perplexity"] < 0.95 * recorded["clean"]["perplexity"]


@pytest.mark.parametrize("rotated", [None, "residual", "full"])
def test_guards_and_basis_come_along(tiny_llama, tmp_path, caplog, rotated):
    """An exported model is measured behind the guards of its run, and so is the run's base behind those of an exported
    adapter; after guards and base of the run have gone. Its config has the basis that the guards are of."""
    from flipproof.faults.fitted import read_guards
    from flipproof.measure.evaluate import evaluate
    from flipproof.measure.guards import fit_guards
    from flipproof.models.rotate import rotate

    model = tiny_llama()
    if rotated:
        rotate(model, rotated, 5)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings = {
        "model": {"hf_model_path": str(tmp_path / "base")},
        "training": {"seq_len": 32, "local_batch_size": 4, "steps": 2, "lr": 1e-3},
        "lora": {"r": 2},
        "data": {"source": "stdlib", "max_tokens": 20_000},
        "eval": {"num_samples": 140, "trials": 2},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    fit_guards(load_config([], settings), "channel", tmp_path / "guards")
    faulty = settings | {"bitflip": {"x_p_frac": 0.05, "guards": str(tmp_path / "guards")}}
    faulty["eval"] = {"num_samples": 8, "trials": 2}
    train(load_config([], faulty))
    shutil.rmtree(tmp_path / "guards")
    with caplog.at_level("INFO", "flipproof"):
        export(tmp_path / "run", tmp_path / "model")
        export(tmp_path / "run", tmp_path / "adapter", "adapter")
    for to in ("model", "adapter"):
        assert f"its guards came along: --bitflip.guards {tmp_path / to}" in caplog.text
        found, trained = (read_guards(str(tmp_path / name)).maxima for name in (to, "run"))
        if to == "model":  # whose weights the adapters have moved
            trained = trained | largest_weights(tmp_path / to, trained)
        assert found.keys() == trained.keys()
        assert all(torch.equal(maxima, trained[name]) for name, maxima in found.items())
    assert ("as a Hugging Face model, which flipproof opens" in caplog.text) == (rotated == "full")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written.get("flipproof_rotation", {"how": None})["how"] == rotated
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    for name, adapter in (("model", None), ("base", tmp_path / "adapter")):
        guards = {"x_p_frac": 0.05, "guards": str(adapter or tmp_path / name)}
        config = load_config([], faulty | {"model": {"hf_model_path": str(tmp_path / name)}, "bitflip": guards})
        found = evaluate(config, adapter)["flipped" if name == "model" else "recovered"]
        assert found.loss == pytest.approx(recorded["recovered"]["loss"], rel=1e-3)  # merged weights are rounded


def largest_weights(directory, names):
    """Name in guards -> the largest value of each row, as the files have it."""
    held = load_file(directory / "model.safetensors")
    keys = {name: f"{name.removesuffix('/w')}.weight" for name in names if name.endswith("/w")}
    return {name: held[key].abs().amax(1, keepdim=True) for name, key in keys.items()}


def test_a_model_far_from_the_one_that_guards_were_fitted_to_is_exported_with_its_own(run, tmp_path, caplog):
    """The run's guards, which are its base model's, no longer fit what strong adapters make of it."""
    from dataclasses import replace

    from guards_by_hand import guards_of

    from flipproof.measure.evaluate import evaluate

    guards_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).write(tmp_path / "guards")
    config = load_config([run / "config.toml"])
    strong = replace(
        config,
        bitflip=replace(config.bitflip, guards=str(tmp_path / "guards")),
        training=replace(config.training, lr=0.3),
        logging=replace(config.logging, run_dir=str(tmp_path / "strong")),
    )
    train(strong)
    # as it may be written by a version that took guards in the place of a threshold
    both = replace(strong, bitflip=replace(strong.bitflip, w_zero_out_t=5.0))
    write_toml(tmp_path / "strong" / "config.toml", both.to_toml())
    was, _ = begun_with(strong, tmp_path / "strong" / "checkpoints" / "step-4")
    assert was.bitflip == strong.bitflip
    export(tmp_path / "strong", tmp_path / "model")

    def behind(guards):
        model = replace(config.model, hf_model_path=str(tmp_path / "model"))
        evaluate(replace(config, model=model, lora=LoraSpec(), bitflip=replace(config.bitflip, guards=str(guards))))

    with pytest.raises(ConfigError, match="was fitted to another model"):
        behind(tmp_path / "strong")
    caplog.clear()
    behind(tmp_path / "model")
    assert not [line for line in caplog.messages if "fitted to other weights" in line]


def test_what_was_trained_wider_than_its_bits_says_how_its_guards_are_used(tiny_llama, tmp_path, caplog):
    from guards_by_hand import guards_of

    from flipproof.measure.evaluate import evaluate

    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    guards_of(model, "bfloat16").write(tmp_path / "guards")
    settings = {
        "model": {"hf_model_path": str(tmp_path / "base")},
        "training": {"seq_len": 32, "local_batch_size": 4, "steps": 1, "mixed_precision_param": "bfloat16"},
        "lora": {"r": 0},
        "bitflip": {"x_p_frac": 0.05, "guards": str(tmp_path / "guards")},
        "data": {"source": "stdlib", "max_tokens": 20_000},
        "eval": {"num_samples": 8, "trials": 2},
        "logging": {"run_dir": str(tmp_path / "run")},
    }
    train(load_config([], settings))
    with caplog.at_level("INFO", "flipproof"):
        export(tmp_path / "run", tmp_path / "model")
    assert f"--bitflip.guards {tmp_path / 'model'} --training.dtype bfloat16" in caplog.text
    own = {"model": {"hf_model_path": str(tmp_path / "model")}, "training": {"seq_len": 32, "dtype": "bfloat16"}}
    own["bitflip"] = settings["bitflip"] | {"guards": str(tmp_path / "model")}
    found = evaluate(load_config([], settings | own | {"lora": {"r": 0}}))["flipped"]
    recorded = json.loads((tmp_path / "run" / "results.json").read_text())["arms"]
    assert found.loss == pytest.approx(recorded["recovered"]["loss"], rel=0.01)


@pytest.mark.parametrize(("kind", "name"), [("model", r"q_proj\.weight"), ("adapter", r"q_proj\.lora_B\.weight")])
def test_what_is_not_finite_is_never_exported(run, tmp_path, monkeypatch, kind, name):
    def load(path, model):
        step = load_trained_weights(path, model)
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.lora_B[0, 1] = math.inf
        return step

    monkeypatch.setattr(export_module, "load_trained_weights", load)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=rf"step-4 is not finite and is not written: .*layers\.1\.self_attn\.{name}"):
        export(run, tmp_path / "out", kind)
    assert sorted(tmp_path.iterdir()) == before


def test_where_it_cannot_write_it_says_so_before_it_loads(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "build_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for to, words in ((tmp_path / "file/out", "not a directory"), (tmp_path / "link", "exists already")):
        with pytest.raises(ConfigError, match=words):
            export(run, to)


def test_an_export_that_fails_leaves_nothing_behind(run, tmp_path, monkeypatch):
    """Nor does it meet what another one left."""
    (tmp_path / ".out.unfinished").mkdir()
    before = sorted(tmp_path.iterdir())

    def half(_model, directory, *_):
        (directory / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(ending, "save_model", half)
        for to in (tmp_path / "out", tmp_path / "a" / "b" / "out"):
            with pytest.raises(ConfigError, match=r"--to .*out cannot be written: .*No space left on device"):
                export(run, to)
            assert sorted(tmp_path.iterdir()) == before
    export(run, tmp_path / "out")
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "out"}
    export(run, tmp_path / ("n" * 255))  # as long as a name may be


def test_others_may_read_what_the_umask_lets_them(run, tmp_path):
    before = os.umask(0o027)
    try:
        export(run, tmp_path / "made/model")
        export(run, tmp_path / "made/adapter", "adapter")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "made").rglob("*")}
    assert modes == {0o640, 0o750}


def test_what_cannot_be_exported_is_named_and_nothing_is_written(run, tmp_path):
    def refused(words, *arguments):
        with pytest.raises(ConfigError, match=words):
            export(*arguments)

    refused("exists already", run, tmp_path / "base")
    refused("holds no run", tmp_path / "base", tmp_path / "out")
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    next(checkpoint.glob("*.distcp")).write_bytes(b"")
    refused("distcp is damaged", run, tmp_path / "out")
    checkpoint.rename(run / "checkpoints" / "gone")
    refused("no complete checkpoint", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["int8", "mxfp4", "nvfp4", "nf4"])
def test_a_quantised_export_is_opened_by_transformers_and_by_us(run, tmp_path, token_ids, name):
    """Logits of ``transformers`` with the format's own library, of our model that keeps the codes, and of the merged
    model whose weights are quantised and dequantised by hand."""
    from flipproof.config import ModelConfig
    from flipproof.formats.quantise import dequantise, quantise
    from flipproof.models.load import load_model

    export(run, tmp_path / "merged")
    export(run, tmp_path / name, quantize=name)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    dtype = torch.float32 if name in ("int8", "nf4") else torch.bfloat16  # compressed-tensors' own of the others
    for key, layer in expected.named_modules():
        if isinstance(layer, torch.nn.Linear) and key != "lm_head":
            layer.weight.data = dequantise(quantise(layer.weight.data, name), dtype).float()
    ours = load_model(ModelConfig(hf_model_path=str(tmp_path / name)), byte_tokenizer(), "float32", 0)
    with torch.no_grad():
        logits = expected(token_ids).logits
        close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
        torch.testing.assert_close(ours(token_ids).logits, logits, **close)
        if name != "nf4":  # whose kernel needs rows of a block; tests/formats/test_config.py has it of a wider model
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=dtype).eval()
            torch.testing.assert_close(theirs(token_ids).logits.float(), logits, **close)


@pytest.mark.parametrize(("name", "inputs"), [("int8", "int8"), ("fp8", "fp8")])
def test_an_export_with_quantised_inputs_is_the_same_model_elsewhere(run, tmp_path, token_ids, name, inputs):
    from flipproof.config import ModelConfig
    from flipproof.models.load import load_model

    export(run, tmp_path / "out", quantize=name, quantize_inputs=inputs)
    ours = load_model(ModelConfig(hf_model_path=str(tmp_path / "out")), byte_tokenizer(), "float32", 0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = ours(token_ids).logits
        assert torch.equal(logits, theirs(token_ids).logits)
        for layer in ours.modules():
            if isinstance(layer, torch.nn.Linear) and hasattr(layer, "inputs"):
                assert layer.inputs.name == inputs
                layer.inputs = None
        assert not torch.equal(logits, ours(token_ids).logits)


def test_quantised_inputs_need_weights_that_go_with_them(run, tmp_path):
    for name, problem in (
        (None, "--quantize-inputs int8: the weights are plain"),
        ("mxfp4", "no checkpoint holds mxfp4"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            export(run, tmp_path / "new", quantize=name, quantize_inputs="int8")
        assert len(error.value.problems) == 1
        assert not (tmp_path / "new").exists()


def test_formats_that_no_checkpoint_has_and_groups_that_do_not_divide_are_refused(run, tmp_path):
    for name, kind, problem in (
        ("fp8-e5m2", "model", "no checkpoint holds fp8-e5m2"),
        ("int3", "model", "format = 'int3'"),
        ("int8", "adapter", "--quantize int8: adapters are not quantised"),
        ("int4", "model", "model.layers.0.self_attn.q_proj: int4 has groups of 128 in-features"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            export(run, tmp_path / "new", kind, quantize=name)
        assert len(error.value.problems) == 1
        assert not (tmp_path / "new").exists()
