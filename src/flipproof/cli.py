"""The command line: ``flipproof VERB``. Each verb imports what it needs when it runs.

Whatever the user can get wrong ends in one clear line per problem on stderr and exit code 2, with nothing written.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from flipproof.config import (
    RunConfig,
    add_overrides,
    load_config,
    preset_names,
    preset_text,
    split_overrides,
)
from flipproof.errors import ConfigError

EXIT_REQUEUE = 75
"""sysexits.h's EX_TEMPFAIL: stopped by SIGTERM with a checkpoint, so starting again with --resume goes on."""


class _Parser(jsonargparse.ArgumentParser):
    """Errors as one line that names what was wrong, with the nearest known flag where there is one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        if unknown := re.search(r"(?i)unrecognized arguments?: (--[^\s=]+)", text):
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.group(1), flags, n=1)
            text = f"{unknown.group(1)}: unknown flag" + (f"; did you mean {near[0]}?" if near else "; see --help")
        raise ConfigError([text])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        from flipproof import __version__

        print(f"flipproof {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(VERBS)}"
        print(f"flipproof: error: {verb}: unknown verb; {hint}", file=sys.stderr)
        return 2
    from flipproof.runlog import set_up_logging

    set_up_logging()
    try:
        return (
            VERBS[verb][0](_Parser(prog=f"flipproof {verb}", description=VERBS[verb][1], allow_abbrev=False), rest) or 0
        )
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a node see the same
            for problem in error.problems:
                print(f"flipproof {verb}: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flipproof {verb}: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {what}" for name, (_, what) in VERBS.items())
    return f"usage: flipproof VERB [options]\n\n{verbs}\n\nflipproof VERB --help says more."


def _say(result: object) -> None:
    """Print what a verb has to say, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(result)


def _train(parser: _Parser, argv: list[str]) -> int:
    _add_config_arguments(parser)
    parser.add_argument("--steps", type=str, metavar="N", help="Optimizer steps; the same as --training.steps.")
    parser.add_argument("--dry-run", action="store_true", help="Validate, print the resolved config and stop.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        type=str,
        metavar="auto|step-N",
        help="Continue from the run directory's last checkpoint, if there is one, or from the one named.",
    )
    parser.add_argument("--profile", action="store_true", help="Write traces; the same as --logging.profile true.")
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest, defaults=False)
    config = _config(args, overrides)
    if args.get("dry_run"):
        _say(config.to_toml().rstrip())
        return 0
    from flipproof.runlog import logger
    from flipproof.train import Interrupted, train

    try:
        _say(train(config, resume=args.get("resume")))
    except Interrupted as reason:
        logger.warning("%s", reason)
        return EXIT_REQUEUE
    return 0


def _eval(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    _add_config_arguments(parser)
    parser.add_argument("--adapter", type=str, help="A PEFT adapter; adds the arms recovered and recovered_clean.")
    parser.add_argument(
        "--num-samples", type=str, metavar="N", help="Held-out sequences; the same as --eval.num_samples."
    )
    parser.add_argument("--trials", type=str, metavar="N", help="Fault seeds; the same as --eval.trials.")
    parser.add_argument(
        "--until-ci", type=str, metavar="H", help="Add fault seeds until sure; the same as --eval.until_ci."
    )
    parser.add_argument("--to", type=str, help="Directory to write results.json into.")
    parser.add_argument(
        "--batch-size", type=str, metavar="N", help="Sequences at a time; the same as --training.local_batch_size."
    )
    parser.add_argument(
        "--tasks",
        type=str,
        metavar="A,B",
        help="Tasks of lm-eval; held-out text is measured as well where a data.* key names one.",
    )
    parser.add_argument("--include-path", type=str, metavar="DIR", help="A directory with lm-eval tasks of your own.")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="Examples in a task's prompt.")
    parser.add_argument(
        "--limit", type=float, metavar="N", help="Questions of each task, or below 1 their share; for trying out."
    )
    parser.add_argument("--cache", type=str, metavar="DIR", help="Directory that keeps the tasks' answers.")
    _add_log_arguments(parser)
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest, defaults=False)
    config = _config(args, overrides)
    adapter, to, include_path, cache = _paths(args, "adapter", "to", "include_path", "cache").values()
    if args.get("tasks") is None:
        flags = ("include-path", "num-fewshot", "limit", "cache")
        if alone := [flag for flag in flags if args.get(flag.replace("-", "_")) is not None]:
            raise ConfigError([f"--{flag}: belongs to --tasks, which is missing" for flag in alone])
        from flipproof.evaluate import arms_table, evaluate

        _say(arms_table(evaluate(config, adapter, to, **_paths(args, *_LOGS))))
        return
    if args.get("flip_log") or args.get("replay"):
        raise ConfigError(["--flip-log and --replay are about held-out text; leave out --tasks"])
    from flipproof.evaluate import arms_table
    from flipproof.harness import TaskRequest
    from flipproof.tasks import evaluate_tasks, tasks_table

    names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
    request = TaskRequest(names, include_path, args.get("num_fewshot"), args.get("limit"), cache)
    arms, results = evaluate_tasks(config, request, adapter, to)
    if arms:
        _say(arms_table(arms) + "\n")
    _say(tasks_table(results))


