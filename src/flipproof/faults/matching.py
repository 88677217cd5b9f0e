"""Patterns of a config that match nothing in the model, and which names they may have meant."""

import difflib
import re
from collections.abc import Iterable

from flipproof import regexes
from flipproof.faults.spec import BitFlipSpec


def unmatched_patterns(spec: BitFlipSpec, names: Iterable[str]) -> list[str]:
    """A line for each pattern of ``spec`` that changes nothing, since no name has it.

    Args:
        names: of all that the patterns may be about.
    """
    names = list(names)
    lines = []
    for key in ("include_patterns", "skip_patterns"):
        for pattern in getattr(spec, key):
            if not any(pattern in name for name in names):
                lines.append(f"bitflip.{key}: {pattern!r} is in no layer's name{_nearest(pattern, names)}")
    for pattern in spec.layer_name_to_config:
        if any(regexes.fullmatch(pattern, name) for name in names):
            continue
        within = [name for name in names if regexes.search(pattern, name)]
        hint = (
            f"; it is found within {within[0]}: did you mean '.*{pattern}.*'?" if within else _nearest(pattern, names)
        )
        lines.append(f"bitflip.layer_name_to_config: {pattern!r} is no layer's whole name{hint}")
    return lines


def _nearest(pattern: str, names: list[str]) -> str:
    """The names, and ends and parts of names, that are spelled most like the pattern."""
    plain = re.sub(r"\\(.)", r"\1", pattern.replace(".*", "")).strip(".^$")
    ends = {".".join(parts[i:]) for name in names for parts in [name.split(".")] for i in range(len(parts))}
    known = ends | {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(plain, sorted(known), n=3)
    return f"; the nearest are {', '.join(near)}" if near else ""
