import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_origin

import numpy as np
import pytest
import torch

import flipproof
import flipproof.cli.model
from flipproof.cli.arguments import Parser, Verb
from flipproof.cli.main import main
from flipproof.cli.verbs import VERBS
from flipproof.config import SECTIONS, load_config
from flipproof.config.names import KEYS
from flipproof.errors import ConfigError
from flipproof.models.load import byte_tokenizer
from flipproof.values import bare


@pytest.fixture
def model_dir(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


SMALL = ["--data.source", "stdlib", "--data.max_tokens", "20000", "--training.seq_len", "32", "--num-samples", "4"]


def fails(capsys, argv, *words):
    """Exit code 2 and one line per problem, nothing on stdout."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert not out
    assert len(lines) == len(words), err
    for line, word in zip(lines, words, strict=True):
        assert word in line
    assert "Traceback" not in err


def test_help_version_and_verbs(capsys):
    assert main(["--help"]) == 0
    assert all(verb in capsys.readouterr().out or verb for verb in VERBS)
    assert main(["--version"]) == 0
    assert flipproof.__version__ in capsys.readouterr().out
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"flipproof {verb}" in capsys.readouterr().out


def printed_by(capsys, *argv):
    """What ``--help`` says before it exits, and the flags that it begins a line with -> what they take."""
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 0
    text = capsys.readouterr().out
    begun = [line.split("  ")[0] for line in re.findall(r"^  (?:-h, )?(--.*)", text, re.MULTILINE)]
    found = [re.fullmatch(r"(--[\w.-]*\w)(?: \[?([^\]]*)\]?)?", flag) for line in begun for flag in line.split(", ")]
    return text, {flag[1]: flag[2] for flag in found if flag}


CONFIG_VERBS = ("train", "eval", "generate", "profile", "sweep", "harden", "plan", "compare")
KEY_FLAGS = [f"--{key}" for key in KEYS]


def test_help_fits_a_screen_and_help_all_has_every_key_with_its_docstring(capsys):
    for verb in VERBS:
        assert len(printed_by(capsys, verb, "--help")[0].splitlines()) <= 60
    for verb in CONFIG_VERBS:
        text, flags = printed_by(capsys, verb, "--help-all")
        assert [flag for flag in flags if "." in flag] == KEY_FLAGS
        assert "Probability that a sign or exponent bit of a weight is inverted" in " ".join(text.split())


@pytest.mark.parametrize("key", KEYS)
def test_keys_finds_every_key_by_its_full_and_its_bare_name(key, capsys):
    for name in (key, key.replace("_", "-"), KEYS[key]):
        assert main(["keys", name]) == 0
        shown = re.findall(r"^  --([\w.]+) ", capsys.readouterr().out, re.MULTILINE)
        assert key in shown
        assert len(shown) == 1 or name == KEYS[key]


def test_keys_shows_all_that_are_meant_below_their_tables(capsys):
    shown = {}
    for name in ("p_exp", "seed", "patterns"):
        assert main(["keys", name]) == 0
        shown[name] = re.findall(r"^(?:  --[\w.]+|\[\w+\])", capsys.readouterr().out, re.MULTILINE)
    assert shown == {
        "p_exp": [
            "[bitflip]",
            "  --bitflip.w_p_exp",
            "  --bitflip.x_p_exp",
            "  --bitflip.kv_p_exp",
            "  --bitflip.w_scale_p_exp",
            "  --bitflip.x_scale_p_exp",
        ],
        "seed": ["[training]", "  --training.seed", "[bitflip]", "  --bitflip.base_seed"],
        "patterns": ["[bitflip]", "  --bitflip.include_patterns", "  --bitflip.skip_patterns"],
    }


def test_help_is_plain_words_without_runs_of_spaces(capsys):
    for verb in VERBS:
        text, _ = printed_by(capsys, verb, "--help-all")
        keys = text.partition("\n[model] ")[2]
        assert not [line for line in keys.splitlines() if re.search(r"\S  +\S", line)]
        if verb not in CONFIG_VERBS:
            assert re.search(r"^  -h, --help +Show this\.$", text, re.MULTILINE)


EXAMPLES = {
    "model.init": "random",
    "model.quantize": "nf4",
    "_margin": "1.5",
    "p_bits": '{ "15" = 0.25 }',
    "layer_name_to_config": "{ a = { w_p_exp = 0.25 } }",
}
NEEDS = {"--lora.target_modules": ["--lora.r", "2"]}
"""Flags without which a key says nothing, and is refused."""
BY_TYPE = {int: "16", float: "0.25", bool: "true", str: "abc", tuple: "head"}


def example(flag):
    """A value of the key, other than its default, that needs no key but those of ``NEEDS``."""
    section, key = flag.removeprefix("--").split(".")
    field = next(field for field in dataclasses.fields(SECTIONS[section]) if field.name == key)
    for name, value in EXAMPLES.items():
        if flag.endswith(name):
            return value
    kinds = bare(field.type)
    if get_origin(kinds[0]) is tuple:
        return "sign" if key.endswith("_bits") else BY_TYPE[tuple]
    choices = [value for kind in kinds for value in (get_args(kind) or (kind,)) if isinstance(value, str)]
    if choices:
        return next(choice for choice in choices if choice != field.default)
    if section == "sweep":
        return {
            "sites": "kv",
            "bits": "exp",
            "protection": "parity",
            "p": "0.25",
            "layers": "abc",
            "formats": "nf4",
        }.get(key) or (BY_TYPE[kinds[0]])
    return "false" if field.default is True else BY_TYPE[kinds[0]]


@pytest.mark.parametrize("flag", KEY_FLAGS)
def test_every_key_that_the_help_prints_is_set_by_its_flag(flag, capsys, config_of_a_model):
    base = ["train", "--config", str(config_of_a_model), "--dry-run", *NEEDS.get(flag, [])]
    assert main([*base, flag, example(flag)]) == 0
    config = tomllib.loads(capsys.readouterr().out)
    assert main(base) == 0
    plain = tomllib.loads(capsys.readouterr().out)
    section, key = flag.removeprefix("--").split(".")
    if key == "precision":  # which is written down as what it means
        assert "precision" not in config[section]
        key = "dtype"
    assert config[section].pop(key) != plain[section].pop(key, None)
    assert config == plain  # and nothing else


@pytest.fixture
def config_of_a_model(tmp_path):
    (tmp_path / "model.toml").write_text("[model]\nhf_model_path = 'm'")
    return tmp_path / "model.toml"


class Reached(Exception):
    pass


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_that_a_help_prints_is_taken_and_every_key_arrives(verb, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    help_flag = "--help-all" if verb in CONFIG_VERBS else "--help"
    _, flags = printed_by(capsys, verb, help_flag)
    assert {flag for flag in flags if "." not in flag} >= {
        flag.name for flag in VERBS[verb].arguments if flag.name.startswith("--")
    }
    needed = {
        "generate": ["--prompt", "a"],
        "sweep": ["--to", "x"],
        "harden": ["--to", "x"],
        "export": ["run", "--to", "x"],
        "report": ["run"],
        "config": ["tiny"],
        "plan": ["--gpus", "1"],
    }
    seen = {}

    def load_config(paths, overrides):
        seen.update(overrides)
        raise Reached

    monkeypatch.setattr(flipproof.cli.model, "load_config", load_config)
    for module, name in (
        ("train.export", "export"),
        ("report.page", "report"),
        ("demo", "demo"),
        ("bench", "bench"),
        ("doctor", "doctor"),
    ):
        monkeypatch.setattr(f"flipproof.{module}.{name}", lambda *_, **__: (_ for _ in ()).throw(Reached))
    monkeypatch.setattr("flipproof.cli.presets.described_keys", lambda *_: (_ for _ in ()).throw(Reached))
    for name in ("preset_names", "changed_preset"):
        monkeypatch.setattr(f"flipproof.cli.presets.{name}", lambda *_: (_ for _ in ()).throw(Reached))
    for flag, takes in flags.items():
        if flag in ("--help", "--help-all"):
            continue
        seen.clear()
        argv = [verb, *needed.get(verb, ()), flag]
        if flag in needed.get(verb, ()):
            argv = argv[:-1]
        elif takes and "." in flag:
            argv.append(example(flag))
        elif takes:
            argv.append("lr=1" if "=" in takes else takes.split("|")[0] if "|" in takes else "1")
        with pytest.raises(Reached):
            main(argv)
        if "." in flag:
            section, key = flag.removeprefix("--").split(".")
            assert seen == {section: {key: argv[-1]}}


@pytest.mark.parametrize("verb", CONFIG_VERBS)
@pytest.mark.parametrize("section", SECTIONS)
def test_a_table_is_no_flag(verb, section, capsys):
    needed = ["--prompt", "a"] if verb == "generate" else ["--to", "x"] if verb == "sweep" else []
    for value in (["{}"], ["FILE"], []):
        fails(
            capsys,
            [verb, *needed, f"--{section}", *value],
            f"--{section}: unknown flag; name a key of the table (--{section}.",
        )
    fails(capsys, [verb, *needed, f"--{section}={{}}"], f"--{section}: unknown flag")


def test_dry_run_prints_the_resolved_config_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "70b", "--steps", "21000", "--training.lr=1e-4", "--dry-run"]) == 0
    config = tomllib.loads(capsys.readouterr().out)
    assert (config["training"]["steps"], config["training"]["lr"]) == (21000, 1e-4)
    assert config["bitflip"]["skip_patterns"] == ["output"]
    assert not list(tmp_path.iterdir())


def test_config_prints_presets_with_other_values(capsys, tmp_path):
    """Which read back, and say what the preset with the same flags says."""
    settings = ["local_batch_size=24", "token_num_scale=10", "replicas=2", "wandb_tags=a,b", "precision=bf16-true"]
    assert main(["config", "clm-60m", "--set", *settings[:3], "--set", *settings[3:]]) == 0
    (tmp_path / "clm-60m.toml").write_text(capsys.readouterr().out)
    flags = [f"--{setting}" for setting in settings]
    _, overrides = Parser("train", VERBS).parse(flags)
    assert load_config([tmp_path / "clm-60m.toml"]) == load_config(["clm-60m"], overrides)
    changed = tomllib.loads((tmp_path / "clm-60m.toml").read_text())
    assert "eval" not in changed  # what the preset leaves out
    assert changed["parallelism"] == {"replicas": 2}
    fails(capsys, ["config", "clm-60m", "--set", "lr"], "--set lr: KEY=VALUE is allowed")
    fails(
        capsys, ["config", "clm-60m", "--set", "seed=1"], "several keys are called seed; did you mean training.seed or"
    )
    fails(capsys, ["config", "clm-60m", "--set", "lrr=1"], "--set lrr=1: unknown key; did you mean training.lr?")
    fails(capsys, ["config", "clm-60m", "--set", "lr=many"], "training.lr = 'many'")
    fails(capsys, ["config", "--set", "lr=1"], "flipproof config NAME --set")


def test_config_prints_presets(capsys):
    assert main(["config", "--list"]) == 0
    assert "70b" in capsys.readouterr().out.split()
    assert main(["config", "70b"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["parallelism"] == {"fsdp_degree": 4}


def test_train_export_and_eval_work_together(capsys, tmp_path, model_dir):
    run, flips = str(tmp_path / "run"), ["--bitflip.w_p_frac", "0.05", "--bitflip.x_p_frac", "0.05"]
    few = ["--eval.num_samples", "4", "--eval.trials", "2", *SMALL[:-2]]
    train = ["train", "--model.hf_model_path", model_dir, "--steps", "2", "--lora.r", "2", "--logging.run_dir", run]
    assert main([*train, *flips, *few]) == 0
    assert main(["export", run, "--to", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "merged"), "--trials", "2", *flips, *SMALL]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["clean", "flipped"]
    adapted = ["eval", model_dir, "--adapter", f"{run}/adapter", "--to", str(tmp_path / "out")]
    assert main([*adapted, "--trials", "2", *flips, *SMALL]) == 0
    assert "recovered_clean" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").exists()
    # the run itself: its config and its adapter, hence what it measured itself, to the bit
    assert main(["eval", run, "--to", str(tmp_path / "again")]) == 0
    again, own = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "again", tmp_path / "run"))
    assert {"recovered", "recovered_clean"} <= set(own["arms"])
    assert again["arms"].items() >= own["arms"].items()
    assert {key: again[key] for key in ("bitflip", "text", "fault_seeds")} == {
        key: own[key] for key in ("bitflip", "text", "fault_seeds")
    }
    capsys.readouterr()
    assert main(["train", run, "--resume", "--steps", "3"]) == 0
    assert capsys.readouterr().out == f"{run}\n"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_bad_input_is_one_clear_line_each(capsys, tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = '[training]\nlrr = 1\n[bitflip]\nw_p_exp = 0.7\n[model]\nhf_model_path = "m"\n'
    (tmp_path / "bad.toml").write_text(bad)
    fails(capsys, ["train", "--config", "bad.toml"], "training.lrr: unknown key; did you mean lr?", "w_p_exp = 0.7")
    fails(capsys, ["train", "--config", "gone.toml"], "gone.toml: No such file")
    fails(capsys, ["train", "--config", "70b"], "1 process was started, but parallelism.fsdp_degree x replicas = 4")
    fails(capsys, ["train", "--config", "70b", "--stpes", "3"], "--stpes: unknown flag; did you mean --steps?")
    fails(capsys, ["train", "--config", "70b", "--steps", "many"], "training.steps = 'many'")
    fails(capsys, ["train", "--config", "70b", "--training.lr"], "--training.lr: a value is missing")
    fails(capsys, ["train", "--model.hf_model_path", model_dir, "--resume", "step-3"],
          "--resume step-3: runs/default/checkpoints holds no complete checkpoint")  # fmt: skip
    fails(capsys, ["eval", model_dir, "--bitflip.x_zero_out_t", "nan", *SMALL], "x_zero_out_t = 'nan'")
    fails(capsys, ["eval", "no/model", *SMALL], "no local directory, and the Hub did not give")
    fails(capsys, ["eval", model_dir, "--bitflip.w_p_exp", "0.1", "--bitflip.include_patterns", '["q_prj"]', *SMALL],
          "no layer matched include_patterns = ['q_prj']")  # fmt: skip
    fails(capsys, ["eval", model_dir, *SMALL, "--data.source", "nowhere"], "data source 'nowhere'")
    fails(capsys, ["eval", model_dir, "--adapter", "nowhere", *SMALL], "--adapter = 'nowhere'")
    fails(capsys, ["export", "nowhere", "--to", "x"], "nowhere holds no run")
    fails(capsys, ["export", "nowhere"], "--to is missing")
    fails(capsys, ["config", "7b"], "no preset is called '7b'; did you mean 70b?")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "model"]


def test_a_flag_is_written_out(capsys):
    assert main(["profile", "model", "--num-sample", "4"]) == 2
    assert (
        capsys.readouterr().err == "flipproof profile: error: --num-sample: unknown flag; did you mean --num-samples?\n"
    )


def in_a_terminal_of(encoding, monkeypatch, argv):
    """(exit code, the bytes on stdout, those on stderr) where the terminal has another encoding than UTF-8."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    code = main(argv)
    for stream in streams.values():
        stream.flush()
    return code, *(stream.buffer.getvalue() for stream in streams.values())


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp437", "utf-8"])
def test_terminals_without_utf_8(encoding, monkeypatch):
    def says(args):
        print("✔ ✘ ± − … 💡 \udcff")
        raise ConfigError(["é ✔"])

    monkeypatch.setitem(VERBS, "doctor", Verb("", says))
    code, out, err = in_a_terminal_of(encoding, monkeypatch, ["doctor"])
    assert code == 2
    plain = {"latin-1": "y n ± - ... ? ?", "ascii": "y n ~ - ... ? ?", "cp437": "y n ± - ... ? ?"}
    assert out.decode(encoding) == plain.get(encoding, "✔ ✘ ± − … 💡 ?") + "\n"
    assert err.decode(encoding).startswith("flipproof doctor: error: ")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_resolved_config_reads_back_from_any_terminal(encoding, monkeypatch, config_of_a_model):
    argv = ["train", "--config", str(config_of_a_model), "--logging.run_dir", "é✔💡\x7f", "--dry-run"]
    code, out, _ = in_a_terminal_of(encoding, monkeypatch, argv)
    assert code == 0
    assert tomllib.loads(out.decode(encoding))["logging"]["run_dir"] == "é✔💡\x7f"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a b"), "a b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"x"), "x: File name too long"),
        (OSError(errno.EIO, "Input/output error", "f"), "f: Input/output error"),
    ],
)
def test_what_a_disk_refuses_is_one_line(error, line, capsys, monkeypatch):
    def fails(args):
        raise error

    monkeypatch.setitem(VERBS, "doctor", Verb("", fails))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"flipproof doctor: error: {line}\n"


