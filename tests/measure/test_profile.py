import json
import math
import tomllib
from fractions import Fraction

import numpy as np
import preloaded
import pytest
import sharded_jobs
import torch
from texts import sentences

import flipproof
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.data.samples import BEGINS, HAS_LOSS, About
from flipproof.data.sequences import PackedText, load_held_out
from flipproof.errors import ConfigError
from flipproof.measure.profile import (
    Histogram,
    Tally,
    count_magnitudes,
    profile,
    profile_table,
    proposed_threshold,
    proposed_toml,
    warnings_of,
)
from flipproof.models.load import byte_tokenizer
from flipproof.records import unsealed

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARES = {"p50": "0.5", "p99": "0.99", "p99.9": "0.999", "p99.99": "0.9999"}


def spread(dtype, n=30_011):
    """Finite values of both signs over most of the dtype's range, with zeros and subnormals."""
    generator = torch.Generator().manual_seed(0)
    largest = 12 if dtype == torch.float16 else 30  # in powers of two
    exponents = torch.empty(n).uniform_(-2 * largest, largest, generator=generator)
    values = torch.randn(n, generator=generator).sign() * exponents.exp2()
    values[::17] = 0.0
    values[::1001] = torch.finfo(dtype).smallest_normal / 4
    return values.to(dtype)


def nearest_ranks(values):
    """Quantiles of |values| by sorting all of them."""
    ordered = values.abs().double().sort().values.tolist()
    return {name: ordered[math.ceil(Fraction(share) * len(ordered)) - 1] for name, share in SHARES.items()}


def tally(values, zero_out_t=None):
    found = Tally(values.dtype, CPU, zero_out_t)
    found.add(values)
    return found.histogram().summary()


def assert_quantiles(found, exact, dtype):
    """Equal where a bin is one value; in float32 the bin's largest value, 2^-7 of a power of two above at most."""
    for name, value in exact.items():
        if dtype == torch.float32 and value > 0:
            width = math.ldexp(1.0, math.frexp(value)[1] - 1 - 7)
            assert value <= found[name] < value + width, name
        else:
            assert found[name] == value, name


# -- one tensor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantiles_maximum_and_counts_are_those_of_sorting_everything(dtype):
    values = spread(dtype)
    found = tally(values)
    assert_quantiles(found.quantiles, nearest_ranks(values), dtype)
    assert found.maximum == float(values.abs().max())
    assert (found.count, found.zeros) == (len(values), int((values == 0).sum()))
    exponents, counts = np.unique(np.frexp(values[values != 0].abs().double().numpy())[1] - 1, return_counts=True)
    expected = list(zip(exponents.tolist(), counts.tolist(), strict=True))
    assert list(found.histogram) == expected
    assert tally(values.view(-1, 1).expand(-1, 2).mT).quantiles == found.quantiles  # of any shape and strides


def test_a_float32_quantile_is_no_more_than_the_maximum():
    found = tally(torch.tensor([1.0, 3.001]))
    assert found.quantiles["p99"] == found.maximum == float(torch.tensor(3.001))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_counted_apart(dtype):
    bad = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, math.inf], dtype=dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    smallest_nan = (torch.tensor([math.inf], dtype=dtype).view(integer) + 1).view(dtype)  # in infinity's bin
    values = torch.cat([spread(dtype), bad, smallest_nan])
    found, clean = tally(values, 4.0), tally(spread(dtype), 4.0)
    assert (found.nan, found.infinite) == (3, 3)
    assert found.clipped == clean.clipped + 6
    for key in ("count", "zeros", "quantiles", "maximum", "histogram"):
        assert getattr(found, key) == getattr(clean, key)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_out_t", [0.0, 1e-3, 1.0, 1.003, 2.0, 1000.1, math.inf])
def test_clipped_is_what_the_guard_zeroes(dtype, zero_out_t):
    """1.003 lies within a bin of float32; half of the values here lie in that bin."""
    within = torch.linspace(1.0, 1.0078, 1000).to(dtype)
    values = torch.cat([spread(dtype, 1000), within, torch.tensor([math.inf, math.nan], dtype=dtype)])
    values = values[values != 0]
    kept = flipproof.flip(values, zero_out_t=zero_out_t, seed=0, site="any", tick=0) != 0
    found = tally(values, zero_out_t)
    assert found.clipped == int((~kept).sum())
    assert found.clipped == sum(not abs(v) < zero_out_t for v in values.double().tolist())
    assert found.zero_out_t == zero_out_t


