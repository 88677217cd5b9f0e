"""The verbs as a table: what each is for, which flags it has, and what it runs, which is imported when it runs."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Annotated, Literal

from flipproof.cli.arguments import Argument, Verb, checkpoint_of, devices_of, path_of, value_of
from flipproof.cli.presets import escaped, print_config, print_keys
from flipproof.config import SECTIONS, RunConfig
from flipproof.config.sweep import SweepConfig
from flipproof.errors import ConfigError
from flipproof.faults.fault import GRANULARITIES
from flipproof.faults.spec import field_names
from flipproof.launch import EXIT_REQUEUE, tell_launcher
from flipproof.log import logger
from flipproof.records import CONFIG
from flipproof.values import Count, Positive

_Share = Annotated[float, lambda value: 0 < value <= 1, "a share above 0, up to 1"]


def _say(result: object) -> None:
    """Print what a verb has to say, once for all processes."""
    if os.environ.get("RANK", "0") == "0":
        print(result)


def _train(args: Namespace, config: RunConfig) -> int:
    if args.dry_run:
        from flipproof.train.start import check

        _say(escaped(config.to_toml().rstrip()))
        check(config, args.resume)
        return 0
    from flipproof.train.loop import Interrupted, train

    try:
        _say(train(config, resume=args.resume))
    except Interrupted as reason:
        logger.warning("%s", reason)
        tell_launcher(str(reason), EXIT_REQUEUE)
        return EXIT_REQUEUE
    return 0


def _eval(args: Namespace, config: RunConfig) -> None:
    chat = {name: getattr(args, name) for name in ("apply_chat_template", "fewshot_as_multiturn", "system_instruction")}
    if args.tasks is None:
        flags = ("include_path", "num_fewshot", "limit", "cache", *chat)
        if alone := [flag.replace("_", "-") for flag in flags if getattr(args, flag) not in (None, False)]:
            raise ConfigError([f"--{flag}: belongs to --tasks, which is missing" for flag in alone])
        from flipproof.measure.evaluate import evaluate

        logs = {"flip_log": args.flip_log, "replay": args.replay}
        evaluate(config, args.adapter, args.to, control=args.control, **logs, tell=_say)
        return
    if args.control:
        raise ConfigError(["--control is about held-out text; leave out --tasks, or give tasks its adapter: --adapter"])
    if args.flip_log or args.replay:
        raise ConfigError(["--flip-log and --replay are about held-out text; leave out --tasks"])
    from flipproof.measure.tasks import TaskRequest, evaluate_tasks

    request = TaskRequest(args.tasks, args.include_path, args.num_fewshot, args.limit, args.cache, **chat)
    evaluate_tasks(config, request, args.adapter, args.to, tell=_say)


def _generate(args: Namespace, config: RunConfig) -> None:
    from flipproof.measure.generate import Sampling, generate

    sampling = Sampling(args.max_new_tokens, args.do_sample, args.temperature, args.top_k, args.top_p, args.seed)
    logs = {"flip_log": args.flip_log, "replay": args.replay}
    generate(config, args.prompt, sampling, adapter=args.adapter, control=args.control, to=args.to, **logs, tell=_say)


def _profile(args: Namespace, config: RunConfig) -> None:
    if args.guards:
        from flipproof.measure.guards import fit_guards

        if args.to is None:
            raise ConfigError(["--guards: name a directory to write them into with --to"])
        fit_guards(config, args.guards, args.to, args.merge, tell=_say)
        return
    if args.merge:
        raise ConfigError(["--merge is about guards: say --guards, too"])
    from flipproof.measure.profile import profile

    profile(config, args.to, tell=_say)


def _harden(args: Namespace, config: RunConfig) -> None:
    from flipproof.harden import harden

    harden(config, args.to, args.rotate, args.guards, args.calibrate, tell=_say)


def _sweep(args: Namespace, config: RunConfig) -> None:
    from flipproof.sweep.run import sweep

    _say(sweep(config, args.to))


def _plan(args: Namespace, config: RunConfig) -> None:
    from flipproof.plan.answer import all_ways, this_way
    from flipproof.plan.estimate import Request

    request = Request(args.gpus, args.nodes, args.gpu, args.node_link, args.efficiency, args.price, args.bench)
    if not args.recommend:
        _say(this_way(config, request, args.json, args.picture, args.dry_run))
        return
    if args.picture or args.dry_run:
        flag = "--picture" if args.picture else "--dry-run"
        raise ConfigError([f"{flag} is of one way to run a training; leave out --recommend"])
    _say(all_ways(config, request, args.json))


def _compare(args: Namespace, config: RunConfig) -> int:
    from flipproof.plan.compare import as_records, as_table, compare

    found = compare(config, args.strategies, args.checkpointing, args.steps, args.node_link, args.efficiency)
    _say(json.dumps(as_records(found), indent=2) if args.json else as_table(found))
    return 0 if any(row.measured for row in found.rows) else 1


def _report(args: Namespace) -> None:
    if not args.directory.is_dir():  # before anything is imported
        raise ConfigError([f"{args.directory} is not a directory"])
    from flipproof.report.page import report

    print(report(args.directory, args.to))


def _export(args: Namespace) -> None:
    if not (args.run / CONFIG).exists():  # before anything is imported
        raise ConfigError([f"{args.run} holds no run ({CONFIG} is missing)"])
    from flipproof.train.export import export

    _say(export(args.run, args.to, args.format, args.step, args.quantize, args.quantize_inputs))


def _demo(args: Namespace) -> None:
    from flipproof.demo import demo

    demo(args.run_dir)


def _bench(args: Namespace) -> None:
    from flipproof.bench import bench

    bench(args.device, args.to, tell=print)


def _doctor(args: Namespace) -> None:
    from flipproof.doctor import doctor

    report, healthy = doctor()
    print(report)
    if not healthy:
        raise ConfigError(["this machine draws other flips than the definition; see above"])


def _flag(name: str, help: str, metavar: str = "", kind: object = str, **options: object) -> Argument:
    """A flag with a value, or without ``metavar`` a switch."""
    if not metavar:
        return Argument(name, help, {"action": "store_true"})
    return Argument(name, help, {"metavar": metavar, "type": path_of if kind is Path else value_of(kind), **options})


def _several(name: str, help: str, kind: object, choices: str) -> Argument:
    """A flag with several values."""
    return Argument(name, help, {"metavar": (choices, "…"), "type": value_of(kind), "nargs": "+", "default": ()})


def _short(name: str, key: str, metavar: str, what: str) -> Argument:
    """A flag that is another name of a key."""
    return Argument(name, f"{what} (--{key}).", {"metavar": metavar}, key)


def _config_of(run: str) -> tuple[Argument, Argument]:
    """MODEL and --config, where the directory of a run stands for what ``run`` says."""
    return (
        Argument(
            "model",
            f"A directory, a GGUF file, a Hub name, or a run's directory: {run}.",
            {"metavar": "MODEL", "nargs": "?"},
        ),
        Argument(
            "--config",
            "A TOML or YAML file or a preset's name; repeat it, later ones count.",
            {"metavar": "FILE", "action": "append"},
        ),
    )


_CONFIG = _config_of("its config and what it trained")
_WHOLE = _config_of("its config and the model that it trained (an adapter is exported first)")
_MEASURED = ("model", "parallelism", "bitflip", "training.dtype", "training.mixed_precision_param")
"""The keys that all that measures a model reads."""
_ON_TEXT = (*_MEASURED, "data", "eval.num_samples", "training.seq_len", "training.local_batch_size", "training.compile")
_TRUTH = {"nargs": "?", "const": True}
_ADAPTER = _flag("--adapter", "A PEFT adapter: adds arms of the model with it.", "DIR", Path)
_CONTROL = _flag("--control", "Another, trained alike without faults: adds its arms.", "DIR", Path)
_SWEPT = (("p", "Flip probabilities"), ("seeds", "Fault seeds for each"))
_SAMPLES = _short("--num-samples", "eval.num_samples", "N", "Held-out sequences")
_DEVICES = Argument(
    "--devices",
    "Processes to start on this machine: one for each GPU, or so many.",
    {"metavar": "auto|N", "type": devices_of},
)
_PACE = (
    _flag("--node-link", "Between nodes, 10^9 bytes a second and GPU.", "X", Positive, default=50.0),
    _flag("--efficiency", "Share of the GPU's peak that products reach.", "X", _Share, default=0.5),
)
_LOGS = (
    _flag("--flip-log", "Every flip of the last faulty arm: JSON lines, .gz compressed.", "FILE", Path),
    _flag("--replay", "Such a file: its flips in the place of draws.", "FILE", Path),
)

VERBS = {
    "demo": Verb(
        "The whole story on a small model made here: minutes on two cores, no network.",
        _demo,
        (_flag("--run-dir", "Directory to write, which must not exist.", "DIR", Path, default=Path("runs/demo")),),
        ("flipproof demo", "flipproof demo --run-dir runs/another-demo"),
    ),
    "train": Verb(
        "Train with bit flips: LoRA adapters, the whole model, or from scratch.",
        _train,
        (
            *_config_of("its config and the model that it trained, or with --resume the run itself"),
            _short("--steps", "training.steps", "N", "Optimizer steps"),
            _DEVICES,
            _flag("--dry-run", "Check what needs no weights, print the resolved config and stop."),
            Argument(
                "--resume",
                "Continue from the run directory's last checkpoint, if there is one, or from the one named.",
                {"metavar": "auto|step-N", "type": checkpoint_of, "nargs": "?", "const": "auto"},
            ),
            Argument("--profile", "Write traces (--logging.profile).", {"action": "store_true"}, "logging.profile"),
        ),
        (
            "flipproof train unsloth/Llama-3.2-1B --lora.r 8 --bitflip.w_p_exp 1e-6 --steps 500 --devices auto",
            "flipproof train runs/default --resume",
        ),
        tuple(section for section in SECTIONS if section != "sweep"),
    ),
    "eval": Verb(
        "Perplexity and lm-eval tasks with and without faults, guard and training, side by side.",
        _eval,
        (
            *_CONFIG,
            _ADAPTER,
            _CONTROL,
            _SAMPLES,
            _short("--trials", "eval.trials", "N", "Fault seeds"),
            _short("--until-ci", "eval.until_ci", "H", "Add fault seeds until sure"),
            _short("--batch-size", "training.local_batch_size", "N", "Sequences at a time"),
            _DEVICES,
            _flag("--to", "Directory to write results.json into.", "DIR", Path),
            _flag("--tasks", "Tasks of lm-eval; text as well where a data.* key names one.", "A,B", tuple[str, ...]),
            _flag("--include-path", "A directory with lm-eval tasks of your own.", "DIR", Path),
            _flag("--num-fewshot", "Examples in a task's prompt.", "N", int),
            _flag("--limit", "Questions of each task, or below 1 their share; for trying out.", "N", float),
            _flag("--cache", "Directory that keeps the tasks' answers.", "DIR", Path),
            _flag("--apply-chat-template", "Ask tasks in the tokenizer's chat template, for instruct models."),
            _flag(
                "--fewshot-as-multiturn",
                "Examples as turns of the conversation. Default: where the chat template is applied.",
                "true|false",
                bool,
                **_TRUTH,
            ),
            _flag("--system-instruction", "What comes before every prompt.", "TEXT"),
            *_LOGS,
        ),
        (
            "flipproof eval unsloth/Llama-3.2-1B --bitflip.w_p_exp 1e-6 --bitflip.w_zero_out_t 8",
            "flipproof eval runs/default --tasks wikitext --limit 50 --to results",
        ),
        (*_ON_TEXT, "eval"),
    ),
    "generate": Verb(
        "Text with and without faults from the same prompt, and where the two part.",
        _generate,
        (
            *_CONFIG,
            Argument("--prompt", "What to continue.", {"metavar": "TEXT", "required": True}),
            _flag("--max-new-tokens", "Tokens to add at most.", "N", int, default=100),
            _flag("--do-sample", "Draw tokens at random.", "true|false", bool, default=False, **_TRUTH),
            _flag("--temperature", "Divides the logits before a draw.", "T", float, default=1.0),
            _flag("--top-k", "Draw from so many likeliest tokens.", "N", int),
            _flag("--top-p", "Draw from the likeliest that together are so probable.", "P", float, default=1.0),
            _flag("--seed", "Of the draws of tokens, the same for all texts.", "N", int, default=0),
            _ADAPTER,
            _CONTROL,
            _DEVICES,
            _flag("--to", "Directory to write generate.json into.", "DIR", Path),
            *_LOGS,
        ),
        (
            'flipproof generate unsloth/Llama-3.2-1B --prompt "London is" --bitflip.x_p_exp 1e-5',
            'flipproof generate runs/default --prompt "London is" --do-sample --temperature 0.6 --top-p 0.9',
        ),
        _MEASURED,
    ),
    "profile": Verb(
        "How large weights and activations are, and which guard thresholds clip none of them.",
        _profile,
        (
            *_WHOLE,
            _SAMPLES,
            _DEVICES,
            _flag("--to", "Directory to write profile.json, or guards.safetensors, into.", "DIR", Path),
            _flag(
                "--guards",
                "Fit guards to training text instead: a threshold for each channel, each layer, or for all (tensor).",
                "|".join(reversed(GRANULARITIES)),
                choices=GRANULARITIES,
            ),
            _flag("--merge", "Guards of the model that were fitted to other text.", "DIR", nargs="+", default=()),
        ),
        (
            "flipproof profile unsloth/Llama-3.2-1B --num-samples 64",
            "flipproof profile unsloth/Llama-3.2-1B --data.source code.txt --guards channel --to guards/1b",
        ),
        _ON_TEXT,
    ),
    "harden": Verb(
        "A model that bears flips without training: rotated, guarded by channel, measured before and after.",
        _harden,
        (
            *_WHOLE,
            _DEVICES,
            _flag("--to", "New directory: model, guards, results and report.", "DIR", Path, required=True),
            _flag(
                "--rotate",
                "residual: what transformers opens; full: down projections, too, when the model runs; or none.",
                "none|residual|full",
                choices=("none", "residual", "full"),
                default="residual",
            ),
            _flag("--calibrate", "Sequences of training text that guards are fitted to (512).", "N", int),
            _flag("--guards", "How fine.", "channel|layer|tensor", choices=GRANULARITIES, default="channel"),
            _SAMPLES,
            *(_short(f"--{key}", f"sweep.{key}", "…", what) for key, what in _SWEPT),
        ),
        (
            "flipproof harden unsloth/Llama-3.2-1B --data.source code.txt --to hard/1b",
            "flipproof harden unsloth/Llama-3.2-1B --rotate full --p 1e-6:1e-3:4 --to hard/1b-full",
        ),
        (*_ON_TEXT, "sweep.p", "sweep.seeds"),
    ),
    "sweep": Verb(
        "A grid of flip probabilities, sites, layers, bits, protections, formats of weights; resumable.",
        _sweep,
        (
            *_WHOLE,
            _DEVICES,
            _flag("--to", "Directory to write, or of the same sweep, to go on.", "DIR", Path, required=True),
            *(
                Argument(f"--{key.replace('_', '-')}", f"The same as --sweep.{key}.", {"metavar": "…"}, f"sweep.{key}")
                for key in field_names(SweepConfig)
            ),
        ),
        (
            "flipproof sweep unsloth/Llama-3.2-1B --p 1e-9:1e-3:7 --sites w,x --to sweeps/1b",
            "flipproof sweep merged --p 1e-7:1e-3:5 --formats bf16,int8,nf4,mxfp4 --to sweeps/formats",
        ),
        (*_ON_TEXT, "sweep"),
    ),
    "plan": Verb(
        "Whether a training fits on GPUs, how long it takes and what it costs; needs none.",
        _plan,
        (
            *_CONFIG,
            _flag("--gpus", "GPUs of a node.", "N", Count, required=True),
            _flag("--nodes", "Nodes.", "M", Count, default=1),
            _flag("--gpu", "Which: a100-40, a100-80, h100, h200, b200, l40s, 4090, 5090.", "NAME", default="h100"),
            *_PACE,
            _flag("--price", "Of a GPU-hour: what the training costs.", "X", Positive),
            _flag(
                "--bench",
                "What flipproof bench --to FILE measured there: bandwidth and peak are then its.",
                "FILE",
                Path,
            ),
            _flag("--recommend", "All ways to run it instead: which fit, the fastest first, with its TOML."),
            _flag("--dry-run", "Count memory by a step on fake tensors, too; 10 s for 8B, a minute for 70B."),
            _flag("--picture", "A PNG file to write as well, which must not exist: memory by part.", "FILE", Path),
            _flag("--json", "Print JSON."),
        ),
        (
            "flipproof plan --config 70b --gpus 4 --gpu h200",
            "flipproof plan --config my.toml --gpus 8 --recommend",
        ),
        ("model", "training", "parallelism", "lora", "bitflip"),
    ),
    "compare": Verb(
        "Sharding strategies measured side by side, beside what plan says; a few steps of each.",
        _compare,
        (
            *_CONFIG,
            _DEVICES,
            _several(
                "--strategies",
                "Values of parallelism.sharding_strategy; default: all, or no_shard for one process.",
                SECTIONS["parallelism"].declared()["sharding_strategy"],
                "full_shard|shard_grad_op|hybrid_shard|no_shard",
            ),
            _several(
                "--checkpointing",
                "Values of training.activation_checkpointing; default: the config's own.",
                SECTIONS["training"].declared()["activation_checkpointing"],
                "full|selective|none|auto|N",
            ),
            _flag("--steps", "To measure of each, after a warm-up.", "N", Count, default=6),
            *_PACE,
            _flag("--json", "Print JSON."),
        ),
        (
            "flipproof compare --config my.toml --devices auto",
            "flipproof compare --config my.toml --devices 4 --strategies full_shard no_shard --checkpointing full auto",
        ),
        ("model", "training", "parallelism", "lora", "bitflip", "data"),
    ),
    "report": Verb(
        "What runs, sweeps and profiles measured as one HTML page, with PNG and CSV files beside it.",
        _report,
        (
            Argument(
                "directory",
                "A run, sweep or profile, or a directory that holds some.",
                {"metavar": "DIR", "type": path_of},
            ),
            _flag("--to", "The page; default: report.html in DIR.", "FILE", Path),
        ),
        ("flipproof report runs/default", "flipproof report sweeps --to sweeps.html"),
    ),
    "export": Verb(
        "Write a run's result as a Hugging Face model or a PEFT adapter.",
        _export,
        (
            Argument("run", "A run's directory.", {"metavar": "RUN", "type": path_of}),
            _DEVICES,
            _flag("--to", "Directory to write, which must not exist.", "DIR", Path, required=True),
            _flag(
                "--format",
                "model: Hugging Face model with the adapters merged. adapter: PEFT.",
                "model|adapter",
                Literal["model", "adapter"],
                default="model",
            ),
            _flag("--step", "That step's checkpoint; default: the last one.", "N", int),
            _flag("--quantize", "A model in this format: int8, int4, fp8, nf4, mxfp4, nvfp4, …", "FORMAT"),
            _flag("--quantize-inputs", "Its inputs, too, token by token.", "int8|fp8", Literal["int8", "fp8"]),
        ),
        ("flipproof export runs/default --to merged", "flipproof export runs/default --to adapter --format adapter"),
    ),
    "config": Verb(
        "Print a preset config, as it is or with other values, or list them.",
        print_config,
        (
            Argument("name", "A preset's name.", {"metavar": "NAME", "nargs": "?"}),
            _flag("--list", "Print the names of the presets."),
            Argument(
                "--set",
                "Values of keys in it.",
                {"metavar": "KEY=VALUE", "nargs": "+", "action": "append"},
            ),
        ),
        (
            "flipproof config --list",
            "flipproof config clm-60m --set local_batch_size=24 compile=false > my.toml",
        ),
    ),
    "keys": Verb(
        "All keys of a config: type, default and meaning.",
        print_keys,
        (
            Argument(
                "section", "A table, or a key by its name here or in other tools.", {"metavar": "SECTION", "nargs": "?"}
            ),
        ),
        ("flipproof keys bitflip", "flipproof keys learning_rate"),
    ),
    "bench": Verb(
        "What flips cost on this machine, beside clean operations and layers.",
        _bench,
        (
            _flag("--device", "Default: the GPU where there is one.", "cpu|cuda", Literal["cpu", "cuda"]),
            _flag("--to", "A JSON file to write as well, which must not exist.", "FILE", Path),
        ),
        ("flipproof bench", "flipproof bench --device cpu --to bench.json"),
    ),
    "doctor": Verb("What this machine can run, and why not.", _doctor, (), ("flipproof doctor",)),
}
