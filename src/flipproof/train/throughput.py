"""How well a training step uses its GPUs: what a token needs, what the device could do, what communication costs.

**Model FLOPs utilisation** (MFU; Chowdhery et al., PaLM, 2022, appendix B) is tokens per second × FLOPs per token ÷
peak FLOPs per second of all devices. The FLOPs are those that the mathematics asks for, so what activation
checkpointing computes again and what drawing flips costs lower the MFU instead of flattering it.

**Communication** runs beside the computation, on streams of its own, and costs time only where nothing else runs
meanwhile. From the kernels of one profiled step, as intervals on the device's clock, follow the share of the step in
which any collective runs, and the share in which only collectives run: the exposed part, which is what better overlap
or a faster network could win.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from flipproof.formats.linear import QuantisedLinear

# -- what a token needs ------------------------------------------------------------------------------------------------


def flops_per_token(model: nn.Module, seq_len: int, distilled: bool = False) -> float:
    """Floating-point operations that training needs per token of a sequence of ``seq_len``, without recomputation.

    A multiplication and an addition count as two. What is counted:

    - A weight of a matrix product: 2 forward, 2 backward for the gradient of the input (in the first layer too, where
      nobody may need it), and 2 for its own gradient where it is trainable. So 6 per trainable weight, 4 per frozen
      one. A look-up in an embedding is no product; an output head tied to the embedding is.
    - A weight of an adapter of our faulty layer: 4. Forward it is part of the merged weight and costs nothing per
      token; backward is four thin products (``linear.py``). Merging and flipping, whose cost does not grow with the
      tokens, are not counted. Beside a quantised weight, which counts as a frozen one, it is a product of its own: 6.
    - Experts stacked in one parameter (experts, out, in): as many as a token passes through
      (``num_experts_per_tok`` of the model's config).
    - Causal attention: QKᵀ and AV, each 2 per channel and earlier token, on average seq_len / 2 of these; backward
      twice that. Every layer counts as plain attention of ``num_attention_heads`` heads of ``head_dim`` channels;
      without heads in the model's config there is none.
    - Distilled, each of these once more forward, for the teacher.

    Args:
        model: a causal language model, sharded or not, on any device including meta.
        seq_len: tokens per sequence.
        distilled: whether the model is its own teacher (``training.distill``).
    """
    passes = 1 + distilled  # forward
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()  # that of a multimodal model has others beside it
    total = 0.0
    for module in model.modules():  # each once; a weight that two of them share is used by both
        if isinstance(module, nn.Embedding):
            continue
        if beside := isinstance(module, QuantisedLinear):
            total += (2 * passes + 2) * module.in_features * module.out_features
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2:
                continue
            used = weight.numel()  # of a sharded weight the whole
            if weight.dim() == 3 and (experts_per_token := getattr(config, "num_experts_per_tok", None)):
                used = used * experts_per_token // weight.shape[0]
            forward = 0 if name in ("lora_A", "lora_B") and not beside else 2 * passes
            total += (forward + 2 + 2 * weight.requires_grad) * used
    return total + (passes + 2) * _attention_flops(config, seq_len)


def _attention_flops(config: Any, seq_len: int) -> float:
    """Of attention scores and the sums they weigh, per token, forward."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * 2 * (seq_len / 2) * heads * head_dim * float(config.num_hidden_layers)


# -- what the device could do ------------------------------------------------------------------------------------------

_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("gb200", 2500.0),
    ("b200", 2250.0),
    ("gh200", 989.4),
    ("h200 nvl", 835.5),
    ("h200", 989.4),
    ("h100 pcie", 756.0),
    ("h100 nvl", 835.5),
    ("h100", 989.4),
    ("a100", 312.0),
    ("l40s", 362.0),
    ("l40", 181.0),
    ("l4", 121.0),
    ("a10", 125.0),
    ("v100 sxm2", 125.0),
    ("v100 sxm3", 125.0),
    ("v100 pcie", 112.0),
    ("t4", 65.0),
    ("rtx 4090", 165.2),
    ("rtx 5090", 209.5),
)
"""Words of a GPU's name -> dense peak in 16 bits; the first row whose words all occur counts."""

_NO_BFLOAT16 = {"v100", "t4"}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of matrix products in ``dtype`` on ``device``, in FLOPs per second.

    None for CPUs, for GPUs that are not listed and for dtypes other than bfloat16 and float16: what float32 reaches
    depends on whether TF32 is allowed.

    The figures are those of NVIDIA's data sheets (A100, A10, L4, L40, L40S, H100, H200, GH200, B200, GB200, V100, T4),
    of the Ada and Blackwell GeForce whitepapers for the RTX 4090 and 5090 (products that add in float32),
    and of the Hopper whitepaper for H100 SXM and PCIe, without sparsity, which doubles what newer sheets print.
    """
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device), dtype)


def peak_flops_by_name(name: str, dtype: torch.dtype) -> float | None:
    """``peak_flops`` of the GPU that CUDA calls ``name``, such as "NVIDIA A100-SXM4-80GB"."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if "mig" in words or dtype not in (torch.bfloat16, torch.float16):  # MIG: a slice of a GPU
        return None
    if dtype == torch.bfloat16 and words & _NO_BFLOAT16:
        return None
    return next((peak * 1e12 for row, peak in _PEAK_TFLOPS if words >= set(row.split())), None)


# -- what communication costs ------------------------------------------------------------------------------------------

Interval = tuple[float, float]
"""(start, end) of something that ran."""


def union_length(intervals: Iterable[Interval]) -> float:
    """How long at least one of the intervals lasts."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def difference_length(intervals: list[Interval], others: list[Interval]) -> float:
    """How long at least one of the intervals lasts and none of the others: |A \\ B| = |A ∪ B| - |B|."""
    return union_length(intervals + others) - union_length(others)


def communication_share(profile: torch.profiler.profile) -> tuple[float, float | None] | None:
    """(share of the time in which collectives run, share in which they run and no other kernel does).

    A collective runs from its start on this process's GPU, so waiting for slower processes is part of it. Collectives
    are NCCL's kernels and, for those that copy engines carry out, copies from GPU to GPU; other copies and fills are
    neither communication nor computation. On CPUs, collectives are what gloo calls so, from when it is asked to when it
    is done; whether anything else runs meanwhile is not known, since all share the cores.

    Args:
        profile: finished, of one step or several, with ``ProfilerActivity.CUDA`` on a GPU and ``ProfilerActivity.CPU``
            elsewhere. The time is that from its first event to the end of its last, on host or device.

    Returns:
        The shares, 0 to 1, the second None on CPUs; None where nothing ran on a GPU and gloo did nothing.
    """
    every = profile.events() or ()
    events = [event for event in every if not event.is_user_annotation]
    collectives: list[Interval] = []
    kernels: list[Interval] = []
    for event in events:
        if event.device_type != DeviceType.CUDA:
            continue
        interval = (event.time_range.start, event.time_range.end)
        if event.name.startswith("nccl") or "Memcpy PtoP" in event.name:
            collectives.append(interval)
        elif not event.name.startswith(("Memcpy", "Memset")):
            kernels.append(interval)
    on_gpu = bool(collectives or kernels)
    if not on_gpu:
        of_gloo = [event for event in every if event.name.startswith("gloo:")]
        collectives = [(event.time_range.start, event.time_range.end) for event in of_gloo]
        if not collectives:
            return None
        events += of_gloo  # which may end last
    start = min(event.time_range.start for event in events)
    duration = max(event.time_range.end for event in events) - start
    exposed = difference_length(collectives, kernels) / duration if on_gpu else None
    return union_length(collectives) / duration, exposed
