"""The keys of a run's configuration: a tree of dataclasses, one for each TOML table.

The tables and keys are those of the 70B tutorial's TOML, which runs verbatim. A key's docstring is its help text on the
command line.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tomli_w

from flipproof.config.sweep import SweepConfig, Trials
from flipproof.errors import ConfigError
from flipproof.faults.spec import BitFlipSpec, LoraSpec
from flipproof.formats.spec import NAMES, is_format
from flipproof.values import Between, Count, Positive, Seed, Table, Texts, Whole

Dtype = Literal["bfloat16", "float16", "float32"]
QuantizeInputs = Literal["int8", "fp8"]
Strategy = Literal["full_shard", "shard_grad_op", "hybrid_shard", "no_shard"]
Magnitude = Annotated[float, lambda value: 0 <= value < 2**63, "a number of at least 0, below 2^63,"]
Decay = Annotated[float, lambda value: 0 <= value < 1, "a number of at least 0, below 1,"]
Quantize = Annotated[str, is_format, NAMES]

PRECISIONS: dict[str, tuple[Dtype, Dtype | None]] = {
    "bf16-true": ("bfloat16", None),
    "bf16-mixed": ("float32", "bfloat16"),
    "16-true": ("float16", None),
    "16-mixed": ("float32", "float16"),
    "32-true": ("float32", None),
}
"""LitGPT's word -> (dtype, mixed_precision_param)."""


def _set_in_vain(why: str, where: str, table: Table, *keys: str) -> list[str]:
    """A line for each of some keys of a table that is set, and not to what it is by default."""
    usual = type(table)()
    set_to = {key: value for key in keys if (value := getattr(table, key)) != getattr(usual, key)}
    return [f"{where}.{key} = {value!r} says nothing: {why}" for key, value in set_to.items()]


@dataclass(frozen=True)
class ModelConfig(Table):
    """Which model."""

    flavor: str | None = None
    """Shape by name: 1B, 3B (Llama 3.2), 8B, 70B, 405B (Llama 3), clm-60M to clm-1.1B (AICrossSim-CLM), demo."""
    hf_model_path: str | None = None
    """Weights, shape and tokenizer: a Hugging Face Hub name, a directory or a GGUF file."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained loads hf_model_path's weights; random starts from scratch and needs no weights."""
    quantize: Quantize | None = None
    """Quantise the weights of linear layers, all but the output head, by rounding to nearest while they are read, one
    layer at a time: int8, int4, int4-asym, fp8 (e4m3), fp8-e5m2, nf4, mxfp8, mxfp4, nvfp4; int4-g64 has groups of 64 in
    the place of int4's 128. Faults are then of codes and scales (bitflip.w_code_p and more), and adapters stay beside
    the weights: QLoRA. A checkpoint that is quantised already is kept as it is."""
    quantize_inputs: QuantizeInputs | None = None
    """Quantise the inputs of layers whose weights are quantised, too, each token by itself as it comes, to int8 or fp8
    (e4m3): W8A8, W4A8. Faults of inputs are then of codes and scales (bitflip.x_code_p and more). A checkpoint that is
    served so has it on."""
    tokenizer: str | None = None
    """A Hub name or a directory, or "bytes" for the byte-level one. Default: hf_model_path's."""

    def problems(self) -> list[str]:
        set_to = {key: value for key in ("quantize", "quantize_inputs") if (value := getattr(self, key)) is not None}
        if set_to and self.init == "random":
            why = "init = 'random' has no weights to quantise; leave one of them out"
            return [f"{key} = {value!r}: {why}" for key, value in set_to.items()]
        if self.init == "pretrained" and self.hf_model_path is None:
            return [
                "hf_model_path is not set: name a Hub model or a directory, or start from scratch "
                "(init = 'random' with a flavor)"
            ]
        if self.init == "random" and self.hf_model_path is None and self.flavor is None:
            return ["init = 'random' needs a shape: set flavor, or hf_model_path to take its config"]
        return []


