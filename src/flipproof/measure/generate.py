"""Text from the same prompt and the same random numbers, clean and with flips: where they part, and what was flipped.

Generation is ``transformers``' own. Each pass over the model is a tick, so a transient fault flips anew for every
token; the first pass reads the prompt, and later ones a token each beside the KV cache.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from flipproof.config import RunConfig
from flipproof.errors import ConfigError
from flipproof.faults.flip_log import FlipCount, FlipLog, Replay, hooked
from flipproof.faults.inject import fault_state, is_faulty
from flipproof.faults.quantised import PART_OF
from flipproof.faults.spec import INPUT_PARTS, BitFlipSpec
from flipproof.files import check_new
from flipproof.log import bar, logger
from flipproof.measure.arms import ARMS, thresholds_in_words
from flipproof.measure.evaluate import (
    adapters_by_arm,
    arm_faults,
    arms_of,
    check_alike,
    check_log,
    fault_seeds,
    faulty_arm,
    wear,
)
from flipproof.models.adapter import adapter_spec, load_adapter
from flipproof.models.build import build_model, flipped_dtype
from flipproof.models.limits import positions
from flipproof.models.load import compute_context, load_tokenizer
from flipproof.records import write_new_record
from flipproof.world import join_world

RESULT = "generate.json"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, as in ``transformers``."""

    max_new_tokens: int = 100
    """Tokens to add at most."""
    do_sample: bool = False
    """Draw the next token; otherwise the likeliest is taken."""
    temperature: float = 1.0
    """Divides the logits before a draw."""
    top_k: int | None = None
    """Draw from so many likeliest tokens. Default: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws of tokens, the same for all texts."""

    def problems(self) -> list[str]:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"--max_new_tokens {self.max_new_tokens}: at least 1 is allowed")
        if not self.temperature > 0:
            problems.append(
                f"--temperature {self.temperature}: a positive number is allowed (without --do_sample: none)"
            )
        if not 0 <= self.seed < 2**63:
            problems.append(f"--seed {self.seed}: an integer from 0 to 2^63 - 1 is allowed")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top_k {self.top_k}: at least 1 is allowed")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p {self.top_p}: a number above 0, up to 1, is allowed")
        return problems


@dataclass(frozen=True)
class Text:
    """One arm's text."""

    text: str
    """What was added to the prompt."""
    tokens: int
    """How many tokens that is."""
    parts_at: int | None
    """The first new token, counted from 0, that is not the clean text's; None where there is none."""
    passes: int
    """Forward passes."""
    flipped_bits: dict[str, int]
    """Operand ("w": weights, "x": inputs, "k" and "v": the cache) -> bits inverted in all passes."""
    zeroed: dict[str, int]
    """Operand -> values that guard or protection zeroed in all passes."""


def generate(
    config: RunConfig,
    prompt: str,
    sampling: Sampling | None = None,
    *,
    adapter: Path | None = None,
    control: Path | None = None,
    to: Path | None = None,
    flip_log: Path | None = None,
    replay: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Text]:
    """Continue a prompt without and with faults: one text for each of ``text_arms``.

    Args:
        config: model and faults; the fault seed is the first that evaluation uses.
        prompt: what to continue.
        sampling: how.
        adapter: directory of a PEFT adapter; adds a trained arm.
        control: directory of another one, trained without faults and else alike; adds its arm.
        to: directory to write ``generate.json`` into; it must not hold one.
        flip_log: file for all flips of the last arm with faults.
        replay: such a file; its flips take the place of that arm's draws.
        tell: called by the first process with all texts, before anything is written to ``to``.

    Returns:
        Arm -> its text; ``clean`` comes first.

    Raises:
        ConfigError: where model, prompt, sampling or a file are at fault.
    """
    sampling = sampling or Sampling()
    if problems := sampling.problems():
        raise ConfigError(problems)
    if to is not None:
        check_new(to / RESULT, "--to")
    if not prompt:
        raise ConfigError(["--prompt is empty; give at least a character"])
    if flip_log or replay:
        check_log(config, flip_log, replay)
    if control:
        check_alike(adapter, control)
    config = replace(config, training=replace(config.training, activation_checkpointing="none", compile=False))
    with join_world(config.parallelism) as world, ExitStack() as stack:
        tokenizer = load_tokenizer(config.model)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        model = build_model(config, tokenizer, world, adapter_spec(adapter) if adapter else None)
        _check_length(model, ids.shape[1], sampling)
        for each in (control, adapter):  # before anything is written
            if each:
                load_adapter(model, each)
        arms = text_arms(arms_of(model, config.bitflip, adapter is not None, control is not None))
        seed, dtype = fault_seeds(config.bitflip.base_seed, 1)[0], flipped_dtype(config.training, model)
        last = faulty_arm(arms) if flip_log or replay else None
        replayed = Replay(replay, dtype) if replay else None
        log = None
        if flip_log and world.first:
            what = {"dtype": dtype, "seed": seed, "prompt": prompt, "sampling": asdict(sampling), "arm": last}
            flip_log.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(FlipLog(flip_log, **what, bitflip=asdict(config.bitflip)))
        texts: dict[str, Text] = {}
        clean: Sequence[int] = ()
        shown = stack.enter_context(bar(len(arms) * sampling.max_new_tokens, "token", world.first))
        with compute_context(config.training, model):
            for arm in arms:
                shown.set_description(arm)
                wear(model, arm, adapters_by_arm(adapter, control))
                flip_hook: FlipCount | Replay = FlipCount() if arm != last else replayed or log or FlipCount()
                tokens, passes = _continued(
                    model, ids.to(world.device), arm, seed, sampling, tokenizer, flip_hook, shown.update
                )
                clean = tokens if arm == "clean" else clean
                texts[arm] = Text(
                    text=tokenizer.decode([*ids[0].tolist(), *tokens], skip_special_tokens=True).removeprefix(
                        tokenizer.decode(ids[0], skip_special_tokens=True)
                    ),
                    tokens=len(tokens),
                    parts_at=_parts_at(clean, tokens),
                    passes=passes,
                    flipped_bits=dict(flip_hook.flipped_bits),
                    zeroed=dict(flip_hook.zeroed),
                )
        shown.close()
        if replayed:
            replayed.check_all_done()
        if line := guard_warning(texts, config.bitflip):
            logger.warning("%s", line)
        if tell and world.first:
            tell(texts_report(prompt, texts))
        if to is not None and world.first:
            write_new_record(to / RESULT, _written(config, prompt, sampling, texts, seed, dtype), "--to")
    return texts


