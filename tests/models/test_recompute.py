import inspect
import logging
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from rounding import assert_same_function
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._higher_order_ops import wrap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flipproof
from flipproof import BitFlipSpec, LoraSpec
from flipproof.config import RunConfig, TrainingConfig
from flipproof.models import recompute
from flipproof.models.loss import ask_teacher, next_token_loss
from flipproof.models.parallelize import blocks, parallelize
from flipproof.world import World

ALONE = World(0, 1, torch.device("cpu"))
FAULTS = BitFlipSpec(w_p_exp=1e-3, w_p_frac=0.005, w_zero_out_t=1.0, x_p_exp=1e-3, x_p_frac=0.005, x_zero_out_t=64.0)
BLOCKS = 4
MODES = ("none", "selective", "full", 2, 3, "weights")
"""Values of activation_checkpointing, and what auto may choose beside them."""


def build(make, mode, lora=True, faulty=True, compiled=False):
    model = make(num_hidden_layers=BLOCKS).train()
    if faulty:
        flipproof.inject(model, FAULTS, LoraSpec(r=2, lora_alpha=4) if lora else None)
        for layer in flipproof.faulty_layers(model).values():
            if lora:
                nn.init.normal_(layer.lora_B, std=0.02, generator=torch.Generator().manual_seed(3))
    training = TrainingConfig(activation_checkpointing="none" if mode == "weights" else mode, compile=compiled)
    parallelize(model, replace(RunConfig(), training=training), ALONE)
    if mode == "weights":
        for block in blocks(model):
            recompute.keep(block, "weights")
    return model


def loss_and_gradients(model, ids, distilled=False):
    loss = next_token_loss(model, ids, teacher=ask_teacher(model, ids, 0.5) if distilled else None)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other):
    assert one[1].keys() == other[1].keys()
    for name, value in {"loss": one[0], **one[1]}.items():
        assert torch.equal(value, {"loss": other[0], **other[1]}[name]), name


def assert_same_but_for_sums(got, model, ids):
    """As ``loss_and_gradients`` of a model that has done nothing yet: what is fused otherwise sums otherwise."""

    def again():
        model.zero_grad()
        flipproof.set_tick(model, 0)
        return loss_and_gradients(model, ids)

    assert_same_function(got, again, model.parameters())


def first_loss(model, ids):
    flipproof.set_tick(model, 0)
    return next_token_loss(model, ids)


def kept(model):
    return [block.keep for block in blocks(model)]


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("lora", [False, True])
def test_eager_recomputation_changes_no_bit(tiny_llama, token_ids, mode, lora):
    """Also in the second micro-batch, whose flips are others."""
    one, other = build(tiny_llama, "none", lora), build(tiny_llama, mode, lora)
    first = [loss_and_gradients(model, token_ids) for model in (one, other)]
    assert_same(*first)
    assert any(bool(grad.any()) for grad in first[0][1].values())
    losses = [next_token_loss(model, token_ids) for model in (one, other)]
    assert torch.equal(*losses)
    assert losses[0].item() != first[0][0].item()