def test_nothing_counted_has_no_quantiles():
    found = tally(torch.empty(0))
    assert (found.count, found.histogram, found.proposed_t) == (0, (), None)
    assert math.isnan(found.maximum)
    assert all(map(math.isnan, found.quantiles.values()))
    assert tally(torch.zeros(3)).proposed_t is None
    assert tally(torch.full((3,), math.nan)).nan == 3


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), DTYPES])
def test_layers_together_are_all_their_values(dtypes):
    parts = [spread(dtype, 501 + i) for i, dtype in enumerate(dtypes)]
    histograms = []
    for i, part in enumerate(parts):
        counted = Tally(part.dtype, CPU, None if i else 2.0)
        counted.add(part)
        histograms.append(counted.histogram())
    found = Histogram.pooled(histograms).summary()
    everything = torch.cat([part.double() for part in parts])
    coarsest = torch.float32 if torch.float32 in dtypes else torch.bfloat16
    assert_quantiles(found.quantiles, nearest_ranks(everything), coarsest)
    assert found.maximum == float(everything.abs().max())
    assert (found.count, found.zeros) == (len(everything), int((everything == 0).sum()))
    assert found.clipped == int((parts[0].abs() >= 2).sum())
    assert found.zero_out_t is None  # not the same for all


def test_ranks_are_integers_whatever_the_count():
    """99.99% of 3·10^18 values: a float would be off by some."""
    n = 3 * 10**18
    rank = n * 9999 // 10000
    for at, value in ((rank, 1.0), (rank - 1, 2.0)):
        found = Histogram(np.array([1.0, 2.0]), np.array([at, n - at]), 0, 0, 2.0, frozenset([None]), None)
        assert found.quantile(9999, 10000) == value


@pytest.mark.parametrize(
    ("maximum", "threshold"),
    [(126.5, 256.0), (3680.0, 8192.0), (4.0, 8.0), (4.001, 16.0), (0.07, 0.25), (0.0, None), (math.nan, None)],
)
def test_proposed_thresholds(maximum, threshold):
    """The first two are the 70B tutorial's."""
    assert proposed_threshold(maximum) == threshold


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text():
    rng = np.random.default_rng(0)
    return PackedText(rng.integers(0, 256, (7, 24), dtype=np.int32), "random bytes")


def inputs_of(model, text, chosen):
    """Every nn.Linear's input by name, of a pass over ``chosen`` sequences one by one."""
    seen = {}

    def keep(name):
        return lambda _layer, args: seen.setdefault(name, []).append(args[0].flatten())

    hooks = [m.register_forward_pre_hook(keep(n)) for n, m in model.named_modules() if type(m) is torch.nn.Linear]
    with torch.no_grad():
        for i in chosen:
            model(input_ids=text.batch(np.array([i])).ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if name != "lm_head"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_profiled_clean_and_left_as_it_was(tiny_llama, text, dtype):
    model = tiny_llama().to(dtype).train()
    expected = inputs_of(model, text, [0, 2, 4])
    weights = {name: module.weight.detach().clone() for name, module in model.named_modules() if name in expected}
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.1, w_zero_out_t=0.01, x_p_exp=0.1, x_zero_out_t=0.1))
    spec = BitFlipSpec(
        w_zero_out_t=0.05, x_zero_out_t=2.0, layer_name_to_config={r".*\.0\.mlp.*": {"w_zero_out_t": 0.03}}
    )
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    layers, total, tokens = count_magnitudes(model, text, 3, 1, spec=spec)
    assert model.training
    assert hooks == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    assert tokens == 3 * 24
    assert list(layers) == list(expected)
    for name, found in layers.items():
        for one, values, t in (
            (found.weights, weights[name].flatten(), 0.03 if ".0.mlp" in name else 0.05),
            (found.inputs, expected[name], 2.0),
        ):
            assert_quantiles(one.quantiles, nearest_ranks(values), dtype)
            assert (one.count, one.maximum) == (len(values), float(values.abs().max()))
            assert (one.clipped, one.zero_out_t) == (int((values.double().abs() >= t).sum()), t)
    everything = torch.cat([*expected.values()])
    assert_quantiles(total.inputs.quantiles, nearest_ranks(everything), dtype)
    assert total.inputs.maximum == float(everything.abs().max())
    assert total.weights.clipped == sum(layer.weights.clipped for layer in layers.values()) > 0
    assert (total.weights.zero_out_t, total.inputs.zero_out_t) == (None, 2.0)


