"""The card of a model: the README.md beside its weights, which a hub shows and ``huggingface_hub`` parses.

It says what the weights are, what made them, how to open them and what they bear: the table of arms under the papers'
column names, with what their configs are.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml

from flipproof.config import RunConfig
from flipproof.faults.spec import DEFAULTS, OPERANDS
from flipproof.measure.arms import ARMS, Arm, costs
from flipproof.models.hub import expand

CARD = "README.md"
NOT_THERE = "N/A"
_OF_GUARDS = (*(f"{operand}_zero_out_t" for operand in OPERANDS), "guards")
_UNSAID = {"base_seed", "exact_gradient"}
"""Keys of [bitflip] that do not say what flips."""


def bitflip_config(bitflip: Mapping[str, Any], flips: bool = True) -> str:
    """The keys of ``[bitflip]`` that are not as by default, each as ``key = value``; those of guards alone without
    ``flips``."""
    said = _said(bitflip)
    return ", ".join(f"{key} = {_value(v)}" for key, v in said.items() if flips or key in _OF_GUARDS) or NOT_THERE


def tuning_config(config: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is trained by a run's config, as the papers' tables say it; None where that is not known."""
    if "lora" not in config:
        return None
    if rank := config["lora"].get("r", 0):
        return f"LoRA rank={rank}"
    return "all weights, from scratch" if config.get("model", {}).get("init") == "random" else "all weights"


def configs_of(arm: str, arms: Mapping[str, Arm], config: Mapping[str, Mapping[str, Any]]) -> tuple[str | None, ...]:
    """(Bitflip config, Fine-tune config) of an arm, "N/A" where it has none, None where it is not known: by the tables
    of the config that all arms are of. The demo's are of several."""
    kind = ARMS.get(arm)
    if kind is None or any(name in ARMS and ARMS[name].weights is None for name in arms):
        return None, None
    bitflip = config.get("bitflip")
    flips: str | None = NOT_THERE
    if kind.flips or kind.guard:
        flips = None if bitflip is None else bitflip_config(bitflip, kind.flips)
    return flips, tuning_config(config) if kind.trained else NOT_THERE


def front_matter(base: str | None, library: str, tags: Sequence[str], datasets: Sequence[str] = ()) -> str:
    """The YAML that begins a card. Names are those of the Hub: what is a path is said in the text alone."""
    said: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    if base and _is_hub_name(base):
        said = {"base_model": base, **said}
    if named := [name for name in datasets if "/" in name and _is_hub_name(name)]:
        said["datasets"] = named
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---\n\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells in one line each."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
    )


def run_card(
    config: RunConfig,
    kind: Literal["adapter", "model"],
    name: str,
    results: Mapping[str, Any],
    arms: Mapping[str, Arm],
    steps: int,
    online: bool = False,
) -> str:
    """The card of what a run has trained.

    Args:
        config: of the run.
        kind: what is in the directory.
        name: of the directory, as the commands in the card have it.
        results: what ``results.json`` says besides the arms; may be empty.
        arms: those measured of these weights and their base.
        steps: that were trained.
        online: whether inputs are rotated when the model runs, so that flipproof alone opens it.
    """
    scratch = config.model.init == "random"
    base = config.model.hf_model_path or config.model.flavor or "?"
    is_lora = config.lora.r > 0
    library = "peft" if kind == "adapter" else "transformers"
    tags = ["flipproof", "bit-flips", *(["lora"] if is_lora else [])]
    head = front_matter(None if scratch else base, library, tags, (config.data.source,))
    what = "A LoRA adapter" if kind == "adapter" else "Adapters, merged," if is_lora else "All weights"
    came = f"from scratch in the shape of `{base}`" if scratch else f"of `{base}`"
    under = "under random bit flips" if config.bitflip.any_fault else "without faults"
    return f"""{head}# {name}, trained {under}

{what} {came}, trained with `flipproof train` for {steps:,} steps.

## Opening it

{_opening(config, kind, name, base, online)}

## How it was trained

{markdown_table(["", ""], _facts(config, base, results, steps))}

## What it bears

{_bears(arms, asdict(config), results)}
"""