def test_two_forward_passes_before_their_backward(tiny_llama, token_ids):
    """What runs again draws with the tick of its own pass, though another pass came after."""
    results = []
    for mode in ("none", "full"):
        model = build(tiny_llama, mode)
        one, two = (next_token_loss(model, token_ids) for _ in range(2))
        one.backward()
        gradient = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        two.backward()
        results.append(gradient + [p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_runs_again_is_not_what_the_teacher_ran(tiny_llama, token_ids):
    """Though the teacher of the next micro-batch is asked before backward."""
    one, other = build(tiny_llama, "none"), build(tiny_llama, "full")
    first = loss_and_gradients(one, token_ids, distilled=True)
    loss = next_token_loss(other, token_ids, teacher=ask_teacher(other, token_ids, 0.5))
    ask_teacher(other, token_ids.flip(0), 0.5)
    loss.backward()
    assert_same(first, (loss.detach(), {name: p.grad for name, p in other.named_parameters() if p.grad is not None}))


def test_every_nth_block_runs_again(tiny_llama):
    model = build(tiny_llama, "none")
    for mode, expected in {
        "none": ["everything"] * 4,
        "full": ["nothing"] * 4,
        "auto": ["nothing"] * 4,
        "selective": ["products"] * 4,
        1: ["nothing"] * 4,
        2: ["nothing", "everything"] * 2,
        3: ["nothing", "everything", "everything", "nothing"],
        9: ["nothing", "everything", "everything", "everything"],
    }.items():
        recompute.set_kept(blocks(model), mode)
        assert kept(model) == expected
        for block, keep in zip(blocks(model), expected, strict=True):
            layers = [module for module in block.modules() if isinstance(module, flipproof.FaultyLinear)]
            assert {layer.checkpointed for layer in layers} == {keep != "everything"}
    assert kept(build(tiny_llama, "auto")) == ["everything"] * 4  # on a CPU


def test_evaluation_recomputes_nothing_and_gives_the_same(tiny_llama, token_ids):
    model, plain = build(tiny_llama, "full"), build(tiny_llama, "none")
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, plain(token_ids).logits)


class _Watch(TorchDispatchMode):
    """Counts operators, and knows which storages that they made are still alive."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def products(self):
        return sum(n for op, n in self.counts.items() if op in recompute._PRODUCTS)

    def held(self):
        return sum(nbytes for reference, nbytes in self.storages.values() if not reference.expired())


def watched(model, ids):
    """(operators of forward, operators of backward, bytes held in between)."""
    with _Watch() as forward:
        loss = next_token_loss(model, ids)
    held = forward.held()
    with _Watch() as backward:
        loss.backward()
    return forward, backward, held


def test_each_mode_runs_again_what_it_says(tiny_llama, token_ids):
    """Products in backward beside those of the gradients: all of a block's, or none. Merged weights as well."""
    merge_grad = torch.ops.flipproof.merge_grad.default
    passes = {mode: watched(build(tiny_llama, mode), token_ids) for mode in MODES}
    of_gradients = passes["none"][1].products()
    # of the forward pass all but the head's
    of_blocks = passes["none"][0].products() - 1
    assert of_blocks == BLOCKS * (7 + 1)  # linear layers and attention
    for mode, blocks_again in {"weights": 0, "selective": 0, "full": 4, 2: 2, 3: 2}.items():
        forward, backward, _ = passes[mode]
        assert forward.products() == of_blocks + 1
        assert backward.products() - of_gradients == blocks_again * of_blocks // BLOCKS, mode
    layers = BLOCKS * 7
    assert {mode: backward.counts[merge_grad] for mode, (_, backward, _) in passes.items()} == {
        "none": layers,  # for backward alone
        "weights": 0,
        "selective": layers,
        "full": layers,
        2: layers,
        3: layers,
    }


def test_each_mode_holds_what_it_says(tiny_llama, token_ids):
    """Bytes between forward and backward of all tensors made since."""
    held = {mode: watched(build(tiny_llama, mode), token_ids)[2] for mode in MODES}
    assert held["full"] < held["selective"] < held["none"] < held["weights"]
    assert held["full"] < held[2] < held[3] + 1 <= held["none"]  # both have two blocks run again
    # nothing: of each block its input, 2 x 24 x 32 floats
    few, more = (watched(build(of_blocks(tiny_llama, n), "full"), token_ids)[2] for n in (1, 2))
    assert more - few == 2 * 24 * 32 * 4
    # products: beside that each linear layer's result but the last, attention's, and its logsumexp of each head
    few, more = (watched(build(of_blocks(tiny_llama, n), "selective"), token_ids)[2] for n in (1, 2))
    widths = 32 + 16 + 16 + 32 + 64 + 64 + 32 + 32 + 2
    assert more - few == 2 * 24 * (32 + widths) * 4
    # weights: the merged ones, and of each layer its own flipped input, each with a byte for whether the guard zeroed
    # it; but of inputs not the clean ones that nothing else keeps: of norms and of the last product
    model = build(tiny_llama, "none")
    weights = sum(layer.weight.numel() for layer in flipproof.faulty_layers(model).values())
    inputs = 2 * 24 * BLOCKS * (6 * 32 + 64)
    assert held["weights"] - held["none"] == (weights + inputs) * 5 - 2 * 24 * BLOCKS * (2 * 32 + 64) * 4


def of_blocks(make, n):
    return lambda num_hidden_layers: make(num_hidden_layers=n)


def fitted(costs, count, room):
    """(what each of ``count`` blocks keeps, what each trial had), where a step that keeps nothing peaks at 40 GiB."""
    layers, tried = [nn.Identity() for _ in range(count)], []

    def trial():
        tried.append(Counter(layer.keep for layer in layers))
        held = sum(costs[layer.keep] for layer in layers)
        return 5.0 + held, 40.0 + held

    recompute.fit(layers, trial, lambda: 40.0 + room)
    return [layer.keep for layer in layers], tried


COSTS = {"nothing": 0.0, "products": 0.5, "everything": 2.0, "weights": 2.25}


@pytest.mark.parametrize(
    ("room", "level", "fits", "before"),
    [
        (-3.0, "products", 0, "nothing"),
        (0.0, "products", 0, "nothing"),
        (0.49, "products", 0, "nothing"),
        (0.5, "products", 1, "nothing"),
        (7.9, "products", 15, "nothing"),
        (8.0, "products", 16, "nothing"),  # and nothing is left
        (11.9, "products", 16, "nothing"),  # too little is left for a trial of two: 4 x 2 x 0.5
        (12.0, "everything", 2, "products"),
        (31.9, "everything", 15, "products"),
        (32.0, "everything", 16, "products"),
        (43.9, "everything", 16, "products"),  # 4 x 2 x 1.5
        (44.0, "weights", 16, "everything"),
        (1000.0, "weights", 16, "everything"),
    ],
)
def test_fit_by_its_closed_form(room, level, fits, before):
    got, _ = fitted(COSTS, 16, room)
    assert got == [level] * fits + [before] * (16 - fits)


def test_fit_tries_two_blocks_at_each_level():
    assert fitted(COSTS, 16, 1000.0)[1] == [
        {"nothing": 16},
        {"products": 2, "nothing": 14},
        {"products": 16},
        {"everything": 2, "products": 14},
        {"everything": 16},
        {"weights": 2, "everything": 14},
    ]
    assert fitted(COSTS, 16, -1.0)[1] == [{"nothing": 16}]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_fit_never_holds_more_than_fits_and_never_less_for_more_room(count):
    """Any costs; where there are no adapters, weights cost nothing."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(30):
        steps = torch.rand(3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
        steps[2] *= steps[2] > 0.1
        costs = dict(zip(COSTS, [0.0, *steps.cumsum(0).tolist()], strict=True))
        before = 0.0
        for room in torch.linspace(0, 10 * count, 31).tolist():
            held = sum(costs[keep] for keep in fitted(costs, count, room)[0])
            assert before <= held <= room + 1e-6
            before = held


# -- compiled ----------------------------------------------------------------------------------------------------------


class Graphs(list):
    """A backend of torch.compile that partitions as inductor does and runs graphs as they are, and keeps them."""

    def __init__(self):
        self.backward = []
        self.compile = aot_autograd(
            fw_compiler=partial(self._keep, self),
            bw_compiler=partial(self._keep, self.backward),
            inference_compiler=partial(self._keep, []),
            partition_fn=min_cut_rematerialization_partition,
        )

    @staticmethod
    def _keep(where, graph, _inputs):
        calls = [(node.target, *node.args) for node in graph.graph.nodes if node.op == "call_function"]
        # an operator may be wrapped, as attention is for the state of the random numbers that it might draw
        where.append(Counter(next((a for a in call if isinstance(a, torch._ops.OpOverload)), None) for call in calls))
        return make_boxed_func(graph.forward)


@pytest.fixture
def graphs(monkeypatch):
    """Compilation without inductor's compiler: what is compiled is run node by node."""
    graphs, compile_ = Graphs(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **kwargs, backend=graphs.compile))
    recompute._recomputing.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield graphs
    recompute._recomputing.cache_clear()
    torch._dynamo.reset()


