"""The command line's parser: a verb is data, what other tools call its flags and keys works or is answered, and a flag
that nobody knows is told what was meant, a value what is allowed.

Every flag may be spelled with ``-`` or ``_``.
"""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from flipproof.config import aliases, described_keys, sections_help, split_overrides, warn_of_two
from flipproof.config.flags import is_truth_value, truth_called
from flipproof.config.names import KEYS, MEANT, is_named, keys_meant, nearest, plain
from flipproof.config.schema import SECTIONS
from flipproof.config.texts import readings
from flipproof.errors import ConfigError
from flipproof.faults.spec import field_names
from flipproof.files import OTHER_LETTERS
from flipproof.values import checked, described


class Argument(NamedTuple):
    """A flag of a verb, or an argument without one."""

    name: str
    help: str
    options: Mapping[str, Any] = {}
    """Those of ``argparse``'s ``add_argument``."""
    key: str = ""
    """The key of a config that a flag is another name of."""


@dataclass(frozen=True)
class Verb:
    """What ``flipproof VERB`` is, takes and does."""

    what: str
    run: Callable[..., int | None]
    """Called with the parsed arguments, and after them with the config where there are ``keys``."""
    arguments: tuple[Argument, ...] = ()
    examples: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    """Where the verb takes a config: the keys, or whole tables, that it reads, which are flags by their bare names too
    where one alone is called so."""

    @property
    def flags(self) -> dict[str, Argument]:
        """Flag, as ``plain`` spells it -> the argument."""
        return {plain(argument.name): argument for argument in self.arguments if argument.name.startswith("-")}

    def words(self) -> dict[str, str]:
        """Flag -> the key that it means, without the table's name."""
        reads = [key for key in KEYS if key in self.keys or key.partition(".")[0] in self.keys]
        names = [KEYS[key] for key in reads]
        own = {flag: argument.key for flag, argument in self.flags.items()}
        words = {KEYS[key]: key for key in reads if names.count(KEYS[key]) == 1}
        words |= {word: key for word, key in MEANT.items() if key in reads}
        words |= {f"{section}_{key}": f"{section}.{key}" for section, key in (key.split(".") for key in reads)}
        words |= {f"{key.partition('.')[0]}.{word}": key for word, key in MEANT.items() if key in reads}
        words = {word: key for word, key in words.items() if word not in aliases.ANSWERS}
        return {word: key for word, key in (words | own).items() if key}


