"""What flipproof writes down about its work and reads again: JSON, lines of JSON, and the configs of runs and sweeps.

Each says under ``blake2b`` what the hash of the rest is (in TOML in a comment before it), so that a bit that flipped on
a disk, a half copy or an empty file is noticed by whoever reads it. The hash is of the values, not of how they are laid
out, and not of what a clock said: equal runs write equal hashes. What has none was written by an earlier version, or
changed by somebody who took the hash out: both are read.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flipproof.errors import ConfigError
from flipproof.files import finite, named, write_atomically

CONFIG, METRICS, RESULTS, GUARDS = "config.toml", "metrics.jsonl", "results.json", "guards.safetensors"
"""What the files of a run are called."""
HARDENED = "hardened.json"
"""What ``flipproof harden`` did, and what it measured."""

HASH = "blake2b"
CHANGED = f"it is not what was written; take out its {HASH} if you changed it yourself"
_IN_TOML = f"# {HASH} "
_CLOCKS = {
    "seconds",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "communication_share",
    "exposed_communication_share",
}
"""Keys whose values differ between equal runs."""


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that JSON has, and their hash."""
    lasting = {key: value for key, value in values.items() if key not in _CLOCKS}
    return {**values, HASH: _hash(json.dumps(lasting, sort_keys=True))}


def unsealed(text: str | bytes, needs_hash: bool = False) -> dict[str, Any]:
    """The values of an object in JSON, without their hash.

    Raises:
        ValueError: where it is no object in JSON, or another than was written, or has no hash where it ``needs_hash``.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"{json.dumps(values)[:40]} is not an object")
        if (mark := values.pop(HASH, None)) is None:
            if needs_hash:
                raise ValueError("it has no hash")
        elif mark != sealed(values)[HASH]:
            raise ValueError(CHANGED)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return values


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object with its hash. Infinity and NaN, which JSON does not have, become null."""
    plain = json.loads(json.dumps(finite(values), allow_nan=False))  # the hash is of what a reader will find
    write_atomically(path, json.dumps(sealed(plain), indent=2) + "\n")


def write_new_record(path: Path, values: Mapping[str, Any], what: str) -> None:
    """``write_record`` of what passed ``check_new`` before it was measured, its directory made.

    Raises:
        ConfigError: where somebody else has written it since, whose it stays, or it cannot be written after all.
    """
    if path.exists():
        raise ConfigError([f"{path} has been written by somebody else since the start; name another with {what}"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, values)
    except OSError as error:
        raise ConfigError([f"{what}: {path} could not be written ({error.strerror})"]) from error


def read_record(path: Path, needs_hash: bool = False) -> dict[str, Any]:
    """What ``write_record`` wrote, without its hash.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is not what was written, or has no hash where it ``needs_hash``.
    """
    return unsealed(path.read_bytes(), needs_hash)


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Write one more line of JSON with its hash. Infinity and NaN become null."""
    with named(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(sealed(finite(values)), allow_nan=False) + "\n")


def lines(text: bytes) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """(number from 1, its values or what is wrong with it) of each line of JSON. A last one that no line break ends may
    be half a line, of a process that was killed while it wrote."""
    for number, line in enumerate(text.split(b"\n"), 1):
        if line.strip():
            try:
                yield number, unsealed(line)
            except ValueError as error:
                yield number, error


def write_toml(path: Path, text: str) -> None:
    """Write a config behind a comment with its hash."""
    write_atomically(path, f"{_IN_TOML}{_hash(text)}\n{text}")


def check_toml(path: Path) -> None:
    """Raises ConfigError where a config is not what was written for a run or sweep, or cannot be read."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from error
    except ValueError:
        raise ConfigError([f"{path}: {CHANGED}"]) from None
    head, _, rest = text.partition("\n")
    if not text.strip() or (head.startswith(_IN_TOML) and head != _IN_TOML + _hash(rest)):
        raise ConfigError([f"{path}: {CHANGED}"])


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
