"""Training on several processes against the same run in one process.

Draws are keyed by the place in the whole tensor and batches by the place in the global batch, so the number of
processes and the strategy change nothing but the order of sums. Everything runs on the CPU (gloo), many runs to a
launch: see ``sharded_jobs.py``. What torchrun does is looked at where a rank or it itself ends.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import peft
import preloaded
import pytest
import sharded_jobs
import torch
from rounding import ROUNDED, assert_same_function, loading_moved, training_moved
from safetensors.torch import load_file
from texts import sentences
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import flipproof.train.step as step_module
from flipproof.cli.main import main
from flipproof.models.load import byte_tokenizer
from flipproof.train.checkpoint import checkpoint_problems, list_checkpoints

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
CONFIG = """
[model]
hf_model_path = "{home}/base"
[training]
seq_len = 32
gradient_accumulation_steps = 2
steps = 6
lr = 5e-3
warmup_steps = 2
log_freq = 1
save_freq = 2
[parallelism]
timeout_minutes = 1.0
[lora]
r = 2
lora_alpha = 4
[bitflip]
w_p_exp = 0.003
w_p_frac = 1e-4  # few, since the last bits of a weight may carry into the one that flips
w_zero_out_t = 1.0
x_p_exp = 0.001
x_zero_out_t = 64.0
[data]
source = "{home}/text.txt"
[eval]
num_samples = 5
trials = 2
[checkpoint]
keep_last = 3
"""


# -- starting runs -----------------------------------------------------------------------------------------------------


def arguments(home, run, rows, *flags):
    """The command line of a training; ``rows`` in each process are 4 over all processes."""
    config = ["--config", f"{home}/run.toml", "--training.local_batch_size", str(rows)]
    return ["train", *config, "--logging.run_dir", f"{home}/{run}", *flags]


def start(processes, *command):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=3000):
    """(exit code, stdout, stderr) of torchrun."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its children
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{out}\n{err}") from None
    return process.returncode, out, err


def start_job(directory, argv, patch):
    """Start torchrun with one job on two processes."""
    return start(2, sharded_jobs.__file__, str(sharded_jobs.write_jobs(directory, {"run": argv}, {"run": patch})))


def run_jobs(directory, processes, argvs, patches=None, codes=None):
    """Run all of ``argvs`` in one launch. ``codes`` are what the ranks of some jobs end with in the place of 0."""
    ended = preloaded.run_ranks(processes, sharded_jobs.work, sharded_jobs.write_jobs(directory, argvs, patches))
    unfinished = [name for name in argvs if len(exit_codes(directory, name)) < processes]
    said = "".join(f"{name}:\n{stderr(directory, name)}" for name in unfinished)
    assert ended == [0] * processes, said[-5000:]
    for name in argvs:
        expected = (codes or {}).get(name, [0] * processes)
        assert exit_codes(directory, name) == expected, f"{name}:\n{stderr(directory, name)}"


def exit_codes(directory, name):
    return [json.loads(file.read_text())["code"] for file in sorted(directory.glob(f"{name}.?.json"))]


def stderr(directory, name):
    return "".join(file.read_text() for file in sorted(directory.glob(f"{name}.?.err")))


def alone(*argv):
    """The same command line in this process."""
    assert main(argv) == 0


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not (path.exists() and (text := path.read_text())):
        assert process.poll() is None, f"ended early: {finish(process)}"
        assert time.monotonic() < deadline, f"{path} did not come: {finish(process, 1)}"
        time.sleep(0.05)
    return text


# -- what a run left ---------------------------------------------------------------------------------------------------


def curve(run):
    keys = ("step", "tokens", "lr", "loss", "grad_norm")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines]


def arms(run):
    return json.loads((run / "results.json").read_text())["arms"]


def weights(run):
    """Adapter or model of a run, as tensors by name."""
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def distance(run, reference):
    """How far two runs are apart in what the order of sums may change; what it may not is compared."""
    got, expected = curve(run), curve(reference)
    assert [line[:3] for line in got] == [line[:3] for line in expected]  # step, tokens, lr
    assert [line[0] for line in got] == [1, 2, 3, 4, 5, 6]
    return {
        "loss of a step": max(abs(one[3] - other[3]) for one, other in zip(got, expected, strict=True)),
        "grad_norm": max(abs(one[4] / other[4] - 1) for one, other in zip(got, expected, strict=True)),
        "loss of an arm": distance_of_arms(run, reference),
        "weight": distance_of_weights(run, reference),
    }


