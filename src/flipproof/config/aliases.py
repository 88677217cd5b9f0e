"""What people of other tools type, and what it is called here: LitGPT, torchtitan, transformers' Trainer, accelerate,
lm-eval, and the scripts of the tutorials. Data for ``names.py`` (files) and for the command line (flags).

A word stands in ``KEYS`` or ``FLAGS`` only where it means exactly that one thing: as a flag it then works. What is
nearly a key of ours, or several, or none, is answered in ``ANSWERS``.
"""

KEYS = {
    "model.hf_model_path": ("model_path", "model_name", "model_name_or_path", "hf_assets_path", "checkpoint_dir"),
    "model.flavor": ("model_flavor",),
    "model.tokenizer": ("tokenizer_name", "tokenizer_path", "tokenizer_dir", "tokenizer_name_or_path"),
    "training.dtype": ("torch_dtype",),
    "training.seq_len": (
        "block_size",
        "max_length",
        "max_seq_length",
        "max_seq_len",
        "sequence_length",
        "context_length",
        "cutoff_len",
    ),
    "training.local_batch_size": ("micro_batch_size", "per_device_train_batch_size"),
    "training.gradient_accumulation_steps": ("gradient_accumulation", "grad_accum", "gradient_accumulation_iters"),
    "training.epochs": ("num_epochs", "num_train_epochs"),
    "training.steps": ("max_steps", "max_train_steps", "num_steps", "train_steps"),
    "training.tokens_per_parameter": ("token_num_scale",),
    "training.lr": ("learning_rate",),
    "training.beta1": ("adam_beta1",),
    "training.beta2": ("adam_beta2",),
    "training.eps": ("adam_epsilon", "adam_eps"),
    "training.lr_scheduler": ("lr_scheduler_type",),
    "training.min_lr_ratio": ("min_lr_rate", "min_lr_factor"),
    "training.warmup_steps": ("num_warmup_steps", "lr_warmup_steps"),
    "training.warmup_ratio": ("lr_warmup_fraction",),
    "training.max_norm": ("max_grad_norm", "grad_clip", "gradient_clip_val"),
    "training.log_freq": ("log_train_loss_steps", "logging_steps", "log_interval"),
    "training.save_freq": ("save_steps", "checkpointing_steps", "save_interval"),
    "training.eval_freq": ("eval_steps", "eval_interval", "validation_freq", "validation_steps", "eval_every"),
    "parallelism.fsdp_degree": ("data_parallel_shard_degree",),
    "parallelism.replicas": ("data_parallel_replicate_degree",),
    "lora.r": ("lora_r", "lora_rank"),
    "lora.target_modules": ("lora_target_modules", "lora_target"),
    "lora.dropout": ("lora_dropout",),
    "lora.use_rslora": ("rslora",),
    "data.source": ("dataset", "dataset_name", "dataset_path", "json_path", "train_file"),
    "data.eval_source": ("validation_file", "eval_dataset"),
    "data.subset": ("dataset_config_name", "dataset_config", "dataset_subset"),
    "data.split": ("dataset_split", "train_split", "dataset_train_split"),
    "data.eval_split": ("dataset_test_split", "eval_dataset_split"),
    "data.revision": ("dataset_revision",),
    "data.text_column": ("text_column_name", "dataset_text_field"),
    "logging.run_dir": ("output", "output_dir", "out_dir", "save_dir", "save_path", "dump_folder"),
    "logging.wandb_project": ("project_name",),
    "checkpoint.keep_last": ("save_total_limit", "keep_latest_k"),
    "checkpoint.export_merged": ("save_merged", "save_merged_model", "merge_and_save"),
    "eval.num_samples": ("max_eval_samples",),
}
"""Key -> words for it."""

FLAGS = {
    "to": ("output", "output_dir", "out_dir", "output_path", "save_dir", "save_path"),
    "config": ("config_file", "transform_cfg", "cfg"),
    "resume": ("resume_from_checkpoint",),
    "cache": ("use_cache",),
    "adapter": ("adapter_path", "adapter_name_or_path"),
    "devices": ("nproc_per_node",),
}
"""A verb's own flag -> words for it."""

_PROCESSES = (
    "processes are started by --devices N, on several machines by torchrun --nproc_per_node N -m flipproof VERB …; "
    "parallelism.sharding_strategy and parallelism.fsdp_degree say how they share the model"
)
_LENGTH = "the length of a run is training.steps, training.epochs or training.tokens_per_parameter"
_PRECISION = (
    "it is training.precision = 'bf16-mixed', which is training.dtype = 'float32' with "
    "training.mixed_precision_param = 'bfloat16'; bf16-true, 16-mixed, 16-true and 32-true are known, too"
)
_TRACKER = "Weights & Biases is logging.wandb = 'online' or 'offline', TensorBoard logging.tensorboard = true"
_OPTIMIZER = "the optimizer is AdamW; training.lr, weight_decay, beta1, beta2 and eps are its keys"
_VALIDATED = "sequences are counted, not batches: eval.num_samples, training.local_batch_size of them to a batch"
_CHECKPOINTING = "activations are recomputed as training.activation_checkpointing says"
_FAULTS = "faults are keys (bitflip.w_p_exp and more), as flags or in a file that --config names"
_NO_CODE = "code that comes with a model or a task is never run"

