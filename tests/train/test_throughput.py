import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from flipproof import BitFlipSpec, LoraSpec, inject
from flipproof.models.load import FLAVORS
from flipproof.models.loss import ask_teacher
from flipproof.train.throughput import (
    communication_share,
    difference_length,
    flops_per_token,
    peak_flops,
    peak_flops_by_name,
    union_length,
)

SEQ_LEN = 24
PAIRS = 2 * SEQ_LEN
"""The counter sees attention between all pairs of tokens, twice the causal ones: what a sequence twice as long has."""


def counted(model, token_ids):
    """What PyTorch's own counter sees in one forward and backward pass, per token."""
    model.set_attn_implementation("eager")  # two plain products, over all pairs of tokens
    with FlopCounterMode(display=False) as counter:
        model(token_ids, labels=token_ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / token_ids.numel()


@pytest.mark.parametrize("tied", [True, False])
def test_full_training_needs_what_pytorch_counts(tiny_llama, token_ids, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    assert counted(model, token_ids) == flops_per_token(model, PAIRS)


def test_other_names_of_layers_and_of_the_config_count_the_same(token_ids):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    assert counted(model, token_ids) == flops_per_token(model, PAIRS)


def test_a_frozen_weight_needs_no_gradient_of_its_own(tiny_llama, token_ids):
    model = tiny_llama()
    frozen = [layer for name, layer in model.named_modules() if name.endswith(("down_proj", "o_proj"))]
    for layer in frozen:
        layer.requires_grad_(False)
    expected = flops_per_token(model, PAIRS)
    assert counted(model, token_ids) == expected
    full = flops_per_token(tiny_llama(), PAIRS)
    assert full - expected == 2 * sum(layer.weight.numel() for layer in frozen)


def test_adapters_of_faulty_layers_need_what_pytorch_counts(tiny_llama, token_ids):
    model = tiny_llama()
    inject(model, BitFlipSpec(w_p_exp=2**-10, w_zero_out_t=8.0, x_p_frac=2**-10), LoraSpec(r=4, lora_alpha=4))
    first = model.model.layers[0].self_attn
    # the one thing that is counted and not needed: behind the frozen embedding nobody wants the input's gradient
    unneeded = 2 * sum(layer.weight.numel() for layer in (first.q_proj, first.k_proj, first.v_proj))
    expected = flops_per_token(model, PAIRS) - unneeded
    assert counted(model, token_ids) == expected


def test_a_teacher_needs_what_pytorch_counts(tiny_llama, token_ids):
    model = tiny_llama()
    inject(model, BitFlipSpec(w_p_exp=2**-10), LoraSpec(r=4))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        ask_teacher(model, token_ids, 0.5)
    expected = flops_per_token(model, PAIRS, distilled=True) - flops_per_token(model, PAIRS)
    assert counter.get_total_flops() == expected * token_ids.numel()


def test_a_token_passes_through_some_experts_only(token_ids):
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads, num_local_experts=4, num_experts_per_tok=2))
    weights = 258 * 32 + 4 * 32 * 32 + 4 * 32 + 2 * (3 * 48 * 32)  # head, q k v o, router, two experts
    assert flops_per_token(model, SEQ_LEN) == 6 * weights + 6 * SEQ_LEN * 32


def test_llama_3_70b_on_meta_needs_what_the_closed_form_says():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**FLAVORS["70B"]))
    weights = 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192) + 128256 * 8192
    # PaLM's 6N + 12·L·H·Q·T, with half of the pairs of tokens
    assert flops_per_token(model, 2048) == 6 * weights + 6 * 80 * 8192 * 2048
    inject(model, BitFlipSpec(), LoraSpec(r=32, lora_alpha=32))
    adapters = 80 * 32 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    assert flops_per_token(model, 2048) == 4 * weights + 4 * adapters + 6 * 80 * 8192 * 2048