def distance_of_weights(run, reference):
    got, expected = weights(run), weights(reference)
    assert got.keys() == expected.keys()
    return mean_of({name: got[name] - tensor for name, tensor in expected.items()})


def mean_of(tensors):
    """Of the sizes of all elements. That of one, whose gradient is nearly nothing, is what Adam makes of its sign."""
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).double().abs().mean())


def distance_of_arms(run, reference):
    got, expected = arms(run), arms(reference)
    assert list(got) == list(expected)
    assert all(got[name]["tokens"] == arm["tokens"] for name, arm in expected.items())
    # moved runs have the first seed alone
    losses = [(got[name]["trial_losses"], arm["trial_losses"]) for name, arm in expected.items()]
    return max(abs(one - other) for pair in losses for one, other in zip(*pair, strict=False))


@cache
def room(reference):
    """How far another order of sums may take a run of ``single``: as far as moved weights take it (``rounding.py``),
    and what is measured is rounded, too."""
    found = [distance(run, reference) for run in reference.parent.glob(f"{reference.name}.moved*")]
    assert len(found) == MOVED
    loss = max(line[3] for line in curve(reference))
    sizes = {"loss of a step": loss, "grad_norm": 1, "loss of an arm": loss, "weight": mean_of(weights(reference))}
    return {what: max(one[what] for one in found) + ROUNDED * size for what, size in sizes.items()}


def assert_same_run(run, reference):
    assert [arm["trials"] for arm in arms(run).values()] == [arm["trials"] for arm in arms(reference).values()]
    allowed = room(reference)
    for what, found in distance(run, reference).items():
        assert found <= allowed[what], what


def assert_same_merged(run, reference):
    """Weights that are each one sum, W + s (b1 a1 + b2 a2)."""
    got, expected = weights(run), weights(reference)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = ROUNDED * float(tensor.abs().max())
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_bitwise_the_same_run(run, reference):
    assert set(distance(run, reference).values()) == {0}
    assert curve(run) == curve(reference)
    assert arms(run) == arms(reference)


def stopped_after_step_2(run, copy):
    """A copy of a finished run as it was when its first checkpoint was written."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("adapter", "model", "step-4", "step-6"))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:2]))
    return copy


# -- the runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a base model, text and a config."""
    home = tmp_path_factory.mktemp("sharded")
    save_llama(home / "base")
    (home / "text.txt").write_text(sentences())
    (home / "run.toml").write_text(CONFIG.format(home=home))
    return home


def save_llama(directory, max_shard_size="1GB", **changes):
    config = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 256,
        "initializer_range": 0.1,  # so that faults change what it says
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**config | changes))
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(directory)


ALL_LINEAR = ("--bitflip.sites", "[linear, head]")
MOVED = 3
MEASURED_LITTLE = ("--eval.trials", "1", "--training.save_freq", "0")
SCRATCH = ("--model.init", "random", "--lora.r", "0")
TRAIN_ALL = ("--lora.r", "0", "--training.lr", "1e-3")


@pytest.fixture(scope="module")
def single(home):
    """Reference runs in one process, by name, and how far other orders of sums might take each (``room``)."""
    for name, flags in REFERENCES.items():
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
REFERENCES = {"lora": (), "all": TRAIN_ALL, "scratch": SCRATCH, "memories": (*TRAIN_ALL, *MEMORIES)}


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
    "full_checkpoints": (
        *("--checkpoint.state_dict_type", "full", "--checkpoint.asynchronous", "false"),
        *("--parallelism.forward_prefetch", "0", "--parallelism.backward_prefetch", "0"),
    ),
}


SKIPS = "rank_1_has_a_loss_that_is_not_finite_in_step_3"


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


KILLS = {"rank_1_dies_while_it_writes_step_4": [1, -9], "rank_0_dies_before_step_4_gets_its_name": [-9, 1]}


