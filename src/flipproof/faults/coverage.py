"""What of a model's weight FLOPs is faulty, and what is left alone or out of reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flipproof.errors import ConfigError
from flipproof.faults.spec import BitFlipSpec
from flipproof.formats.linear import QuantisedLinear


@dataclass(frozen=True)
class Coverage:
    """What ``inject`` did. Its string is a report for people."""

    covered: tuple[str, ...]
    """Names of the layers that are faulty now."""
    skipped: dict[str, str]
    """Every other ``nn.Linear``: name -> why it was left alone."""
    uncovered: dict[str, str]
    """Other modules that multiply by weights which no Linear swap can see, and which the config leaves alone: name ->
    what they are."""
    flops_share: float
    """Covered share of the weight FLOPs of one token (two per weight; attention scores are not counted)."""
    memories: tuple[str, ...] = ()
    """What else is faulty: embeddings, and attention modules whose keys and values are."""

    def __str__(self) -> str:
        lines = [f"{len(self.covered)} faulty linear layers cover {self.flops_share:.1%} of the model's weight FLOPs"]
        if self.memories:
            lines.append(f"faulty besides: {shortened(self.memories)}")
        for title, modules in (("left alone", self.skipped), ("out of reach", self.uncovered)):
            reasons: dict[str, list[str]] = {}
            for name, reason in modules.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                lines.append(f"{title} ({reason}): {shortened(names)}")
        return "\n".join(lines)


def shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def coverage_of(model: nn.Module, names: Mapping[str, int], skipped: dict[str, str], spec: BitFlipSpec) -> Coverage:
    """What swapping the layers called ``names`` covers. Raises ConfigError where weights out of reach go unsaid."""
    total = inside = out = 0.0
    uncovered: dict[str, str] = {}
    unsaid: list[str] = []
    config = getattr(model, "config", None)
    active_experts = getattr(config, "num_experts_per_tok", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):  # a look-up, not a product
            continue
        flops = float(module.in_features * module.out_features) if isinstance(module, QuantisedLinear) else 0.0
        for p in module.parameters(recurse=False):
            if p.dim() == 3 and active_experts:  # experts of which a token sees some
                flops += p.numel() * min(1.0, active_experts / len(p))
            elif p.dim() >= 2:
                flops += p.numel()
        total += flops
        if name in names:
            inside += flops
        elif flops and name not in skipped:
            uncovered[name] = f"{type(module).__name__} is not an nn.Linear"
            if not any(pattern in name for pattern in spec.skip_patterns):
                out += flops
                unsaid.append(name)
    wanted = "linear" in spec.sites and (spec.w.active or spec.x.active or names or spec.layer_name_to_config)
    if unsaid and wanted:
        kinds = sorted({type(model.get_submodule(name)).__name__ for name in unsaid})
        raise ConfigError(
            [
                f"{type(model).__name__}: {out / total:.1%} of the weight FLOPs are out of reach of faults, in "
                f"{' and '.join(kinds)} ({shortened(unsaid)}); to leave them clean knowingly, name them in "
                "bitflip.skip_patterns"
            ]
        )
    covered = tuple({which: name for name, which in reversed(list(names.items()))}.values())[::-1]
    return Coverage(covered, skipped, uncovered, inside / total if total else 0.0)


def nothing_matched(spec: BitFlipSpec, skipped: dict[str, str]) -> str:
    if not skipped:
        return "no layer matched: the model has no nn.Linear"
    reasons = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:3])
    return (
        f"no layer matched include_patterns = {list(spec.include_patterns)}, "
        f"skip_patterns = {list(spec.skip_patterns)}, "
        f"layer_name_to_config = {list(spec.layer_name_to_config)}; the model's linear layers are {reasons}"
        + (f" and {len(skipped) - 3} more" if len(skipped) > 3 else "")
    )
