"""What a config can say, for ``flipproof config`` and ``flipproof keys``: presets as they are or changed, and keys."""

import sys
from argparse import Namespace
from collections.abc import Iterable

from flipproof.config import SECTIONS, changed_preset, described_keys, preset_names, preset_text
from flipproof.config.names import keys_called, keys_meant, near_key, nearest, plain
from flipproof.errors import ConfigError


def escaped(toml: str) -> str:
    """TOML in the letters of the terminal, or of the file that its output goes into; it reads back as the same."""
    encoding = sys.stdout.encoding or "utf-8"
    return "".join(letter if letter.encode(encoding, "ignore") else f"\\U{ord(letter):08x}" for letter in toml)


def print_config(args: Namespace) -> None:
    if args.set and (args.list or args.name is None):
        raise ConfigError(["--set changes a preset: flipproof config NAME --set KEY=VALUE"])
    if args.set:
        print(escaped(changed_preset(args.name, _settings(item for items in args.set for item in items))), end="")
    elif args.list or args.name is None:
        print("\n".join(preset_names()))
    else:
        print(preset_text(args.name), end="")


def _settings(items: Iterable[str]) -> dict[str, dict[str, str]]:
    """section -> key -> text of several KEY=VALUE. Raises ConfigError with all that set no key."""
    settings: dict[str, dict[str, str]] = {}
    problems = []
    for item in items:
        word, equals, value = item.partition("=")
        found = keys_called(word)
        if not (equals and value):
            problems.append(f"--set {item}: KEY=VALUE is allowed")
        elif len(found) != 1:
            meant = found or keys_meant(word)
            hint = f"did you mean {' or '.join(meant)}?" if meant else "flipproof keys prints all that there are"
            problems.append(f"--set {item}: {f'several keys are called {word}' if found else 'unknown key'}; {hint}")
        else:
            section, _, key = found[0].partition(".")
            settings.setdefault(section, {})[key] = value
    if problems:
        raise ConfigError(problems)
    return settings


def print_keys(args: Namespace) -> None:
    if args.section in (None, *SECTIONS):
        print(described_keys([args.section] if args.section else SECTIONS))
        return
    word = plain(args.section)
    table, dot, key = word.partition(".")
    if not (found := keys_called(word)):
        if dot and table in SECTIONS:
            raise ConfigError([f"{args.section}: no such key{near_key(key, table)}"])
        near = nearest(word, SECTIONS)
        found = [] if near else keys_meant(word)
        if not found:
            hint = f"did you mean {near}?" if near else f"known are {', '.join(SECTIONS)}"
            raise ConfigError([f"{args.section}: no such section or key; {hint}"])
    print(described_keys(dict.fromkeys(key.partition(".")[0] for key in found), found))
