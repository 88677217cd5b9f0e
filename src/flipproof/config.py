"""One run's configuration: a tree of dataclasses, read from TOML with dotted overrides.

The tables and keys are those of the 70B tutorial's TOML, which runs verbatim. A key's docstring is its help text on the
command line. Reading collects every error of a file (unknown keys with the nearest known one, wrong types, values out
of range) and reports them together.

Two older dialects are read wherever ``[bitflip]`` is: ``transform_cfg.toml`` (``use_lora``, ``[fc]``, ``[lora]``),
and the YAML ``layer_name_to_config`` (regular expression -> fault, "default" for the rest, null = leave alone).
"""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import toml
import yaml

from flipproof.spec import BitFlipSpec, LoraSpec, field_names
from flipproof.sweep.plan import SweepConfig

Dtype = Literal["bfloat16", "float16", "float32"]


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def first_of(problems: list[str]) -> str:
    """The first of many problems of one kind by the alphabet, and how many more there are."""
    more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
    return f"{min(problems)}{more}"


def _at_least(config: object, minimum: float, *names: str) -> list[str]:
    return [
        f"{name} = {value!r}: at least {minimum} is allowed"
        for name in names
        if (value := getattr(config, name)) is not None and not value >= minimum
    ]


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    flavor: str | None = None
    """Shape by name: 8B, 70B, 405B (Llama 3), clm-60M to clm-1.1B (AICrossSim-CLM), demo."""
    hf_model_path: str | None = None
    """Weights, shape and tokenizer: a Hugging Face Hub name or a directory."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained loads hf_model_path's weights; random starts from scratch and needs no weights."""
    tokenizer: str | None = None
    """A Hub name or a directory, or "bytes" for the byte-level one. Default: hf_model_path's."""

    def problems(self) -> list[str]:
        if self.init == "pretrained" and self.hf_model_path is None:
            return [
                "hf_model_path is not set: name a Hub model or a directory, or start from scratch "
                "(init = 'random' with a flavor)"
            ]
        if self.init == "random" and self.hf_model_path is None and self.flavor is None:
            return ["init = 'random' needs a shape: set flavor, or hf_model_path to take its config"]
        return []


@dataclass(frozen=True)
class TrainingConfig:
    """How to train."""

    dtype: Dtype | None = None
    """Dtype of the model's weights, and of the bits that flip; adapters are float32. Default: the checkpoint's, or
    float32 from scratch."""
    mixed_precision_param: Dtype | None = None
    """Dtype to compute in, where it is not dtype; bits then flip in this one."""
    mixed_precision_reduce: Dtype = "float32"
    """Dtype of gradient reductions between processes."""
    seq_len: int = 2048
    """Tokens per sequence."""
    local_batch_size: int = 1
    """Sequences per process and micro-batch; the global micro-batch is those of all processes."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    steps: int | None = None
    """Optimizer steps. Default: what tokens_per_parameter gives, or 1000."""
    tokens_per_parameter: float | None = None
    """Length of the run where steps is not given, in training tokens per parameter of the model: 0.01 is 1%. The steps
    follow from it with batch, accumulation and number of processes."""
    lr: float = 2e-4
    """Peak learning rate of AdamW (betas 0.9 and 0.95)."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on matrices only."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm; 0 is no clipping."""
    log_freq: int = 10
    """Steps between lines of metrics.jsonl."""
    save_freq: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    activation_checkpointing: Literal["none", "full", "selective", "auto"] | int = "auto"
    """What backward computes anew instead of keeping: nothing, every block (full), every n-th block (a number), or in
    every block all but matrix products and attention (selective). auto keeps as much as the GPU's memory allows; on a
    CPU it is none."""
    compile: bool | None = None
    """Compile the model's blocks with torch.compile. Default: on a GPU."""

    def problems(self) -> list[str]:
        problems = _at_least(self, 0, "weight_decay", "warmup_steps", "max_norm", "save_freq", "seed")
        if isinstance(self.activation_checkpointing, int):
            problems += _at_least(self, 1, "activation_checkpointing")
        if self.tokens_per_parameter is not None and not self.tokens_per_parameter > 0:
            problems.append(f"tokens_per_parameter = {self.tokens_per_parameter!r}: a positive number is allowed")
        problems += _at_least(self, 1, "local_batch_size", "gradient_accumulation_steps", "steps", "log_freq")
        problems += _at_least(self, 2, "seq_len")
        if not self.lr > 0:
            problems.append(f"lr = {self.lr!r}: a positive number is allowed")
        return problems