class Parser(argparse.ArgumentParser):
    """An ``argparse`` parser of one of the ``verbs``, whose errors are a ConfigError each, and where nothing is
    abbreviated."""

    def __init__(self, name: str, verbs: Mapping[str, Verb]) -> None:
        self.name, self.verbs, self.verb = name, verbs, verbs[name]
        places = "".join(
            f" [{argument.options['metavar']}]" if argument.options.get("nargs") else f" {argument.options['metavar']}"
            for argument in self.verb.arguments
            if not argument.name.startswith("-")
        )
        examples = "".join(f"\n  {line}" for line in self.verb.examples)
        super().__init__(
            prog=f"flipproof {name}",
            usage=f"flipproof {name}{places} [flags]",
            description=f"{self.verb.what}{examples and chr(10)}{examples}",
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
        )
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        for argument in self.verb.arguments:
            self.add_argument(argument.name, help=argument.help.replace("%", "%%"), **argument.options)
        more = {"nargs": "?", "metavar": "all", "help": "Show this; --help all shows every key as well."}
        self.add_argument(
            "-h", "--help", action=_Help, **(more if self.verb.keys else {"nargs": 0, "help": "Show this."})
        )
        self.add_argument("--help-all", action=_Help, nargs=0, help=argparse.SUPPRESS)

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, dict[str, Any]]]:
        """(the verb's own arguments, section -> key -> text of the config's keys).

        Raises:
            ConfigError: with what is wrong about flags, or else about arguments.
        """
        overrides, rest = split_overrides(list(argv), self.verb.words()) if self.verb.keys else ({}, list(argv))
        own = {flag: argument.name for flag, argument in self.verb.flags.items() if not argument.key}
        own |= {word: f"--{flag}" for flag, words in aliases.FLAGS.items() if flag in own for word in words}
        own |= {"help": "--help", "help_all": "--help-all", "h": "-h"}
        switches = [flag for flag, argument in self.verb.flags.items() if argument.options.get("const") is True]
        problems = []
        end = rest.index("--") if "--" in rest else len(rest)
        for place, argument in enumerate(rest[:end]):
            flag, equals, value = argument.partition("=")
            if not re.fullmatch(r"--?[A-Za-z]\S*", flag):
                continue
            if plain(flag) in own and (flag.startswith("--") or flag == "-h"):
                rest[place] = own[plain(flag)] + equals + value
                following = rest[place + 1] if place + 1 < end else "--"
                if not equals and plain(flag) in switches and not is_truth_value(following):
                    rest[place] += "=true"  # what follows is not its value, but mostly MODEL
            else:
                problems.append(f"{flag}: unknown flag{self._meant(flag)}")
        if problems:
            raise ConfigError(problems)
        args, surplus = self.parse_known_intermixed_args(rest)
        # MODEL, where nothing else can be meant
        if (surplus or getattr(args, "config", None) or "model" in overrides) and (said := self._behind_switches(argv)):
            raise ConfigError(said)
        if surplus:
            hint = "; a list with spaces is quoted, as '[a, b]'" if surplus[-1].endswith("]") else ""
            raise ConfigError([f"{' '.join(surplus)}: not expected here{hint}"])
        return args, overrides

    def _behind_switches(self, argv: Sequence[str]) -> list[str]:
        """A line for each word behind a switch that is not its value, and does not look like MODEL."""
        words, said = self.verb.words(), []
        for flag, word in pairwise(argv[: argv.index("--")] if "--" in argv else argv):
            if not flag.startswith("--") or word.startswith("-") or "/" in word or os.path.exists(word):
                continue
            key, own = truth_called(flag, words), self.verb.flags.get(plain(flag))
            declared: Any = bool
            if key:
                section, _, name = key.partition(".")
                declared = SECTIONS[section].declared()[name]
            elif own and own.options.get("action") == "store_true":
                declared = None
            elif not own or own.options.get("const") is not True:
                continue
            if declared is None or not is_truth_value(word):
                said.append(f"{key or flag} = {word!r}: {described(declared) if declared else 'no value'} is allowed")
        return said

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())
        if missing := re.fullmatch(r"the following arguments are required: (.*)", text):
            text = f"{missing[1]} is missing"
        elif value := re.fullmatch(r"argument ([^\s/:]+)\S*: (.*)", text):
            problem = "a value is missing" if value[2] == "expected one argument" else value[2]
            problem = re.sub(r"ignored explicit argument (.*)", r"= \1: no value is allowed", problem)
            text = value[1] + (f" {problem}" if problem.startswith(("= ", "is ")) else f": {problem}")
        raise ConfigError([text])

    def _meant(self, flag: str) -> str:
        """The end of a message about an unknown flag."""
        word, keys = plain(flag), self.verb.keys
        answer = aliases.ANSWERS.get(word) if keys else None
        if word in SECTIONS and keys:
            names = ", ".join(f"--{word}.{key}" for key in field_names(SECTIONS[word])[:3])
            tables = f"name a key of the table ({names}, …), or give a file that holds the table to --config"
            return f"; {tables}" + (f"; {answer}" if answer else "")
        others = [name for name, verb in self.verbs.items() if name != self.name and word in verb.flags]
        if word in self.verbs:
            where = f"; it belongs to {' and '.join(others)}" if others else ""
            return f"{where}; flipproof {word} is a verb: {self.verbs[word].what}"
        if answer:
            return f"; {answer}"
        exact = bool(keys) and is_named(word)
        if others and not exact:
            return f"; it belongs to {' and '.join(others)}"
        meant = [f"--{key}" for key in keys_meant(word)] if keys else []
        if near := nearest(word, self.verb.flags) if not exact else None:
            meant = [self.verb.flags[near].name]
        elsewhere = f" ({' and '.join(others)} {'has' if len(others) == 1 else 'have'} {flag})" if others else ""
        return f"; did you mean {' or '.join(meant)}?{elsewhere}" if meant else "; see --help"


class _Once(argparse.Action):
    """Store a value, and say so where it is the second."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        given = namespace.__dict__.setdefault("_given", {})
        if option and self.dest in given:
            warn_of_two(option, given[self.dest], value)
        given[self.dest] = value
        setattr(namespace, self.dest, value)


class _Help(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> NoReturn:
        assert isinstance(parser, Parser)
        in_full = option == "--help-all" or value == "all"
        keys = (described_keys() if in_full else sections_help()) if parser.verb.keys else ""
        print(parser.format_help() + (f"\n{keys}" if keys else ""), end="\n" if keys else "")
        parser.exit()


def value_of(declared: Any) -> Callable[[str], Any]:
    """What turns a flag's text into what is declared; see ``config/texts.py``."""

    def converted(text: str) -> Any:
        try:
            return checked("", text, declared, readings)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.problems[0].strip()) from error

    return converted


def checkpoint_of(text: str) -> str:
    """What --resume takes, which may have swallowed the MODEL behind it."""
    if not re.fullmatch(r"auto|step-[0-9]+", text):
        seen = f"= {text!r}" if text else "is empty"
        raise argparse.ArgumentTypeError(f"{seen}: auto or a checkpoint's name (step-N) is allowed; MODEL comes first")
    return text


def devices_of(text: str) -> int | str:
    """What --devices takes, which may have swallowed the MODEL behind it."""
    if text == "auto":
        return text
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"= {text!r}: a number of processes, or auto, one for each GPU, is allowed")
    return int(text)


def path_of(text: str) -> Path:
    """A path, of which ~ is the user's home; an empty one is mostly an unset variable of the shell."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        os.fsencode(path := Path(os.path.expanduser(text)))
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"= {text!a}: {OTHER_LETTERS}") from error
    return path
