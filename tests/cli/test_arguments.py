import pytest

from flipproof.cli.main import main


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
        ("train --lr 1", "--lr: unknown flag; did you mean --training.lr?"),
        ("train --learning-rate 1", "--learning-rate: unknown flag; did you mean --training.lr?"),
        ("train --precision bf16-mixed", "--precision: unknown flag; did you mean --training.dtype?"),
        ("train --dtype x", "--dtype: unknown flag; did you mean --training.dtype?"),
        ("train --seq-len=3", "--seq-len: unknown flag; did you mean --training.seq_len?"),
        ("train --lora_r 8", "--lora_r: unknown flag; did you mean --lora.r?"),
        ("train --save_dir x", "--save_dir: unknown flag; did you mean --logging.run_dir?"),
        ("train --output x", "--output: unknown flag; did you mean --logging.run_dir?"),
        ("train --transform_cfg x", "--transform_cfg: unknown flag; did you mean --config?"),
        ("train --dry_run", "--dry_run: unknown flag; did you mean --dry-run?"),
        ("train --stpes 3", "--stpes: unknown flag; did you mean --steps?"),
        ("train --xyzzy", "--xyzzy: unknown flag; see --help"),
        ("train -x", "-x: unknown flag; see --help"),
        ("train --seed 1",
         "--seed: unknown flag; did you mean --training.seed or --bitflip.base_seed? (generate has --seed)"),
        ("train --to x", "--to: unknown flag; it belongs to eval and generate and profile and sweep and report and "
         "export and bench"),
        ("eval --output x", "--output: unknown flag; did you mean --to?"),
        ("eval --batch_size 3", "--batch_size: unknown flag; did you mean --batch-size?"),
        ("eval --resume", "--resume: unknown flag; it belongs to train"),
        ("eval --profile", "--profile: unknown flag; it belongs to train; flipproof profile is a verb: How large "
         "weights and activations are, and which guard thresholds clip none of them."),
        ("eval --steps 3", "--steps: unknown flag; did you mean --training.steps? (train has --steps)"),
        ("generate --promt x", "--promt: unknown flag; did you mean --prompt?"),
        ("generate m", "--prompt is missing"),
        ("export run --formt adapter", "--formt: unknown flag; did you mean --format?"),
        ("export run --to", "--to: a value is missing"),
        ("export run --to x --format zip", "--format = 'zip': 'model' | 'adapter' is allowed"),
        ("generate m --prompt a --seed 1e3", "--seed = '1e3': int is allowed"),
        ("generate m --prompt a --do_sample yes", "--do_sample = 'yes': bool is allowed"),
        ("train m", "m: not expected here; did you mean --model.hf_model_path m?"),
        ("export m n --to x", "n: not expected here"),
        ("train --batch_size 1", "--batch_size: unknown flag; did you mean --training.local_batch_size? (eval has"
         " --batch_size)"),
    ],
)  # fmt: skip
def test_what_was_meant(argv, expected, capsys):
    assert said(capsys, *argv.split()) == expected


def test_the_words_of_the_tutorials_commands_lead_to_keys(capsys):
    """Of the 8B tutorial, the pretraining tutorial and LitGPT's."""
    words = {
        "model_name_or_path": "model.hf_model_path",
        "dataset_name": "data.source",
        "per_device_train_batch_size": "training.local_batch_size",
        "learning_rate": "training.lr",
        "weight_decay": "training.weight_decay",
        "num_train_epochs": "training.steps",
        "gradient_accumulation_steps": "training.gradient_accumulation_steps",
        "lr_scheduler_type": "training.lr_scheduler",
        "output_dir": "logging.run_dir",
        "with_tracking": "logging.wandb",
        "transform_cfg": "config",
        "block_size": "training.seq_len",
        "log_train_loss_steps": "training.log_freq",
        "max_train_steps": "training.steps",
        "model_flavor": "model.flavor",
        "data_parallel_replicate_degree": "parallelism.replicas",
        "data_parallel_shard_degree": "parallelism.fsdp_degree",
        "token_num_scale": "training.tokens_per_parameter",
        "compile": "training.compile",
        "precision": "training.dtype",
        "lora_r": "lora.r",
        "out_dir": "logging.run_dir",
    }
    assert main(["train", *(f"--{word}=x" for word in words)]) == 2
    lines = capsys.readouterr().err.splitlines()
    for line, (word, key) in zip(lines, words.items(), strict=True):
        assert line == f"flipproof train: error: --{word}: unknown flag; did you mean --{key}?"


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


def test_a_short_flag_counts_over_the_key_that_it_stands_for(capsys):
    argv = ["train", "--dry-run", "--model.hf_model_path", "m", "--steps", "3", "--training.steps", "4"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "steps = 3\n" in out
    assert "--steps is --training.steps, which is given as well; --steps counts" in err
