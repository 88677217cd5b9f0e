"""Against lm-eval itself: its own Hugging Face model, and its own command line."""

import json
import math
import random
import sys
from functools import partial

import lm_eval.evaluator
import lm_eval.tasks
import numpy as np
import pytest
import torch
from guards_by_hand import guards_of
from lm_eval import simple_evaluate

import flipproof
from flipproof import BitFlipSpec, LoraSpec, harness
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure import tasks as tasks_module
from flipproof.measure.tasks import TaskRequest, harness_model, load_tasks, run_task
from flipproof.models.adapter import save_adapter
from flipproof.models.load import byte_tokenizer

KINDS = ("toy_choice", "toy_pages", "toy_generate")
FLIPS = {"w_p_exp": 1e-3, "w_zero_out_t": 64.0, "x_p_exp": 1e-3, "x_zero_out_t": 64.0}


def config(**bitflip):
    training = {"local_batch_size": 4}
    return load_config([], {"model": {"hf_model_path": "-"}, "training": training, "bitflip": bitflip})


@pytest.fixture(scope="module", autouse=True)
def no_tasks_but_ours():
    """To look through lm-eval's thousands of tasks takes seconds each time, and so does to list all that is
    installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)
        ours = partial(lm_eval.tasks.TaskManager, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", ours)
        patch.setattr(tasks_module, "TaskManager", ours)
        yield


@pytest.fixture(scope="module")
def tasks(lm_eval_tasks):
    """(task manager, name -> task), loaded once, with two examples in each prompt."""
    request = TaskRequest((*KINDS, "toy_group"), lm_eval_tasks, num_fewshot=2)
    manager, loaded = load_tasks(request)
    return manager, {task.name: task for task in loaded}


@pytest.fixture
def model(telling_llama):
    return telling_llama


@pytest.fixture
def model_dir(telling_llama_dir):
    return telling_llama_dir


def lm_evals_own(manager, name, **options):
    options = {"num_fewshot": 2, "batch_size": 4, "device": "cpu", "log_samples": False} | options
    found = simple_evaluate(tasks=[name], task_manager=manager, **options)
    return found["results"]


def numbers(results):
    return {(name, key): value for name, values in results.items() for key, value in values.items() if "," in key}


@pytest.mark.parametrize("name", [*KINDS, "toy_group"])
def test_without_faults_figures_are_lm_evals_own_to_the_last_digit(name, tasks, model, model_dir):
    manager, loaded = tasks
    expected = numbers(lm_evals_own(manager, name, model="hf", model_args={"pretrained": str(model_dir)}))
    assert len(expected) >= 2
    flipproof.inject(model, BitFlipSpec(**FLIPS))
    lm = harness_model(model, byte_tokenizer(), config())
    for _ in range(2):  # a task that was run before gives what it gave
        with flipproof.faults(model, flips=False, guard=False):
            assert numbers(run_task(lm, manager, loaded[name])["results"]) == expected
    with flipproof.faults(model, seed=1):
        assert numbers(run_task(lm, manager, loaded[name])["results"]) != expected or name == "toy_generate"


def test_limit_and_batch_are_lm_evals_too(lm_eval_tasks, model, model_dir):
    manager, (task,) = load_tasks(TaskRequest(("toy_choice",), lm_eval_tasks, num_fewshot=1, limit=0.35))
    options = {"num_fewshot": 1, "limit": 0.35}
    expected = lm_evals_own(manager, "toy_choice", model="hf", model_args={"pretrained": str(model_dir)}, **options)
    found = run_task(harness_model(model, byte_tokenizer(), config()), manager, task)
    assert numbers(found["results"]) == numbers(expected)
    assert found["n-samples"]["toy_choice"] == {"original": 10, "effective": 4}
    assert found["n-shot"]["toy_choice"] == 1


def test_global_generators_are_as_they_were(tasks, model):
    manager, loaded = tasks
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    run_task(harness_model(model, byte_tokenizer(), config()), manager, loaded["toy_choice"])
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected


def test_the_perplexity_of_a_broken_model_is_infinite(tasks, model):
    manager, loaded = tasks
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    lm = harness_model(model, byte_tokenizer(), config())
    with pytest.raises(OverflowError):
        lm_evals_own(manager, "toy_pages", model=lm)
    assert run_task(lm, manager, loaded["toy_pages"])["results"]["toy_pages"]["word_perplexity,none"] == math.inf


def test_what_cannot_be_asked_is_told_in_one_line_each(lm_eval_tasks, tmp_path):
    def problems(*names, **options):
        with pytest.raises(ConfigError) as error:
            load_tasks(TaskRequest(names, **options))
        return error.value.problems

    unknown = problems("toy_choise", "toy_pages", "no such thing", include_path=lm_eval_tasks)
    assert [line.split(";")[0] for line in unknown] == [
        "--tasks toy_choise: lm-eval knows no such task",
        "--tasks no such thing: lm-eval knows no such task",
    ]
    assert "did you mean toy_choice" in unknown[0]
    (tmp_path / "file").touch()
    assert problems(include_path=tmp_path / "no", num_fewshot=-1, limit=1.5, cache=tmp_path / "file") == [
        "--tasks: no task is named",
        f"--include-path {tmp_path / 'no'}: no such directory",
        "--num-fewshot -1: at least 0 is allowed",
        "--limit 1.5: a whole number of questions, or a share below 1, is allowed",
        f"--cache = {str(tmp_path / 'file' / 'answer.json')!r}: {tmp_path / 'file'} is not a directory",
    ]
    (tmp_path / "gone.yaml").write_text(
        (lm_eval_tasks / "toy_pages.yaml").read_text().replace("toy_pages", "gone").replace("gone.jsonl", "gone.no")
    )
    assert problems("gone", include_path=tmp_path)[0].startswith("--tasks gone: its questions cannot be read (")


# -- flipproof as a model of lm-eval -----------------------------------------------------------------------------------


@pytest.fixture
def command_line(lm_eval_tasks, model_dir, tmp_path, monkeypatch):
    """Runs lm-eval's command line on a task as ``python -m flipproof.harness`` does; gives (exit code, results)."""

    def run(name, model_args, *flags, model="flipproof"):
        out = tmp_path / "out"
        argv = ["--model", model, "--model_args", f"pretrained={model_dir},{model_args}", "--tasks", name]
        argv += ["--include_path", str(lm_eval_tasks), "--num_fewshot", "2", "--batch_size", "4", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *argv, "--output_path", str(out), *flags])
        code = harness.main()
        files = sorted(out.rglob("*.json"))
        return code, numbers(json.loads(files[-1].read_text())["results"]) if files else {}

    return run


