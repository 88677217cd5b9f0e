"""Adapters beside quantised weights trained in several processes, which have the whole model each, or share its rows.

Against one process: bit for bit what a process computes of its own rows, and what is averaged; as near as other orders
of sums take it (``sharded_runs.py``) what whole runs become.
"""

import json
from itertools import permutations

import preloaded
import pytest
import quantised_bits
import torch
from quantised_models import checkpoint
from rounding import training_moved
from safetensors.torch import load_file
from sharded_runs import (
    CONFIG,
    MOVED,
    alone,
    arguments,
    arms,
    assert_same_run,
    curve,
    distance_of_arms,
    room,
    run_jobs,
    save_llama,
    stderr,
    stopped_after,
    weights,
)
from texts import sentences
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from flipproof.faults.fitted import read_guards

NO_SHARD = ("--parallelism.sharding_strategy", "no_shard")
MEASURED_LITTLE = ("--eval.trials", "1", "--training.save_freq", "0")
OF_PLAIN = ("--bitflip.w_p_exp", "None", "--bitflip.w_p_frac", "None")
FLIPS = {"w_code_p": 0.003, "w_scale_p_exp": 0.001}
KINDS = {
    "nf4": ({"quantize": "nf4"}, {**FLIPS, "w_global_p": 1e-4}),
    "int4-asym": ({"quantize": "int4-asym-g32"}, {**FLIPS, "w_zero_p": 0.001}),
    "nvfp4": ({"quantize": "nvfp4"}, {**FLIPS, "w_global_p": 1e-4}),
    "inputs": ({"quantize": "int8", "quantize_inputs": "int8"}, {**FLIPS, "x_code_p": 0.001, "x_scale_p_frac": 0.01}),
    "compressed-tensors": ({"hf_model_path": "{home}/compressed-tensors"}, {**FLIPS, "w_zero_p": 0.001}),
    "bitsandbytes": ({"hf_model_path": "{home}/bitsandbytes"}, {**FLIPS, "w_global_p": 1e-4}),
}
"""Keys of [model] and of [bitflip]."""
MORE = {
    "nf4": {"activation_checkpointing": "full"},
    "int4-asym": {"activation_checkpointing": "selective"},
    "nvfp4": {"mixed_precision_param": "bfloat16"},
}
"""Keys of [training]."""
SHARED = {"full_shard": {}, "ahead": {"forward_prefetch": 2, "backward_prefetch": 3}, "no_shard": {}}
"""Ways to lie in several processes; keys of [parallelism]."""
TRAINED = ("nf4", "nvfp4", "compressed-tensors", "bitsandbytes")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("quantised")
    save_llama(home / "odd", hidden_size=96, intermediate_size=97)
    save_llama(home / "base", hidden_size=96, intermediate_size=192)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    checkpoint(base, home / "compressed-tensors", "compressed-tensors", "int4-asym", 32)
    checkpoint(base, home / "bitsandbytes", "bitsandbytes", "nf4")
    (home / "text.txt").write_text(sentences())
    (home / "run.toml").write_text(CONFIG.format(home=home))
    return home


def keys(home, kind):
    """(of [model], of [bitflip])."""
    model, flips = KINDS[kind]
    return {key: value.format(home=home) for key, value in model.items()}, flips


def training(home, kind, run, rows, *more):
    model, flips = keys(home, kind)
    said = [f"--model.{key}={value}" for key, value in model.items()]
    said += [f"--bitflip.{key}={value}" for key, value in flips.items() if not key.startswith("x_")]
    return arguments(home, run, rows, *OF_PLAIN, *said, "--model.tokenizer", f"{home}/base", *NO_SHARD, *more)


