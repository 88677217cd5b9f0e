"""Fitting guards: the largest clean magnitudes of each channel, while a model runs over calibration text.

All that faults may reach is looked at: weights and inputs of linear layers, the head, the embedding, keys and values;
of quantised weights what is computed with, and the numbers of their scales.
The text is the part that training reads, so that held-out text stays unseen by the thresholds, too.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flipproof.config import RunConfig, TrainingConfig
from flipproof.data.sequences import PackedText, load_text
from flipproof.errors import ConfigError
from flipproof.faults.attention import reachable
from flipproof.faults.draw import Draw
from flipproof.faults.fault import Granularity
from flipproof.faults.fitted import ROTATION, Guards, read_guards
from flipproof.faults.flip_log import hooked
from flipproof.faults.inject import fault_state, inject, iter_faulty, set_faults
from flipproof.faults.quantised import FaultyQuantisedLinear
from flipproof.faults.same_model import check_fitted, format_of_weights
from flipproof.faults.spec import BitFlipSpec
from flipproof.files import check_new
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.quantise import dequantise
from flipproof.measure.evaluate import run_over, unpadded_tokens
from flipproof.models.build import build_model, check_guards, check_length, flipped_dtype
from flipproof.models.load import compute_context, load_tokenizer, model_config, model_on_meta, skeleton
from flipproof.models.packed import check_text
from flipproof.models.parallelize import cast_to
from flipproof.models.quantised import checkpoint_of
from flipproof.models.weights import read_tensor
from flipproof.records import GUARDS
from flipproof.world import World, join_world

_LEAST_TOKENS = 4096
"""Of calibration text: in less, most features have not come near their largest values."""


class Maxima:
    """A flip hook that changes nothing and keeps the largest finite magnitude of each channel."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        """"SITE/OPERAND" -> float32, in the shape of thresholds by channel."""

    @torch.no_grad()
    def __call__(self, name: str, x: Tensor, _draw: Draw) -> Tensor:
        name = re.sub(r"#\d+(?=/)", "", name)  # a module that runs twice in a pass is one
        name = re.sub("/dequantised$", "/w", name)
        operand = name.rpartition("/")[2]
        if not x.numel() or (operand == "w" and name in self.found):  # an expert may get no token
            return x
        sizes = x.detach().abs().nan_to_num(0.0, posinf=0.0)  # in its own dtype: a head of 70B has a billion elements
        if operand == "w":
            largest = sizes.amax(-1, keepdim=True).float()  # of rows
        else:  # of features, or of heads and their components
            largest = sizes.flatten(0, -2 if operand == "x" else -3).amax(0).float()
        self.found[name] = torch.maximum(largest, self.found[name]) if name in self.found else largest
        return x

    def of_all(self, world: World) -> dict[str, Tensor]:
        """What all processes found, in CPU memory; all must call."""
        found: dict[str, Tensor] = {}
        for part in world.gathered({name: maxima.cpu() for name, maxima in self.found.items()}):
            for name, maxima in part.items():  # an expert may be one process's alone
                found[name] = torch.maximum(found[name], maxima) if name in found else maxima
        return {name: found[name] for name in sorted(found)}


def largest_magnitudes(
    model: nn.Module, text: PackedText, num_samples: int, batch_size: int, world: World
) -> tuple[dict[str, Tensor], int]:
    """(the maxima of a model that ``fitting_spec`` made faulty, tokens that it has run over)."""
    maxima = Maxima()
    with hooked(model, maxima):
        tokens = run_over(model, text, num_samples, batch_size, world)
    scales = {
        layer.draw_name("w_scale"): _largest_scale(layer)
        for _, layer in iter_faulty(model)
        if isinstance(layer, FaultyQuantisedLinear)
    }
    maxima.found |= {name: largest for name, largest in scales.items() if name.removesuffix("_scale") in maxima.found}
    return maxima.of_all(world), tokens


def _largest_scale(layer: QuantisedLinear) -> Tensor:
    """float32 (): the largest magnitude of the numbers that its scales stand for."""
    seen: list[Tensor] = []

    def look(scales: Tensor) -> Tensor:
        seen.append(scales)
        return scales

    dequantise(layer.stored(), scales=look)
    return seen[0].abs().nan_to_num(0.0, posinf=0.0).amax().float()


def fitting_spec(spec: BitFlipSpec, keys_and_values: bool) -> BitFlipSpec:
    """A guard that is never on, wherever faults may be; ``spec`` says what is left alone."""
    return BitFlipSpec(
        w_zero_out_t=torch.inf,
        x_zero_out_t=torch.inf,
        kv_zero_out_t=torch.inf if keys_and_values else None,
        sites=("linear", "head", "embedding"),
        skip_patterns=spec.skip_patterns,
    )


