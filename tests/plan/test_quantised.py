"""Plans of QLoRA against models that are really built, against a count of what is allocated, and by hand."""

import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flipproof
from flipproof import BitFlipSpec
from flipproof.cli.main import main
from flipproof.config import load_config
from flipproof.errors import ConfigError
from flipproof.formats.config import quantization_config
from flipproof.formats.linear import QuantisedLinear
from flipproof.formats.operands import bits_per_weight, operands_of
from flipproof.formats.spec import FORMATS, format_of
from flipproof.formats.stored import Stored
from flipproof.models.build import build_model
from flipproof.models.load import byte_tokenizer
from flipproof.plan.dry_run import _Allocated, dry_run
from flipproof.plan.estimate import Request, make_plan, sized
from flipproof.plan.memory import Spread, in_all, memory
from flipproof.plan.quantised import made_with, moved
from flipproof.plan.recommend import recommend
from flipproof.world import World

FAULTS = {"w_code_p": 1e-4, "w_zero_out_t": 1.0, "x_p_frac": 1e-5, "x_zero_out_t": 8192.0}


def qlora(model, name="nf4", rows=2, kept="full", faults=False, seq_len=2048, **training):
    training = {"seq_len": seq_len, "local_batch_size": rows, "activation_checkpointing": kept, "steps": 10, **training}
    bitflip = FAULTS if faults else {}
    tree = {"model": {**model, "quantize": name}, "training": training, "lora": {"r": 32}, "bitflip": bitflip}
    return load_config([], tree)


def of_flavor(flavor, *args, **kwargs):
    return qlora({"flavor": flavor, "hf_model_path": "someone/model"}, *args, **kwargs)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_take_the_bytes_that_those_of_a_model_take_that_is_built(tiny_llama, tmp_path, name, tied):
    tiny_llama(hidden_size=128, intermediate_size=384, tie_word_embeddings=tied).bfloat16().save_pretrained(tmp_path)
    config = qlora({"hf_model_path": str(tmp_path)}, name, seq_len=16)
    model = build_model(config, byte_tokenizer(), World(0, 1, torch.device("cpu")), config.lora)
    weights = {id(p): p.nbytes for key, p in model.named_parameters() if "lora_" not in key}
    stored = sum(b.nbytes for key, b in model.named_buffers() if "rotary" not in key and "proj" in key
                 and key.rpartition(".")[2] in operands_of(format_of(name), (128, 128)))  # fmt: skip
    shape, planned = sized(config, 1)
    parts = memory(shape, planned, Spread(1, 1), in_all(shape, "nothing")).parts
    assert stored > 0
    assert parts["weights"] == sum(weights.values()) + stored
    assert parts["adapters"] == sum(p.nbytes for key, p in model.named_parameters() if "lora_" in key)


def test_eight_billion_weights_in_nf4_by_hand():
    """A code of half a byte, a scale of one for 64, 4 bytes for 256 of these, 257 float32 a layer; embedding, head and
    norms are bfloat16."""
    a_block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    held = 32 * (a_block * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 7 * 257 * 4)
    others = 2 * (2 * 128256 * 4096 + (2 * 32 + 1) * 4096)
    plan = make_plan(of_flavor("8B"), Request(1))
    assert plan.memory.parts["weights"] == held + others
    assert (held + others) / 2**30 == pytest.approx(5.31, abs=0.01)
    assert plan.shape.parameters == 32 * a_block + others / 2


def test_seventy_billion_weights_in_nf4_fit_one_gpu():
    plan = make_plan(of_flavor("70B"), Request(1, gpu="h200"))
    assert plan.fits


def test_each_of_several_gpus_has_what_one_has_and_they_average_the_gradients_of_adapters():
    config = of_flavor("8B")
    whole = replace(config, parallelism=replace(config.parallelism, sharding_strategy="no_shard"))
    one, four = make_plan(config, Request(1)), make_plan(whole, Request(4))
    assert four.memory == one.memory
    assert four.pace.reduced_bytes == 2 * 3 / 4 * 4 * four.shape.adapters * 32
    assert four.pace.gathered_bytes == 0
    assert four.pace.seconds == pytest.approx(one.pace.seconds + four.pace.reduced_bytes / (450e9 * 0.75))
    assert dry_run(four.config, four.spread, four.kept) == dry_run(one.config, one.spread, one.kept)


def test_gpus_of_a_node_share_codes_and_scales():
    """Half a byte and a place of one for 64, by hand; float32 numbers that scales are made with are whole on each."""
    config = of_flavor("8B")
    one, four = make_plan(config, Request(1)), make_plan(config, Request(4))
    a_block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    rows, edges = a_block * (1 / 2 + 1 / 64), 2 * 128256 * 4096
    assert four.shape.stored_rows == rows
    assert one.memory.parts["weights"] - four.memory.parts["weights"] == 3 / 4 * (32 * rows + 2 * edges)
    assert four.memory.parts["gathered"] == 2 * rows + edges
    assert four.pace.gathered_bytes == 3 / 4 * ((2 * 32 - 2) * rows + 2 * edges + 4 * four.shape.adapters * 32)
    found = dry_run(four.config, four.spread, four.kept)
    assert four.memory.allocated == pytest.approx(found, rel=0.05)
    ways = {(o.config.parallelism.sharding_strategy, o.plan.spread.shards) for o in recommend(config, Request(4))}
    assert ways == {("full_shard", 4), ("hybrid_shard", 2), ("no_shard", 1)}
    assert not any(o.config.parallelism.cpu_offload for o in recommend(config, Request(4)))