def test_what_is_made_of_padding_is_not_counted(tiny_llama, text):
    """Three rows of 24 tokens, of which the last 7, none and 15 are padding, against each row alone without it."""
    rows, marks = text.sequences[:3].copy(), np.zeros((3, 24), dtype=np.uint8)
    marks[:, 0] |= BEGINS
    for row, mark, size in zip(rows, marks, (17, 24, 9), strict=True):
        mark[size - 1] |= HAS_LOSS
        row[size:] = 0
    model = tiny_llama()
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.1, x_p_exp=0.1))
    padded = PackedText(rows, "padded", marks, About("alpaca", packing=False))
    layers, total, tokens = count_magnitudes(model, padded, 3, 2)
    assert tokens == 17 + 24 + 9
    alone = [
        count_magnitudes(model, PackedText(rows[i : i + 1, :size], "alone"), 1, 1)[0]
        for i, size in enumerate((17, 24, 9))
    ]
    for name, found in layers.items():
        inputs = [one[name].inputs for one in alone]
        assert found.inputs.count == sum(one.count for one in inputs) == tokens * model.get_submodule(name).in_features
        assert found.inputs.maximum == max(one.maximum for one in inputs)
    assert total.inputs.maximum == max(found.inputs.maximum for found in layers.values())


def test_hooks_are_gone_after_a_pass_that_fails(tiny_llama, text):
    model = tiny_llama()
    flipproof.inject(model, BitFlipSpec(w_p_exp=0.1))
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    bad = PackedText(text.sequences + 1000, "no tokens of this model")
    with pytest.raises(IndexError):
        count_magnitudes(model, bad, 3, 1)
    assert hooks == {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}


# -- the verb ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_dir(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings(model_dir, training=None, **bitflip):
    return load_config(
        [],
        {
            "model": {"hf_model_path": str(model_dir)},
            "training": {"seq_len": 32, "local_batch_size": 4} | (training or {}),
            "data": {"source": "stdlib", "max_tokens": 20_000},
            "eval": {"num_samples": 6},
            "bitflip": bitflip,
        },
    )


def test_profile_writes_what_it_returns_and_never_over_one(model_dir, tmp_path):
    config = settings(model_dir, w_p_exp=0.1)
    found = profile(config, to=tmp_path / "one")
    profile(config, to=tmp_path / "two")
    one = (tmp_path / "one" / "profile.json").read_text()
    assert one == (tmp_path / "two" / "profile.json").read_text()
    written = unsealed(one)
    assert list(written) == ["model", "dtype", "text", "tokens", "all", "layers"]
    assert (written["dtype"], written["tokens"]) == ("float32", 6 * 32)
    assert len(written["layers"]) == 14
    assert written["all"]["weights"]["maximum"] == found.all.weights.maximum
    assert written["all"]["inputs"]["clipped"] is None
    assert sum(n for _, n in written["all"]["inputs"]["histogram"]) + found.all.inputs.zeros == found.all.inputs.count
    with pytest.raises(ConfigError, match=r"profile.json exists already"):
        profile(config, to=tmp_path / "one")
    with pytest.raises(ConfigError, match="is not a directory"):
        profile(config, to=tmp_path / "one" / "profile.json")


def test_proposed_thresholds_clip_nothing_and_lower_ones_are_told(model_dir):
    found = profile(settings(model_dir))
    assert warnings_of(found) == []
    proposed = tomllib.loads(proposed_toml(found))["bitflip"]
    assert proposed["w_zero_out_t"] == found.all.weights.proposed_t == proposed_threshold(found.all.weights.maximum)
    assert proposed["x_zero_out_t"] == found.all.inputs.proposed_t == proposed_threshold(found.all.inputs.maximum)
    found = profile(settings(model_dir, **proposed))
    assert (found.all.weights.clipped, found.all.inputs.clipped) == (0, 0)
    assert warnings_of(found) == []
    worst = max(found.layers, key=lambda name: found.layers[name].weights.maximum)
    t = found.layers[worst].weights.maximum
    (line,) = warnings_of(profile(settings(model_dir, w_zero_out_t=t)))
    assert line.startswith(f"bitflip.w_zero_out_t = {t:g} clips 1 of {found.all.weights.count:,} clean weights (")
    assert line.endswith(f": {worst} (1)")


def test_patterns_choose_the_layers(model_dir):
    config = settings(
        model_dir,
        include_patterns=["mlp"],
        skip_patterns=["up_proj"],
        layer_name_to_config={r".*\.1\..*": False, r".*gate_proj": {"w_p_exp": 0.5}},
    )
    assert list(profile(config).layers) == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
    with pytest.raises(ConfigError, match=r"no layer matched include_patterns = \['q_prj'\]"):
        profile(settings(model_dir, include_patterns=["q_prj"]))


