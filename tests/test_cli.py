import tomllib

import pytest

import flipproof
from flipproof.cli import VERBS, main
from flipproof.model import byte_tokenizer


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


def test_field_docstrings_are_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Probability that a sign or exponent bit of a weight is inverted" in text


def test_dry_run_prints_the_resolved_config_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "70b", "--steps", "21000", "--training.lr=1e-4", "--dry-run"]) == 0
    config = tomllib.loads(capsys.readouterr().out)
    assert (config["training"]["steps"], config["training"]["lr"]) == (21000, 1e-4)
    assert config["bitflip"]["skip_patterns"] == ["output"]
    assert not list(tmp_path.iterdir())


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
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["clean", "guard", "flipped"]
    adapted = ["eval", model_dir, "--adapter", f"{run}/adapter", "--to", str(tmp_path / "out")]
    assert main([*adapted, "--trials", "2", *flips, *SMALL]) == 0
    assert "recovered_clean" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").exists()


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
    fails(capsys, ["eval", model_dir, "--bitflip.x_zero_out_t", "nan", *SMALL], "x_zero_out_t = nan")
    fails(capsys, ["eval", "no/model", *SMALL], "no local directory, and the Hub did not give")
    fails(capsys, ["eval", model_dir, "--bitflip.w_p_exp", "0.1", "--bitflip.include_patterns", '["q_prj"]', *SMALL],
          "no layer matched include_patterns = ['q_prj']")  # fmt: skip
    fails(capsys, ["eval", model_dir, "--data.source", "nowhere"], "data source 'nowhere'")
    fails(capsys, ["eval", model_dir, "--adapter", "nowhere", *SMALL], "adapter nowhere")
    fails(capsys, ["export", "nowhere", "--to", "x"], "nowhere holds no run")
    fails(capsys, ["export", "nowhere"], "required: to")
    fails(capsys, ["config", "7b"], "no preset is called '7b'; did you mean 70b?")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "model"]


def test_a_flag_is_written_out(capsys):
    assert main(["profile", "model", "--num-sample", "4"]) == 2
    assert (
        capsys.readouterr().err == "flipproof profile: error: --num-sample: unknown flag; did you mean --num-samples?\n"
    )