@pytest.fixture(scope="module")
def pair(home, single):
    """The runs on two processes, and what is exported, measured, generated and loaded there."""
    jobs = loads(home, "pair.jobs")
    jobs |= {name: arguments(home, f"pair/{name}", 2, *flags) for name, flags in STRATEGIES.items()}
    jobs["all"] = arguments(home, "pair/all", 2, *TRAIN_ALL)
    jobs["scratch"] = arguments(home, "pair/scratch", 2, *SCRATCH)
    jobs["memories"] = arguments(home, "pair/memories", 2, *TRAIN_ALL, *MEMORIES)
    jobs["bfloat16"] = arguments(home, "pair/bfloat16", 2, "--training.mixed_precision_param", "bfloat16")
    jobs["export"] = ["export", f"{home}/pair/full_shard", "--to", f"{home}/pair/exported/model"]
    jobs["tied"] = arguments(home, "pair/tied", 2, "--model.hf_model_path", f"{home}/tied", *ALL_LINEAR)
    jobs["export_tied"] = ["export", f"{home}/pair/tied", "--to", f"{home}/pair/exported_tied/model"]
    jobs["eval"] = eval_lora(home, "two", 2)
    jobs["eval_peft"] = eval_peft(home, "two", 2)
    jobs["generate"] = generates(home)
    jobs |= {name: arguments(home, f"pair/{name}", 2) for name in (*KILLS, "rank_1_gets_sigterm_in_step_3", SKIPS)}
    patches = {name: name for name in (*KILLS, "rank_1_gets_sigterm_in_step_3", SKIPS)}
    codes = KILLS | {"rank_1_gets_sigterm_in_step_3": [75, 75]}
    run_jobs(home / "pair.jobs", 2, jobs, patches, codes)
    return home / "pair"


@pytest.fixture(scope="module")
def four(home, pair):
    """The runs on four processes."""
    hybrid = ("--parallelism.sharding_strategy", "hybrid_shard", "--parallelism.fsdp_degree", "2")
    stopped_after_step_2(pair / "full_checkpoints", home / "four" / "of_full_checkpoint")
    jobs = {
        "full_shard": arguments(home, "four/full_shard", 1),
        "hybrid_shard": arguments(home, "four/hybrid_shard", 1, *hybrid),
        "of_full_checkpoint": arguments(home, "four/of_full_checkpoint", 1, "--resume"),
    }
    run_jobs(home / "four.jobs", 4, jobs)
    return home / "four"


@pytest.fixture(scope="module")
def ended(home):
    """torchrun's (exit code, stderr) of runs that it sees end: one rank is killed, or it gets SIGTERM itself."""
    killed = start_job(home / "killed.jobs", arguments(home, "ended/killed", 2), HANGS)
    rank_1 = wait_for(home / "killed.jobs/reached", killed)
    wait_for(home / "ended/killed/checkpoints/step-4/manifest.json", killed)
    os.kill(int(rank_1), signal.SIGKILL)
    codes = {"killed": finish(killed)[::2]}
    orphaned = start_job(home / "agent.jobs", arguments(home, "ended/agent", 2), HANGS)
    wait_for(home / "agent.jobs/reached", orphaned)
    wait_for(home / "ended/agent/checkpoints/step-4/manifest.json", orphaned)
    orphaned.kill()
    finish(orphaned, 30)  # its ranks have the other ends of its pipes: this is when all of them have ended
    told = start_job(home / "told.jobs", arguments(home, "ended/told", 2), "step_3_waits_for_sigterm")
    rank_0 = int(wait_for(home / "told.jobs/reached", told))
    # so it is the same whether torchrun or its process group gets the signal
    assert os.getpgid(rank_0) != os.getpgid(told.pid) == told.pid
    os.killpg(told.pid, signal.SIGTERM)
    codes["told"] = finish(told)[::2]
    return codes


HANGS = "rank_1_hangs_in_step_5"
INTERRUPTED = [  # run, its checkpoints
    ("ended/killed", ["step-2", "step-4"]),
    ("ended/agent", ["step-2", "step-4"]),
    *((f"pair/{name}", ["step-2"]) for name in KILLS),
    ("pair/rank_1_gets_sigterm_in_step_3", ["step-2", "step-3"]),
    ("ended/told", ["step-2", "step-3"]),
]


@pytest.fixture(scope="module")
def resumed(home, pair, four, ended):
    """Runs of two processes that go on from checkpoints of all kinds; (checkpoints, their problems) before, by run."""
    left = {}
    for run, _ in INTERRUPTED:
        found = list_checkpoints(home / run / "checkpoints")
        left[run] = [path.name for path in found], [checkpoint_problems(path) for path in found]
    stopped_after_step_2(four / "full_shard", home / "resumed" / "of_four")
    for name in ("damaged", "missing"):
        shutil.copytree(pair / "full_shard", home / "resumed" / name)
    damaged = home / "resumed" / "damaged" / "checkpoints" / "step-6" / "__1_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (home / "resumed" / "missing" / "checkpoints" / "step-6" / "__0_0.distcp").unlink()
    jobs = {run.replace("/", "_"): arguments(home, run, 2, "--resume", "auto") for run, _ in INTERRUPTED}
    jobs["of_four"] = arguments(home, "resumed/of_four", 2, "--resume")
    jobs["damaged_refused"] = arguments(home, "resumed/damaged", 2, "--resume", "step-6")
    jobs["missing_refused"] = arguments(home, "resumed/missing", 2, "--resume", "step-6")
    jobs["damaged_auto"] = arguments(home, "resumed/damaged", 2, "--resume")
    codes = {"damaged_refused": [2, 2], "missing_refused": [2, 2]}
    run_jobs(home / "resumed.jobs", 2, jobs, codes=codes)
    return left