def products(counts):
    return sum(n for op, n in counts.items() if op in recompute._PRODUCTS)


@pytest.mark.parametrize(("mode", "lora"), [("full", False), (2, True)])
def test_compiled_recomputation_gives_the_same(tiny_llama, token_ids, graphs, mode, lora):
    model = build(tiny_llama, mode, lora, compiled=True)
    assert_same_but_for_sums(loss_and_gradients(model, token_ids), build(tiny_llama, "none", lora), token_ids)
    # all blocks share one graph, each kind of keeping has its own
    assert counters["stats"]["unique_graphs"] == len(graphs) == len(graphs.backward) == len(set(kept(model)))
    loss_and_gradients(model, token_ids)
    assert counters["stats"]["unique_graphs"] == len(graphs)


def test_compiled_each_mode_gives_the_same_and_runs_again_what_it_says(tiny_llama, token_ids, graphs):
    merge_grad = torch.ops.flipproof.merge_grad.default
    passes = {}
    for mode in ("none", "weights", "selective", "full"):
        model = build(tiny_llama, mode, compiled=True)
        assert_same_but_for_sums(loss_and_gradients(model, token_ids), build(tiny_llama, "none"), token_ids)
        passes[mode] = graphs[-1], graphs.backward[-1]
        assert counters["stats"]["unique_graphs"] == len(graphs) == len(graphs.backward) == len(passes)
    of_gradients = products(passes["none"][1])
    for mode, again in {"none": 0, "weights": 0, "selective": 0, "full": 7}.items():  # all but the last
        forward, backward = passes[mode]
        assert products(forward) == 8
        assert products(backward) - of_gradients == again, mode
    assert {mode: backward[merge_grad] for mode, (_, backward) in passes.items()} == {
        "none": 7,
        "weights": 0,
        "selective": 7,
        "full": 7,
    }