# -- bit for bit -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def bits(home, request):
    """(processes, where each left what it saw, and where one left the same)."""
    directory, ways = home / f"bits{request.param}", {}
    for kind in KINDS:
        model, flips = keys(home, kind)
        size = {"seq_len": quantised_bits.SEQ_LEN, "local_batch_size": quantised_bits.ROWS}
        ways[kind] = {
            "model": {"hf_model_path": f"{home}/base", **model, "tokenizer": f"{home}/base"},
            "training": size | MORE.get(kind, {}),
            "lora": {"r": 2, "lora_alpha": 4},
            "bitflip": {**flips, "w_zero_out_t": 1.0, "x_zero_out_t": 64.0},
        }
    several = {
        f"{kind}-{way}": {**tree, "parallelism": {"sharding_strategy": way.replace("ahead", "full_shard"), **more}}
        for kind, tree in ways.items()
        for way, more in SHARED.items()
    }
    for size, trees in ((1, ways), (request.param, several)):
        (directory / str(size)).mkdir(parents=True)
        ended = preloaded.run_ranks(size, quantised_bits.work, directory / str(size), trees, range(request.param))
        assert ended == [0] * size
    return request.param, directory / str(request.param), directory / "1"


@pytest.mark.parametrize("way", SHARED)
@pytest.mark.parametrize("kind", KINDS)
def test_each_process_computes_the_bits_of_one_and_their_gradients_are_averaged(bits, kind, way):
    size, several, one = bits
    got = [torch.load(several / f"{kind}-{way}.{rank}.pt") for rank in range(size)]
    expected = [torch.load(one / f"{kind}.{rank}.pt") for rank in range(size)]
    layers, of_all = (torch.load(of / f"{name}.held.pt") for of, name in ((several, f"{kind}-{way}"), (one, kind)))
    assert layers.keys() == of_all.keys()
    for name, rows in of_all.items():
        shares = way != "no_shard" and name.endswith(
            (".code", ".scale", ".zero", "embed_tokens.weight", "lm_head.weight")
        )
        assert layers[name] == rows / (size if shares else 1), name
    for rank in range(size):
        for (loss, own, _, logits), (its_loss, its_own, _, its_logits) in zip(got[rank], expected[rank], strict=True):
            assert torch.equal(loss, its_loss)
            assert torch.equal(logits, its_logits)
            assert all(map(torch.equal, own, its_own))
    ticks = range(quantised_bits.TICKS)
    assert len({float(got[rank][tick][0]) for rank in range(size) for tick in ticks}) == size * len(ticks)
    for tick in ticks:
        of_ranks = zip(*(expected[rank][tick][1] for rank in range(size)), strict=True)
        for mean, parts in zip(got[0][tick][2], of_ranks, strict=True):
            sums = [sum(order[1:], start=order[0]) / size for order in permutations(parts)]
            assert torch.stack([mean == each for each in sums]).any(0).all()  # in whichever order an element was summed
        for rank in range(1, size):
            assert all(map(torch.equal, got[rank][tick][2], got[0][tick][2]))


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(home):
    for kind in TRAINED:
        alone(*training(home, kind, f"single/{kind}", 6))
        for seed in range(MOVED):
            with training_moved(seed):
                alone(*training(home, kind, f"single/{kind}.moved{seed}", 6, *MEASURED_LITTLE))
    return home / "single"


def evaluated(home, to, rows):
    argv = ["eval", f"{home}/single/nf4", "--to", f"{home}/eval/{to}", "--training.local_batch_size", str(rows)]
    return [*argv, *NO_SHARD]


def measured(home, to, rows):
    """Command lines of what else several processes do, by name."""
    model = [f"{home}/base", "--model.quantize", "nf4", "--training.seq_len", "32", *NO_SHARD]
    model += ["--data.source", f"{home}/text.txt", "--training.local_batch_size", str(rows)]
    flips = ["--bitflip.w_code_p", "0.003", "--bitflip.w_zero_out_t", "1"]
    sweep = ["--p", "1e-3", "--sites", "code", "--bitflip.w_zero_out_t", "1", "--seeds", "2", "--num-samples", "6"]
    return {
        "generate": ["generate", *model, *flips, "--prompt", "the cat", "--max-new-tokens", "5"],
        "profile": ["profile", *model, "--guards", "channel", "--num-samples", "132", "--to", f"{home}/{to}/guards"],
        "sweep": ["sweep", *model, *sweep, "--to", f"{home}/{to}/sweep"],
    }


