"""Training on several processes against the same run in one process.

Draws are keyed by the place in the whole tensor and batches by the place in the global batch, so the number of
processes and the strategy change nothing but the order of sums. Everything runs on the CPU (gloo), many runs to a
launch: see ``sharded_jobs.py``. What torchrun does is looked at where a rank or it itself ends.
"""

import json
import re
from dataclasses import replace

import peft
import pytest
import torch
from guards_by_hand import guards_of
from rounding import ROUNDED, assert_same_function, loading_moved, training_moved
from safetensors.torch import load_file
from sharded_runs import (
    MOVED,
    alone,
    arguments,
    arms,
    assert_same_run,
    curve,
    distance_of_arms,
    distance_of_weights,
    make_home,
    room,
    run_jobs,
    stopped_after,
    weights,
)
from transformers import AutoModelForCausalLM

import flipproof.train.step as step_module
from flipproof.faults.fitted import read_guards

# -- the runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("sharded"))


ALL_LINEAR = ("--bitflip.sites", "[linear, head]")
MEASURED_LITTLE = ("--eval.trials", "1", "--training.save_freq", "0")
SCRATCH = ("--model.init", "random", "--lora.r", "0")
TRAIN_ALL = ("--lora.r", "0", "--training.lr", "1e-3")
DISTILLED = ("--training.distill", "0.5", "--lora.dropout", "0.2", *MEASURED_LITTLE)


@pytest.fixture(scope="module")
def single(home):
    """Reference runs in one process, by name, and how far other orders of sums might take each (``room``)."""
    for name, flags in references(home).items():
        alone(*arguments(home, f"single/{name}", 4, *flags))
        for seed in range(MOVED):
            with training_moved(seed):
                alone(*arguments(home, f"single/{name}.moved{seed}", 4, *flags, *MEASURED_LITTLE))
    return home / "single"


# what is not a new, independent flip in a linear layer
MEMORIES = (
    *("--bitflip.sites", "[linear, head, embedding]", "--bitflip.kv_p_exp", "1e-3", "--bitflip.kv_p_frac", "1e-4"),
    *("--bitflip.kv_zero_out_t", "16", "--bitflip.w_protection", "secded", "--bitflip.w_faults", "persistent"),
    *("--bitflip.x_p_row", "1e-3", "--bitflip.x_p_bits", "{sign: 0.001}", "--bitflip.w_p_exp", "0.01"),
)


def memories(home):
    """In a model of one layer, since what is stored takes long to draw, row by row and bit by bit."""
    return "--model.hf_model_path", f"{home}/shallow", "--training.seq_len", "16", *MEMORIES


def references(home):
    memorised = (*TRAIN_ALL, *memories(home))
    return {"lora": (), "all": TRAIN_ALL, "scratch": SCRATCH, "memories": memorised, "distilled": DISTILLED}


# what says when layers are gathered, computed again and written, each in one of them
STRATEGIES = {
    "full_shard": (),
    "shard_grad_op": (
        *("--parallelism.sharding_strategy", "shard_grad_op"),
        *("--training.activation_checkpointing", "full"),
    ),
    "no_shard": ("--parallelism.sharding_strategy", "no_shard"),
    "cpu_offload": (
        *("--parallelism.cpu_offload", "true", "--training.activation_checkpointing", "2"),
        *("--parallelism.forward_prefetch", "2", "--parallelism.backward_prefetch", "2"),
    ),
    "keep_gathered": ("--parallelism.keep_gathered", "true", "--training.activation_checkpointing", "selective"),
    "recomputed": (
        *("--training.activation_checkpointing", "full"),
        *("--parallelism.forward_prefetch", "2", "--parallelism.backward_prefetch", "3"),
    ),
    "full_checkpoints": (
        *("--checkpoint.state_dict_type", "full", "--checkpoint.asynchronous", "false"),
        *("--parallelism.forward_prefetch", "0", "--parallelism.backward_prefetch", "0"),
    ),
}


SKIPS = "rank_1_has_a_loss_that_is_not_finite_in_step_3"


def eval_lora(home, name, rows):
    argv = ["eval", "--config", f"{home}/run.toml", "--num-samples", "5", "--adapter", f"{home}/single/lora/adapter"]
    return [*argv, "--training.local_batch_size", str(rows), "--to", f"{home}/eval/{name}"]