# -- the same run on any number of processes ---------------------------------------------------------------------------


def test_faults_count_in_the_reference_run(single):
    """Else the comparisons below would say little about draws: other draws change far more than the order of sums."""
    measured, allowed = arms(single / "lora"), room(single / "lora")
    first, second = measured["flipped"]["trial_losses"]
    assert abs(first - second) > 1e-2 > 10 * allowed["loss of an arm"]
    assert abs(measured["recovered"]["loss"] - measured["recovered_clean"]["loss"]) > 1e-2
    assert all(room(single / name)["loss of a step"] < 1e-3 for name in REFERENCES)


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_train_as_one(single, pair, name):
    assert_same_run(pair / name, single / "lora")


@pytest.mark.parametrize("name", ["full_shard", "hybrid_shard"])
def test_four_processes_train_as_one(single, four, name):
    assert_same_run(four / name, single / "lora")


def test_all_weights_train_as_in_one_process(single, pair):
    assert_same_run(pair / "all", single / "all")


def test_faulty_memories_train_as_in_one_process(single, pair):
    assert_same_run(pair / "memories", single / "memories")
    clean, flipped = (arms(single / "memories")[name]["loss"] for name in ("clean", "flipped"))
    assert abs(flipped - clean) > 0.05


def test_from_scratch_starts_and_trains_as_in_one_process(single, pair):
    assert list(arms(single / "scratch")) == ["recovered", "recovered_clean"]
    assert_same_run(pair / "scratch", single / "scratch")


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


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "complete"), INTERRUPTED)
def test_an_interrupted_run_keeps_its_checkpoints_and_goes_on_to_the_same_bits(home, pair, resumed, run, complete):
    """Killed in mid-step and in mid-save, or stopped by SIGTERM."""
    found, problems = resumed[run]
    assert found == complete
    assert not any(problems)
    assert_bitwise_the_same_run(home / run, pair / "full_shard")


def test_sigterm_ends_the_ranks_with_the_code_for_queues(home, ended):
    """torchrun itself ends with 1, whatever its ranks end with. They are not in its process group: it tells them."""
    code, err = ended["told"]
    assert code == 1, err
    assert exit_codes(home / "told.jobs", "run") == [75, 75], err
    assert "stopped by SIGTERM after step 3; torchrun" in err


def test_a_killed_rank_ends_torchrun(ended):
    code, err = ended["killed"]
    assert code == 1, err
    assert "SIGKILL" in err


@pytest.mark.parametrize(
    ("name", "problem"), [("damaged", r"__1_0\.distcp is damaged"), ("missing", r"__0_0\.distcp is missing")]
)
def test_a_broken_checkpoint_is_refused_by_name_in_one_line(home, resumed, name, problem):
    """The exit code is 2, as ``resumed`` has checked."""
    said = stderr(home / "resumed.jobs", f"{name}_refused")
    errors = [line for line in said.splitlines() if "error" in line]
    assert len(errors) == 1, said
    assert re.fullmatch(rf"flipproof train: error: .*/step-6: {problem}.*; train --resume step-4 goes on .*", errors[0])


def test_the_checkpoint_before_a_damaged_one_goes_on(home, pair, resumed):
    said = stderr(home / "resumed.jobs", "damaged_auto")
    assert re.search(r"step-6: __1_0\.distcp is damaged .*; goes on from step-4", said), said
    assert_bitwise_the_same_run(home / "resumed/damaged", pair / "full_shard")
    found = list_checkpoints(home / "resumed/damaged/checkpoints")
    assert [path.name for path in found] == ["step-2", "step-4", "step-6"]
    assert not any(map(checkpoint_problems, found))


def test_a_run_of_four_processes_goes_on_in_two(home, single, resumed):
    assert_same_run(home / "resumed/of_four", single / "lora")


def test_a_run_of_two_processes_goes_on_in_four_from_a_full_checkpoint(single, pair, four):
    assert [file.name for file in (pair / "full_checkpoints/checkpoints/step-2").glob("*.distcp")] == ["__0_0.distcp"]
    assert_same_run(four / "of_full_checkpoint", single / "lora")