def test_an_evaluation_compiles_once_more(tiny_llama, token_ids, graphs):
    model = build(tiny_llama, "full", compiled=True)
    expected = build(tiny_llama, "none")
    with torch.no_grad():
        assert_same_function(
            next_token_loss(model, token_ids), lambda: first_loss(expected, token_ids), expected.parameters()
        )
    assert counters["stats"]["unique_graphs"] == 1
    loss_and_gradients(model, token_ids)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_teacher_compiles_once_more(tiny_llama, token_ids, graphs):
    model, eager = build(tiny_llama, "full", compiled=True), build(tiny_llama, "none")

    def expected():
        eager.zero_grad()
        flipproof.set_tick(eager, 0)
        return loss_and_gradients(eager, token_ids, distilled=True)

    assert_same_function(loss_and_gradients(model, token_ids, distilled=True), expected, eager.parameters())
    assert counters["stats"]["unique_graphs"] == 2
    loss_and_gradients(model, token_ids, distilled=True)
    assert counters["stats"]["unique_graphs"] == 2


@torch._inductor.config.patch("cpp.simdlen", 1)  # else it compiles vectors, to see which there are
def test_inductor_gives_the_same(tiny_llama, token_ids):
    torch._dynamo.reset()
    counters.clear()
    got = loss_and_gradients(build(tiny_llama, "full", compiled=True), token_ids)
    assert_same_but_for_sums(got, build(tiny_llama, "none"), token_ids)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


def test_torchs_line_about_contexts_is_not_shown_and_others_are():
    """It is still torch's line: else nothing would be left out."""
    recompute.prepare([], compiled=True)
    log = wrap.log
    (line,) = re.findall(r"Detected that context_fn is passed .*", inspect.getsource(wrap))
    assert not log.filter(log.makeRecord(log.name, logging.WARNING, "", 0, line, (), None))
    assert log.filter(log.makeRecord(log.name, logging.WARNING, "", 0, "another", (), None))
