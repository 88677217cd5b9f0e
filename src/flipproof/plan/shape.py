"""The sizes of a model that a plan counts with, read off the model itself on the meta device, faults and adapters
included: nothing is loaded, and no weights are needed."""

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from flipproof.config import RunConfig
from flipproof.errors import ConfigError
from flipproof.faults.inject import inject
from flipproof.faults.linear import FaultyLinear
from flipproof.formats.linear import quantised_weights
from flipproof.models.frozen import ROWS
from flipproof.models.load import byte_tokenizer, skeleton
from flipproof.models.loss import CHANGES_LOGITS, LossHead, fuse_loss
from flipproof.models.parallelize import blocks, cast_to
from flipproof.models.quantised import check_training, checkpoint_of, quantised_layers, without_compilation
from flipproof.train.throughput import flops_per_token


@dataclass(frozen=True)
class Shape:
    """A dense decoder of equal blocks: attention, then a gated MLP. Parameters are counts, widths are features."""

    blocks: int
    hidden: int
    ffn: int
    queries: int
    """Heads x channels of a head; of keys and values each ``keys``."""
    keys: int
    heads: int
    vocabulary: int
    block: int
    """Parameters of a block, without adapters."""
    products: int
    """Of these, weights of linear layers; the largest of them has ``largest``."""
    largest: int
    adapters: int
    """Of a block."""
    faulty: int
    """Weights of a block's faulty layers."""
    embedding: int
    head: int
    """0 where it is the embedding's weight."""
    rest: int
    """The last norm, and what else is in no block."""
    divisor: int
    """The largest number that divides the rows of all matrices."""
    flops: float
    """That training needs for a token, forward and backward, recomputing nothing."""
    forward_flops: float
    whole_logits: int
    """Tensors of whole logits, as computed, that the loss holds; 0 where it takes them a chunk at a time."""
    stored: int = 0
    """Bytes of a block's quantised weights, codes, scales and all; 0 where weights are plain."""
    stored_rows: int = 0
    """Of these what GPUs of a node share."""

    @property
    def parameters(self) -> int:
        """Without adapters."""
        return self.blocks * self.block + self.embedding + self.head + self.rest

    @property
    def matrices(self) -> int:
        """Of the parameters those that are no vectors."""
        return self.blocks * self.products + self.embedding + self.head


def shape_of(config: RunConfig) -> Shape:
    """
    Raises:
        ConfigError: for a model that is not known, or whose blocks are of another kind.
    """
    model = without_weights(config)
    hf_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = blocks(model)
    missing = [key for key in ("intermediate_size", "num_attention_heads", "hidden_size") if not _has(hf_config, key)]
    if missing or not _alike(layers) or getattr(hf_config, "num_experts_per_tok", None):
        raise ConfigError(
            [f"flipproof plan knows decoders of equal blocks with one MLP each; {type(model).__name__} is another kind"]
        )
    if config.model.quantize is not None:
        if (inputs := config.model.quantize_inputs) is not None:
            raise ConfigError(
                [f"model.quantize_inputs = {inputs!r}: flipproof plan does not count what that takes; leave it out"]
            )
        check_training(config, config.model.quantize)
        without_compilation(config, model)  # which refuses to compile
    frozen = _size(model)
    forward = _forward_flops(model, config.training.seq_len)
    make_faulty(model, config)
    if not _alike(layers):
        raise ConfigError(["flipproof plan knows blocks that are all alike; here patterns give adapters to some alone"])
    head = model.get_output_embeddings()  # type: ignore[operator]
    caps = any(getattr(hf_config, key, None) for key in CHANGES_LOGITS)
    first = layers[0]
    linears = [module for module in first.modules() if isinstance(module, nn.Linear)]
    linear = list(map(_weights, linears))
    faulty = [module for module in first.modules() if isinstance(module, FaultyLinear)]
    adapters = sum(p.numel() for name, p in first.named_parameters() if "lora_" in name)
    heads = hf_config.num_attention_heads
    width = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    block = _size(first) - adapters
    own_head = head.weight.numel() if head.weight is not embedding else 0
    return Shape(
        blocks=len(layers),
        hidden=hf_config.hidden_size,
        ffn=hf_config.intermediate_size,
        queries=heads * width,
        keys=(getattr(hf_config, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        vocabulary=embedding.shape[0],
        block=block,
        products=sum(linear),
        largest=max(linear),
        adapters=adapters,
        faulty=sum(map(_weights, faulty)) if config.bitflip.any_fault else 0,
        embedding=embedding.numel(),
        head=own_head,
        rest=frozen - len(layers) * block - embedding.numel() - own_head,
        divisor=math.gcd(embedding.shape[0], *(module.out_features for module in linears)),
        flops=_training_flops(model, config),
        forward_flops=forward,
        whole_logits=0 if isinstance(head, LossHead) else 3 if caps else 2,
        stored=stored_bytes(first),
        stored_rows=stored_bytes(first, ROWS),
    )


def stored_bytes(model: nn.Module, operands: Container[str] | None = None) -> int:
    """Of the quantised weights of a model or a block, as they are held; of all their operands, or of these."""
    layers = quantised_layers(model).values()
    held = (found for layer in layers for found in layer.named_buffers(recurse=False))
    return sum(tensor.nbytes for name, tensor in held if operands is None or name in operands)


def _weights(linear: nn.Linear) -> int:
    return linear.in_features * linear.out_features


def _size(model: nn.Module) -> int:
    """Parameters, quantised weights among them."""
    return sum(p.numel() for p in model.parameters()) + quantised_weights(model)


def _alike(layers: list[nn.Module]) -> bool:
    """By the number of their parameters."""
    return len({_size(layer) for layer in layers}) == 1


def without_weights(config: RunConfig) -> nn.Module:
    """The config's model on the meta device, without faults and adapters. Raises ConfigError where it is not known."""
    model = config.model
    if model.flavor is not None:  # says all that is to know, without a network
        model = replace(model, init="random", hf_model_path=None)
    made = skeleton(model, byte_tokenizer(), config.training.dtype)
    if checkpoint := checkpoint_of(model, made.config):
        raise ConfigError(
            [
                f"model.hf_model_path = {model.hf_model_path!r} is quantised already ({checkpoint.method}); flipproof "
                "plan counts what model.quantize makes of plain weights: name those"
            ]
        )
    return made


def make_faulty(model: nn.Module, config: RunConfig) -> None:
    """Give a model on the meta device the faults, the adapters and the loss that training gives it, in place."""
    if config.faulty:
        inject(model, config.bitflip, config.lora, computed=cast_to(config.training, model))
    fuse_loss(model)


def _has(config: Any, key: str) -> bool:
    return isinstance(getattr(config, key, None), int)


def _training_flops(model: nn.Module, config: RunConfig) -> float:
    if config.lora.r:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return flops_per_token(model, config.training.seq_len, bool(config.training.distill))


def _forward_flops(model: nn.Module, seq_len: int) -> float:
    """A third of what training all weights needs, the quantised ones as if they trained."""
    return (flops_per_token(model, seq_len) + 2 * quantised_weights(model)) / 3