@pytest.mark.parametrize("name", KINDS)
def test_lm_evals_command_line_draws_the_same_flips(name, command_line, tasks, model):
    manager, loaded = tasks
    flipproof.inject(model, BitFlipSpec(**FLIPS, base_seed=3))
    expected = numbers(run_task(harness_model(model, byte_tokenizer(), config()), manager, loaded[name])["results"])
    code, found = command_line(name, ",".join(f"{key}={value}" for key, value in FLIPS.items()) + ",seed=3")
    assert code == 0
    assert found == expected


def test_lm_evals_command_line_without_faults_and_with_an_adapter(command_line, tasks, model, tmp_path):
    manager, _ = tasks
    clean = command_line("toy_pages", "tokenizer=bytes")[1]
    assert clean == numbers(lm_evals_own(manager, "toy_pages", model=harness_model(model, byte_tokenizer(), config())))
    flipproof.inject(model, BitFlipSpec(w_zero_out_t=1.5), LoraSpec(r=2))
    for layer in flipproof.faulty_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path / "adapter", None)
    (tmp_path / "run.toml").write_text("[bitflip]\nw_zero_out_t = 1.5\nbase_seed = 9\n")
    found = command_line("toy_pages", f"adapter={tmp_path / 'adapter'},config={tmp_path / 'run.toml'}")[1]
    expected = lm_evals_own(manager, "toy_pages", model=harness_model(model, byte_tokenizer(), config()))
    assert found == numbers(expected) != clean


@pytest.mark.parametrize(
    ("model_args", "flags", "told"),
    [
        ("w_p_exq=1e-3", [], "bitflip.w_p_exq: unknown key; did you mean w_p_exp?"),
        ("w_p_exp=0.7", [], "w_p_exp = 0.7"),
        ("pretrained=./modle", [], "pretrained = './modle': no local directory has this path"),
        ("w_p_exp=0.1", ["--batch_size", "auto"], "batch_size = 'auto': a number is allowed"),
        ("w_p_exp=0.1", ["--use_cache", "CACHE"], "--use_cache: its answers know neither weights nor faults"),
    ],
)
def test_lm_evals_command_line_tells_what_is_wrong(model_args, flags, told, command_line, capsys, tmp_path):
    flags = [str(tmp_path / "cache") if flag == "CACHE" else flag for flag in flags]
    assert command_line("toy_choice", model_args, *flags) == (2, {})
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert told in lines[0]


def test_guards_of_another_model_or_dtype_are_refused(model, model_dir, command_line, capsys, tmp_path):
    """By the one line that eval says."""
    guards_of(model).write(tmp_path / "own")
    guards_of(model.bfloat16(), "bfloat16").write(tmp_path / "rounded")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    guards_of(model.float()).write(tmp_path / "other")
    words = {"other": "was fitted to another model, the-model", "rounded": "of dtype 'bfloat16'; it is 'float32' here"}
    for name, told in words.items():
        assert command_line("toy_choice", f"w_p_exp=0.1,guards={tmp_path / name}") == (2, {})
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        assert told in lines[0]
    harness.FlipproofLM(str(model_dir), guards=str(tmp_path / "own"), device="cpu")
    rounded = {"guards": str(tmp_path / "rounded"), "mixed_precision_dtype": "bfloat16"}
    harness.FlipproofLM(str(model_dir), device="cpu", **rounded)


def test_a_chat_template_that_is_not_there_is_refused(model_dir):
    lm = harness.FlipproofLM(str(model_dir), w_p_exp=1e-3, device="cpu")
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        lm.chat_template(True)
    lm.tokenizer.chat_template = "{{ messages }}"
    assert lm.chat_template(True) == "{{ messages }}"
