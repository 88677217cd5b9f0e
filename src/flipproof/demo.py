"""The whole story on a small model made here: damage it with bit flips, train it to survive, show it.

Everything goes through the public path that a user's own model takes: ``train`` makes a small Llama from the standard
library's source, ``train`` again gives it adapters that learn under faults, and others that learn without, its control,
``export`` writes what other tools open.
Around that, a table, a plot of perplexity against the flip probability, and a sample of text.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flipproof.config import RunConfig, load_config
from flipproof.data.sequences import PackedText, load_held_out
from flipproof.faults.inject import set_faults
from flipproof.files import check_new, check_writable
from flipproof.log import logger
from flipproof.measure.arms import ARMS, Arm, arms_table
from flipproof.measure.evaluate import adapters_by_arm, arm_faults, arms_of, fault_seeds, measure_arms, wear
from flipproof.models.build import build_model
from flipproof.models.load import load_tokenizer
from flipproof.records import RESULTS, read_record
from flipproof.train.export import export
from flipproof.train.loop import CONTROL, train
from flipproof.train.rundir import check_run_dir
from flipproof.world import join_world

_SWEEP_FACTORS = (2**-4, 2**-3, 2**-2, 2**-1, 1, 2, 4)
"""Flip probabilities of the plot, as multiples of the one trained with."""
_SWEEP_TRIALS, _SWEEP_SAMPLES = 3, 128
_PROMPTS = ("def __init__(self, ", "        return self.", "        raise ValueError(")


def demo(run_dir: Path) -> None:
    """Run the demo into ``run_dir``, which must not hold a run. Raises ConfigError where it does."""
    check_run_dir(run_dir, resume=False)
    check_run_dir(run_dir / "base", resume=False)
    check_writable(run_dir, "--run-dir")
    for name in ("model", "samples.txt", "perplexity_vs_p.png"):
        check_new(run_dir / name, "--run-dir")
    started = time.perf_counter()

    logger.info("1. A small Llama from scratch on the Python standard library's source, without faults")
    train(load_config(["demo-base"], {"logging": {"run_dir": str(run_dir / "base")}}))

    logger.info("2. The same model under bit flips; then adapters that train with them, and without")
    base = str(run_dir / "base" / "model")
    config = load_config(["demo"], {"logging": {"run_dir": str(run_dir)}, "model": {"hf_model_path": base}})
    train(config)
    export(run_dir, run_dir / "model")

    logger.info("3. Perplexity against the flip probability, and a sample of text")
    tokenizer = load_tokenizer(config.model)
    text = load_held_out(config.data, tokenizer, config.training.seq_len)
    with join_world(config.parallelism) as world:
        model = build_model(config, tokenizer, world, config.lora)
    adapters = adapters_by_arm(run_dir / "adapter", run_dir / CONTROL / "adapter")
    points = sweep_p(config, model, text, adapters)
    arms = {name: Arm.from_dict(arm) for name, arm in read_record(run_dir / RESULTS)["arms"].items()}
    plot_sweep(points, arms, config, run_dir / "perplexity_vs_p.png")
    seed = fault_seeds(config.bitflip.base_seed, 1)[0]
    names = [name for name in arms if name == "clean" or ARMS[name].flips]
    samples = sample_texts(model, tokenizer, names, seed, config.training.seq_len, adapters)
    (run_dir / "samples.txt").write_text("\n\n".join(f"[{name}]\n{sample}" for name, sample in samples.items()) + "\n")

    print(f"\n{arms_table(arms)}\n")
    for name, sample in samples.items():
        print(f"--- {name} ---\n{sample}\n")
    written = "results.json, perplexity_vs_p.png, samples.txt, adapter/ and control/adapter/ (PEFT)"
    print(f"{run_dir}: {written}, model/ (Hugging Face)")
    print(f"{time.perf_counter() - started:.0f} s")


def sweep_p(
    config: RunConfig, model: nn.Module, text: PackedText, adapters: Mapping[str, Path] | None = None
) -> dict[float, dict[str, Arm]]:
    """The arms that flip, at multiples of the config's flip probabilities, by the largest of these; all else equal.
    ``adapters``: those of ``adapters_by_arm``."""
    found = arms_of(model, config.bitflip, trained=True, control=bool(adapters))
    names = [name for name in found if ARMS[name].flips]
    points: dict[float, dict[str, Arm]] = {}
    for factor in _SWEEP_FACTORS:
        scaled = {
            name: p * factor
            for name in ("w_p_exp", "w_p_frac", "x_p_exp", "x_p_frac")
            if (p := getattr(config.bitflip, name)) is not None
        }
        set_faults(model, replace(config.bitflip, **scaled))
        here = points[max(scaled.values())] = {}
        for name in names:
            wear(model, name, adapters or {})
            here |= measure_arms(
                model,
                [name],
                text,
                seeds=fault_seeds(config.bitflip.base_seed, _SWEEP_TRIALS),
                num_samples=_SWEEP_SAMPLES,
                batch_size=config.training.local_batch_size,
            )
    set_faults(model, config.bitflip)
    return points


def plot_sweep(points: dict[float, dict[str, Arm]], arms: dict[str, Arm], config: RunConfig, path: Path) -> None:
    """Perplexity against p on logarithmic axes, with 95% intervals, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    for name, colour in zip(next(iter(points.values())), ("#c0392b", "#7d8a2e", "#2471a3"), strict=False):
        measured = [arms_at_p[name] for arms_at_p in points.values()]
        middle = np.array([arm.perplexity for arm in measured])
        bounds = np.array([arm.perplexity_interval or (arm.perplexity,) * 2 for arm in measured])
        style: dict[str, Any] = {"label": ARMS[name].words, "color": colour, "marker": "o", "ms": 4, "lw": 1.5}
        axes.errorbar([*points], middle, yerr=np.abs(bounds.T - middle), capsize=3, **style)
    axes.axhline(arms["clean"].perplexity, color="#555555", ls="--", lw=1, label="clean")
    trained_at = max(value for value in (config.bitflip.w_p_exp, config.bitflip.x_p_exp) if value)
    axes.axvline(trained_at, color="#999999", ls=":", lw=1, label=f"trained at {trained_at:.4g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xlabel("flip probability of sign and exponent bits, weights and activations")
    axes.set_ylabel("perplexity per byte, held-out text")
    axes.set_title("Bit flips in every Linear layer (95% intervals over fault seeds)", fontsize=10)
    axes.grid(alpha=0.25, which="major")
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


@torch.no_grad()
def sample_texts(
    model: Any, tokenizer: Any, names: Sequence[str], seed: int, length: int, adapters: Mapping[str, Path]
) -> dict[str, str]:
    """One line for each prompt, up to ``length`` tokens, sampled with the same random numbers in each of the arms."""
    model.eval()
    samples = {}
    for name in names:
        lines = []
        wear(model, name, adapters)
        with arm_faults(model, name, seed), torch.random.fork_rng():
            torch.manual_seed(0)
            for prompt in _PROMPTS:
                ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_length=length,
                    do_sample=True,
                    temperature=0.6,
                    top_k=50,
                    top_p=0.9,
                    pad_token_id=tokenizer.pad_token_id,
                )
                text = tokenizer.decode(output[0], skip_special_tokens=True)
                lines.append(prompt + text.removeprefix(prompt).split("\n")[0])
        samples[name] = "\n".join(lines)
    return samples
