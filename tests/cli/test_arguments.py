import re
import shlex
import tomllib

import pytest

from flipproof.cli.arguments import Parser
from flipproof.cli.main import main
from flipproof.cli.verbs import VERBS
from flipproof.config import aliases, load_config


def said(capsys, *argv):
    """The one line of an error, without the verb."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line.removeprefix(f"flipproof {argv[0]}: error: ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("train --stpes 3", "--stpes: unknown flag; did you mean --steps?"),
        ("train --xyzzy", "--xyzzy: unknown flag; see --help"),
        ("train -x", "-x: unknown flag; see --help"),
        ("train --seed 1", "--seed: unknown flag; training.seed is of the initial weights and of the order of the "
         "data, bitflip.base_seed of the faults"),
        ("train --to x", "--to: unknown flag; it belongs to eval and generate and profile and harden and sweep and "
         "report and export and bench"),
        ("eval --resume", "--resume: unknown flag; it belongs to train"),
        ("eval --profile", "--profile: unknown flag; it belongs to train; flipproof profile is a verb: How large "
         "weights and activations are, and which guard thresholds clip none of them."),
        ("eval --steps 3", "--steps: unknown flag; did you mean --training.steps? (train and compare have --steps)"),
        ("eval --lr 3", "--lr: unknown flag; did you mean --training.lr?"),
        ("eval --p 3", "--p: unknown flag; did you mean --sweep.p? (harden and sweep have --p)"),
        ("eval --bitflip", "--bitflip: unknown flag; name a key of the table (--bitflip.w_p_exp, --bitflip.w_p_frac, "
         "--bitflip.w_zero_out_t, …), or give a file that holds the table to --config"),
        ("generate --promt x", "--promt: unknown flag; did you mean --prompt?"),
        ("generate m", "--prompt is missing"),
        ("export run --formt adapter", "--formt: unknown flag; did you mean --format?"),
        ("export run --to", "--to: a value is missing"),
        ("export run --to x --format zip", "--format = 'zip': 'model' or 'adapter' is allowed"),
        ("export --to x", "RUN is missing"),
        ("generate m --prompt a --seed 1e3", "--seed = '1e3': a whole number is allowed"),
        ("generate m --prompt a --do_sample yes", "--do-sample = 'yes': true or false is allowed"),
        ("train m n", "n: not expected here"),
        ("train m --sites [linear, head]", "head]: not expected here; a list with spaces is quoted, as '[a, b]'"),
        ("export m n --to x", "n: not expected here"),
        ("train --batch_size 1", "--batch_size: unknown flag; sequences per process and micro-batch are "
         "training.local_batch_size"),
        ("train --lr", "--lr: a value is missing"),
        ("train m --p_exp 1", "--p_exp: unknown flag; did you mean --bitflip.w_p_exp or --bitflip.x_p_exp or "
         "--bitflip.kv_p_exp or --bitflip.w_scale_p_exp or --bitflip.x_scale_p_exp?"),
        ("train --resume runs/x", "--resume = 'runs/x': auto or a checkpoint's name (step-N) is allowed; MODEL comes "
         "first"),
        ("train m --profile maybe", "logging.profile = 'maybe': true or false is allowed"),
        ("train m --training.control maybe", "training.control = 'maybe': true or false is allowed"),
        ("train --compile maybe m", "training.compile = 'maybe': true, false or None is allowed"),
        ("train --config tiny --training.control maybe", "training.control = 'maybe': true or false is allowed"),
        ("train --training.control=maybe m", "training.control = 'maybe': true or false is allowed"),
        ("train m --data.packing 2", "data.packing = '2': true or false is allowed"),
        ("train --data.packing 0.5 m", "data.packing = '0.5': true or false is allowed"),
        ("train m --cpu-offload [true]", "parallelism.cpu_offload = '[true]': true or false is allowed"),
        ("generate m --prompt a --do-sample maybe", "--do-sample = 'maybe': true or false is allowed"),
        ("generate m --prompt a --do-sample 2", "--do-sample = '2': true or false is allowed"),
        ("train m --dry-run maybe", "--dry-run = 'maybe': no value is allowed"),
        ("train --dry-run true m", "--dry-run = 'true': no value is allowed"),
        ("train m --dry-run=no", "--dry-run = 'no': no value is allowed"),
        ("train --dry-run org/model m", "m: not expected here"),
        ("train m --training.compile yes", "training.compile = 'yes': true, false or None is allowed"),
        ("keys training.lrr", "training.lrr: no such key; did you mean lr?"),
        ("keys trainin", "trainin: no such section or key; did you mean training?"),
    ],
)  # fmt: skip
def test_what_was_meant(argv, expected, capsys):
    assert said(capsys, *argv.split()) == expected


def parsed(argv):
    """(the verb's arguments, the config's keys)."""
    verb, *rest = argv.split()
    args, overrides = Parser(verb, VERBS).parse(rest)
    return {key: value for key, value in vars(args).items() if key != "_given"}, overrides


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        # transformers' Trainer, accelerate and the tutorials' scripts
        ("train --model_name_or_path m --dataset_name d", "train --model.hf_model_path m --data.source d"),
        ("train m --per_device_train_batch_size 2", "train m --training.local_batch_size 2"),
        ("train m --gradient_accumulation_steps 4", "train m --training.gradient_accumulation_steps 4"),
        ("train m --learning_rate 1e-5 --max_steps 3", "train m --training.lr 1e-5 --training.steps 3"),
        ("train m --max_grad_norm 1", "train m --training.max_norm 1"),
        ("train m --lr_scheduler_type cosine", "train m --training.lr_scheduler cosine"),
        ("train m --logging_steps 5 --save_steps 6", "train m --training.log_freq 5 --training.save_freq 6"),
        ("train m --output_dir o", "train m --logging.run_dir o"),
        ("train m --block_size 64 --log_train_loss_steps 5", "train m --training.seq_len 64 --training.log_freq 5"),
        ("train m --transform_cfg t.toml", "train m --config t.toml"),
        ("train m --max_train_steps 7 --weight_decay 0", "train m --training.steps 7 --training.weight_decay 0"),
        ("train m --token_num_scale 22", "train m --training.tokens_per_parameter 22"),
        ("train m --model_flavor 8B", "train m --model.flavor 8B"),
        ("train m --resume_from_checkpoint step-5", "train m --resume step-5"),
        ("train m --num_train_epochs 1 --warmup_ratio 0.1", "train m --training.epochs 1 --training.warmup_ratio 0.1"),
        ("train m --adam_beta2 0.99 --wandb_tags a,b", "train m --training.beta2 0.99 --logging.wandb_tags a,b"),
        # LitGPT
        ("train m --precision bf16-mixed", "train m --training.precision bf16-mixed"),
        ("train m --global_batch_size 512", "train m --training.global_batch_size 512"),
        ("train m --lora_r 8 --lora_alpha 16", "train m --lora.r 8 --lora.lora_alpha 16"),
        ("train m --lora_rank=8 --out_dir=o", "train m --lora.r=8 --logging.run_dir=o"),
        # torchtitan
        ("train m --data_parallel_replicate_degree 2", "train m --parallelism.replicas 2"),
        ("train m --data_parallel_shard_degree 2", "train m --parallelism.fsdp_degree 2"),
        ("train m --compile", "train m --training.compile true"),
        # lm-eval
        ("eval m --tasks a --num_fewshot 2 --output_path o", "eval m --tasks a --num-fewshot 2 --to o"),
        ("eval m --tasks a --use_cache c --batch_size 2", "eval m --tasks a --cache c --training.local_batch_size 2"),
        ("eval m --tasks a --fewshot_as_multiturn true", "eval m --tasks a --fewshot-as-multiturn true"),
        # a switch is no flag with a value
        ("generate --do-sample m --prompt a", "generate m --prompt a --do-sample true"),
        ("generate --prompt a --do_sample m", "generate m --prompt a --do-sample"),
        ("generate m --prompt a --do-sample false", "generate m --do-sample=false --prompt a"),
        ("generate m --do-sample --prompt a", "generate m --do-sample=true --prompt a"),
        ("eval --tasks a --fewshot-as-multiturn m --limit 3", "eval m --tasks a --fewshot-as-multiturn --limit 3"),
        # spelling, and bare names of keys
        ("train --dry_run --lr 1", "train --dry-run --training.lr 1"),
        ("train --seq-len=3 --dtype float32", "train --training.seq_len=3 --training.dtype float32"),
        ("train --training.local-batch-size 2", "train --training.local_batch_size 2"),
        ("train --w-p-exp 0.1 --sites head", "train --bitflip.w_p_exp 0.1 --bitflip.sites head"),
        ("sweep m --to x --sites w --p 0.1 --budget_minutes 3",
         "sweep m --to x --sweep.sites w --sweep.p 0.1 --sweep.budget_minutes 3"),
        ("eval m --num_samples 4 --until-ci 0.1 --trials 2",
         "eval m --eval.num_samples 4 --eval.until_ci 0.1 --eval.trials 2"),
        ("generate m --prompt a --max_new_tokens 3 --top_p 0.5 --output_dir o",
         "generate m --prompt a --max-new-tokens 3 --top-p 0.5 --to o"),
        # LitGPT's, as its document has them
        ("train m --devices=4 --data.json_path data/alpaca.json", "train m --devices 4 --data.source data/alpaca.json"),
        ("eval m --nproc-per-node auto --data.json-path a", "eval m --devices auto --source a"),
        ("train m --training.learning_rate 1e-4", "train m --training.lr 1e-4"),
        # MODEL wherever it stands
        ("eval --to x m --trials 2", "eval m --to x --trials 2"),
        ("train --lr 1 m", "train m --lr 1"),
        ("train --profile m", "train m --logging.profile true"),
        ("train --compile null m --tensorboard False", "train m --training.compile=null --logging.tensorboard=False"),
    ],
)  # fmt: skip
def test_words_of_other_tools_that_mean_one_thing_work(theirs, ours):
    assert parsed(theirs) == parsed(ours)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("train m --num_nodes 2", "torchrun --nproc_per_node"),
        ("train m --strategy fsdp", "parallelism.sharding_strategy"),
        ("train m --bf16", "training.mixed_precision_param"),
        ("train m --max_tokens_to_train 1", "training.tokens_per_parameter"),
        ("train m --report_to wandb", "logging.wandb"),
        ("train m --with_tracking", "logging.wandb"),
        ("train m --model m", "flipproof VERB MODEL"),
        ("train m --data JSON", "data.source"),
        ("train m --quantize bnb.nf4", "model.quantize"),
        ("train m --trust_remote_code", "never run"),
        ("train m --train.global_batch_size 16", "--training.global_batch_size"),
        ("train m --train.micro_batch_size 1", "--training.local_batch_size"),
        ("train m --train.max_seq_length 1", "--training.seq_len"),
        ("train m --metrics_args.enable_wandb false", "logging.wandb"),
        ("eval --model hf", "flipproof VERB MODEL"),
        ("eval --model_args pretrained=m", "flipproof eval MODEL"),
        ("eval m --device cuda:0", "CUDA_VISIBLE_DEVICES"),
        ("eval m --default_bitflip_config.x_p_exp=null", "--bitflip.x_p_exp"),
        ("eval m --bitflip_config default", "bitflip.w_p_exp"),
    ],
)
def test_words_of_other_tools_that_mean_something_else_name_the_key(argv, word, capsys):
    line = said(capsys, *argv.split())
    assert ": unknown flag; " in line
    assert word in line


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("finetune_lora", "flipproof train MODEL --lora.r 8"),
        ("finetune", "flipproof train MODEL"),
        ("pretrain", "--model.init random"),
        ("evaluate", "flipproof eval MODEL"),
        ("eval-bitflip", "flipproof eval MODEL"),
        ("hf-gen", "flipproof generate MODEL"),
        ("convert-ckpt", "flipproof export RUN"),
    ],
)
def test_verbs_of_other_tools_are_told_the_command_line(verb, words, capsys):
    line = said(capsys, verb, "m")
    assert line.startswith(f"flipproof: error: {verb}: unknown verb; flipproof ")
    assert words in line


def test_command_lines_that_answers_name_are_such(tmp_path):
    """They parse, with a value in the place of each word in capitals."""
    for text in aliases.VERBS.values():
        line = re.match(r"flipproof ((?:--)?[\w.-]+( [\w.-]+)*)", text)[1]
        parsed(re.split(r" (?=trains|which)", line)[0])


@pytest.mark.parametrize("verb", VERBS)
def test_examples_parse_and_each_verb_has_two_that_its_help_shows(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    for example in VERBS[verb].examples:
        assert example in text
        flipproof, name, *rest = shlex.split(example.split(" > ")[0])
        assert (flipproof, name) == ("flipproof", verb)
        _, overrides = Parser(verb, VERBS).parse(rest)
        load_config([], {"model": {"hf_model_path": "m"}} | overrides)
    assert len(VERBS[verb].examples) == 2 or verb == "doctor"


def test_values_of_other_tools_work(tmp_path, capsys):
    """PyTorch's names of its sharding strategies, in a file and as a flag."""
    (tmp_path / "a.toml").write_text("[model]\nhf_model_path = 'm'\n[parallelism]\nsharding_strategy = 'SHARD_GRAD_OP'")
    assert load_config([tmp_path / "a.toml"]).parallelism.sharding_strategy == "shard_grad_op"
    assert main(["train", "m", "--sharding_strategy", "FULL_SHARD", "--dry-run"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["parallelism"]["sharding_strategy"] == "full_shard"


@pytest.mark.parametrize(
    "argv",
    [
        ["eval", "m", "--adapter", ""],
        ["eval", "m", "--to="],
        ["eval", "m", "--cache", ""],
        ["generate", "m", "--prompt", "a", "--flip-log", ""],
        ["sweep", "m", "--to", ""],
        ["export", "r", "--to", ""],
        ["demo", "--run-dir", ""],
        ["train", "--config", ""],
    ],
)
def test_an_empty_path_is_said_to_be_empty(argv, capsys):
    flag = next(word for word in argv if word.startswith("--") and word != "--prompt").removesuffix("=")
    assert said(capsys, *argv) == f"{flag}: the path is empty"


@pytest.mark.parametrize("argv", [["export", "", "--to", "x"], ["report", ""], ["eval", ""], ["train", "--resume", ""]])
def test_an_empty_argument_is_a_line(argv, capsys):
    assert "empty" in said(capsys, *argv)


def test_a_home_directory_is_found_in_paths_of_flags(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert said(capsys, "export", "~/run", "--to", "x").startswith(f"{tmp_path}/run holds no run")
    assert main(["bench", "--to", "~"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_short_flag_and_its_key_are_one_and_the_last_counts(capsys):
    argv = ["train", "m", "--dry-run", "--steps", "3", "--training.steps", "4"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "steps = 4\n" in out
    assert re.fullmatch(r"\d\d:\d\d:\d\d --training\.steps: given twice, '3' and '4'; the last one counts\n", err)


@pytest.mark.parametrize("number", ["0", "-1", "2.5", "all", "m", ""])
def test_devices_are_a_number_or_auto(number, capsys):
    line = said(capsys, "train", f"--devices={number}")
    assert line.startswith(f"--devices = {number!r}: a number of processes, or auto, ")


def test_every_verb_that_runs_a_model_starts_processes():
    verbs = {name for name, verb in VERBS.items() if "devices" in verb.flags}
    assert verbs == {"train", "eval", "generate", "profile", "harden", "sweep", "export", "compare"}
