"""Which key was meant, where none has the name that was given."""

import difflib
import re
from collections.abc import Iterable

from flipproof.config import aliases
from flipproof.config.schema import SECTIONS
from flipproof.faults.spec import field_names

KEYS = {f"{section}.{key}": key for section, cls in SECTIONS.items() for key in field_names(cls)}
MEANT = {word: key for key, words in aliases.KEYS.items() for word in words}
"""Another tool's word -> the key that it means exactly."""


def plain(word: str) -> str:
    """A flag, key or verb as it is looked up: ``--Seq-Len`` is seq_len."""
    return word.lstrip("-").replace("-", "_").lower()


def keys_called(word: str) -> list[str]:
    """The keys, as section.key, that are called so, here or in other tools, with or without their section; those whose
    names end so where none is."""
    word = plain(word)
    exact = [key for key, name in KEYS.items() if word in (name, key, key.replace(".", "_"))]
    exact += [key for key in _answered(word) if key not in exact]
    if exact or word in MEANT:
        return exact or [MEANT[word]]
    return [key for key in KEYS if key.endswith(f"_{word}")]


def keys_meant(word: str) -> list[str]:
    """The keys that a word stands for; the nearest one where none is called so."""
    near = nearest(plain(word), KEYS.values())
    return keys_called(word) or [key for key, name in KEYS.items() if name == near][:1]


def _answered(word: str) -> list[str]:
    """The keys that the answer to another tool's word names."""
    return [key for key in re.findall(r"\w+\.\w+", aliases.ANSWERS.get(word, "")) if key in KEYS]


def is_named(word: str) -> bool:
    """Whether a key is called so, here or in other tools."""
    return plain(word) in {*KEYS.values(), *MEANT, *aliases.ANSWERS}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelled most like it, if any is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def near_key(key: str, section: str) -> str:
    """The end of a message about an unknown key of a section."""
    known = field_names(SECTIONS[section])
    spelled = plain(key)
    elsewhere = [meant for meant in KEYS if KEYS[meant] == spelled] or ([MEANT[spelled]] if spelled in MEANT else [])
    if not elsewhere and spelled in aliases.ANSWERS:
        return f"; {aliases.ANSWERS[spelled]}"
    near = nearest(spelled, known)
    meant = elsewhere or ([f"{section}.{near}"] if near else keys_meant(spelled))
    if not meant:
        return f"; known are {', '.join(known)}"
    names = sorted(meant, key=lambda name: not name.startswith(f"{section}."))
    return f"; did you mean {names[0].removeprefix(f'{section}.')}?"


def near_table(name: str, is_table: bool) -> str:
    """The end of a message about what is at the top of a file and is no table of a config."""
    if is_table and (answer := aliases.TABLES.get(plain(name))):
        return f"; {answer}"
    if not is_table and (answer := aliases.ANSWERS.get(plain(name))):
        return f" outside a table; {answer}"
    if not is_table and (meant := keys_meant(name)):
        return f" outside a table; did you mean {' or '.join(meant)}?"
    near = nearest(name, SECTIONS)
    return f"; did you mean {near}?" if near else f"; known are {', '.join(SECTIONS)}"
