"""Shapes by name: the Llama 3 and 3.2 families, AICrossSim-CLM, and the small ones of the demo and the tests."""

from typing import Any

_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_LLAMA32: dict[str, Any] = _LLAMA3 | {
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_CLM: dict[str, Any] = {  # AICrossSim-CLM; the feed-forward width follows from ffn_dim_multiplier 1.3, multiple_of 128
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def _shape(base: dict[str, Any], hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return base | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        **more,
    }


def _clm_ffn(dim: int) -> int:
    """Llama's rule: 4·dim, two thirds of it, times the multiplier, rounded up to the multiple."""
    return (int(1.3 * int(2 * 4 * dim / 3)) + 127) // 128 * 128


FLAVORS: dict[str, dict[str, Any]] = {
    "1B": _shape(_LLAMA32, 2048, 16, 32, 8192, head_dim=64),
    "3B": _shape(_LLAMA32, 3072, 28, 24, 8192, head_dim=128),
    "8B": _shape(_LLAMA3, 4096, 32, 32, 14336),
    "70B": _shape(_LLAMA3, 8192, 80, 64, 28672),
    "405B": _shape(_LLAMA3, 16384, 126, 128, 53248),
    **{
        f"clm-{name}": _shape(_CLM, dim, layers, heads, _clm_ffn(dim), num_key_value_heads=kv_heads)
        for name, dim, layers, heads, kv_heads in (
            ("60M", 384, 22, 6, 2),
            ("200M", 768, 24, 12, 4),
            ("400M", 960, 30, 15, 5),
            ("600M", 1152, 32, 18, 6),
            ("1.1B", 1536, 32, 24, 8),
        )
    },
    "demo": _shape({"vocab_size": 258, "max_position_embeddings": 1024}, 128, 4, 4, 320),
}
"""Llama shapes by name, as keyword arguments of ``transformers.LlamaConfig``."""