@dataclass(frozen=True)
class ParallelismConfig:
    """How the model is spread over processes."""

    fsdp_degree: int | None = None
    """Processes over which parameters, gradients and optimizer state are sharded. Default: all of them; with
    hybrid_shard those of one node."""
    replicas: int | None = None
    """Copies of the sharded model, each with data of its own. The processes are fsdp_degree x replicas. Default: 1;
    with hybrid_shard as many as the processes give."""
    sharding_strategy: Literal["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"] = "full_shard"
    """full_shard (ZeRO-3) gathers a block's parameters for forward and again for backward; shard_grad_op (ZeRO-2) keeps
    them in between; hybrid_shard shards within groups of fsdp_degree processes and replicates over the groups; no_shard
    (DDP) gives every process the whole model."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the CPU's memory between uses."""
    forward_prefetch: int = 1
    """Blocks whose parameters are gathered ahead of their turn in forward; 0 leaves it to FSDP."""
    backward_prefetch: int = 1
    """The same in backward."""
    keep_gathered: bool = False
    """Keep parameters gathered between the micro-batches of a step: less communication, the memory of the whole
    model."""
    timeout_minutes: float = 10.0
    """A collective that takes longer ends the run, and says which process waited in which."""

    def problems(self) -> list[str]:
        problems = _at_least(self, 1, "fsdp_degree", "replicas")
        problems += _at_least(self, 0, "forward_prefetch", "backward_prefetch")
        if not self.timeout_minutes > 0:
            problems.append(f"timeout_minutes = {self.timeout_minutes!r}: a positive number is allowed")
        if self.sharding_strategy == "no_shard":
            if (self.fsdp_degree or 1) != 1:
                problems.append(f"fsdp_degree = {self.fsdp_degree!r}: no_shard allows 1")
            if self.cpu_offload:
                problems.append("cpu_offload = True: no_shard keeps the whole model on the device")
        return problems


@dataclass(frozen=True)
class DataConfig:
    """What text to train and evaluate on."""

    source: str = "Cheng98/fineweb-edu-1.25B"
    """A file or folder (txt, jsonl, parquet), a Hub data set, or "stdlib": Python's own standard library source."""
    eval_source: str | None = None
    """Held-out text, given as source is. Default: a part of source that is kept out of training."""
    held_out_tokens: int = 262144
    """How many tokens of source are held out, where eval_source is not given; never more than a tenth of it."""
    text_column: str = "text"
    """The column of jsonl, parquet and Hub data that holds the text."""
    max_tokens: int | None = None
    """Use this many tokens of source at most."""

    def problems(self) -> list[str]:
        return _at_least(self, 1, "max_tokens", "held_out_tokens")


@dataclass(frozen=True)
class EvalConfig:
    """How to evaluate."""

    trials: int = 5
    """Fault seeds per faulty arm; none of them is used in training."""
    until_ci: float | None = None
    """Keep adding fault seeds, from 5 or trials on, until the 95% interval over them is at most this wide to either
    side, relative to perplexity: 0.01 is ±1%. Default: trials and no more."""
    max_trials: int = 100
    """Where until_ci stops at the latest."""
    num_samples: int = 64
    """Held-out sequences."""

    def problems(self) -> list[str]:
        problems = _at_least(self, 1, "trials", "num_samples")
        if self.until_ci is not None and not 0 < self.until_ci < math.inf:
            problems.append(f"until_ci = {self.until_ci!r}: a positive number is allowed (0.01 is ±1% of perplexity)")
        if self.until_ci is not None:
            problems += _at_least(self, max(5, self.trials), "max_trials")
        return problems


@dataclass(frozen=True)
class LoggingConfig:
    """Where the run writes."""

    run_dir: str = "runs/default"
    """The run's directory: config, metrics, checkpoints, exports, results."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's directory."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Log to Weights & Biases: to its server, or into the run's directory for wandb sync."""
    wandb_project: str = "flipproof"
    """The W&B project."""
    profile: bool = False
    """Write torch.profiler traces of a few steps and a snapshot of GPU memory into the run's directory."""

    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    keep_last: int = 2
    """How many checkpoints are kept; older ones are deleted after a newer one is complete."""
    asynchronous: bool = True
    """Write while training goes on; False waits for the disk."""
    state_dict_type: Literal["sharded", "full"] = "sharded"
    """sharded: every process writes what it holds. full: process 0 gathers everything and writes one file. Either is
    read by any number of processes."""

    def problems(self) -> list[str]:
        return _at_least(self, 1, "keep_last")


