"""The whole story on a small model made here: damage it with bit flips, protect it, train it to survive, show it.

Everything goes through the public path that a user's own model takes: ``train`` makes a small Llama from the standard
library's source; guards by channel are fitted to it, and to the same model in a rotated basis, as ``harden`` does it;
``train`` gives that one adapters that learn under faults, and others that learn without, its control; ``export`` writes
what other tools open. Each row of the table adds one lever to the row above it.
Around that, a plot of perplexity against the flip probability, and a sample of text.
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
from flipproof.measure.arms import ARMS, Arm, arms_table, in_order
from flipproof.measure.evaluate import (
    adapters_by_arm,
    arm_faults,
    arms_of,
    evaluate,
    fault_seeds,
    measure_arms,
    wear,
)
from flipproof.measure.guards import fit_guards
from flipproof.models.build import build_model
from flipproof.models.layerwise import rotate_into
from flipproof.models.load import load_tokenizer
from flipproof.models.save import new_directory
from flipproof.records import RESULTS, read_record
from flipproof.train.export import export
from flipproof.train.loop import CONTROL, train
from flipproof.train.rundir import check_run_dir
from flipproof.world import join_world

_SWEEP_FACTORS = (2**-5, 2**-4, 2**-3, 2**-2, 2**-1, 1)
"""Flip probabilities of the plot, as multiples of the one trained with."""
_SWEEP_TRIALS, _SWEEP_SAMPLES = 3, 64
_CALIBRATE = 512
"""Sequences that guards are fitted to."""
_CURVES = {
    "flipped": "one threshold for all layers",
    "guarded": "guards by channel",
    "hardened": "hardened: rotated, guards by channel",
    "control": "hardened, trained without flips",
    "recovered": "hardened, trained with flips",
}
_PROMPTS = ("def __init__(self, ", "        return self.", "        raise ValueError(")


def demo(run_dir: Path) -> None:
    """Run the demo into ``run_dir``, which must not hold a run. Raises ConfigError where it does."""
    check_run_dir(run_dir, resume=False)
    check_run_dir(run_dir / "base", resume=False)
    check_writable(run_dir, "--run-dir")
    for name in ("threshold", "guards", "hardened", "model", "samples.txt", "perplexity_vs_p.png"):
        check_new(run_dir / name, "--run-dir")
    started = time.perf_counter()

    logger.info("1. A small Llama from scratch on the Python standard library's source, without faults")
    train(load_config(["demo-base"], {"logging": {"run_dir": str(run_dir / "base")}}))

    logger.info("2. It under bit flips: behind one threshold for all layers, behind guards by channel, and hardened")
    base = str(run_dir / "base" / "model")
    config = load_config(["demo"], {"logging": {"run_dir": str(run_dir)}, "model": {"hf_model_path": base}})
    guarded, hardened = _protected(config, run_dir)
    arms = evaluate(config, to=run_dir / "threshold")
    arms = {"clean": arms["clean"], "flipped": arms["flipped"]}
    arms["guarded"] = evaluate(guarded, to=run_dir / "guards")["flipped"]

    logger.info("3. Adapters of the hardened model that train with bit flips, and without")
    train(hardened)
    export(run_dir, run_dir / "model")
    trained = {name: Arm.from_dict(arm) for name, arm in read_record(run_dir / RESULTS)["arms"].items()}
    arms["hardened"] = trained["flipped"]
    arms |= {name: arm for name, arm in trained.items() if ARMS[name].trained}

    logger.info("4. Perplexity against the flip probability, and a sample of text")
    tokenizer = load_tokenizer(config.model)
    text = load_held_out(config.data, tokenizer, config.training.seq_len)
    adapters = adapters_by_arm(run_dir / "adapter", run_dir / CONTROL / "adapter")
    with join_world(config.parallelism) as world:
        bare, model = build_model(config, tokenizer, world), build_model(hardened, tokenizer, world, config.lora)
    points = _side_by_side(
        {"flipped": sweep_p(config, bare, text, trained=False), "guarded": sweep_p(guarded, bare, text, trained=False)},
        sweep_p(hardened, model, text, adapters),
    )
    batch = config.training.local_batch_size
    alike = measure_arms(bare, ["clean"], text, seeds=(), num_samples=_SWEEP_SAMPLES, batch_size=batch)
    plot_sweep(points, alike["clean"], config, run_dir / "perplexity_vs_p.png")
    seed, length = fault_seeds(config.bitflip.base_seed, 1)[0], config.training.seq_len
    set_faults(bare, config.bitflip)
    samples = sample_texts(bare, tokenizer, ["clean", "flipped"], seed, length, {})
    samples |= sample_texts(model, tokenizer, ["hardened", "control", "recovered"], seed, length, adapters)
    (run_dir / "samples.txt").write_text("\n\n".join(f"[{name}]\n{sample}" for name, sample in samples.items()) + "\n")

    print(f"\n{arms_table(in_order(arms))}\n")
    for name, sample in samples.items():
        print(f"--- {name} ---\n{sample}\n")
    written = "results.json, perplexity_vs_p.png, samples.txt, adapter/ and control/adapter/ (PEFT)"
    print(f"{run_dir}: {written}, guards/, hardened/ and model/ (Hugging Face, with guards)")
    print(f"{time.perf_counter() - started:.0f} s")


def _protected(config: RunConfig, run_dir: Path) -> tuple[RunConfig, RunConfig]:
    """The config of the model behind guards by channel, and of the same in a rotated basis; both are made here."""
    found = []
    hardened = run_dir / "hardened"
    with join_world(config.parallelism) as world, new_directory(hardened, world) as new:
        rotate_into(new, config.model, load_tokenizer(config.model), None, "residual", config.training.seed, world)
    for path, guards in ((config.model.hf_model_path, run_dir / "guards"), (str(hardened), hardened)):
        model = replace(config.model, hf_model_path=path)
        fit_guards(replace(config, model=model, eval=replace(config.eval, num_samples=_CALIBRATE)), "channel", guards)
        bitflip = replace(config.bitflip, guards=str(guards), w_zero_out_t=None, x_zero_out_t=None)
        found.append(replace(config, model=model, bitflip=bitflip))
    return found[0], found[1]


def _side_by_side(
    bare: Mapping[str, Mapping[float, dict[str, Arm]]], hardened: Mapping[float, dict[str, Arm]]
) -> dict[float, dict[str, Arm]]:
    """Sweeps of several models as one: the arm ``flipped`` of each goes by the model's name."""
    return {
        p: {name: points[p]["flipped"] for name, points in {**bare, "hardened": hardened}.items()}
        | {name: arm for name, arm in arms.items() if name != "flipped"}
        for p, arms in hardened.items()
    }


