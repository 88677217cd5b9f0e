import json
import shutil
import weakref
from dataclasses import replace

import pytest
from quantised_models import checkpoint

from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.formats.spec import FORMATS
from flipproof.measure.evaluate import evaluate
from flipproof.models.load import byte_tokenizer
from flipproof.records import unsealed
from flipproof.sweep import run as sweep_run
from flipproof.sweep.formats import by_format, with_share_of_budget
from flipproof.sweep.run import sweep

GUARDS = {"w_zero_out_t": 0.5, "w_scale_zero_out_t": 0.05}


@pytest.fixture(scope="module")
def model_dir(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("formats") / "model"
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def settings(model_dir, bitflip=None, model=None, training=None, **table):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir), **(model or {})},
            "training": {"seq_len": 32, "local_batch_size": 2, **(training or {})},
            "data": {"source": "stdlib", "max_tokens": 20_000},
            "eval": {"num_samples": 4, "trials": 2},
            "bitflip": bitflip or {},
            "sweep": table,
        },
    )


def points(directory):
    """(format, site, protection, p, seed) -> loss."""
    found = {}
    for path in directory.glob("*/points/*.json"):
        point = json.loads(path.read_text())
        key = (path.parts[-3], point["sites"], point["protection"], point["p"], point["seed"])
        found[key] = point["loss"]
    return found


ALL = ["bf16", *FORMATS]
SCALES = {"w_scale_p_exp": 1e-3, "w_scale_p_frac": 1e-3}


@pytest.mark.parametrize(
    ("format", "site", "protection", "keys"),
    [
        ("bf16", "w", "none", {"w_p_exp": 1e-3, "w_p_frac": 1e-3}),
        ("bf16", "w", "guard", {"w_p_exp": 1e-3, "w_p_frac": 1e-3, "w_zero_out_t": 0.5}),
        ("bf16", "w", "secded", {"w_p_exp": 1e-3, "w_p_frac": 1e-3, "w_protection": "secded"}),
        ("int8", "w", "none", {"w_code_p": 1e-3} | SCALES),
        ("int8", "w", "guard", {"w_code_p": 1e-3} | SCALES | GUARDS),
        ("int8", "code", "none", {"w_code_p": 1e-3}),
        ("int8", "scale", "guard", SCALES | GUARDS),
        ("int4-asym", "w", "secded", {"w_code_p": 1e-3, "w_zero_p": 1e-3, "w_protection": "secded"} | SCALES),
        ("mxfp4", "w", "none", {"w_code_p": 1e-3, "w_scale_p_exp": 1e-3}),
        ("nvfp4", "w", "none", {"w_code_p": 1e-3, "w_global_p": 1e-3} | SCALES),
        ("nf4", "scale", "none", {"w_scale_p_exp": 1e-3}),
    ],
)
def test_a_point_is_what_eval_says_of_the_same_config(swept, model_dir, format, site, protection, keys):
    """To the last digit, and of the clean model, too."""
    plain = {"dtype": "bfloat16"}
    config = settings(model_dir, keys, {} if format == "bf16" else {"quantize": format}, plain)
    arms = evaluate(config)
    found = points(swept)
    own = [found[format, site, protection, 1e-3, seed] for seed in (1, 2)]
    assert [float("inf") if loss is None else loss for loss in own] == list(arms["flipped"].trial_losses)
    header = unsealed((swept / format / "sweep.json").read_text())
    assert header["clean"]["loss"] == arms["clean"].loss
    if protection == "guard":
        assert header["guard"]["loss"] == arms["guard"].loss


def config_of_all(model_dir, formats=ALL):
    return settings(model_dir, GUARDS, formats=formats, p="1e-5,1e-3", seeds=2, protection="none,guard,secded")


@pytest.fixture(scope="module")
def swept(model_dir, tmp_path_factory):
    to = tmp_path_factory.mktemp("swept") / "all"
    sweep(config_of_all(model_dir), to)
    return to


def test_the_grid_is_the_product(swept):
    """bf16 has no codes and scales."""
    assert unsealed((swept / "formats.json").read_text())["formats"] == ALL
    assert len(points(swept)) == 2 * 2 * 3 * (1 + 3 * len(FORMATS))
    for name in ALL:
        header = unsealed((swept / name / "sweep.json").read_text())
        assert header["format"] == ("bfloat16" if name == "bf16" else name)
        assert header["planned"] == 2 * 2 * 3 * (1 if name == "bf16" else 3)
        bits = header["stored_bits"]
        assert header["overhead"] == {"none": 0, "guard": 0, "secded": pytest.approx(0.125)}
        assert bits["secded"]["w"] == pytest.approx(1.125 * bits["none"]["w"])
        assert bits["none"]["w"] >= bits["none"].get("code", 0) + bits["none"].get("scale", 0)
    shapes = 2 * [(128, 128), (64, 128), (256, 128)] + [(128, 256)]  # of a block
    weights = sum(rows * columns for rows, columns in shapes)
    of = {name: unsealed((swept / name / "sweep.json").read_text())["stored_bits"]["none"] for name in ALL}
    assert of["bf16"] == {"w": 16}
    assert of["int8"] == pytest.approx({"w": 8 + 16 * sum(rows for rows, _ in shapes) / weights, "code": 8,
                                        "scale": 16 * sum(rows for rows, _ in shapes) / weights})  # fmt: skip
    assert of["mxfp4"] == {"w": 4.25, "code": 4, "scale": 0.25}


