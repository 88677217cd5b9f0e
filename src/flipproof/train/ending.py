"""What a run leaves at its end: its weights for other tools, ``all_results.json``, and the card beside the weights.

``all_results.json`` is for scripts that know Hugging Face's ``Trainer``: flat keys, of the arm that the run was for.
Nothing here reads it again. There are no times in it: a run that went on has none that were true of the whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flipproof.config import RunConfig
from flipproof.faults.fitted import ROTATION, Guards
from flipproof.faults.inject import fault_state
from flipproof.faults.same_model import with_own_weights
from flipproof.files import write_atomically, write_json
from flipproof.measure.arms import ARMS, Arm, in_order
from flipproof.measure.card import CARD, run_card
from flipproof.models.adapter import save_adapter
from flipproof.models.load import save_model
from flipproof.records import METRICS, RESULTS, lines, read_record
from flipproof.world import World

ALL_RESULTS = "all_results.json"
Kind = Literal["adapter", "model"]


def write_weights(
    new: Path,
    kind: Kind,
    model: Any,
    config: RunConfig,
    tokenizer: Any,
    world: World,
    what: str | None = None,
    guards: Guards | None = None,
) -> None:
    """Write adapter or merged model into a directory, with the guards that go with it. All processes must call.

    Args:
        what: what a message calls the weights.

    Raises:
        ConfigError: where a weight is not finite; nothing is written then.
    """
    if kind == "adapter":
        save_adapter(model, new, config.model.hf_model_path, world.first, what or "the trained adapter")
    else:
        save_model(model, new, tokenizer, world, what or "the trained model")
        if guards:
            guards = with_own_weights(guards, model, fault_state(model))
    if guards and world.first:
        guards.write(new)


def write_all_results(run_dir: Path, arms: Mapping[str, Arm], main: str, logged_from: int) -> None:
    """Write the file, or take an old one away where the run's ``main`` arm is not measured.

    Args:
        arms: of the run.
        main: whose perplexity is the run's.
        logged_from: the step after which ``metrics.jsonl`` begins.
    """
    path = run_dir / ALL_RESULTS
    if main not in arms:
        path.unlink(missing_ok=True)
        return
    found: dict[str, Any] = {"perplexity": arms[main].perplexity, "eval_loss": arms[main].loss}
    found["eval_samples"] = len(arms[main].sequence_losses)
    if logged_from == 0 and (loss := train_loss(run_dir)) is not None:
        found["train_loss"] = loss
    for name, arm in in_order(arms).items():
        found |= {f"perplexity_{name}": arm.perplexity, f"eval_loss_{name}": arm.loss}
    write_json(path, found)


def train_loss(run_dir: Path) -> float | None:
    """The mean loss over the steps of a run, as its lines of metrics have it; None where there are none."""
    total, before = 0.0, 0
    path = run_dir / METRICS
    for _, line in lines(path.read_bytes()) if path.exists() else ():
        if isinstance(line, ValueError) or "loss" not in line:
            continue
        if line["loss"] is None:
            return None
        total += (line["step"] - before) * line["loss"]
        before = line["step"]
    return total / before if before else None


def card(config: RunConfig, run_dir: Path, kind: Kind, name: str, steps: int, model: Any) -> str:
    """The card of a run's weights after so many steps. What was measured of others is left out."""
    try:
        results = read_record(run_dir / RESULTS)
        arms = in_order({name: Arm.from_dict(arm) for name, arm in results["arms"].items() if name in ARMS})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        results, arms = {}, {}
    if steps != config.training.steps:
        arms = {name: arm for name, arm in arms.items() if not ARMS[name].trained and config.model.init != "random"}
    return run_card(config, kind, name, results, arms, steps, online=rotates(model))


def write_cards(config: RunConfig, run_dir: Path, model: Any) -> None:
    """Write the card of a finished run beside its weights."""
    assert config.training.steps is not None
    kinds: tuple[Kind, ...] = ("adapter", "model")
    for kind in kinds:
        if (run_dir / kind).is_dir():
            text = card(config, run_dir, kind, kind, config.training.steps, model)
            write_atomically(run_dir / kind / CARD, text)


def rotates(model: Any) -> bool:
    """Whether inputs are rotated when the model runs, which only flipproof does."""
    return bool((getattr(model.config, ROTATION, None) or {}).get("online"))
