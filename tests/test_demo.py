import json

import matplotlib.image
import pytest
import torch

import flipproof.demo as demo_module
from flipproof.config import load_config
from flipproof.demo import demo, sweep_p
from flipproof.errors import ConfigError
from flipproof.measure.arms import ARMS
from flipproof.measure.evaluate import fault_seeds, measure_arms


@pytest.fixture
def short(monkeypatch):
    """The demo with its own presets, but a few steps and a little text."""

    def load_short(paths, overrides=None):
        overrides = {section: dict(values) for section, values in (overrides or {}).items()}
        overrides.setdefault("training", {}).update(steps=3, seq_len=32, local_batch_size=4)
        overrides.setdefault("data", {}).update(max_tokens=30_000)
        overrides.setdefault("eval", {}).update(trials=2, num_samples=4)
        return load_config(paths, overrides)

    monkeypatch.setattr(demo_module, "load_config", load_short)
    monkeypatch.setattr(demo_module, "_SWEEP_FACTORS", (0.25, 1))
    monkeypatch.setattr(demo_module, "_SWEEP_SAMPLES", 4)


def test_the_demo_leaves_what_it_says(short, tmp_path, capsys):
    run = tmp_path / "demo"
    demo(run)
    out = capsys.readouterr().out
    arms = json.loads((run / "results.json").read_text())["arms"]
    assert list(arms) == ["clean", "guard", "flipped", "control", "control_clean", "recovered", "recovered_clean"]
    assert "control − recovered" in out
    told = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    one, guards = (json.loads((run / name / "results.json").read_text()) for name in ("threshold", "guards"))
    rows = {"clean": one["arms"]["clean"], "flipped": one["arms"]["flipped"], "guarded": guards["arms"]["flipped"]}
    rows |= {"hardened": arms["flipped"]} | {name: arm for name, arm in arms.items() if name[:3] in ("con", "rec")}
    assert [name for name in told if name in ARMS] == list(rows)
    for name, arm in rows.items():
        assert f"{arm['perplexity']:.4g}" in told[name]
    assert arms["clean"]["loss"] == pytest.approx(one["arms"]["clean"]["loss"], abs=1e-5)  # the same function
    assert (one["bitflip"]["guards"], guards["bitflip"]["w_zero_out_t"]) == (None, None)
    image = matplotlib.image.imread(run / "perplexity_vs_p.png")
    assert image.shape[0] > 400
    assert len({tuple(pixel) for row in image[::10] for pixel in row[::10]}) > 3
    samples = (run / "samples.txt").read_text()
    assert all(f"[{name}]" in samples for name in ("clean", "flipped", "hardened", "control", "recovered"))
    for name in (
        "guards/guards.safetensors",
        "hardened/guards.safetensors",
        "model/guards.safetensors",
        "adapter/adapter_model.safetensors",
        "model/model.safetensors",
        "base/model/model.safetensors",
    ):
        assert (run / name).exists()
    with pytest.raises(ConfigError, match="holds a run already"):
        demo(run)


def test_what_cannot_be_written_is_told_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a directory"):
        demo(tmp_path / "file" / "demo")
    (tmp_path / "demo" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"demo/model exists already; name another directory with --run-dir"):
        demo(tmp_path / "demo")


def test_the_sweep_at_the_configs_own_rate_is_the_arm_itself(tiny_llama):
    import numpy as np

    import flipproof
    from flipproof.data.sequences import PackedText

    config = load_config(["demo"])
    model = tiny_llama().to(torch.bfloat16)
    flipproof.inject(model, config.bitflip, config.lora)
    text = PackedText(np.random.default_rng(0).integers(0, 256, (4, 32), dtype=np.int32), "random")
    points = sweep_p(config, model, text)
    seeds = fault_seeds(config.bitflip.base_seed, demo_module._SWEEP_TRIALS)
    arms = measure_arms(model, ("flipped",), text, seeds=seeds, num_samples=4, batch_size=4)
    assert points[config.bitflip.w_p_exp]["flipped"] == arms["flipped"]
    assert list(points[config.bitflip.w_p_exp]) == ["flipped", "recovered"]
    assert list(points) == sorted(points)