@dataclass(frozen=True)
class TrainingConfig(Table):
    """How to train."""

    dtype: Dtype | None = None
    """Dtype of the model's weights, and of the bits that flip; adapters are float32. Default: the checkpoint's, or
    float32 from scratch. Weights that themselves train (lora.r = 0) are float32."""
    mixed_precision_param: Dtype | None = None
    """Dtype to compute in, where it is not dtype; bits then flip in this one. Default: dtype, or where a 16-bit
    checkpoint's weights train the checkpoint's."""
    precision: Literal["bf16-true", "bf16-mixed", "16-true", "16-mixed", "32-true"] | None = None
    """LitGPT's word for both dtypes together: true holds and computes in one, mixed holds float32 and computes in 16
    bits. It is written down as dtype and mixed_precision_param."""
    mixed_precision_reduce: Dtype = "float32"
    """Dtype of gradient reductions between processes, where FSDP makes them."""
    seq_len: Annotated[int, Between(2)] = 2048
    """Tokens per sequence."""
    local_batch_size: Count = 1
    """Sequences per process and micro-batch; the global micro-batch is those of all processes."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step. Where global_batch_size is given, what follows from it."""
    global_batch_size: Count | None = None
    """Sequences per optimizer step, of all processes and micro-batches: a multiple of local_batch_size x processes."""
    steps: Count | None = None
    """Optimizer steps. Default: what tokens_per_parameter or epochs give, or 1000."""
    epochs: Positive | None = None
    """Length of the run in passes over the training text, rounded up to whole steps: 0.5 is half of it. All of the text
    is read before the first step. Not together with steps or tokens_per_parameter."""
    tokens_per_parameter: Positive | None = None
    """Length of the run where steps is not given, in training tokens per parameter of the model: 0.01 is 1%. The steps
    follow from it with batch, accumulation and number of processes."""
    tokens_per_parameter_of: Literal["all", "non-embedding"] | Count = "all"
    """Which parameters tokens_per_parameter counts: all; non-embedding, without the input embedding but with the output
    head, as AICrossSim-CLM counts its 22 tokens per parameter; or a number, such as 8000000000 for an "8B"."""
    lr: Positive = 2e-4
    """Peak learning rate of AdamW."""
    beta1: Decay = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: Decay = 0.95
    """AdamW's decay of the mean of their squares."""
    eps: Positive = 1e-8
    """What AdamW adds to the root that it divides by."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up; linear and cosine end at min_lr_ratio of the peak."""
    min_lr_ratio: Annotated[float, Between(0, 1)] = 0.0
    """What is left of the peak learning rate at the end of linear and cosine."""
    weight_decay: Magnitude = 0.01
    """AdamW's weight decay, on matrices only."""
    warmup_steps: Whole = 0
    """Steps over which the learning rate rises linearly to its peak."""
    warmup_ratio: Annotated[float, Between(0, 1)] | None = None
    """The same as a share of the steps, rounded down. Not together with warmup_steps."""
    max_norm: Magnitude = 1.0
    """Gradients are clipped to this norm; 0 is no clipping."""
    log_freq: Count = 10
    """Steps between lines of metrics.jsonl, whose loss is the mean over these steps."""
    save_freq: Whole = 500
    """Steps between checkpoints; 0 saves at the end only."""
    eval_freq: Whole | Literal["epoch"] = 0
    """Steps between validations, or "epoch" for one at the end of each pass over the text, and one after the last step:
    the loss on eval.num_samples held-out sequences, without faults and with those of one fault seed. 0 is none."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the data."""
    activation_checkpointing: Literal["none", "full", "selective", "auto"] | Count = "auto"
    """What backward computes anew instead of keeping: nothing, every block (full), every n-th block (a number), or in
    every block all but matrix products and attention (selective). auto keeps as much as the GPU's memory allows; on a
    CPU it is none."""
    compile: bool | None = None
    """Compile the model's blocks with torch.compile. Default: on a GPU."""
    distill: Annotated[float, Between(0, 1)] = 0.0
    """Share of the loss that is the KL divergence, in nats, of the model's next-token distribution from that of its own
    weights without faults and adapters, which costs one more forward pass a step; the rest is cross-entropy with the
    text. Needs adapters (lora.r) on pretrained weights."""
    control: bool = False
    """Train a control as well, into control/ of the run's directory: the same model, text, order and steps, without
    faults. What training with faults is worth is what it wins over that. It doubles the cost of the run."""

    def __post_init__(self) -> None:
        """Raises ConfigError where ``precision`` says another dtype than the key that is given beside it."""
        if self.precision not in PRECISIONS:
            return
        problems = []
        for key, means in zip(("dtype", "mixed_precision_param"), PRECISIONS[self.precision], strict=True):
            if (given := getattr(self, key)) not in (None, means):
                problems.append(
                    f"precision = {self.precision!r}: it means {key} = {means!r}, and {key} = {given!r} is given as "
                    "well; drop one"
                )
            object.__setattr__(self, key, means)
        if problems:
            raise ConfigError(problems)
        object.__setattr__(self, "precision", None)

    def problems(self) -> list[str]:
        problems = [
            f"epochs = {self.epochs:g}: {key} = {given!r} gives the length of the run as well; drop one"
            for key in ("steps", "tokens_per_parameter")
            if self.epochs is not None and (given := getattr(self, key)) is not None
        ]
        if self.warmup_ratio is not None and self.warmup_steps:
            problems.append(
                f"warmup_ratio = {self.warmup_ratio:g}: warmup_steps = {self.warmup_steps} gives the warm-up as well; "
                "drop one"
            )
        return problems