def shared(home, kind, run, *more):
    """A training on two processes that share the weights."""
    return [part for part in training(home, kind, run, 3) if part not in NO_SHARD] + [*more]


REFUSED = {
    "grad_op": ("nf4", "sharding_strategy", "shard_grad_op"),
    "bitsandbytes_grad_op": ("bitsandbytes", "sharding_strategy", "shard_grad_op"),
    "kept": ("nf4", "keep_gathered", "true"),
    "offload": ("nf4", "cpu_offload", "true"),
}


@pytest.fixture(scope="module")
def pair(home, single):
    """Runs on two processes; what is measured and exported there; and what is refused."""
    jobs = {kind: training(home, kind, f"pair/{kind}", 3) for kind in TRAINED}
    jobs["eval"] = evaluated(home, "two", 3)
    jobs |= measured(home, "pair", 3)
    jobs["export"] = ["export", f"{home}/pair/nf4", "--to", f"{home}/pair/exported", "--format", "adapter"]
    jobs |= {f"shared_{kind}": shared(home, kind, f"pair/shared_{kind}") for kind in TRAINED}
    jobs["shared_eval"] = [part for part in evaluated(home, "shared", 3) if part not in NO_SHARD]
    jobs["shared_profile"] = [part for part in measured(home, "shared", 3)["profile"] if part not in NO_SHARD]
    jobs["shared_export"] = ["export", f"{home}/pair/shared_nf4", "--to", f"{home}/shared/exported", "--format=adapter"]
    behind = ("--bitflip.guards", f"{home}/shared/guards", "--bitflip.w_zero_out_t", "None")
    jobs["shared_guarded"] = shared(home, "nf4", "pair/guarded", *behind, "--bitflip.x_zero_out_t", "None")
    refused = {
        name: shared(home, kind, "pair/refused", f"--parallelism.{key}", value)
        for name, (kind, key, value) in REFUSED.items()
    }
    refused["dry"] = [*refused["grad_op"], "--dry-run"]
    refused["odd"] = shared(home, "nf4", "pair/refused", "--model.hf_model_path", f"{home}/odd")
    run_jobs(home / "pair.jobs", 2, jobs | refused, codes={name: [2, 2] for name in refused})
    return home / "pair"


@pytest.fixture(scope="module")
def three(home, pair):
    """A run on three processes, and one that goes on there from two."""
    stopped_after(2, pair / "nf4", home / "three" / "of_two")
    jobs = {
        "nf4": training(home, "nf4", "three/nf4", 2),
        "of_two": training(home, "nf4", "three/of_two", 2, "--resume"),
    }
    run_jobs(home / "three.jobs", 3, jobs)
    return home / "three"


def test_faults_count_in_the_reference_runs(single):
    for kind in TRAINED:
        measured = arms(single / kind)
        assert abs(measured["flipped"]["loss"] - measured["clean"]["loss"]) > 10 * room(single / kind)["loss of an arm"]


@pytest.mark.parametrize("kind", TRAINED)
def test_two_processes_train_as_one(single, pair, kind):
    assert_same_run(pair / kind, single / kind)


def test_three_processes_train_as_one(single, three):
    assert_same_run(three / "nf4", single / "nf4")


def test_a_run_goes_on_in_another_number_of_processes(home, single, three):
    assert_same_run(three / "of_two", single / "nf4")
    stopped_after(4, three / "of_two", home / "single/of_three")
    alone(*training(home, "nf4", "single/of_three", 6, "--resume"))
    assert_same_run(home / "single/of_three", single / "nf4")