def eval_peft(home, to, rows):
    """The command line that measures a PEFT adapter of some layers and of the tied head, in several ranks."""
    if not (home / "peft").exists():
        chosen = {
            "target_modules": ["lm_head", "q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 3},
            "use_rslora": True,
        }
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(home / "tied"), peft.LoraConfig(r=2, **chosen))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        model.save_pretrained(home / "peft")
    model = ["--model.hf_model_path", f"{home}/tied", "--adapter", f"{home}/peft", *ALL_LINEAR]
    size = ["--training.local_batch_size", str(rows), "--to", f"{home}/eval_peft/{to}"]
    return ["eval", "--config", f"{home}/run.toml", *model, *size]


def generates(home):
    faults = ["--lora.r", "0", *memories(home), "--prompt", "def f(", "--max_new_tokens", "6"]
    return ["generate", "--config", f"{home}/run.toml", *faults]


def behind_guards(home):
    """Fitted ones of the tied model, in which the embedding's are the head's."""
    guards = guards_of(AutoModelForCausalLM.from_pretrained(home / "tied"))
    maxima = {name: maxima for name, maxima in guards.maxima.items() if name != "lm_head/w"}
    replace(guards, maxima=maxima).write(home / "guards")
    none = ("--bitflip.w_zero_out_t", "None", "--bitflip.x_zero_out_t", "None")
    return "--bitflip.guards", f"{home}/guards", *none


@pytest.fixture(scope="module")
def pair(home, single):
    """The runs on two processes, and what is exported, measured and generated there."""
    jobs = {name: arguments(home, f"pair/{name}", 2, *flags) for name, flags in STRATEGIES.items()}
    jobs["all"] = arguments(home, "pair/all", 2, *TRAIN_ALL)
    jobs["scratch"] = arguments(home, "pair/scratch", 2, *SCRATCH)
    jobs["memories"] = arguments(home, "pair/memories", 2, *TRAIN_ALL, *memories(home))
    for name in ("no_shard", "shard_grad_op", "keep_gathered"):
        jobs[f"distilled_{name}"] = arguments(home, f"pair/distilled/{name}", 2, *DISTILLED, *STRATEGIES[name])
    jobs["bfloat16"] = arguments(
        home, "pair/bfloat16", 2, "--training.mixed_precision_param", "bfloat16", *MEASURED_LITTLE
    )
    jobs["every_third"] = arguments(home, "pair/every_third", 2, "--training.log_freq", "3", *MEASURED_LITTLE)
    jobs["export"] = ["export", f"{home}/pair/full_shard", "--to", f"{home}/pair/exported/model"]
    tied_model = ("--model.hf_model_path", f"{home}/tied", *ALL_LINEAR, *behind_guards(home))
    jobs["tied"] = arguments(home, "pair/tied", 2, *tied_model)
    jobs["export_tied"] = ["export", f"{home}/pair/tied", "--to", f"{home}/pair/exported_tied/model"]
    jobs["eval"] = eval_lora(home, "two", 2)
    jobs["eval_peft"] = eval_peft(home, "two", 2)
    jobs["generate"] = generates(home)
    jobs[SKIPS] = arguments(home, f"pair/{SKIPS}", 2)
    run_jobs(home / "pair.jobs", 2, jobs, patches={SKIPS: SKIPS})
    return home / "pair"


@pytest.fixture(scope="module")
def four(home, pair):
    """The runs on four processes."""
    hybrid = ("--parallelism.sharding_strategy", "hybrid_shard", "--parallelism.fsdp_degree", "2")
    stopped_after(2, pair / "full_checkpoints", home / "four" / "of_full_checkpoint")
    jobs = {
        "hybrid_shard": arguments(home, "four/hybrid_shard", 1, *hybrid),
        "of_full_checkpoint": arguments(home, "four/of_full_checkpoint", 1, "--resume"),
    }
    run_jobs(home / "four.jobs", 4, jobs)
    return home / "four"


@pytest.fixture(scope="module")
def of_four(home, four):
    """A run of four processes that goes on in two."""
    stopped_after(4, four / "of_full_checkpoint", home / "of_four")
    run_jobs(home / "of_four.jobs", 2, {"of_four": arguments(home, "of_four", 2, "--resume")})
    return home / "of_four"


# -- the same run on any number of processes ---------------------------------------------------------------------------


def test_faults_count_in_the_reference_run(single):
    """Else the comparisons below would say little about draws: other draws change far more than the order of sums."""
    measured, allowed = arms(single / "lora"), room(single / "lora")
    first, second = measured["flipped"]["trial_losses"]
    assert abs(first - second) > 1e-2 > 10 * allowed["loss of an arm"]
    assert abs(measured["recovered"]["loss"] - measured["recovered_clean"]["loss"]) > 1e-2
    assert all(room(single / name)["loss of a step"] < 1e-3 for name in references(single.parent))


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_as_one(single, pair, name):
    assert_same_run(pair / name, single / "lora")


