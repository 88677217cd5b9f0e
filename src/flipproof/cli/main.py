"""The command line: ``flipproof VERB``. Each verb imports what it needs when it runs.

Whatever the user can get wrong ends in one clear line per problem on stderr and exit code 2, with nothing written.
"""

import argparse
import codecs
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from flipproof.cli.arguments import Parser, Probed, path_of, value_of
from flipproof.config import RunConfig, load_config, preset_names, preset_text, split_overrides
from flipproof.config.names import nearest
from flipproof.errors import ConfigError
from flipproof.launch import join_srun, tell_launcher

EXIT_REQUEUE = 75
"""sysexits.h's EX_TEMPFAIL: stopped by SIGTERM with a checkpoint, so starting again with --resume goes on."""


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
        from flipproof import __version__

        print(f"flipproof {__version__}")
        return 0
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f"did you mean {near}?" if near else f"known are {', '.join(VERBS)}"
        what = "the verb comes first" if verb.startswith("-") else "unknown verb"
        print(f"flipproof: error: {verb}: {what}; {hint}", file=sys.stderr)
        return 2
    from flipproof.log import set_up_logging

    join_srun()
    set_up_logging()
    return VERBS[verb][0](_parser(verb), arguments[1:]) or 0


def _complain(verb: str, problems: Sequence[str]) -> None:
    lines = [f"flipproof {verb}: error: {' '.join(problem.splitlines())}" for problem in problems]
    if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a node see the same
        print("\n".join(lines), file=sys.stderr)
    tell_launcher("\n".join(lines))


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


def _parser(verb: str, probe: bool = False) -> Parser:
    return Parser(verb, {name: what for name, (_, what) in VERBS.items()}, flags_of, probe)


@cache
def flags_of(verb: str) -> Mapping[str, str]:
    """A verb's own flags -> what they mean."""
    try:
        VERBS[verb][0](_parser(verb, probe=True), [])
    except Probed as probed:
        return probed.flags
    raise AssertionError(f"{verb} parsed nothing")


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {what}" for name, (_, what) in VERBS.items())
    return f"usage: flipproof VERB [options]\n\n{verbs}\n\nflipproof VERB --help says more."


