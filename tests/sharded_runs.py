"""Runs on several processes, many to a launch (``sharded_jobs.py``), and what tests compare of them.

Everything runs on the CPU (gloo). What torchrun does is looked at where a rank or it itself ends.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache

import preloaded
import sharded_jobs
import torch
from rounding import ROUNDED
from safetensors.torch import load_file
from texts import sentences
from transformers import LlamaConfig, LlamaForCausalLM

from flipproof.cli.main import main
from flipproof.models.load import byte_tokenizer

# -- models, text and config -------------------------------------------------------------------------------------------


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


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def make_home(home):
    """A directory with base models, text and a config."""
    save_llama(home / "base")
    save_llama(home / "shallow", num_hidden_layers=1, initializer_range=0.2)
    save_llama(home / "tied", max_shard_size="20KB", tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)
    assert len(list((home / "tied").glob("*.safetensors"))) > 2
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


# -- starting runs -----------------------------------------------------------------------------------------------------


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def arguments(home, run, rows, *flags):
    """The command line of a training; ``rows`` in each process are 4 over all processes."""
    config = ["--config", f"{home}/run.toml", "--training.local_batch_size", str(rows)]
    return ["train", *config, "--logging.run_dir", f"{home}/{run}", *flags]


def start(processes, *command):
    return _python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)


def start_alone(*argv):
    return _python("-m", "flipproof", *argv)


def _python(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=3000):
    """(exit code, stdout, stderr) of what was started."""
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


MOVED = 3


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


def assert_bitwise_the_same_run(run, reference):
    assert set(distance(run, reference).values()) == {0}
    assert curve(run) == curve(reference)
    assert arms(run) == arms(reference)


def stopped_after(step, run, copy):
    """A copy of a finished run as it was when the checkpoint of a step was written."""
    later = [path.name for path in (run / "checkpoints").iterdir() if int(path.name.removeprefix("step-")) > step]
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("adapter", "model", *later))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:step]))
    return copy