@pytest.mark.parametrize(
    ("run", "reference", "flags"),
    [("four/full_shard", "lora", ()), ("pair/no_shard", "lora", ()), ("pair/all", "all", TRAIN_ALL)],
)
def test_a_run_of_several_processes_goes_on_in_one(home, single, pair, four, run, reference, flags):
    name = f"single/of_{run.replace('/', '_')}"
    stopped_after_step_2(home / run, home / name)
    alone(*arguments(home, name, 4, "--resume", "step-2", *flags))
    assert_same_run(home / name, single / reference)


# -- a pretrained model in shards --------------------------------------------------------------------------------------

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LOADS = {"untied": ("base", "float32"), "bfloat16": ("base", "bfloat16"), "tied": ("tied", "float32")}


def loads(home, directory):
    """Jobs that load models; ``tied`` has several files and another rotary embedding."""
    if not (home / "tied").exists():
        save_llama(home / "tied", max_shard_size="20KB", tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)
        assert len(list((home / "tied").glob("*.safetensors"))) > 2
    return {
        f"load_{name}": ["load", str(home / model), dtype, str(home / directory / f"loaded_{name}")]
        for name, (model, dtype) in LOADS.items()
    }


@pytest.fixture(scope="module")
def loaded(home, pair):
    """What each rank found, by number of processes and model; 3 divides no shape of the models."""
    run_jobs(home / "three.jobs", 3, loads(home, "three.jobs"))
    return {
        (processes, name): [json.loads(file.read_text()) for file in (home / directory).glob(f"loaded_{name}.*")]
        for processes, directory in ((2, "pair.jobs"), (3, "three.jobs"))
        for name in LOADS
    }


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_hold_what_from_pretrained_loads(loaded, processes, name):
    results = loaded[processes, name]
    assert len(results) == processes
    for result in results:
        assert result["differ"] == []
        assert any(name.endswith("inv_freq") for name in result["names"])
        assert result["tied"] == (name == "tied")


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_reads_its_share(loaded, processes, name):
    """Parameters are cut between rows, so a share may be larger than 1/n by less than one row of each."""
    results = loaded[processes, name]
    assert sum(result["held"] for result in results) == results[0]["total"]
    for result in results:
        assert result["read"] == result["held"]
        assert result["held"] <= result["total"] / processes + result["rows"]
    assert results[0]["rows"] < results[0]["total"] / processes / 4


# -- what a run is exported to -----------------------------------------------------------------------------------------


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


# -- the command line under torchrun -----------------------------------------------------------------------------------


def eval_lora(home, name, rows):
    argv = ["eval", "--config", f"{home}/run.toml", "--num-samples", "5", "--adapter", f"{home}/single/lora/adapter"]
    return [*argv, "--training.local_batch_size", str(rows), "--to", f"{home}/eval/{name}"]


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


def generates(home):
    faults = ["--lora.r", "0", *MEMORIES, "--prompt", "def f(", "--max_new_tokens", "12"]
    return ["generate", "--config", f"{home}/run.toml", *faults]


def test_generate_says_in_two_processes_what_it_says_in_one(home, pair, capsys):
    alone(*generates(home))
    assert stdout(home, "generate") == capsys.readouterr().out


def test_train_as_users_start_it(home, pair):
    """By torchrun, and without the driver that the runs above share."""
    stopped_after_step_2(pair / "full_shard", home / "cli")
    code, out, err = finish(start(2, "-m", "flipproof", *arguments(home, "cli", 2, "--resume")))
    assert code == 0, err
    assert out == f"{home}/cli\n"
    assert_bitwise_the_same_run(home / "cli", pair / "full_shard")


def test_the_wrong_number_of_processes_is_told_before_anything_is_written(home):
    run = home / "70b"
    code, out, err = finish(start(2, "-m", "flipproof", "train", "--config", "70b", "--logging.run_dir", str(run)))
    assert code == 1  # torchrun's, whose summary tells that of the processes
    assert re.search(r"exitcode +: 2 ", err), err
    errors = [line for line in err.splitlines() if line.startswith("flipproof train: error: ")]
    assert len(errors) == 1, err
    assert "2 processes were started" in errors[0]
    assert "fsdp_degree x replicas = 4 x 1 = 4" in errors[0]
    assert "--parallelism.fsdp_degree 2" in errors[0]
    # torchrun's own words come after it, some hundred lines; the last of them are it again
    assert any(line.endswith(f": {errors[0]}") for line in err.strip().splitlines()[-3:]), err
    assert out == ""
    assert not run.exists()