def sweep_p(
    config: RunConfig,
    model: nn.Module,
    text: PackedText,
    adapters: Mapping[str, Path] | None = None,
    trained: bool = True,
) -> dict[float, dict[str, Arm]]:
    """The arms that flip, at multiples of the config's flip probabilities, by the largest of these; all else equal.
    ``adapters``: those of ``adapters_by_arm``."""
    found = arms_of(model, config.bitflip, trained, control=bool(adapters))
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


def plot_sweep(points: dict[float, dict[str, Arm]], clean: Arm, config: RunConfig, path: Path) -> None:
    """Perplexity against p on logarithmic axes, with 95% intervals, and the ``clean`` one, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    for name, colour in zip(
        next(iter(points.values())), ("#c0392b", "#d68910", "#148f77", "#7d8a2e", "#2471a3"), strict=False
    ):
        measured = [arms_at_p[name] for arms_at_p in points.values()]
        middle = np.array([arm.perplexity for arm in measured])
        bounds = np.array([arm.perplexity_interval or (arm.perplexity,) * 2 for arm in measured])
        style: dict[str, Any] = {"label": _CURVES[name], "color": colour, "marker": "o", "ms": 4, "lw": 1.5}
        axes.errorbar([*points], middle, yerr=np.abs(bounds.T - middle), capsize=3, **style)
    axes.axhline(clean.perplexity, color="#555555", ls="--", lw=1, label="clean")
    trained_at = max(value for value in (config.bitflip.w_p_exp, config.bitflip.x_p_exp) if value)
    axes.axvline(trained_at, color="#999999", ls=":", lw=1, label=f"trained at {trained_at:.4g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
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
