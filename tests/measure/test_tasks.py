import json
import math
import re
import shutil
import sys
from dataclasses import replace
from functools import partial

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from scipy import stats

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.measure import tasks
from flipproof.measure.answers import model_key
from flipproof.measure.intervals import t_interval
from flipproof.measure.tasks import Metric, TaskRequest, evaluate_tasks, tasks_table
from flipproof.models import hub
from flipproof.models.adapter import load_adapter, save_adapter
from flipproof.models.load import byte_tokenizer

FLIPS = {"w_p_exp": 1e-3, "w_zero_out_t": 0.4, "x_p_exp": 1e-3, "x_zero_out_t": 64.0, "base_seed": 6}


@pytest.fixture(scope="module", autouse=True)
def no_tasks_but_ours():
    """To look through lm-eval's thousands of tasks takes seconds each time, and so does to list all that is
    installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda *_: None)
        patch.setattr(tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
        yield


@pytest.fixture
def model(telling_llama):
    return telling_llama


@pytest.fixture
def model_dir(telling_llama_dir):
    return telling_llama_dir


def settings(model_dir, batch=4, trials=2, **bitflip):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"local_batch_size": batch},
            "eval": {"trials": trials},
            "bitflip": bitflip,
        },
    )


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    model = tiny_llama()
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.1), LoraSpec(r=2))
    for layer in flipproof.faulty_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path / "adapter", None)
    return tmp_path / "adapter"


def test_arms_are_lm_eval_with_the_faults_on(model, model_dir, adapter, lm_eval_tasks):
    """Against lm-eval on a model that is injected here, one switch after the other."""
    config = settings(model_dir, **FLIPS)
    text, results = evaluate_tasks(config, TaskRequest(("toy_choice", "toy_pages"), lm_eval_tasks), adapter)
    assert text == {}  # none was named
    manager = tasks.TaskManager(include_path=str(lm_eval_tasks))
    flipproof.inject(model, BitFlipSpec(**FLIPS), LoraSpec(r=2))
    load_adapter(model, adapter)
    lm = HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=4)

    def expected(name, metric, **switches):
        with flipproof.faults(model, **switches):
            return simple_evaluate(lm, tasks=[name], task_manager=manager, log_samples=False)["results"][name][metric]

    off = {"flips": False, "guard": False}
    for name, metric in (("toy_choice", "acc_norm,none"), ("toy_pages", "byte_perplexity,none")):
        arms = results[name].arms
        assert list(arms) == ["clean", "guard", "flipped", "recovered", "recovered_clean"]
        assert arms["clean"][metric].trials == (expected(name, metric, adapters=False, **off),)
        assert arms["guard"][metric].trials == (expected(name, metric, adapters=False, flips=False),)
        assert arms["recovered_clean"][metric].trials == (expected(name, metric, **off),)
        for arm, adapters in (("flipped", False), ("recovered", True)):
            trials = tuple(expected(name, metric, adapters=adapters, seed=seed) for seed in (7, 8))
            assert arms[arm][metric].trials == trials
            assert arms[arm][metric].interval == t_interval(trials)
    pages = [arm["byte_perplexity,none"].mean for arm in results["toy_pages"].arms.values()]
    assert len(set(pages)) == 5
    stderr = expected("toy_choice", "acc_stderr,none", adapters=False, **off)
    assert results["toy_choice"].arms["clean"]["acc,none"].stderr == stderr
    # and no figure depends on what else was asked for
    alone = evaluate_tasks(config, TaskRequest(("toy_pages",), lm_eval_tasks), adapter)[1]
    assert alone["toy_pages"] == results["toy_pages"]


def test_a_group_is_shown_and_its_tasks_are_kept(model_dir, lm_eval_tasks):
    _, results = evaluate_tasks(settings(model_dir), TaskRequest(("toy_group",), lm_eval_tasks))
    assert {name: result.shown for name, result in results.items()} == {
        "toy_group": True,
        "toy_choice": False,
        "toy_pages": False,
    }
    group, part = (results[name].arms["clean"]["acc,none"] for name in ("toy_group", "toy_choice"))
    assert group.mean == part.mean
    lines = tasks_table(results).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["toy_group", "acc", "clean"]


def test_a_metric_that_cannot_be_counted_has_no_interval():
    metric = Metric.from_trials([1.0, math.inf], [])
    assert (metric.mean, metric.interval, metric.seed_sd, metric.stderr) == (math.inf, None, None, None)
    assert Metric.from_trials([0.25, 0.75], [0.1, 0.3]).stderr == pytest.approx(0.2)


def test_the_cache_knows_which_layer_is_scaled_how(tiny_llama):
    """Of adapters that PEFT scaled by layer: equal tensors do not say it."""

    def key(up, down):
        model = tiny_llama()
        lora = {"model.layers.0.mlp.up_proj": up, "model.layers.0.mlp.down_proj": down}
        flipproof.inject(model, BitFlipSpec(w_p_frac=0.1), {n: LoraSpec(r=2, lora_alpha=a) for n, a in lora.items()})
        config = load_config([], {"model": {"hf_model_path": "any"}})
        return model_key(config, model, byte_tokenizer())

    for one, other in ((4, 8), (3, 5), (7, 9), (1, 6)):
        assert key(one, other) == key(one, other)
        assert key(one, other) != key(other, one)


def test_the_cache_answers_equal_runs_and_no_others(model, model_dir, adapter, lm_eval_tasks, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    for file in lm_eval_tasks.iterdir():
        (own / file.name).write_text(file.read_text().replace(str(lm_eval_tasks), str(own)))
    cache, runs = tmp_path / "cache", []
    real = tasks.run_task
    monkeypatch.setattr(tasks, "run_task", lambda *arguments: runs.append(1) or real(*arguments))

    def asked(config=None, adapter=None, **options):
        """How many runs were needed, and what came of it."""
        runs.clear()
        config = config or settings(model_dir, **FLIPS)
        options = {"names": ("toy_choice",), "include_path": own, "cache": cache} | options
        results = evaluate_tasks(config, TaskRequest(**options), adapter)[1]
        return len(runs), results

    count, first = asked()
    assert (count, len(list(cache.iterdir()))) == (4, 4)  # clean, guard, two seeds
    assert asked() == (0, first)
    assert asked(cache=None) == (4, first)
    # what does not matter for an arm leaves its answer: clean is clean under any fault, the same seeds are the same
    other_p = settings(model_dir, **FLIPS | {"w_p_exp": 2e-3})
    assert asked(other_p)[0] == 3
    assert asked(settings(model_dir, trials=3, **FLIPS))[0] == 1
    assert asked(settings(model_dir, **FLIPS | {"base_seed": 8}))[0] == 1  # seed 9 was that run's third; guard has none
    count, adapted = asked(adapter=adapter)
    assert (count, adapted["toy_choice"].arms["flipped"]) == (3, first["toy_choice"].arms["flipped"])
    # what does, does not
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7.0}))
    assert asked(adapter=adapter)[0] == 3
    assert asked(settings(model_dir, batch=3, **FLIPS))[0] == 4
    assert asked(limit=5)[0] == 4
    assert asked(num_fewshot=1)[0] == 4
    assert asked(names=("toy_pages",))[0] == 4
    with torch.no_grad():
        model.model.norm.weight[3] = 1.5
    model.save_pretrained(model_dir)
    assert asked()[0] == 4
    lines = (own / "toy_choice.jsonl").read_text().splitlines()
    (own / "toy_choice.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert asked()[0] == 4
    assert asked()[0] == 0


def test_eval_writes_tasks_beside_arms(model, model_dir, lm_eval_tasks, tmp_path, capsys):
    """Equal files for equal runs, cached or not; null for infinity."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    model.save_pretrained(model_dir)
    argv = ["eval", str(model_dir), "--tasks", "toy_pages, toy_choice", "--include-path", str(lm_eval_tasks)]
    argv += ["--bitflip.w_p_exp", "1e-3", "--trials", "2", "--batch-size", "4", "--limit", "3", "--num-fewshot", "1"]
    (tmp_path / "text.txt").write_text("All happy families are alike. " * 200)
    held_out = ["--data.eval_source", str(tmp_path / "text.txt"), "--training.seq_len", "32"]
    cached = ["--num-samples", "4", "--cache", str(tmp_path / "cache")]
    for name in ("one", "two"):
        assert main([*argv, *held_out, *cached, "--to", str(tmp_path / name)]) == 0
    table = capsys.readouterr().out
    one = (tmp_path / "one" / "results.json").read_text()
    assert one == (tmp_path / "two" / "results.json").read_text()
    results = json.loads(one)
    assert list(results["arms"]) == ["clean", "flipped"]
    assert results["text"] == str(tmp_path / "text.txt")
    assert list(results["tasks"]) == ["toy_pages", "toy_choice"]
    assert results["tasks"]["toy_pages"]["arms"]["clean"]["word_perplexity,none"]["trials"] == [None]
    choice = results["tasks"]["toy_choice"]
    assert (choice["questions"], choice["num_fewshot"], choice["version"]) == (3, 1, 1.0)
    assert len(choice["arms"]["flipped"]["acc,none"]["trials"]) == 2
    assert "toy_choice           acc_norm               flipped" in table
    assert "toy_pages            word_perplexity        clean" in table
    assert main([*argv, "--to", str(tmp_path / "one")]) == 2  # never over one
    assert main([*argv, "--to", str(tmp_path / "three")]) == 0
    results = json.loads((tmp_path / "three" / "results.json").read_text())
    assert (results["arms"], results["text"]) == ({}, None)


