"""Tiny random models of many architectures, with gains, biases and a channel that an initialisation would not give."""

import torch
import transformers

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
MORE = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16},
    "Granite": {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "Mixtral": {"num_local_experts": 4},
}


def bumpy(kind, **more):
    """A model named as ``transformers`` names its config."""
    config = getattr(transformers, f"{kind}Config")(**SHAPE | MORE.get(kind, {}) | more)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else 0.1))
    return model.eval()
