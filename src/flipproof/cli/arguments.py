"""The command line's parser: a flag that nobody knows is answered with what was meant, a value with what is allowed."""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flipproof.config import describe_keys, sections_help, warn_of_two
from flipproof.config.names import is_named, keys_meant, nearest
from flipproof.config.schema import SECTIONS
from flipproof.config.values import convert
from flipproof.errors import ConfigError
from flipproof.faults.spec import field_names


class Probed(Exception):
    """The flags of a verb, by its own code, which was only asked for them."""

    def __init__(self, flags: Mapping[str, str]) -> None:
        self.flags = flags


class Parser(argparse.ArgumentParser):
    """An ``argparse`` parser whose errors are a ConfigError each, and where nothing is abbreviated.

    Args:
        verbs: verb -> what it is for.
        flags_of: verb -> its own flags and what they mean; asked only where a flag is unknown.
        probe: raise ``Probed`` in the place of parsing.
    """

    def __init__(
        self, verb: str, verbs: Mapping[str, str], flags_of: Callable[[str], Mapping[str, str]], probe: bool = False
    ) -> None:
        super().__init__(
            prog=f"flipproof {verb}",
            description=verbs[verb],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.verb, self.verbs, self.flags_of, self.probe = verb, verbs, flags_of, probe
        self.takes_keys = False
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def add_keys(self) -> None:
        """Have the help say that keys of a config are flags as well."""
        self.takes_keys = True
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help="This, and every key with its meaning.")

    def format_help(self) -> str:
        if self.takes_keys:
            self.epilog = sections_help()
        return super().format_help()

    def own_flags(self) -> dict[str, str]:
        """Flag -> what it means."""
        return {flag: action.help or "" for action in self._actions for flag in action.option_strings}

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        flags = self.own_flags()
        if self.probe:
            raise Probed(flags)
        problems = [
            f"{flag}: unknown flag{self._meant(flag)}"
            for argument in args[: args.index("--") if "--" in args else None]
            if _is_flag(argument) and (flag := argument.partition("=")[0]) not in flags
        ]
        if problems:
            raise ConfigError(problems)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())
        if extra := re.fullmatch(r"unrecognized arguments: (.*)", text):
            model = f"; did you mean --model.hf_model_path {extra[1]}?" if self.takes_keys else ""
            text = f"{extra[1]}: not expected here{model}"
        elif missing := re.fullmatch(r"the following arguments are required: (.*)", text):
            text = f"{missing[1]} is missing"
        elif value := re.fullmatch(r"argument ([^\s/:]+)\S*: (.*)", text):
            problem = "a value is missing" if value[2] == "expected one argument" else value[2]
            text = value[1] + (f" {problem}" if problem.startswith(("= ", "is ")) else f": {problem}")
        raise ConfigError([text])

    def _meant(self, flag: str) -> str:
        """The end of a message about an unknown flag."""
        word = flag.lstrip("-")
        plain = word.replace("-", "_").lower()
        own = {name.lstrip("-").replace("-", "_"): name for name in self.own_flags()}
        if plain in own:
            return f"; did you mean {own[plain]}?"
        if plain in SECTIONS and self.takes_keys:
            keys = ", ".join(f"--{plain}.{key}" for key in field_names(SECTIONS[plain])[:3])
            return f"; name a key of the table ({keys}, …), or give a file that holds the table to --config"
        if plain in ("output", "output_dir", "out_dir", "save_dir", "save_path") and "to" in own:
            return "; did you mean --to?"
        if plain in ("config_file", "transform_cfg", "bitflip_config", "cfg") and self.takes_keys:
            return "; did you mean --config?"
        others = [verb for verb in self.verbs if verb != self.verb and plain in _plain(self.flags_of(verb))]
        if plain in self.verbs:
            where = f"; it belongs to {' and '.join(others)}" if others else ""
            return f"{where}; flipproof {plain} is a verb: {self.verbs[plain]}"
        meant = [f"--{key}" for key in keys_meant(plain)] if self.takes_keys else []
        exact = self.takes_keys and is_named(plain)
        if others and not exact:
            return f"; it belongs to {' and '.join(others)}"
        if near := nearest(plain, own) if not exact else None:
            meant = [own[near]]
        elsewhere = f" ({' and '.join(others)} has {flag})" if others else ""
        return f"; did you mean {' or '.join(meant)}?{elsewhere}" if meant else "; see --help"


def _plain(flags: Iterable[str]) -> set[str]:
    return {flag.lstrip("-").replace("-", "_") for flag in flags}


def _is_flag(text: str) -> bool:
    return bool(re.fullmatch(r"--?[A-Za-z][^\s=]*(=.*)?", text, re.DOTALL))


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


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.takes_keys = False
        describe_keys(parser)
        parser.print_help()
        parser.exit()


def value_of(declared: Any) -> Callable[[str], Any]:
    """What turns a flag's text into the declared type; see ``config.values.convert``."""

    def converted(text: str) -> Any:
        try:
            return convert(text, declared)
        except ValueError as allowed:
            seen = f"= {text!r}" if text else "is empty"
            raise argparse.ArgumentTypeError(f"{seen}: {allowed} is allowed") from allowed

    return converted


def path_of(text: str) -> Path:
    """A path, of which ~ is the user's home; an empty one is mostly an unset variable of the shell."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    try:
        os.fsencode(path := Path(os.path.expanduser(text)))
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"= {text!a}: not in this locale's letters; set PYTHONUTF8=1") from error
    return path