def test_what_is_wrong_is_told_in_one_line(model_dir, lm_eval_tasks, capsys, monkeypatch, tmp_path):
    def told(*flags):
        assert main(["eval", str(model_dir), *flags]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    assert "--limit: belongs to --tasks" in told("--limit", "3")
    assert "--num-fewshot = 'many'" in told("--tasks", "toy_pages", "--num-fewshot", "many")
    assert "did you mean toy_pages" in told("--tasks", "toy_page", "--include-path", str(lm_eval_tasks))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--tasks: 2 processes were started" in told("--tasks", "toy_pages")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "flipproof.measure.tasks")
    assert "pip install 'flipproof[eval]'" in told("--tasks", "toy_pages")


FAILING = """
task: toy_fails
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
process_results: !function broken.results
metric_list: [{metric: acc}]
"""


@pytest.fixture
def failing_tasks(lm_eval_tasks, tmp_path):
    """The same tasks, and one whose own code fails as long as there is a file called broken."""
    own = tmp_path / "tasks"
    shutil.copytree(lm_eval_tasks, own)
    (own / "toy_fails.yaml").write_text(FAILING.replace("DATA", str(own / "toy_choice.jsonl")))
    code = f"""
from pathlib import Path
def results(doc, answers):
    if Path({str(own / "broken")!r}).exists():
        raise RuntimeError("the grader\\nis out of order")
    return {{"acc": 1.0}}
"""
    (own / "broken.py").write_text(code)
    (own / "broken").touch()
    return own


def test_a_task_that_fails_keeps_those_before_it_and_the_next_start_goes_on(
    model_dir, failing_tasks, tmp_path, capsys, monkeypatch
):
    argv = ["eval", str(model_dir), "--include-path", str(failing_tasks), "--bitflip.w_p_exp", "1e-3", "--trials", "2"]
    argv += ["--batch-size", "4", "--to", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    asked = ["--tasks", "toy_choice,toy_fails,toy_pages"]
    assert main([*argv, *asked]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert line.endswith("error: --tasks toy_fails, clean: the grader is out of order")
    assert "toy_choice           acc " in out
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (list(written["tasks"]), written["unfinished"]) == (["toy_choice"], ["toy_fails", "toy_pages"])
    # what another start would lose stays
    assert main([*argv, "--tasks", "toy_pages"]) == 2
    assert "unfinished results of toy_choice" in capsys.readouterr().err
    assert main(["2e-3" if word == "1e-3" else word for word in (*argv, *asked)]) == 2
    assert "unfinished results of other faults" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == written
    (failing_tasks / "broken").unlink()
    runs, real = [], tasks.run_task
    monkeypatch.setattr(tasks, "run_task", lambda *arguments: runs.append(1) or real(*arguments))
    assert main([*argv, *asked]) == 0
    assert len(runs) == 2 * 3  # clean and two seeds of the two tasks that were left
    finished = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(finished["tasks"]) == ["toy_choice", "toy_fails", "toy_pages"]
    assert "unfinished" not in finished
    assert finished["tasks"]["toy_choice"] == written["tasks"]["toy_choice"]
    assert main([*argv, *asked]) == 2
    assert "results.json exists already" in capsys.readouterr().err


def test_until_ci_adds_seeds_until_each_metric_is_known(model_dir, lm_eval_tasks):
    flips = {"w_p_frac": 0.05}
    asked = partial(TaskRequest, include_path=lm_eval_tasks)
    many = settings(model_dir, trials=8, **flips)
    every = evaluate_tasks(many, asked(("toy_pages",)))[1]["toy_pages"].arms["flipped"]

    def width(values):
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        return (interval.high - interval.low) / 2 / abs(sum(values) / len(values))

    widths = {n: max(width(metric.trials[:n]) for metric in every.values()) for n in range(5, 9)}
    wanted = widths[7] * 1.0001
    stops = next(n for n, one in widths.items() if one <= wanted)
    config = settings(model_dir, trials=2, **flips)
    config = replace(config, eval=replace(config.eval, until_ci=wanted, max_trials=8))
    found = evaluate_tasks(config, asked(("toy_pages",)))[1]["toy_pages"].arms
    assert {name: metric.trials for name, metric in found["flipped"].items()} == {
        name: metric.trials[:stops] for name, metric in every.items()
    }
    assert len(found["clean"]["byte_perplexity,none"].trials) == 1


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def test_the_chat_template_is_lm_evals(model, model_dir, lm_eval_tasks, tmp_path, capsys):
    argv = ["eval", str(model_dir), "--tasks", "toy_choice", "--include-path", str(lm_eval_tasks), "--batch-size", "4"]
    assert main([*argv, "--apply-chat-template"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"--apply-chat-template: the tokenizer of '{model_dir}' has no chat template" in line
    assert main([*argv, "--fewshot-as-multiturn"]) == 2
    assert "add --apply-chat-template" in capsys.readouterr().err
    assert main(["eval", str(model_dir), "--apply-chat-template"]) == 2
    assert "--apply-chat-template: belongs to --tasks" in capsys.readouterr().err

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model_dir)
    manager = tasks.TaskManager(include_path=str(lm_eval_tasks))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = []
    for flags, how in (
        ([], {}),
        (["--apply-chat-template"], {"apply_chat_template": True}),
        (["--apply_chat_template", "--fewshot_as_multiturn", "false"],
         {"apply_chat_template": True, "fewshot_as_multiturn": False}),
        (["--apply-chat-template", "--system-instruction", "Guess."],
         {"apply_chat_template": True, "system_instruction": "Guess."}),
    ):  # fmt: skip
        to = tmp_path / f"out{len(found)}"
        cache = ["--num-fewshot", "2", "--cache", str(tmp_path / "cache")]
        assert main([*argv, *cache, *flags, "--to", str(to)]) == 0
        results = json.loads((to / "results.json").read_text())["tasks"]["toy_choice"]["arms"]["clean"]
        expected = simple_evaluate(
            lm, tasks=["toy_choice"], task_manager=manager, log_samples=False, num_fewshot=2, **how
        )
        found.append([results[name]["mean"] for name in ("acc,none", "acc_norm,none")])
        assert found[-1] == [expected["results"]["toy_choice"][name] for name in ("acc,none", "acc_norm,none")]
    assert len(list((tmp_path / "cache").iterdir())) == 4  # no one answered for another


@pytest.mark.parametrize("flag", ["--to", "--cache"])
def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path, capsys, flag):
    (tmp_path / "file").write_text("")
    assert main(["eval", "no/model", "--tasks", "toy_choice", flag, str(tmp_path / "file" / "out")]) == 2
    assert f"{tmp_path / 'file'} is not a directory" in capsys.readouterr().err


def test_a_damaged_answer_of_the_cache_is_named_and_so_is_anothers(model_dir, lm_eval_tasks, tmp_path):
    requests = [TaskRequest((name,), lm_eval_tasks, cache=tmp_path / "cache") for name in ("toy_pages", "toy_choice")]
    found, kept = [], []
    for request in requests:
        found.append(evaluate_tasks(settings(model_dir), request))
        kept.append(next(path for path in (tmp_path / "cache").iterdir() if path not in kept))
    whole = kept[0].read_text()
    digit = re.search(r'word_perplexity,none": \d+\.(\d)', whole)
    wrong = f"{whole[: digit.start(1)]}{9 - int(digit[1])}{whole[digit.end(1) :]}"
    for text, words in (
        (whole[:6], "is no answer that was kept .*"),
        (wrong, "is no answer that was kept .it is not what was written.*"),
        (kept[1].read_text(), "is the answer of another run under this one's name"),
        ("[1]", "is no answer that was kept .*"),
    ):
        kept[0].write_text(text)
        with pytest.raises(ConfigError, match=rf"--cache: {kept[0]} {words}; delete it"):
            evaluate_tasks(settings(model_dir), requests[0])
    kept[0].write_text(whole)
    assert evaluate_tasks(settings(model_dir), requests[0]) == found[0]


def test_data_that_the_hub_does_not_give_is_told_as_it_says(model_dir, lm_eval_tasks, tmp_path):
    task = (lm_eval_tasks / "toy_pages.yaml").read_text()
    task = re.sub("dataset_path.*\n.*\n", "dataset_path: nobody/no-such-data\n", task)
    (tmp_path / "elsewhere.yaml").write_text(task.replace("toy_pages", "elsewhere"))
    with pytest.raises(ConfigError, match=r"--tasks elsewhere: .*'nobody/no-such-data' on the Hub \(OfflineMode"):
        evaluate_tasks(settings(model_dir), TaskRequest(("elsewhere",), tmp_path))


def test_questions_come_from_the_cache_where_the_hub_cannot_be_reached(monkeypatch):
    """``models/test_hub.py`` is about the rest."""

    class Manager:
        def load(self, names):
            raise OSError(f"offline is {constants.is_offline_mode()}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for reachable in (True, False):
        monkeypatch.setattr(hub, "_reachable", lambda _, found=reachable: found)
        with pytest.raises(ConfigError, match=f"--tasks a: its questions cannot be read .*offline is {not reachable}"):
            tasks._load_task(Manager(), "a", TaskRequest(("a",)))