def test_a_sharded_model_needs_the_same(tiny_llama):
    model = tiny_llama()
    inject(model, BitFlipSpec(w_p_exp=2**-10), LoraSpec(r=4, lora_alpha=4))
    expected = flops_per_token(model, SEQ_LEN)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
        assert flops_per_token(model, SEQ_LEN) == expected
    finally:
        dist.destroy_process_group()


def test_a_model_without_attention_heads_has_weights_only():
    assert flops_per_token(nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 3), nn.LayerNorm(3)), SEQ_LEN) == 6 * 15


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_gpus_are_known_by_name(name, tflops):
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops_by_name(name, torch.float16) == expected
    old = "V100" in name or "T4" in name
    assert peak_flops_by_name(name, torch.bfloat16) == (None if old else expected)
    assert peak_flops_by_name(name, torch.float32) is None


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_lengths_of_unions_and_differences_are_those_of_sets():
    generator = random.Random(0)
    for _ in range(200):
        lists = [[], []]
        for intervals in lists:
            for _ in range(generator.randrange(6)):
                start = generator.randrange(20)
                intervals.append((start, start + generator.randrange(8)))
        a, b = ({point for start, end in intervals for point in range(start, end)} for intervals in lists)
        assert union_length(lists[0]) == len(a)
        assert difference_length(*lists) == len(a - b)


class Profile:
    """A finished profile of given events: (name, device type, start, end)."""

    def __init__(self, *events, annotations=()):
        self.found = EventList(
            FunctionEvent(i, name, 0, start, end, device_type=kind, is_user_annotation=name in annotations)
            for i, (name, kind, start, end) in enumerate(events)
        )

    def events(self):
        return self.found


def test_communication_is_what_nccl_and_peer_copies_run_and_exposed_where_nothing_else_does():
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    profile = Profile(
        ("cudaLaunchKernel", cpu, 0.0, 5.0),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", gpu, 10.0, 30.0),
        ("gemm", gpu, 20.0, 40.0),
        ("Memcpy HtoD (Pinned -> Device)", gpu, 10.0, 30.0),
        ("Memcpy PtoP (Device -> Device)", gpu, 50.0, 60.0),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", gpu, 55.0, 65.0),
        ("nccl:all_gather", gpu, 0.0, 100.0),
        ("ProfilerStep#3", gpu, 0.0, 100.0),
        ("cudaDeviceSynchronize", cpu, 70.0, 80.0),
        annotations={"nccl:all_gather", "ProfilerStep#3"},
    )
    # running 10 to 30 and 50 to 65 of 0 to 80; exposed 10 to 20 and 50 to 65
    assert communication_share(profile) == (pytest.approx(35 / 80), pytest.approx(25 / 80))
    alone = Profile(("gemm", gpu, 0.0, 1.0))
    assert communication_share(alone) == (0.0, 0.0)


def test_on_a_cpu_communication_is_what_gloo_runs_and_nobody_knows_what_is_exposed():
    cpu = DeviceType.CPU
    profile = Profile(
        ("aten::mm", cpu, 0.0, 30.0),
        ("c10d::_allgather_base_", cpu, 30.0, 35.0),
        ("gloo:all_gather", cpu, 30.0, 50.0),
        ("gloo:all_reduce", cpu, 45.0, 60.0),
        ("FSDP::all_gather_copy_out (0)", cpu, 60.0, 95.0),
        ("aten::copy_", cpu, 60.0, 100.0),
        annotations={"gloo:all_gather", "gloo:all_reduce", "FSDP::all_gather_copy_out (0)"},
    )
    assert communication_share(profile) == (pytest.approx(30 / 100), None)
    profile = Profile(("aten::mm", cpu, 0.0, 30.0), ("gloo:send", cpu, 20.0, 60.0), annotations={"gloo:send"})
    assert communication_share(profile) == (pytest.approx(40 / 60), None)


def test_a_profile_of_a_cpu_says_nothing_of_communication():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(4) + 1
    assert communication_share(profile) is None
