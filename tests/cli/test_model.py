import pytest

from flipproof.cli.main import main
from flipproof.cli.model import config_of
from flipproof.config import RunConfig, load_config
from flipproof.errors import ConfigError

BASE = (
    "[model]\nhf_model_path = 'base'\n[training]\nlr = 0.5\n[eval]\ntrials = 7\n[logging]\nrun_dir = 'runs/elsewhere'\n"
)


@pytest.fixture
def run(tmp_path):
    """A function that makes a run's directory with these files beside its config."""

    def run(*names, config=BASE):
        directory = tmp_path / "run"
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).touch()
        directory.mkdir(exist_ok=True)
        (directory / "config.toml").write_text(config)
        return directory

    return run


def test_a_run_with_a_model_stands_for_it_with_the_runs_config(run):
    directory = run("model/a.safetensors", config=BASE.replace("'base'", "'base'\ninit = 'random'\nflavor = 'demo'"))
    config, adapter = config_of(str(directory), [], {})
    assert adapter is None
    assert (config.model.hf_model_path, config.model.init, config.model.flavor) == (
        str(directory / "model"),
        "pretrained",
        None,
    )
    assert (config.training.lr, config.eval.trials, config.logging.run_dir) == (0.5, 7, str(directory))


def test_a_run_with_an_adapter_stands_for_its_base_with_it(run):
    directory = run("adapter/adapter_model.safetensors")
    config, adapter = config_of(str(directory), [], {"model": {"hf_model_path": "moved"}})
    assert adapter == directory / "adapter"
    assert config.model.hf_model_path == "moved"
    assert config_of(str(directory), [], {})[0].model.hf_model_path == "base"


def test_files_and_flags_count_over_a_runs_config(run, tmp_path):
    (tmp_path / "more.toml").write_text("[eval]\ntrials = 8\nnum_samples = 9\n[training]\nlr = 0.25")
    config, _ = config_of(str(run("model/a.safetensors")), [str(tmp_path / "more.toml")], {"eval": {"trials": "3"}})
    assert (config.eval.trials, config.eval.num_samples, config.training.lr) == (3, 9, 0.25)


def test_a_run_without_a_result_says_what_makes_one(run, capsys):
    directory = run()
    resumes = f"flipproof train {directory} --resume goes on"
    assert main(["eval", str(directory)]) == 2
    assert capsys.readouterr().err == (
        f"flipproof eval: error: {directory} holds a run that has written neither model/ nor adapter/; {resumes}\n"
    )
    run("checkpoints/step-3/manifest.json")
    with pytest.raises(ConfigError, match=f"{resumes}, and flipproof export {directory} --to DIR makes a model"):
        config_of(str(directory), [], {})
    config, adapter = config_of(str(directory), [], {}, resume=True)
    assert (config.model.hf_model_path, config.logging.run_dir, adapter) == ("base", str(directory), None)


@pytest.mark.parametrize("verb", [["profile"], ["sweep", "--to", "x"], ["train"]])
def test_verbs_of_whole_models_say_how_an_adapter_becomes_one(verb, run, capsys):
    directory = run("adapter/adapter_model.safetensors")
    assert main([verb[0], str(directory), *verb[1:]]) == 2
    assert capsys.readouterr().err == (
        f"flipproof {verb[0]}: error: {directory} holds an adapter, and {verb[0]} takes whole models; flipproof export "
        f"{directory} --to DIR makes one of it\n"
    )


def test_a_damaged_config_of_a_run_is_told(run):
    with pytest.raises(ConfigError, match="it is not what was written"):
        config_of(str(run("model/a.safetensors", config=f"# blake2b 0123456789abcdef\n{BASE}")), [], {})


def test_a_run_that_went_on_since_its_result_is_told(run, caplog):
    """Finished after 4 steps, begun again with 10, which its config says from then on, and stopped after 7."""
    longer = BASE.replace("lr = 0.5", "lr = 0.5\nsteps = 10")
    directory = run("adapter/adapter_model.safetensors", "checkpoints/step-4/a", "checkpoints/step-7/a", config=longer)
    config_of(str(directory), [], {}, resume=True)
    assert caplog.messages == []
    config_of(str(directory), [], {})
    (line,) = caplog.messages
    assert f"{directory} has gone on since it wrote its result" in line
    assert "its newest checkpoint is step-7 of 10" in line
    caplog.clear()
    config_of(str(run("checkpoints/step-10/a", config=longer)), [], {"training": {"steps": "20"}})
    assert caplog.messages == []  # whatever another run is to be


def test_an_empty_model_is_not_the_directory_here(run, monkeypatch, capsys):
    monkeypatch.chdir(run("model/a.safetensors"))
    assert main(["profile", ""]) == 2
    assert capsys.readouterr().err == "flipproof profile: error: MODEL is empty\n"
    assert config_of(".", [], {})[0].training.lr == 0.5


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/no/where", "~/nowhere", "~nosuch/x", "a/b/c", "a.gguf"])
def test_a_path_that_is_not_there_is_told_at_once(name):
    with pytest.raises(ConfigError) as error:
        config_of(name, [], {})
    what = "file" if name == "a.gguf" else "directory"
    assert error.value.problems == [f"MODEL = {name!r}: there is no such {what}"]


@pytest.mark.parametrize("name", ["m", "owner/name", "owner/name-1.5_b"])
def test_what_may_be_a_hub_name_is_one(name):
    config, adapter = config_of(name, [], {})
    assert (config.model.hf_model_path, adapter) == (name, None)
    assert isinstance(config, RunConfig)
    assert config == load_config([], {"model": {"hf_model_path": name}})


def test_without_a_model_files_name_it(tmp_path):
    (tmp_path / "a.toml").write_text(BASE)
    assert config_of(None, [str(tmp_path / "a.toml")], {}) == (load_config([tmp_path / "a.toml"]), None)