@pytest.mark.parametrize("name", ["full_shard", "recomputed", "full_checkpoints"])
def test_what_neighbours_share_gives_the_bits_of_the_whole_model_in_each(pair, name):
    """One block ahead, two, and none. In the runs of FSDP sums have another order."""
    shared, apart = (load_file(pair / run / "adapter" / "adapter_model.safetensors") for run in (name, "no_shard"))
    assert shared.keys() == apart.keys()
    assert all(torch.equal(shared[key], apart[key]) for key in shared)
    assert curve(pair / name) == curve(pair / "no_shard")


def test_four_processes_train_as_one(single, four):
    """And those that go on from two processes, below."""
    assert_same_run(four / "hybrid_shard", single / "lora")


def test_all_weights_train_as_in_one_process(single, pair):
    assert_same_run(pair / "all", single / "all")


def test_faulty_memories_train_as_in_one_process(single, pair):
    assert_same_run(pair / "memories", single / "memories")
    clean, flipped = (arms(single / "memories")[name]["loss"] for name in ("clean", "flipped"))
    assert abs(flipped - clean) > 0.05


@pytest.mark.parametrize("strategy", ["no_shard", "shard_grad_op", "keep_gathered"])
def test_two_processes_distil_as_one(single, pair, strategy):
    """The teacher's pass runs through the same wrapped model."""
    assert_same_run(pair / "distilled" / strategy, single / "distilled")
    assert distance_of_weights(pair / "distilled" / strategy, single / "lora") > 10 * room(single / "lora")["weight"]


def test_from_scratch_starts_and_trains_as_in_one_process(single, pair):
    assert list(arms(single / "scratch")) == ["recovered", "recovered_clean"]
    assert_same_run(pair / "scratch", single / "scratch")


def test_a_logged_loss_is_the_mean_over_steps_and_processes(pair):
    each, thirds = ([line[3] for line in curve(pair / name)] for name in ("full_shard", "every_third"))
    assert thirds == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 3], rel=1e-12)


def test_mixed_precision_is_near_float32(single, pair):
    first, reference = curve(pair / "bfloat16")[0], curve(single / "lora")[0]
    assert first[3] != reference[3]
    assert first[3] == pytest.approx(reference[3], abs=2e-2)


def test_a_loss_that_one_process_alone_sees_skips_the_step_in_all(home, pair, single, monkeypatch):
    """And in one process: the same step is left out, and nothing else differs."""
    loss_of, calls = step_module.next_token_loss, []

    def spoiled(*args, **more):
        calls.append(1)
        return loss_of(*args, **more) + (float("nan") if len(calls) == 5 else 0.0)

    monkeypatch.setattr(step_module, "next_token_loss", spoiled)
    alone(*arguments(home, "single/skips", 4))
    for run in (pair / SKIPS, single / "skips"):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
        assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    allowed = room(single / "lora")
    assert distance_of_weights(pair / SKIPS, single / "skips") <= allowed["weight"]
    assert distance_of_arms(pair / SKIPS, single / "skips") <= allowed["loss of an arm"]


# -- going on in another number of processes ---------------------------------------------------------------------------


def test_a_run_of_four_processes_goes_on_in_two(single, of_four):
    assert_same_run(of_four, single / "lora")


def test_a_run_of_two_processes_goes_on_in_four_from_a_full_checkpoint(single, pair, four):
    assert [file.name for file in (pair / "full_checkpoints/checkpoints/step-2").glob("*.distcp")] == ["__0_0.distcp"]
    assert_same_run(four / "of_full_checkpoint", single / "lora")


@pytest.mark.parametrize(
    ("run", "step", "reference", "flags"),
    [("four/of_full_checkpoint", 4, "lora", ()), ("pair/no_shard", 2, "lora", ()), ("pair/all", 2, "all", TRAIN_ALL)],
)
def test_a_run_of_several_processes_goes_on_in_one(home, single, pair, four, run, step, reference, flags):
    name = f"single/of_{run.replace('/', '_')}"
    stopped_after(step, home / run, home / name)
    alone(*arguments(home, name, 4, "--resume", f"step-{step}", *flags))
    assert_same_run(home / name, single / reference)


# -- what a run is exported to -----------------------------------------------------------------------------------------


def assert_same_merged(run, reference):
    """Weights that are each one sum, W + s (b1 a1 + b2 a2)."""
    got, expected = weights(run), weights(reference)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = ROUNDED * float(tensor.abs().max())
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def exported(home, pair):
    """The same run's merged model, exported by two processes and by one."""
    alone("export", str(pair / "full_shard"), "--to", str(home / "single/exported/model"))
    return pair / "exported", home / "single/exported"