@dataclass(frozen=True)
class RunConfig:
    """The whole tree; one field per TOML table."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    lora: LoraSpec = field(default_factory=LoraSpec)
    bitflip: BitFlipSpec = field(default_factory=BitFlipSpec)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def faulty(self) -> bool:
        """Whether the run's model has faulty layers: flips, a guard, or the adapters that live in such layers."""
        return bool(self.lora.r) or self.bitflip.any_fault

    def to_toml(self) -> str:
        """The resolved config as TOML, which reads back as the same config. Keys that are None are left out."""
        tree = dataclasses.asdict(self)
        # TOML has no null. Elsewhere a missing key says None; in an override it would say "inherit".
        tree["bitflip"]["layer_name_to_config"] = _none_as_false(tree["bitflip"]["layer_name_to_config"])
        return toml.dumps(_without_none(tree))


SECTIONS: dict[str, type] = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}  # type: ignore[misc]


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value


def _none_as_false(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _none_as_false(v) for k, v in value.items()}
    return False if value is None else value


def add_overrides(parser: jsonargparse.ArgumentParser) -> None:
    """Give ``parser`` every key of the tree as ``--section.key``, with its docstring as help."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)


def split_overrides(argv: list[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(section -> key -> text, the other arguments) of a command line, where ``--section.key`` names a config key."""
    overrides: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        section, dot, key = flag.removeprefix("--").partition(".")
        if not (flag.startswith("--") and dot):
            rest.append(argument)
            continue
        if not equals and (value := next(arguments, "")) == "":
            raise ConfigError([f"{flag}: a value is missing"])
        if section not in SECTIONS:
            raise ConfigError([f"{flag}: unknown flag{_nearest(section, SECTIONS)}"])
        overrides.setdefault(section, {})[key] = value
    return overrides, rest