@dataclass(frozen=True)
class ParallelismConfig(Table):
    """How the model is spread over processes."""

    fsdp_degree: Count | None = None
    """Processes over which parameters, gradients and optimizer state are sharded. Default: all of them; with
    hybrid_shard those of one node."""
    replicas: Count | None = None
    """Copies of the sharded model, each with data of its own. The processes are fsdp_degree x replicas. Default: 1;
    with hybrid_shard as many as the processes give."""
    sharding_strategy: Strategy = "full_shard"
    """full_shard (ZeRO-3) gathers a block's parameters for forward and again for backward; shard_grad_op (ZeRO-2) keeps
    them in between; hybrid_shard shards within groups of fsdp_degree processes and replicates over the groups; no_shard
    (as DDP) gives every process the whole model."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the CPU's memory between uses."""
    forward_prefetch: Whole = 1
    """Blocks whose parameters are gathered ahead of their turn in forward; 0 leaves it to FSDP, where that does it."""
    backward_prefetch: Whole = 1
    """The same in backward."""
    keep_gathered: bool = False
    """Keep parameters gathered between the micro-batches of a step: less communication, the memory of the whole
    model."""
    timeout_minutes: Positive = 10.0
    """A collective that takes longer ends the run, and says which process waited in which."""

    def problems(self) -> list[str]:
        problems = []
        if self.sharding_strategy == "no_shard":
            if (self.fsdp_degree or 1) != 1:
                problems.append(f"fsdp_degree = {self.fsdp_degree!r}: no_shard allows 1")
            if self.cpu_offload:
                problems.append("cpu_offload = True: no_shard keeps the whole model on the device")
        return problems


@dataclass(frozen=True)
class DataConfig(Table):
    """What text to train and evaluate on."""

    source: str = "Cheng98/fineweb-edu-1.25B"
    """A file or folder (txt, md, jsonl, json, csv, tsv, parquet; also .gz and .zst), a directory of save_to_disk, a Hub
    data set, or "stdlib": Python's own standard library source."""
    subset: str | None = None
    """The subset (configuration) of a Hub data set, such as C4's "en"."""
    split: str | None = None
    """The split to train on, of a Hub data set, a folder or save_to_disk. Default: train."""
    revision: str | None = None
    """The branch, tag or commit of a Hub data set."""
    eval_source: str | None = None
    """Text to evaluate on, all of it, given as source is. Default: the held-out part of source, about a tenth of its
    documents, which is never trained on, or the split that eval_split names."""
    eval_split: str | None = None
    """The split to evaluate on, all of it: of eval_source where that is given, else of source."""
    held_out_tokens: Count = 262144
    """How many tokens of the held-out part of source are used, at most; never more than a tenth of max_tokens."""
    text_column: str = "text"
    """The column of jsonl, csv, parquet and Hub data that holds the text."""
    format: Literal["auto", "text", "alpaca", "prompt_completion", "chat"] = "auto"
    """What the rows of a table are: text; alpaca (instruction, input, output), in the prompt of Stanford Alpaca;
    prompt_completion (prompt, and completion or response); chat (messages, or conversations), in the tokenizer's chat
    template. auto tells by the columns where there is no text_column."""
    mask_prompt: bool = True
    """Of instruction data only the answers have a loss; False is all of it."""
    packing: bool = True
    """Several samples of instruction data share a sequence, and none sees another. False gives each a sequence of its
    own, padded."""
    max_tokens: Count | None = None
    """Use this many tokens of source at most."""
    streaming: bool = False
    """Tokenise the training text while it is trained on, so that the first step need not wait for all of it, and read
    Hub data over the network as far as it is used. Not together with training.epochs or eval_freq = "epoch"."""
    buffer_size: Count = 1024
    """Sequences that are shuffled among each other when text is streamed; the first step waits for so many."""
    bos: bool | None = None
    """Begin each document and each sequence with the tokenizer's beginning-of-text token. Default: where the tokenizer
    begins a text with one."""

    def in_vain_of_text(self) -> list[str]:
        """A line for each key that is set and is about instruction data, where all is text."""
        return _set_in_vain("this is text, and no instruction data", "data", self, "mask_prompt", "packing")