def test_two_processes_measure_what_one_does(home, single, pair):
    alone(*evaluated(home, "one", 6))
    assert distance_of_arms(home / "eval/two", home / "eval/one") <= room(single / "nf4")["loss of an arm"]


def test_what_two_processes_generate_profile_and_sweep_is_what_one_does(home, single, pair, capsys):
    for argv in measured(home, "single", 6).values():
        alone(*argv)
        if argv[0] == "generate":
            assert (home / "pair.jobs/generate.0.out").read_text() == capsys.readouterr().out
    one, two = (read_guards(str(of / "guards")) for of in (single, pair))
    assert one.about["format"] == two.about["format"] == "nf4"
    assert one.maxima.keys() == two.maxima.keys()
    for name, maxima in one.maxima.items():
        atol = 0 if name.endswith(("/w", "/w_scale")) else room(single / "nf4")["loss of a step"] * float(maxima.max())
        torch.testing.assert_close(two.maxima[name], maxima, rtol=0, atol=atol)
    points = [sorted((of / "sweep/points").glob("*.json")) for of in (single, pair)]
    assert [file.name for file in points[0]] == [file.name for file in points[1]]
    assert len(points[0]) == 2  # of two seeds
    allowed = room(single / "nf4")["loss of an arm"]
    for one, two in zip(*points, strict=True):
        assert abs(json.loads(one.read_text())["loss"] - json.loads(two.read_text())["loss"]) <= allowed


def test_two_processes_export_the_adapter(pair):
    exported = weights(pair / "nf4")
    found = load_file(pair / "exported" / "adapter_model.safetensors")
    assert found.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", TRAINED)
def test_processes_that_share_codes_and_scales_train_to_the_bits_of_those_that_have_all(pair, kind):
    got, expected = weights(pair / f"shared_{kind}"), weights(pair / kind)
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    assert curve(pair / f"shared_{kind}") == curve(pair / kind)
    assert arms(pair / f"shared_{kind}") == arms(pair / kind)
    assert set(held(pair / f"shared_{kind}/checkpoints/step-6")) == set(held(pair / f"{kind}/checkpoints/step-6"))


def held(checkpoint):
    return FileSystemReader(checkpoint).read_metadata().state_dict_metadata


def test_what_is_measured_fitted_and_exported_where_rows_are_shared_is_the_same(home, pair):
    assert arms(home / "eval/shared") == arms(home / "eval/two")
    one, two = (read_guards(str(of / "guards")) for of in (home / "shared", pair))
    assert one.maxima.keys() == two.maxima.keys()
    assert all(torch.equal(maxima, two.maxima[name]) for name, maxima in one.maxima.items())
    exported = load_file(home / "shared/exported/adapter_model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in weights(pair / "shared_nf4").items())
    assert arms(pair / "guarded")["guard"]["loss"] == pytest.approx(arms(pair / "nf4")["clean"]["loss"], abs=0.02)


def test_a_run_whose_rows_were_shared_goes_on_in_one_process(home, single, pair):
    stopped_after(4, pair / "shared_nf4", home / "single/of_shared")
    alone(*training(home, "nf4", "single/of_shared", 6, "--resume"))
    assert_same_run(home / "single/of_shared", single / "nf4")


def test_other_ways_to_spread_weights_are_refused_before_they_are_read(home, pair):
    for name in (*REFUSED, "dry", "odd"):
        lines = stderr(home / "pair.jobs", name)
        assert "the weights are nf4, which full_shard and hybrid_shard share by whole rows within a node" in lines
        assert "no_shard, which gives all to each, is allowed" in lines
        assert "layers are quantised" not in lines
    assert "'shard_grad_op' over 2 processes, 2 on a node: " in stderr(home / "pair.jobs", "dry")
    assert "parallelism.cpu_offload = true over 2 processes" in stderr(home / "pair.jobs", "offload")
    assert "over 2 processes, by which its rows do not divide" in stderr(home / "pair.jobs", "odd")
