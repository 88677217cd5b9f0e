"""Answers of lm-eval that are kept, by run.

A directory has one file for each run, under a hash of all that its answer depends on: weights, adapter, tokenizer,
dtype, task, its data, arm, faults, seed, batch size and versions. A file holds what the whole run gave, never single
responses: to answer some requests from a cache would move the others to other ticks and batches, that is, to other
flips.
"""

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flipproof.config import RunConfig
from flipproof.errors import ConfigError
from flipproof.faults.inject import iter_faulty
from flipproof.files import write_atomically
from flipproof.measure.arms import ARMS
from flipproof.records import read_record, sealed

SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's own defaults, named so that no later version changes them."""
_CAUSE = 500  # characters


class Answers:
    """The kept answers of one model."""

    def __init__(self, directory: Path, config: RunConfig, model: nn.Module, tokenizer: Any) -> None:
        self.directory, self.bitflip = directory, config.bitflip
        self._of_model = model_key(config, model, tokenizer)

    def key(self, task: dict[str, Any], arm: str, seed: int | None) -> dict[str, Any]:
        """All that an answer depends on, as JSON. The clean arms know nothing of faults, nor untrained ones of
        adapters: their answers serve other faults and adapters too."""
        kind = ARMS[arm]
        return {
            **{name: value for name, value in self._of_model.items() if name != "adapter" or kind.trained},
            "task": task,
            "arm": arm,
            # the seed of the draws is not base_seed but the trial's
            "bitflip": asdict(self.bitflip) | {"base_seed": seed} if kind.guard else None,
        }

    def path(self, key: dict[str, Any]) -> Path:
        return self.directory / f"{as_sha256(key)[:32]}.json"

    def read(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """What an equal run gave. Raises ConfigError where a file of the name holds no answer, or another run's."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            written = read_record(path, needs_hash=True)
            answer: dict[str, Any] = written["answer"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError([f"--cache: {path} is no answer that was kept ({cause_of(error)}); delete it"]) from error
        if written["key"] != json.loads(json.dumps(key, default=float)):
            raise ConfigError([f"--cache: {path} is the answer of another run under this one's name; delete it"])
        return answer

    def write(self, key: dict[str, Any], answer: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # unlike results.json this file is read back: infinity must stay infinity
        written = json.loads(json.dumps({"key": key, "answer": answer}, default=float))
        write_atomically(self.path(key), json.dumps(sealed(written), indent=1) + "\n")


def cause_of(error: BaseException) -> str:
    """What an error of somebody else's code says, in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if not text or isinstance(error, KeyError):  # which says its key alone
        text = f"{name}: {text}" if text else name
    return text if len(text) <= _CAUSE else f"{text[:_CAUSE]} …"


def as_sha256(value: Any) -> str:
    """A hash of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def model_key(config: RunConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    """All that answers depend on beside task, arm and faults, as JSON."""
    shape = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):
        shape.pop(name, None)
    return {
        "kept": 2,  # to be raised when files are written in another way
        "weights": _tensors_sha256(model, adapters=False),
        "adapter": [
            _tensors_sha256(model, adapters=True),
            {name: str(layer.lora) for name, layer in iter_faulty(model) if layer.lora},
        ],
        "model": shape,
        "generation": json.loads(model.generation_config.to_json_string(use_diff=False)),
        "tokenizer": _tokenizer_sha256(tokenizer),
        "dtype": [str(next(model.parameters()).dtype), config.training.mixed_precision_param],
        "device": model.device.type,
        "batch_size": config.training.local_batch_size,
        "seeds": SEEDS,
        "versions": {name: version(name) for name in ("flipproof", "lm_eval", "torch", "transformers")},
    }


def _tensors_sha256(model: nn.Module, adapters: bool) -> str:
    """A hash of the names, dtypes, shapes and bytes of the model's weights, or of its adapters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith((".lora_A", ".lora_B")) == adapters:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_sha256(tokenizer: Any) -> str:
    from datasets.fingerprint import Hasher

    if not tokenizer.is_fast:
        return str(Hasher.hash(tokenizer))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # each call of a tokenizer sets these two anew: here they only tell what its last call was
    del state["truncation"], state["padding"]
    return as_sha256(
        [
            state,
            type(tokenizer).__qualname__,
            {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            tokenizer.chat_template,
        ]
    )