@dataclass(frozen=True)
class EvalConfig(Table):
    """How to evaluate."""

    trials: Trials = 5
    """Fault seeds per faulty arm; none of them is used in training."""
    until_ci: Annotated[Positive, "a positive number, such as 0.01 for ±1% of perplexity,"] | None = None
    """Keep adding fault seeds, from 5 or trials on, until the 95% interval over them is at most this wide to either
    side, relative to perplexity: 0.01 is ±1%. Default: trials and no more."""
    max_trials: Trials = 100
    """Where until_ci stops at the latest."""
    num_samples: Count = 64
    """Held-out sequences."""

    def problems(self) -> list[str]:
        least = max(5, self.trials)
        if self.until_ci is None or self.max_trials >= least:
            return []
        return [f"max_trials = {self.max_trials}: with until_ci at least {least} (5, and trials) is allowed"]


@dataclass(frozen=True)
class LoggingConfig(Table):
    """Where the run writes."""

    run_dir: str = "runs/default"
    """The run's directory: config, metrics, checkpoints, exports, results."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run's directory."""
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Log to Weights & Biases: to its server, or into the run's directory for wandb sync."""
    wandb_project: str = "flipproof"
    """The W&B project."""
    wandb_group: str | None = None
    """The W&B group of the run."""
    wandb_tags: Texts = ()
    """The W&B tags of the run."""
    profile: bool = False
    """Write torch.profiler traces of a few steps and a snapshot of GPU memory into the run's directory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run_dir", os.path.expanduser(self.run_dir))


@dataclass(frozen=True)
class CheckpointConfig(Table):
    """Checkpoints."""

    keep_last: Count = 2
    """How many checkpoints are kept; older ones are deleted after a newer one is complete."""
    keep_best: bool = False
    """Save the model wherever validation (training.eval_freq) finds its least loss under faults so far, and keep that
    checkpoint whatever its age."""
    export_merged: bool = False
    """After the last step, write the model with its adapters merged into model/ of the run's directory as well, beside
    the PEFT adapter in adapter/."""
    asynchronous: bool = True
    """Write while training goes on; False waits for the disk."""
    state_dict_type: Literal["sharded", "full"] = "sharded"
    """sharded: every process writes what it holds. full: process 0 gathers everything and writes one file. Either is
    read by any number of processes."""


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

    def in_vain(self) -> list[str]:
        """A line for each key that is set and says nothing of a training run beside the others."""
        lines = []
        if not self.lora.r:
            why = "lora.r = 0 makes no adapters"
            lines += _set_in_vain(why, "lora", self.lora, "lora_alpha", "dropout", "use_rslora")
            lines += _set_in_vain(why, "checkpoint", self.checkpoint, "export_merged")
        if self.training.lr_scheduler == "constant":
            why = "training.lr_scheduler = 'constant' stays at the peak"
            lines += _set_in_vain(why, "training", self.training, "min_lr_ratio")
        if not self.data.streaming:
            lines += _set_in_vain("data.streaming is off", "data", self.data, "buffer_size")
        return lines

    def sequences_per_step(self, processes: int) -> int:
        """The effective batch: sequences of an optimizer step, of all processes and micro-batches."""
        return processes * self.training.local_batch_size * self.training.gradient_accumulation_steps

    def to_toml(self) -> str:
        """The resolved config as TOML, which reads back as the same config. Keys that are None are left out."""
        tree = dataclasses.asdict(self)
        # TOML has no null. Elsewhere a missing key says None; in an override it would say "inherit".
        tree["bitflip"]["layer_name_to_config"] = _none_as_false(tree["bitflip"]["layer_name_to_config"])
        return tomli_w.dumps(_without_none(tree))


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list | tuple) else value


def _none_as_false(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _none_as_false(v) for k, v in value.items()}
    return False if value is None else value