def fit_guards(
    config: RunConfig,
    by: Granularity,
    to: Path,
    merge: Sequence[str] = (),
    tell: Callable[[str], None] | None = None,
) -> Guards:
    """Fit guards to the text that ``data.source`` trains on, and write them.

    Args:
        config: model, text, and how many samples (``eval.num_samples``).
        by: how fine.
        to: directory to write ``guards.safetensors`` into; it must not hold one.
        merge: guards of the same model that were fitted on other text; the larger maxima count.
        tell: called by the first process with what was found.

    Raises:
        ConfigError: where model, text, directory or other guards are at fault, before anything is measured.
    """
    check_new(to / GUARDS, "--to")
    others = [read_guards(path) for path in merge]
    for other in others:  # first with each other
        others[0].merged(other)
        if other.by != by:
            raise ConfigError([f"{other.path}: guards of by {other.by!r} do not go with those of by {by!r}"])
    training = replace(config.training, compile=False, activation_checkpointing="none")
    config = replace(config, training=training)
    with join_world(config.parallelism) as world:
        tokenizer = load_tokenizer(config.model)
        check_length(config, tokenizer)
        if checkpoint_of(config.model, model_config(config.model, tokenizer)):  # its own files have no skeleton
            unread = skeleton(config.model, tokenizer, training.dtype)
            spec = fitting_spec(config.bitflip, reachable(unread))
        else:
            unread = model_on_meta(config.model, tokenizer, training.dtype)
            spec = fitting_spec(config.bitflip, reachable(unread))
            _check_merged(merge, unread, spec, training)
        text, samples = calibration_text(config, tokenizer), config.eval.num_samples
        model = build_model(replace(config, bitflip=spec), tokenizer, world)
        for path in merge:
            check_guards(path, model, world, near=False)
        check_text(config.training, model, tokenizer, text)
        with compute_context(training, model):
            maxima, tokens = largest_magnitudes(model, text, samples, training.local_batch_size, world)
        found = Guards(
            maxima=maxima,
            by="channel",
            model=str(config.model.hf_model_path or config.model.flavor),
            dtype=flipped_dtype(training, model),
            basis=getattr(model.config, ROTATION, None),
            format=format_of_weights(model),
            texts=({"source": text.source, "tokens": tokens},),
        ).coarser(by)
        for other in others:
            found = found.merged(other)
        if world.first:
            check_new(to / GUARDS, "--to")
            try:
                found.write(to)
            except OSError as error:
                raise ConfigError([f"--to: {to / GUARDS} could not be written ({error.strerror})"]) from error
            if tell:
                tell(guards_table(found, to))
    return found


def _check_merged(merge: Sequence[str], unread: nn.Module, spec: BitFlipSpec, training: TrainingConfig) -> None:
    """Raises ConfigError for guards that are not of a model that is still to be read: by its names, shapes, dtype and
    basis, and by the smallest of its weights."""
    if not merge:
        return
    inject(unread, spec, computed=cast_to(training, unread))
    stored = getattr(unread, "stored", {})
    plain = {name for name, _ in unread.named_parameters(remove_duplicate=False)}
    try:
        for guards in map(read_guards, merge):
            set_faults(unread, replace(spec, guards=guards.path))
            sites = (name.removesuffix("/w") for name in guards.maxima if name.endswith("/w"))
            keys = {site: key for site in sites if (key := f"{site}.weight") in stored.keys() & plain}
            sizes = {site: math.prod(stored[key].shape) for site, key in keys.items()}
            if sizes:
                site = min(sizes, key=sizes.__getitem__)
                read = {site: read_tensor(unread, keys[site])}
                check_fitted(unread, guards, fault_state(unread), read=read, near=False)
    except ConfigError as error:
        raise ConfigError(line.replace("bitflip.guards: ", "--merge: ", 1) for line in error.problems) from error


def calibration_text(config: RunConfig, tokenizer: Any) -> PackedText:
    """What guards are fitted to. Raises ConfigError where it cannot be read, or is too short."""
    samples, seq_len = config.eval.num_samples, config.training.seq_len
    text, _ = load_text(config.data, tokenizer, seq_len, samples if config.data.streaming else None)
    if (tokens := unpadded_tokens(text, samples)) < _LEAST_TOKENS:
        padding = "" if text.marks is None else " without padding"
        raise ConfigError(
            [
                f"{len(text):,} sequences of {text.source}, {samples:,} samples of {seq_len:,} tokens: "
                f"guards are fitted to {tokens:,} tokens{padding}; at least {_LEAST_TOKENS:,} are allowed"
            ]
        )
    return text


_KINDS = {"w": "weights", "w_scale": "scales", "x": "inputs", "k": "keys", "v": "values"}


def guards_table(guards: Guards, where: Path) -> str:
    """For each operand how many thresholds there are, and the quartiles of its layers' largest values."""
    texts = " and ".join(f"{text['tokens']:,} tokens of {text['source']}" for text in guards.texts)
    lines = [
        f"guards by {guards.by}, fitted to {texts}, {guards.dtype}{f', {guards.format}' if guards.format else ''}",
        f"{'':<10}{'layers':>8}{'thresholds':>12}{'lowest':>10}{'25%':>10}{'median':>10}{'75%':>10}{'highest':>10}",
    ]
    for operand, kind in _KINDS.items():
        own = [maxima for name, maxima in guards.maxima.items() if name.endswith(f"/{operand}")]
        if own:
            largest = torch.stack([maxima.max() for maxima in own])
            quartiles = torch.quantile(largest, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
            count = sum(maxima.numel() for maxima in own)
            lines.append(f"{kind:<10}{len(own):>8}{count:>12,}" + "".join(f"{value:>10.4g}" for value in quartiles))
    return "\n".join([*lines, "", f"bitflip.guards = {str(where)!r} uses them"])
