"""What a model can take: how many positions a sequence may have, and which token ids."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from flipproof.errors import ConfigError

_POSITIONS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""How configs of ``transformers`` say it; others (GPT-2's ``n_positions``) are called the first of these too. A sliding
window is no limit."""


def positions(hf_config: Any) -> int | None:
    """How many positions a sequence may have, scaling of rotary embeddings included; None where there is no limit, as
    with ALiBi or in recurrent models."""
    config = hf_config.get_text_config()
    if getattr(config, "alibi", False):  # Falcon; Bloom names no length, and MPT's is one
        return None
    room = next((n for key in _POSITIONS if isinstance(n := getattr(config, key, None), int)), -1)
    if room < 1:  # XLNet says -1
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # of each type of layer, or of all
    return min(_stretched(room, kind) for kind in kinds)


def _stretched(room: int, rope: dict[str, Any]) -> int:
    """What scaling makes of ``room``; where that is counted in already, the length before is named."""
    if rope.get("rope_type", "default") == "default":
        return room
    return max(room, int((rope.get("original_max_position_embeddings") or room) * (rope.get("factor") or 1)))


def check_positions(hf_config: Any, seq_len: int) -> None:
    """Raises ConfigError where a sequence of ``training.seq_len`` tokens has more positions than the model."""
    room = positions(hf_config)
    if room is not None and seq_len > room:
        raise ConfigError([f"training.seq_len = {seq_len}: the model has {room} positions; at most {room} is allowed"])


def check_ids(model: nn.Module, tokenizer: Any, *texts: Any) -> None:
    """Raises ConfigError where a text (an array of token ids) holds a token that the model does not know.

    A tokenizer may have more tokens than the model, as long as no text holds one.
    """
    check = checker_of_ids(model, tokenizer)
    for ids in texts:
        check(ids)


def checker_of_ids(model: nn.Module, tokenizer: Any) -> Callable[[np.ndarray], None]:
    """``check_ids`` of a text, for later: it does not hold the model."""
    rows = _rows(model)
    knows_all = max(tokenizer.get_vocab().values()) < rows

    def check(ids: np.ndarray) -> None:
        for part in [] if knows_all else np.array_split(ids, len(ids) // 2**14 + 1):
            if part.size:
                _check_largest(int(part.max()), rows, tokenizer)

    return check


def watch_ids(model: nn.Module, tokenizer: Any) -> None:
    """Let the model raise ``check_ids``'s ConfigError before it reads a token that it does not know."""
    rows = _rows(model)
    if max(tokenizer.get_vocab().values()) < rows:
        return

    def check(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _check_largest(int(args[0].max()), rows, tokenizer)

    model.get_input_embeddings().register_forward_pre_hook(check)  # type: ignore[operator]


def _rows(model: Any) -> int:
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def _check_largest(largest: int, rows: int, tokenizer: Any) -> None:
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            [
                f"model.tokenizer: the text holds {token!r}, id {largest}, and the model's embedding has {rows} rows "
                f"(ids up to {rows - 1}); take the model's own tokenizer, or the token out of the text"
            ]
        )