def _opening(config: RunConfig, kind: str, name: str, base: str, online: bool) -> str:
    said = _said(asdict(config.bitflip)) | ({"guards": name} if config.bitflip.guards else {})
    tables = [key for key, value in said.items() if isinstance(value, Mapping)]
    flags = {f"bitflip.{key}": value for key, value in said.items() if key not in tables}
    flags |= {"training.dtype": config.training.dtype} if config.training.dtype else {}
    model = f"{base} --adapter {name}" if kind == "adapter" else name
    words = [f"--{key} {shlex.quote(_flag(value))}" for key, value in flags.items()]
    command = " ".join([f"flipproof eval {model} --data.source TEXT", *words])
    under = f"To measure it under the faults that it was trained with:\n\n```\n{command}\n```"
    if tables:
        under += f"\n\nThe run had {' and '.join(tables)} besides, which `config.toml` has and no flag."
    if online:
        return f"Its inputs are rotated when it runs: flipproof opens it, `transformers` alone does not. {under}"
    code = f'model = AutoModelForCausalLM.from_pretrained("{base if kind == "adapter" else name}")'
    imports = "from transformers import AutoModelForCausalLM"
    if kind == "adapter":
        imports = f"from peft import PeftModel\n{imports}"
        code += f'\nmodel = PeftModel.from_pretrained(model, "{name}")'
    return f"```python\n{imports}\n\n{code}\n```\n\n{under}"


def _flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _facts(config: RunConfig, base: str, results: Mapping[str, Any], steps: int) -> list[list[str]]:
    lora, training, seeds = config.lora, config.training, results.get("fault_seeds") or []
    tuned = tuning_config(asdict(config)) or ""
    if lora.r:
        where = "every faulty layer" if lora.target_modules is None else ", ".join(lora.target_modules)
        rule = "lora_alpha / √r" if lora.use_rslora else "lora_alpha / r"
        tuned += f", lora_alpha={lora.lora_alpha:g} ({rule}), dropout={lora.dropout:g}, on {where}"
    facts = [
        ["base model", f"`{base}`"],
        ["data", f"`{config.data.source}`"],
        ["Fine-tune config", tuned],
        ["Bitflip config", bitflip_config(asdict(config.bitflip))],
        ["guards", bitflip_config(asdict(config.bitflip), flips=False)],
        ["training", f"{steps:,} steps, sequences of {training.seq_len:,} tokens, lr = {training.lr:g}"],
        ["seeds", f"training.seed = {training.seed}, faults of training {config.bitflip.base_seed}"],
    ]
    if seeds:
        facts[-1][1] += f", of the measurement {', '.join(map(str, seeds))}"
    if results.get("dtype"):
        facts.append(["dtype whose bits flip", str(results["dtype"])])
    return facts


def _bears(arms: Mapping[str, Arm], config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    if not arms:
        return "It was not measured."
    tokens = max(arm.tokens for arm in arms.values())
    of_arms = costs(dict(arms))
    rows = []
    for name, arm in arms.items():
        kind, cost = ARMS[name], of_arms.get(name)
        flips, tuned = configs_of(name, arms, config)
        rows.append([name, kind.bitflipped, kind.tuned, flips or "–", tuned or "–", f"{arm.perplexity:.5g}",
                     _between(arm.perplexity_interval, ".5g"), "–" if cost is None else f"{cost.cost:+.4f}",
                     _between(cost.interval if cost else None, "+.4f")])  # fmt: skip
    columns = ["arm", "Bitflipped", "Fine-tuned", "Bitflip config", "Fine-tune config", "Val PPL (↓)",
               "95% over fault seeds", "cost in nats per token", "95% over seeds and text"]  # fmt: skip
    text = f" of `{results['text']}`" if results.get("text") else ""
    return f"Perplexity on {tokens:,} held-out tokens{text}.\n\n{markdown_table(columns, rows)}"


def _between(interval: tuple[float, float] | None, form: str) -> str:
    return "–" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _said(bitflip: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as by default; None, 0 and an empty table are nothing."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in bitflip.items()}
    return {key: v for key, v in plain.items() if key not in _UNSAID and v and v != DEFAULTS.get(key)}


def _value(value: Any) -> str:
    if isinstance(value, float):
        exponent = math.log2(value) if value > 0 else 0.5
        return f"2^{exponent:.0f}" if exponent < -3 and exponent == round(exponent) else f"{value:.6g}"
    return f"{value}"


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(expand(name)).exists()