def test_values_are_counted_in_the_dtype_that_is_computed_with(model_dir, tiny_llama):
    config = settings(model_dir, {"mixed_precision_param": "bfloat16", "local_batch_size": 1})
    found = profile(config)
    assert found.dtype == "bfloat16"
    name = "model.layers.1.mlp.down_proj"
    weight = tiny_llama().get_submodule(name).weight.detach().bfloat16()
    assert_quantiles(found.layers[name].weights.quantiles, nearest_ranks(weight.flatten()), torch.bfloat16)
    text = load_held_out(config.data, byte_tokenizer(), 32)
    model = tiny_llama()
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, states: states.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        inputs = inputs_of(model, text, np.arange(6) * len(text) // 6)[name].bfloat16()
    assert_quantiles(found.layers[name].inputs.quantiles, nearest_ranks(inputs), torch.bfloat16)


def test_the_command_line(model_dir, tmp_path, capsys):
    small = ["--data.source", "stdlib", "--data.max_tokens", "20000", "--training.seq_len", "32", "--num-samples", "6"]
    argv = ["profile", str(model_dir), *small, "--training.local_batch_size", "4", "--to", str(tmp_path / "out")]
    assert main(argv) == 0
    found = profile(settings(model_dir))
    out = capsys.readouterr().out
    assert out == f"{profile_table(found)}\n\n{proposed_toml(found)}\n"
    rows = {
        words[0]: list(map(float, words[-5:])) for line in out.splitlines() if "(" in line and (words := line.split())
    }
    for row, one in (("Activations", found.all.inputs), ("Weights", found.all.weights)):
        assert rows[row] == pytest.approx([*one.quantiles.values(), one.maximum], rel=5e-4)  # of 4 digits
    assert (tmp_path / "out" / "profile.json").exists()
    for flags, problem in (
        (argv[2:], "profile.json exists already; name another directory"),
        ([*small, "--trials", "2"], "--trials: unknown flag"),
        ([*small, "--num-samples", "none"], "eval.num_samples = 'none'"),
        ([*small, "--bitflip.x_zero_out_t", "-1"], "x_zero_out_t = '-1'"),
    ):
        assert main(["profile", str(model_dir), *flags]) == 2
        out, err = capsys.readouterr()
        (line,) = [line for line in err.splitlines() if "error:" in line]
        assert line.startswith("flipproof profile: error: ")
        assert problem in line
        assert not out


# -- many processes ----------------------------------------------------------------------------------------------------

STRATEGIES = {
    "full_shard": (),
    "shard_grad_op": ("--parallelism.sharding_strategy", "shard_grad_op", "--parallelism.cpu_offload", "true"),
    "no_shard": ("--parallelism.sharding_strategy", "no_shard"),
    "hybrid_shard": ("--parallelism.sharding_strategy", "hybrid_shard", "--parallelism.fsdp_degree", "2"),
}


def test_four_processes_count_what_one_does(tiny_llama, tmp_path):
    """To the last integer. 66 rows do not divide by four, and 5 sequences in batches of 2 leave one process a batch of
    one and another none.
    """
    tiny_llama(intermediate_size=66).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sentences())
    argv = ["profile", str(tmp_path / "model"), "--data.source", str(tmp_path / "text.txt"), "--num-samples", "5"]
    argv += ["--training.seq_len", "32", "--training.local_batch_size", "2", "--bitflip.w_zero_out_t", "0.04"]
    argv += ["--bitflip.x_zero_out_t", "1.5", "--parallelism.timeout_minutes", "1.0"]
    argvs = {name: [*argv, *more, "--to", f"{tmp_path}/{name}"] for name, more in STRATEGIES.items()}
    assert preloaded.run_ranks(4, sharded_jobs.work, sharded_jobs.write_jobs(tmp_path / "jobs", argvs)) == [0] * 4
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*argv, "--to", f"{tmp_path}/alone"]) == 0
    finally:
        torch.set_num_threads(threads)
    expected = (tmp_path / "alone" / "profile.json").read_text()
    assert json.loads(expected)["all"]["weights"]["clipped"] > 0
    for name in STRATEGIES:
        assert (tmp_path / name / "profile.json").read_text() == expected, name


def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for to in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(["profile", "no/model", "--to", str(to)]) == 2
        assert f"{tmp_path / 'file'} is not a directory" in capsys.readouterr().err