def load_config(
    paths: Iterable[str | Path] = (), overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> RunConfig:
    """Read config files, later ones over earlier ones, then overrides, and validate the whole.

    Args:
        paths: TOML or YAML files, or names of presets.
        overrides: section -> key -> value.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    tree: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for path in paths:
        # a run is called after its first config, unless something else is said
        tree["logging"].setdefault("run_dir", f"runs/{Path(path).stem}")
        document, found = _read(path)
        problems += found
        _merge_into(tree, document)
    _merge_into(tree, overrides or {})
    sections = {}
    for name, section in SECTIONS.items():
        values, found = _checked_values(name, section, tree[name])
        problems += found
        try:
            built = section(**values)
            found = built.problems()
        except ValueError as error:
            found = str(error).split("; ")
        problems += [f"{name}.{problem}" for problem in found]
        sections[name] = built if not found else None
    if problems:
        raise ConfigError(problems)
    return RunConfig(**sections)  # type: ignore[arg-type]


def _merge_into(tree: dict[str, dict[str, Any]], other: Mapping[str, Mapping[str, Any]]) -> None:
    for section, values in other.items():
        tree.setdefault(section, {}).update(values)


def _read(path: str | Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(section -> key -> value, problems) of one file or preset."""
    if str(path) in preset_names():
        text, name = preset_text(str(path)), f"{path}.toml"
    else:
        name = str(path)
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise ConfigError(
                [f"{path}: {reason}; a config is a TOML or YAML file or a preset ({', '.join(preset_names())})"]
            ) from error
    try:
        document = yaml.safe_load(text) if name.endswith((".yaml", ".yml")) else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {' '.join(str(error).split())}"]) from error
    if not isinstance(document, dict):
        raise ConfigError([f"{path}: holds no tables; known are {', '.join(SECTIONS)}"])
    document, problems = _translate_dialects(document)
    sections: dict[str, dict[str, Any]] = {}
    for section, values in document.items():
        if section not in SECTIONS:
            problems.append(f"[{section}]: unknown table{_nearest(section, SECTIONS)}")
        elif not isinstance(values, dict):
            problems.append(f"{section} = {values!r}: a table is allowed")
        else:
            sections[section] = values
    return sections, [f"{path}: {problem}" for problem in problems]


def _translate_dialects(document: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The older dialects' words as [bitflip] and [lora]; anything else unchanged."""
    document = dict(document)
    problems = []
    if isinstance(document.get("fc"), dict):
        document["bitflip"] = document.pop("fc") | document.get("bitflip", {})
    use_lora = document.pop("use_lora", True)
    if not isinstance(use_lora, bool):
        problems.append(f"use_lora = {use_lora!r}: true or false is allowed")
    elif not use_lora:
        document["lora"] = {"r": 0}
    if isinstance(document.get("default"), dict):  # the bare mapping
        layers = {k: document.pop(k) for k in list(document) if k not in SECTIONS}
        document["layer_name_to_config"] = layers
    if isinstance(document.get("layer_name_to_config"), dict):
        layers = dict(document.pop("layer_name_to_config"))
        if (flavor := document.pop("transform_flavor", "fc")) not in ("fc", None):
            problems.append(f"transform_flavor = {flavor!r}: 'fc' is allowed")
        if not document.pop("use_regex", True):
            layers = {name if name == "default" else re.escape(name): config for name, config in layers.items()}
        bitflip = dict(layers.pop("default", None) or {})
        # There, every entry was complete: a key that it does not name is off, not inherited.
        off = dict.fromkeys(f"{operand}_{key}" for operand in "wx" for key in ("p_exp", "p_frac", "zero_out_t"))
        overrides = {name: config if config is None else off | _seedless(config) for name, config in layers.items()}
        document["bitflip"] = _seedless(bitflip) | {"layer_name_to_config": overrides} | document.get("bitflip", {})
    return document, problems


def _seedless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the reference's per-field seeds: each layer, operand and field has a stream of its own here."""
    return {k: v for k, v in config.items() if not re.fullmatch(r"[wx]_seed_(exp|frac)", k)}


def _checked_values(name: str, section: type, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values of one table as their declared types, and one problem per unknown or ill-typed key."""
    known = field_names(section)
    types = {f.name: f.type for f in dataclasses.fields(section)}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(section, name)
    good, problems = {}, []
    for key, value in values.items():
        if key not in known:
            problems.append(f"{name}.{key}: unknown key{_nearest(key, known, name)}")
            continue
        seen = value
        try:
            if value in ("nan", "inf", "-inf"):  # as TOML writes them; YAML, which jsonargparse reads, does not
                value = float(value)
            value = _collection(value, str(types[key]))
            if isinstance(value, str):  # from the command line, or what YAML takes for text, such as 1e-05
                parsed = parser.parse_args([f"--{name}.{key}={value}"], defaults=False)
            else:
                parsed = parser.parse_object({name: {key: value}}, defaults=False)
            good[key] = parsed[name].as_dict()[key]
        except (jsonargparse.ArgumentError, ValueError, TypeError):
            wanted = getattr(types[key], "__name__", str(types[key])).replace("typing.", "")
            if hasattr(types[key], "__args__"):
                wanted = str(types[key]).replace("typing.", "").replace("collections.abc.", "")
            if str(types[key]).startswith("tuple["):
                of = f" of {words}" if (words := ", ".join(re.findall(r"'(\w+)'", wanted))) else ""
                wanted = f"a list{of}"
            elif "Mapping[" in str(types[key]):
                wanted = 'a table, such as { exp = 1e-5, "15" = 0 },'
            problems.append(f"{name}.{key} = {seen!r}: {wanted} is allowed")
    return good, problems


def _collection(value: Any, declared: str) -> Any:
    """The words of a command line as a list or a table, where one is declared: head,embedding or { exp = 1e-5 }."""
    if not isinstance(value, str) or not value.strip():
        return value
    if declared.startswith("tuple[") and not value.lstrip().startswith("["):
        return [word.strip() for word in value.split(",")]
    if "Mapping[" in declared:
        try:
            return tomllib.loads(f"table = {value}")["table"]
        except tomllib.TOMLDecodeError:
            return value  # YAML and JSON are read by jsonargparse
    return value


def _nearest(key: str, known: Iterable[str], section: str | None = None) -> str:
    known = list(known)
    elsewhere = [f"{other}.{key}" for other, cls in SECTIONS.items() if key in field_names(cls)]
    if section is not None and elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known are {', '.join(known)}"


def preset_names() -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in _presets().iterdir() if file.name.endswith(".toml"))


def preset_text(name: str) -> str:
    """A preset's TOML, comments included. Raises ConfigError for an unknown name."""
    if name not in preset_names():
        raise ConfigError([f"no preset is called {name!r}{_nearest(name, preset_names())}"])
    return (_presets() / f"{name}.toml").read_text()


def _presets() -> Any:
    return resources.files("flipproof") / "presets"