def _say(result: object) -> None:
    """Print what a verb has to say, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(result)


def _escaped(toml: str) -> str:
    """TOML in the letters of the terminal, or of the file that its output goes into; it reads back as the same."""
    encoding = sys.stdout.encoding or "utf-8"
    return "".join(letter if letter.encode(encoding, "ignore") else f"\\U{ord(letter):08x}" for letter in toml)


def _train(parser: Parser, argv: list[str]) -> int:
    _add_config_arguments(parser)
    parser.add_argument("--steps", type=str, metavar="N", help="Optimizer steps; the same as --training.steps.")
    parser.add_argument("--dry-run", action="store_true", help="Validate, print the resolved config and stop.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        type=value_of(str),
        metavar="auto|step-N",
        help="Continue from the run directory's last checkpoint, if there is one, or from the one named.",
    )
    parser.add_argument("--profile", action="store_true", help="Write traces; the same as --logging.profile true.")
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest)
    config = _config(args, overrides)
    if args.dry_run:
        _say(_escaped(config.to_toml().rstrip()))
        return 0
    from flipproof.log import logger
    from flipproof.train.loop import Interrupted, train

    try:
        _say(train(config, resume=args.resume))
    except Interrupted as reason:
        logger.warning("%s", reason)
        tell_launcher(str(reason))
        return EXIT_REQUEUE
    return 0


def _eval(parser: Parser, argv: list[str]) -> None:
    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    _add_config_arguments(parser)
    parser.add_argument("--adapter", type=path_of, help="A PEFT adapter; adds the arms recovered and recovered_clean.")
    parser.add_argument(
        "--num-samples", type=str, metavar="N", help="Held-out sequences; the same as --eval.num_samples."
    )
    parser.add_argument("--trials", type=str, metavar="N", help="Fault seeds; the same as --eval.trials.")
    parser.add_argument(
        "--until-ci", type=str, metavar="H", help="Add fault seeds until sure; the same as --eval.until_ci."
    )
    parser.add_argument("--to", type=path_of, help="Directory to write results.json into.")
    parser.add_argument(
        "--batch-size", type=str, metavar="N", help="Sequences at a time; the same as --training.local_batch_size."
    )
    parser.add_argument(
        "--tasks",
        type=value_of(tuple[str, ...]),
        metavar="A,B",
        help="Tasks of lm-eval; held-out text is measured as well where a data.* key names one.",
    )
    parser.add_argument(
        "--include-path", type=path_of, metavar="DIR", help="A directory with lm-eval tasks of your own."
    )
    parser.add_argument("--num-fewshot", type=value_of(int), metavar="N", help="Examples in a task's prompt.")
    parser.add_argument(
        "--limit",
        type=value_of(float),
        metavar="N",
        help="Questions of each task, or below 1 their share; for trying out.",
    )
    parser.add_argument("--cache", type=path_of, metavar="DIR", help="Directory that keeps the tasks' answers.")
    parser.add_argument(
        "--apply-chat-template",
        "--apply_chat_template",
        action="store_true",
        help="Ask tasks in the tokenizer's chat template, for instruct models.",
    )
    parser.add_argument(
        "--fewshot-as-multiturn",
        "--fewshot_as_multiturn",
        nargs="?",
        const=True,
        type=value_of(bool),
        metavar="true|false",
        help="Examples as turns of the conversation. Default: where the chat template is applied.",
    )
    parser.add_argument(
        "--system-instruction", "--system_instruction", type=str, metavar="TEXT", help="What comes before every prompt."
    )
    _add_log_arguments(parser)
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest)
    config = _config(args, overrides)
    if args.tasks is None:
        flags = ("include_path", "num_fewshot", "limit", "cache", *_CHAT)
        if alone := [flag.replace("_", "-") for flag in flags if getattr(args, flag) not in (None, False)]:
            raise ConfigError([f"--{flag}: belongs to --tasks, which is missing" for flag in alone])
        from flipproof.measure.perplexity import evaluate

        evaluate(config, args.adapter, args.to, flip_log=args.flip_log, replay=args.replay, tell=_say)
        return
    if args.flip_log or args.replay:
        raise ConfigError(["--flip-log and --replay are about held-out text; leave out --tasks"])
    from flipproof.measure.tasks import TaskRequest, evaluate_tasks

    chat = {name: getattr(args, name) for name in _CHAT}
    request = TaskRequest(args.tasks, args.include_path, args.num_fewshot, args.limit, args.cache, **chat)
    evaluate_tasks(config, request, args.adapter, args.to, tell=_say)


_CHAT = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction")


def _generate(parser: Parser, argv: list[str]) -> None:
    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    _add_config_arguments(parser)
    parser.add_argument("--prompt", type=str, required=True, help="What to continue.")
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=value_of(int), default=100, help="Tokens to add at most."
    )
    parser.add_argument(
        "--do_sample",
        "--do-sample",
        nargs="?",
        const=True,
        type=value_of(bool),
        default=False,
        metavar="true|false",
        help="Draw tokens at random.",
    )
    parser.add_argument("--temperature", type=value_of(float), default=1.0, help="Divides the logits before a draw.")
    parser.add_argument("--top_k", "--top-k", type=value_of(int), help="Draw from so many likeliest tokens.")
    parser.add_argument(
        "--top_p",
        "--top-p",
        type=value_of(float),
        default=1.0,
        help="Draw from the likeliest that together are so probable.",
    )
    parser.add_argument("--seed", type=value_of(int), default=0, help="Of the draws of tokens, the same for all texts.")
    parser.add_argument(
        "--adapter", type=path_of, help="A PEFT adapter; adds the text of the model with it, under flips."
    )
    parser.add_argument("--to", type=path_of, help="Directory to write generate.json into.")
    _add_log_arguments(parser)
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest)
    from flipproof.measure.text import Sampling, generate

    sampling = Sampling(args.max_new_tokens, args.do_sample, args.temperature, args.top_k, args.top_p, args.seed)
    config = _config(args, overrides)
    generate(
        config,
        args.prompt,
        sampling,
        adapter=args.adapter,
        to=args.to,
        flip_log=args.flip_log,
        replay=args.replay,
        tell=_say,
    )


def _add_log_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--flip-log", type=path_of, help="File for every flip of the last faulty arm: JSON lines, .gz compressed."
    )
    parser.add_argument("--replay", type=path_of, help="Such a file: its flips in the place of draws.")


def _profile(parser: Parser, argv: list[str]) -> None:
    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    _add_config_arguments(parser)
    parser.add_argument(
        "--num-samples", type=str, metavar="N", help="Held-out sequences; the same as --eval.num_samples."
    )
    parser.add_argument("--to", type=path_of, help="Directory to write profile.json into.")
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest)
    config = _config(args, overrides)
    from flipproof.measure.magnitudes import profile

    profile(config, args.to, tell=_say)


def _sweep(parser: Parser, argv: list[str]) -> None:
    from flipproof.config.grid import SweepConfig
    from flipproof.faults.spec import field_names

    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    parser.add_argument("--to", type=path_of, required=True, help="Directory to write, or of the same sweep, to go on.")
    keys = field_names(SweepConfig)
    for key in keys:
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=str, metavar="…", help=f"The same as --sweep.{key}, below.")
    _add_config_arguments(parser)
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest)
    config = _config(args, overrides, {key: ("sweep", key) for key in keys})
    from flipproof.sweep.run import sweep

    _say(sweep(config, args.to))


def _report(parser: Parser, argv: list[str]) -> None:
    parser.add_argument(
        "directory", type=path_of, metavar="DIR", help="A run, sweep or profile, or a directory that holds some."
    )
    parser.add_argument("--to", type=path_of, metavar="FILE", help="The page; default: report.html in DIR.")
    args = parser.parse_args(argv)
    from flipproof.report.page import report

    print(report(args.directory, args.to))


def _export(parser: Parser, argv: list[str]) -> None:
    parser.add_argument("run", type=path_of, metavar="RUN", help="A run's directory.")
    parser.add_argument("--to", type=path_of, required=True, help="Directory to write, which must not exist.")
    parser.add_argument(
        "--format",
        type=value_of(Literal["model", "adapter"]),
        default="model",
        metavar="model|adapter",
        help="model: Hugging Face model with the adapters merged. adapter: PEFT.",
    )
    args = parser.parse_args(argv)
    from flipproof.train.export import export

    _say(export(args.run, args.to, args.format))


def _config_verb(parser: Parser, argv: list[str]) -> None:
    parser.add_argument("name", nargs="?", help="A preset's name.")
    parser.add_argument("--list", action="store_true", help="Print the names of the presets.")
    args = parser.parse_args(argv)
    if args.list or args.name is None:
        print("\n".join(preset_names()))
    else:
        print(preset_text(args.name), end="")


def _demo(parser: Parser, argv: list[str]) -> None:
    parser.add_argument(
        "--run-dir", type=path_of, default=Path("runs/demo"), help="Directory to write, which must not exist."
    )
    args = parser.parse_args(argv)
    from flipproof.demo import demo

    demo(args.run_dir)


def _bench(parser: Parser, argv: list[str]) -> None:
    parser.add_argument(
        "--device",
        type=value_of(Literal["cpu", "cuda"]),
        metavar="cpu|cuda",
        help="Default: the GPU where there is one.",
    )
    parser.add_argument("--to", type=path_of, help="A JSON file to write as well, which must not exist.")
    args = parser.parse_args(argv)
    from flipproof.bench import bench

    bench(args.device, args.to, tell=print)


def _doctor(parser: Parser, argv: list[str]) -> None:
    parser.parse_args(argv)
    from flipproof.doctor import doctor

    report, healthy = doctor()
    print(report)
    if not healthy:
        raise ConfigError(["this machine draws other flips than the definition; see above"])


def _add_config_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        type=str,
        metavar="FILE",
        help="A TOML or YAML file, or a preset's name; may be repeated, later ones count.",
    )
    parser.add_keys()


_SHORT = {
    "steps": ("training", "steps"),
    "model_path": ("model", "hf_model_path"),
    "num_samples": ("eval", "num_samples"),
    "trials": ("eval", "trials"),
    "until_ci": ("eval", "until_ci"),
    "batch_size": ("training", "local_batch_size"),
    "profile": ("logging", "profile"),
}
"""Flags that are other names for keys."""


def _config(
    args: argparse.Namespace,
    overrides: dict[str, dict[str, Any]],
    short: Mapping[str, tuple[str, str]] = {},
) -> RunConfig:
    """Config files and flags together; a short flag is another name for a key, whose value is checked with it."""
    from flipproof.log import logger

    for flag, (section, key) in {**_SHORT, **short}.items():
        if (value := getattr(args, flag, None)) in (None, False):
            continue
        if key in overrides.get(section, {}):
            name = "MODEL" if flag == "model_path" else f"--{flag.replace('_', '-')}"
            logger.warning("%s is --%s.%s, which is given as well; %s counts", name, section, key, name)
        overrides.setdefault(section, {})[key] = value
    return load_config(args.config or [], overrides)


VERBS: dict[str, tuple[Callable[[Parser, list[str]], int | None], str]] = {
    "demo": (_demo, "The whole story on a small model made here: minutes on two cores, no network."),
    "train": (_train, "Train with bit flips: LoRA adapters, the whole model, or from scratch."),
    "eval": (_eval, "Perplexity and lm-eval tasks with and without faults, guard and training, side by side."),
    "generate": (_generate, "Text with and without faults from the same prompt, and where the two part."),
    "profile": (_profile, "How large weights and activations are, and which guard thresholds clip none of them."),
    "sweep": (_sweep, "A grid of flip probabilities, sites, layers, bits and protections; resumable."),
    "report": (_report, "What runs, sweeps and profiles measured as one HTML page, with PNG and CSV files beside it."),
    "export": (_export, "Write a run's result as a Hugging Face model or a PEFT adapter."),
    "config": (_config_verb, "Print a preset config, or list them."),
    "bench": (_bench, "What flips cost on this machine, beside clean operations and layers."),
    "doctor": (_doctor, "What this machine can run, and why not."),
}