def test_what_does_not_fit_one_gpu_may_fit_several():
    with pytest.raises(ConfigError, match="full_shard over 2 of them would do"):
        make_plan(of_flavor("70B"), Request(1, gpu="a100-40"))
    assert make_plan(of_flavor("70B"), Request(2, gpu="a100-40")).fits


def dequantised(name, computed, flips):
    """A layer that is so large that scales are little beside it, and what makes its weight."""
    format, shape = format_of(name), (1024, 1024)
    operands = {key: torch.zeros(part.shape, dtype=part.dtype) for key, part in operands_of(format, shape).items()}
    model = torch.nn.Sequential(QuantisedLinear(Stored(format, operands, torch.bfloat16), dtype=computed))
    flipproof.inject(model, BitFlipSpec(w_code_p=1e-4 if flips else 0.0, w_zero_out_t=1.0))
    return lambda: model[0]._weight_of_pass(torch.zeros(1, 1024, dtype=computed), computed, 0)()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flips", [False, True])
def test_dequantising_holds_what_is_counted(name, computed, flips):
    """Of its operators, beside what is stored."""
    seen = _Allocated()
    seen.fuses = False
    with FakeTensorMode():
        make = dequantised(name, computed, flips)
        with seen:
            make()
    stored = bits_per_weight(format_of(name), (1024, 1024)) / 8
    expected = made_with(format_of(name), computed.itemsize, flips) + stored
    assert seen.most == pytest.approx(expected * 1024**2, rel=0.1)


class _Moved(TorchDispatchMode):
    """Bytes of tensors that operators read and write, but for those that only look at them otherwise, and for flips in
    place, which cost their number."""

    moved = 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if not func.is_view and func is not torch.ops.flipproof.flip_.default:
            self.moved += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf))
        return result


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("flips", [False, True])
def test_dequantising_moves_what_is_counted(name, computed, flips):
    """From packed codes."""
    make = dequantised(name, computed, flips)
    with _Moved() as seen:
        make()
    assert moved(format_of(name), computed.itemsize, flips) * 1024**2 == pytest.approx(seen.moved, rel=0.1)


@pytest.mark.parametrize(
    ("name", "rows", "kept", "faults"),
    [("nf4", 2, "full", True), ("nf4", 2, "none", False), ("nf4", 1, "selective", True), ("int8", 1, "full", False)],
)
def test_a_dry_run_finds_what_the_closed_form_finds(name, rows, kept, faults):
    plan = make_plan(of_flavor("8B", name, rows, kept, faults), Request(1, gpu="h200"))
    assert plan.memory.allocated == pytest.approx(dry_run(plan.config, plan.spread, plan.kept), rel=0.05)


def test_a_step_takes_longer_by_what_is_dequantised():
    """Codes of 8 bits are twice as many bytes; those that flip do so in a copy."""
    times = {name: make_plan(of_flavor("8B", name), Request(1)).pace for name in ("int4", "int8")}
    assert times["int8"].flips > times["int4"].flips > 0
    faulty = make_plan(of_flavor("8B", "nf4", faults=True), Request(1)).pace
    clean = make_plan(of_flavor("8B", "nf4"), Request(1)).pace
    assert faulty.flips > clean.flips
    assert len({pace.products for pace in times.values()}) == 1


def test_what_cannot_be_is_one_line(tiny_llama, tmp_path, capsys):
    tiny_llama(hidden_size=128).save_pretrained(tmp_path)
    capsys.readouterr()  # its progress bar

    def refused(*more, rank="2"):
        assert main(["plan", str(tmp_path), "--training.seq_len", "16", "--lora.r", rank, *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    one = ("--model.quantize", "nf4", "--gpus", "1")
    assert "'nf5'" in refused("--model.quantize", "nf5", "--gpus", "1")
    inputs = refused(*one, "--model.quantize_inputs", "int8")
    assert "model.quantize_inputs = 'int8': flipproof plan does not count what that takes; leave it out" in inputs
    alone = refused("--model.quantize_inputs", "int8", "--gpus", "1")
    assert "model.quantize_inputs = 'int8': the weights are plain" in alone
    several = ("--model.quantize", "nf4", "--gpus", "2", "--nodes", "2", "--training.seq_len", "16")
    assert "parallelism.sharding_strategy = 'full_shard' over 4 processes, 2 on a node: the weights are nf4" in refused(
        *several
    )
    offloaded = refused(*several[:4], "--parallelism.cpu_offload", "true")
    assert (
        "'full_shard', parallelism.cpu_offload = true over 2 processes, 2 on a node: the weights are nf4" in offloaded
    )
    assert "over 7 GPUs, by which its rows do not divide: the weights are nf4" in refused(*several[:3], "7")
    assert "lora.r = 0: the weights are nf4, which do not train" in refused(*one, rank="0")
    assert "layers with quantised weights are not compiled" in refused(*one, "--training.compile", "true")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization_config(format_of("nf4"), ["lm_head"], "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is quantised already (bitsandbytes); flipproof plan counts what model.quantize makes" in refused(
        "--gpus", "1"
    )