ANSWERS = {
    "model": "the model comes first, without a flag: flipproof VERB MODEL; its directory is model.hf_model_path",
    "model_args": "the model comes first, without a flag: flipproof eval MODEL; its directory is model.hf_model_path",
    "data": "the text is data.source",
    "seed": "training.seed is of the initial weights and of the order of the data, bitflip.base_seed of the faults",
    "random_seed": "training.seed is of the initial weights and the data, bitflip.base_seed of the faults",
    "batch_size": "sequences per process and micro-batch are training.local_batch_size",
    "total_batch_size": "sequences per step are training.global_batch_size",
    "eval_batches": _VALIDATED,
    "num_eval_batches": _VALIDATED,
    "limit_val_batches": _VALIDATED,
    "eval_iters": _VALIDATED,
    "eval_strategy": "validation while training is training.eval_freq, in steps or 'epoch'",
    "evaluation_strategy": "validation while training is training.eval_freq, in steps or 'epoch'",
    "load_best_model_at_end": "the best checkpoint is kept with checkpoint.keep_best = true and training.eval_freq",
    "per_device_eval_batch_size": "eval takes as many sequences at a time as training: training.local_batch_size",
    "max_tokens_to_train": _LENGTH,
    "mixed_precision": _PRECISION,
    "bf16": _PRECISION,
    "fp16": "it is training.precision = '16-mixed'",
    "quantize": "it is model.quantize, by the format's name alone, such as nf4 for bnb.nf4-dq",
    "devices": _PROCESSES,
    "num_nodes": _PROCESSES,
    "num_processes": _PROCESSES,
    "nproc_per_node": _PROCESSES,
    "nnodes": _PROCESSES,
    "strategy": _PROCESSES,
    "fsdp": _PROCESSES,
    "fsdp_config": _PROCESSES,
    "deepspeed": _PROCESSES,
    "device": "the GPU is taken where there is one; CUDA_VISIBLE_DEVICES chooses which, or none",
    "tensor_parallel_degree": "parameters are sharded, matrices are not split: parallelism.fsdp_degree",
    "optim": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "use_lora": "adapters are trained where lora.r is above 0",
    "gradient_checkpointing": _CHECKPOINTING,
    "selective_ac_option": _CHECKPOINTING,
    "report_to": _TRACKER,
    "with_tracking": _TRACKER,
    "enable_wandb": _TRACKER,
    "enable_tensorboard": "it is logging.tensorboard = true",
    "logger_name": _TRACKER,
    "enable_profiling": "traces are written with logging.profile = true",
    "async_mode": "checkpoints are written while training goes on: checkpoint.asynchronous",
    "bitflip_config": _FAULTS,
    "gen_kwargs": "tasks generate as they say themselves",
    "trust_remote_code": _NO_CODE,
    "preprocessing_num_workers": "the text is packed by one process and kept: there is nothing to set",
    "do_train": "verbs say what is done: flipproof train MODEL, flipproof eval MODEL",
    "do_eval": "verbs say what is done: flipproof train MODEL, flipproof eval MODEL",
    "overwrite_output_dir": "nothing is overwritten; name another logging.run_dir",
}
"""Word -> what to say of it."""

TABLES = {
    "dataset": "the table is [data], and the text its source",
    "datasets": "the table is [data], and the text its source",
    "train": "the table is [training]",
    "trainer": "the table is [training]",
    "optimizer": _OPTIMIZER,
    "lr_scheduler": "its keys are training.lr_scheduler, min_lr_ratio, warmup_steps and warmup_ratio",
    "activation_checkpoint": _CHECKPOINTING,
    "job": "where a run writes is logging.run_dir",
    "metrics": "its keys are training.log_freq, logging.tensorboard and logging.wandb",
    "profiling": "traces are written with logging.profile = true",
    "validation": "its keys are training.eval_freq, those of [eval], and data.eval_source",
    "comm": "its key is parallelism.timeout_minutes",
    "experimental": "there are no experimental keys; flipproof keys prints all that there are",
    "fsdp": "the table is [parallelism]",
    "peft": "the table is [lora]",
    "wandb": "its keys are logging.wandb and logging.wandb_project",
}
"""A table of another tool's file -> where its keys are."""

VALUES = {
    "parallelism.sharding_strategy": {
        "FULL_SHARD": "full_shard",
        "SHARD_GRAD_OP": "shard_grad_op",
        "HYBRID_SHARD": "hybrid_shard",
        "NO_SHARD": "no_shard",
    }
}
"""Key -> another tool's value -> the same value here."""

VERBS = {
    "finetune": "flipproof train MODEL trains all weights, with --lora.r 8 adapters",
    "finetune_full": "flipproof train MODEL",
    "finetune_lora": "flipproof train MODEL --lora.r 8",
    "finetune_adapter": "flipproof train MODEL --lora.r 8",
    "fine_tune": "flipproof train MODEL trains all weights, with --lora.r 8 adapters",
    "lora": "flipproof train MODEL --lora.r 8",
    "pretrain": "flipproof train --model.init random --model.flavor clm-60M",
    "evaluate": "flipproof eval MODEL",
    "validate": "flipproof eval MODEL",
    "test": "flipproof eval MODEL",
    "eval_bitflip": "flipproof eval MODEL",
    "eval_ori": "flipproof eval MODEL, which measures it with and without faults",
    "ppl": "flipproof eval MODEL",
    "perplexity": "flipproof eval MODEL",
    "lm_eval": "flipproof eval MODEL --tasks wikitext",
    "chat": "flipproof generate MODEL --prompt TEXT",
    "hf_gen": "flipproof generate MODEL --prompt TEXT",
    "inference": "flipproof generate MODEL --prompt TEXT",
    "convert": "flipproof export RUN --to DIR",
    "convert_ckpt": "flipproof export RUN --to DIR",
    "merge": "flipproof export RUN --to DIR",
    "merge_lora": "flipproof export RUN --to DIR",
    "plot": "flipproof report DIR",
    "generate_cfg": "flipproof config clm-60m --set KEY=VALUE",
    "presets": "flipproof config --list",
    "benchmark": "flipproof bench",
}
"""Another tool's verb -> the command line that does it here."""
