"""Text to train and measure on that is the same everywhere: Python's own source differs from version to version."""

import random

_SYLLABLES = ["ba", "do", "ek", "fin", "gul", "ish", "ka", "lor", "men", "nu", "os", "pra", "qui", "rel", "su", "tor"]


def sentences(size: int = 80_000) -> str:
    """At least ``size`` characters: lines of some words each, from a vocabulary of 500."""
    rng = random.Random(0)
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(500)]
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        lines.append(" ".join(rng.choices(words, k=rng.randint(3, 14))) + ".\n")
    return "".join(lines)