def test_what_is_left_is_measured_and_more_formats_join(swept, model_dir, tmp_path):
    """A start that was stopped, then another with a format more: in the end all is as in one go."""
    to = tmp_path / "stopped"
    sweep(config_of_all(model_dir, "int4"), to)
    shutil.copytree(swept / "bf16", to / "bf16")
    there = sorted((to / "bf16" / "points").iterdir())
    for path in there[::2]:
        path.unlink()
    said = sweep(config_of_all(model_dir, "bf16,int4"), to)
    found = points(to)
    assert found == {key: loss for key, loss in points(swept).items() if key[0] in ("bf16", "int4")}
    assert unsealed((to / "formats.json").read_text())["formats"] == ["int4", "bf16"]
    lines = said.splitlines()
    assert lines[0].split() == ["format", "what", "flips", "protection", "bits/weight", "clean", "1e-05", "0.001"]
    assert [line.split()[:3] for line in lines[1:13]] == [
        *(["int4", what, name] for name in ("none", "guard", "secded") for what in ("all", "codes", "scales")),
        *(["bf16", "all", name] for name in ("none", "guard", "secded")),
    ]
    assert f"{len(found)} of {len(found)} points" in said
    with pytest.raises(ConfigError, match=r"holds another sweep, of sweep\.p = 1e-05, 0\.001; here it is 0\.01"):
        sweep(settings(model_dir, GUARDS, formats="int8", p="1e-2", seeds=2, protection="none,guard,secded"), to)


def fit(model_dir, to, format):
    quantize = [] if format == "bf16" else ["--model.quantize", format]
    text = ["--data.source", "stdlib", "--data.max_tokens", "20000", "--training.seq_len", "32", "--num-samples", "128"]
    argv = ["profile", str(model_dir), *quantize, *text, "--training.dtype", "bfloat16", "--guards", "channel"]
    assert main([*argv, "--to", str(to)]) == 0


def test_each_format_has_guards_of_its_own_where_they_are_there(model_dir, tmp_path):
    """As eval has them, and those of a quantised format are on its scales, too. One file is that of all formats."""
    for name in ("bf16", "int8"):
        fit(model_dir, tmp_path / "guards" / name, name)
    shutil.copy(
        tmp_path / "guards" / "bf16" / "guards.safetensors", tmp_path / "guards"
    )  # of formats without their own
    grid = {"formats": "bf16,int8", "p": "1e-3", "seeds": 2, "protection": "guard-channel", "sites": "w"}
    sweep(settings(model_dir, {"guards": str(tmp_path / "guards")}, **grid), tmp_path / "own")
    sweep(settings(model_dir, {"guards": str(tmp_path / "guards" / "bf16")}, **grid), tmp_path / "one")
    own, one = points(tmp_path / "own"), points(tmp_path / "one")
    all_bits = {"bf16": {"w_p_exp": 1e-3, "w_p_frac": 1e-3}, "int8": {"w_code_p": 1e-3} | SCALES}
    for name, quantize in (("bf16", None), ("int8", "int8")):
        faults = all_bits[name] | {"guards": str(tmp_path / "guards" / name)}
        arms = evaluate(settings(model_dir, faults, {"quantize": quantize}, {"dtype": "bfloat16"}))
        expected = list(arms["flipped"].trial_losses)
        assert [own[name, "w", "guard-channel", 1e-3, seed] for seed in (1, 2)] == expected
        assert ([one[name, "w", "guard-channel", 1e-3, seed] for seed in (1, 2)] == expected) == (name == "bf16")


def test_formats_without_guards_among_others_are_told_before_any_work(model_dir, tmp_path, monkeypatch):
    fit(model_dir, tmp_path / "guards" / "bf16", "bf16")
    monkeypatch.setattr(sweep_run, "build_model", lambda *_: pytest.fail("weights were read"))
    guards = {"guards": str(tmp_path / "guards")}
    config = settings(model_dir, guards, formats="bf16,nf4,int8", p="1e-3", protection="guard-layer")
    words = (
        r"^bitflip\.guards = '.*/guards': has none of nf4, int8; .* --model\.quantize nf4 .* --to .*/guards/nf4 fits"
    )
    with pytest.raises(ConfigError, match=words):
        sweep(config, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_one_model_is_in_memory_at_a_time(model_dir, tmp_path, monkeypatch):
    before, built = [], sweep_run.build_model

    def build(*args):
        assert not [model for model in before if model() is not None]
        model = built(*args)
        before.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sweep_run, "build_model", build)
    sweep(settings(model_dir, formats="bf16,int8,nf4", p="1e-3", seeds=1), tmp_path / "to")
    assert len(before) == 3


