"""The command line: ``flipproof VERB``. Each verb imports what it needs when it runs.

Whatever the user can get wrong ends in one clear line per problem on stderr and exit code 2, with nothing written.
"""

import codecs
import errno
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from flipproof import __version__
from flipproof.cli.arguments import Parser
from flipproof.cli.model import config_of, control_of
from flipproof.cli.verbs import VERBS
from flipproof.config import RunConfig, aliases
from flipproof.config.names import nearest, plain
from flipproof.errors import ConfigError
from flipproof.launch import join_srun, start_processes, started_by_devices, tell_launcher
from flipproof.log import set_up_logging

_PLAIN = {"✔": "y", "✘": "n", "±": "~", "×": "x", "−": "-", "–": "-", "…": "...", "·": "*", "→": "->", "⁻": "^-"}


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: what a terminal without UTF-8 shows in the place of letters that it does not have."""
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    codecs.register_error("flipproof", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="flipproof")
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "help"
    try:
        code = _run(verb, arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        _complain(verb, error.problems)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if (problem := _of_the_machine(error)) is None:
            tell_launcher(f"flipproof {verb}: {type(error).__name__}: {error}")
            raise
        _complain(verb, [problem])
    except KeyboardInterrupt:
        if not started_by_devices():
            print(f"flipproof {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if problem := _of_memory(error):
            _complain(verb, [problem])
            return 2
        tell_launcher(f"flipproof {verb}: {type(error).__name__}: {error}")
        raise
    return 2


def _run(verb: str, arguments: list[str]) -> int:
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if verb == "--version":
        print(f"flipproof {__version__}")
        return 0
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(VERBS)}"
        what = "the verb comes first" if verb.startswith("-") else "unknown verb"
        print(f"flipproof: error: {verb}: {what}; {aliases.VERBS.get(plain(verb), hint)}", file=sys.stderr)
        return 2
    join_srun()
    set_up_logging()
    chosen = VERBS[verb]
    args, overrides = Parser(verb, VERBS).parse(arguments[1:])
    if not chosen.keys:
        return _start_or(chosen.run, verb, arguments, args)
    resumes = getattr(args, "resume", None) is not None
    config, adapter = config_of(args.model, args.config or [], overrides, resumes)
    if adapter is not None and "adapter" not in args:
        problem = f"{args.model} holds an adapter, and {verb} takes whole models"
        raise ConfigError([f"{problem}; flipproof export {args.model} --to DIR makes one of it"])
    if adapter is not None:
        if not args.adapter and getattr(args, "tasks", None) is None and "control" in args:
            args.control = args.control or control_of(adapter)
        args.adapter = args.adapter or adapter
    return _start_or(chosen.run, verb, arguments, args, config)


def _start_or(
    run: Callable[..., int | None], verb: str, arguments: list[str], args: Namespace, *config: RunConfig
) -> int:
    """Run a verb here, or the whole command line in the processes that are to be started."""
    if "devices" in args and (code := start_processes(verb, arguments, args.devices)) is not None:
        return code
    return run(args, *config) or 0


def _complain(verb: str, problems: Sequence[str]) -> None:
    lines = [f"flipproof {verb}: error: {' '.join(problem.splitlines())}" for problem in problems]
    # all processes of a node see the same
    if os.environ.get("LOCAL_RANK", "0") == "0" and not started_by_devices():
        print("\n".join(lines), file=sys.stderr)
    tell_launcher("\n".join(lines), 2)


def _of_memory(error: Exception) -> str | None:
    """What the memory of a machine or GPU had no room for, or None where that is not what went wrong."""
    said = str(error).partition("\n")[0]
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, not imported here
    if not short and "DefaultCPUAllocator" not in said:
        return None
    what = "training.local_batch_size, training.seq_len, lora.r and what is loaded decide how much is needed"
    return f"there is not enough memory ({said or 'MemoryError'}); {what}"


def _of_the_machine(error: OSError) -> str | None:
    """What a file or a disk refused, or None where it may as well be a mistake of ours."""
    if error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if isinstance(error.filename, str | bytes) else None
    return error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO) else None


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {verb.what}" for name, verb in VERBS.items())
    return f"usage: flipproof VERB [options]\n\n{verbs}\n\nflipproof VERB --help says more."
