"""Keys of a config as they are typed: what KEY=VALUE sets, and what ``flipproof keys`` prints."""

from collections.abc import Iterable

from flipproof.config import SECTIONS, described_keys
from flipproof.config.names import keys_called, keys_meant, near_key, nearest, plain
from flipproof.errors import ConfigError


def set_values(items: Iterable[str]) -> dict[str, dict[str, str]]:
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


def print_keys(of: str | None) -> None:
    """The keys of a table, or those of a name, here or in other tools; of all tables without one. Raises ConfigError
    where nothing is called so."""
    if of is None or of in SECTIONS:
        print(described_keys([of] if of else SECTIONS))
        return
    word = plain(of)
    table, dot, key = word.partition(".")
    if not (found := keys_called(word)):
        if dot and table in SECTIONS:
            raise ConfigError([f"{of}: no such key{near_key(key, table)}"])
        near = nearest(word, SECTIONS)
        found = [] if near else keys_meant(word)
        if not found:
            hint = f"did you mean {near}?" if near else f"known are {', '.join(SECTIONS)}"
            raise ConfigError([f"{of}: no such section or key; {hint}"])
    print(described_keys(dict.fromkeys(key.partition(".")[0] for key in found), found))