def test_each_format_gets_its_share_of_what_is_left(model_dir):
    config = settings(model_dir, formats="bf16,int8,nf4", p="1e-3", budget_minutes=9)
    configs = by_format(config)
    shares = [
        with_share_of_budget(configs[name], configs, name, used_s).sweep.budget_minutes
        for name, used_s in (("bf16", 0), ("int8", 60), ("nf4", 8 * 60))
    ]
    assert shares == [pytest.approx(3), pytest.approx(4), pytest.approx(1)]
    assert with_share_of_budget(configs["nf4"], configs, "nf4", 600).sweep.budget_minutes > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--formats", "int5"], "sweep.formats = 'int5': bf16, int8, int4, int4-asym,"),
        (["--formats", "bf16,int8,bf16"], "sweep.formats = 'bf16,int8,bf16': names bf16 2 times; once is allowed"),
        (
            ["--formats", "bf16", "--bitflip.w_p_exp", "1e-3"],
            "bitflip.w_p_exp = 0.001: sweep.formats = bf16 flips bits",
        ),
        (["--formats", "int8", "--bitflip.w_code_p", "1e-3"], "bitflip.w_code_p = 0.001: sweep.formats = int8 flips"),
        (["--formats", "int8", "--bitflip.x_p_exp", "1e-3"], "bitflip.x_p_exp = 0.001: sweep.formats = int8 flips"),
        (["--formats", "int8", "--model.quantize", "nf4"], "model.quantize = 'nf4': sweep.formats = int8 says how"),
        (
            ["--formats", "int8", "--model.quantize_inputs", "fp8"],
            "model.quantize_inputs = 'fp8': sweep.formats = int8",
        ),
        (["--formats", "bf16", "--training.dtype", "float32"], "training.dtype = 'float32': sweep.formats = bf16, and"),
        (["--formats", "int8,bf16", "--sites", "code"], "sweep.sites = code: bf16 has no codes and scales; add w"),
        (["--formats", "int8", "--sites", "wx"], "sweep.sites = wx: of sweep.formats = int8 only stored weights flip"),
        (["--formats", "int8", "--bits", "exp"], "sweep.bits = exp: sweep.formats = int8 compares whole weights"),
        (["--formats", "int8", "--layers", "block"], "sweep.layers = block: sweep.formats = int8 compares whole"),
        (["--formats", "int8,nf4", "--protection", "tmr-exp"], "nf4: sweep.protection = tmr-exp: bit 'exp': nf4-scale"),
        (["--formats", "bf16,int4", "--protection", "guard"], "the guard needs bitflip.w_zero_out_t"),
        (["--formats", "int8", "--bitflip.w_protection", "secded"], "a sweep takes that from sweep.protection"),
        (["--formats", "bf16,int8", "--to", "model"], "--to model: holds something that is no sweep of formats"),
    ],
)
def test_what_contradicts_is_told_in_a_line_before_any_work(model_dir, tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_run, "build_model", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "model").symlink_to(model_dir)
    argv = ["sweep", "model", "--data.source", "no/such/text.txt", "--training.seq_len", "32", "--p", "1e-3"]
    assert main([*argv, *([] if "--to" in flags else ["--to", "new"]), *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line
    assert not (tmp_path / "new").exists()


def test_groups_that_do_not_divide_are_told_before_any_work(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_run, "build_model", lambda *_: pytest.fail("weights were read"))
    tiny_llama().save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=r"^int4: model\.layers\.0\.self_attn\.q_proj: int4 has groups of 128"):
        sweep(settings(tmp_path / "small", formats="bf16,int4", p="1e-3"), tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_checkpoint_that_is_quantised_already(tiny_llama, tmp_path):
    """Is refused as what formats are made of, and swept as it is."""
    model = tiny_llama(hidden_size=128, intermediate_size=256).bfloat16()
    checkpoint(model, tmp_path / "int4", "gptq", "int4-asym", 32)
    byte_tokenizer().save_pretrained(tmp_path / "int4")
    with pytest.raises(ConfigError, match=r"is quantised already \(gptq\); name the checkpoint that it was made of"):
        sweep(settings(tmp_path / "int4", formats="bf16,int8", p="1e-3"), tmp_path / "to")
    assert not (tmp_path / "to").exists()
    config = settings(tmp_path / "int4", sites="code,w", p="1e-3", seeds="2")
    sweep(config, tmp_path / "own")
    own = [json.loads(path.read_text()) for path in (tmp_path / "own" / "points").iterdir()]
    arms = evaluate(replace(config, bitflip=replace(config.bitflip, w_code_p=1e-3)))
    found = {point["seed"]: point["loss"] for point in own if point["sites"] == "code"}
    assert [found[1], found[2]] == list(arms["flipped"].trial_losses)
    header = unsealed((tmp_path / "own" / "sweep.json").read_text())
    assert header["stored_bits"]["none"] == {"w": 4 + 20 / 32, "code": 4, "scale": 0.5}