def test_several_processes_export_what_one_does(exported):
    by_two, by_one = exported
    assert len(list((by_two / "model").glob("*.safetensors"))) > 2
    assert len(list((by_one / "model").glob("*.safetensors"))) == 1
    assert_same_merged(by_two, by_one)


def test_several_processes_export_an_adapter_on_a_tied_head_as_one_does(home, pair):
    alone("export", str(pair / "tied"), "--to", str(home / "single/exported_tied/model"))
    assert_same_merged(pair / "exported_tied", home / "single/exported_tied")
    opened = AutoModelForCausalLM.from_pretrained(pair / "exported_tied/model")
    assert not opened.config.tie_word_embeddings
    base, adapter = AutoModelForCausalLM.from_pretrained(home / "tied"), weights(pair / "tied")
    head = (adapter[f"base_model.model.lm_head.lora_{matrix}.weight"].double() for matrix in "BA")
    expected = base.lm_head.weight.double() + 2.0 * next(head) @ next(head)
    assert (expected - base.lm_head.weight).abs().max() > 1e-3
    atol = ROUNDED * float(expected.abs().max())
    torch.testing.assert_close(opened.lm_head.weight.double(), expected, rtol=0, atol=atol)
    assert torch.equal(opened.model.embed_tokens.weight, base.model.embed_tokens.weight)
    own, found = guards_of(opened), read_guards(str(pair / "exported_tied/model"))
    assert found.maxima.keys() == own.maxima.keys()
    assert all(torch.equal(maxima, own.maxima[name]) for name, maxima in found.maxima.items())


def test_the_adapter_opens_with_peft_and_says_what_the_merged_model_says(home, pair, exported):
    ids = torch.arange(24).view(1, 24)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    with torch.no_grad():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, pair / "full_shard/adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(exported[0] / "model")
        assert (adapted - before).abs().max() > 0.1
        assert_same_function(adapted, lambda: merged(ids).logits, merged.parameters())


def test_a_model_in_several_files_opens_with_from_pretrained(pair):
    files = list((pair / "all/model").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 2**15 or len(load_file(file)) == 1 for file in files)
    mine, problems = AutoModelForCausalLM.from_pretrained(pair / "all/model", output_loading_info=True)
    assert not any(problems.values())
    expected = weights(pair / "all")
    assert mine.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mine.state_dict().items())


# -- what is measured and generated ------------------------------------------------------------------------------------


def stdout(home, name):
    """What the first of two processes printed; the other printed nothing."""
    first, second = ((home / f"pair.jobs/{name}.{rank}.out").read_text() for rank in range(2))
    assert second == ""
    return first


def test_eval_prints_the_table_of_one_process(home, single, pair, capsys):
    alone(*eval_lora(home, "one", 4))
    assert_same_table(stdout(home, "eval"), capsys.readouterr().out)
    assert list(arms(home / "eval/two")) == ["clean", "guard", "flipped", "recovered", "recovered_clean"]
    for reference in (home / "eval/one", single / "lora"):
        assert distance_of_arms(home / "eval/two", reference) <= room(single / "lora")["loss of an arm"]


def assert_same_table(got, expected):
    """But for the last digit of a number that has decimals, where what is printed was nearly half-way between two."""
    number = re.compile(r"\d+\.\d+")
    assert number.sub("", got) == number.sub("", expected)
    for one, other in zip(number.findall(got), number.findall(expected), strict=True):
        assert len(one.partition(".")[2]) == len(other.partition(".")[2])
        assert abs(int(one.replace(".", "")) - int(other.replace(".", ""))) <= 1


def test_eval_of_a_peft_adapter_is_that_of_one_process(home, pair):
    alone(*eval_peft(home, "one", 4))
    results = home / "eval_peft"
    found = arms(results / "one")
    assert abs(found["recovered_clean"]["loss"] - found["clean"]["loss"]) > 0.01
    distances = []
    for seed in range(MOVED):
        with loading_moved(seed):
            alone(*eval_peft(home, f"moved{seed}", 4))
        distances.append(distance_of_arms(results / f"moved{seed}", results / "one"))
    rounded = ROUNDED * found["clean"]["loss"]
    assert distance_of_arms(results / "two", results / "one") <= max(distances) + rounded


def test_generate_says_in_two_processes_what_it_says_in_one(home, pair, capsys):
    alone(*generates(home))
    assert stdout(home, "generate") == capsys.readouterr().out