def test_what_no_memory_holds_is_one_line(capsys, monkeypatch):
    """NumPy, torch and Python, each as it says so."""

    def fails(args):
        makes.pop()()

    makes = [lambda: np.empty(2**50), lambda: torch.empty(2**50), lambda: bytearray(2**50)]
    monkeypatch.setitem(VERBS, "doctor", Verb("", fails))
    while makes:
        assert main(["doctor"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("flipproof doctor: error: there is not enough memory (")


@pytest.mark.parametrize("error", [OSError("something of a library"), ConnectionError(111, "refused"), ValueError("a")])
def test_what_may_be_a_mistake_of_ours_keeps_its_traceback(error, monkeypatch):
    def fails(args):
        raise error

    monkeypatch.setitem(VERBS, "doctor", Verb("", fails))
    with pytest.raises(type(error)):
        main(["doctor"])


def test_a_full_disk_and_a_closed_pipe_under_the_output():
    """Of the file descriptors of a process, so in one."""
    command = [sys.executable, "-m", "flipproof", "config", "70b"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (2, "flipproof config: error: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (2, "")


def test_files_are_utf_8_in_any_locale(tmp_path):
    (tmp_path / "a.toml").write_text("[model]\nhf_model_path = 'é'\n[logging]\nrun_dir = 'ü'", "utf-8")
    environ = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "flipproof", "train", "--config", "a.toml"]
    run = subprocess.run([*command, "--dry-run"], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert tomllib.loads(run.stdout)["model"]["hf_model_path"] == "é", run.stderr
    assert run.stderr.splitlines()[-1].startswith("flipproof train: error: ")
    assert "Traceback" not in run.stderr