def _generate(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    _add_config_arguments(parser)
    parser.add_argument("--prompt", type=str, required=True, help="What to continue.")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=100, help="Tokens to add at most.")
    parser.add_argument(
        "--do_sample", "--do-sample", nargs="?", const=True, type=bool, default=False, help="Draw tokens at random."
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Divides the logits before a draw.")
    parser.add_argument("--top_k", "--top-k", type=int, help="Draw from so many likeliest tokens.")
    parser.add_argument(
        "--top_p", "--top-p", type=float, default=1.0, help="Draw from the likeliest that together are so probable."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the draws of tokens, the same for all texts.")
    parser.add_argument("--adapter", type=str, help="A PEFT adapter; adds the text of the model with it, under flips.")
    parser.add_argument("--to", type=str, help="Directory to write generate.json into.")
    _add_log_arguments(parser)
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest)
    from flipproof.generate import Sampling, generate, texts_report

    sampling = Sampling(args.max_new_tokens, bool(args.do_sample), args.temperature, args.top_k, args.top_p, args.seed)
    texts = generate(_config(args, overrides), args.prompt, sampling, **_paths(args, "adapter", "to", *_LOGS))
    _say(texts_report(args.prompt, texts))


_LOGS = ("flip_log", "replay")


def _add_log_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--flip-log", type=str, help="File for every flip of the last faulty arm: JSON lines, .gz compressed."
    )
    parser.add_argument("--replay", type=str, help="Such a file: its flips in the place of draws.")


def _paths(args: jsonargparse.Namespace, *names: str) -> dict[str, Path | None]:
    return {name: Path(path) if (path := args.get(name)) else None for name in names}


def _profile(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    _add_config_arguments(parser)
    parser.add_argument(
        "--num-samples", type=str, metavar="N", help="Held-out sequences; the same as --eval.num_samples."
    )
    parser.add_argument("--to", type=str, help="Directory to write profile.json into.")
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest, defaults=False)
    config = _config(args, overrides)
    from flipproof.magnitudes import profile, profile_table, proposed_toml

    result = profile(config, Path(to) if (to := args.get("to")) else None)
    _say(f"{profile_table(result)}\n\n{proposed_toml(result)}")


def _sweep(parser: _Parser, argv: list[str]) -> None:
    from flipproof.spec import field_names
    from flipproof.sweep.plan import SweepConfig

    parser.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="A directory or a Hub name; the same as --model.hf_model_path."
    )
    parser.add_argument("--to", type=str, required=True, help="Directory to write, or of the same sweep, to go on.")
    keys = field_names(SweepConfig)
    for key in keys:
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=str, metavar="…", help=f"The same as --sweep.{key}, below.")
    _add_config_arguments(parser)
    overrides, rest = split_overrides(argv)
    args = parser.parse_args(rest, defaults=False)
    given = {key: value for key in keys if (value := args.get(key)) is not None}
    overrides["sweep"] = overrides.get("sweep", {}) | given
    config = _config(args, overrides)
    from flipproof.sweep.run import sweep

    _say(sweep(config, Path(args.to)))


def _report(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument("directory", metavar="DIR", help="A run, sweep or profile, or a directory that holds some.")
    parser.add_argument("--to", type=str, metavar="FILE", help="The page; default: report.html in DIR.")
    args = parser.parse_args(argv, defaults=False)
    from flipproof.report.page import report

    print(report(Path(args.directory), Path(to) if (to := args.get("to")) else None))


def _export(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument("run", help="A run's directory.")
    parser.add_argument("--to", type=str, required=True, help="Directory to write, which must not exist.")
    parser.add_argument(
        "--format",
        choices=["model", "adapter"],
        default="model",
        help="model: Hugging Face model with the adapters merged. adapter: PEFT.",
    )
    args = parser.parse_args(argv)
    from flipproof.export import export

    _say(export(Path(args.run), Path(args.to), args.format))


def _config_verb(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument("name", nargs="?", help="A preset's name.")
    parser.add_argument("--list", action="store_true", help="Print the names of the presets.")
    args = parser.parse_args(argv)
    if args.list or args.name is None:
        print("\n".join(preset_names()))
    else:
        print(preset_text(args.name), end="")


def _demo(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument("--run-dir", type=str, default="runs/demo", help="Directory to write, which must not exist.")
    args = parser.parse_args(argv)
    from flipproof.demo import demo

    demo(Path(args.run_dir))


def _bench(parser: _Parser, argv: list[str]) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: the GPU where there is one.")
    parser.add_argument("--to", type=str, help="A JSON file to write as well, which must not exist.")
    args = parser.parse_args(argv, defaults=False)
    from flipproof.bench import bench

    print(bench(args.get("device"), Path(to) if (to := args.get("to")) else None))


def _doctor(parser: _Parser, argv: list[str]) -> None:
    parser.parse_args(argv)
    from flipproof.doctor import doctor

    report, healthy = doctor()
    print(report)
    if not healthy:
        raise ConfigError(["this machine draws other flips than the definition; see above"])


def _add_config_arguments(parser: _Parser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        type=str,
        help="A TOML or YAML file, or a preset's name; may be repeated, later ones count.",
    )
    add_overrides(parser)


def _config(args: jsonargparse.Namespace, overrides: dict[str, dict[str, Any]]) -> RunConfig:
    """Config files and flags together; a short flag is another name for a key, whose value is checked with it."""
    shorthands = {
        "steps": ("training", "steps"),
        "model_path": ("model", "hf_model_path"),
        "num_samples": ("eval", "num_samples"),
        "trials": ("eval", "trials"),
        "until_ci": ("eval", "until_ci"),
        "batch_size": ("training", "local_batch_size"),
        "profile": ("logging", "profile"),
    }
    for flag, (section, key) in shorthands.items():
        if (value := args.get(flag)) not in (None, False):
            overrides.setdefault(section, {})[key] = value
    return load_config(args.get("config") or [], overrides)


VERBS: dict[str, tuple[Callable[[_Parser, list[str]], int | None], str]] = {
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
