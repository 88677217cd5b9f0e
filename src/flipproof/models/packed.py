"""Several samples in one row of a batch, of which none sees another: whether a model can do that.

Nothing is done for it but to tell the model the positions: where they begin anew, ``transformers`` makes the causal
mask block-diagonal (``masking_utils``, which looks for it where there is no attention mask), for all its kinds of
attention and for ours (``faults/attention.py``). On a GPU that is FlexAttention where a model has it, which passes over
what the mask leaves out and needs no mask of seq_len² in memory. A model whose code makes its masks otherwise, or that
has a memory beside attention (Mamba), would let samples leak, silently. So it is tried before anything is trained or
measured.

Samples with a row of their own need none of it: padding is on the right, where causal attention does not look.
"""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from flipproof.config import TrainingConfig
from flipproof.errors import ConfigError
from flipproof.faults.attention import attend_with
from flipproof.faults.inject import faults, is_faulty
from flipproof.models.limits import check_ids
from flipproof.models.load import compute_context
from flipproof.models.loss import last_states

_WAY_OUT = "set data.packing = false, which pads instead"


def check_text(training: TrainingConfig, model: nn.Module, tokenizer: Any, *texts: Any) -> None:
    """Raises ConfigError where texts (``PackedText``) hold tokens that the model does not know, or several samples in a
    sequence, which it does not keep apart. All processes must call, before the model first runs."""
    check_ids(model, tokenizer, *(text.sequences for text in texts))
    if any(text.packed for text in texts):
        if next(model.parameters()).is_cuda and can_attend_by_blocks(model):
            attend_with(model, "flex_attention")
        with compute_context(training, model):
            check_packing(model, training.local_batch_size, training.seq_len)


def can_attend_by_blocks(model: Any) -> bool:
    """Whether a model has FlexAttention, and nothing that this has not: dropout, and heads of fewer than 16."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropped = getattr(config, "attention_dropout", 0.0)
    return bool(getattr(model, "_supports_flex_attn", False)) and not dropped and head_dim >= 16


def check_packing(model: nn.Module, rows: int, seq_len: int) -> None:
    """Try samples in a row beside others, ``rows`` rows of ``seq_len`` tokens as in a batch. All processes must call,
    in the context that the model computes in.

    Raises:
        ConfigError: where a model takes no positions, or says something else of a sample that comes after another.
    """
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError([f"data.packing = True: {name} takes no positions (position_ids); {_WAY_OUT}"])
    device, half = next(model.parameters()).device, seq_len // 2
    known = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    ids = torch.randint(0, min(256, known), (2 * half,), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(half, device=device).repeat(rows, 2)
    with faults(model, flips=False, guard=False) if is_faulty(model) else nullcontext():
        # the second of two samples, and the same where nothing is before it
        after = last_states(model, ids.repeat(rows, 1), positions)[:, half:]
        alone = last_states(model, ids.roll(half).repeat(rows, 1), positions)[:, :half]
    dtypes = {after.dtype, next(model.parameters()).dtype}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    # what another order of sums may change; more of it in each of a deep model's layers
    tolerance = min(0.1, 1000 * max(torch.finfo(dtype).eps for dtype in dtypes))
    if not (after.double() - alone.double()).abs().max() <= tolerance * alone.double().abs().max():
        raise ConfigError(
            [f"data.packing = True: {name} says something else of a sample that another comes before; {_WAY_OUT}"]
        )