def text_arms(names: Sequence[str]) -> list[str]:
    """Of a model's arms those that text is made of: of a trained model the one without faults is left out where there
    is one with them."""
    faulty = {ARMS[name].weights for name in names if ARMS[name].guard}
    return [name for name in names if ARMS[name].guard or not ARMS[name].trained or ARMS[name].weights not in faulty]


def guard_warning(texts: dict[str, Text], spec: BitFlipSpec) -> str | None:
    """A line for a guard that changes the clean text before any bit flips."""
    guard = texts.get("guard")
    if guard is None or guard.parts_at is None:
        return None
    return f"the guard alone, before any bit flips, changes the text: {thresholds_in_words(spec)}"


@torch.no_grad()
def _continued(
    model: Any,
    ids: torch.Tensor,
    arm: str,
    seed: int,
    sampling: Sampling,
    tokenizer: Any,
    flip_hook: Any,
    done: Callable[[], Any],
) -> tuple[list[int], int]:
    """(new tokens, forward passes) of one arm; ``done`` is called at each pass."""
    how = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.do_sample,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        **(
            {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
            if sampling.do_sample
            else {}
        ),
    )
    model.eval()
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        done()

    counter = model.register_forward_pre_hook(count)
    devices = [ids.device] if ids.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.callback(counter.remove)
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(sampling.seed)
        if is_faulty(model):
            state = fault_state(model)
            rank, state.rank = state.rank, 0  # every process continues the same row
            stack.callback(setattr, state, "rank", rank)
            stack.enter_context(arm_faults(model, arm, seed))
            if ARMS[arm].guard:
                stack.enter_context(hooked(model, flip_hook))
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return output[0, ids.shape[1] :].tolist(), passes


def _check_length(model: Any, prompt: int, sampling: Sampling) -> None:
    room = positions(model.config)
    if prompt == 0:
        raise ConfigError(["--prompt: the tokenizer makes no token of it"])
    if room is not None and prompt + sampling.max_new_tokens > room:
        raise ConfigError(
            [
                f"--max_new_tokens {sampling.max_new_tokens}: the prompt has {prompt} tokens and the model room for "
                f"{room}; at most {max(0, room - prompt)} is allowed"
            ]
        )


def _parts_at(clean: Sequence[int], tokens: Sequence[int]) -> int | None:
    if clean == tokens:
        return None
    pairs = zip(clean, tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(clean), len(tokens)))


def _written(
    config: RunConfig, prompt: str, sampling: Sampling, texts: dict[str, Text], seed: int, dtype: str
) -> dict[str, Any]:
    """What ``generate.json`` holds."""
    return {
        "model": config.model.hf_model_path or config.model.flavor,
        "dtype": dtype,
        "prompt": prompt,
        "sampling": asdict(sampling),
        "seed": seed,
        "bitflip": asdict(config.bitflip),
        "texts": {arm: text.text for arm, text in texts.items()},
        "parts_at": {arm: text.parts_at for arm, text in texts.items()},
        "flips": {arm: text.flipped_bits for arm, text in texts.items()},
        "zeroed": {arm: text.zeroed for arm, text in texts.items()},
        "passes": {arm: text.passes for arm, text in texts.items()},
    }


_OPERANDS = {"w": "weights", "x": "inputs", "k": "keys", "v": "values"}
_PARTS = {"code": "codes", "scale": "scales", "zero": "zero points", "global": "numbers that scales are made with"}
_OPERANDS |= {f"w_{operand}": _PARTS[part] for operand, part in PART_OF.items()}
_OPERANDS |= {f"x_{part}": f"{_PARTS[part]} of inputs" for part in INPUT_PARTS}


def texts_report(prompt: str, texts: dict[str, Text]) -> str:
    """All texts with where they part from the clean one, and what was flipped on the way, for people."""
    parts = []
    for arm, text in texts.items():
        lines = [f"--- {arm} ---", prompt + text.text]
        if arm != "clean":
            same = (
                "the clean text" if text.parts_at is None else f"parts from the clean text at token {text.parts_at + 1}"
            )
            counts = Counter[str]()
            for operand, n in text.flipped_bits.items():
                counts[_OPERANDS.get(operand, operand)] += n
            flips = ", ".join(f"{n:,} bits of {what}" for what, n in counts.items() if n)
            zeroed = sum(text.zeroed.values())
            lines.append(
                f"({same}; in {text.passes} passes {flips + ' were' if flips else 'nothing was'} flipped"
                + (f", {zeroed:,} values zeroed" if zeroed else "")
                + ")"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
